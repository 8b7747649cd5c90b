"""Several trainings of one base in one program, each with what it would have alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from adapters_jax.errors import UserError, compare_trees, shown
from adapters_jax.training.state import TrainState
from adapters_jax.trees import Tree, leaves_by_path


@dataclass(frozen=True)
class Optimizers:
    """The optimisers of several trainings; each works on its own part of stacked leaves.

    Attributes:
        groups: each optimiser, and which of the trainings have it.
    """

    groups: tuple[tuple[optax.GradientTransformation, tuple[int, ...]], ...]

    @classmethod
    def of(cls, optimizers: Sequence[optax.GradientTransformation]) -> "Optimizers":
        """Trainings with one optimiser share its operations; each keeps its own state."""
        each: dict[int, list[int]] = {}
        for i, tx in enumerate(optimizers):
            # By identity, since optax's transformations are closures: two of one rate do not
            # compare equal.
            each.setdefault(id(tx), []).append(i)
        return cls(tuple((optimizers[own[0]], tuple(own)) for own in each.values()))

    def update(
        self, grads: Tree, states: Any, params: Tree, value: Float[Array, " states"]
    ) -> tuple[Tree, Any]:
        """The updates of all trainings, and the states after them; as in optax."""
        parts, after = [], []

        def one(tx: Any, *given: Any) -> tuple[Tree, Any]:
            return optax.with_extra_args_support(tx).update(*given[:-1], value=given[-1])

        for (tx, own), state in zip(self.groups, states, strict=True):
            given = _rows(grads, own), state, _rows(params, own), _rows(value, own)
            updates, state = jax.vmap(partial(one, tx))(*given)
            parts.append(updates)
            after.append(state)
        if len(parts) == 1:
            return parts[0], tuple(after)
        # The parts come optimiser by optimiser, and leaves are stacked training by training.
        order = np.argsort([i for _, own in self.groups for i in own])
        return jax.tree.map(lambda *x: jnp.concatenate(x)[order], *parts), tuple(after)

    def chosen(
        self, takes: Bool[Array, " states"], after: tuple[Any, ...], before: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Trained leaves, optimisers' states and the rest: of each training those of its step.

        Args:
            takes: which trainings take their step.
            after: the three after the step.
            before: the three before it.
        """

        adapters, states, other = zip(after, before, strict=True)
        kept = tuple(
            picked(takes[np.array(own)], *pair)
            for (_, own), *pair in zip(self.groups, *states, strict=True)
        )
        return picked(takes, *adapters), kept, picked(takes, *other)


