"""Trainings that a benchmark needs, by `adapters-jax compare` or its own, kept with its results.

A cell is one training: a recipe on some rows of a data set, with a learning rate and a seed. The
file NAME-cells.jsonl beside the results has a line for each finished cell. A cell that has a line
is not trained again, not even in another checkout. An interrupted cell resumes in comparisons/.
"""

import json
import math
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
_DECODER = "--no-chat --template {{prompt}}\\n --held-out 100 --exact-match 0 --max-length"
TEXTS = {  # of decoders
    "e2e": f"--train {{0}}/e2e/devset.csv --prompt mr --completion ref {_DECODER} 128",
    "gsm8k": f"--train {{0}}/gsm8k/test.jsonl --prompt question --completion answer {_DECODER} 256",
    "wikitext2": "--train {0}/wikitext2/valid.txt --test {0}/wikitext2/test.txt --text text "
    "--held-out 100 --exact-match 0 --max-length 256",
    "conversations": "--train {0}/conversations/dummy_conversation.json --held-out 100 "
    "--max-length 256",
}


@dataclass(frozen=True)
class Cells:
    """Trainings of one recipe.

    Attributes:
        data: a key of `SETS` or `TEXTS`.
        rows: the number of training rows.
        recipe: the recipe, as `adapters-jax compare --recipes` takes it.
        rates: the learning rates; none are that of the recipe's preset.
        passes: the passes over the rows; None is the default of the recipe.
        seeds: the seeds.
        base: the base, as `adapters-jax compare --model` takes it; none is that of the data set.
        batch: the rows of a step, or packed sequences of a decoder; None is the default.
        more: more flags of `adapters-jax compare`, which are shown with the recipe.
    """

    data: str
    rows: int
    recipe: str
    rates: tuple[float, ...] = ()
    passes: float | None = None
    seeds: tuple[int, ...] = (0,)
    base: str = ""
    batch: int | None = None
    more: str = ""

    def __len__(self) -> int:
        return len(self.tried) * len(self.seeds)

    @property
    def tried(self) -> tuple[float, ...]:
        """The learning rates, with that of the preset if none are given."""
        return self.rates or read_candidate(self.recipe).learning_rates

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """Those of some finished cells that are of these."""
        return [
            row
            for row in rows
            if {**row, **self.shared, "recipe": self.recipe} == row
            and all(name in self.shared or name not in row for name in ("base", "batch", "more"))
            and row["seed"] in self.seeds
            and row["learning_rate"] in self.tried
        ]

    def with_any_rate(self, rows: Sequence[Row]) -> list[Row]:
        """Those of some finished cells that are of these, but for the learning rate."""
        rates = tuple({row["learning_rate"] for row in rows if row["recipe"] == self.recipe})
        return replace(self, rates=rates).of(rows) if rates else []

    def best(self, rows: Sequence[Row]) -> list[Row]:
        """Those with the rate that is the best on dev with the first seed, by their seeds."""
        any_rate = self.with_any_rate(rows)
        tried = [row for row in any_rate if row["seed"] == self.seeds[0]]
        if not tried:
            return []
        rate = max(tried, key=lambda row: row["score"]["dev"])["learning_rate"]
        found = [row for row in any_rate if row["learning_rate"] == rate]
        return sorted(found, key=lambda row: row["seed"])  # the first one names the rates tried

    @property
    def shared(self) -> Row:
        """What the lines of all of them have in common."""
        chosen = {"base": self.base, "batch": self.batch, "more": self.more}
        given = {name: value for name, value in chosen.items() if value}
        return {"data": self.data, "rows": self.rows, "passes": self.passes, **given}

    @property
    def name(self) -> str:
        """The name of the comparison that trains them."""
        passes = "own" if self.passes is None else f"{self.passes:g}"
        batch = f"batch-{self.batch}" if self.batch else ""
        more = [each for each in (self.base, batch) if each]
        words = [self.data, str(self.rows), passes, *more, self.recipe, self.more]
        return re.sub(r"[^a-zA-Z0-9.]+", "-", "-".join(filter(None, words)))

    def flags(self) -> list[str]:
        """The flags of the comparison."""
        recipe = self.recipe
        if self.rates:
            recipe = " ".join([recipe, "--learning-rates", *(f"{rate:g}" for rate in self.rates)])
        flags = [*(SETS | TEXTS)[self.data].format(DATA).split(), "--limit", str(self.rows)]
        flags += [] if self.passes is None else ["--epochs", f"{self.passes:g}"]
        flags += ["--model", self.base] if self.base else []
        flags += ["--batch-size", str(self.batch)] if self.batch else []
        return [*flags, *self.more.split(), "--recipes", recipe, "--seeds", *map(str, self.seeds)]


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
        rows = [*self.rows, *cells.of([{**cells.shared, **row} for row in found])]
        shared = ("base", "data", "rows", "batch", "passes", "more")
        named = (*shared, "recipe", "learning_rate", "seed")
        self.rows = [*{tuple(row.get(name) for name in named): row for row in rows}.values()]
        self.save()

    def save(self) -> None:
        """Writes the rows to the file."""
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


class Record:
    """The finished cells of a benchmark that trains them itself, in a file of its results.

    Args:
        report: the report of the benchmark, which names the file.
        shared: what the lines of all cells of this run have in common.

    Attributes:
        rows: the finished cells, also those of other runs.
    """

    def __init__(self, report: Report, **shared: Any):
        self.path, self.shared = report.directory / f"{report.name}-cells.jsonl", shared
        self.rows = read(self.path)

    def find(self, **cell: Any) -> Row | None:
        """The row of a cell, if it is finished."""
        named = {**self.shared, **cell}
        return next((row for row in self.rows if {**row, **named} == row), None)

    def keep(self, result: Row, **cell: Any) -> None:
        """Writes the result of a cell to the file, in the place of an earlier one."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        named = {**cell, **self.shared}
        kept = [row for row in map(json.loads, lines) if {**row, **named} != row]
        rows = [*kept, {**named, **result}]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.rows = read(self.path)


def read(path: Path) -> list[Row]:
    """The cells of a file, with "score" by their first metric: higher is better.

    The score of a perplexity is minus the loss, its logarithm. That of a cell which diverged is 0,
    or minus infinity for a decoder. There are none if there is no file.
    """
    cells = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for cell in cells:
        metric = next(iter(cell.get("dev", ())), None)
        worst = -math.inf if "base" in cell else 0.0
        scores = {part: _score(metric, cell[part]) if metric else worst for part in ("dev", "test")}
        cell |= {"metric": metric, "score": scores}
    return cells


def _score(metric: str, found: Row) -> float:
    return -math.log(found[metric]) if metric == "perplexity" else float(found[metric])


def compared(flags: list[str]) -> Any:
    """Runs `adapters-jax compare --json`, with its progress shown, and returns its result."""
    command = [sys.executable, "-m", "adapters_jax.finetune.cli.main", "compare", *flags, "--json"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {ran.returncode}")
    return json.loads(ran.stdout)
