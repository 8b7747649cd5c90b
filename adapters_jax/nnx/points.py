"""The attachment points of an NNX model, read off its modules and an abstract run."""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from adapters_jax.abstract import explained, filled
from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import AttachmentPoint, Frozen
from adapters_jax.nnx.graph import copy, modules_of
from adapters_jax.weights import attention, linear
from adapters_jax.weights.attention import Attention
from adapters_jax.weights.contraction import Contraction


def point_of(
    module: Any, path: str, width: int, call: str = "__call__", *args: Any, **kwargs: Any
) -> AttachmentPoint:
    """The attachment point of a module whose output has the given width."""
    layer = linear.find(module, call, *args, **kwargs)
    if layer and not hasattr(module, layer.weight):
        raise RecipeError(
            f"{type(module).__name__} at {path!r} has no parameter {layer.weight!r}; correct "
            "weight=... in aj.register_contraction"
        )
    shape = getattr(module, layer.weight).shape if layer else ()
    weight = shape[len(shape) - layer.ndim :] if layer else ()
    precision = getattr(module, "precision", None)
    return AttachmentPoint(path, call, width, layer, weight, precision, attention_of(module))


def attention_of(module: Any) -> Attention | None:
    """The sizes of an attention module, read off its projections; None for other modules."""
    names = attention.names_of(module)
    found = names and [getattr(module, name, None) for name in (names.query, names.key)]
    if not names or not found or not all(linear.find(child, "__call__") for child in found):
        return None
    (_, query), (width, key) = (weight_axes(child) for child in found)
    head = query[-1] if len(query) > 1 else getattr(module, names.head_dim)
    return Attention(math.prod(width), math.prod(query) // head, math.prod(key) // head, head)


def _weight(layer: Any) -> tuple[Contraction, tuple[int, ...]]:
    """A linear layer's contraction, and the shape of its weight, layer axes included."""
    found = linear.find(layer, "__call__")
    if found is None:
        raise RecipeError(linear.why_not(layer))
    return found, getattr(layer, found.weight).shape


def weight_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and the output axes of a linear layer's weight, without its layer axes."""
    found, shape = _weight(layer)
    return found.split_shape(shape[len(shape) - found.ndim :])


def layers_of(layer: Any) -> tuple[int, ...]:
    """The layer axes that a linear layer's weight is stacked on."""
    found, shape = _weight(layer)
    return shape[: len(shape) - found.ndim]


def frozen_of(module: Any) -> Frozen:
    """A module's own parameters by name."""

    def frozen(name: str) -> Array | None:
        variable = getattr(module, name, None)
        return variable[...] if isinstance(variable, nnx.Variable) else None

    return frozen


# Not an attribute of modules: jax keeps the structure of every traced model and compares it.
_RECORDER: contextvars.ContextVar[Callable[..., None]] = contextvars.ContextVar("recorder")


@functools.cache
def _recording_class(cls: type[Any]) -> type[Any]:
    """The subclass of a module class that passes every output to the `_RECORDER`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = cls.__call__(self, *args, **kwargs)
        _RECORDER.get()(*self.adapter_trace, self, y)
        return y

    return type(cls.__name__, (cls,), {"__call__": call})


def _trace(model: nnx.Module, args: tuple[Any, ...]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Runs a model abstractly; gives each module's output width and layer axes."""
    seen: dict[str, tuple[int, tuple[int, ...]]] = {}

    def record(path: str, outside: tuple[int, ...], module: nnx.Module, y: Any) -> None:
        array = hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.inexact) and y.ndim > 0
        layers = outside[: len(outside) - len(_first_shape(module))]
        seen[path] = (y.shape[-1] if array else 0, layers)

    probe = copy(model)
    modules = modules_of(probe)
    bare = {path for path, module in modules.items() if not _first_shape(module)}
    for path, module in list(modules.items()):
        if callable(module):
            module.adapter_trace = (path, _first_shape(module))
            module.__class__ = _recording_class(type(module))  # type: ignore[arg-type]
    token = _RECORDER.set(record)
    try:
        with explained(model, args, {}):
            nnx.eval_shape(lambda m: m(*filled(args)), probe)
    finally:
        _RECORDER.reset(token)
    for path in bare & seen.keys():  # without Variables of its own: stacked as the module around it
        names = path.split("/")
        above = ("/".join(names[:i]) for i in range(len(names) - 1, -1, -1))
        layers = next((seen[p][1] for p in above if p in seen and p not in bare), ())
        seen[path] = seen[path][0], layers
    return seen


def _first_shape(module: nnx.Module) -> tuple[int, ...]:
    """The shape of a module's first Variable that is no random stream; empty without one."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngState)))
    return leaves[0].shape if leaves else ()


def points_of(
    model: nnx.Module, examples: tuple[Any, ...] | None
) -> dict[str, tuple[AttachmentPoint, tuple[int, ...]]]:
    """The attachment point of each module, with the layer axes that its weights are stacked on."""
    traced = _trace(model, examples) if examples is not None else {}
    points = {}
    for path, module in modules_of(model).items():
        point = point_of(module, path, known_width(module))
        layers = _first_shape(module)[:-1] if isinstance(module, _NORMS) else ()
        names = attention.names_of(module)
        layer = getattr(module, names.key) if names and point.attention else module
        if point.attention or point.contraction:
            layers = layers_of(layer)
        width, layers = traced.get(path, (point.width, layers))
        points[path] = dataclasses.replace(point, width=width), layers
    return points


# Layers without a contraction whose scale shows their width and their layer axes.
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def known_width(module: Any) -> int:
    """The width of a plain layer's output, read off the layer; 0 where it is unknown."""
    layer = linear.find(module, "__call__")
    if layer:
        return getattr(getattr(module, layer.weight, None), "shape", (0,))[-1]
    shape = _first_shape(module) if isinstance(module, _NORMS) else ()
    return shape[-1] if shape else 0
