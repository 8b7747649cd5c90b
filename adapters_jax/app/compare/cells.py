"""The cells of a comparison on disk: runs of finetune, whose words stay few."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters_jax.app.compare.grid import Cell, Result
from adapters_jax.app.console import Console, Progress
from adapters_jax.app.options.flags import words
from adapters_jax.app.options.settings import RunOptions
from adapters_jax.app.runs.config import changed_versions, differences, read_options
from adapters_jax.io.run_directory import Run, RunError

_OWN = (
    "seed",
    "optimizer",
    "options",
    "command",
    "summary",
    "stopped",
)  # differs from cell to cell
_OWN_RATES = ("learning_rate", "head_learning_rate")  # and of the optimizer


@dataclass(frozen=True)
class Checked:
    """A recipe that was put onto the model.

    Attributes:
        config: what a run of it would have as its configuration.
        trainable_parameters: of it, a head's among them.
        base_parameters: of the model it was put onto.
    """

    config: dict[str, Any]
    trainable_parameters: int
    base_parameters: int


@dataclass(frozen=True)
class Cells:
    """The directory of the cells.

    Attributes:
        directory: of their directories.
        checked: what their configurations have to say, by recipe.
    """

    directory: Path
    checked: dict[str, Checked]

    def run(self, cell: Cell) -> Run:
        """A cell's own directory."""
        return Run(self.directory / cell.name)

    def check(
        self, cells: Sequence[Cell], options: Callable[[Cell], RunOptions], output: Console
    ) -> None:
        """Checks the cells that are there: they must be of this comparison, and nobody's.

        Raises:
            RunError: one is of another comparison, or another process has it.
        """
        notes = set()
        for cell in cells:
            run = self.run(cell)
            if not run.path.exists():
                continue
            config = run.read_config(None)
            self._check_same(cell, config, options(cell))
            now = self.checked[cell.recipe].config
            if config.get("versions", now["versions"]) != now["versions"]:
                notes.add(changed_versions(config, now))
            if not {"summary", "stopped"} & config.keys():
                run.unlock(run.lock())
        for text in sorted(notes):
            output.say(text)

    def _check_same(self, cell: Cell, config: dict[str, Any], options: RunOptions) -> None:
        was, now = _telling(read_options(self.run(cell), config)), _telling(options)
        there, here = [w for w in was if w not in now], [w for w in now if w not in was]
        expected = _shared(self.checked[cell.recipe].config)
        differing = differences(_shared(config), expected)
        if there or here:
            path = self.run(cell).path
            what = f"{' '.join(there) or 'less'}, and now it is {' '.join(here) or 'less'}"
            raise RunError(
                f"{path} was made with {what}; put that back, or compare in another --out"
            )
        if differing:
            raise RunError(
                f"{self.run(cell).path} was made with another {', '.join(differing)} than there is "
                "now; put that back, or compare in another --out"
            )

    def results(self, cells: Sequence[Cell]) -> dict[Cell, Result]:
        """What the cells that are done found."""
        found = {cell: self.result(cell) for cell in cells if self.run(cell).path.exists()}
        return {cell: result for cell, result in found.items() if result is not None}

    def result(self, cell: Cell) -> Result | None:
        """What a cell found; None while it is not done."""
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
        return {
            **found,
            "trainable_parameters": summary["trainable_parameters"],
            "dev": summary["dev"],
            "test": summary["results"][-1]["test"],
            "seconds": summary["seconds"],
        }


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that all cells of a recipe have."""
    optimizer = {k: v for k, v in (config.get("optimizer") or {}).items() if k not in _OWN_RATES}
    kept = {k: v for k, v in config.items() if k not in (*_OWN, "versions")}
    return {**kept, "optimizer": optimizer}


def _telling(options: RunOptions) -> list[str]:
    """The flags that a run's result depends on, which is not how often it is saved."""
    return words(replace(options, checkpoint_every=RunOptions.checkpoint_every))


class CellConsole(Console):
    """The lines of a cell among many: each is printed once, and tables never.

    Args:
        output: the comparison's.
        tell: takes a cell's progress, as a fraction with a note.
    """

    def __init__(
        self, output: Console, tell: Callable[[float, str], None] = lambda part, note: None
    ):
        self.json, self.console = output.json, output.console
        self._tell, self._printed = tell, set[str]()

    def say(self, text: str = "") -> None:
        """One line, the first time."""
        if text not in self._printed:
            self._printed.add(text)
            super().say(text)

    def show(self, thing: Any) -> None:
        """Nothing."""

    def finish(self, header: list[str], rows: list[list[str]], text: str, value: Any) -> None:
        """Nothing."""

    @contextlib.contextmanager
    def progress(
        self,
        title: str,
        steps: int,
        unit: str = "step",
        left: Callable[[], float | None] | None = None,
    ) -> Iterator[Progress]:
        """What is done of the cell, for the whole's."""
        yield _Part(steps, self._tell)


@dataclass(frozen=True)
class _Part:
    """Progress of one cell."""

    steps: int
    tell: Callable[[float, str], None]

    def update(self, step: int, note: str, news: bool = False) -> None:
        self.tell(step / self.steps, f"step {step} of {self.steps}  {note}")
