"""Writes the report of a benchmark: JSON lines while it runs, then JSON, Markdown and a picture.

A row of the table "Claims" has a published figure, our figure and a verdict. A row of the table
"Wanted" has one of our figures and its limit. `python -m benchmarks readme` writes both tables into
docs/results/.
"""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Spread

PACKAGES = ("adapters-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
CLAIMS, FIGURES = "Claims", "Wanted"
COSTS, WHOLE = "A step, its costs from two and three layers", "Whole models, layers scanned"
LARGEST = "The largest compiled models that fit one card, LoRA"
BLUE, GREY = "#0f62a8", "#b8bec7"
Row = dict[str, Any]
Verdict = Literal["reproduced", "in part", "undecided", "not reproduced"]


def _read(path: str, key: str) -> str:
    """The value of the first line `key : value` in a system file; empty if there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _processor() -> str:
    """The processor's name, with family and model numbers, since a name may mean several."""
    name, *numbers = (
        _read("/proc/cpuinfo", key) for key in ("model name", "cpu family\t", "model\t")
    )
    if not all(numbers):
        return name or platform.processor()
    return "{}, family {}, model {}".format(name, *numbers)


def machine() -> Row:
    """Describes the machine, and its load at the start."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory": _read("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages in `PACKAGES`."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


@dataclass(frozen=True)
class Panel:
    """A part of a benchmark's picture, with a bar for each contender.

    Attributes:
        title: the title of the panel.
        unit: the unit of the bars.
        bars: the values by label; a `Spread` also shows its quartiles.
        ours: the labels of the bars that are drawn in colour.
        level: a published value or a limit, drawn as a line.
    """

    title: str
    unit: str
    bars: Mapping[str, Spread | float]
    ours: Sequence[str] = ()
    level: float | None = None


class Report:
    """The rows and panels of a benchmark, written to files.

    Each row is written at once, to a file of JSON lines; `finish` writes the other files.

    Args:
        name: the name of the benchmark, and of its files.
        command: the command that runs it again.
        directory: the directory of its files.
    """

    def __init__(self, name: str, command: str, directory: Path):
        self.name, self.directory = name, directory
        directory.mkdir(parents=True, exist_ok=True)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.about: Row = {"benchmark": name, "command": command, "date": date}
        self.about |= {"machine": machine(), "versions": versions()}
        self.rows: list[Row] = []
        self.panels: list[Panel] = []
        self._lines = directory / f"{name}.jsonl"
        self._lines.write_text(json.dumps(self.about) + "\n")

    def add(self, table: str, **row: Any) -> None:
        """Adds one row to a table; `Spread`s become medians with quartiles."""
        self.rows.append({"table": table, **row})
        with self._lines.open("a") as file:
            file.write(json.dumps(_plain(self.rows[-1])) + "\n")

    def samples(self, what: str, seconds: Mapping[str, Sequence[float]]) -> None:
        """Writes raw timings, only to the JSON lines."""
        with self._lines.open("a") as file:
            file.write(json.dumps({"samples": what, "seconds": dict(seconds)}) + "\n")

    def claim(self, what: str, measured: Spread | float, at_most: float) -> None:
        """Adds a figure with its limit, and whether it is met."""
        value = measured.median if isinstance(measured, Spread) else measured
        row = {"claim": what, "measured": measured, "at most": at_most, "met": value <= at_most}
        self.add(FIGURES, **row)

    def verdict(self, claim: str, published: str, ours: str, how: str, verdict: Verdict) -> None:
        """Adds a published figure and ours.

        Args:
            claim: what is claimed, and by whom.
            published: the published figure, with its unit.
            ours: our figure, with its unit.
            how: how our figure was found.
            verdict: whether the figures agree.
        """
        self.add(CLAIMS, claim=claim, published=published, ours=ours, how=how, verdict=verdict)

    def panel(self, title: str, unit: str, bars: Mapping[str, Spread | float], **more: Any) -> None:
        """Adds bars to the picture; see `Panel`."""
        self.panels.append(Panel(title, unit, dict(bars), **more))

    def markdown(self) -> str:
        """The report as Markdown: the machine, the versions and the tables."""
        kinds = [str(kind) for kind in dict.fromkeys(row["table"] for row in self.rows)]
        parts = [f"# {self.name}", f"`{self.about['command']}`, {self.about['date']}"]
        parts.append(", ".join(f"{k} {v}" for k, v in self.about["versions"].items()))
        about = self.about["machine"]
        load = ", ".join(f"{x:.2f}" for x in about["load"] or ())
        parts.append(
            f"{about['cores']} cores, {about['processor']}, {', '.join(about['devices'])}; "
            f"load at the start {load}. Medians, quartiles in brackets."
        )
        for kind in kinds:
            parts += [f"## {kind}", table([row for row in self.rows if row["table"] == kind])]
        return "\n\n".join(parts) + "\n"

    def finish(self) -> str:
        """Writes the JSON, the Markdown and the picture; returns the Markdown."""
        text = self.markdown()
        whole = {**self.about, "rows": [_plain(row) for row in self.rows]}
        (self.directory / f"{self.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
        (self.directory / f"{self.name}.md").write_text(text)
        if self.panels:
            draw(self.directory / f"{self.name}.png", self.panels)
        return text


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The mean of a above that of b, and the ends of Welch's interval of 95 %."""
    from scipy.stats import ttest_ind

    between = ttest_ind(a, b, equal_var=False).confidence_interval()
    return statistics.fmean(a) - statistics.fmean(b), float(between.low), float(between.high)


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Draws the panels below each other; bars start at zero."""
    from matplotlib.figure import Figure

    heights = [0.8 + 0.32 * len(panel.bars) for panel in panels]
    figure = Figure(figsize=(8, sum(heights)), dpi=130, layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for height, (label, value) in enumerate(panel.bars.items()):
            found = value if isinstance(value, Spread) else Spread.of([value])
            colour = BLUE if label in panel.ours else GREY
            low, high = found.median - found.q1, found.q3 - found.median
            axis.barh(height, found.median, 0.7, xerr=[[low], [high]], color=colour, ecolor="#444")
            where = {"textcoords": "offset points", "xytext": (4, 0), "va": "center"}
            axis.annotate(cell(float(found.median)), (found.q3, height), fontsize=8, **where)
        if panel.level is not None:
            axis.axvline(panel.level, color="#c0392b", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(panel.bars)), panel.bars, fontsize=8)
        axis.set_title(panel.title, loc="left", fontsize=10)
        axis.set_xlabel(panel.unit, fontsize=8)
        axis.tick_params("x", labelsize=8)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _plain(row: Row) -> Row:
    return {k: asdict(v) if isinstance(v, Spread) else v for k, v in row.items()}


def cell(value: Any) -> str:
    """Formats a value for people; floats have four digits, and None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Formats rows as a Markdown table; the columns are their keys.

    Example:
        >>> print(table([{"table": "t", "name": "a", "n": 1234}, {"name": "b", "ok": True}]))
        | name | n | ok |
        |---|---|---|
        | a | 1,234 |  |
        | b |  | yes |
    """
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c != "table"]
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    joined = ["| " + " | ".join(line) + " |" for line in lines]
    joined[1] = "|" + "---|" * len(columns)
    return "\n".join(joined)
