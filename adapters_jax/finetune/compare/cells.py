"""The directories of a comparison's cells, and a console that prints little for each cell."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from adapters_jax.auditing import audit
from adapters_jax.errors import UserError
from adapters_jax.finetune.compare.grid import Candidate, Cell, Result
from adapters_jax.finetune.compare.options import CompareOptions
from adapters_jax.finetune.console import Console, Progress
from adapters_jax.finetune.options.flags import words
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.pretrained.record import CHANGES, changes
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.config import changed_versions, differences, read_options
from adapters_jax.finetune.runs.prepare import prepare_run

# Settings that differ between cells of a recipe, and those of the optimizer.
# Rows are packed in an order of their seed, so their tokens differ as well.
_OWN = ("seed", "optimizer", "options", "command", "summary", "stopped", CHANGES, "tokens_sha256")
_OWN_RATES = ("learning_rate", "head_learning_rate")
# The steps that take as long as compiling the programs of a cell: on a CPU those of MiniLM, by
# measurement; elsewhere a guess, since the steps of an accelerator are far shorter.
COMPILING = {"cpu": 4.0}
_ELSEWHERE = 100.0


@dataclass(frozen=True)
class Checked:
    """A recipe that was attached to the model.

    Attributes:
        trainable_parameters: the number of trainable parameters, with a head's.
        base_parameters: the number of parameters of the base model.
        steps: the number of training steps.
    """

    config: dict[str, Any]
    trainable_parameters: int
    base_parameters: int
    steps: int


def check_recipes(
    options: CompareOptions, candidates: Sequence[Candidate], directory: Path, console: Console
) -> dict[str, Checked]:
    """Attaches each recipe to the model; returns what it trains, by its text.

    Raises:
        UserError: the message has the problem of each recipe; a problem of all is named once.
    """
    found: dict[str, Checked] = {}
    wrong: dict[str, str] = {}
    quiet = CellConsole(console)
    with console.progress("checking", len(candidates), "recipe") as progress:
        for number, candidate in enumerate(candidates, 1):
            cell = Cell(candidate.text, candidate.learning_rates[0], options.seeds[0])
            run, began = Run(directory / cell.name), time.perf_counter()
            try:
                job = prepare_run(options.run_options(cell), run, quiet, began)
                counts = audit(job.problem.model, job.problem.params)
            except UserError as error:
                wrong[candidate.text] = str(error)
            else:
                trainable = counts.trainable_parameters
                base = counts.frozen_parameters + trainable - counts.adapter_parameters
                steps = job.optimizer.steps(len(job.problem.train))
                found[candidate.text] = Checked(job.config, trainable, base, steps)
            progress.update(number, candidate.text)
    if len(wrong) == len(candidates) and len({*wrong.values()}) == 1:
        raise UserError(wrong[candidates[0].text])
    if wrong:
        raise UserError("; ".join(f"--recipes {text!r}: {e}" for text, e in wrong.items()))
    seen: dict[str, str] = {}
    for text, checked in found.items():
        optimizer = {**checked.config["optimizer"], "learning_rate": None}
        first = seen.setdefault(repr((checked.config["recipe"], optimizer)), text)
        if first != text:
            raise UserError(f"--recipes {first!r} and {text!r} are one recipe; leave one out")
    return found


def shared_sizes(
    candidates: Sequence[Candidate], checked: Mapping[str, Checked]
) -> dict[str, tuple[str, int]]:
    """The rank or width in whose program each recipe trains: that of the largest one beside it.

    Recipes share a program if they differ in their size alone. Where the products of the padding
    would take longer than compiling, a recipe shares with the next smaller ones.

    Returns:
        The field of the size, and the largest one, by the text of a recipe; without the recipes
        that share with none.
    """
    # A base's parameter costs two products of a token in a step, an adapter's three.
    worth = COMPILING.get(jax.default_backend(), _ELSEWHERE) / 1.5
    families: dict[str, list[Candidate]] = {}
    for each in candidates:
        if each.size is not None:
            families.setdefault(each.family, []).append(each)
    found = dict[str, tuple[str, int]]()
    for family in families.values():
        groups: list[list[Candidate]] = []
        for each in sorted(family, key=lambda each: each.size or 0, reverse=True):
            own = checked[each.text]
            widest = checked[groups[-1][0].text] if groups else own
            more = widest.trainable_parameters - own.trainable_parameters
            if groups and more * own.steps <= worth * own.base_parameters:
                groups[-1].append(each)
            else:
                groups.append([each])
        for group in (group for group in groups if len(group) > 1):
            size = group[0].size_name or "", group[0].size or 0
            found |= dict.fromkeys((each.text for each in group), size)
    return found


@dataclass(frozen=True)
class Cells:
    """The directories of the cells, and the checked recipes by their text."""

    directory: Path
    checked: dict[str, Checked]

    def run(self, cell: Cell) -> Run:
        """The directory of a cell."""
        return Run(self.directory / cell.name)

    def check(
        self,
        cells: Sequence[Cell],
        options: Callable[[Cell], RunOptions],
        console: Console,
        any_base: bool = False,
    ) -> None:
        """Checks that existing cells belong to this comparison, and that no process uses them.

        Args:
            options: returns the options of a cell.
            any_base: say what changed of the base, instead of raising an error.

        Raises:
            RunError: a cell belongs to another comparison, or another process uses it.
        """
        notes = set[str]()
        for cell in cells:
            run = self.run(cell)
            if not run.path.exists():
                continue
            config = run.read_config(None)
            notes |= self._check_same(cell, config, options(cell), any_base)
            now = self.checked[cell.recipe].config
            if config.get("versions", now["versions"]) != now["versions"]:
                notes.add(changed_versions(config, now))
            if not {"summary", "stopped"} & config.keys():
                run.unlock(run.lock())
        for text in sorted(notes):
            console.say(text)

    def _check_same(
        self, cell: Cell, config: dict[str, Any], options: RunOptions, any_base: bool
    ) -> set[str]:
        """Raises RunError if a cell belongs to another comparison; returns notes on its base."""
        run, fix = self.run(cell), "put that back, or compare in another --out"
        was, now = _flags_of_result(read_options(run, config)), _flags_of_result(options)
        there, here = [w for w in was if w not in now], [w for w in now if w not in was]
        expected = _shared(self.checked[cell.recipe].config)
        differing = differences(_shared(config), expected)
        if there or here:
            what = f"{' '.join(there) or 'less'}, and now it is {' '.join(here) or 'less'}"
        elif differing:
            what = f"another {', '.join(differing)} than there is now"
        else:
            found = changes(run, _shared(config), expected)
            if not found or any_base:
                return {f"a cell was made with another base: {change}" for change in found}
            what, fix = f"another base: {'; '.join(found)}", f"{fix}, or add --any-base"
        raise RunError(f"{run.path} was made with {what}; {fix}")

    def results(self, cells: Sequence[Cell]) -> dict[Cell, Result]:
        """The results of the finished cells."""
        found = {cell: self.result(cell) for cell in cells if self.run(cell).path.exists()}
        return {cell: result for cell, result in found.items() if result is not None}

    def result(self, cell: Cell) -> Result | None:
        """The result of a cell; None if it is not finished."""
        config = self.run(cell).read_config(None)
        found: Result = {
            "recipe": cell.recipe,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "run": cell.name,
        }
        if "stopped" in config:
            return {**found, "stopped": config["stopped"]}
        if "summary" not in config:
            return None
        summary = config["summary"]
        try:
            return {
                **found,
                "trainable_parameters": summary["trainable_parameters"],
                "dev": summary["dev"],
                "test": summary["results"][-1]["test"],
                "best_step": summary["best_step"],
                "seconds": summary["seconds"],
            }
        except (LookupError, TypeError) as error:
            raise RunError(
                f"{self.run(cell).config} is damaged: its summary lacks {error}; remove that run, "
                "and it is trained again"
            ) from error


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that all cells of a recipe share."""
    optimizer = {k: v for k, v in (config.get("optimizer") or {}).items() if k not in _OWN_RATES}
    kept = {k: v for k, v in config.items() if k not in (*_OWN, "versions")}
    return {**kept, "optimizer": optimizer}


