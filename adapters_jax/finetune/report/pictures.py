"""Draws pictures: each as a part of a page, in the page's colours, and several as one PNG file.

matplotlib draws them in the colours of the light page. In a page, these colours are the variables
of its style, so that the picture is readable in the dark as well.
"""

import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from adapters_jax.errors import visible
from adapters_jax.files.atomic import write_file
from adapters_jax.finetune.tasks.views import Histogram, Scatter

BLUE, GREY, INK, LINE = "#0f62a8", "#6b7280", "#1c1e21", "#e3e3e3"
COLORS = (BLUE, "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#0e7490")
# The variables of templates/base.html.jinja.
_VARIABLES = {
    INK: "--text",
    GREY: "--grey",
    LINE: "--line",
    **{color: f"--color-{i}" for i, color in enumerate(COLORS)},
}
_STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",  # as wide on every machine
}
# A date or a version in a picture would make equal pages differ.
_NO_METADATA: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_MARKS = re.compile(r'(\bid="|href="#|url\(#)')
_TOP = re.compile(r"<svg [^>]*?viewBox=(\"[^\"]*\")[^>]*>", re.DOTALL)
BINS = 30
SIZE = (4.5, 3.6)  # of one picture, in inches


@dataclass(frozen=True)
class Picture:
    """A picture with one pair of axes.

    Attributes:
        alt: what it shows, in words, for those who do not see it.
        draw: draws it into matplotlib axes.
        title: the title above the axes; empty for none.
    """

    alt: str
    draw: Callable[[Any], None]
    title: str = ""


def in_picture(text: str) -> str:
    """A text as matplotlib draws it: without formulas, which it reads between dollars."""
    return visible(text, lines=False).replace("$", r"\$")


def figure_of(pictures: Sequence[Picture]) -> Any:
    """A matplotlib figure with pictures side by side."""
    from matplotlib.figure import Figure

    with styled():
        size = (SIZE[0] * len(pictures), SIZE[1])
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        for axes, picture in zip(
            figure.subplots(1, len(pictures), squeeze=False).flat, pictures, strict=True
        ):
            axes.set_title(picture.title)
            picture.draw(axes)
    return figure


def styled(**more: Any) -> AbstractContextManager[None]:
    """Within, matplotlib draws in the style of the pictures, with more settings."""
    import matplotlib

    return matplotlib.rc_context(_STYLE | more)


def write_png(path: Path, figure: Any) -> None:
    """Writes a figure as a PNG file, which appears whole or not at all."""
    write_file(path, lambda beside: figure.savefig(beside, format="png"))


def svg(figure: Any, alt: str) -> Markup:
    """A figure as a part of an HTML page, in the colours of the page.

    Args:
        figure: a figure in the colours of this module.
    """
    written = io.StringIO()
    # With a salt, the marks in the SVG are the same in every process, so pages can be compared.
    with styled(**{"svg.hashsalt": alt}):
        figure.savefig(written, format="svg", transparent=True, metadata=_NO_METADATA)
    text = re.sub(r"<!--.*?-->\n?", "", written.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    own = f"p{zlib.crc32(alt.encode()):x}-"  # marks are unique in the page
    text = _MARKS.sub(rf"\g<1>{own}", text).replace("xlink:href", "href")
    top = Markup('<svg class="picture" role="img" aria-label="{}" viewBox=').format(alt)
    text = _TOP.sub(lambda found: f"{top}{found[1]}>", text, count=1)
    return Markup(text)


def curves(
    records: Sequence[Mapping[str, Any]],
    method: str,
    metric: str,
    baselines: Mapping[str, float],
    percent: bool,
) -> list[Picture]:
    """Pictures of the training loss and the dev metric over the steps, and of rewards.

    Args:
        method: the name of the trained method, for the legend.
        metric: the name of the dev metric to draw.
        baselines: the dev metric of each baseline by its title, drawn as level lines.
        percent: whether the metric is a share, which is shown in percent.
    """
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    factor, unit = (100, " (%)") if percent else (1, "")
    scores = [(r["step"], factor * r["dev"][metric]) for r in records if "dev" in r]
    margins = [(r["step"], r["margin"]) for r in records if "margin" in r]

    def draw_loss(axes: Any) -> None:
        steps, raw = zip(*losses, strict=True)
        _draw_smooth(axes, steps, raw)
        _steps(axes)
        axes.set(ylabel="loss", ylim=(0, 1.05 * max(raw) or 1))

    def draw_dev(axes: Any) -> None:
        steps, values = zip(*scores, strict=True)
        axes.plot(steps, values, "o-", color=BLUE, linewidth=1.8, label=in_picture(method))
        for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
            level = {"color": GREY, "linestyle": style, "linewidth": 1.5}
            axes.axhline(factor * value, label=in_picture(name), **level)
        _steps(axes)
        axes.set(ylabel=metric + unit)
        _legend_below(axes)

    def draw_margins(axes: Any) -> None:
        steps, raw = zip(*margins, strict=True)
        _draw_smooth(axes, steps, raw, label="train")
        dev = [(r["step"], r["dev"]["margin"]) for r in records if "dev" in r]
        axes.plot(*zip(*dev, strict=True), "o--", color=GREY, linewidth=1.5, label="dev")
        _steps(axes)
        axes.set(ylabel="reward of preferred - of other")
        _legend_below(axes)

    every = (
        (losses, "Training loss", draw_loss, "Training loss"),
        (scores, f"{metric}{unit} on dev", draw_dev, in_picture(f"Dev {metric}")),
        (margins, "Mean reward margin", draw_margins, "Reward margin"),
    )
    return [
        Picture(f"{what} over the steps: {_ends(points)}", draw, title)
        for points, what, draw, title in every
        if points
    ]


def _ends(points: Sequence[tuple[int, float]]) -> str:
    (first, before), (last, after) = points[0], points[-1]
    return f"{before:.4g} at step {first}, {after:.4g} at step {last}."


def _steps(axes: Any) -> None:
    """The axis of steps, which are whole numbers."""
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _draw_smooth(axes: Any, steps: Sequence[int], raw: Sequence[float], **how: Any) -> None:
    axes.plot(steps, raw, color=BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(raw), color=BLUE, linewidth=1.8, **how)


def smooth(values: Sequence[float], share: float = 0.1) -> np.ndarray:
    """The running mean over a share of the values; the window is centred, and cut at the ends."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _legend_below(axes: Any) -> None:
    """A legend below the axes, where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=9)


