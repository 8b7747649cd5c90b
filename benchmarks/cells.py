"""Trainings by `adapters-jax compare` that a benchmark needs, kept with its results.

A cell is one training: a recipe on some rows of a data set, with a learning rate and a seed. The
file NAME-cells.jsonl beside the results has a line for each finished cell. A cell that has a line
is not trained again, not even in another checkout. An interrupted cell resumes in comparisons/.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from adapters_jax.files.atomic import write_file
from adapters_jax.finetune.compare.grid import read_candidate
from benchmarks.harness import DATA, ROOT
from benchmarks.report import Report, Row

SETS = {
    "movies": "",
    "cola": "--glue cola --data {}/cola",
    "stsb": "--glue stsb --data {}/stsb",
    "wnut17": "--task token-classification --train {0}/wnut17/wnut17train.conll "
    "--dev {0}/wnut17/emerging.dev.conll",
}


@dataclass(frozen=True)
class Cells:
    """Trainings of one recipe.

    Attributes:
        data: a key of `SETS`.
        rows: the number of training rows.
        recipe: the recipe, as `adapters-jax compare --recipes` takes it.
        rates: the learning rates; none are that of the recipe's preset.
        passes: the passes over the rows; None is the default of the recipe.
        seeds: the seeds.
    """

    data: str
    rows: int
    recipe: str
    rates: tuple[float, ...] = ()
    passes: float | None = None
    seeds: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.tried) * len(self.seeds)

    @property
    def tried(self) -> tuple[float, ...]:
        """The learning rates, with that of the preset if none are given."""
        return self.rates or read_candidate(self.recipe).learning_rates

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """Those of some finished cells that are of these."""
        shared = {"data": self.data, "rows": self.rows, "passes": self.passes}
        return [
            row
            for row in rows
            if {**row, **shared, "recipe": self.recipe} == row
            and row["seed"] in self.seeds
            and row["learning_rate"] in self.tried
        ]

    @property
    def name(self) -> str:
        """The name of the comparison that trains them."""
        passes = "own" if self.passes is None else f"{self.passes:g}"
        recipe = re.sub(r"[^a-z0-9]+", "-", self.recipe)
        return f"{self.data}-{self.rows}-{passes}-{recipe}"

    def flags(self) -> list[str]:
        """The flags of the comparison."""
        recipe = self.recipe
        if self.rates:
            recipe = " ".join([recipe, "--learning-rates", *(f"{rate:g}" for rate in self.rates)])
        flags = [*SETS[self.data].format(DATA).split(), "--limit", str(self.rows)]
        flags += [] if self.passes is None else ["--epochs", f"{self.passes:g}"]
        return [*flags, "--recipes", recipe, "--seeds", *map(str, self.seeds)]


class Store:
    """The finished cells of a benchmark, in a file of its results.

    Args:
        report: the report of the benchmark, which names the file.
        more: more flags of every comparison.

    Attributes:
        rows: the finished cells.
    """

    def __init__(self, report: Report, more: Sequence[str] = ()):
        self.path, self.more = report.directory / f"{report.name}-cells.jsonl", more
        self.root = ROOT / "comparisons" / report.name
        self.rows = read(self.path)

    def train(self, cells: Cells) -> list[Row]:
        """Trains the cells that are not finished, and returns all of them."""
        missing = self._missing(cells)
        if missing is not None:
            out = self.root / missing.name
            try:
                compared([*missing.flags(), *self.more, "--out", str(out)])
            finally:  # also what was finished before an interruption
                self._keep(missing, read(out / "cells.jsonl"))
        return cells.of(self.rows)

    def _missing(self, cells: Cells) -> Cells | None:
        """The learning rates and seeds that lack a cell; None if there are none."""
        there = {(row["learning_rate"], row["seed"]) for row in cells.of(self.rows)}
        lacking = {*product(cells.tried, cells.seeds)} - there
        if not lacking:
            return None
        return replace(
            cells,
            rates=tuple(rate for rate in cells.rates if rate in {rate for rate, _ in lacking}),
            seeds=tuple(seed for seed in cells.seeds if seed in {seed for _, seed in lacking}),
        )

    def _keep(self, cells: Cells, found: Sequence[Row]) -> None:
        shared = {"data": cells.data, "rows": cells.rows, "passes": cells.passes}
        rows = [*self.rows, *cells.of([{**shared, **row} for row in found])]
        named = ("data", "rows", "passes", "recipe", "learning_rate", "seed")
        self.rows = [*{tuple(row[name] for name in named): row for row in rows}.values()]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


def read(path: Path) -> list[Row]:
    """The cells of a file, with "score" by their first metric, which is 0 where one diverged.

    There are none if there is no file.
    """
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for cell in cells:
        metric = next(iter(cell.get("dev", ())), None)
        scores = {part: cell[part][metric] if metric else 0.0 for part in ("dev", "test")}
        cell |= {"metric": metric, "score": scores}
    return cells


def compared(flags: list[str]) -> Any:
    """Runs `adapters-jax compare --json`, with its progress shown, and returns its result."""
    command = [sys.executable, "-m", "adapters_jax.finetune.cli.main", "compare", *flags, "--json"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {ran.returncode}")
    return json.loads(ran.stdout)
