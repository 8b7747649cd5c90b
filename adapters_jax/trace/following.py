"""How columns, scores and softmaxes are followed through what is computed; see `watch`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.trace import parts
from adapters_jax.trace.activations import (
    Columns,
    Operation,
    Projection,
    Result,
    Rule,
    Scores,
    Seen,
    Softmax,
    Step,
    together,
)
from adapters_jax.trace.moving import MOVING, kept_axes
from adapters_jax.trace.parts import Axis, Part
from adapters_jax.trace.primitives import PRODUCTS
from adapters_jax.trace.program import Graph

_EXPONENTIALS = ("exp", "exp2", "logistic")
_SUMS = ("add", "add_any", "sub")  # "add_any" is what gradients are summed by
_HALVES = ("real", "imag")  # of the complex numbers by which pairs are rotated


def _select(op: Operation) -> Result:
    """Masked numbers; what the others are does not matter."""
    cases = [seen for seen in op.known[1:] if seen]
    scores = [seen for seen in cases if seen.softmax]
    if scores:
        state: Any = scores[0].softmax
        axes = _shared(scores, op.shapes[0])
        state = state if state.stage == "weights" else _masked(state)
        states: list[Any] = [s.softmax for s in scores]
        if any((s.scores, s.steps) != (state.scores, state.steps) for s in states):
            state = replace(state, lost="are chosen from several ones")
        return [Seen(None, axes, None, state)]
    made = [seen for seen in cases if seen.columns]
    if not made:
        return None
    columns = together([seen.columns for seen in made])
    return [Seen(None, _shared(made, op.shapes[0]), columns)]


def _masked(state: Softmax) -> Softmax:
    """A softmax whose logits change. They are hidden if they were shifted, as by their maximum."""
    return replace(state, logits=state.logits and replace(state.logits, value=None))


def _shared(several: Sequence[Seen], shape: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of what is computed from activations number by number; size 1 is repeated."""
    axes = list(parts.rows(shape))
    for seen in several:
        for i, axis in enumerate(seen.axes):
            fits = parts.size_of(axis) == shape[i]
            if fits and parts.has_source(axis) and not parts.has_source(axes[i]):
                axes[i] = axis
    return tuple(axes)


def _each(op: Operation) -> Result:
    """An operation on numbers one by one."""
    active = [seen for seen in op.known if seen]
    if any(seen.softmax for seen in active):
        return [_each_score(op, [seen for seen in active if seen.softmax], len(active))]
    made = [seen for seen in active if seen.columns]
    if not made:
        return None
    columns, axes = together([seen.columns for seen in made]), _shared(made, op.shapes[0])
    if len(active) == 1 and op.name not in _HALVES:
        step = _step(op)
        if step is not None:
            columns = replace(columns, steps=(*columns.steps, step))
        elif op.name in _SUMS:
            columns = _biased(op, columns, axes)
    elif len(made) == 1 and op.name in _SUMS:
        columns = replace(columns, lost="have something else added")
    elif len(made) > 1 and op.name not in (*_SUMS, "complex"):
        columns = replace(columns, lost=f"are computed from one another by {op.name}")
    return [Seen(None, axes, columns)]


def _step(op: Operation) -> Step | None:
    """What an operation does to every number of its only activation; None if that differs."""
    if op.name == "neg":
        return jnp.negative
    where = next(i for i, seen in enumerate(op.known) if seen)
    others = [x for i, x in enumerate(op.values) if i != where]
    if any(len(op.repeats(x)) < jnp.ndim(x) for x in others):
        return None
    if op.watch is None or any(isinstance(x, jax.core.ShapedArray) for x in others):
        return None  # read, not computed
    with jex.set_current_trace(op.watch.parent):
        numbers = [jnp.asarray(x)[(0,) * jnp.ndim(x)] for x in others]

    def step(x: Array) -> Array:
        args = [jnp.broadcast_to(n.astype(x.dtype), x.shape) for n in numbers]
        args.insert(where, x)
        return op.primitive.bind(*args, **op.params)

    return step


