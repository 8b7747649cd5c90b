"""What the axes of an activation are made of, so that heads and positions are found again.

The columns of a projection `x W` become heads and their widths by a reshape, axes of queries and
keys become axes of the scores, and all of them are transposed, split, merged and sliced. Each axis
is followed as the parts that it is made of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Part:
    """A part of an axis: index i is at `i * stride` on an axis of its source.

    Attributes:
        size: how many indices there are.
        source: what it is an axis of; None for an axis of rows or a new one.
        axis: which axis of the source.
        stride: see above.
    """

    size: int
    source: Any = None
    axis: int = 0
    stride: int = 1


Axis = tuple[Part, ...]  # from the slowest to the fastest index; may be empty if its size is 1


def rows(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Axes with nothing known about them."""
    return tuple(() if n == 1 else (Part(n),) for n in shape)


def size_of(axis: Axis) -> int:
    """The size of an axis."""
    return math.prod(part.size for part in axis)


def of(axis: Axis, source: Any) -> list[Part]:
    """The parts of an axis that are of a source."""
    return [part for part in axis if part.source is source]


def has_source(axis: Axis) -> bool:
    """Whether something is known of an axis."""
    return any(part.source is not None for part in axis)


def regrouped(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """The axes after a reshape; `rows` where the new sizes cut through the old ones.

    Example:
        >>> x = object()
        >>> heads = regrouped([(Part(6),), (Part(20, x),)], (2, 3, 5, 4))
        >>> [[(part.size, part.stride) for part in axis] for axis in heads]
        [[(2, 3)], [(3, 1)], [(5, 4)], [(4, 1)]]
        >>> regrouped(heads, (6, 20))[1] == (Part(20, x),)
        True
    """
    left = [part for axis in axes for part in axis][::-1]
    new: list[Axis] = []
    for size in shape:
        axis: list[Part] = []
        if size == 1 and left and left[-1].size == 1:
            axis.append(left.pop())
        while size > 1:
            if not left:
                return rows(shape)
            part = left.pop()
            if size % part.size == 0:
                size //= part.size
            elif part.size % size == 0:
                inner = part.size // size
                left.append(replace(part, size=inner))
                part, size = replace(part, size=size, stride=part.stride * inner), 1
            else:
                return rows(shape)
            axis.append(part)
        new.append(_joined(axis))
    return rows(shape) if any(part.size > 1 for part in left) else tuple(new)


def _joined(parts: Sequence[Part]) -> Axis:
    """Parts, with those that follow one another on an axis of one source as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and part.size == 1:
            continue
        if last and last.size == 1:
            joined.pop()
        same = last and (last.source, last.axis) == (part.source, part.axis)
        if last and same and (part.source is None or last.stride == part.size * part.stride):
            joined[-1] = replace(part, size=last.size * part.size)
        else:
            joined.append(part)
    return tuple(joined)


def resized(axis: Axis, size: int, step: int = 1) -> Axis:
    """A slice of an axis, of `size` indices."""
    if len(axis) == 1:
        return (replace(axis[0], size=size, stride=axis[0].stride * step),)
    return () if size == 1 else (Part(size),)
