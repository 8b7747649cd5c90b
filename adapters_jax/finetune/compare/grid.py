"""The grid of recipes, learning rates and seeds: orders its cells, and summarises their results.

All learning rates are tried with the first seeds, and the best on dev is chosen. The other seeds
use only the chosen rate.
"""

import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.finetune.options.flags import flag, words
from adapters_jax.finetune.options.method import DEFAULT, SIZES, MethodOptions
from adapters_jax.finetune.options.parsing import UsageError, parse
from adapters_jax.finetune.tasks.metrics import better

RATES = "--learning-rates"
_SIZED = ("houlsby --bottleneck-dim 8", "houlsby --bottleneck-dim 64", "lora --rank 8")
RECIPES = {  # of a comparison that names none, by the kind of base
    "encoder": (*_SIZED, "layer-norms", "bitfit", "last-layers --layers 1", "full"),
    "decoder": (*_SIZED, "llama-adapter", "last-layers --layers 1", "full"),
}
Result = dict[str, Any]  # the result of a cell, which is a line of cells.jsonl


@dataclass(frozen=True)
class Candidate:
    """A recipe to compare, and the learning rates to try.

    Attributes:
        text: the recipe as it was written, without its learning rates.
        learning_rates: the learning rates, at least one.
    """

    text: str
    method: MethodOptions
    learning_rates: tuple[float, ...]

    @property
    def size(self) -> int | None:
        """The width, rank or number that distinguishes recipes of a family; None if not given."""
        return None if self.size_name is None else getattr(self.method, self.size_name)

    @property
    def size_name(self) -> str | None:
        """The field that holds the size."""
        return None if self.method.recipe else SIZES.get(self.method.title)

    @property
    def family(self) -> str:
        """The text of the recipe without its size, equal for recipes that differ only in it."""
        if self.method.recipe is not None:
            return self.text
        open_size: dict[str, Any] = {self.size_name: None} if self.size_name else {}
        without = replace(self.method, method=None, **open_size)
        return " ".join([self.method.title, *words(without)])


@dataclass(frozen=True)
class _Written:
    """The flags in the text of a recipe."""

    method: MethodOptions
    learning_rates: tuple[float, ...] = ()


