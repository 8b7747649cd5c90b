"""Training: a jitted step that updates only the adapters.

The step differentiates the trained part alone, donates it and the optimiser's state, and never
returns the base: its arrays stay the same buffers for the whole of training.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.errors import (
    ApplyScopeInvalidVariablesStructureError,
    ScopeCollectionNotFound,
    TraceContextError,
)
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from adapters_jax.errors import UserError, check_size, compare_trees, warn
from adapters_jax.linen import Adapted
from adapters_jax.methods.mixed import mapping
from adapters_jax.trace.mapping import vmap
from adapters_jax.training.state import TrainState, check_state, checked_collections
from adapters_jax.training.together import Optimizers, check_step, picked, put_back, taken
from adapters_jax.trees import Tree, leaves_by_path, with_leaves
from adapters_jax.weights.meshes import on_mesh

Batch = Any
Metrics = dict[str, Array]
LossFn = Callable[[Any, Batch, PRNGKeyArray], Any]

_OWN_METRICS = {"loss", "grad_norm", "finite", "loss_scale"}


def make_train_step(
    loss_fn: LossFn, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a jitted training step that updates what the recipe trains.

    Args:
        loss_fn: `loss_fn(params, batch, key)` in linen, `loss_fn(model, batch, key)` in NNX. It
            returns the loss, a float scalar, or `(loss, metrics)` with a dictionary of float
            scalars. The key differs from step to step; NNX models have their own streams and may
            ignore it. If the state has linen collections, it is `loss_fn(variables, batch, key)`
            with `variables` for `model.apply`; `(loss, metrics, collections)` returns those that
            `apply(..., mutable=[...])` changed.
        accumulate: the number of parts that the batch's leading axis is split into. They run one
            after the other in the memory of one; their gradients, losses and metrics are averaged
            with equal weight. Statistics go from each part to the next.

    Returns:
        `step(state, batch) -> (state, metrics)`. The metrics are those of the loss function,
        "loss", "grad_norm" (global, before the optimiser), and "finite": 0.0 where loss or gradient
        was not finite; then only the step's number changes: adapters, optimiser state, collections,
        and an NNX model's statistics and dropout counters are those before the step. If the state
        has a loss scale, it changes as well, and "loss_scale" is the one that the step used; "loss"
        and "grad_norm" are without it.
        The given state cannot be used again: all of it but the base is donated.
        Each new shape of a batch compiles the step anew.
        Of a state that `stack_states` made, each training makes its own step, on its own part of
        the batch's first axis; `step(state, batch, active)` leaves out those that are not active.
        `step(state, batch, only=[7, 2])` makes the steps of these alone, in place, on a batch with
        a part for each of them, at the cost of these. They have to share an optimiser.

    Raises:
        UserError: `loss_fn` is not a function of three arguments, or uses variables that the state
            lacks; `accumulate` is not a positive whole number, or does not divide the batch; a
            metric of the loss function has a name that the step itself uses; it returns
            collections that the state does not have; the loss is not a float scalar; or a step was
            given the state before.
        MismatchError: a returned collection has other arrays than the state's.

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

        Batch statistics of a linen model:

        >>> from flax import linen as nn
        >>> base = nn.BatchNorm(use_running_average=False, momentum=0.5)
        >>> variables = base.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"))
        >>> state = TrainState.create(
        ...     model, variables["params"], collections={"batch_stats": variables["batch_stats"]},
        ...     tx=optax.sgd(0.5), key=jax.random.key(0))
        >>> def loss_fn(variables, batch, key):
        ...     y, updated = model.apply(variables, batch, mutable=["batch_stats"])
        ...     return jnp.mean(y), {}, updated
        >>> state, metrics = make_train_step(loss_fn)(state, jnp.ones((4, 2)))
        >>> state.variables["batch_stats"]["mean"].tolist()
        [0.5, 0.5]
    """
    check_size("make_train_step", "accumulate", accumulate)
    _check_function("make_train_step", loss_fn, ("params", "batch", "key"))
    measured = functools.partial(_measured, functools.partial(_loss, loss_fn), accumulate)

    # The base is a separate argument, since jit donates whole arguments, and the base's buffers
    # have to outlive the step. It is no constant of the closure either: jit would copy it into the
    # program.
    @functools.partial(jax.jit, donate_argnums=0)
    def update(
        state: TrainState,
        base: Tree,
        batch: Batch,
        active: Bool[Array, " states"] | None = None,
        only: Int[Array, " some"] | None = None,
    ) -> tuple[TrainState, Metrics]:
        several, whole = isinstance(state.tx, Optimizers), state
        if only is not None:
            state = taken(whole, only)
        each = vmap(measured, (0, None, 0)) if several else measured
        # The optimisers' states are stacked by optimiser and not by training, so vmap cannot take
        # them with the rest of the state.
        with on_mesh(state.mesh), mapping() if several else contextlib.nullcontext():
            changed, grads, metrics = each(replace(state, opt_state=None), base, batch)
        state = _updated(state, changed, grads, metrics, active)
        state = _laid_out(state if only is None else put_back(whole, state, only))
        return state, {**metrics, "finite": metrics["finite"].astype(jnp.float32)}

    began = False

    def step(
        state: TrainState,
        batch: Batch,
        active: Bool[Array, " states"] | None = None,
        only: Sequence[int] | Int[Array, " some"] | None = None,
    ) -> tuple[TrainState, Metrics]:
        nonlocal began
        check_state("make_train_step", state)
        only = check_step(state, batch, active, only)
        updated, metrics = update(replace(state, base=None), state.base, batch, active, only)
        # Reading a metric waits for the device, which later steps should not do.
        if not began and not isinstance(metrics["grad_norm"], jax.core.Tracer):
            began = True
            _check_gradient(metrics)
        return replace(updated, base=state.base), metrics

    step.jitted = update  # type: ignore[attr-defined]
    return step


