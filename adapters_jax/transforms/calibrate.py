"""Statistics of activations from batches, and the ranks that they suggest, for EVA.

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation", arXiv:2410.07170. Directions are of centred inputs, as in the authors' code.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.functions import adapt as adapt_function
from adapters_jax.functions.function import is_function
from adapters_jax.linen import Adapted, init_adapters
from adapters_jax.linen import adapt as adapt_linen
from adapters_jax.methods import Method
from adapters_jax.methods.calibration import Calibration, Observer, counting, principal
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
    /,
    *given: Any,
    mask: Callable[[Any], Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    size: int = 256,
    other: Tree | None = None,
) -> Calibration:
    """Finds along which directions the inputs of weights vary, for a start from activations.

    `calibrate(model, recipe, batches)` is for NNX, and `calibrate(model, params, recipe, batches)`
    for linen and for functions. The base runs on each batch once, in evaluation. Of each weight it
    keeps an array of the weight's inputs times `size`, whatever the number of batches: weights with
    at most `size` inputs have exact directions, others `size / 2` approximate ones. A loop that
    shows progress is one around `batches`, such as `tqdm(batches)`.

    Args:
        model: the base: an NNX or linen module, or a function of its parameters.
        *given: linen and functions: the parameters of the base. Then the recipe, whose methods with
            `a_init="eva"` say which weights; then the batches: each is a tuple of inputs, or
            `aj.inputs(...)`, as example inputs are. Their shapes may differ.
        mask: of a batch, as `batches` has it, which positions count, or how much: an array of the
            first axes of the weights' inputs, (batch, length). By default all of them.
        inputs: of a batch, as `batches` has it, the inputs; by default the batch itself.
        size: how many numbers are kept for each input of a weight.
        other: linen only: the model's other collections, such as `{"batch_stats": ...}`.

    Returns:
        The statistics, for `calibration=` of `init_adapters` and `adapt`, and for `eva_ranks`.

    Raises:
        UserError: there are no batches, one differs from the first in more than shapes, or one
            gives activations that are NaN or infinite; no method starts from activations.
        RecipeError: a weight has no activations that are known, or the mask does not fit them.
        TypeError: an argument is missing or misplaced.

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
    params, recipe, batches = _arguments(model, given)
    methods = [method for method in recipe.attached if method.from_inputs]
    if not methods:
        raise UserError(
            "calibrate: no method of the recipe starts from activations; write a_init='eva'"
        )
    observers = Recipe(*(Observer(method.targets, size) for method in methods))
    every = _checked(batches, inputs or (lambda batch: batch))
    start = next(every)
    first = start[1]
    run, placed, tapes, rest = _observed(model, params, observers, first, other or {})
    step, total, broken = _step(run, first), None, jnp.int32(-1)
    for number, (batch, whole) in enumerate(itertools.chain([start], every)):
        rows = None if mask is None else jnp.asarray(mask(batch), jnp.float32)
        total, broken = step(tapes, rest, _arrays(whole), rows, total, broken, number)
        jax.block_until_ready(broken)  # so that no more than one batch is in memory
    if int(broken) >= 0:
        raise UserError(
            f"calibrate: batch {int(broken)}, from 0, gives activations that are NaN or infinite; "
            "check its inputs, and the base's parameters"
        )
    probes, found = leaves_by_path(tapes), leaves_by_path(total)
    return Calibration(
        {
            each.weight_path: _principal(each, probes[path], found[path])
            for each in placed
            for path in each.paths().values()
        }
    )


def _arguments(model: Any, given: tuple[Any, ...]) -> tuple[Any, Recipe, Any]:
    """The parameters, the recipe and the batches."""
    is_nnx = isinstance(model, nnx.Module)
    call = "model, recipe, batches" if is_nnx else "model, params, recipe, batches"
    known = is_nnx or isinstance(model, nn.Module) or is_function(model)
    fits = len(given) == 3 - is_nnx and isinstance(given[-2], Recipe | Method)
    if not known or not fits or isinstance(model, Adapted) or hasattr(model, "adapter_recipe"):
        raise TypeError(
            f"calibrate: got {type(model).__name__} and {len(given)} further arguments, expected a "
            f"base without adapters; write aj.calibrate({call})"
        )
    return None if is_nnx else given[0], Recipe(given[-2]), given[-1]


