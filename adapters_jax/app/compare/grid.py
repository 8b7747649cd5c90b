"""Recipes x learning rates x seeds: which cells there are, in what order, and what they amount to.

Rates are tried with the first seeds, and chosen on dev; the other seeds have the chosen rate alone.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters_jax.app.options.flags import flag, words
from adapters_jax.app.options.method import PRESETS, MethodOptions
from adapters_jax.app.options.parsing import UsageError, parse
from adapters_jax.tasks.metrics import better

RATES = "--learning-rates"
SIZES = {
    "houlsby": "bottleneck_dim",
    "pfeiffer": "bottleneck_dim",
    "parallel": "bottleneck_dim",
    "lora": "rank",
    "llama-adapter": "prompt_length",
    "prefix-tuning": "prompt_length",
    "last-layers": "layers",
}
Result = dict[str, Any]  # what a cell found: a line of cells.jsonl


@dataclass(frozen=True)
class Candidate:
    """A recipe to compare, and the rates to try.

    Attributes:
        text: as it was written, without its rates.
        method: what it says.
        learning_rates: at least one.
    """

    text: str
    method: MethodOptions
    learning_rates: tuple[float, ...]

    @property
    def size(self) -> int | None:
        """The width, rank or number that recipes of one family differ in, where it is given."""
        return None if self.size_name is None else getattr(self.method, self.size_name)

    @property
    def size_name(self) -> str | None:
        """The field that holds it."""
        return None if self.method.recipe else SIZES.get(self.method.method)

    @property
    def family(self) -> str:
        """What recipes that differ in their size alone have in common."""
        if self.method.recipe is not None:
            return self.text
        open_size: dict[str, Any] = {self.size_name: None} if self.size_name else {}
        without = replace(self.method, method=MethodOptions().method, **open_size)
        return " ".join([self.method.method, *words(without)])


@dataclass(frozen=True)
class _Written:
    """A recipe's text, as the command line reads it."""

    method: MethodOptions
    learning_rates: tuple[float, ...] = ()


def read_candidate(text: str, learning_rates: Sequence[float] = ()) -> Candidate:
    """A recipe of its text.

    Args:
        text: a method and its flags, or a recipe file whose name ends in .json; and
            --learning-rates of its own.
        learning_rates: where it has none of its own; by default its method's.

    Raises:
        ValueError: it is not written like that.

    Example:
        >>> read_candidate("lora --rank 4 --learning-rates 1e-3 2e-3").learning_rates
        (0.001, 0.002)
        >>> read_candidate("full").learning_rates
        (5e-05,)
    """
    given = text.split()
    if not given or given[0].startswith("-") or {"-h", "--help"} & {*given}:
        raise UsageError(
            f"--recipes {text!r}: expected a method and its flags, such as 'lora --rank 4', or a "
            "recipe file, such as recipe.json"
        )
    try:
        parts = shlex.split(text)
        if parts[-1] == RATES:
            raise UsageError(f"{RATES} has no rates")
        first = "--recipe" if parts[0].endswith(".json") else "--method"
        written = parse(_Written, [first, *parts])
    except ValueError as error:  # also of shlex
        raise UsageError(f"--recipes {text!r}: {error}") from error
    rates = written.learning_rates or tuple(learning_rates)
    rates = rates or (PRESETS[written.method.method].learning_rate,)
    return Candidate(_without_rates(text), written.method, rates)


