"""Writes labels into a picture, each beside its point and where it covers the least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels
_SIDES = [  # offset right and up, horizontal and vertical alignment; the best side first
    (0, 1, "center", "bottom"),
    (1, 0, "left", "center"),
    (0, -1, "center", "top"),
    (-1, 0, "right", "center"),
    (0.7, 0.7, "left", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-0.7, 0.7, "right", "bottom"),
    (-0.7, -0.7, "right", "top"),
]


@dataclass(frozen=True)
class Label:
    """A label of one or several points.

    Attributes:
        text: the text of the label.
        points: points `(x, y)` in data units; the label is written beside the one with most room.
        color: color of the text.
        size: font size in points.
        weight: font weight, such as "bold".
    """

    text: str
    points: Sequence[tuple[float, float]]
    color: str
    size: float = 9
    weight: str = "normal"


def place_labels(axes: Any, labels: Sequence[Label], lines: Sequence[np.ndarray]) -> None:
    """Writes each label where it overlaps the least.

    Args:
        axes: matplotlib axes with final limits, in a figure with a final layout.
        labels: the labels; an earlier one chooses before a later one.
        lines: lines that labels should not cover, each as points `(n, 2)` in data units.
    """
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    frame = (inside.x0, inside.y0, inside.x1, inside.y1)
    drawn = [axes.transData.transform(_filled(axes, line)) for line in lines if len(line)]
    covered, taken = np.concatenate(drawn or [np.zeros((0, 2))]), list[Box]()
    for label in labels:
        tries = list[tuple[float, Any, Box]]()
        for far, point, side in itertools.product((6, 14, 26), label.points, _SIDES):
            text = _write(axes, label, point, side, far)
            extent = text.get_window_extent(renderer)
            box = (extent.x0, extent.y0, extent.x1, extent.y1)
            text.remove()
            cost = _cost(box, frame, covered, taken) + 0.2 * far + 0.5 * _SIDES.index(side)
            tries.append((cost, (point, side, far), box))
        _, where, box = min(tries, key=lambda found: found[0])
        _write(axes, label, *where)
        taken.append(box)


def _write(axes: Any, label: Label, point: Any, side: Any, far: float) -> Any:
    right, up, horizontal, vertical = side
    return axes.annotate(
        label.text,
        point,
        (far * right, far * up),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        color=label.color,
        fontsize=label.size,
        fontweight=label.weight,
        annotation_clip=False,
    )


def _cost(box: Box, frame: Box, points: np.ndarray, taken: Sequence[Box]) -> float:
    """The cost of a box: what it covers, and how many pixels it reaches out of the frame."""
    left, bottom, right, top = box
    out = max(frame[0] - left, 0) + max(frame[1] - bottom, 0)
    out += max(right - frame[2], 0) + max(top - frame[3], 0)
    inside = (points > (left - 2, bottom - 2)) & (points < (right + 2, top + 2))
    shared = 0.0
    for other in taken:
        wide = min(right, other[2]) - max(left, other[0]) + 4
        high = min(top, other[3]) - max(bottom, other[1]) + 2
        shared += max(wide, 0) * max(high, 0)
    return 20 * out + 10 * float(inside.all(axis=1).sum()) + shared


def _filled(axes: Any, line: np.ndarray) -> np.ndarray:
    """A line as many points, which are evenly spaced in the picture."""
    if len(line) < 2:
        return line
    pixels = axes.transData.transform(line)
    parts = [np.linspace(a, b, 40) for a, b in itertools.pairwise(pixels)]
    return axes.transData.inverted().transform(np.concatenate(parts))
