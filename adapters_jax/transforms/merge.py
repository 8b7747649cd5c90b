"""Folding low-rank adapters into the base: merged, it is the base model, at its speed."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import RecipeError, compare_trees
from adapters_jax.linen import Adapted, shapes_of, sites
from adapters_jax.methods import Attached, DoRA, LoRA
from adapters_jax.methods.base import Leaves, Site
from adapters_jax.methods.lora import contraction_of
from adapters_jax.nnx import adapted_sites, copy, detach, leaves_of, recipe_of
from adapters_jax.trees import Tree, flatten, join, unflatten, without_adapters
from adapters_jax.weights.quantized import is_quantized

# What takes the place of a weight: from the method, its leaves, its site and the weight.
_Change = Callable[[LoRA, Leaves, Site, Array], Array]


def _as_lora(method: Attached) -> LoRA:
    """A method that is a change of a weight; raises RecipeError for another."""
    if not isinstance(method, LoRA):
        raise RecipeError(
            f"merge: {type(method).__name__} cannot be folded into a weight, since "
            f"{method.unmergeable}; keep the adapted model, or merge LoRA alone"
        )
    return method


def merge(model: Adapted | nnx.Module, params: Tree = None, /, *args: Any, **kwargs: Any) -> Any:
    """The base with its low-rank adapters folded in, and its unfrozen parameters as trained.

    Each sum is taken in float32 and cast once to the base's dtype. Nothing given is changed: to
    switch to another adapter, merge it with the base you kept, which is exact.

    Args:
        model: an adapted model.
        params: linen only: its whole parameter tree.
        *args: linen only: example inputs, of which only shapes matter; they tell how each weight
            meets its input.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        linen: the parameter tree of the base `model.inner`. NNX: a model of the base's classes.

    Raises:
        RecipeError: a method of the recipe cannot be folded in.
        MismatchError: `params` is not the tree of this model; every difference is listed.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(base, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> type(aj.merge(adapted)).__name__
        'Linear'
    """
    return _folded(model, params, args, kwargs, LoRA.merged_stacked)


def unmerge(
    model: Adapted | nnx.Module, params: Tree = None, /, *args: Any, **kwargs: Any
) -> tuple[Any, float]:
    """The base before a merge, for those who kept the merged weights alone.

    Subtracting is not exact: a merged weight was rounded, and so is what is left. Keep the base
    where you can, and merge the next adapter with that.

    Args: as in `merge`: the model, or the tree, has the merged weights with the adapters beside.
        `load_adapter` onto the merged model gives just that.

    Returns:
        What `merge` returns, with the change taken out; and a bound: no entry of a weight is
        further from the original than this number.

    Raises:
        RecipeError: a method is no change that can be subtracted: DoRA rescales the weight too.
        MismatchError: `params` is not the tree of this model; every difference is listed.

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

    def subtracted(method: LoRA, leaves: Leaves, site: Site, weight: Array) -> Array:
        if isinstance(method, DoRA):
            raise RecipeError(
                f"unmerge: DoRA at {site.path!r} rescales the weight, which cannot be taken back "
                "by subtracting; merge with the base that you kept"
            )
        opposite = {**leaves, "b": -leaves["b"]}
        left = method.merged_stacked(opposite, site, weight)
        bounds.append(_rounding(weight, left))
        return left

    base = _folded(model, params, args, kwargs, subtracted)
    return base, max(bounds)


def _rounding(merged: Array, left: Array) -> float:
    """How far the roundings of a sum and of a difference may move an entry together."""
    units = jnp.finfo(merged.dtype).eps / 2 + jnp.finfo(jnp.float32).eps
    largest = jnp.abs(merged.astype(jnp.float32)) + jnp.abs(left.astype(jnp.float32))
    return float(units * largest.max())


def _folded(model: Any, params: Tree, args: Any, kwargs: Any, change: _Change) -> Any:
    """The base with every targeted weight changed."""
    if isinstance(model, Adapted):
        return _linen(model, params, args, kwargs, change)
    return _nnx(model, change)


def _refuse_quantized(site: Site, weight: Any, line: str) -> None:
    """Raises RecipeError where a sum would have to be quantised anew, which loses more of it."""
    if is_quantized(weight):
        raise RecipeError(
            f"merge: the weight at {site.path!r} is quantised, and a sum in so few bits would lose "
            f"much of the adapter; keep it beside, or write {line} for a float base"
        )


def _linen(model: Adapted, params: Tree, args: Any, kwargs: Any, change: _Change) -> Tree:
    found, whole = sites(model, *args, **kwargs)
    compare_trees(
        "params",
        flatten(shapes_of(params)),
        flatten(whole),
        "Pass the whole parameter tree of this very model, with its adapters.",
    )
    flat = flatten(params)
    merged = flatten(without_adapters(params, model.recipe))
    for (path, slot), (method, site) in found.items():
        lora = _as_lora(method)
        leaves = {name: flat[join(path, slot, name)] for name in method.leaf_names}
        weight = join(path, contraction_of(site).weight)
        _refuse_quantized(site, merged[weight], "aj.merge(model, aj.dequantize(params), *inputs)")
        value = change(lora, nn.meta.unbox(leaves), site, nn.meta.unbox(merged[weight]))
        merged[weight] = nn.meta.replace_boxed(merged[weight], value)
    return unflatten(merged)


def _nnx(model: nnx.Module, change: _Change) -> nnx.Module:
    recipe_of(model)
    merged = copy(model)
    for module, method, site in adapted_sites(merged):
        lora = _as_lora(method)
        weight = getattr(module, contraction_of(site).weight)
        _refuse_quantized(site, weight.get_raw_value(), "aj.merge(aj.dequantize(model))")
        weight[...] = change(lora, leaves_of(module, method), site, weight[...])
    detach(merged)
    return merged
