"""Draws the test metric of recipes against their trainable parameters, as Houlsby et al. do.

Labels are beside their points, where they cover the least.

Reference: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", figures 1 and 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_jax.finetune.report.pictures import COLORS, GREY, in_picture, styled
from adapters_jax.finetune.tasks.metrics import PERCENT

COLUMNS = 3
Row = Mapping[str, Any]
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


def tradeoff(comparisons: Mapping[str, Sequence[Row]], metrics: Mapping[str, str]) -> Any:
    """Draws the test metric against the trainable parameters, one frame for each data set.

    Recipes that differ only in their size form a line, and other recipes are points. Full
    fine-tuning is a level line, with its deviation as a band. Rows without a finite result are left
    out.

    Args:
        comparisons: the rows of each data set by its title, like "recipes" in `comparison.json`:
            each row has "recipe", "method", "family", "size", "size_name", "trainable_parameters"
            and "test".
        metrics: the metric of "test" to draw, by the title of the data set.
    """
    with styled():
        return _figure(comparisons, metrics)


def _figure(comparisons: Mapping[str, Sequence[Row]], metrics: Mapping[str, str]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(comparisons))
    lines = -(-len(comparisons) // columns)
    size = (8, 5) if columns == 1 else (5.4 * columns, 4.4 * lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    frames = figure.subplots(lines, columns, squeeze=False).flat
    labels = []
    for axes, (title, rows) in zip(frames, comparisons.items(), strict=False):
        metric = metrics[title]
        axes.set_title(in_picture(title))
        labels.append((axes, *_draw(axes, _points(rows, metric), metric)))
    for axes in list(frames)[len(comparisons) :]:
        axes.set_visible(False)
    # The layout decides where points are in pixels, so labels are placed after it, and it is not
    # to move them again.
    figure.draw_without_rendering()
    for axes, words, drawn in labels:
        place_labels(axes, words, drawn)
    figure.set_layout_engine("none")
    return figure


def _points(rows: Sequence[Row], metric: str) -> list[dict[str, Any]]:
    """The rows that can be drawn, with "x", "y" and "error" in the picture's units."""
    factor = 100 if metric in PERCENT else 1
    found = []
    for row in rows:
        spread = row.get("test", {}).get(metric)
        if spread is not None and np.isfinite(spread["mean"]) and row["trainable_parameters"]:
            y, error = factor * spread["mean"], factor * (spread["deviation"] or 0.0)
            found.append({**row, "x": row["trainable_parameters"], "y": y, "error": error})
    return found


def _draw(
    axes: Any, points: Sequence[Mapping[str, Any]], metric: str
) -> tuple[list[Label], list[np.ndarray]]:
    """Draws points into axes; returns their labels, and the lines that labels must not cover."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        if point["method"] != "full":
            families.setdefault(point["family"], []).append(point)
    names, sizes, drawn = [], [], []
    for i, group in enumerate(families.values()):
        color = COLORS[i % len(COLORS)]
        line = sorted(group, key=lambda point: point["x"])
        x, y, error = ([point[name] for point in line] for name in ("x", "y", "error"))
        axes.errorbar(x, y, error, fmt="o-", color=color, markersize=5, capsize=3, linewidth=1.8)
        drawn += [np.array([x, y]).T]
        drawn += [np.array([[a, b - e], [a, b + e]]) for a, b, e in zip(x, y, error, strict=True)]
        name = line[0]["recipe"] if len(line) == 1 else _family(line)
        names.append(Label(in_picture(name), list(zip(x, y, strict=True)), color, 9, "bold"))
        if len(line) > 1:
            numbered = [point for point in line if point["size"] is not None]
            sizes += [Label(str(p["size"]), [(p["x"], p["y"])], color, 8) for p in numbered]
    full = [point for point in points if point["method"] == "full"]
    axes.set_xscale("log")
    _set_limits(axes, points)
    for point in full:
        names.append(_draw_full(axes, point))
        drawn.append(np.array([[end, point["y"]] for end in axes.get_xlim()]))
    drawn += [
        np.array([[point["x"], point["y"]]] * 3) for point in points
    ]  # a dot counts three times
    axes.set(xlabel="trainable parameters", ylabel=f"test {metric}" + " (%)" * (metric in PERCENT))
    return [*sizes, *names], drawn


def _draw_full(axes: Any, point: Mapping[str, Any]) -> Label:
    """Draws full fine-tuning as the level that the others are compared with."""
    y, error = point["y"], point["error"]
    axes.axhline(y, color=GREY, linestyle="--", linewidth=1.5, zorder=1)
    axes.axhspan(y - error, y + error, color=GREY, alpha=0.13, linewidth=0, zorder=0)
    axes.plot(point["x"], y, "o", color=GREY, markersize=5)
    low, high = axes.get_xlim()
    along = [(low * (high / low) ** part, y) for part in (0.85, 0.7, 0.55, 0.4, 0.25, 0.12)]
    return Label(f"full fine-tuning ({point['x']:,})", along, GREY, 9, "bold")


def _family(line: Sequence[Mapping[str, Any]]) -> str:
    name = next((point["size_name"] for point in line if point["size_name"]), None)
    return line[0]["family"] + (f", by {name}" if name else "")


def _set_limits(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Leaves room for labels around the points; the x axis is logarithmic."""
    if not points:
        return
    powers = np.log10([point["x"] for point in points])
    wide = max(np.ptp(powers), 1.0)
    axes.set_xlim(10 ** (powers.min() - 0.14 * wide), 10 ** (powers.max() + 0.14 * wide))
    low = min(point["y"] - point["error"] for point in points)
    high = max(point["y"] + point["error"] for point in points)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


@dataclass(frozen=True)
class Label:
    """A label of one or several points.

    Attributes:
        points: points `(x, y)` in data units; the label is written beside the one with most room.
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
