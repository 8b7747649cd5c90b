"""Folding low-rank adapters into the base: merged, it is the base model, at its speed."""

from typing import Any

from flax import linen as nn
from flax import nnx

from adapters_jax.errors import RecipeError, compare_trees
from adapters_jax.linen import Adapted, shapes_of, sites
from adapters_jax.methods import Attached, LoRA
from adapters_jax.methods.lora import linear
from adapters_jax.nnx import adapted_sites, copy, detach, leaves_of, recipe_of
from adapters_jax.partition import Tree, flatten, join, unflatten, without_adapters


def _as_change(method: Attached) -> LoRA:
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
    if isinstance(model, Adapted):
        return _merge_linen(model, params, args, kwargs)
    return _merge_nnx(model)


def _merge_linen(model: Adapted, params: Tree, args: Any, kwargs: Any) -> Tree:
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
        change = _as_change(method)
        leaves = {name: flat[join(path, slot, name)] for name in method.leaf_names}
        weight = join(path, linear(site).weight)
        value = change.merged_stacked(nn.meta.unbox(leaves), site, nn.meta.unbox(merged[weight]))
        merged[weight] = nn.meta.replace_boxed(merged[weight], value)
    return unflatten(merged)


def _merge_nnx(model: nnx.Module) -> nnx.Module:
    recipe_of(model)
    merged = copy(model)
    for module, method, site in adapted_sites(merged):
        change = _as_change(method)
        weight = getattr(module, linear(site).weight)
        weight[...] = change.merged_stacked(leaves_of(module, method), site, weight[...])
    detach(merged)
    return merged