def _biased(op: Operation, columns: Columns, axes: Sequence[Axis]) -> Columns:
    """The columns plus a bias, if it is one number for each column; else they are lost."""
    bias = next(x for x, seen in zip(op.values, op.known, strict=True) if seen is None)
    own = [i for i, axis in enumerate(axes) if parts.of(axis, columns.projection)]
    found = [axes[i][0] for i in own]
    ordered = [part.stride for part in found] == [
        math.prod(part.size for part in found[i + 1 :]) for i in range(len(found))
    ]
    every = math.prod(part.size for part in found) == columns.projection.columns
    alone = set(range(len(axes))) - op.repeats(bias) <= set(own)
    plain = op.name != "sub" and columns.bias is None and not columns.steps and not columns.lost
    if not (ordered and every and alone and plain and jnp.ndim(bias) == len(axes)):
        return replace(columns, lost="have something else added")
    if isinstance(bias, jax.core.ShapedArray):
        return replace(columns, lost="are computed in a function with a custom derivative")
    with jex.set_current_trace(op.watch.parent):
        at = tuple(slice(None) if i in own else 0 for i in range(len(axes)))
        row = jnp.broadcast_to(jnp.asarray(bias)[at], [part.size for part in found]).reshape(-1)
    return replace(columns, bias=row)


def _each_score(op: Operation, scores: Sequence[Seen], active: int) -> Seen:
    """An operation on scores one by one, on the way to the softmax or in it."""
    seen = next((s for s in scores if s.softmax and not s.softmax.statistic), scores[0])
    state: Any = seen.softmax
    others: list[Any] = [s.softmax for s in scores]
    others.remove(state)
    beside = [other for other in others if other.statistic]
    if state.statistic and op.name in _SUMS:
        state = replace(state, lost="are divided by more than their sum")
    elif any(s.scores is not state.scores for s in others):
        state = replace(state, lost="are computed from several products")
    elif len(beside) < len(others):
        state = replace(state, lost="are computed from one another")
    elif state.stage == "weights" and beside:
        state = replace(state, logits=None)  # normalised again
    elif state.statistic or state.stage == "weights":
        pass
    elif state.stage == "exponentials":
        if beside and op.name in ("div", "mul"):
            logits = None if beside[0].lost else state.logits
            state = replace(state, stage="weights", logits=logits, over=beside[0].over)
        else:
            state = replace(state, logits=None)
    elif op.name == "exp":
        logits = state.logits or seen
        state = replace(state, stage="exponentials", logits=logits)
    elif op.name == "sub" and seen is not op.known[0]:
        state = replace(state, lost="are subtracted from others")
    elif op.name == "sub" and beside:
        state = replace(state, logits=state.logits or seen)
    elif op.name in _SUMS:
        state = _masked(state)  # a mask, or a bias of positions
    else:
        step = _step(op) if active == 1 else None
        lost = state.lost if step else f"are changed by {op.name}, each by another number"
        steps = (*state.steps, step) if step else state.steps
        state = replace(state, steps=steps, lost=lost, logits=None)
    return Seen(None, _shared(scores, op.shapes[0]), None, state)


def _reduce(op: Operation) -> Result:
    """Maxima and sums of scores. Those of columns, as norms have, only scale them."""
    seen = op.known[0]
    if seen is None or seen.softmax is None:
        return None
    over = frozenset(part for i in op.params["axes"] for part in seen.axes[i])
    state = replace(seen.softmax, statistic=True, over=over)
    return [Seen(None, tuple(kept_axes(seen, op)), None, state)]


def _product(op: Operation) -> Result:
    """A projection, or the first product of an attention."""
    left, right = op.known
    if left and right and not op.params["dimension_numbers"][0][0]:
        return _weighted(left, right, op)
    if left and right:
        return [_scores(left, right, op)]
    side = 0 if left is None else 1  # of the weight
    (contracted, batch) = (axes[side] for axes in op.params["dimension_numbers"])
    x, weight = op.known[1 - side], op.values[side]
    if batch or x is None or x.softmax:
        return None
    shape = jnp.shape(weight)
    kept = [n for i, n in enumerate(shape) if i not in contracted]
    width = math.prod(shape[i] for i in contracted)
    projector = _projector(weight, contracted, op.params)
    projection = Projection(width, math.prod(kept), projector, op.values[1 - side])
    own = [(Part(n, projection, 0, math.prod(kept[i + 1 :])),) for i, n in enumerate(kept)]
    rows = parts.rows(op.shapes[0])
    n = len(rows) - len(kept)
    axes = (*rows[:n], *own) if side else (*own, *rows[len(kept) :])
    return [Seen(None, axes, Columns(projection))]


