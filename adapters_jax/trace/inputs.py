"""Example inputs: stand-ins from which a model's shapes are found without computing anything."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from adapters_jax.errors import UserError, shortened

# What jax, flax and a model's own checks raise where parameters do not fit the model.
MISFITS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    FlaxError,
)


def is_array(x: Any) -> bool:
    """Whether x has a shape and a dtype: an array of jax or numpy, or an abstract one."""
    return isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")


def is_abstract(tree: Any) -> bool:
    """Whether a tree has a leaf that is only a shape and a dtype."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def filled(tree: Any) -> Any:
    """The tree with zeros for its arrays, for runs where only shapes matter; keys are kept."""

    def zeros(x: Any) -> Any:
        if not is_array(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.zeros(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(zeros, tree)


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a model; `aj.inputs` makes them.

    Attributes:
        method: the function of the model that takes them, its name or a function of the model;
            None for `__call__`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    method: Any = None

    def __repr__(self) -> str:
        text = inputs_text(self.args, self.kwargs)
        return f"inputs({text}" + (f", method={self.method!r})" if self.method else ")")

    @classmethod
    def of(cls, given: Any) -> "Inputs | None":
        """Example inputs as functions take them: `aj.inputs(...)`, or a tuple of inputs.

        Raises:
            UserError: `given` is an input itself, or a mapping, whose parts would be taken for it.
        """
        if given is None or isinstance(given, cls):
            return given
        if is_array(given) or isinstance(given, str | Mapping) or not isinstance(given, Iterable):
            call = "(x,), or aj.inputs(x, mask=m)"
            if isinstance(given, Mapping):
                call = "(inputs,) for one mapping, or aj.inputs(**inputs) for keyword arguments"
            raise UserError(
                f"the example inputs are {_text(given)}, expected a tuple of inputs; write {call}"
            )
        return cls.of_call(tuple(given), {})

    @classmethod
    def of_call(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: Any = None
    ) -> "Inputs":
        """Example inputs as a function got them: one by one, or as one `aj.inputs(...)`.

        Raises:
            UserError: `aj.inputs(...)` is one of several.
        """
        if not any(isinstance(x, cls) for x in (*args, *kwargs.values())):
            return cls(args, kwargs, method)
        if len(args) == 1 and not kwargs and method is None:
            return args[0]
        raise UserError(
            f"the example inputs are {inputs_text(args, kwargs)}, expected aj.inputs(...) alone, "
            "or inputs without it; write all of them in it, as in aj.inputs(x, mask=m)"
        )

    def zeros(self) -> "Inputs":
        """The inputs with zeros for their arrays."""
        args, kwargs = filled((self.args, dict(self.kwargs)))
        return Inputs(args, kwargs, self.method)

    def shapes(self) -> "Inputs":
        """The inputs with shapes and dtypes for their arrays, so that they keep no memory."""

        def shape(x: Any) -> Any:
            if not is_array(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        args, kwargs = jax.tree.map(shape, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs, self.method)

    def split(self) -> tuple[dict[int, Any], Callable[[Mapping[int, Any]], "Inputs"]]:
        """Its arrays as shapes and dtypes, and the inputs as a function of others in their place.

        A traced function that has these arrays as arguments shows what depends on the inputs.
        """
        leaves, structure = jax.tree.flatten((self.args, dict(self.kwargs)))

        def whole(arrays: Mapping[int, Any]) -> "Inputs":
            found = [arrays.get(i, x) for i, x in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, found)
            return Inputs(args, kwargs, self.method)

        # A dtype as jax computes with it: float64 of numpy is float32, unless x64 is enabled.
        dtype = functools.partial(jax.dtypes.canonicalize_dtype, allow_extended_dtype=True)
        shapes = ((i, x.shape, dtype(x.dtype)) for i, x in enumerate(leaves) if is_array(x))
        return {i: jax.ShapeDtypeStruct(*each) for i, *each in shapes}, whole

    def call(self, model: Any) -> Any:
        """Calls a model on the inputs."""
        return self.function(model)(*self.args, **self.kwargs)

    def function(self, model: Any) -> Callable[..., Any]:
        """The function of a model that takes the inputs."""
        if self.method is None:
            return model
        if isinstance(self.method, str):
            return getattr(model, self.method)
        return functools.partial(getattr(self.method, "__func__", self.method), model)


def inputs(*args: Any, method: Any = None, **kwargs: Any) -> Inputs:
    """Example inputs of a model; only their shapes and dtypes matter.

    Args:
        *args: inputs, arrays or `jax.ShapeDtypeStruct`.
        method: the function that takes them: a name such as `"encode"`, or a function of the model
            such as `lambda model, x: model.decode(model.encode(x))`; by default `__call__`.
        **kwargs: inputs by name.

    Returns:
        The inputs, for every function that takes example inputs.

    Example:
        >>> inputs(jnp.ones((2, 3)), train=False, method="encode")
        inputs(float32[2, 3], train=False, method='encode')
    """
    return Inputs(args, kwargs, method)


@contextlib.contextmanager
def explained(model: Any, given: Inputs) -> Iterator[None]:
    """Runs its body; an error that the body raises names the model and its example inputs.

    Args:
        model: the body calls it on shapes; errors of its code keep their type and get a note.

    Raises:
        UserError: the model does not take these inputs, or fails on them and the first of them is a
            tree of parameters.
    """
    name, text = type(model).__name__, inputs_text(given.args, given.kwargs)
    try:
        own = "__call__" if given.method is None else given.method
        called = getattr(type(model), own) if isinstance(own, str) else own
        inspect.signature(called).bind(model, *given.args, **given.kwargs)
    except TypeError as error:
        if _first_is_params(given):
            raise _misplaced(name, given) from error
        raise UserError(
            f"{name} cannot be called with the example inputs ({text}): {error}; pass inputs as "
            "for the model itself"
        ) from error
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            if _first_is_params(given):
                raise _misplaced(name, given) from error
            error.add_note(
                f"adapters_jax ran {name} on the example inputs ({text}), abstractly, to find its "
                "modules and shapes."
            )
        raise


def inputs_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Inputs as a message prints them: arrays by dtype and shape.

    Example:
        >>> inputs_text([jnp.zeros((2, 3))], {"train": False})
        'float32[2, 3], train=False'
    """

    return ", ".join([*map(_text, args), *(f"{key}={_text(x)}" for key, x in kwargs.items())])


def _text(x: Any) -> str:
    """An input as a message prints it, without the numbers of its arrays.

    Example:
        >>> _text({"ids": jnp.zeros((2, 3), int)}), _text((jnp.zeros(1), None))
        ("{'ids': int32[2, 3]}", '(float32[1], None)')
    """
    if is_array(x):
        return f"{x.dtype}{list(x.shape)}"
    if isinstance(x, Mapping):
        return shortened(f"{{{', '.join(f'{name!r}: {_text(part)}' for name, part in x.items())}}}")
    if isinstance(x, tuple | list):
        return shortened(f"({', '.join(map(_text, x))})")
    return shortened(repr(x))


_PARAMETERS = frozenset({"kernel", "embedding", "scale", "bias"})  # of flax's layers


def _misplaced(name: str, given: Inputs) -> UserError:
    """The error for parameters among the example inputs."""
    return UserError(
        f"{name}: the first of its example inputs is a tree of parameters "
        f"({shortened(', '.join(map(str, given.args[0])))}), expected the inputs of the model; "
        "leave it out, as in aj.suggest(model, *inputs), or put it where params are expected, as "
        "in aj.merge(model, params, *inputs)"
    )


def _first_is_params(given: Inputs) -> bool:
    """Whether the first input is a tree that holds all arrays of a layer, and nothing beside them.

    A batch like `{"ids": ..., "scale": ...}` is not, although layers have a `scale` too.
    """

    def nodes(tree: Any) -> Iterator[Mapping[Any, Any]]:
        if isinstance(tree, Mapping):
            yield tree
            for part in tree.values():
                yield from nodes(part)

    def is_layer(node: Mapping[Any, Any]) -> bool:
        own = {name for name, part in node.items() if not isinstance(part, Mapping)}
        return bool(own) and own <= _PARAMETERS

    return any(is_layer(node) for node in nodes(given.args[0] if given.args else None))