def picked(takes: Bool[Array, " states"], after: Any, before: Any) -> Any:
    """Stacked leaves: of each training the new ones where it takes them, else the old ones."""

    def one(new: Array, old: Array) -> Array:
        # A select and no arithmetic: NaN times zero would still be NaN.
        return jnp.where(takes.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(one, after, before)


def _rows(tree: Tree, own: Sequence[int]) -> Tree:
    """The part of stacked leaves that belongs to some trainings."""
    # No gather where one optimiser has all trainings, as in most programs.
    if list(own) == list(range(jax.tree.leaves(tree)[0].shape[0])):
        return tree
    return jax.tree.map(lambda x: x[np.array(own)], tree)


def stack_states(states: Sequence[TrainState]) -> TrainState:
    """One state of several trainings of one base, which the steps of `make_train_step` take.

    Each training keeps its optimiser with its rate, decay, schedule and clipping, its key, its
    number of steps, and whether its gradients are finite. The base is there once. A step then
    takes a batch whose arrays have a first axis for the trainings, and `active=`, which of them
    make a step; metrics have that axis too. Trainings that share an optimiser (one object) share
    its operations, so that the program stays small; numbers that differ can be in its state, by
    `optax.inject_hyperparams`.

    Args:
        states: of models with one structure and one recipe, over the same base arrays.

    Returns:
        A state with stacked leaves; the given states stay usable.

    Raises:
        UserError: the states differ in structure, recipe or base, or there are none.
        MismatchError: their trained leaves differ in shape.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> base = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0))
        >>> states = [
        ...     TrainState.create(model, tx=optax.sgd(rate), key=jax.random.key(0))
        ...     for rate in (0.5, 0.25)]
        >>> step = aj.make_train_step(lambda model, x, key: jnp.mean(model(x)))
        >>> together, metrics = step(stack_states(states), jnp.ones((2, 4, 2)))
        >>> [float(state.model.bias[0]) for state in unstack_states(together)]
        [-0.5, -0.25]
    """
    if isinstance(states, TrainState):
        raise UserError("stack_states: got one TrainState, expected a list; write [a, b]")
    if not states:
        raise UserError("stack_states: no states, expected one or more")
    first = states[0]
    for i, state in enumerate(states):
        _check_alike(i, first, state)
    optimizers = Optimizers.of([state.tx for state in states])
    stacked = jax.tree.map(_stacked, *[_without_optimizer(state) for state in states])
    # Apart from the rest of the state: each optimiser has its own structure for the trainings
    # that use it.
    opt_state = tuple(
        jax.tree.map(_stacked, *[states[i].opt_state for i in own]) for _, own in optimizers.groups
    )
    stacked = replace(stacked, base=first.base, opt_state=opt_state, tx=optimizers)
    return _laid_out_as(first, stacked)


def unstack_states(state: TrainState) -> list[TrainState]:
    """The states of trainings, each as if it had been trained alone; undoes `stack_states`.

    Args:
        state: as `stack_states` or a step on such a state gives it.

    Returns:
        The states in their order, on the given state's base; their leaves are copies, without the
        axis for the trainings.

    Raises:
        UserError: the state is not of several trainings.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> base = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0))
        >>> state = TrainState.create(model, tx=optax.sgd(0.5), key=jax.random.key(0))
        >>> together = stack_states([state, state])
        >>> together.step.shape, [int(state.step) for state in unstack_states(together)]
        ((2,), [0, 0])
    """
    if not isinstance(state.tx, Optimizers):
        raise UserError("unstack_states: this is the state of one training; use it as it is")
    states = []
    for i in range(state.step.shape[0]):
        one = jax.tree.map(lambda x, i=i: x[i], _without_optimizer(state))
        for (tx, own), opt_state in zip(state.tx.groups, state.opt_state, strict=True):
            if i in own:
                own_state = jax.tree.map(lambda x, at=own.index(i): x[at], opt_state)
                one = replace(one, base=state.base, opt_state=own_state, tx=tx)
        states.append(_laid_out_as(state, one))
    return states


def taken(state: TrainState, only: Int[Array, " some"]) -> TrainState:
    """The state of some of the trainings, which share an optimiser, without the base."""
    ((tx, _),) = state.tx.groups  # type: ignore[attr-defined]
    part = jax.tree.map(lambda x: x[only], replace(state, base=None))
    return replace(part, tx=Optimizers(((tx, tuple(range(only.shape[0]))),)))


def put_back(whole: TrainState, part: TrainState, only: Int[Array, " some"]) -> TrainState:
    """The state of all trainings with what `taken` took, after a step."""
    part = replace(part, tx=whole.tx)
    return jax.tree.map(lambda x, new: x.at[only].set(new, unique_indices=True), whole, part)


def check_step(state: TrainState, batch: Any, active: Any, only: Any) -> Any:
    """Checks the arguments of a step, and returns `only` as an array.

    Raises:
        UserError: the batch has no axis for the trainings, `active` is not one flag for each, or
            `only` is not the numbers of some, each once.
    """
    if not isinstance(state.tx, Optimizers):
        if active is not None or only is not None:
            name = "active=" if only is None else "only="
            raise UserError(f"make_train_step: {name} is for stacked states; leave it out")
        return None
    n = state.step.shape[0]
    if only is not None:
        only = _checked_only(state.tx, n, active, only)
        n = only.shape[0]
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    wrong = [list(shape) for shape in shapes if shape[:1] != (n,)]
    if wrong:
        raise UserError(
            f"make_train_step: the batch has an array of shape {wrong[0]}, expected a first axis "
            f"of {n}, one for each training"
        )
    if active is None:
        return only
    shape, dtype = jnp.shape(active), jnp.result_type(active)
    if shape != (n,) or not jnp.issubdtype(dtype, jnp.bool_):
        raise UserError(
            f"make_train_step: active is {dtype}{list(shape)}, expected bool[{n}], which of the "
            "trainings make a step"
        )
    return None


def _checked_only(tx: Optimizers, n: int, active: Any, only: Any) -> Any:
    """The numbers of some of n trainings, as an array."""
    if active is not None:
        raise UserError("make_train_step: got active= and only=; give one of them")
    if len(tx.groups) > 1:
        raise UserError(
            f"make_train_step: only= is for trainings that share an optimiser, and these have "
            f"{len(tx.groups)}; give active=, or make the states with one optimiser object"
        )
    if isinstance(only, jax.core.Tracer):
        return only
    given = np.asarray(only)
    right = given.ndim == 1 and given.size and np.issubdtype(given.dtype, np.integer)
    if not right or len({*given.tolist()}) < given.size or given.min() < 0 or given.max() >= n:
        raise UserError(
            f"make_train_step: only={shown(only)}, expected numbers of trainings from 0 to "
            f"{n - 1}, each once"
        )
    return given.astype(np.int32)


def _without_optimizer(state: TrainState) -> TrainState:
    """A state without its base and its optimiser, which are stacked otherwise."""
    return replace(state, base=None, opt_state=None, tx=None, layout=None)


def _laid_out_as(given: TrainState, made: TrainState) -> TrainState:
    """A state that keeps the shardings of its leaves, if the one that it comes from does."""
    if given.layout is None:
        return made
    return replace(made, layout=tuple(x.sharding for x in jax.tree.leaves(made.checkpointed)))


def _stacked(*leaves: Any) -> Any:
    """Leaves on a new first axis, on the devices where they were."""
    whole = jnp.stack(leaves)
    # jnp.stack decides itself where its result lies.
    where = getattr(leaves[0], "sharding", None)
    if isinstance(where, NamedSharding):
        return jax.device_put(whole, NamedSharding(where.mesh, P(None, *where.spec)))
    return whole


def _check_alike(i: int, first: TrainState, state: TrainState) -> None:
    """Raises UserError where a state cannot be stacked with the first."""
    if isinstance(state.tx, Optimizers):
        raise UserError(f"stack_states: state {i} is of several trainings; unstack it first")
    if state.recipe != first.recipe or state.graphdef != first.graphdef:
        raise UserError(
            f"stack_states: state {i} is of another model or recipe than state 0; train those "
            "apart, or give all of them one recipe"
        )
    compare_trees(
        f"stack_states: state {i}",
        leaves_by_path((state.adapters, state.other, state.loss_scale)),
        leaves_by_path((first.adapters, first.other, first.loss_scale)),
        "Stack states of one model and recipe.",
        dtypes=True,
    )
    mine, others = jax.tree.leaves(state.base), jax.tree.leaves(first.base)
    # By identity: to compare values, every device would read all of its base.
    if len(mine) != len(others) or any(x is not y for x, y in zip(mine, others, strict=True)):
        raise UserError(
            f"stack_states: state {i} has other arrays as its base than state 0; make all of them "
            "from one adapted model, or from one tree of parameters on the device, where each "
            "state puts numpy arrays anew: params = jax.device_put(params)"
        )