def read_candidate(
    text: str,
    learning_rates: Sequence[float] = (),
    rate: Callable[[MethodOptions], float] = attrgetter("learning_rate"),
) -> Candidate:
    """Reads the text of a recipe.

    Args:
        text: a method and its flags, or a recipe file whose name ends in .json; optionally with its
            own --learning-rates.
        learning_rates: the learning rates if the text has none; by default the method's.
        rate: gives the default learning rate of a method.

    Raises:
        UsageError: the text does not have this form.

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
    rates = rates or (rate(written.method),)
    without = re.sub(rf"\s+{RATES}[=\s]+\S+(\s+(?!-)\S+)*", "", text).strip()
    return Candidate(without, written.method, rates)


def read_candidates(
    texts: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    tuning_seeds: int,
    rate: Callable[[MethodOptions], float] = attrgetter("learning_rate"),
) -> tuple[Candidate, ...]:
    """Reads the recipes of a comparison, and checks its numbers.

    Raises:
        UserError: a text, a rate or a seed cannot be used, or two cells are the same.
    """
    if not seeds:
        raise UserError("--seeds: expected at least one")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds {seed}: expected numbers from 0 to 2**32 - 1")
    check_size("the comparison", "--tuning-seeds", tuning_seeds)
    if tuning_seeds > len(seeds):
        raise UserError(f"--tuning-seeds {tuning_seeds}: more than the {len(seeds)} --seeds")
    candidates = tuple(read_candidate(text, learning_rates, rate) for text in texts)
    for candidate in candidates:
        for each in candidate.learning_rates:
            check_number(f"{candidate.text!r}", "--learning-rates", each)
    twice = [str(seed) for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise UserError(f"--seeds {' '.join(twice)}: expected each seed once")
    cells = (Cell(each.text, rate, seeds[0]) for each in candidates for rate in each.learning_rates)
    same = [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]
    if same:
        raise UserError(
            f"two recipes or rates would share the directory {same[0]}; leave one of them out"
        )
    return candidates


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        learning_rate: the highest learning rate.
    """

    recipe: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's directory.

        Example:
            >>> Cell("lora --rank 4", 2e-3, 1).name
            'lora-rank-4-lr-0.002-seed-1'
        """
        slug = re.sub(r"[^\w.]+", "-", self.recipe).strip("-")
        return f"{slug}-lr-{self.learning_rate:g}-seed-{self.seed}"

    @property
    def title(self) -> str:
        """The name of the cell for people."""
        return f"{self.recipe}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """All cells; its methods take the results so far, by cell.

    A result has "dev" and "test", each a dictionary of metrics, or "stopped" if the cell diverged.

    Attributes:
        tuning_seeds: the number of first seeds that try every learning rate.
        metric: the metric that selects.
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
        """The next cell to run; all recipes run with one seed before the next seed.

        Returns:
            The cell; None if all are finished.
        """
        for i, seed in enumerate(self.seeds):
            for candidate in self.candidates:
                rates = candidate.learning_rates
                if i >= self.tuning_seeds:
                    chosen = self.chosen(candidate, results)
                    rates = () if chosen is None else (chosen,)
                for rate in rates:
                    cell = Cell(candidate.text, rate, seed)
                    if cell not in results:
                        return cell
        return None

    def beside(self, cell: Cell, results: Mapping[Cell, Result]) -> list[Cell]:
        """The cells of a cell's recipe that can be trained now, that cell first."""
        (candidate,) = (each for each in self.candidates if each.text == cell.recipe)
        first, last = self.seeds[: self.tuning_seeds], self.seeds[self.tuning_seeds :]
        tuning = cell.seed in first
        seeds, rates = (first, candidate.learning_rates) if tuning else (last, [cell.learning_rate])
        every = [Cell(candidate.text, rate, seed) for seed in seeds for rate in rates]
        return [cell, *(each for each in every if each not in results and each != cell)]

    def chosen(self, candidate: Candidate, results: Mapping[Cell, Result]) -> float | None:
        """The learning rate with the best mean on dev; the first one if several are equal.

        None if some rates are not tried yet, or if each diverged with some seed. A single rate is
        always chosen.
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
        """The number of cells of a recipe that have to run."""
        rates = candidate.learning_rates
        tried = [Cell(candidate.text, r, s) for r in rates for s in self.seeds[: self.tuning_seeds]]
        untried = sum(cell not in results for cell in tried)
        others, chosen = self.seeds[self.tuning_seeds :], self.chosen(candidate, results)
        if chosen is None:  # all rates diverged, or some are not tried
            return untried + (len(others) if untried else 0)
        return untried + sum(Cell(candidate.text, chosen, s) not in results for s in others)

    def row(self, candidate: Candidate, results: Mapping[Cell, Result]) -> dict[str, Any]:
        """Summarises a recipe: mean and deviation of every metric over the seeds of its rate.

        "dev" and "test" are absent if the rate is not chosen yet, or if no seed has a score.
        """
        rate = self.chosen(candidate, results)
        tried = [cell for cell in results if cell.recipe == candidate.text]
        cells = [cell for cell in tried if rate in (None, cell.learning_rate)]
        found = [results[c] for c in cells if rate is not None and "stopped" not in results[c]]
        row: dict[str, Any] = {
            "recipe": candidate.text,
            "method": candidate.method.method or DEFAULT,
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
    """The mean, and the standard deviation (n - 1); None for a single value.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([5.0])
        ({'mean': 2.0, 'deviation': 1.0}, {'mean': 5.0, 'deviation': None})
    """
    known = len(values) > 1 and all(map(math.isfinite, values))
    deviation = statistics.stdev(values) if known else None
    return {"mean": statistics.fmean(values), "deviation": deviation}
