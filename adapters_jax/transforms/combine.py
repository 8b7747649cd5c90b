"""Several low-rank adapters as one: weighted sums of their products, never of their factors.

A factor pair is not unique (for any invertible M, A M and M^-1 B have the same product), so a sum
of factors means nothing. The sum is of scale * A B, the changes of the weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import RecipeError, UserError, check_choice, check_number, check_size
from adapters_jax.methods import LoRA, arrays
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.placement import in_tree
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Adapter, Tree, adapter_leaves, flatten, join, unflatten
from adapters_jax.weights.quantized import unboxed

HOW = ("linear", "svd", "ties", "dare")


@dataclass(frozen=True)
class Combined:
    """One adapter made of several.

    Attributes:
        recipe: says where it attaches and at which ranks; every scale is 1.
        adapters: its factors, a tree as `partition` gives it: for each weight A (in, r) and B
            (r, out), float32, where in and out are the weight's own axes.
        error: the part of the change that the rank cannot hold, by the Frobenius norm over all
            weights; 0 where nothing is lost.

    Example:
        >>> import numpy as np
        >>> base = {"query": {"kernel": np.ones((3, 2))}}
        >>> one = {"query": {"lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}}
        >>> made = combine(base, [(LoRA("query", 1), one)], [0.5])
        >>> made.adapters["query"]["lora"]["b"].tolist(), made.error
        ([[0.5, 0.5]], 0.0)
    """

    recipe: Recipe
    adapters: Tree
    error: float


def combine(
    base: Tree | nnx.Module,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    how: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    key: PRNGKeyArray | None = None,
) -> Combined:
    """Combines low-rank adapters of one base.

    Let D_i = scale_i A_i B_i be the change that adapter i makes to a weight, and w_i its weight.

    - "linear": sum of w_i D_i, exactly: the ranks add up.
    - "svd": the nearest approximation of the same sum at rank `rank`.
    - "ties": of each D_i the largest entries (a part `density` of them) are kept; each entry takes
      the sign of the sum of w_i D_i, and is the mean of those w_i D_i that have it.
    - "dare": of each D_i a random part `density` of the entries is kept and divided by `density`;
      then the sum of w_i D_i.

    The last three give changes of full rank. Their best approximation at rank `rank` is kept, and
    `error` is the part that is lost.

    Args:
        base: the base's parameter tree, or the NNX model; only shapes of weights are read.
        adapters: each a recipe with its trained tree, as `read_adapter` returns them.
        weights: one for each adapter; they may be negative.
        how: "linear", "svd", "ties" or "dare".
        rank: of the result; required for all but "linear", which has the sum of the ranks.
        density: the part of the entries that is kept, for "ties" and "dare".
        key: seeds the random choice of "dare".

    Returns:
        A recipe, its factors, and the part that was lost.

    Raises:
        RecipeError: a recipe trains anything but LoRA, or an adapter does not fit the base.
        UserError: an argument is out of its range, or there is not one weight for each adapter.
        TypeError: an adapter is not a recipe with its tree.

    Example:
        >>> import adapters_jax as aj, numpy as np
        >>> base = {"query": {"kernel": np.ones((3, 2))}}
        >>> one = {"query": {"lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}}
        >>> both = combine(base, [(aj.LoRA("query", 1), one), (aj.LoRA("query", 1), one)], [2, -1])
        >>> both.recipe
        Recipe(
          LoRA(targets=('query',), rank=2),
        )

    Reference: Yadav et al. 2023 (TIES), arXiv:2306.01708; Yu et al. 2023 (DARE), arXiv:2311.03099.
    """
    _check(adapters, weights, how, rank, density, key)
    shapes = _shapes(base)
    changes = [_changes(shapes, *adapter_leaves(adapter, "combine")) for adapter in adapters]
    paths = {prefix: change.path for each in changes for prefix, change in each.items()}
    most = {change.path: change.most for each in changes for change in each.values()}
    made, lost, whole = {}, 0.0, 0.0
    for prefix, path in sorted(paths.items()):
        parts = [
            (each[prefix], w) for each, w in zip(changes, weights, strict=True) if prefix in each
        ]
        if how == "linear":
            made[prefix] = _concatenated(parts)
            continue
        # By path, so that one adapter more does not change what is drawn for another weight.
        own = None if key is None else arrays.key_at(key, path)
        made[prefix], missing, total = _at_rank(parts, how, rank or 0, density, own)
        lost, whole = lost + missing, whole + total
    ranks = {paths[prefix]: factors[0].shape[-1] for prefix, factors in made.items()}
    usual = max(ranks.values())
    # A sum of ranks above min(in, out) is set for its weight, since LoRA takes it for a mistake
    # otherwise.
    other = {path: r for path, r in ranks.items() if r != usual or r > most[path]}
    # A model that is itself the layer has the empty path, which is not a pattern.
    recipe = Recipe(LoRA(tuple(path or "**" for path in sorted(ranks)), usual, rank_pattern=other))
    flat = {join(s, n): x for s, ab in made.items() for n, x in zip("ab", ab, strict=True)}
    return Combined(recipe, unflatten(flat), math.sqrt(lost / whole) if whole else 0.0)


def _check(
    adapters: Sequence[Any],
    weights: Sequence[float],
    how: str,
    rank: int | None,
    density: float,
    key: PRNGKeyArray | None,
) -> None:
    """Raises UserError for an argument out of its range."""
    if not adapters or len(adapters) != len(weights):
        raise UserError(
            f"combine: {len(adapters)} adapters and {len(weights)} weights; give one weight each"
        )
    check_choice("combine", "how", how, HOW)
    for weight in weights:
        check_number("combine", "a weight", weight, low=-math.inf)
    if (how == "linear") != (rank is None):
        fix = "has the sum of all ranks; leave rank out" if how == "linear" else "needs a rank"
        raise UserError(f"combine: how={how!r} {fix}")
    if rank is not None:
        check_size("combine", "rank", rank)
    if density != 1.0:
        check_number("combine", "density", density, high=1.0)
    if how == "dare" and key is None:
        raise UserError("combine: how='dare' draws at random; give key=jax.random.key(0)")


def _shapes(base: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a base by path."""
    tree = nnx.state(base, nnx.Param) if isinstance(base, nnx.Module) else base
    return {path: tuple(unboxed(leaf).shape) for path, leaf in flatten(tree).items()}


@dataclass(frozen=True)
class _Change:
    """One adapter's factors at one layer, the scale in B, as matrices under the layer axes."""

    a: Float[Array, "*layers in rank"]
    b: Float[Array, "*layers rank out"]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    path: str

    def with_more(self, other: "_Change") -> "_Change":
        """The sum with another change of the layer, whose factors come beside these."""
        a = jnp.concatenate([self.a, other.a], axis=-1)
        return replace(self, a=a, b=jnp.concatenate([self.b, other.b], axis=-2))

    @property
    def most(self) -> int:
        """The largest rank that the product can have."""
        return min(self.a.shape[-2], self.b.shape[-1])

    def product(self) -> Float[Array, "*layers in out"]:
        # A TPU would multiply in bfloat16, and TIES compares the products by size.
        return jnp.matmul(self.a, self.b, precision="highest")


def _changes(
    shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, flat: Mapping[str, Any]
) -> dict[str, _Change]:
    """An adapter's change of every layer."""
    found: dict[str, _Change] = {}
    whole = {**shapes, **{path: tuple(leaf.shape) for path, leaf in flat.items()}}
    for path in flat:
        if recipe.owner(path) is None:
            raise RecipeError(
                f"combine: a recipe trains the base's {path}, expected LoRA alone in each recipe"
            )
    unable = [m for m in recipe.attached if not isinstance(m, LeafMethod)]
    for method in unable:
        method.factors({}, method.targets[0])  # raises, with the name of the method
    for each in in_tree(recipe, whole):
        a, b = each.method.factors(each.leaves(flat), each.path)
        # Layers and experts are axes of both factors, and once of the weight.
        layers = a.ndim + b.ndim - 2 - len(each.shape)
        change = _Change(
            a.reshape(*a.shape[:layers], -1, a.shape[-1]),
            b.reshape(*b.shape[: layers + 1], -1),
            (a.shape[:-1], b.shape[layers + 1 :]),
            each.path,
        )
        # The result has no names; several entries of one weight are one change.
        prefix = join(each.module, LoRA.slot, each.node)
        found[prefix] = found[prefix].with_more(change) if prefix in found else change
    return found


def _concatenated(parts: Sequence[tuple[_Change, float]]) -> tuple[Array, Array]:
    """The factors of a weighted sum: side by side, the weights in B."""
    a = jnp.concatenate([change.a for change, _ in parts], axis=-1)
    # A negative weight has no root, so that it cannot be split between both factors.
    b = jnp.concatenate([weight * change.b for change, weight in parts], axis=-2)
    return _in_shape(a, b, parts[0][0])


def _in_shape(a: Array, b: Array, like: _Change) -> tuple[Array, Array]:
    """Matrices as factors of their layer."""
    inputs, outputs = like.shapes
    return a.reshape(*inputs, a.shape[-1]), b.reshape(*b.shape[:-1], *outputs)


def _at_rank(
    parts: Sequence[tuple[_Change, float]],
    how: str,
    rank: int,
    density: float,
    key: PRNGKeyArray | None,
) -> tuple[tuple[Array, Array], float, float]:
    """The factors nearest to a combined change; the squared norms of the lost part and of all."""
    like = parts[0][0]
    if rank > like.most:
        raise RecipeError(
            f"combine: rank {rank} exceeds min(in, out) = "
            f"min({like.a.shape[-2]}, {like.b.shape[-1]}) of a weight; lower it"
        )
    products = jnp.stack([change.product() for change, _ in parts])
    weights = jnp.asarray([weight for _, weight in parts], jnp.float32)
    weights = weights.reshape(-1, *(1,) * like.a.ndim)
    if how == "ties":
        whole = _ties(products, weights, density)
    elif how == "dare" and key is not None:
        # Divided by the density, so that the expectation of the sum is that of all entries.
        keep = jax.random.bernoulli(key, density, products.shape)
        whole = (weights * jnp.where(keep, products / density, 0.0)).sum(0)
    else:
        whole = (weights * products).sum(0)
    a, b, singular = arrays.nearest_factors(whole, rank)
    # By Eckart and Young, the squares of the values that are left out are what the rank loses.
    squares = jnp.square(singular)
    return _in_shape(a, b, like), float(squares[..., rank:].sum()), float(squares.sum())


def _ties(
    products: Float[Array, "adapters *layers rows columns"], weights: Array, density: float
) -> Float[Array, "*layers rows columns"]:
    """Trim each layer's entries, elect the sign, and average the entries that have it."""
    size = products.shape[-2] * products.shape[-1]
    kept = max(1, round(density * size))
    magnitudes = jnp.abs(products)
    ordered = jnp.sort(magnitudes.reshape(*products.shape[:-2], size), axis=-1)
    least = ordered[..., size - kept, None, None]
    parts = weights * jnp.where(magnitudes >= least, products, 0.0)
    # The sign is that of the sum, not of the majority: a large entry counts more than two small
    # ones.
    agreeing = jnp.where(jnp.sign(parts) == jnp.sign(parts.sum(0)), parts, 0.0)
    return agreeing.sum(0) / jnp.maximum((agreeing != 0).sum(0), 1)