def _loss(
    loss_fn: LossFn, adapters: Tree, base: Tree, state: TrainState, other: Any, batch: Any, key: Any
) -> tuple[Array, tuple[Metrics, Any]]:
    """The loss of what trains; beside it the metrics, and what the loss function changed."""
    whole = _subject(replace(state, adapters=adapters, base=base, other=other))
    with _explained(state):
        result = loss_fn(whole, batch, key)
    loss, metrics, updated = _results(result)
    _check_metrics(metrics, state)
    if state.graphdef is None:
        return loss, (metrics, _with_collections(other, updated))
    if updated is not None:
        raise UserError(
            "make_train_step: the loss function returns three values for an NNX model, whose "
            "statistics the step takes from the model itself; return (loss, metrics)"
        )
    return loss, (metrics, _after(whole, other))


def _gradient(
    loss: Callable[..., Any], state: TrainState, base: Tree, changed: Any, batch: Any, key: Any
) -> tuple[Any, tuple[Tree, Metrics]]:
    """What a batch changes besides parameters; its gradients and metrics."""
    other, scale = changed
    arguments = (state.adapters, base, state, other, batch, key)
    if scale is None:
        (loss_value, (metrics, other)), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
    else:
        # flax's DynamicScale unscales in float32. Its own flag leaves out the loss, so that the
        # step computes one itself.
        gradient = scale.value_and_grad(loss, has_aux=True)
        scale, _, (loss_value, (metrics, other)), grads = gradient(*arguments)
    return (other, scale), (grads, {**metrics, "loss": loss_value})


def _measured(
    loss: Callable[..., Any], accumulate: int, state: TrainState, base: Tree, batch: Batch
) -> tuple[Any, Tree, Metrics]:
    """What the loss leaves behind, the gradients and the metrics."""
    one = functools.partial(_gradient, loss, state, base)
    # The number of the step is folded in, rather than the key split and carried on, so that a run
    # that goes on from a checkpoint draws what it would have drawn.
    key, changed = jax.random.fold_in(state.key, state.step), (state.other, state.loss_scale)
    if accumulate == 1:
        changed, (grads, metrics) = one(changed, batch, key)
    else:
        parts = jax.tree.map(functools.partial(_split, accumulate), batch)
        # A scan, since the memory of one part is the point: XLA may interleave unrolled parts.
        changed, stacked = jax.lax.scan(
            lambda changed, part: one(changed, *part),
            changed,
            (parts, jax.random.split(key, accumulate)),
        )
        grads, metrics = jax.tree.map(lambda x: x.mean(0), stacked)
    norm = optax.tree.norm(grads)
    # A norm of squares is not finite if any gradient is not, so one number tells of all leaves.
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    metrics = {**metrics, "grad_norm": norm, "finite": finite}
    if state.loss_scale is not None:
        metrics["loss_scale"] = jnp.asarray(state.loss_scale.scale)
    return changed, grads, metrics


