"""The options of a comparison, which are checked before the first cell trains."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.flags import words
from adapters_jax.finetune.options.settings import RunOptions, Settings

if TYPE_CHECKING:
    from adapters_jax.finetune.compare.cells import Cells, Checked
    from adapters_jax.finetune.compare.grid import Candidate, Cell, Grid


RECIPES: dict[str, tuple[str, ...]] = {
    "encoder": (
        "houlsby --bottleneck-dim 8",
        "houlsby --bottleneck-dim 64",
        "lora --rank 8",
        "layer-norms",
        "bitfit",
        "last-layers --layers 1",
        "full",
    ),
    "decoder": (
        "houlsby --bottleneck-dim 8",
        "houlsby --bottleneck-dim 64",
        "lora --rank 8",
        "llama-adapter",
        "last-layers --layers 1",
        "full",
    ),
}


@dataclass(frozen=True)
class CompareOptions(Settings):
    """The recipes, learning rates and seeds of a comparison.

    Args:
        recipes: each a method and its flags as for finetune, such as "lora --rank 4", or a recipe
            file, such as recipe.json. Each may have its own --learning-rates. By default several
            methods.
        learning_rates: rates to try for recipes without their own; by default each method's.
        seeds: seeds to train with.
        tuning_seeds: number of seeds that try all learning rates; the others use the best one.
        out: directory of the comparison; by default comparisons/ with the model and the task.
        together: train the rates and seeds of a recipe in one program, where a first step of it is
            faster than theirs one by one.
    """

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Comparison": ("recipes", "learning_rates", "seeds", "tuning_seeds", "out", "together"),
    }
    recipes: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    out: Path | None = None
    together: bool = False

    def check(self, console: Console) -> tuple[CompareOptions, Grid, Cells, Path]:
        """Reads and checks everything, and writes nothing.

        Every recipe is attached to the model, and existing cells must belong to this comparison.

        Returns:
            These options with the model pinned, the grid, its cells, and the directory.

        Raises:
            UserError: flags, files or rows cannot be used.
            RunError: existing cells belong to another comparison.
            AssetError: the pinned model or the movie reviews could not be fetched.
        """
        from adapters_jax.finetune.compare.cells import Cells
        from adapters_jax.finetune.compare.grid import Grid
        from adapters_jax.finetune.pretrained.locate import pinned

        path = Path(self.model)
        model = str(path.resolve()) if path.exists() else pinned(self.model)
        options = replace(self, model=model)
        candidates = options._candidates()
        out = options._directory()
        checked = options._check_recipes(candidates, out, console)
        first = checked[candidates[0].text].config
        grid = Grid(candidates, self.seeds, self.tuning_seeds, first["metrics"][0])
        cells = Cells(out / "cells", checked)
        cells.check(grid.possible(), options.run_options, console)
        return options, grid, cells, out

    @property
    def command(self) -> str:
        """The command line that continues this comparison."""
        own = {field.name: getattr(self, field.name) for field in fields(CompareOptions)}
        return shlex.join(["adapters-jax", "compare", *words(CompareOptions(**own))])

    def run_options(self, cell: Cell) -> RunOptions:
        """The options of a cell's run."""
        from adapters_jax.finetune.compare.grid import read_candidate

        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Settings)}
        rate = replace(self.optimizer, learning_rate=cell.learning_rate)
        method = read_candidate(cell.recipe).method
        return RunOptions(
            **{**shared, "optimizer": rate}, method=method, seed=cell.seed, baselines=False
        )

    def _candidates(self) -> tuple[Candidate, ...]:
        """Checks the flags; returns the recipes."""
        from adapters_jax.finetune.compare.grid import read_candidate
        from adapters_jax.finetune.pretrained.locate import is_decoder

        if self.optimizer.learning_rate is not None:
            raise UserError(
                f"--learning-rate {self.optimizer.learning_rate:g}: write --learning-rates"
            )
        if not self.seeds:
            raise UserError("--seeds: expected at least one")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"--seeds {seed}: expected numbers from 0 to 2**32 - 1")
        check_size("the comparison", "--tuning-seeds", self.tuning_seeds)
        if self.tuning_seeds > len(self.seeds):
            raise UserError(
                f"--tuning-seeds {self.tuning_seeds}: more than the {len(self.seeds)} --seeds"
            )
        kind: Literal["decoder", "encoder"] = "decoder" if is_decoder(self.model) else "encoder"
        texts = self.recipes or RECIPES[kind]
        candidates = tuple(read_candidate(text, self.learning_rates) for text in texts)
        for candidate in candidates:
            for rate in candidate.learning_rates:
                check_number(f"{candidate.text!r}", "--learning-rates", rate)
        _refuse_twice(self.seeds, candidates)
        return candidates

    def _directory(self) -> Path:
        """The directory of the comparison."""
        from adapters_jax.finetune.run_directory import RunError, run_name

        out = self.out or Path("comparisons", run_name(self.model, self.data.title))
        for directory in (out, out / "cells"):
            if directory.exists() and not directory.is_dir():
                raise RunError(
                    f"{directory} is a file; expected a directory of a comparison in --out"
                )
        return out

    def _check_recipes(
        self, candidates: tuple[Candidate, ...], out: Path, console: Console
    ) -> dict[str, Checked]:
        """Attaches each recipe to the model; returns what it trains, by its text.

        Raises:
            UserError: the message has the problem of each recipe; a problem of all is named once.
        """
        from adapters_jax.finetune.compare.cells import CellConsole
        from adapters_jax.finetune.compare.grid import Cell

        found: dict[str, Checked] = {}
        wrong: dict[str, str] = {}
        quiet = CellConsole(console)
        with console.progress("checking", len(candidates), "recipe") as progress:
            for number, candidate in enumerate(candidates, 1):
                cell = Cell(candidate.text, candidate.learning_rates[0], self.seeds[0])
                try:
                    found[candidate.text] = self._check_cell(cell, out / "cells", quiet)
                except UserError as error:
                    wrong[candidate.text] = str(error)
                progress.update(number, candidate.text)
        if len(wrong) == len(candidates) and len({*wrong.values()}) == 1:
            raise UserError(wrong[candidates[0].text])
        if wrong:
            raise UserError("; ".join(f"--recipes {text!r}: {e}" for text, e in wrong.items()))
        _refuse_same(found)
        return found

    def _check_cell(self, cell: Cell, directory: Path, console: Console) -> Checked:
        """Reads and checks a cell as before its training."""
        from adapters_jax.auditing import audit
        from adapters_jax.finetune.compare.cells import Checked
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.finetune.runs.prepare import prepare_run

        run = Run(directory / cell.name)
        job = prepare_run(self.run_options(cell), run, console, time.perf_counter())
        counts = audit(job.problem.model, job.problem.params)
        trainable = counts.trainable_parameters
        base = counts.frozen_parameters + trainable - counts.adapter_parameters
        return Checked(job.config, trainable, base)


def _refuse_twice(seeds: tuple[int, ...], candidates: tuple[Candidate, ...]) -> None:
    """Raises UserError if two cells have the same directory."""
    from adapters_jax.finetune.compare.grid import Cell

    twice = [str(seed) for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise UserError(f"--seeds {' '.join(twice)}: expected each seed once")
    names = Counter(
        Cell(candidate.text, rate, 0).name[: -len("-seed-0")]
        for candidate in candidates
        for rate in candidate.learning_rates
    )
    same = [name for name, count in names.items() if count > 1]
    if same:
        raise UserError(
            f"two recipes or rates would share the directory {same[0]}-seed-{seeds[0]}; leave one "
            "of them out"
        )


def _refuse_same(found: dict[str, Checked]) -> None:
    """Raises UserError if two texts name the same recipe and training."""
    seen: dict[str, str] = {}
    for text, checked in found.items():
        optimizer = {**checked.config["optimizer"], "learning_rate": None}
        key = repr((checked.config["recipe"], optimizer))
        if key in seen:
            raise UserError(f"--recipes {seen[key]!r} and {text!r} are one recipe; leave one out")
        seen[key] = text