def histogram(view: Histogram) -> Picture:
    """A histogram; each series has bars that add up to 100 %."""
    series = {name: found for name, found in view.series.items() if found}
    every = [value for found in series.values() for value in found]
    edges = _edges(np.array(every))

    def draw(axes: Any) -> None:
        for (name, found), color in zip(series.items(), COLORS, strict=False):
            counts, _ = np.histogram([*found], edges, weights=[*found.values()])
            shares = 100 * counts / counts.sum()
            n = f"{int(counts.sum()):,}"
            style = {"color": color, "linewidth": 1.6, "label": in_picture(f"{name} ({n})")}
            axes.stairs(shares, edges, **style)
            axes.stairs(shares, edges, color=color, fill=True, alpha=0.12)
        axes.set(xlabel=in_picture(view.label), ylabel="share (%)")
        _legend_below(axes)

    parts = (f"{name}: {_spread(found)}" for name, found in series.items())
    return Picture(f"{view.title}, {view.label}. {'; '.join(parts)}.", draw)


def _edges(values: np.ndarray) -> np.ndarray:
    """The edges of bins; those of whole numbers lie between them.

    Example:
        >>> _edges(np.array([5, 7])).tolist(), _edges(np.array([0.0, 1.5]))[:2].tolist()
        ([4.5, 5.5, 6.5, 7.5], [0.0, 0.05])
    """
    low, high = values.min(), values.max()
    if np.issubdtype(values.dtype, np.integer):
        width = -(-(high - low + 1) // BINS)
        return np.arange(low, high + width + 1, width) - 0.5
    return np.histogram_bin_edges(values, bins=BINS)


def _spread(found: Mapping[float, int]) -> str:
    """The smallest, the middle and the largest value in words."""
    values, counts = (np.array([*side], float) for side in (found.keys(), found.values()))
    order = np.argsort(values)
    middle = np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)
    low, mid, high = (values[order][i] for i in (0, middle, -1))
    return f"{int(counts.sum()):,} from {low:.4g} to {high:.4g}, median {mid:.4g}"


def scatter(view: Scatter) -> Picture:
    """Predicted against right numbers, with the line on which both are equal."""

    def draw(axes: Any) -> None:
        ends = [min(*view.right, *view.predicted), max(*view.right, *view.predicted)]
        axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2, label="equal")
        dots = {"color": BLUE, "markersize": 4, "alpha": 0.5, "markeredgewidth": 0}
        axes.plot(view.right, view.predicted, "o", label=f"rows ({len(view.right):,})", **dots)
        axes.set(xlabel="right", ylabel="predicted")
        _legend_below(axes)

    spans = (
        f"{name} {min(x):.4g} to {max(x):.4g}"
        for name, x in zip(("right", "predicted"), (view.right, view.predicted), strict=True)
    )
    return Picture(f"{view.title} of {len(view.right):,} rows: {', '.join(spans)}.", draw)
