"""Compares AdapterFusion of three tasks' adapters with the best single one, on MiniLM.

As in Pfeiffer et al. 2021 (arXiv:2005.00247), each data set first gets a bottleneck adapter behind
the feed-forward layers, d / m = 16, and a head. Then the three adapters are loaded and frozen, and
each data set trains a fusion of them and a new head. The learning rate of the fusion is the best on
dev with the first seed; the adapters have the default of their method. A third contender is one
wide adapter, with as many trained parameters as the fusion and the default rate of its width.

All have the same rows in the same order: 600 in batches of 16, for 6 passes, 228 steps with a
rate that ends at 0. The last parameters are tested; dev chooses the fusion's rate and nothing
else. An interrupted run writes the tables of what is done, and the same command goes on: finished
cells are in fusion-cells.jsonl. The adapters are in comparisons/; one that is not there is trained
again when a fusion needs it.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import adapters_jax as aj
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.runs.prepare import prepare_run
from benchmarks.cells import SETS, Record
from benchmarks.harness import DATA, ROOT
from benchmarks.report import Report, Row

TASKS = ("wnut17", "cola", "movies")
ROWS, PASSES, BATCH, SEEDS = 600, 6.0, 16, (0, 1, 2)
OWN, FUSION, WIDE = "own adapter", "fusion of three", "one wide adapter"
METHODS = {
    OWN: "pfeiffer --bottleneck-dim 24",
    FUSION: "head-only --head-learning-rate 0.01",  # the default of the others; see `_problem`
    WIDE: "pfeiffer --bottleneck-dim 576",
}
RATES = (2e-3, 5e-4)  # of the fusion; the paper has 5e-5, for BERT-base and more steps


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        what: what is trained, a key of `METHODS`.
        data: the data set.
        seed: the seed.
        rate: the learning rate; None is the default of the method.
    """

    what: str
    data: str
    seed: int
    rate: float | None = None


class Trainings:
    """The finished cells, in a file of the results.

    Args:
        report: the report of the benchmark.
        rows, passes: the training rows of each data set, and the passes over them.
        more: more flags of every training.

    Attributes:
        record: the finished cells.
    """

    def __init__(self, report: Report, rows: int, passes: float, more: Sequence[str] = ()):
        self.record = Record(report, rows=rows, passes=passes, batch=BATCH)
        self.root = ROOT / "comparisons" / report.name / f"{rows}-{passes:g}"
        self.more = more

    def find(self, cell: Cell) -> Row | None:
        """The row of a cell, if it is finished."""
        return self.record.find(**dataclasses.asdict(cell))

    def train(self, cell: Cell) -> None:
        """Trains a cell, if it is not finished."""
        if self.find(cell):
            return
        if cell.what == FUSION:
            for task in TASKS:
                if not self._adapter(task, cell.seed).exists():
                    self._train(Cell(OWN, task, cell.seed))
        self._train(cell)

    def _train(self, cell: Cell) -> None:
        began = time.perf_counter()
        job = self._job(cell)
        problem = self._problem(job, cell)
        training = Training.begin(problem, job.optimizer, job.key)
        training.marks = {training.steps}
        training.train()
        best = training.best()
        if cell.what == OWN:
            recipe = problem.recipe[cell.data]  # without the head, which fits this task alone
            leaves = aj.partition(best.params, recipe)[0]
            aj.save_adapter(self._adapter(cell.data, cell.seed), leaves, recipe)
        result = {
            "learning_rate": job.optimizer.learning_rate,
            "trainable_parameters": sum(x.size for x in jax.tree.leaves(best.adapters)),
            "dev": training.dev,
            "test": problem.score(best, "test"),
            "seconds": round(time.perf_counter() - began, 1),
        }
        self.record.keep(result, **dataclasses.asdict(cell))

    def _adapter(self, data: str, seed: int) -> Path:
        return self.root / f"{data}-{seed}"

    def _job(self, cell: Cell) -> Job:
        """The rows, the base and a new head, as `adapters-jax finetune` prepares them."""
        shared = self.record.shared
        flags = f"{SETS[cell.data].format(DATA)} --limit {shared['rows']} --seed {cell.seed} "
        flags += f"--epochs {shared['passes']} --batch-size {BATCH} "
        flags += f"--method {METHODS[cell.what]} " + f"--learning-rate {cell.rate}" * bool(
            cell.rate
        )
        options = parse(RunOptions, [*flags.split(), *self.more])
        run, console = Run(self.root / "none"), Console(json=False)
        return prepare_run(options, run, console, time.perf_counter())

    def _problem(self, job: Job, cell: Cell) -> Any:
        """The problem of a job, with its adapter under the task's name, or with the fusion."""
        problem: Any = job.problem
        if cell.what != FUSION:
            entries = [
                dataclasses.replace(method, name=cell.data) if method.slot else method
                for method in problem.recipe
            ]
        prepared: Any = job.prepared
        width, inputs = problem.readout.width, [problem.batch(0)[name] for name in problem.inputs]
        head_key, key = jax.random.split(jax.random.key(cell.seed))
        model = prepared.encoder.classifier(width, dropout=0.0)
        params = prepared.encoder.init(width, head_key)
        if cell.what == FUSION:
            for task in TASKS:
                place = self._adapter(task, cell.seed)
                model, params = aj.load_adapter(place, model, params, *inputs, train=False)
            entries = [*aj.fuse(*TASKS), *problem.recipe]
        model = aj.adapt(model, entries)
        params = aj.init_adapters(model, params, key, *inputs)
        return dataclasses.replace(problem, model=model, params=params)


