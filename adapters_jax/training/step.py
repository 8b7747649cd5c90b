"""Training: a jitted step that updates only the adapters.

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
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.checks import check_size
from adapters_jax.errors import UserError
from adapters_jax.training.state import TrainState
from adapters_jax.trees import Tree

Batch = Any
Metrics = dict[str, Array]
LossFn = Callable[[Any, Batch, PRNGKeyArray], Any]

_OWN_METRICS = {"loss", "grad_norm", "finite"}


def make_train_step(
    loss_fn: LossFn, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a jitted training step that updates what the recipe trains.

    Args:
        loss_fn: `loss_fn(params, batch, key)` in linen, `loss_fn(model, batch, key)` in NNX. It
            returns the loss, a float scalar, or `(loss, metrics)` with a dictionary of float
            scalars. The key differs from step to step; NNX models have their own streams and may
            ignore it.
        accumulate: the number of parts into which the batch's leading axis is split. They run one
            after the other in the memory of one; their gradients, losses and metrics are averaged
            with equal weight.

    Returns:
        `step(state, batch) -> (state, metrics)`. The metrics are those of the loss function,
        "loss", "grad_norm" (global, before the optimiser), and "finite": 0.0 where loss or gradient
        was not finite; then only the step's number changes: adapters, optimiser state, and an NNX
        model's statistics and dropout counters are those before the step.
        The given state cannot be used again: its adapters and optimiser state are donated.

    Raises:
        UserError: `accumulate` is not a positive whole number, or does not divide the batch; or a
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
            raise UserError(
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
            lambda: (*_updated(state.tx, grads, state.adapters, state.opt_state), other),
            lambda: (state.adapters, state.opt_state, state.other),
        )
        state = replace(
            state, step=state.step + 1, adapters=adapters, opt_state=opt_state, other=other
        )
        state = _laid_out(state)
        return state, {**metrics, "grad_norm": norm, "finite": finite.astype(jnp.float32)}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        updated, metrics = update(replace(state, base=None), state.base, batch)
        return replace(updated, base=state.base), metrics

    step.jitted = update  # type: ignore[attr-defined]
    return step


def _updated(
    tx: optax.GradientTransformation, grads: Tree, adapters: Tree, opt_state: optax.OptState
) -> tuple[Tree, optax.OptState]:
    """Adapters and optimiser state after an update."""
    updates, opt_state = tx.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state


def _laid_out(state: TrainState) -> TrainState:
    """A state whose leaves keep the shardings of its layout, so that nothing is compiled again."""
    if state.layout is None:
        return state
    leaves, structure = jax.tree.flatten(state.moving)
    kept = map(jax.lax.with_sharding_constraint, leaves, state.layout)
    return replace(state, **jax.tree.unflatten(structure, kept))


def _other(model: nnx.Module) -> Any:
    """The state of an NNX model that is not parameters."""
    return nnx.state(model, nnx.Not(nnx.Param))


def _split(parts: int, x: Array) -> Array:
    """Splits the leading axis into parts."""
    if jnp.ndim(x) == 0 or x.shape[0] % parts:
        given = f"of {x.shape[0]}" if jnp.ndim(x) else "with a leaf without axes"
        raise UserError(
            f"make_train_step: a batch {given} does not divide into {parts} parts; choose "
            "accumulate so that it divides the batch"
        )
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def make_eval_step(fn: Callable[[Any, Batch], Any]) -> Callable[[TrainState, Batch], Any]:
    """Makes a jitted function of a state and a batch, without gradients.

    Args:
        fn: `fn(params, batch)` in linen, `fn(model, batch)` in NNX. An NNX model comes in
            evaluation mode (`model.eval()`), so that dropout is off; to a linen model, `fn` passes
            arguments such as `deterministic=True`.

    Returns:
        `evaluate(state, batch)`, which returns what `fn` returns. The state is not changed.
    """

    @jax.jit
    def evaluate(state: TrainState, batch: Batch) -> Any:
        if state.graphdef is None:
            return fn(state.params, batch)
        model = state.model
        model.eval()
        return fn(model, batch)

    return evaluate