def _updated(
    state: TrainState, changed: Any, grads: Tree, metrics: Metrics, active: Array | None
) -> TrainState:
    """The state after a step: its number and loss scale alone where something is not finite."""
    (other, scale), finite = changed, metrics["finite"]

    def after() -> tuple[Any, ...]:
        # Some optimisers ask for the loss; others would not take it.
        several = isinstance(state.tx, Optimizers)
        tx: Any = state.tx if several else optax.with_extra_args_support(state.tx)
        given = grads, state.opt_state, state.adapters
        try:
            updates, opt_state = tx.update(*given, value=metrics["loss"])
        except TypeError as error:
            if "required keyword-only argument" not in str(error):
                raise
            raise UserError(
                "make_train_step: a step gives tx the gradients, its state, what trains and "
                f"value=, the loss, and tx asks for more: {error}; give another optimiser"
            ) from error
        return optax.apply_updates(state.adapters, updates), opt_state, other

    before = state.adapters, state.opt_state, state.other
    if isinstance(state.tx, Optimizers):
        # Under a vmap both branches of a cond run in any case.
        takes = finite if active is None else finite & active
        adapters, opt_state, other = state.tx.chosen(takes, after(), before)
    else:
        adapters, opt_state, other = jax.lax.cond(finite, after, lambda: before)
    if active is not None:
        scale = picked(active, scale, state.loss_scale)
    made = 1 if active is None else active.astype(jnp.int32)
    return replace(
        state,
        step=state.step + made,
        adapters=adapters,
        opt_state=opt_state,
        other=other,
        loss_scale=scale,
    )


def _check_function(caller: str, function: Any, arguments: tuple[str, ...]) -> None:
    """Raises UserError for an adapted model, and for what does not take the arguments."""
    expected = f"f({', '.join(arguments)}), in NNX f({', '.join(('model', *arguments[1:]))})"
    if isinstance(function, Adapted) or not callable(function):
        raise UserError(f"{caller}: got {type(function).__name__}, expected a function {expected}")
    try:
        # A call would fail as well, but inside of a trace and far from the line to correct.
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{caller}: {_name(function)} cannot be called as {expected}: {error}"
        ) from error
    except ValueError:  # a compiled function, which has no signature
        return


def _name(function: Any) -> str:
    """A function as a message calls it: a module by its class."""
    # The repr of a module lists all of its parts.
    is_module = isinstance(function, nn.Module | nnx.Module)
    return f"the module {type(function).__name__}" if is_module else "the function"


@contextlib.contextmanager
def _explained(state: TrainState) -> Iterator[None]:
    """Says of an error about variables in a loss function what the function was given."""
    try:
        yield
    except (ScopeCollectionNotFound, ApplyScopeInvalidVariablesStructureError) as error:
        if state.graphdef is not None:
            raise
        if state.other is None:
            given = "params alone, since TrainState.create got no collections"
        else:
            names = ", ".join(sorted(("params", *state.other)))
            given = f"variables with the collections {names}, for model.apply(variables, ...)"
        raise UserError(
            f"make_train_step: the loss function got {given}, and flax says: {error}; a model with "
            "batch norm, or other variables, needs TrainState.create(..., collections="
            '{"batch_stats": variables["batch_stats"]}) and model.apply(variables, ...), one '
            "without them model.apply({'params': params}, ...)"
        ) from error
    except TraceContextError as error:
        use = "draw from its third argument, the key"
        if state.graphdef is not None:
            use = f"call its first argument, which is the model, or {use}"
        raise UserError(
            f"make_train_step: the loss function uses a model or random streams from outside of "
            f"it, and flax says: {error}; {use}"
        ) from error


def _check_gradient(metrics: Metrics) -> None:
    """Warns where nothing can be learnt; it waits for the first step of a function alone."""
    if (np.asarray(metrics["grad_norm"]) == 0.0).any():
        warn(
            "make_train_step: the first gradient is exactly zero: the loss does not depend on what "
            "trains, or nothing in the batch has a loss; does the loss function use its first "
            "argument?"
        )


def _laid_out(state: TrainState) -> TrainState:
    """A state whose leaves keep the shardings of its layout, so that nothing is compiled again."""
    if state.layout is None:
        return state
    leaves, structure = jax.tree.flatten(state.checkpointed)
    # Without it XLA chooses a layout for each output, and the next step, whose input has another
    # one than the first had, is compiled again.
    kept = map(jax.lax.with_sharding_constraint, leaves, state.layout)
    return replace(state, **jax.tree.unflatten(structure, kept))


def _subject(state: TrainState) -> Any:
    """What a function of the user gets: a model, variables if there are collections, or params."""
    if state.graphdef is not None:
        return state.model
    return state.params if state.other is None else state.variables


def _after(model: nnx.Module, other: Any) -> Any:
    """An NNX model's state that is not parameters after a loss; what it sowed is dropped."""
    # What a model sows was not in the state that came in; with it the state would have another
    # structure after each step, and every step would be compiled anew.
    state = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate)))
    return nnx.merge_state(state, nnx.filter_state(other, nnx.Intermediate))