def run(report: Report, quick: bool) -> None:
    """Trains the cells that are missing; a few steps of each contender if quick."""
    if quick:
        trainings, seeds = Trainings(report, 32, 1.0, ["--max-length", "16"]), SEEDS[:1]
    else:
        trainings, seeds = Trainings(report, ROWS, PASSES, ["--max-length", "64"]), SEEDS
    with contextlib.suppress(KeyboardInterrupt):  # the tables then hold what is done
        for cell in planned(trainings, seeds, RATES[: 1 if quick else None]):
            trainings.train(cell)
    write(report, trainings, seeds)


def planned(trainings: Trainings, seeds: Sequence[int], rates: Sequence[float]) -> Iterator[Cell]:
    """The cells, the most telling first; the rate of further seeds is the best of the first."""
    for seed in seeds:
        yield from (Cell(OWN, data, seed) for data in TASKS)
        if seed == seeds[0]:
            yield from (Cell(FUSION, data, seed, rate) for rate in rates for data in TASKS)
        else:
            yield from (Cell(FUSION, data, seed, best(trainings, data)) for data in TASKS)
    for seed in seeds:
        yield from (Cell(WIDE, data, seed) for data in TASKS)


def best(trainings: Trainings, data: str) -> float | None:
    """The fusion's learning rate that is best on dev with the first seed; None without a cell."""
    tried = [trainings.find(Cell(FUSION, data, SEEDS[0], rate)) for rate in RATES]
    done = [row for row in tried if row]
    return max(done, key=lambda row: row["score"]["dev"])["rate"] if done else None


def write(report: Report, trainings: Trainings, seeds: Sequence[int]) -> None:
    """Writes the tables of finished cells."""
    report.add(
        "Cells that are done; the same command goes on",
        done=len(trainings.record.rows),
        hours=sum(row["seconds"] for row in trainings.record.rows) / 3600,
    )
    for rate in RATES:
        found = {data: trainings.find(Cell(FUSION, data, SEEDS[0], rate)) for data in TASKS}
        scores = {data: 100 * row["score"]["dev"] for data, row in found.items() if row}
        if scores:
            report.add(
                f"Dev x 100 of the fusion, seed {SEEDS[0]}", **{"learning rate": rate, **scores}
            )
    for data in TASKS:
        _compare(report, trainings, data, seeds)


def _compare(report: Report, trainings: Trainings, data: str, seeds: Sequence[int]) -> None:
    """Writes the rows of a data set."""
    contenders = {OWN: None, FUSION: best(trainings, data), WIDE: None}
    scores: dict[str, dict[int, float]] = {}
    metric = ""
    for what, rate in contenders.items():
        cells = [trainings.find(Cell(what, data, seed, rate)) for seed in seeds]
        done = [row for row in cells if row]
        if not done:
            continue
        metric = done[0]["metric"]
        scores[what] = {row["seed"]: 100 * row["score"]["test"] for row in done}
        report.add(
            "Test x 100",
            data=data,
            metric=metric,
            what=what,
            trainable=done[0]["trainable_parameters"],
            **{"learning rate": done[0]["learning_rate"]},
            **_spread([*scores[what].values()]),
        )
    for what in (OWN, WIDE):
        both = sorted(scores.get(what, {}).keys() & scores.get(FUSION, {}).keys())
        if both:
            points = [scores[FUSION][seed] - scores[what][seed] for seed in both]
            each = ", ".join(f"{gained:+.1f}" for gained in points)
            spread = {**_spread(points), "each": each}
            report.add("Points that the fusion is above, by seed", data=data, over=what, **spread)
        if both and what == OWN:
            claim = f"{data}, test {metric} x 100: points that its own adapter is above a fusion"
            report.claim(claim, 0.0 - statistics.fmean(points), 0.0)


def _spread(values: Sequence[float]) -> Row:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"seeds": len(values), "mean": statistics.fmean(values), "deviation": deviation}