def _without_rates(text: str) -> str:
    return re.sub(rf"\s+{RATES}[=\s]+\S+(\s+(?!-)\S+)*", "", text).strip()


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        recipe: the text of its recipe.
        learning_rate: the highest one.
        seed: of all that is drawn.
    """

    recipe: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its directory.

        Example:
            >>> Cell("lora --rank 4", 2e-3, 1).name
            'lora-rank-4-lr-0.002-seed-1'
        """
        slug = re.sub(r"[^\w.]+", "-", self.recipe).strip("-")
        return f"{slug}-lr-{self.learning_rate:g}-seed-{self.seed}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.recipe}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """All cells, and what becomes of their results, which are given by cell.

    A result has "dev" and "test", each a value by metric; or "stopped", of one that diverged.

    Attributes:
        candidates: the recipes.
        seeds: all of them.
        tuning_seeds: how many of them try every rate.
        metric: what is selected on.
    """

    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    tuning_seeds: int
    metric: str

    def possible(self) -> list[Cell]:
        """Every cell that may have to run."""
        return [
            Cell(candidate.text, rate, seed)
            for candidate in self.candidates
            for rate in candidate.learning_rates
            for seed in self.seeds
        ]

    def next(self, results: Mapping[Cell, Result]) -> Cell | None:
        """The first cell that has to run and has not; a seed of all recipes comes before the next.

        Args:
            results: of the cells that are done.
        """
        for i, seed in enumerate(self.seeds):
            for candidate in self.candidates:
                for rate in self._rates(candidate, i < self.tuning_seeds, results):
                    cell = Cell(candidate.text, rate, seed)
                    if cell not in results:
                        return cell
        return None

    def _rates(
        self, candidate: Candidate, tuning: bool, results: Mapping[Cell, Result]
    ) -> Sequence[float]:
        if tuning:
            return candidate.learning_rates
        chosen = self.chosen(candidate, results)
        return [] if chosen is None else [chosen]

    def chosen(self, candidate: Candidate, results: Mapping[Cell, Result]) -> float | None:
        """The rate with the best mean on dev, the first of equals.

        None while some are not tried yet, and where each diverged at some seed. A rate that has no
        other to be compared with is chosen as it is.
        """
        if len(candidate.learning_rates) == 1:
            return candidate.learning_rates[0]
        best: tuple[float, float] | None = None
        for rate in candidate.learning_rates:
            cells = [Cell(candidate.text, rate, seed) for seed in self.seeds[: self.tuning_seeds]]
            if any(cell not in results for cell in cells):
                return None
            if any("stopped" in results[cell] for cell in cells):
                continue
            mean = statistics.fmean(results[cell]["dev"][self.metric] for cell in cells)
            if best is None or better(self.metric, mean, best[0]):
                best = mean, rate
        return None if best is None else best[1]

    def missing(self, candidate: Candidate, results: Mapping[Cell, Result]) -> int:
        """How many cells of a recipe are still to run."""
        rates = candidate.learning_rates
        tried = [Cell(candidate.text, r, s) for r in rates for s in self.seeds[: self.tuning_seeds]]
        untried = sum(cell not in results for cell in tried)
        others, chosen = self.seeds[self.tuning_seeds :], self.chosen(candidate, results)
        if chosen is None:  # each diverged, or it is not known yet
            return untried + (len(others) if untried else 0)
        return untried + sum(Cell(candidate.text, chosen, s) not in results for s in others)

    def row(self, candidate: Candidate, results: Mapping[Cell, Result]) -> dict[str, Any]:
        """A recipe's result: over the seeds of its rate, mean and deviation of every metric.

        "dev" and "test" are absent while its rate is not chosen or no seed is done, and where all
        diverged.
        """
        rate = self.chosen(candidate, results)
        tried = [cell for cell in results if cell.recipe == candidate.text]
        cells = [cell for cell in tried if rate in (None, cell.learning_rate)]
        found = [results[c] for c in cells if rate is not None and "stopped" not in results[c]]
        row: dict[str, Any] = {
            "recipe": candidate.text,
            "method": candidate.method.method,
            "family": candidate.family,
            "size": candidate.size,
            "size_name": candidate.size_name and flag(candidate.size_name)[2:],
            "learning_rate": rate,
            "tuned": len(candidate.learning_rates) > 1,
            "seeds": sorted(result["seed"] for result in found),
            "diverged": sum("stopped" in results[cell] for cell in cells),
            "missing": self.missing(candidate, results),
        }
        for part in ("dev", "test") if found else ():
            names = found[0][part]
            row[part] = {name: spread([r[part][name] for r in found]) for name in names}
        return row


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """The mean, and the standard deviation (n - 1), which one value has not.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([5.0])
        ({'mean': 2.0, 'deviation': 1.0}, {'mean': 5.0, 'deviation': None})
    """
    known = len(values) > 1 and all(map(math.isfinite, values))
    deviation = statistics.stdev(values) if known else None
    return {"mean": statistics.fmean(values), "deviation": deviation}
