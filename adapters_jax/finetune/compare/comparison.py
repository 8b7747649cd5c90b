"""Checks a comparison, runs its cells one by one, and writes the results after each."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from adapters_jax.errors import FileSystemError, RecipeError, UserError, file_errors
from adapters_jax.finetune.compare.cells import CellConsole, Cells, check_recipes, shared_sizes
from adapters_jax.finetune.compare.grid import RECIPES, Cell, Grid, Result, read_candidates
from adapters_jax.finetune.compare.options import CompareOptions
from adapters_jax.finetune.compare.summary import summarize, write_comparison
from adapters_jax.finetune.compare.together import train_together
from adapters_jax.finetune.console import Console, Pace, Progress, duration
from adapters_jax.finetune.inference.comparison import comparison_table
from adapters_jax.finetune.options.flags import absolute
from adapters_jax.finetune.pretrained.locate import kind_of, pinned
from adapters_jax.finetune.run_directory import Run, RunError, run_name
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.runs.prepare import default_rate, open_run, prepare_run, resume_run
from adapters_jax.finetune.runs.stopping import InterruptedRunError, Interrupts, StoppedError
from adapters_jax.finetune.runs.widened import check_paddable, padded_problem, with_size
from adapters_jax.finetune.tasks.base import NotFiniteError
from adapters_jax.finetune.tasks.metrics import show_metric
from adapters_jax.recipe import Recipe

_CACHE = "jax_compilation_cache_dir"


def prepare_comparison(options: CompareOptions, console: Console) -> ComparisonJob:
    """Reads and checks everything, then makes the directory.

    Every recipe is attached to the model, and existing cells must belong to this comparison.

    Raises:
        UserError: flags, files or rows cannot be used.
        RunError: existing cells belong to another comparison, or another process uses it.
        AssetError: the pinned model or the movie reviews could not be fetched.
        FileSystemError: the directory cannot be made.
    """
    path = Path(options.model)
    model = str(absolute(path)) if path.exists() else pinned(options.model)
    options = replace(options, model=model)
    if options.optimizer.learning_rate is not None:
        raise UserError(
            f"--learning-rate {options.optimizer.learning_rate:g}: write --learning-rates"
        )
    texts = options.recipes or RECIPES.get(kind_of(model), RECIPES["encoder"])
    seeds, tuning = options.seeds, options.tuning_seeds
    candidates = read_candidates(
        texts, options.learning_rates, seeds, tuning, lambda method: default_rate(method, model)
    )
    out = options.out or Path("comparisons", run_name(model, options.data.title))
    for directory in (out, out / "cells"):
        if directory.exists() and not directory.is_dir():
            raise RunError(f"{directory} is a file; expected a directory of a comparison in --out")
    checked = check_recipes(options, candidates, out / "cells", console)
    metric = checked[candidates[0].text].config["metrics"][0]
    grid, cells = Grid(candidates, seeds, tuning, metric), Cells(out / "cells", checked)
    cells.check(grid.possible(), options.run_options, console, options.any_base)
    with file_errors(out, "made"):
        out.mkdir(parents=True, exist_ok=True)
    sizes = shared_sizes(candidates, checked)
    return ComparisonJob(options, grid, cells, out, console, Run(out).lock(), sizes)


@dataclass(frozen=True)
class ComparisonJob:
    """A comparison that is ready to start or to continue; `prepare_comparison` makes it.

    Attributes:
        options: the options of the command.
        grid: the recipes, learning rates and seeds.
        cells: the directories of the cells.
        out: the directory of the comparison.
        console: the console to print to.
        lock: the lock of this process on the directory.
        sizes: the size of whose program each recipe trains in, as `shared_sizes` says.
    """

    options: CompareOptions
    grid: Grid
    cells: Cells
    out: Path
    console: Console
    lock: FileLock
    sizes: Mapping[str, tuple[str, int]]

    def __call__(self) -> None:
        """Trains the remaining cells, and writes the comparison after each.

        Raises:
            StoppedError: a signal arrived, the disk is full, or a cell failed; the same command
                continues the comparison.
        """
        again = f"go on with: {self.options.command}"
        try:
            with Interrupts() as interrupts, compiled_in(self.out / "compiled"):
                self._work(interrupts)
        except InterruptedRunError as error:
            raise StoppedError(f"{error}; {again}", error.status) from error
        except StoppedError as error:
            raise StoppedError(f"{error.__cause__ or error}; {again}", error.status) from error
        except (RunError, FileSystemError) as error:
            raise StoppedError(f"{error}; {again}") from error
        finally:
            Run(self.out).unlock(self.lock)

    def _work(self, interrupts: Interrupts) -> None:
        began = time.perf_counter()
        results = self.cells.results(self.grid.possible())
        pace = _Pace(self.grid, results)
        if results:
            self.console.say(f"{len(results)} cells are done already")
            self._write(results)
        first = "compiling" if pace.done < pace.total else ""
        with self.console.progress("compare", pace.total, "cell", pace.left, first) as progress:
            console = CellConsole(self.console, lambda part, note: pace.show(progress, part, note))
            while (cell := self.grid.next(results)) is not None:
                pace.start(cell)
                for each in self._advanced(cell, results, console, interrupts):
                    pace.start(each)
                    results[each] = self._train(each, console)
                    interrupts.check()
                    self._write(results)
                    progress.update(pace.done, self._outcome(results[each], each), news=True)
        summary = self._write(results)
        # The programs were there for the cells alone.
        shutil.rmtree(self.out / "compiled", ignore_errors=True)
        page = self.out / "comparison.html"
        took = f"finished in {duration(time.perf_counter() - began)}: see {page}"
        self.console.finish(*comparison_table(summary), took, summary)

    def _train(self, cell: Cell, console: Console) -> Result:
        """Trains or continues a cell; a cell that diverges has a result, too."""
        # The programs and arrays of the cell before hold as much memory as this one needs.
        jax.clear_caches()
        gc.collect()
        run, job = self.cells.run(cell), self._opened(cell, console)
        try:
            replace(job, widest=self._widest(job, cell, console))()
        except StoppedError as error:
            if not isinstance(error.__cause__, NotFiniteError):
                raise
        result = self.cells.result(cell)
        if result is None:
            raise RunError(f"{run.path} is not finished")
        return result

    def _opened(self, cell: Cell, console: Console) -> Job:
        """A cell's job, new or to be continued, with its directory locked."""
        run, began = self.cells.run(cell), time.perf_counter()
        try:
            if run.path.exists():
                return resume_run(run, console, began, self.options.any_base)
            return open_run(prepare_run(self.options.run_options(cell), run, console, began))
        except UserError as error:
            raise StoppedError(str(error)) from error

    def _widest(self, job: Job, cell: Cell, console: Console) -> Recipe | None:
        """The recipe in whose shapes a cell trains, in one program with others; None is its own."""
        if cell.recipe not in self.sizes:
            return None
        problem, (name, size) = job.prepared.trained, self.sizes[cell.recipe]
        widest = with_size(problem.recipe, name, size)
        try:
            check_paddable(problem, job.optimizer.optimizer)
            padded_problem(problem, widest)
        except RecipeError as error:
            (own,) = (each for each in self.grid.candidates if each.text == cell.recipe)
            console.say(f"{own.family}: each {name} has its own program: {error}")
            return None
        return widest

    def _advanced(
        self, cell: Cell, results: dict[Cell, Result], console: Console, interrupts: Interrupts
    ) -> list[Cell]:
        """The cells to train next, one by one; with --together, some are trained so far already."""
        cells = self.grid.beside(cell, results) if self.options.together else [cell]
        if len(cells) == 1:
            return cells
        jax.clear_caches()
        gc.collect()
        with contextlib.ExitStack() as stack:
            jobs = []
            for each in cells:
                jobs.append(self._opened(each, console))
                stack.callback(jobs[-1].unlock)
            done = train_together(jobs, interrupts, self.console.say)
        return [each for each, own in zip(cells, done, strict=True) if own] or cells

    def _outcome(self, result: Result, cell: Cell) -> str:
        if "stopped" in result:
            return f"{cell.title}: diverged"
        metric = self.grid.metric
        return f"{cell.title}: dev {metric} {show_metric(metric, result['dev'][metric])}"

    def _write(self, results: dict[Cell, Result]) -> dict[str, Any]:
        summary = summarize(self.options, self.grid, self.cells, self.out, results)
        write_comparison(self.out, summary, list(results.values()))
        return summary


