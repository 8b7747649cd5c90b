"""Folding adapters into the base: merged, it is the base model, at its speed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError, compare_trees
from adapters_jax.linen import Adapted, shapes_of
from adapters_jax.linen.points import points_of
from adapters_jax.methods import AttachmentPoint, Method
from adapters_jax.methods.base import Leaves, merged_stacked
from adapters_jax.nnx import adapted_points, copy, detach, own_params, params_of, recipe_of
from adapters_jax.nnx.graph import frozen_leaves
from adapters_jax.placement import Placement, counted, own_leaves
from adapters_jax.placement.patterns import checked_before
from adapters_jax.trace.inputs import Inputs
from adapters_jax.training.state import refuse_state
from adapters_jax.trees import (
    Tree,
    check_params,
    flatten,
    join,
    split_adapters,
    unflatten,
    without_adapters,
)
from adapters_jax.weights.fingerprints import check_unmoved
from adapters_jax.weights.quantized import is_quantized, unboxed

# New values of a module's parameters, from the method, its leaves, its attachment point and the
# module's parameters.
_Change = Callable[[Method, Leaves, AttachmentPoint, Mapping[str, Array]], dict[str, Array]]


def _call(caller: str) -> str:
    """How a linen model is given."""
    return f"aj.{caller}(model, params, *example_inputs)"


def merge(model: Adapted | nnx.Module, params: Tree = None, /, *args: Any, **kwargs: Any) -> Any:
    """The base with its adapters folded in, and its unfrozen parameters as trained.

    Each sum is taken in float32 and cast once to the base's dtype. Nothing given is changed: to
    switch to another adapter, merge it with the base you kept, which is exact.

    Args:
        model: an adapted model.
        params: linen only: its whole parameter tree.
        *args: linen only: example inputs; only their shapes matter. The model knows where its
            adapters are without them; with them, its parameters are compared with those that a run
            on these inputs needs.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        linen: the parameter tree of the base `model.inner`. NNX: a model of the base's classes.

    Raises:
        RecipeError: a method of the recipe cannot be folded in.
        MismatchError: `params` is not the tree of this model; every difference is listed. Or
            frozen parameters moved since the model got its adapters.
        UserError: the model has no adapters, `params` is not a tree of parameters, or the inputs do
            not fit the model.
        TypeError: a linen model comes without its parameters, or an NNX model with some.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(base, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> merged, x = aj.merge(adapted), jnp.ones((1, 4))
        >>> type(merged).__name__, bool(jnp.allclose(merged(x), adapted(x)))
        ('Linear', True)
    """
    merged = _folded("merge", model, params, args, kwargs, merged_stacked)
    if isinstance(model, Adapted):
        check_unmoved("merge", flatten(split_adapters(params, model.recipe)[1]), in_nnx=False)
    else:
        check_unmoved("merge", frozen_leaves(model), in_nnx=True)
    return merged


def unmerge(
    model: Adapted | nnx.Module, params: Tree = None, /, *args: Any, **kwargs: Any
) -> tuple[Any, float]:
    """Restores the base from merged weights, for those who kept only these.

    The result is not exact, since the merged weights were rounded. If you can, keep the base, and
    merge the next adapter with it.

    Args:
        model: an adapted model; in NNX one with merged weights, with the adapters beside them, as
            `load_adapter` onto the merged model gives it.
        params: linen only: the whole parameter tree, with such weights and adapters.
        *args: linen only: example inputs, as in `merge`.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        The base, as `merge` returns it; and a bound on the error: no entry of a
        weight differs from the original by more.

    Raises:
        RecipeError: a method's change has no inverse: DoRA's, or (IA)^3's where a factor is zero.
        MismatchError: `params` is not the tree of this model; every difference is listed.
        UserError, TypeError: as in `merge`.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> adapted = aj.adapt(
        ...     nnx.Linear(4, 3, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> base, error = aj.unmerge(adapted)
        >>> type(base).__name__, error < 1e-6
        ('Linear', True)
    """
    bounds = [0.0]

    def taken_back(
        method: Method, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
    ) -> dict[str, Array]:
        # The inverse is a change like any other, so that it runs the same code, with layer axes and
        # all dtypes.
        left = merged_stacked(method, method.inverse(leaves, point), point, own)
        bounds.extend(_rounding(own[name], left[name]) for name in left)
        return left

    base = _folded("unmerge", model, params, args, kwargs, taken_back)
    return base, max(bounds)


def _rounding(merged: Array, left: Array) -> float:
    """The largest error of an entry by the roundings of a change and of its inverse together."""
    # Folding and unfolding each round to the weight's dtype once, by at most eps / 2 of the largest
    # entry; two eps of float32 are ample for the arithmetic of both.
    units = jnp.finfo(merged.dtype).eps + 2 * jnp.finfo(jnp.float32).eps
    both = (jnp.abs(x.astype(jnp.float32)).max() for x in (merged, left))
    return float(units * jnp.maximum(*both))


def _folded(caller: str, model: Any, params: Tree, args: Any, kwargs: Any, change: _Change) -> Any:
    """The base with every targeted weight changed."""
    refuse_state(caller, model, ", *example_inputs")
    if isinstance(model, Adapted):
        check_params(caller, params, _call(caller))
        return _linen(model, params, args, kwargs, change)
    if not isinstance(model, nnx.Module):
        calls = f"{_call(caller)} in linen, aj.{caller}(model) in NNX"
        with_params = isinstance(model, nn.Module)
        hint = "call aj.adapt(model, recipe) first" if with_params else f"write {calls}"
        raise UserError(f"{caller}: {type(model).__name__} has no adapters; {hint}")
    if params is not None or args or kwargs:
        raise TypeError(f"{caller}: an NNX model holds its parameters; write aj.{caller}(model)")
    return _nnx(model, change)


def _check(placed: Placement, point: AttachmentPoint, own: Mapping[str, Any], line: str) -> None:
    """Raises RecipeError where a method cannot be merged, or the weight is quantised."""
    if type(placed.method).merged is Method.merged:
        placed.method.merged({}, point, {})  # raises, with the reason of the method
    packed = [name for name, leaf in own.items() if is_quantized(leaf)]
    if packed:
        raise RecipeError(
            f"merge: {join(placed.module, packed[0])} is quantised, and in so few bits much of the "
            f"adapter would be lost; keep them apart, or write {line} for a float base"
        )


def _linen(model: Adapted, params: Tree, args: Any, kwargs: Any, change: _Change) -> Tree:
    if args or kwargs:
        inputs = Inputs.of_call(args, kwargs, kwargs.pop("method", None))
        given = shapes_of(params)
        with checked_before():
            base = without_adapters(given, model.recipe)
            found, whole = points_of(model.inner, model.recipe, inputs, base)
        model.adapter_placements.placements = found
        compare_trees(
            "params",
            flatten(given),
            flatten(whole),
            "Pass the whole parameter tree of this very model, with its adapters.",
        )
    else:
        # Without inputs nothing runs the model, so that names and shapes are all there is to
        # compare.
        model.check_adapters(params)
        found = model.placements_in(params)
        shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flatten(params).items()}
        counted(model.recipe, shapes, found)  # raises where arrays differ from the recipe
    flat = flatten(params)
    merged = flatten(without_adapters(params, model.recipe))
    owned = own_leaves({path: unboxed(leaf).shape for path, leaf in merged.items()})
    for each in found:
        own = owned.get(each.module, {})
        point, boxed = each.point(own), {n: merged[join(each.module, n)] for n in own}
        _check(each, point, boxed, "aj.merge(model, aj.dequantize(params), *inputs)")
        leaves = nn.meta.unbox(each.leaves(flat))
        made = change(each.method, leaves, point, nn.meta.unbox(boxed))
        merged |= {
            join(each.module, name): nn.meta.replace_boxed(boxed[name], x)
            for name, x in made.items()
        }
    return model.restored(unflatten(merged, params))


def _nnx(model: nnx.Module, change: _Change) -> nnx.Module:
    recipe_of(model)
    # NNX modules are changed in place, and the caller keeps the adapted one.
    merged = copy(model)
    arrays = {path: x.get_raw_value() for path, x in params_of(merged).items()}
    for module, held, point in adapted_points(merged):
        own = own_params(module)
        raw = {name: x.get_raw_value() for name, x in own.items()}
        _check(held, point, raw, "aj.merge(aj.dequantize(model))")
        values = {name: x for name, x in raw.items() if x is not None}
        for name, value in change(held.method, held.leaves(arrays), point, values).items():
            own[name].set_raw_value(value)
    detach(merged)
    return merged
