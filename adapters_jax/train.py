"""Training: a state that keeps the base apart, and a jitted step that moves the adapters only.

The step differentiates the trained part alone, donates it and the optimiser's state, and never
returns the base: its arrays stay the same buffers for the whole of training.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx, struct
from jaxtyping import Array, Int, PRNGKeyArray

from adapters_jax.errors import RecipeError
from adapters_jax.examples import is_abstract
from adapters_jax.linen import Adapted
from adapters_jax.methods.base import check_size
from adapters_jax.nnx import AdapterParam, recipe_of
from adapters_jax.partition import Tree, flatten, merge_trees, partition
from adapters_jax.recipe import Recipe

Batch = Any
Metrics = dict[str, Array]
LossFn = Callable[[Any, Batch, PRNGKeyArray], Any]


@struct.dataclass
class TrainState:
    """What training carries from step to step, for a linen or an NNX model.

    Attributes:
        step: how many steps were made, int32.
        adapters: what trains: a nested dictionary (linen) or an `nnx.State` of `AdapterParam`.
            Half-precision leaves are kept in float32, so that small updates are not lost.
        base: what does not, of the same kind; never donated, never returned by a step.
        opt_state: the optimiser's state, as large as the adapters make it.
        key: seeds the steps; step i uses `fold_in(key, i)`.
        other: NNX: state that is not parameters, such as dropout counters; None in linen.
        tx: the optimiser of the trained part.
        recipe: says what trains.
        graphdef: NNX: the model's structure.
        dtypes: in which the model has the leaves of `adapters`, in their order.
    """

    step: Int[Array, ""]
    adapters: Tree
    base: Tree
    opt_state: optax.OptState
    key: PRNGKeyArray
    other: Any = None
    tx: optax.GradientTransformation = struct.field(pytree_node=False, default=None)
    recipe: Recipe = struct.field(pytree_node=False, default=None)
    graphdef: Any = struct.field(pytree_node=False, default=None)
    dtypes: tuple[Any, ...] = struct.field(pytree_node=False, default=())

    @classmethod
    def create(
        cls,
        model: Adapted | nnx.Module,
        params: Tree = None,
        *,
        tx: optax.GradientTransformation,
        key: PRNGKeyArray,
    ) -> "TrainState":
        """A state before the first step.

        Args:
            model: an adapted model.
            params: linen only: its parameters, as `init_adapters` gives them.
            tx: the optimiser; it only ever meets the trained part, so that plain optax does, also
                with clipping or accumulation around it. `freeze_base` is for groups.
            key: seeds the steps' randomness.

        Returns:
            A state whose trained leaves are copies, since steps donate them, and float32 where
            they were of half precision. Frozen leaves are the very arrays given, put on the device
            once where they were numpy's.

        Raises:
            TypeError: the model has no adapters, or params are missing or not wanted.
            RecipeError: the params lack the adapters, or the recipe trains leaves that are not
                floats and so have no gradient.
        """
        if isinstance(model, Adapted):
            if params is None:
                raise TypeError(
                    "TrainState.create: a linen model needs params; write "
                    "TrainState.create(model, params, tx=tx, key=key)"
                )
            recipe = model.recipe
            adapters, base = partition(params, recipe)
            graphdef = other = None
        elif isinstance(model, nnx.Module):
            if params is not None:
                raise TypeError(
                    "TrainState.create: an NNX model holds its parameters; pass no params"
                )
            recipe = recipe_of(model)
            graphdef, *parts = nnx.split(model, AdapterParam, nnx.Param, ...)
            adapters, base, other = parts
        else:
            raise TypeError(
                f"TrainState.create: {type(model).__name__} has no adapters; "
                "call aj.adapt(model, recipe) first"
            )
        _check_trained(recipe, adapters)
        dtypes = tuple(x.dtype for x in jax.tree.leaves(adapters))
        adapters, other = jax.tree.map(jnp.copy, (jax.tree.map(in_full, adapters), other))
        base = jax.tree.map(jnp.asarray, base)  # Variables of our own, around the same arrays
        return cls(
            step=jnp.zeros((), jnp.int32),
            adapters=adapters,
            base=base,
            # Some optimisers keep the parameters themselves, and one buffer is donated only once.
            opt_state=jax.tree.map(jnp.copy, tx.init(adapters)),
            key=jnp.copy(key),
            other=other,
            tx=tx,
            recipe=recipe,
            graphdef=graphdef,
            dtypes=dtypes,
        )

    @property
    def trained(self) -> Tree:
        """What trains, in the dtypes in which the model has it."""
        leaves, structure = jax.tree.flatten(self.adapters)
        cast = [x.astype(dtype) for x, dtype in zip(leaves, self.dtypes, strict=True)]
        return jax.tree.unflatten(structure, cast)

    @property
    def params(self) -> Tree:
        """linen: the whole parameter tree, for `model.apply({"params": state.params}, ...)`."""
        if self.graphdef is not None:
            raise TypeError("this state is of an NNX model; use state.model")
        return merge_trees(self.trained, self.base)

    @property
    def model(self) -> Any:
        """NNX: the model with its present parameters."""
        if self.graphdef is None:
            raise TypeError("this state is of a linen model; use state.params")
        return nnx.merge(self.graphdef, self.trained, self.base, self.other, copy=True)


def in_full(x: Any) -> Any:
    """An array, or an abstract one, that is kept for training: float32 instead of half precision.

    A bfloat16 number near 1 does not move by less than 1/256.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, dtype) if is_abstract(x) else x.astype(dtype)


