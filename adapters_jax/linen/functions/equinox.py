"""Equinox modules: each is a pytree whose fields have names, and its calls are those of a module.

For a call, every module that is adapted gets a subclass with one more field: the arrays of its
adapters. So loops and batches over modules take these arrays along as they take the others.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax

from adapters_jax.errors import UserError
from adapters_jax.linen.functions.modules import Calls, Held
from adapters_jax.trace.inputs import is_array
from adapters_jax.trees import join

_NAME = "adapters_jax_held"  # a field of the subclasses
keeps_others = True  # such as activation functions


def static(tree: Any) -> dict[str, Any]:
    """The static fields of modules by their paths."""
    found: dict[str, Any] = {}

    def note(node: Any, path: str) -> None:
        for name, part in _parts(node):
            note(part, join(path, name))
        if isinstance(node, eqx.Module):
            fields = (x.name for x in dataclasses.fields(node) if x.metadata.get("static"))
            found.update({join(path, name): getattr(node, name) for name in fields})

    note(tree, "")
    return found


@contextlib.contextmanager
def entered(tree: Any, run: Calls, held: Mapping[str, Held]) -> Iterator[Any]:
    """Gives every module that is adapted, or all while adapters are placed, its subclass."""
    try:
        yield _shown(tree, "", run, held)
    except ValueError as error:
        if "pytree structure error" not in str(error):
            raise
        raise UserError(
            "the function combines parts of modules that are adapted, each with its adapters, "
            "with modules that are not in its parameters, or with one another; give it whole "
            "modules, as in aj.adapt(lambda model, x: fn(eqx.partition(model, eqx.is_array), "
            "x), model, recipe, ...), or target weights, as LoRA does"
        ) from error


def _parts(node: Any) -> list[tuple[str, Any]]:
    """The children of a node of a tree by their names; none of a leaf."""
    # One level, since no node is its own child.
    pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [(keystr(keys), part) for keys, part in pairs if keys]


def _shown(node: Any, path: str, run: Calls, held: Mapping[str, Held]) -> Any:
    """A part of a tree with the subclasses of its modules."""
    parts = [_shown(part, join(path, name), run, held) for name, part in _parts(node)]
    if not parts:
        return node
    definition = jax.tree.structure(node, is_leaf=lambda x: x is not node)
    made = jax.tree.unflatten(definition, parts)
    called = path and isinstance(node, eqx.Module) and callable(node)
    acts = called and (run.init or path in held)
    return _adapted(made, path, run, held.get(path, {})) if acts else made


def _adapted(module: Any, path: str, run: Calls, held: Held) -> Any:
    """A module of the subclass, with the arrays of its adapters."""
    new = object.__new__(_adapted_class(type(module)))  # type: ignore[arg-type]
    for field in dataclasses.fields(module):
        # A field may have been left out by the module's own `__init__`.
        if hasattr(module, field.name):
            object.__setattr__(new, field.name, getattr(module, field.name))
    object.__setattr__(new, _NAME, held)
    object.__setattr__(new, "adapters_jax_call", (path, run))
    return new


@functools.cache
def _adapted_class(cls: type[Any]) -> type[Any]:
    """The subclass of a module class whose calls run adapters."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path, run = self.adapters_jax_call
        own = functools.partial(cls.__call__, self)
        arrays = functools.partial(_arrays, self)
        return run(path, self, arrays, own, args, kwargs, getattr(self, _NAME))

    functools.update_wrapper(call, cls.__call__)
    fields = {_NAME: Any, "adapters_jax_call": Any}
    about = {"__call__": call, "__annotations__": fields, "__module__": cls.__module__}
    defaults = {
        _NAME: eqx.field(default=None),
        "adapters_jax_call": eqx.field(static=True, default=None),
    }
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls,), {**about, **defaults})


def _arrays(module: Any) -> dict[str, Any]:
    """The arrays in a module by their paths there, without those of adapters."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    named = ((jax.tree_util.keystr(k, simple=True, separator="/"), x) for k, x in leaves)
    return {name: x for name, x in named if is_array(x) and _NAME not in name.split("/")}
