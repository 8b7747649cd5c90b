"""Statistics of activations from batches, and the ranks that they suggest, for EVA.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation", arXiv:2410.07170. Directions are of centred inputs, as in the authors' code.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.linen import Adapted, init_adapters
from adapters_jax.linen import adapt as adapt_linen
from adapters_jax.linen.functions import adapt as adapt_function
from adapters_jax.methods import Method
from adapters_jax.methods.calibration import Calibration, Observer, counting
from adapters_jax.methods.calibration import Inputs as Seen
from adapters_jax.nnx import AdapterParam, copy
from adapters_jax.nnx import adapt as adapt_nnx
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.placement import Placement
from adapters_jax.recipe import Recipe
from adapters_jax.targets import selects
from adapters_jax.trace.inputs import Inputs, inputs_text
from adapters_jax.trees import Tree, leaves_by_path, merge_trees, partition
from adapters_jax.weights.observed import SUMS

Run = Callable[[Any, Any, Inputs], Any]  # the outputs, of the tapes, all else, and the inputs


def calibrate(
    model: Any,
    recipe: Recipe | Method,
    batches: Iterable[Any],
    *,
    params: Any = None,
    other: Tree | None = None,
    inputs: Callable[[Any], Any] = lambda batch: batch,
    mask: Callable[[Any], Any] | None = None,
    size: int = 256,
) -> Calibration:
    """Finds along which directions the inputs of weights vary, for a start from activations.

    The base runs on each batch once, in evaluation, and keeps an array of `size` numbers for each
    input of a weight, whatever the number of batches. Weights with at most `size` inputs have exact
    directions, others `size / 2` approximate ones. `tqdm(batches)` shows the progress.

    Args:
        model: the base: an NNX or linen module, or a function of its parameters.
        recipe: its methods with `a_init="eva"` say which weights.
        batches: each is a tuple of inputs, or `aj.inputs(...)`; their shapes may differ.
        params: linen and functions: the parameters of the base.
        other: linen: its other collections, such as `{"batch_stats": ...}`.
        inputs: of one of `batches` the inputs, where it is something else.
        mask: of one of `batches` which inputs count, or how much: an array of the first axes of
            the weights' inputs, (batch, length). By default all of them.
        size: see above.

    Returns:
        The statistics, for `calibration=` of `init_adapters` and `adapt`, and for `eva_ranks`.

    Raises:
        UserError: there are no batches, one differs from the first in more than shapes, or one
            gives activations that are NaN or infinite; no method starts from activations.
        RecipeError: a weight has no activations that are known, or the mask does not fit them.
        TypeError: the model has adapters, or its parameters are missing.

    Example:
        >>> import adapters_jax as aj
        >>> base, recipe = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2, a_init="eva")
        >>> batches = [(jax.random.normal(jax.random.key(i), (8, 4)),) for i in range(3)]
        >>> seen = aj.calibrate(base, recipe, batches)
        >>> model = aj.adapt(base, recipe, rngs=nnx.Rngs(1), calibration=seen)
        >>> bool(jnp.allclose(model.lora["a"][...], seen.inputs["kernel"].directions[:, :2]))
        True
    """
    check_size("calibrate", "size", size)
    if isinstance(model, Adapted) or hasattr(model, "adapter_recipe"):
        raise TypeError("calibrate: the model has adapters; give its base, and the recipe")
    methods = [method for method in Recipe(recipe).attached if method.from_inputs]
    if not methods:
        raise UserError("calibrate: the recipe has no method with a_init='eva'")
    observers = Recipe(*(Observer(method.targets, size) for method in methods))
    every = _checked(batches, inputs)
    start = next(every)
    run, placed, tapes, rest = _observed(model, params, observers, start[1], other or {})
    step, broken = _step(run, start[1]), jnp.int32(-1)
    total = jax.tree.map(jnp.zeros_like, tapes)
    for number, (batch, given) in enumerate(itertools.chain([start], every)):
        rows = None if mask is None else jnp.asarray(mask(batch), jnp.float32)
        leaves = jax.tree.leaves((given.args, dict(given.kwargs)))
        arrays = {i: leaves[i] for i in given.split()[0]}
        total, broken = step(tapes, rest, arrays, rows, total, broken, number)
        jax.block_until_ready(broken)  # so that no more than one batch is in memory
    if int(broken) >= 0:
        raise UserError(
            f"calibrate: batch {int(broken)}, from 0, gives activations that are NaN or infinite; "
            "check its inputs, and the base's parameters"
        )
    probes, found = leaves_by_path(tapes), leaves_by_path(total)
    paths = {each.paths()["tape"]: each for each in placed}
    return Calibration(
        {each.weight_path: _inputs(each, probes[p], found[p]) for p, each in paths.items()}
    )


def _checked(batches: Iterable[Any], inputs: Callable[[Any], Any]) -> Iterator[tuple[Any, Inputs]]:
    """The batches, each with its inputs; raises UserError where they are none, or not alike."""
    first = None
    for number, batch in enumerate(batches):
        given = Inputs.of(inputs(batch)) or Inputs((), {})
        arrays, whole = given.split()
        alike = whole(dict.fromkeys(arrays))
        first = first or alike
        if alike != first:
            raise UserError(
                f"calibrate: batch {number}, from 0, is ({inputs_text(given.args, given.kwargs)}), "
                "and differs from the first one in more than shapes; give batches of one kind"
            )
        yield batch, given
    if first is None:
        raise UserError("calibrate: there are no batches; give a list of tuples of inputs")


def _observed(
    model: Any, params: Any, observers: Recipe, first: Inputs, other: Tree
) -> tuple[Run, list[Placement], Any, Any]:
    """How to run a model with tapes, where these are, they themselves, and all other arrays."""
    if isinstance(model, nnx.Module):
        base = copy(model)
        base.eval()
        adapted = adapt_nnx(base, observers, nnx.Rngs(0), first)
        parts: Any = nnx.split(adapted, AdapterParam, ...)
        graphdef, own, rest = parts

        def run_nnx(own: Any, rest: Any, given: Inputs) -> Any:
            return given.call(nnx.merge(graphdef, own, rest, copy=True))

        return run_nnx, list(placements_of(adapted)), own, rest
    linen: Any = (
        adapt_linen(model, observers)
        if isinstance(model, nn.Module)
        else adapt_function(model, params, observers, first)
    )
    own, frozen = partition(init_adapters(linen, params, jax.random.key(0), first), observers)

    def run(own: Any, rest: Any, given: Inputs) -> Any:
        variables = {**rest[1], "params": merge_trees(own, rest[0])}
        return linen.apply(variables, method=lambda model: given.call(model))

    return run, list(linen.adapter_placements.placements), own, (frozen, other)


def _step(run: Run, like: Inputs) -> Callable[..., tuple[Any, Array]]:
    """The jitted function that adds the statistics of one batch, of inputs like these, to others'.

    It also says which batch was the first one whose statistics are not finite, -1 for none.
    """
    whole = like.split()[1]

    def outputs(tapes: Any, rest: Any, arrays: Any, rows: Any) -> Array:
        with counting(rows):
            y = run(tapes, rest, whole(arrays))
        floats = [x for x in jax.tree.leaves(y) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
        return sum((jnp.sum(x.real.astype(jnp.float32)) for x in floats), jnp.zeros(()))

    @functools.partial(jax.jit, donate_argnums=4)
    def step(
        tapes: Any, rest: Any, arrays: Any, rows: Any, total: Any, broken: Array, number: Array
    ) -> tuple[Any, Array]:
        found = jax.grad(outputs)(tapes, rest, arrays, rows)
        finite = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(found)]))
        return jax.tree.map(jnp.add, total, found), jnp.where(
            (broken < 0) & ~finite, number, broken
        )

    return step


def _inputs(each: Placement, probes: Array, found: Array) -> Seen:
    """The principal directions of a weight's inputs, layer by layer, by its tape."""
    layers = probes.shape[: len(each.axes.shared) if each.axes else 0]
    one, two = (np.asarray(x, float) for x in (probes, found))
    rows = (math.prod(layers), -1, one.shape[-1])
    parts = [_principal(*pair) for pair in zip(one.reshape(rows), two.reshape(rows), strict=True)]
    if not all(count for *_, count in parts):
        raise UserError(
            f"calibrate: no batch shows inputs of {each.weight_path}; the mask counts none, or the "
            "model's outputs do not depend on it: leave it out"
        )
    known = min(shares.size for _, shares, _ in parts)
    directions = np.array([vectors[:, :known] for vectors, *_ in parts], np.float32)
    return Seen(
        each.path,
        each.shape,
        directions.reshape(*layers, -1, known),
        np.array([shares[:known] for _, shares, _ in parts], np.float32).reshape(*layers, known),
        min(count for *_, count in parts),
    )