def _checked(batches: Any, inputs: Callable[[Any], Any]) -> Iterator[tuple[Any, Inputs]]:
    """The batches, each with its inputs; raises UserError where they are none, or not alike."""
    first = None
    for number, batch in enumerate(batches):
        whole = Inputs.of(inputs(batch))
        if whole is None:
            raise UserError(f"calibrate: batch {number} is None; write (x,), or aj.inputs(x)")
        alike = whole.split()[1](dict.fromkeys(whole.split()[0]))
        first = alike if first is None else first
        if alike != first:
            raise UserError(
                f"calibrate: batch {number}, from 0, is ({inputs_text(whole.args, whole.kwargs)}), "
                "and differs from the first one in more than shapes; give batches of one kind"
            )
        yield batch, whole
    if first is None:
        raise UserError("calibrate: there are no batches; give a list of tuples of inputs")


def _arrays(inputs: Inputs) -> dict[int, Any]:
    """The arrays of inputs, by the numbers that `Inputs.split` gives them."""
    leaves = jax.tree.leaves((inputs.args, dict(inputs.kwargs)))
    return {i: leaves[i] for i in inputs.split()[0]}


def _observed(
    model: Any, params: Any, observers: Recipe, first: Inputs, other: Tree
) -> tuple[Run, list[Placement], Any, Any]:
    """How to run a model with tapes, where they are, they themselves, and all other arrays."""
    if isinstance(model, nnx.Module):
        base = copy(model)
        base.eval()
        adapted = adapt_nnx(base, observers, nnx.Rngs(0), first)
        parts: Any = nnx.split(adapted, AdapterParam, ...)
        graphdef, tapes, rest = parts
        placed = list(placements_of(adapted))
        return (
            lambda tapes, rest, given: given.call(nnx.merge(graphdef, tapes, rest, copy=True)),
            placed,
            tapes,
            rest,
        )
    flax = isinstance(model, nn.Module)
    linen: Any = (
        adapt_linen(model, observers) if flax else adapt_function(model, params, observers, first)
    )
    whole = init_adapters(linen, params, jax.random.key(0), first)
    own, base = partition(whole, observers)

    def run(tapes: Any, rest: Any, given: Inputs) -> Any:
        base, others = rest
        variables = {**others, "params": merge_trees(tapes, base)}
        return linen.apply(variables, method=lambda model: given.call(model))

    return run, list(linen.adapter_placements.placements), own, (base, other)


def _step(run: Run, like: Inputs) -> Callable[..., tuple[Any, Array]]:
    """The jitted function that adds the statistics of one batch to those of the others.

    Args:
        run: runs the model.
        like: inputs of the structure of all of them.
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
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        return total, jnp.where((broken < 0) & ~finite, number, broken)

    return step


def _principal(each: Placement, probes: Array, found: Array) -> Seen:
    """The principal directions of a weight's inputs, layer by layer, by its tape."""
    assert each.axes is not None
    layers = tuple(each.shape[i] for i in each.axes.shared)
    matrices = [np.asarray(x, float) for x in (probes, found)]
    matrices = [x.reshape(math.prod(layers), -1, x.shape[-1]) for x in matrices]
    width = matrices[0].shape[-1] - SUMS
    parts = [principal(one[:, :width], two) for one, two in zip(*matrices, strict=True)]
    if not all(count for *_, count in parts):
        raise UserError(
            f"calibrate: no batch shows inputs of {each.weight_path}; the mask counts none, or the "
            "model's outputs do not depend on it: leave it out"
        )
    known = min(values.size for _, values, _ in parts)
    directions = np.stack([vectors[:, :known] for vectors, *_ in parts]).astype(np.float32)
    explained = np.stack([values[:known] for _, values, _ in parts]).astype(np.float32)
    return Seen(
        each.path,
        each.shape,
        directions.reshape(*layers, -1, known),
        explained.reshape(*layers, known),
        min(count for *_, count in parts),
    )


