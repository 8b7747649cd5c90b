"""`adapters-jax compare`: its flags, and all that is checked before the first cell trains."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from adapters_jax.audit import audit
from adapters_jax.compare.cells import CellOutput, Cells, Checked
from adapters_jax.compare.grid import Candidate, Cell, Grid, read_candidate
from adapters_jax.compare.work import Comparison
from adapters_jax.finetune.bases import is_decoder, pinned
from adapters_jax.finetune.flags import words
from adapters_jax.finetune.output import Output
from adapters_jax.finetune.run import Finetune
from adapters_jax.finetune.runs import Run, RunError, run_name
from adapters_jax.finetune.settings import Settings
from adapters_jax.methods.fields import check_number, check_size

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
AnyFinetune = TypeVar("AnyFinetune", bound=Finetune)


@dataclass(frozen=True)
class Compare(Settings):
    """Compares recipes on one task: what each reaches, against the parameters that it trains.

    Every recipe is trained with every learning rate and seed; each such cell is a run of finetune,
    in a directory of its own. The rate is chosen on dev, and what is reported is test: mean and
    standard deviation over the seeds. The same command goes on with a comparison that was cut off,
    and trains nothing twice.

    Args:
        recipes: each as one writes it for finetune, a method and its flags, as "lora --rank 4"; or
            a recipe file, as recipe.json. Each may have --learning-rates of its own. By default
            some of every kind.
        learning_rates: to try, of recipes that have none of their own; by default each method's.
        seeds: to train with.
        tuning_seeds: with so many of the seeds all rates are tried, with the others the best alone.
        out: directory of the comparison; by default comparisons/ and the model and the task.
        json: print JSON for machines on stdout; everything else goes to stderr.
    """

    examples: ClassVar[str] = """\
  adapters-jax compare --limit 1000 --seeds 0 1
  adapters-jax compare --recipes "houlsby --bottleneck-dim 8" "houlsby --bottleneck-dim 64" full
  adapters-jax compare --recipes "lora --rank 4 --learning-rates 1e-3 4e-3" mine.json --seeds 0 1
  adapters-jax compare --train train.csv --test test.csv --text review --label stars --out stars
  adapters-jax compare --model smollm2-135m --train e2e.csv --prompt mr --completion ref"""

    recipes: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    out: Path | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False

    def prepare(self, output: Output) -> Comparison:
        """Reads and checks everything: every recipe is put onto the model, and every cell that is
        there already must be of this comparison. The directory is made last.

        Raises:
            ValueError: flags, files or rows that cannot be used, or cells of another comparison.
            AssetError: the pinned model or the movie reviews could not be fetched.
            OSError: the directory cannot be made.
        """
        path = Path(self.model)
        model = str(path.resolve()) if path.exists() else pinned(self.model)
        options = replace(self, model=model)
        candidates = options._candidates()
        out = options._directory()
        checked = options._check_recipes(candidates, out, output)
        first = checked[candidates[0].text].config
        grid = Grid(candidates, self.seeds, self.tuning_seeds, first["metrics"][0])
        cells = Cells(out / "cells", checked)
        cells.check(grid.possible(), options.finetune, output)
        out.mkdir(parents=True, exist_ok=True)
        lock = Run(out).lock()
        return Comparison(options, grid, cells, out, output, lock)

    def finetune(self, cell: Cell, directory: Path) -> Finetune:
        """The run that a cell is."""
        return self._run(Finetune, cell, directory)

    @property
    def command(self) -> str:
        """The command line that goes on with this comparison."""
        return shlex.join(["adapters-jax", "compare", *words(replace(self, json=False))])

    def _run(self, kind: type[AnyFinetune], cell: Cell, directory: Path) -> AnyFinetune:
        """A cell as a `Finetune`, or as what is one in all but a few steps."""
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Settings)}
        rate = replace(self.optimizer, learning_rate=cell.learning_rate)
        return kind(
            **{**shared, "optimizer": rate},
            method=read_candidate(cell.recipe).method,
            seed=cell.seed,
            baselines=False,
            runs=directory,
            name=cell.name,
        )

    def _candidates(self) -> tuple[Candidate, ...]:
        """The recipes of the flags; the flags are checked."""
        if self.optimizer.learning_rate is not None:
            raise ValueError(
                f"--learning-rate {self.optimizer.learning_rate:g}: write --learning-rates"
            )
        if not self.seeds:
            raise ValueError("--seeds: wanted at least one")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise ValueError(f"--seeds {seed}: wanted numbers from 0 to 2**32 - 1")
        check_size("the comparison", "--tuning-seeds", self.tuning_seeds)
        if self.tuning_seeds > len(self.seeds):
            raise ValueError(
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
        """Where the comparison goes."""
        out = self.out or Path("comparisons", run_name(self.model, self.data.title))
        for directory in (out, out / "cells"):
            if directory.exists() and not directory.is_dir():
                raise RunError(
                    f"{directory} is a file; wanted a directory of a comparison in --out"
                )
        return out

    def _check_recipes(
        self, candidates: tuple[Candidate, ...], out: Path, output: Output
    ) -> dict[str, Checked]:
        """What each recipe would train, by its text.

        Raises:
            ValueError: with all that is wrong; once, where it has nothing to do with the recipe.
        """
        found: dict[str, Checked] = {}
        wrong: dict[str, str] = {}
        quiet = CellOutput(output)
        with output.progress("checking", len(candidates), "recipe") as meter:
            for number, candidate in enumerate(candidates, 1):
                cell = Cell(candidate.text, candidate.learning_rates[0], self.seeds[0])
                try:
                    found[candidate.text] = self._rehearse(cell, out / "cells", quiet)
                except ValueError as error:
                    wrong[candidate.text] = str(error)
                meter.update(number, candidate.text)
        if len(wrong) == len(candidates) and len({*wrong.values()}) == 1:
            raise ValueError(wrong[candidates[0].text])
        if wrong:
            raise ValueError("; ".join(f"--recipes {text!r}: {e}" for text, e in wrong.items()))
        _refuse_same(found)
        return found

    def _rehearse(self, cell: Cell, directory: Path, output: Output) -> Checked:
        """Reads and checks a cell as if it were to be trained now."""
        run = Run(directory / cell.name)
        rehearsal = self._run(_Rehearsal, cell, directory)
        job = rehearsal.prepare_in(run, output, time.perf_counter())
        counts = audit(job.problem.model, job.problem.params)
        trainable = counts.trainable_parameters
        base = counts.frozen_parameters + trainable - counts.adapter_parameters
        return Checked(job.config, trainable, base)


class _Rehearsal(Finetune):
    """A run that is read and checked like any other, and has no directory."""

    def open(self, run: Run, config: dict[str, Any], output: Output) -> int:
        """Leaves the disk as it is."""
        return -1


def _refuse_twice(seeds: tuple[int, ...], candidates: tuple[Candidate, ...]) -> None:
    """Raises ValueError where two cells would be one."""
    twice = [str(seed) for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise ValueError(f"--seeds {' '.join(twice)}: given twice; once is enough")
    names = Counter(
        Cell(candidate.text, rate, 0).name[: -len("-seed-0")]
        for candidate in candidates
        for rate in candidate.learning_rates
    )
    same = [name for name, count in names.items() if count > 1]
    if same:
        raise ValueError(
            f"two recipes or rates would share the directory {same[0]}-seed-{seeds[0]}; leave one "
            "of them out"
        )


def _refuse_same(found: dict[str, Checked]) -> None:
    """Raises ValueError where two texts mean one recipe, trained alike."""
    seen: dict[str, str] = {}
    for text, checked in found.items():
        optimizer = {**checked.config["optimizer"], "learning_rate": None}
        key = repr((checked.config["recipe"], optimizer))
        if key in seen:
            raise ValueError(f"--recipes {seen[key]!r} and {text!r} are one recipe; leave one out")
        seen[key] = text