def _check_trained(recipe: Recipe, adapters: Tree) -> None:
    """Raises RecipeError where a method has no leaves, or a trained leaf can have no gradient."""
    flat = flatten(nn.meta.unbox(adapters))
    owners = {owner[1] for path in flat if (owner := recipe.owner(path))}
    absent = [type(method).__name__ for method in recipe.attached if method not in owners]
    if absent or not flat:
        raise RecipeError(
            "TrainState.create: the parameters hold nothing of "
            f"{', '.join(absent) or 'what the recipe unfreezes'}; pass what "
            "aj.init_adapters(model, params, key, *example_inputs) returned"
        )
    discrete = [
        f"{path} ({leaf.dtype})"
        for path, leaf in flat.items()
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if discrete:
        raise RecipeError(
            f"TrainState.create: the recipe trains {', '.join(discrete)}, which has no gradient; "
            "unfreeze float parameters only"
        )


_OWN_METRICS = {"loss", "grad_norm", "finite"}


def make_train_step(
    loss_fn: LossFn, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted training step that moves what the recipe trains.

    Args:
        loss_fn: `loss_fn(params, batch, key)` in linen, `loss_fn(model, batch, key)` in NNX. It
            returns the loss, a float scalar, or `(loss, metrics)` with a dictionary of float
            scalars. The key differs from step to step; NNX models have their own streams and may
            leave it alone.
        accumulate: split the batch's leading axis into so many parts, one after the other, and
            average their gradients, losses and metrics with equal weight; memory is that of one.

    Returns:
        `step(state, batch) -> (state, metrics)`. The metrics are those of the loss function,
        "loss", "grad_norm" (global, before the optimiser), and "finite": 0.0 where loss or gradient
        was not finite; then nothing moved but the step's number: adapters, optimiser state, and an
        NNX model's statistics and dropout counters are those before the step.
        The state that was passed in is used up: its adapters and optimiser state are donated.

    Raises:
        ValueError: `accumulate` is not a positive whole number, or does not divide the batch; a
            metric of the loss function has a name that the step itself uses.

    Example:
        >>> import adapters_jax as aj, jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> base = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0))
        >>> state = TrainState.create(model, tx=optax.sgd(0.5), key=jax.random.key(0))
        >>> step = make_train_step(lambda model, batch, key: jnp.mean(model(batch)))
        >>> state, metrics = step(state, jnp.ones((4, 2)))
        >>> float(state.model.bias[0]), float(metrics["grad_norm"])
        (-0.5, 1.0)
    """
    check_size("make_train_step", "accumulate", accumulate)

    def loss_of(adapters: Tree, base: Tree, state: TrainState, other: Any, batch: Batch, key: Any):
        subject = replace(state, adapters=adapters, base=base, other=other)
        whole = subject.params if state.graphdef is None else subject.model
        result = loss_fn(whole, batch, key)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        taken = sorted(_OWN_METRICS & set(metrics))
        if taken:
            raise ValueError(
                f"make_train_step: the loss function returns metrics named {', '.join(taken)}, "
                "which the step reports itself; give them other names"
            )
        if state.graphdef is not None:
            other = _other(whole)
        return loss, (metrics, other)

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def one(state: TrainState, base: Tree, other: Any, batch: Batch, key: PRNGKeyArray):
        (loss, (metrics, other)), grads = gradient(state.adapters, base, state, other, batch, key)
        return other, (grads, {**metrics, "loss": loss})

    def gradients(state: TrainState, base: Tree, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            return one(state, base, state.other, batch, key)
        parts = jax.tree.map(functools.partial(_split, accumulate), batch)
        keys = jax.random.split(key, accumulate)
        other, stacked = jax.lax.scan(
            lambda other, part: one(state, base, other, *part), state.other, (parts, keys)
        )
        return other, jax.tree.map(lambda x: x.mean(0), stacked)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, base: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        other, (grads, metrics) = gradients(state, base, batch)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        adapters, opt_state, other = jax.lax.cond(
            finite,
            lambda: (*_moved(state.tx, grads, state.adapters, state.opt_state), other),
            lambda: (state.adapters, state.opt_state, state.other),
        )
        state = replace(
            state, step=state.step + 1, adapters=adapters, opt_state=opt_state, other=other
        )
        return state, {**metrics, "grad_norm": norm, "finite": finite.astype(jnp.float32)}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        moved, metrics = update(replace(state, base=None), state.base, batch)
        return replace(moved, base=state.base), metrics

    step.jitted = update  # type: ignore[attr-defined]
    return step


def _moved(
    tx: optax.GradientTransformation, grads: Tree, adapters: Tree, opt_state: optax.OptState
) -> tuple[Tree, optax.OptState]:
    """Adapters and optimiser state after an update."""
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state


def _other(model: nnx.Module) -> Any:
    """What an NNX model holds beside parameters."""
    return nnx.state(model, nnx.Not(nnx.Param))


def _split(parts: int, x: Array) -> Array:
    """The leading axis in so many parts."""
    if jnp.ndim(x) == 0 or x.shape[0] % parts:
        given = f"of {x.shape[0]}" if jnp.ndim(x) else "with a leaf without axes"
        raise ValueError(
            f"make_train_step: a batch {given} does not divide into {parts} parts; choose "
            "accumulate so that it divides the batch"
        )
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def make_eval_step(fn: Callable[[Any, Batch], Any]) -> Callable[[TrainState, Batch], Any]:
    """A jitted function of a state and a batch, without gradients.

    Args:
        fn: `fn(params, batch)` in linen, `fn(model, batch)` in NNX. An NNX model comes in
            evaluation mode (`model.eval()`), so that dropout is off; a linen model is told by its
            own arguments.

    Returns:
        `evaluate(state, batch)`, with what `fn` returns. The state is not changed.
    """

    @jax.jit
    def evaluate(state: TrainState, batch: Batch) -> Any:
        if state.graphdef is None:
            return fn(state.params, batch)
        model = state.model
        model.eval()
        return fn(model, batch)

    return evaluate
