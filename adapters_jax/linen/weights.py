"""The weights of a linen model: how it reads them, and its parameters with the changed ones."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PRNGKeyArray

from adapters_jax.abstract import Inputs, is_array
from adapters_jax.attached import in_tree
from adapters_jax.methods import arrays
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join
from adapters_jax.trees import Tree, flatten, unflatten
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.lazy import Lazy, Thin, Tracked, lowered, thin
from adapters_jax.weights.quantized import is_quantized, unboxed


def changed_weights(
    params: Tree, recipe: Recipe, trace: Thin, key: PRNGKeyArray | None = None
) -> Tree:
    """Parameters as the model's code sees them: with changed weights, without what changes them.

    Args:
        params: the whole parameter tree, with its boxes.
        recipe: the recipe of its adapters.
        trace: the trace that computes with changed weights.
        key: for dropout while training; None in evaluation.
    """
    flat = flatten(params)
    shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flat.items()}
    changes: dict[str, list[Any]] = {path: [] for path, leaf in flat.items() if is_quantized(leaf)}
    attached = in_tree(recipe, shapes)
    order = {method: i for i, method in enumerate(recipe.attached)}
    for each in sorted(attached, key=lambda one: order[one.method]):
        weight = flat[join(each.module, each.point.weight)]
        own = arrays.key_at(key, each.prefix) if key is not None and each.method.dropout else None
        leaves = nn.meta.unbox(each.leaves(flat))
        found = each.method.changes(leaves, each.point, lambda w=weight: nn.meta.unbox(w), own)
        for name, several in found.items():
            changes.setdefault(join(each.module, name), []).extend(several)
    added = {join(each.prefix, name) for each in attached for name in each.method.leaf_names}
    seen = {path: leaf for path, leaf in flat.items() if path not in added}
    for path, several in changes.items():
        seen[path] = _seen(flat[path], several, trace)
    return unflatten(seen)


def _seen(leaf: Any, changes: list[Any], trace: Thin) -> Any:
    """A changed weight in the box of the weight, from which flax takes it."""
    lazy = Lazy(trace, Changed.of(unboxed(leaf), changes))
    return lazy if is_quantized(leaf) else nn.meta.replace_boxed(leaf, lazy)


def reads_of(base: nn.Module, variables: Mapping[str, Tree], inputs: Inputs) -> dict[str, Tracked]:
    """How a model reads each float leaf of two or more axes, by an abstract run.

    Args:
        base: the model.
        variables: all of its variables, abstract, without boxes.
        inputs: example inputs.
    """
    tracked = {
        path: Tracked(path)
        for path, leaf in flatten(variables["params"]).items()
        if len(leaf.shape) > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
    }

    def run(variables: Any) -> Any:
        with thin(recording=True) as trace:
            flat = dict(flatten(variables["params"]))
            for path, leaf in tracked.items():
                axes = tuple(frozenset({i}) for i in range(flat[path].ndim))
                flat[path] = Lazy(trace, Changed.of(flat[path]), leaf, axes)
            key = jax.random.key(0)
            y = nn.Module.apply(
                base,
                {**variables, "params": unflatten(flat)},
                rngs={"params": key, "dropout": key},
                mutable=[name for name in variables if name != "params"],
                method=inputs.call,
            )
            return [x for x in jax.tree.leaves(lowered(y)) if is_array(x)]

    jax.eval_shape(run, dict(variables))
    return tracked


def leaf_methods(recipe: Recipe) -> list[LeafMethod]:
    """The methods of a recipe that change weights."""
    return [method for method in recipe.attached if isinstance(method, LeafMethod)]
