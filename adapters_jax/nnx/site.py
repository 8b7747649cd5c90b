"""What methods need to know of an NNX module, read off it."""

import math
from typing import Any

from flax import nnx
from jaxtyping import Array

from adapters_jax import attention, registry
from adapters_jax.attention import Attention
from adapters_jax.contraction import Contraction
from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import Frozen, Site


def site_of(
    module: Any, path: str, width: int, call: str = "__call__", *args: Any, **kwargs: Any
) -> Site:
    """What methods need to know of a module whose output is so wide."""
    layer = registry.find(module, call, *args, **kwargs)
    if layer and not hasattr(module, layer.weight):
        raise RecipeError(
            f"{type(module).__name__} at {path!r} has no parameter {layer.weight!r}; correct "
            "weight=... in aj.register_contraction"
        )
    shape = getattr(module, layer.weight).shape if layer else ()
    weight = shape[len(shape) - layer.ndim :] if layer else ()
    precision = getattr(module, "precision", None)
    return Site(path, call, width, layer, weight, precision, attention_of(module))


def attention_of(module: Any) -> Attention | None:
    """The sizes of an attention module, read off its projections; None where it is none."""
    names = attention.names_of(module)
    found = names and [getattr(module, name, None) for name in (names.query, names.key)]
    if not names or not found or not all(registry.find(child, "__call__") for child in found):
        return None
    (_, query), (width, key) = (weight_axes(child) for child in found)
    head = query[-1] if len(query) > 1 else getattr(module, names.head_dim)
    return Attention(math.prod(width), math.prod(query) // head, math.prod(key) // head, head)


def _weight(layer: Any) -> tuple[Contraction, tuple[int, ...]]:
    """How a linear layer contracts, and the shape of its weight under its layer axes."""
    found = registry.find(layer, "__call__")
    if found is None:
        raise RecipeError(registry.why_not(layer))
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