def _results(result: Any) -> tuple[Array, Metrics, Any]:
    """The loss, the metrics and the collections that a loss function returned."""
    values: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
    defaults: tuple[Any, ...] = (None, {}, None)
    loss, metrics, updated = (*values, *defaults[len(values) :])[:3] if values else defaults
    problem = ""
    if not 0 < len(values) < 4:
        problem = f"{len(values)} values, expected the loss, (loss, metrics) or (loss, metrics, "
        problem += "collections)"
    elif not isinstance(metrics, Mapping):
        problem = f"a {type(metrics).__name__} as metrics, expected a dictionary; return loss, "
        problem += '{"accuracy": accuracy}'
    elif not isinstance(loss, jax.Array | np.ndarray | np.generic | float | int):
        problem = f"a {type(loss).__name__}, expected a float scalar, or (loss, metrics)"
    elif jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        problem = f"{jnp.result_type(loss)} of shape {jnp.shape(loss)}, expected a float scalar; "
        problem += "take the mean"
    if problem:
        raise UserError(f"make_train_step: the loss function returns {problem}")
    return loss, dict(metrics), updated


def _check_metrics(metrics: Metrics, state: TrainState) -> None:
    """Raises UserError for metrics with names of the step's own, and for collections among them."""
    taken = sorted(_OWN_METRICS & set(metrics))
    if taken:
        raise UserError(
            f"make_train_step: the loss function returns metrics named {', '.join(taken)}, "
            "which the step reports itself; give them other names"
        )
    names = state.other or {} if state.graphdef is None else {}
    misplaced = [name for name, x in metrics.items() if name in names and isinstance(x, Mapping)]
    if misplaced:
        raise UserError(
            f"make_train_step: the loss function returns the collections {', '.join(misplaced)} as "
            "metrics, so that the state would not have them; return loss, {}, updated"
        )


def _with_collections(other: Any, updated: Any) -> Any:
    """A linen state's collections with those that a loss function returned.

    Raises:
        UserError: the state does not have one of them.
        MismatchError: its arrays have other paths, shapes or dtypes, so no step could follow.
    """
    changed = checked_collections("make_train_step", updated) or {}
    unknown = sorted(changed.keys() - (other or {}).keys())
    if unknown:
        raise UserError(
            f"make_train_step: the loss function returns the collections {', '.join(unknown)}, and "
            f"the state has {', '.join(other or {}) or 'none'}; give them to "
            "TrainState.create(..., collections=...), or do not return them"
        )
    given, leaves = {name: other[name] for name in changed}, leaves_by_path(changed)
    compare_trees(
        # A changed dtype or shape would compile every second step anew, and could not be chosen
        # beside the old one under `cond`.
        "make_train_step: what the loss function returns as collections",
        leaves,
        leaves_by_path(given),
        "Return each as apply(..., mutable=[...]) gives it, in the dtypes of the state.",
        dtypes=True,
    )
    return {**other, **with_leaves(given, leaves)} if given else other


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
        fn: `fn(params, batch)` in linen, `fn(variables, batch)` if the state has collections,
            `fn(model, batch)` in NNX. An NNX model comes in evaluation mode (`model.eval()`), so
            that dropout is off and statistics are used; to a linen model, `fn` passes arguments
            such as `deterministic=True` or `use_running_average=True`.

    Returns:
        `evaluate(state, batch)`, which returns what `fn` returns. The state is not changed.
        Each new shape of a batch compiles it anew.

    Raises:
        UserError: `fn` is not a function of two arguments; or the state is not a `TrainState`, or a
            step took it over.

    Example:
        >>> import adapters_jax as aj, jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> base = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0))
        >>> state = TrainState.create(model, tx=optax.sgd(0.5), key=jax.random.key(0))
        >>> evaluate = make_eval_step(lambda model, batch: model(batch)[:, 0])
        >>> evaluate(state, jnp.zeros((4, 2))).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    _check_function("make_eval_step", fn, ("params", "batch"))

    @jax.jit
    def run(state: TrainState, batch: Batch) -> Any:
        subject = _subject(state)
        if state.graphdef is not None:
            # It sets flags of this copy, which `nnx.merge` made; the state keeps its own.
            subject.eval()
        with on_mesh(state.mesh):
            return fn(subject, batch)

    def evaluate(state: TrainState, batch: Batch) -> Any:
        check_state("make_eval_step", state)
        return run(state, batch)

    evaluate.jitted = run  # type: ignore[attr-defined]
    return evaluate
