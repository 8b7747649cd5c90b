"""One method on one linen module: its attachment point, its leaves, and its call."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint, Frozen, contraction_of, started
from adapters_jax.weights import linear
from adapters_jax.weights.quantized import is_quantized, unboxed


def leaves_in(module: Any, scope: Any, method: Method, point: AttachmentPoint) -> dict[str, Array]:
    """A method's arrays by name; initialised where the scope does not have them yet."""
    new = not scope.has_variable("params", method.leaf_names[0])
    leaves = {}
    for name, leaf in method.leaves(point).items():
        *groups, last = name.split("/")
        holder = functools.reduce(lambda s, group: s.push(group, reuse=True), groups, scope)
        leaves[name] = nn.meta.unbox(holder.param(last, leaf.init, leaf.shape))
    if new and method.from_weight:
        name = contraction_of(point).weight
        weight = module.scope.get_variable("params", name)
        made, rest = started(method, leaves, point, unboxed(weight))
        if not is_quantized(weight):
            module.scope.put_variable("params", name, nn.meta.replace_boxed(weight, rest))
        for name, array in made.items():
            scope.put_variable("params", name, array)
        return made
    return leaves


def _frozen(module: Any) -> Frozen:
    """A module's own parameters by name."""
    return lambda name: nn.meta.unbox(module.scope.get_variable("params", name))


def run_method(
    module: nn.Module,
    scope: Any,
    method: Method,
    point: AttachmentPoint,
    x: Any,
    y: Array,
    evaluation: bool | None,
) -> Array:
    """Applies a method, whose leaves are in the given scope, to a module's output."""
    leaves = leaves_in(module, scope, method, point)
    if evaluation is None:
        evaluation = not module.has_rng("dropout")
    key = module.make_rng("dropout") if method.dropout and not evaluation else None
    return method.forward(leaves, point, x, y, key, _frozen(module))


def point_of(module: Any, path: str, call: str, args: Any, kwargs: Any, y: Any) -> AttachmentPoint:
    """The attachment point of a module that has just run."""
    found = linear.find(module, call, *args, **kwargs)
    shape: tuple[int, ...] = ()
    if found is not None:
        if not module.scope.has_variable("params", found.weight):
            raise RecipeError(
                f"{type(module).__name__} at {path!r} has no parameter {found.weight!r}; correct "
                "weight=... in aj.register_contraction"
            )
        shape = unboxed(module.scope.get_variable("params", found.weight)).shape
    array = hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.inexact) and y.ndim > 0
    return AttachmentPoint(
        path, call, y.shape[-1] if array else 0, found, shape, getattr(module, "precision", None)
    )
