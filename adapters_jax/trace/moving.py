"""How axes, columns and softmaxes are followed through what moves numbers or copies them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from adapters_jax.trace import parts
from adapters_jax.trace.activations import Operation, Result, Rule, Seen, together
from adapters_jax.trace.parts import Axis, Part
from adapters_jax.trace.primitives import COPIES, origin_of_axes


def _layout(axes_of: Callable[[Seen, Operation], Sequence[Axis]]) -> Rule:
    """The rule of an operation that moves the numbers of one activation."""

    def rule(op: Operation) -> Result:
        seen = op.known[0]
        return None if seen is None else [replace(seen, axes=tuple(axes_of(seen, op)))]

    return rule


def kept_axes(seen: Seen, op: Operation) -> Sequence[Axis]:
    """The axes of a result that has those of an activation, moved, gone or repeated."""
    (shape,) = op.shapes
    axes = list(parts.rows(shape))
    for i, old in enumerate(origin_of_axes(op.name, op.params, len(seen.axes), shape)):
        if old is not None and parts.size_of(seen.axes[old]) == shape[i]:
            axes[i] = seen.axes[old]
    return axes


def _tile(seen: Seen, op: Operation) -> Sequence[Axis]:
    return [
        axis if n == 1 else (Part(n), *axis)
        for axis, n in zip(seen.axes, op.params["reps"], strict=True)
    ]


def _slice(op: Operation) -> Result:
    steps = op.params["strides"] or (1,) * len(op.shapes[0])
    return [_cut(op.known[0], op.params["start_indices"], op.shapes[0], steps)]


def _split(op: Operation) -> Result:
    axis, at, found = op.params["axis"], 0, []
    for shape in op.shapes:
        found.append(_cut(op.known[0], [at * (i == axis) for i in range(len(shape))], shape))
        at += shape[axis]
    return found


def _unstack(op: Operation) -> Result:
    axis, found = op.params["axis"], []
    for number, shape in enumerate(op.shapes):
        one = (*shape[:axis], 1, *shape[axis:])
        seen = _cut(op.known[0], [number * (i == axis) for i in range(len(one))], one)
        found.append(replace(seen, axes=(*seen.axes[:axis], *seen.axes[axis + 1 :])))
    return found


def _dynamic_slice(op: Operation) -> Result:
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


def _concatenate(op: Operation) -> Result:
    """Parts of a head, some of them rotated; rows after those of a cache."""
    axis, pieces = op.params["dimension"], [seen for seen in op.known if seen and seen.columns]
    if not pieces:
        return None
    columns, size = together([seen.columns for seen in pieces]), op.shapes[0][axis]
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
    """The stride of the columns in pieces that are joined; 0 if the columns have gaps."""
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


def _stack(op: Operation) -> Result:
    """The numbers of rotated pairs, beside one another."""
    if not all(seen and seen.columns for seen in op.known):
        return None
    pieces = [seen for seen in op.known if seen]
    axis, axes = op.params["axis"], pieces[0].axes
    columns = together([seen.columns for seen in pieces])
    return [Seen(None, (*axes[:axis], (Part(len(pieces)),), *axes[axis:]), columns)]


def _write(new: int) -> Rule:
    """The rule of an operation that writes rows, its input at a position, into a cache."""

    def rule(op: Operation) -> Result:
        seen = op.known[new]
        if seen is None or seen.columns is None or len(seen.axes) != len(op.shapes[0]):
            return None
        axes = [
            old if parts.of(old, seen.columns.projection) else row
            for old, row in zip(seen.axes, parts.rows(op.shapes[0]), strict=True)
        ]
        return [Seen(None, tuple(axes), seen.columns)]

    return rule


MOVING: dict[str, Rule] = {
    **dict.fromkeys((*COPIES, "broadcast_in_dim", "squeeze", "transpose"), _layout(kept_axes)),
    "reshape": _layout(lambda seen, op: parts.regrouped(seen.axes, op.shapes[0])),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "stack": _stack,
    "tile": _layout(_tile),
    "unstack": _unstack,
    "concatenate": _concatenate,
    "dynamic_update_slice": _write(1),
    "scatter": _write(2),
}