def eva_ranks(recipe: Recipe | Method, calibration: Calibration, rho: float = 2.0) -> Recipe:
    """Redistributes the ranks of EVA: each goes to the weight whose direction explains most.

    The ranks add up to at most those of the recipe, and a weight gets at most `rho` times its own;
    layers that are stacked have one rank, by the mean of what they explain. A weight that gets none
    is taken out of the targets. The scale of each weight stays as it was.

    Args:
        recipe: the recipe that the calibration was for.
        calibration: what `aj.calibrate` saw.
        rho: the largest rank, as a multiple of the recipe's; at 1 nothing moves.

    Raises:
        UserError: the calibration has fewer directions than `rho` asks for, or none for a method.

    Example:
        >>> import adapters_jax as aj
        >>> class Two(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.a, self.b = nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.b(jnp.tanh(self.a(x)))
        >>> base, recipe = Two(nnx.Rngs(0)), aj.LoRA("*", rank=2, a_init="eva")
        >>> x = jax.random.normal(jax.random.key(1), (64, 1)) * jnp.ones(8)  # varies along one only
        >>> x += 0.1 * jax.random.normal(jax.random.key(2), (64, 8))
        >>> aj.eva_ranks(recipe, aj.calibrate(base, recipe, [(x,)])).methods[0].rank_pattern
        (('a', 1), ('b', 3))
    """
    check_number("eva_ranks", "rho", rho, low=1.0, closed=True)
    made: list[Any] = []
    recipe = Recipe(recipe)
    mine: dict[int, list[tuple[str, Seen]]] = {
        i: [
            (path, seen)
            for path, seen in calibration.inputs.items()
            if selects(method.targets, seen.target, path)
        ]
        for i, method in enumerate(recipe)
        if method.from_inputs
    }
    if not mine or not all(mine.values()):
        raise UserError(
            "eva_ranks: the calibration has no weight of a method of the recipe with a_init='eva'; "
            "give the recipe that aj.calibrate got"
        )
    ranks, budget, wanted = {}, 0, []
    for i, found in mine.items():
        method: Any = recipe.methods[i]
        for path, seen in found:
            rank, copies = method.rank_at(seen.target), math.prod(seen.explained.shape[:-1])
            most = min(round(rank * rho), *_sides(seen))
            if most > seen.explained.shape[-1]:
                raise UserError(
                    f"eva_ranks: {path} may get the rank {most}, and the calibration has "
                    f"{seen.explained.shape[-1]} directions; write aj.calibrate(..., size="
                    f"{2 * most}), or a smaller rho"
                )
            budget, ranks[i, seen.target] = budget + rank * copies, 0
            shares = seen.explained.reshape(-1, seen.explained.shape[-1]).mean(0)[:most]
            wanted += [(-share, i, seen.target, copies) for share in shares]
    for _, i, target, copies in sorted(wanted, key=lambda each: each[0]):
        if copies <= budget:
            budget, ranks[i, target] = budget - copies, ranks[i, target] + 1
    for i, method in enumerate(recipe):
        own = {target: rank for (j, target), rank in ranks.items() if j == i}
        made += [_with_ranks(method, own)] if not own or any(own.values()) else []
    return Recipe(*made)


def _sides(seen: Seen) -> tuple[int, int]:
    """The fan-in and the fan-out of a weight."""
    *layers, fan_in, _ = seen.directions.shape
    return fan_in, math.prod(seen.shape) // math.prod((*layers, fan_in))


def _with_ranks(method: Any, ranks: dict[str, int]) -> Any:
    """A method with other ranks at its targets, and the same scales."""
    none = (f"!{target}" for target, rank in ranks.items() if not rank)
    some = {target: rank for target, rank in ranks.items() if rank}
    changed = [(target, rank) for target, rank in some.items() if rank != method.rank_at(target)]
    pattern = (*changed, *method.rank_pattern)
    made = dataclasses.replace(method, targets=(*method.targets, *none), rank_pattern=pattern)
    alphas = [
        (target, method.scale_at(target) * (math.sqrt(rank) if method.rank_stabilized else rank))
        for target, rank in some.items()
        if not math.isclose(made.scale_at(target), method.scale_at(target))
    ]
    return dataclasses.replace(made, alpha_pattern=(*alphas, *method.alpha_pattern))