@dataclass
class _Pace:
    """The progress of a comparison, and an estimate of its time from the finished cells.

    Attributes:
        began: the time at which it was started.
        steps: the seconds of its steps, without compiling.
        whole: the estimated seconds of all of it; None if they are not known yet.
    """

    grid: Grid
    results: dict[Cell, Result]
    total: int = 0
    cell: Cell | None = None
    began: float = field(default_factory=time.monotonic)
    steps: Pace = field(default_factory=Pace)
    whole: float | None = None

    def __post_init__(self) -> None:
        self.total = len(self.results) + self._missing

    @property
    def _missing(self) -> int:
        return sum(self.grid.missing(c, self.results) for c in self.grid.candidates)

    @property
    def done(self) -> int:
        """The number of cells that are finished or not needed."""
        return self.total - self._missing

    def start(self, cell: Cell) -> None:
        """Notes that another cell is running."""
        self.cell, self.began = cell, time.monotonic()
        self.steps, self.whole = Pace(), None

    def show(self, progress: Progress, part: float, note: str) -> None:
        """Shows the progress of the running cell; `part` is its finished fraction, from 0 to 1."""
        if not part:
            self.steps = Pace()  # as for the features of a head, and then for its training
        else:
            now = time.monotonic()
            pace = self.steps.at(part)
            self.whole = now - self.began + pace * (1 - part) if pace is not None else None
        if self.cell is not None:
            progress.update(self.done, f"{self.cell.title}  {note}")

    def left(self) -> float | None:
        """The estimated seconds that are left; None if they are not known yet."""
        took = {cell: r["seconds"] for cell, r in self.results.items() if "seconds" in r}
        if not took and self.whole is None:
            return None
        mean = sum(took.values()) / len(took) if took else self.whole or 0.0

        def expected(recipe: str) -> float:
            own = [seconds for cell, seconds in took.items() if cell.recipe == recipe]
            return sum(own) / len(own) if own else mean

        left = sum(
            self.grid.missing(c, self.results) * expected(c.text) for c in self.grid.candidates
        )
        if self.cell is not None and self.cell not in self.results:
            left -= min(time.monotonic() - self.began, expected(self.cell.recipe))
        return left


@contextlib.contextmanager
def compiled_in(directory: Path) -> Iterator[None]:
    """Within, jax caches compiled programs in a directory, which the next seed reads.

    If jax is configured with a cache directory, it keeps that one.
    """
    if getattr(jax.config, _CACHE) is not None:
        yield
        return
    settings: dict[str, Any] = {
        _CACHE: os.fspath(directory.absolute()),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # jax opens its cache once, and reads a new directory only after a reset.
    compilation_cache.reset_cache()
