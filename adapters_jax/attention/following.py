"""How columns, scores and softmaxes are followed through each operation; see `watch`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.attention import parts
from adapters_jax.attention.activations import Columns, Projection, Scores, Seen, Softmax, Step
from adapters_jax.attention.parts import Axis, Part
from adapters_jax.attention.watch import RULES, Operation, Rule, Watch

Found = list[Seen] | None
_SUMS = ("add", "add_any", "sub")
_HALVES = ("real", "imag")  # of the complex numbers by which pairs are rotated


def _layout(axes_of: Callable[[Seen, Operation], Sequence[Axis]]) -> Rule:
    """The rule of an operation that moves the numbers of one activation."""

    def rule(watch: Watch, op: Operation) -> Found:
        seen = op.known[0]
        return None if seen is None else [replace(seen, axes=tuple(axes_of(seen, op)))]

    return rule


def _broadcast(seen: Seen, op: Operation) -> Sequence[Axis]:
    axes = list(parts.rows(op.shapes[0]))
    for old, new in zip(seen.axes, op.params["broadcast_dimensions"], strict=True):
        if parts.size_of(old) == op.shapes[0][new]:
            axes[new] = old
    return axes


def _tile(seen: Seen, op: Operation) -> Sequence[Axis]:
    return [
        axis if n == 1 else (Part(n), *axis)
        for axis, n in zip(seen.axes, op.params["reps"], strict=True)
    ]


def _squeeze(seen: Seen, op: Operation) -> Sequence[Axis]:
    gone = {i % len(seen.axes) for i in op.params["dimensions"]}
    return [axis for i, axis in enumerate(seen.axes) if i not in gone]


def _slice(watch: Watch, op: Operation) -> Found:
    steps = op.params["strides"] or (1,) * len(op.shapes[0])
    return [_cut(op.known[0], op.params["start_indices"], op.shapes[0], steps)]


def _split(watch: Watch, op: Operation) -> Found:
    axis, at, found = op.params["axis"], 0, []
    for shape in op.shapes:
        found.append(_cut(op.known[0], [at * (i == axis) for i in range(len(shape))], shape))
        at += shape[axis]
    return found


def _unstack(watch: Watch, op: Operation) -> Found:
    axis, found = op.params["axis"], []
    for number, shape in enumerate(op.shapes):
        one = (*shape[:axis], 1, *shape[axis:])
        seen = _cut(op.known[0], [number * (i == axis) for i in range(len(one))], one)
        found.append(replace(seen, axes=(*seen.axes[:axis], *seen.axes[axis + 1 :])))
    return found


def _dynamic_slice(watch: Watch, op: Operation) -> Found:
    if op.known[0] is None:
        return None
    whole = [n == m for n, m in zip(jnp.shape(op.values[0]), op.shapes[0], strict=True)]
    starts = [0 if w else _integer(x) for w, x in zip(whole, op.values[1:], strict=True)]
    return [_cut(op.known[0], starts, op.shapes[0])]


def _integer(x: Any) -> int | None:
    return None if isinstance(x, jax.core.Tracer | jax.core.ShapedArray) else int(x)


def _cut(
    seen: Any, starts: Sequence[int | None], shape: Sequence[int], steps: Sequence[int] = ()
) -> Seen:
    """A slice of an activation; a start of None is not known."""
    axes, columns, softmax = [], seen.columns, seen.softmax
    steps = steps or (1,) * len(shape)
    for old, start, size, step in zip(seen.axes, starts, shape, steps, strict=True):
        whole = (parts.size_of(old), step) == (size, 1)
        axes.append(old if whole else parts.resized(old, size, step))
        if whole:
            continue
        if softmax and parts.has_source(old):
            softmax = replace(softmax, lost="are cut")
        if columns and parts.of(old, columns.projection):
            if start is None or len(old) > 1:
                columns = replace(columns, lost="are cut at positions that are not known")
            else:
                by = start * old[0].stride
                columns = replace(columns, low=columns.low + by, high=columns.high + by)
    return Seen(None, tuple(axes), columns, softmax)


def _concatenate(watch: Watch, op: Operation) -> Found:
    """Parts of a head, some of them rotated; rows after those of a cache."""
    axis, pieces = op.params["dimension"], [seen for seen in op.known if seen and seen.columns]
    if not pieces:
        return None
    columns, size = _together([seen.columns for seen in pieces]), op.shapes[0][axis]
    own = [parts.of(seen.axes[axis], columns.projection) for seen in pieces]
    joined = parts.rows(op.shapes[0])[axis]
    if any(own):
        stride = _stride(pieces, axis, size) if len(pieces) == len(op.known) else 0
        if not stride:
            columns = replace(columns, lost="are joined with others")
        else:
            moved = max(columns.moved, _moved(pieces, axis, stride))
            columns = replace(columns, high=columns.low, moved=moved)
        first = next(found[0] for found in own if found)
        joined = (replace(first, size=size, stride=stride or 1),)
    axes = (*pieces[0].axes[:axis], joined, *pieces[0].axes[axis + 1 :])
    return [Seen(None, axes, columns)]


def _stride(pieces: Sequence[Any], axis: int, size: int) -> int:
    """The stride of the columns of which pieces are made that are joined; 0 if they have gaps."""
    if any(len(seen.axes[axis]) != 1 for seen in pieces):
        return 0
    each = [(seen.axes[axis][0], seen.columns) for seen in pieces]
    begin = min(columns.low for _, columns in each)
    end = max(columns.high + (part.size - 1) * part.stride for part, columns in each)
    stride = each[0][0].stride
    alike = all(part.stride == stride for part, _ in each)
    # One after the other, as halves are, or every second column in each.
    fitting = [n for n in (stride, stride // len(each)) if n and begin + (size - 1) * n == end]
    return fitting[0] if alike and fitting else 0


def _moved(pieces: Sequence[Any], axis: int, stride: int) -> int:
    """How far columns are from where they would be if those of the pieces followed one another."""
    begin, furthest = min(seen.columns.low for seen in pieces), 0
    expected = begin
    for seen in pieces:
        part, columns = seen.axes[axis][0], seen.columns
        for i in (0, part.size - 1):
            at, by = expected + i * stride, i * part.stride
            furthest = max(furthest, columns.low + by - at, at - columns.high - by)
        expected += part.size * stride
    return furthest


def _stack(watch: Watch, op: Operation) -> Found:
    """The numbers of rotated pairs, beside one another."""
    if not all(seen and seen.columns for seen in op.known):
        return None
    pieces = [seen for seen in op.known if seen]
    axis, axes = op.params["axis"], pieces[0].axes
    columns = _together([seen.columns for seen in pieces])
    return [Seen(None, (*axes[:axis], (Part(len(pieces)),), *axes[axis:]), columns)]


def _together(several: Sequence[Any]) -> Columns:
    """The columns of numbers that are computed from several ones."""
    first, steps = several[0], several[0].steps
    for other in several[1:]:
        same = [a is b for a, b in zip(steps, other.steps, strict=False)]
        steps = steps[: [*same, False].index(False)]
    lost = next((columns.lost for columns in several if columns.lost), "")
    if any(step is not jnp.negative for c in several for step in c.steps[len(steps) :]):
        lost = "are computed from one another"  # not by the signs of a rotation
    if any(columns.projection is not first.projection for columns in several):
        lost = "are computed from several projections"
    if any(columns.bias is not first.bias for columns in several):
        lost = "have a bias in parts"
    low, high = min(c.low for c in several), max(c.high for c in several)
    moved = max(columns.moved for columns in several)
    return Columns(first.projection, low, high, moved, first.bias, steps, lost)


def _write(new: int) -> Rule:
    """The rule of an operation that writes rows, its input at a position, into a cache."""

    def rule(watch: Watch, op: Operation) -> Found:
        seen = op.known[new]
        if seen is None or seen.columns is None or len(seen.axes) != len(op.shapes[0]):
            return None
        axes = [
            old if parts.of(old, seen.columns.projection) else row
            for old, row in zip(seen.axes, parts.rows(op.shapes[0]), strict=True)
        ]
        return [Seen(None, tuple(axes), seen.columns)]

    return rule


def _select(watch: Watch, op: Operation) -> Found:
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
    columns = _together([seen.columns for seen in made])
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


def _each(watch: Watch, op: Operation) -> Found:
    """An operation on numbers one by one."""
    active = [seen for seen in op.known if seen]
    if any(seen.softmax for seen in active):
        return [_each_score(watch, op, [seen for seen in active if seen.softmax], len(active))]
    made = [seen for seen in active if seen.columns]
    if not made:
        return None
    columns, axes = _together([seen.columns for seen in made]), _shared(made, op.shapes[0])
    if len(active) == 1 and op.name not in _HALVES:
        step = _step(watch, op)
        if step is not None:
            columns = replace(columns, steps=(*columns.steps, step))
        elif op.name in _SUMS:
            columns = _biased(watch, op, columns, axes)
    elif len(made) == 1 and op.name in _SUMS:
        columns = replace(columns, lost="have something else added")
    elif len(made) > 1 and op.name not in (*_SUMS, "complex"):
        columns = replace(columns, lost=f"are computed from one another by {op.name}")
    return [Seen(None, axes, columns)]


def _step(watch: Watch, op: Operation) -> Step | None:
    """What an operation does to every number of its only activation; None if that differs."""
    if op.name == "neg":
        return jnp.negative
    where = next(i for i, seen in enumerate(op.known) if seen)
    others = [x for i, x in enumerate(op.values) if i != where]
    if any(len(watch.repeats(x)) < jnp.ndim(x) for x in others):
        return None
    if any(isinstance(x, jax.core.ShapedArray) for x in others):
        return None  # read, not computed
    with jex.set_current_trace(watch.parent):
        numbers = [jnp.asarray(x)[(0,) * jnp.ndim(x)] for x in others]

    def step(x: Array) -> Array:
        args = [jnp.broadcast_to(n.astype(x.dtype), x.shape) for n in numbers]
        args.insert(where, x)
        return op.primitive.bind(*args, **op.params)

    return step


def _biased(watch: Watch, op: Operation, columns: Columns, axes: Sequence[Axis]) -> Columns:
    """The columns plus a bias, if it is one number for each column; else they are lost."""
    bias = next(x for x, seen in zip(op.values, op.known, strict=True) if seen is None)
    own = [i for i, axis in enumerate(axes) if parts.of(axis, columns.projection)]
    found = [axes[i][0] for i in own]
    ordered = [part.stride for part in found] == [
        math.prod(part.size for part in found[i + 1 :]) for i in range(len(found))
    ]
    every = math.prod(part.size for part in found) == columns.projection.columns
    alone = set(range(len(axes))) - watch.repeats(bias) <= set(own)
    plain = op.name != "sub" and columns.bias is None and not columns.steps and not columns.lost
    if not (ordered and every and alone and plain and jnp.ndim(bias) == len(axes)):
        return replace(columns, lost="have something else added")
    if isinstance(bias, jax.core.ShapedArray):
        return replace(columns, lost="are computed in a function with a derivative of its own")
    with jex.set_current_trace(watch.parent):
        at = tuple(slice(None) if i in own else 0 for i in range(len(axes)))
        row = jnp.broadcast_to(jnp.asarray(bias)[at], [part.size for part in found]).reshape(-1)
    return replace(columns, bias=row)


def _each_score(watch: Watch, op: Operation, scores: Sequence[Seen], active: int) -> Seen:
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
        step = _step(watch, op) if active == 1 else None
        lost = state.lost if step else f"are changed by {op.name}, each by another number"
        steps = (*state.steps, step) if step else state.steps
        state = replace(state, steps=steps, lost=lost, logits=None)
    return Seen(None, _shared(scores, op.shapes[0]), None, state)


def _reduce(watch: Watch, op: Operation) -> Found:
    """Maxima and sums of scores. Those of columns, as norms have, only scale them."""
    seen = op.known[0]
    if seen is None or seen.softmax is None:
        return None
    gone = op.params["axes"]
    axes = tuple(axis for i, axis in enumerate(seen.axes) if i not in gone)
    over = frozenset(part for i in gone for part in seen.axes[i])
    return [Seen(None, axes, None, replace(seen.softmax, statistic=True, over=over))]


def _product(watch: Watch, op: Operation) -> Found:
    """A projection, or the first product of an attention."""
    left, right = op.known
    if left and right and not op.params["dimension_numbers"][0][0]:
        return _weighted(left, right, op)
    if left and right:
        past = any(s.softmax and s.softmax.stage != "logits" for s in (left, right))
        return None if past else _scores(left, right, op)
    side = 0 if left is None else 1  # of the weight
    (contracted, batch) = (axes[side] for axes in op.params["dimension_numbers"])
    x, weight = op.known[1 - side], op.values[side]
    if batch or x is None or x.softmax:
        return None
    shape = jnp.shape(weight)
    kept = [n for i, n in enumerate(shape) if i not in contracted]
    width = math.prod(shape[i] for i in contracted)
    projection = Projection(width, math.prod(kept), _projector(weight, contracted, op.params))
    own = [(Part(n, projection, 0, math.prod(kept[i + 1 :])),) for i, n in enumerate(kept)]
    rows = parts.rows(op.shapes[0])
    n = len(rows) - len(kept)
    axes = (*rows[:n], *own) if side else (*own, *rows[len(kept) :])
    return [Seen(None, axes, Columns(projection))]


def _weighted(left: Seen, right: Seen, op: Operation) -> Found:
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


def _scores(left: Seen, right: Seen, op: Operation) -> Found:
    """The first product of an attention."""
    (summed, batch), shape = op.params["dimension_numbers"], op.shapes[0]
    if len(summed[0]) != 1:
        return None
    axes: list[tuple[int | None, int | None]] = list(zip(*batch, strict=True))
    axes += [(i, None) for i in range(len(left.axes)) if i not in (*summed[0], *batch[0])]
    axes += [(None, i) for i in range(len(right.axes)) if i not in (*summed[1], *batch[1])]
    scores = Scores((left, right), tuple(axes), (summed[0][0], summed[1][0]), tuple(shape))
    new = tuple((Part(n, scores, i),) for i, n in enumerate(shape))
    return [Seen(None, new, None, Softmax(scores))]


def _same(seen: Seen, op: Operation) -> Sequence[Axis]:
    return seen.axes


# Functions of one or two numbers; of complex ones, those by which rotary embeddings are computed.
_NUMBERS = (
    "abs", "add", "add_any", "clamp", "complex", "conj", "cos", "div", "erf", "exp", "exp2", "imag",
    "integer_pow", "log", "logistic", "max", "min", "mul", "neg", "pow", "real", "rsqrt", "sin",
    "sqrt", "square", "sub", "tanh",
)  # fmt: skip
_COPIES = (
    "convert_element_type", "copy", "copy_p", "mesh_cast", "name", "pvary", "reduce_precision",
    "reshard", "sharding_constraint", "stop_gradient",
)  # fmt: skip
RULES.update(
    {
        **dict.fromkeys(_NUMBERS, _each),
        **dict.fromkeys(_COPIES, _layout(_same)),
        **dict.fromkeys(("reduce_max", "reduce_sum"), _reduce),
        "broadcast_in_dim": _layout(_broadcast),
        "reshape": _layout(lambda seen, op: parts.regrouped(seen.axes, op.shapes[0])),
        "squeeze": _layout(_squeeze),
        "transpose": _layout(lambda seen, op: [seen.axes[i] for i in op.params["permutation"]]),
        "slice": _slice,
        "dynamic_slice": _dynamic_slice,
        "split": _split,
        "stack": _stack,
        "tile": _layout(_tile),
        "unstack": _unstack,
        "concatenate": _concatenate,
        "dynamic_update_slice": _write(1),
        "scatter": _write(2),
        "select_n": _select,
        "dot_general": _product,
    }
)