def _weighted(left: Seen, right: Seen, op: Operation) -> Result:
    """A product that sums over nothing, as of a softmax and one number for each head."""
    _, batch = op.params["dimension_numbers"]
    side = 0 if left.softmax else 1
    seen, other = (left, right)[side], (left, right)[1 - side]
    if seen.softmax is None or other.softmax or len(other.axes) > len(batch[0]):
        return None
    rest = [i for i in range(len(seen.axes)) if i not in batch[side]]
    state = seen.softmax
    if state.stage == "logits":
        state = replace(state, lost="are multiplied, each by another number", logits=None)
    return [Seen(None, tuple(seen.axes[i] for i in (*batch[side], *rest)), None, state)]


def _projector(weight: Any, contracted: Sequence[int], params: Any) -> Step:
    """`project` of a `Projection`."""
    sizes = [jnp.shape(weight)[i] for i in contracted]

    def project(x: Array) -> Array:
        split = x.reshape(len(x), *sizes)
        numbers = ((tuple(range(1, split.ndim)), tuple(contracted)), ((), ()))
        y = jax.lax.dot_general(split, weight, numbers, precision=params["precision"])
        return y.reshape(len(x), -1)

    return project


def _scores(left: Seen, right: Seen, op: Operation) -> Seen:
    """A product of two activations, which may be the first one of an attention."""
    (summed, batch), shape = op.params["dimension_numbers"], op.shapes[0]
    axes: list[tuple[int | None, int | None]] = list(zip(*batch, strict=True))
    axes += [(i, None) for i in range(len(left.axes)) if i not in (*summed[0], *batch[0])]
    axes += [(None, i) for i in range(len(right.axes)) if i not in (*summed[1], *batch[1])]
    over = next(zip(*summed, strict=True), (0, 0))
    scores = Scores((left, right), tuple(axes), over, tuple(shape))
    new = tuple((Part(n, scores, i),) for i, n in enumerate(shape))
    past = any(s.softmax and s.softmax.stage != "logits" for s in (left, right))
    state = None if past or len(summed[0]) != 1 else Softmax(scores)
    return Seen(None, new, None, state, {scores: False})


# Functions of one or two numbers; of complex ones, those by which rotary embeddings are computed.
_NUMBERS = (
    "abs", "add", "add_any", "clamp", "complex", "conj", "cos", "div", "erf", "exp", "exp2", "imag",
    "integer_pow", "log", "logistic", "max", "min", "mul", "neg", "pow", "real", "rsqrt", "sin",
    "sqrt", "square", "sub", "tanh",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **MOVING,
    **dict.fromkeys(_NUMBERS, _each),
    **dict.fromkeys(("reduce_max", "reduce_sum"), _reduce),
    "select_n": _select,
    "dot_general": _product,
}


def facts_of(op: Operation) -> list[Seen]:
    """What is known of the results of an operation, some of whose inputs are activations."""
    if not op.shapes:
        return []
    rule, first = RULES.get(op.name), next(seen for seen in op.known if seen)
    found = rule and rule(op)
    if not found:
        same = lambda shape: tuple(map(parts.size_of, first.axes)) == tuple(shape)  # noqa: E731
        found = [Seen(None, first.axes if same(n) else parts.rows(n)) for n in op.shapes]
    if op.name in PRODUCTS and None in op.known[:2]:
        return found  # a projection is made of nothing before it
    made = dict(found[0].made)
    begins = op.name == "dot_general" and bool(made)  # a further product of two activations
    for seen in op.known:
        for scores, past in seen.made.items() if seen else ():
            if past or not begins:
                made[scores] = made.get(scores, False) or past or op.name in _EXPONENTIALS
    return [replace(seen, made=made) for seen in found] if made else found


def read(graph: Graph, number: int, known: dict[int, Seen], watch: Any = None) -> None:
    """Notes what is known of the results of an operation of a graph, without computing them.

    Args:
        known: what is known of its values so far.
        watch: the trace that sees it, if there is one.
    """
    each = graph.operations[number]
    inputs = [known.get(x) for x in each.inputs]
    if not any(inputs):
        return
    values = [graph.literals.get(x, graph.avals[x]) for x in each.inputs]
    shapes = [graph.shape(x) for x in each.outputs]
    op = Operation(each.name, each.primitive, values, inputs, each.params, shapes, watch)
    for output, seen in zip(each.outputs, facts_of(op), strict=True):
        # A watch would take a number for an array.
        known[output] = seen if watch else replace(seen, value=output)
