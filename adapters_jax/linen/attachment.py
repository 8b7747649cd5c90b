"""One method on one linen module: its attachment point, its leaves, and its call."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jaxtyping import Array

from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint, Frozen, started
from adapters_jax.placement import Placement
from adapters_jax.trace.calls import Returned
from adapters_jax.weights.quantized import is_quantized, unboxed


def leaves_in(scope: Any, method: Method, point: AttachmentPoint) -> dict[str, Array]:
    """A method's arrays by name; initialised where the scope does not have them yet."""
    leaves = {}
    for name, leaf in method.leaves(point).items():
        *groups, last = name.split("/")
        holder = functools.reduce(lambda s, group: s.push(group, reuse=True), groups, scope)
        leaves[name] = nn.meta.unbox(holder.param(last, leaf.init, leaf.shape))
    return leaves


def grow_in(root: Any, each: Placement) -> None:
    """Initialises the arrays of a method that changes a weight, in the scope of the whole model."""

    def scope_at(path: str) -> Any:
        names = path.split("/") if path else []
        return functools.reduce(lambda s, name: s.push(name, reuse=True), names, root)

    holder, owner = scope_at(each.prefix), scope_at(each.module)
    point = each.point()
    leaves = leaves_in(holder, each.method, point)
    if each.method.from_weight:
        weight = owner.get_variable("params", each.weight)
        made, rest = started(each.method, leaves, point, unboxed(weight))
        if not is_quantized(weight):
            owner.put_variable("params", each.weight, nn.meta.replace_boxed(weight, rest))
        for name, array in made.items():
            holder.put_variable("params", name, array)


def _frozen(module: Any) -> Frozen:
    """A module's own parameters by name."""
    return lambda name: nn.meta.unbox(module.scope.get_variable("params", name))


def dropout_key(module: nn.Module, method: Method, evaluation: bool | None) -> Array | None:
    """A key for the dropout of a method; None without dropout and in evaluation."""
    if evaluation is None:
        evaluation = not module.has_rng("dropout")
    return module.make_rng("dropout") if method.dropout and not evaluation else None


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
    leaves = leaves_in(scope, method, point)
    key = dropout_key(module, method, evaluation)
    return method.forward(leaves, point, x, y, key, _frozen(module))


def without_adapters(
    module: Any, slots: Sequence[Any], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a `ToLinen`, which takes all that is in its scope for variables of its NNX module."""
    scope = module.scope
    params = scope.variables().get("params", {})
    if not any(slot in params for slot in slots):
        return run(*args, **kwargs)
    kept = scope._variables["params"]
    scope._variables["params"] = {name: x for name, x in kept.items() if name not in slots}
    try:
        return run(*args, **kwargs)
    finally:
        scope._variables["params"] = kept


def point_of(module: Any, path: str, x: Any, y: Any) -> AttachmentPoint:
    """The attachment point of a module that has just returned y for the input x."""
    variables = module.scope.variables().get("params", {})
    own = {name: x.shape for name, x in unboxed_leaves(variables).items()}
    weight = next((name for name, shape in own.items() if len(shape) > 1), "")
    precision = getattr(module, "precision", None)
    returned = Returned.of(x, y)
    return AttachmentPoint(path, 0, weight, None, own, precision, returned=returned)


def unboxed_leaves(variables: Mapping[str, Any]) -> dict[str, Any]:
    """A module's own arrays, of its variables in one collection."""
    return {name: unboxed(x) for name, x in variables.items() if not isinstance(x, Mapping)}
