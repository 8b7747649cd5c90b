"""Adapters of several ranks or widths, one after another, in the program of the largest one.

Each has its own initial values, scale and optimiser's state, padded with zeros. What the model
reads is multiplied by `TrainState.scales`, which are 0 in the padding: its gradient is exactly 0,
and an optimiser that works on each entry by itself leaves it at 0. Whatever leaves the training,
to a checkpoint or an adapter, is cut to its own shapes again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.errors import RecipeError
from adapters_jax.finetune.tasks.base import Problem
from adapters_jax.methods import AdaLoRA, Bottleneck, LoRA, LoReFT, Method
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.nnx.graph import copy, holds, modules_of
from adapters_jax.placement import Known, Placement, Placements
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState
from adapters_jax.trees import flatten, leaves_by_path, with_leaves

# Others divide by means over a leaf, or draw noise of its shape, so that padding changes numbers.
ENTRYWISE = ("adam", "adamw", "lion", "sgd")


def with_size(recipe: Recipe, name: str, size: int) -> Recipe:
    """A recipe whose methods have another rank or width, those that have the field."""
    fields = [{field.name for field in dataclasses.fields(method)} for method in recipe]
    pairs, changed = zip(recipe, fields, strict=True), dict[str, Any]({name: size})
    return Recipe(*(replace(m, **changed) if name in own else m for m, own in pairs))


def check_paddable(problem: Problem, optimizer: str) -> None:
    """Raises RecipeError where an adapter would not train in larger shapes as in its own."""
    if problem.mesh is not None:
        raise RecipeError("its batches are split over devices")
    if optimizer not in ENTRYWISE:
        raise RecipeError(f"{optimizer} does not work on each entry of a parameter by itself")
    if not problem.recipe.attached:
        raise RecipeError("it trains parameters of the base, each as large as it is")
    for method in problem.recipe.attached:
        kind = type(method).__name__
        if not isinstance(method, LoRA | Bottleneck | LoReFT):
            raise RecipeError(f"{kind} computes something else with padding")
        if isinstance(method, AdaLoRA):
            raise RecipeError("the budget and the penalty of AdaLoRA depend on the rank")
        if isinstance(method, Bottleneck) and method.dropout:
            raise RecipeError(f"the dropout of {kind} draws as many numbers as it is wide")


def padded_problem(problem: Any, widest: Recipe) -> tuple[Any, dict[str, np.ndarray]]:
    """The problem on a model with the shapes of a larger recipe; the scales of leaves by path.

    Args:
        problem: a problem on a linen or an NNX model, with its initial values.
        widest: its recipe, with a rank or width at least as large.

    Raises:
        RecipeError: leaves of a method compute with padding what they do not compute alone.
    """
    larger = dict(zip(problem.recipe, widest, strict=True))
    in_nnx = problem.params is None
    placed = placements_of(problem.model) if in_nnx else problem.model.placements_in(problem.params)
    grown = {each: replace(each, method=larger[each.method]).with_arrays() for each in placed}
    shapes, scales = dict[str, Any](), dict[str, np.ndarray]()
    for own, whole in grown.items():
        shapes |= whole.array_shapes
        scales |= {own.paths()[name]: x for name, x in _scales(own, whole).items()}
    tree = nnx.state(problem.model, nnx.Param) if in_nnx else problem.params
    flat = leaves_by_path(tree) if in_nnx else flatten(tree)
    own_paths = [path for path in flat if path in shapes]
    leaves = {path: jnp.asarray(_resized(flat[path], shapes[path])) for path in own_paths}
    whole_tree = with_leaves(tree, leaves)
    if not in_nnx:
        known = Known(Placements(grown.values()))
        model: Any = problem.model.clone(recipe=widest, adapter_placements=known)
        return replace(problem, model=model, params=whole_tree), scales
    model = copy(problem.model)
    for module in modules_of(model).values():
        if there := holds(module):
            module.adapter_methods = tuple(grown[each] for each in there)
    model.adapter_recipe = widest
    nnx.update(model, whole_tree)
    return replace(problem, model=model), scales


def _scales(own: Placement, whole: Placement) -> dict[str, np.ndarray]:
    """What leaves in the shapes of a larger method are multiplied by: a scale, and 0 as padding."""
    method: Method = own.method
    ones = {name: np.ones(shape, np.float32) for name, shape in own.arrays}
    made, sizes = method.fitted(ones, own.path, whole.method), dict(whole.arrays)
    uneven = [name for name, x in made.items() if np.any(np.asarray(x) != np.asarray(x).flat[0])]
    if uneven:
        raise RecipeError(f"{type(method).__name__} at {own.path} needs other numbers with padding")
    return {name: np.asarray(_resized(x, sizes[name]), np.float32) for name, x in made.items()}


@dataclass(frozen=True)
class Widened:
    """A training in larger shapes than its own.

    Attributes:
        problem: its problem, in the larger shapes.
        own: its state in its own shapes, without the base; arrays are abstract.
        whole: the same in the larger shapes.
        scales: `TrainState.scales` in the larger shapes, on the host.
    """

    problem: Any
    own: TrainState
    whole: TrainState
    scales: tuple[Any, ...]

    @classmethod
    def of(cls, problem: Problem, state: TrainState, widest: Recipe) -> Widened:
        """A training of a problem that has this state before its first step."""
        larger, scales = padded_problem(problem, widest)
        parts = {"tx": state.tx, "key": state.key, "loss_scale": state.loss_scale}
        whole = TrainState.create(larger.model, larger.params, **parts)
        paths = leaves_by_path(whole.adapters)
        return cls(larger, _abstract(state), _abstract(whole), tuple(map(scales.get, paths)))

    def widen(self, state: TrainState) -> TrainState:
        """A state in the larger shapes."""
        return replace(_as(state, self.whole), scales=jax.tree.map(jnp.array, self.scales))

    def cut(self, state: TrainState) -> TrainState:
        """A state in its own shapes."""
        return replace(_as(state, self.own), scales=None)


def _abstract(state: TrainState) -> TrainState:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.checkpointed)
    return replace(state, base=None, **shapes)


def _as(state: TrainState, like: TrainState) -> TrainState:
    """A state with the shapes, the recipe and the structure of another one of its model."""

    def one(x: Any, own: Any) -> Any:
        # On the host, so that nothing is compiled for each rank.
        return x if x.shape == own.shape else jnp.asarray(_resized(x, own.shape))

    arrays = {n: getattr(state, n) for n in ("adapters", "opt_state")}
    arrays = {n: jax.tree.map(one, x, getattr(like, n)) for n, x in arrays.items()}
    named = {n: getattr(like, n) for n in ("recipe", "graphdef", "placements")}
    return replace(state, **arrays, **named)


def _resized(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array with zeros behind its entries, or without its last ones, on the host."""
    kept = np.asarray(x)[tuple(map(slice, shape))]
    return np.pad(kept, [(0, n - own) for n, own in zip(shape, kept.shape, strict=True)])
