"""The attributes of module classes whose values are not what is stored: changed weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array

from adapters_jax.nnx.containers import plain
from adapters_jax.nnx.graph import holds, key_of, leaves_of, marked, node_of, once, point_of
from adapters_jax.trees import join
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.lazy import current, lazy
from adapters_jax.weights.quantized import is_quantized


class Seen:
    """The attribute of a module class whose value is a changed weight, or a container of some.

    Under `thin()` a weight is computed as the reader needs it, elsewhere it is formed.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        variable = vars(module)[self.name]
        if not isinstance(variable, nnx.Variable):
            return plain(variable)
        value = variable.get_raw_value()
        if value is None:
            return variable
        trace = current()
        changed = changed_weight(module, self.name, training=trace is not None)
        if trace is None and not changed.changes:
            return variable  # of a quantised weight, which opens itself
        path = next((join(held.module, self.name) for held in holds(module)), self.name)
        return seen_as(variable, lazy(trace, changed, path) if trace else changed.formed())

    def __set__(self, module: Any, value: Any) -> None:
        given = isinstance(value, dataclasses.Field)  # by nnx.data, which newer flax passes on
        vars(module)[self.name] = value.metadata["nnx_value"] if given else value

    def __delete__(self, module: Any) -> None:
        del vars(module)[self.name]


class Marked(Seen):
    """An attribute whose reads carry a name in `marking()`; reads of the stored value do not."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        return _as_marked(vars(module)[self.name])


def _as_marked(x: Any) -> Any:
    if type(x) is dict:
        return {name: _as_marked(part) for name, part in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_as_marked, x))
    if not isinstance(x, nnx.Variable) or x.get_raw_value() is None:
        return x
    return once(x, seen_as)


def changed_weight(module: Any, name: str, training: bool) -> Changed:
    """A weight of a module with the changes of its methods, whose dropout may be in training."""
    changes: list[Any] = []
    for held in holds(module):
        if held.method.acts_on == "weight":
            read = functools.partial(_floats, module, held.weight)
            key = key_of(node_of(module, held)) if training else None
            found = held.method.changes(leaves_of(module, held), point_of(module, held), read, key)
            changes += found.get(name, ())
    return Changed.of(_stored(module, name), changes)


def _stored(module: Any, name: str) -> Any:
    """What a weight holds: floats, or those in few bits."""
    value = vars(module)[name].get_raw_value()
    return value if is_quantized(value) else marked(value)


def _floats(module: Any, name: str) -> Array:
    value = _stored(module, name)
    return value.unbox() if is_quantized(value) else value


def seen_as(variable: nnx.Variable[Any], value: Any) -> Any:
    """A weight as the module's code sees it: a Variable of the same class with another value."""
    # A copy, since a Variable of the model must not hold a value of a trace after the call.
    seen = variable.copy(value, seen_from=_Origin(variable))
    seen.__class__ = _seen_class(type(variable))  # type: ignore[assignment]
    return seen


class _Origin:
    """A weight as metadata of what is seen of it, which flax compares: it equals itself alone."""

    def __init__(self, variable: nnx.Variable[Any]):
        self.variable = variable


@functools.cache
def _seen_class(cls: type[Any]) -> type[Any]:
    """The class of a changed weight as code sees it: what is written to it goes to the weight."""

    def forwarded(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.get_metadata()["seen_from"].variable, name)(*args, **kwargs)

        return method

    names = ("set_value", "set_raw_value", "update_from_state", "copy_from")
    about = {"adapted_from": cls, "__module__": cls.__module__, "__slots__": ()}
    return type(cls.__name__, (cls,), {**about, **{name: forwarded(name) for name in names}})
