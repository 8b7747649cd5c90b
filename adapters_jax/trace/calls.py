"""The call of a module: the input among its arguments, and the arrays in what it returns."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from adapters_jax.errors import shortened
from adapters_jax.trace.inputs import is_array

Names = tuple[str, ...]


def is_floats(x: Any) -> bool:
    """Whether x is an array of floats with an axis."""
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact) and len(x.shape) > 0


def input_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a call: its first array of floats by the order of the signature.

    Without one it is the first argument; None for a call without arguments.
    """
    where = _where(module, args, kwargs)
    return None if where is None else args[where] if isinstance(where, int) else kwargs[where]


def with_input(
    run: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], Any]:
    """A call as a function of its input, with all other arguments fixed."""
    where = _where(module, args, kwargs)

    def again(x: Any) -> Any:
        if isinstance(where, str):
            return run(*args, **{**kwargs, where: x})
        return run(*(x if i == where else arg for i, arg in enumerate(args)), **kwargs)

    return again


def _where(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """The position or name of the input among arguments."""
    given: dict[int | str, Any] = dict(enumerate(args))
    if kwargs:
        names = inspect.signature(type(module).__call__).parameters
        given.update({name: kwargs[name] for name in names if name in kwargs})
        given.update(kwargs)
    return next((where for where, x in given.items() if is_floats(x)), next(iter(given), None))


@dataclass(frozen=True)
class Returned:
    """What a module returned, as shapes.

    Attributes:
        parts: everything that is no container, by path: names and positions joined by slashes, as
            in `0/hidden`. The path of an array that is returned alone is empty. What is no array
            is there by the name of its type.
        like: the shape of the module's input; None where that is no array of floats.
    """

    parts: Mapping[str, Any]
    like: tuple[int, ...] | None = None

    @classmethod
    def of(cls, x: Any, y: Any) -> "Returned":
        """What a module returned for an input."""
        parts = {
            "/".join(names): jax.ShapeDtypeStruct(part.shape, part.dtype)
            if is_array(part)
            else type(part).__name__
            for names, part in _parts(y).items()
        }
        return cls(parts, tuple(x.shape) if is_floats(x) else None)

    def chosen(self, output: str | None) -> str | None:
        """The path of the array of floats that is meant; None where that is not plain.

        Args:
            output: its path; None for the only array of floats, or else the only one that has the
                shape of the input.
        """
        floats = [path for path, part in self.parts.items() if is_floats(part)]
        if output is not None:
            return output if output in floats else None
        alike = [path for path in floats if self.parts[path].shape == self.like]
        return next((found[0] for found in (floats, alike) if len(found) == 1), None)

    def why_not(self, output: str | None) -> str:
        """Why none is chosen, with all that was returned, as the end of a sentence."""

        def text(part: Any) -> str:
            return f"{part.dtype}{list(part.shape)}" if is_array(part) else part

        parts = [f"{path}: {text(x)}" if path else text(x) for path, x in self.parts.items()]
        floats = [path for path, part in self.parts.items() if is_floats(part)]
        returned = f"returns {shortened(', '.join(parts), 600) or 'nothing'}"
        if not floats:
            return f"{returned}; expected an array of floats"
        if output is not None:
            return f"{returned}; output={output!r} names no array of floats there"
        alike = [path for path in floats if self.parts[path].shape == self.like]
        shape = "" if self.like is None else f" {list(self.like)}"
        return (
            f"{returned}; {len(alike) or 'none'} of them have the shape{shape} of its input, "
            f"expected one; say which is meant: output={(alike[-1:] or floats)[0]!r}"
        )


def part_of(y: Any, path: str) -> Any:
    """A part of what a module returned, by its path."""
    return next(part for names, part in _parts(y).items() if "/".join(names) == path)


def with_part(y: Any, path: str, part: Any) -> Any:
    """What a module returned with another part at a path, in containers of the same types."""
    return _replaced(y, next(names for names in _parts(y) if "/".join(names) == path), part)


def _parts(y: Any, names: Names = ()) -> dict[Names, Any]:
    """What is no container, by the names that lead there."""
    level = _level(y)
    if level is None:
        return {names: y}
    found: dict[Names, Any] = {}
    for name, child in level[0]:
        found |= _parts(child, (*names, name))
    return found


def _replaced(y: Any, names: Names, part: Any) -> Any:
    level = _level(y) if names else None
    if level is None:
        return part
    children, rebuild = level
    return rebuild(
        [_replaced(x, names[1:], part) if name == names[0] else x for name, x in children]
    )


def _level(y: Any) -> tuple[list[tuple[str, Any]], Callable[[Any], Any]] | None:
    """The children of a container by name, and how to make one of others; None for other things.

    Containers are what jax takes for such, except modules and Variables.
    """
    if isinstance(y, nnx.Pytree | nnx.Variable):
        return None
    if type(y) in (dict, FrozenDict):  # jax would sort them
        named = [(str(key), x) for key, x in y.items()]
        return named, lambda new: type(y)(dict(zip(y, new, strict=True)))
    structure: Any
    pairs, structure = jax.tree_util.tree_flatten_with_path(y, is_leaf=lambda x: x is not y)
    if any(not keys for keys, _ in pairs):
        return None
    named = [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in pairs]
    return named, structure.unflatten