def _flags_of_result(options: RunOptions) -> list[str]:
    """The flags that a run's result depends on: all but --checkpoint-every."""
    return words(replace(options, checkpoint_every=RunOptions.checkpoint_every))


class CellConsole(Console):
    """The console of a cell: prints each line once for all cells, and no tables."""

    def __init__(
        self, console: Console, on_progress: Callable[[float, str], None] = lambda part, note: None
    ):
        self.json, self.printer = console.json, console.printer
        self._on_progress, self._printed = on_progress, set[str]()

    def say(self, text: str = "") -> None:
        """Prints a line if it was not printed before."""
        if text not in self._printed:
            self._printed.add(text)
            super().say(text)

    def announce(self, text: str) -> None:
        """Prints nothing: the comparison has a bar."""

    def show(self, thing: Any) -> None:
        """Prints nothing."""

    def finish(self, header: list[str], rows: list[list[str]], text: str, value: Any) -> None:
        """Prints nothing."""

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows nothing: the comparison has a bar."""
        yield

    @contextlib.contextmanager
    def progress(
        self,
        title: str,
        steps: int,
        unit: str = "step",
        left: Callable[[], float | None] | None = None,
        first: str = "",
    ) -> Iterator[Progress]:
        """Passes the progress of a cell on to the comparison."""
        if first:
            self._on_progress(0.0, first)
        yield _CellProgress(steps, self._on_progress)


@dataclass(frozen=True)
class _CellProgress:
    steps: int
    on_progress: Callable[[float, str], None]

    def update(self, step: int, note: str, news: bool = False) -> None:
        words = f"step {step} of {self.steps}  {note}"
        self.on_progress(step / self.steps, words.rstrip())
