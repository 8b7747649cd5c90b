"""Chooses passes and learning rates on small data by dev, and reports the defaults on test.

Each data set gives about 900 training rows. `adapters-jax compare` trains Houlsby's adapters and
LoRA on them: for 12 passes at several learning rates, and for other numbers of passes at the rate
of the preset. The frozen base with a trained head, at its own defaults, is the baseline. On CoLA
with more rows, Houlsby's adapters at m = 256 get several rates. A score on dev is divided by the
best of its data set and method, and the setting with the highest mean over the data sets is the
best one; test is only reported. An interrupted run continues with its cells in comparisons/, and
the results hold the result of each cell.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_jax.app.options.method import PRESETS
from benchmarks.baselines import DATA
from benchmarks.harness import ROOT
from benchmarks.report import Report, Row
from benchmarks.tradeoff import compared

SETS = {
    "cola": "--glue cola --data {}/cola",
    "stsb": "--glue stsb --data {}/stsb",
    "wnut17": "--task token-classification --train {0}/wnut17/wnut17train.conll "
    "--dev {0}/wnut17/emerging.dev.conll",
    "movies": "",
}
ROWS, WIDE_ROWS, WIDE_PASSES = 900, 4000, 3.0
FROZEN, WIDE = "head-only", "houlsby --bottleneck-dim 256"
METHODS = {"houlsby": (2e-3, 1e-3, 4e-3, 5e-4), "lora": (2e-3, 4e-3, 1e-3, 8e-3)}
PASSES, OTHERS = 12.0, (3.0, 6.0, 24.0)  # 12 passes are the default on 900 rows
WIDE_RATES = (1e-3, 2e-3, 5e-4)


@dataclass(frozen=True)
class Cells:
    """A comparison on a data set.

    Attributes:
        data: a key of `SETS`.
        rows: the number of training rows.
        recipes: the recipes with the learning rates to try.
        passes: the passes over the rows; None is the default of the recipe.
    """

    data: str
    rows: int
    recipes: tuple[str, ...]
    passes: float | None = None

    def train(self, root: Path, more: Sequence[str]) -> list[Row]:
        """Trains the cells that are not finished, and returns all results."""
        out = root / f"{self.data}-{self.rows}-{self.passes or 'own'}"
        flags = [*SETS[self.data].format(DATA).split(), "--limit", str(self.rows)]
        flags += [] if self.passes is None else ["--epochs", str(self.passes)]
        flags += ["--recipes", *self.recipes, "--seeds", "0", "--evaluations", "1", *more]
        metric = compared([*flags, "--out", str(out)])["metrics"][0]
        found = map(json.loads, (out / "cells.jsonl").read_text().splitlines())
        shared = {"data": self.data, "metric": metric, "rows": self.rows, "passes": self.passes}
        return [{**shared, **cell, "score": _scores(cell, metric)} for cell in found]


def _scores(cell: Row, metric: str) -> dict[str, float]:
    """The scores on dev and test; those of a training that diverged are 0."""
    return {part: cell[part][metric] if part in cell else 0.0 for part in ("dev", "test")}


def grid() -> Iterator[Cells]:
    """The comparisons, the most telling first."""
    every = tuple(_with_rates(method, rates) for method, rates in METHODS.items())
    own = tuple(_with_rates(method, rates[:1]) for method, rates in METHODS.items())
    for recipes, passes in ((every, PASSES), *((own, passes) for passes in OTHERS)):
        yield from (Cells(data, ROWS, recipes, passes) for data in SETS)
    yield from (Cells(data, ROWS, (FROZEN,)) for data in SETS)
    yield Cells("cola", WIDE_ROWS, (_with_rates(WIDE, WIDE_RATES),), WIDE_PASSES)


def _with_rates(recipe: str, rates: Sequence[float]) -> str:
    return " ".join([recipe, "--learning-rates", *(f"{rate:g}" for rate in rates)])


def run(report: Report, quick: bool) -> None:
    """Trains the cells that are missing; two comparisons on a few rows if quick."""
    root = ROOT / "comparisons" / f"defaults{'-quick' * quick}"
    chosen, more = list(grid()), []
    if quick:
        chosen = [Cells("movies", 32, ("lora",), PASSES), Cells("movies", 32, (FROZEN,))]
        more = ["--max-length", "16"]
    write(report, [cell for cells in chosen for cell in cells.train(root, more)])


def write(report: Report, cells: Sequence[Row]) -> None:
    """Writes the tables of finished cells, and the cells beside them."""
    lines = "".join(json.dumps(cell) + "\n" for cell in cells)
    (report.directory / f"{report.name}-cells.jsonl").write_text(lines)
    small = [cell for cell in cells if cell["recipe"] in METHODS]
    for method in METHODS:
        for row in ranked([cell for cell in small if cell["recipe"] == method]):
            report.add("Dev: each setting, relative to the best of its data set", **row)
    for cell in cells:
        if cell["recipe"] == WIDE:
            report.add(
                f"{WIDE} on {cell['data']}",
                **{"rows": cell["rows"], "passes": cell["passes"]},
                **{"learning rate": cell["learning_rate"], "metric": cell["metric"]},
                **{f"{part} x 100": 100 * cell["score"][part] for part in ("dev", "test")},
            )
    frozen = {cell["data"]: cell for cell in cells if cell["recipe"] == FROZEN}
    for cell in filter(_is_default, small):
        base = frozen[cell["data"]]["score"]["test"]
        ours = cell["score"]["test"]
        about = {"data": cell["data"], "rows": cell["rows"], "metric": cell["metric"]}
        report.add(
            "Test: the default beside the frozen base with a trained head",
            **about,
            **{"method": cell["recipe"], "frozen base": 100 * base, "default": 100 * ours},
            **{"points above": 100 * (ours - base), "seconds": cell.get("seconds")},
        )
        what = f"{cell['data']}, {cell['rows']} rows: points that the frozen base is above "
        report.claim(f"{what}{cell['recipe']} by default", 100 * (base - ours), 0.0)


def ranked(cells: Sequence[Row]) -> list[Row]:
    """The settings of a method that every data set has, the best on dev first."""
    best: dict[str, float] = {}
    settings: dict[tuple[float, float], list[Row]] = {}
    for cell in cells:
        best[cell["data"]] = max(cell["score"]["dev"], best.get(cell["data"], 0.0))
        settings.setdefault((cell["passes"], cell["learning_rate"]), []).append(cell)
    rows = []
    for (passes, rate), found in settings.items():
        parts = {cell["data"]: cell["score"]["dev"] / best[cell["data"]] for cell in found}
        if parts.keys() == best.keys():
            row = {"method": found[0]["recipe"], "passes": passes, "learning rate": rate}
            mean, default = statistics.fmean(parts.values()), _is_default(found[0])
            rows.append({**row, "default": default, "mean": mean, **parts})
    return sorted(rows, key=lambda row: -row["mean"])


def _is_default(cell: Row) -> bool:
    own = PASSES, PRESETS[cell["recipe"]].learning_rate
    return own == (cell["passes"], cell["learning_rate"])