def _principal(tape: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The principal directions of centred inputs, their shares of the variance, and the count.

    From all unit vectors as probes V they are exact. From random ones, the covariance C is taken
    as C V (V^T C V)^-1 V^T C (Tropp et al. 2017, "Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data"), and half of its directions.

    Args:
        tape: V, and columns for the sums.
        found: its gradient.
    """
    probes, products, (sums, squares, ones) = tape[:, :-SUMS], found[:, :-SUMS], found.T[-SUMS:]
    count = ones.max()
    mean = sums / max(count, 1)
    products = products - np.outer(mean, sums @ probes)
    total = max(squares.sum() - mean @ sums, np.finfo(float).tiny)
    fan_in, width = probes.shape
    inner = probes.T @ products
    scale, turn = np.linalg.eigh((inner + inner.T) / 2)
    if width == fan_in:
        return turn[:, ::-1], np.maximum(scale[::-1], 0) / total, float(count)
    kept = scale > 1e-6 * scale[-1]  # below it are the rounding errors of float32
    roots = products @ (turn[:, kept] / np.sqrt(scale[kept]))
    vectors, values, _ = np.linalg.svd(roots, full_matrices=False)
    return vectors[:, : width // 2], values[: width // 2] ** 2 / total, float(count)


def eva_ranks(recipe: Recipe | Method, calibration: Calibration, rho: float = 2.0) -> Recipe:
    """Redistributes the ranks of EVA: each goes to the weight whose direction explains most.

    The ranks add up to at most those of the recipe. Layers that are stacked have one rank, by the
    mean of what they explain. A weight that gets none is taken out of the targets. The scale at
    each weight stays as it was.

    Args:
        recipe: the recipe that the calibration was for.
        calibration: what `aj.calibrate` saw.
        rho: the largest new rank of a weight, as a multiple of its old one; at 1 nothing moves.

    Raises:
        UserError: the calibration has fewer directions than `rho` asks for, or none for a method.

    Example:
        >>> import adapters_jax as aj
        >>> base, recipe = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2, a_init="eva")
        >>> seen = aj.calibrate(base, recipe, [(jax.random.normal(jax.random.key(1), (8, 4)),)])
        >>> aj.eva_ranks(recipe, seen) == aj.Recipe(recipe)  # one weight keeps its rank
        True
    """
    check_number("eva_ranks", "rho", rho, low=1.0, closed=True)
    methods: list[Any] = list(Recipe(recipe))
    ranks: list[dict[str, int]] = [{} for _ in methods]
    budget, wanted = 0, list[tuple[float, int, str, int]]()
    for i, method in ((i, m) for i, m in enumerate(methods) if m.from_inputs):
        for path, seen in calibration.inputs.items():
            if not selects(method.targets, seen.target, path):
                continue
            *layers, fan_in, known = seen.directions.shape
            copies, rank = math.prod(layers), method.rank_at(seen.target)
            fan_out = math.prod(seen.shape) // (copies * fan_in)
            most = min(round(rank * rho), fan_in, fan_out)
            if most > known:
                raise UserError(
                    f"eva_ranks: {path} may get the rank {most}, and the calibration has {known} "
                    f"directions; write aj.calibrate(..., size={2 * most}), or a smaller rho"
                )
            budget, ranks[i][seen.target] = budget + rank * copies, 0
            shares = seen.explained.reshape(-1, known).mean(0)[:most]
            wanted += [(float(share), i, seen.target, copies) for share in shares]
        if not ranks[i]:
            raise UserError(
                f"eva_ranks: the calibration has no weight of {method.targets}; give the recipe "
                "that aj.calibrate got"
            )
    if not wanted:
        raise UserError("eva_ranks: the recipe has no method with a_init='eva'")
    for _, i, target, copies in sorted(wanted, key=lambda each: -each[0]):
        if copies <= budget:
            budget, ranks[i][target] = budget - copies, ranks[i][target] + 1
    pairs = zip(methods, ranks, strict=True)
    return Recipe(*(_with_ranks(m, own) for m, own in pairs if not own or any(own.values())))


def _with_ranks(method: Any, ranks: dict[str, int]) -> Any:
    """A method with other ranks at its targets, and the same scales."""
    if not ranks:
        return method
    none = [f"!{target}" for target, rank in ranks.items() if not rank]
    changed = {t: rank for t, rank in ranks.items() if rank and rank != method.rank_at(t)}
    pattern = (*changed.items(), *method.rank_pattern)
    made = dataclasses.replace(method, targets=(*method.targets, *none), rank_pattern=pattern)
    root = math.sqrt if method.rank_stabilized else float
    alphas = {target: method.scale_at(target) * root(rank) for target, rank in changed.items()}
    differ = [(t, a) for t, a in alphas.items() if made.scale_at(t) != method.scale_at(t)]
    return dataclasses.replace(made, alpha_pattern=(*differ, *method.alpha_pattern))
