"""AdaLoRA's training: the budget of ranks of all modules, and the penalty on their factors.

Zhang et al. 2023, "AdaLoRA", arXiv:2303.10512, section 3. What their code does otherwise than the
text is done here as well: a sensitivity is that of a parameter after the step, and the penalty is
the mean of norms, which are not squared.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from adapters_jax.errors import RecipeError, UserError, check_number, check_size
from adapters_jax.methods import AdaLoRA, Method
from adapters_jax.recipe import Recipe
from adapters_jax.training.optimizers import check_optimizer
from adapters_jax.trees import Tree, flatten, path_of, unflatten


class BudgetState(NamedTuple):
    """The state of `adalora_budget`.

    Attributes:
        steps: the number of steps made.
        inner: the optimiser's own state.
        sensitivity: averages of |w dL/dw|, of AdaLoRA's leaves by path.
        uncertainty: averages of how far it is from its average.
        kept: which entries of l the final budget keeps, by path.
    """

    steps: Int[Array, ""]
    inner: optax.OptState
    sensitivity: Tree
    uncertainty: Tree
    kept: Tree


def adalora_budget(
    tx: optax.GradientTransformation,
    recipe: Recipe | Method,
    *,
    total_steps: int,
    target_rank: int | None = 8,
    initial_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that, after its step, zeroes the entries of AdaLoRA's l that matter least.

    The rank of each module comes from one ranking of all of them: the importance of entry i is
    `s(l_i) + mean s(A[:, i]) + mean s(B[i])`, with `s(w)` the average of the sensitivity
    |w dL/dw| times that of its uncertainty. While `initial_steps` pass, all entries stay; then the
    budget falls from the initial number of entries to `target_rank` times the number of modules, by
    a cubic schedule, and at every step that `every` divides those beyond it are zeroed. In the last
    `final_steps` the choice stands. An entry that was zeroed has a gradient and may come back
    until then. Steps are counted from 1; the scale of a module stays alpha / r of the initial r.

    All of it is in the optimiser's state, so that checkpoints go on exactly. Where it is combined
    with other transformations, it is the outermost: `adalora_budget(optax.chain(...), recipe)`.

    Args:
        tx: the optimiser.
        recipe: has an `AdaLoRA` that trains.
        total_steps: the number of steps of the whole training.
        target_rank: the mean rank of a module in the end; None for two thirds of that at the start.
        initial_steps: the steps before the first cut (PEFT's `tinit`).
        final_steps: the steps after the last cut (`tfinal`). A step that changes nothing is not
            counted, as where a gradient overflows in float16; the last cut is made only if there
            are at most as many of these.
        every: the number of steps from one cut to the next (`deltaT`).
        beta1: how much of the sensitivity's average stays, at least 0 and below 1.
        beta2: how much of the uncertainty's average stays.

    Returns:
        A gradient transformation; its state holds two numbers for each of AdaLoRA's.

    Raises:
        UserError: a number is out of its range, or no step is left to cut the budget; `init` raises
            it where `target_rank` is above the initial ranks.
        RecipeError: `init` raises it where no AdaLoRA trains.

    Example:
        >>> import adapters_jax as aj
        >>> recipe = aj.AdaLoRA("query", rank=2)
        >>> node = {"a": jnp.ones((3, 2)), "lambda": jnp.asarray([1.0, 3.0]), "b": jnp.ones((2, 3))}
        >>> params = {"query": {"adalora": node}}
        >>> tx = adalora_budget(optax.sgd(0.1), recipe, total_steps=2, target_rank=1)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["query"]["adalora"]["lambda"].round(1)
        Array([0. , 2.7], dtype=float32)
    """
    check_optimizer("adalora_budget", tx)
    sizes = {"total_steps": total_steps, "target_rank": target_rank, "every": every}
    for name, value in sizes.items():
        if name != "target_rank" or value is not None:
            check_size("adalora_budget", name, value)
    stages = {"initial_steps": initial_steps, "final_steps": final_steps}
    for name, count in stages.items():
        if type(count) is not int or count < 0:
            raise UserError(f"adalora_budget: {name}={count!r}, expected a whole number, or 0")
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        check_number("adalora_budget", name, beta, high=1.0, closed=True)
    last = total_steps - final_steps  # the step of the last cut
    if max(initial_steps, 1) >= last:  # the first step has nothing to rank by before it
        raise UserError(
            f"adalora_budget: initial_steps={initial_steps} and final_steps={final_steps} leave no "
            f"step of total_steps={total_steps} to cut the budget; lower them"
        )
    tx, recipe = optax.with_extra_args_support(tx), Recipe(recipe)

    def init(params: Tree) -> BudgetState:
        own = leaves_of(recipe, params)
        numbers = _numbers(own)
        triplets, modules = _sizes(numbers)
        if target_rank is not None and target_rank * modules > triplets:
            raise UserError(
                f"adalora_budget: target_rank={target_rank} is above the mean rank of AdaLoRA at "
                f"the start, {triplets / modules:g}; lower it, or raise AdaLoRA's rank"
            )
        zeros = [unflatten({p: jnp.zeros_like(x) for p, x in own.items()}) for _ in range(2)]
        kept = unflatten({path: jnp.ones(x.shape, bool) for path, x in numbers.items()})
        return BudgetState(jnp.zeros((), jnp.int32), tx.init(params), zeros[0], zeros[1], kept)

    def update(
        grads: Tree, state: BudgetState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, BudgetState]:
        if params is None:
            raise UserError(
                "adalora_budget: update got no params; write tx.update(grads, s, params)"
            )
        updates, inner = tx.update(grads, state.inner, params, **extra)
        step = state.steps + 1
        after = leaves_of(recipe, optax.apply_updates(params, updates))
        slopes = leaves_of(recipe, grads)
        averages = flatten(state.sensitivity), flatten(state.uncertainty)
        smooth, doubt = {}, {}
        for path, value in after.items():
            now, (mean, far) = jnp.abs(value * slopes[path]), (each[path] for each in averages)
            now = jnp.where(jnp.isfinite(now), now, mean)  # of a step that the optimiser may skip
            new = beta1 * mean + (1 - beta1) * now
            new_far = beta2 * far + (1 - beta2) * jnp.abs(now - new)
            smooth[path] = jnp.where(step < last, new, mean)
            doubt[path] = jnp.where(step < last, new_far, far)
        scores = _scores({path: smooth[path] * doubt[path] for path in after})
        removed = jnp.searchsorted(_cuts(scores, target_rank, initial_steps, last), step, "right")
        best, before = _largest(scores, removed), flatten(state.kept)
        cuts = (step > initial_steps) & ((step % every == 0) | (step == last))
        kept = {path: jnp.where(step == last, best[path], before[path]) for path in best}
        now_kept = {path: jnp.where(step > last, before[path], best[path] | ~cuts) for path in best}

        def cut(key_path: Any, update: Any, value: Any) -> Any:
            path = path_of(key_path)
            return jnp.where(now_kept[path], update, -value) if path in now_kept else update

        updates = jax.tree_util.tree_map_with_path(cut, updates, params)
        return updates, BudgetState(
            step, inner, unflatten(smooth), unflatten(doubt), unflatten(kept)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def leaves_of(recipe: Recipe, tree: Tree) -> dict[str, Any]:
    """The arrays of what AdaLoRA trains, by path.

    Raises:
        RecipeError: it trains nothing.
    """
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        owner = recipe.owner(path := path_of(key_path))
        if owner and isinstance(owner.method, AdaLoRA) and owner.method.train:
            found[path] = leaf
    if not found:
        raise RecipeError(
            "adalora_budget and orthogonality: no AdaLoRA trains in these parameters; give a "
            "recipe with aj.AdaLoRA, and what aj.init_adapters returned"
        )
    return found


def _numbers(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of l, by path."""
    return {path: x for path, x in leaves.items() if path.rpartition("/")[2] == "lambda"}


def _sizes(numbers: Mapping[str, Any]) -> tuple[int, int]:
    """How many entries all l have, and of how many modules, layers and experts they are."""
    return (
        sum(x.size for x in numbers.values()),
        sum(x.size // x.shape[-1] for x in numbers.values()),
    )


def _scores(entries: Mapping[str, Array]) -> dict[str, Array]:
    """The importance of each entry of l, from that of every number of the leaves."""
    scores = {}
    for path, own in _numbers(entries).items():
        a, b = (entries[f"{path.removesuffix('lambda')}{name}"] for name in "ab")
        n = own.ndim - 1  # axes of layers and experts are in front of all three
        means = a.mean(range(n, a.ndim - 1)), b.mean(range(n + 1, b.ndim))
        scores[path] = own + means[0] + means[1]
    return scores


def _cuts(scores: Mapping[str, Array], target: int | None, first: int, last: int) -> Array:
    """For each entry that goes in the end, the step from which one more of them is out."""
    whole, modules = _sizes(scores)
    goal = modules * (target or max(1, whole * 2 // (modules * 3)))
    # In Python's floats, as in the authors' code: float32 would round some budgets up.
    steps = range(first + 1, last + 1)
    parts = ((1 - (step - first) / (last - first)) ** 3 for step in steps)
    out = whole - np.asarray([int((whole - goal) * part + goal) for part in parts])
    return jnp.asarray(first + 1 + np.searchsorted(out, np.arange(1, whole - goal + 1)), jnp.int32)


def _largest(scores: Mapping[str, Array], removed: Array) -> dict[str, Array]:
    """Which entries stay, where `removed` of the least important of all are zeroed."""
    flat = jnp.concatenate([x.ravel() for x in scores.values()])
    stays = jnp.argsort(jnp.argsort(flat)) >= removed
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    parts = zip(scores.items(), jnp.split(stays, ends), strict=True)
    return {path: part.reshape(x.shape) for (path, x), part in parts}


def orthogonality(params: Tree | nnx.Module, recipe: Recipe | Method) -> Float[Array, ""]:
    """The mean of |A^T A - I| and |B B^T - I| over AdaLoRA's modules, by the Frobenius norm.

    It is added to the loss, times a weight; the authors' code and PEFT take 0.5.

    Args:
        params: the parameters that a loss function gets; an NNX model.
        recipe: has an `AdaLoRA` that trains.

    Returns:
        A float32 scalar.

    Raises:
        RecipeError: no AdaLoRA trains.

    Example:
        >>> import adapters_jax as aj
        >>> node = {"a": jnp.eye(3)[:, :2], "lambda": jnp.ones(2), "b": 2 * jnp.eye(3)[:2]}
        >>> orthogonality({"query": {"adalora": node}}, aj.AdaLoRA("query", 2)).round(3)
        Array(2.121, dtype=float32)
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    own = leaves_of(Recipe(recipe), params)
    norms = []
    for path, numbers in _numbers(own).items():
        rank, shared = numbers.shape[-1], numbers.shape[:-1]
        a, b = (own[f"{path.removesuffix('lambda')}{name}"] for name in "ab")
        a, b = a.reshape(*shared, -1, rank), b.reshape(*shared, rank, -1)
        for rows in (a.mT, b):
            apart = jnp.matmul(rows, rows.mT, precision="highest") - jnp.eye(rank)
            # A root has no slope at zero, where its gradient would be NaN.
            norms.append(optax.safe_norm(apart, 1e-12, axis=(-2, -1)).ravel())
    return jnp.concatenate(norms).mean()
