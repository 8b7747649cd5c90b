"""Removes the adapters of layers, and starts from other scales, as Houlsby et al. 2019 (figure 6).

Houlsby's adapters, m = 64, train on MiniLM with the rows, the passes and the best learning rate of
`tradeoff`. The standard deviation of their initial kernels is the paper's 1e-2, or 1e-7 or 1, the
ends of what the paper tries. From each training that began with 1e-2, the adapters of every span of
layers are removed, without training again, and dev is scored by the first metric of the data set;
layer norms and head stay as they were trained. The paper shows the accuracy on MNLI and CoLA; here
it is that of movie reviews, and F1 of entities in WNUT-17, since 2,000 rows of CoLA train MiniLM to
less than the accuracy of its largest class. An interrupted run writes the tables of what is done,
and the same command goes on.
"""

import contextlib
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.runs.prepare import prepare_run
from adapters_jax.finetune.tasks.base import NotFiniteError
from adapters_jax.trees import Tree, flatten, with_leaves
from benchmarks.cells import SETS, Record
from benchmarks.harness import DATA, ROOT
from benchmarks.report import Report, Row, Verdict, welch
from benchmarks.tradeoff import HOULSBY, PASSES, ROWS

RATES = {"wnut17": 1e-3, "movies": 4e-3}  # the best ones on dev in `tradeoff`
STDS, OWN, SEEDS = (1e-7, 1e-2, 1.0), 1e-2, (0, 1, 2)
UP = re.compile(r"/layer_(\d+)/.*/adapter/up/(kernel|bias)$")
MOST = 2.0  # points of accuracy that one layer is worth at most, in the paper
NEAR = 1.0  # points that are "about 0"
BY = "Houlsby et al."


def run(report: Report, quick: bool) -> None:
    """Trains the cells that are missing; one data set on a few rows if quick."""
    rows, passes = (32, 1.0) if quick else (ROWS, PASSES)
    record = Record(report, rows=rows, passes=passes)
    sets, seeds = ([*RATES][:1], SEEDS[:1]) if quick else ([*RATES], SEEDS)
    with contextlib.suppress(KeyboardInterrupt):  # the tables then hold what is done
        for seed in seeds:
            for std in (OWN, *(std for std in STDS if std != OWN)):
                for data in sets:
                    if not record.find(data=data, std=std, seed=seed):
                        result = train(data, std, seed, rows, passes)
                        record.keep(result, data=data, std=std, seed=seed)
    write(report, record, sets, seeds)


def train(data: str, std: float, seed: int, rows: int, passes: float) -> Row:
    """Trains on a data set, and scores dev with and without the adapters of each span of layers.

    Returns:
        The metrics on dev and test, or "stopped" if a step was not finite; with a deviation of
        `OWN`, "without" has a list [first, last, score on dev] for each span of layers.
    """
    began = time.perf_counter()
    flags = f"{SETS[data].format(DATA)} --limit {rows} --seed {seed} --epochs {passes} "
    flags += f"--method {HOULSBY} --init-std {std} --learning-rate {RATES[data]}"
    options = parse(RunOptions, flags.split())
    job = prepare_run(options, Run(ROOT / "comparisons" / "none"), Console(json=False), began)
    problem: Any = job.problem
    training = Training.begin(problem, job.optimizer, job.key)
    try:
        training.train()
    except NotFiniteError as error:
        return {"stopped": str(error), "seconds": round(time.perf_counter() - began, 1)}
    best, result = training.best(), dict[str, Any]()
    if std == OWN:
        metric = problem.metrics[0]
        spans = combinations_with_replacement(layers(best.adapters), 2)
        cut = ((a, b, replace(best, adapters=without(best.adapters, a, b))) for a, b in spans)
        result["without"] = [[a, b, problem.score(s, "dev")[metric]] for a, b, s in cut]
    scores = {"dev": problem.score(best, "dev"), "test": problem.score(best, "test")}
    return {**scores, **result, "seconds": round(time.perf_counter() - began, 1)}


def layers(adapters: Tree) -> list[int]:
    """The numbers of the layers with bottlenecks."""
    return sorted({int(found[1]) for path in flatten(adapters) if (found := UP.search(path))})


def without(adapters: Tree, first: int, last: int) -> Tree:
    """The adapters, with those of the layers from first to last adding nothing."""
    leaves = {
        path: jnp.zeros_like(x)
        for path, x in flatten(adapters).items()
        if (found := UP.search(path)) and first <= int(found[1]) <= last
    }
    return with_leaves(adapters, leaves)


def write(report: Report, record: Record, sets: Sequence[str], seeds: Sequence[int]) -> None:
    """Writes the tables, the verdicts and the picture of the finished cells."""
    hours = sum(row["seconds"] for row in record.rows) / 3600
    report.add("Cells that are done; the same command goes on", done=len(record.rows), hours=hours)
    lost = {}
    for data in sets:
        by_std = {
            std: [row for seed in seeds if (row := record.find(data=data, std=std, seed=seed))]
            for std in STDS
        }
        for std, rows in by_std.items():
            if rows:
                report.add("Score x 100 by the initial deviation", data=data, std=std,
                           **_spread(rows))  # fmt: skip
        if by_std[OWN]:
            lost[data] = _removed(report, data, by_std[OWN])
        _scales(report, data, by_std)
    if lost:
        draw(report, lost)


def points(row: Row, part: str) -> float:
    """The first metric x 100; 0 of a training that diverged."""
    return 0.0 if "stopped" in row else 100 * float(next(iter(row[part].values())))


def _spread(rows: Sequence[Row]) -> Row:
    found: Row = {"seeds": len(rows), "diverged": sum("stopped" in row for row in rows)}
    for part in ("dev", "test"):
        scores = [points(row, part) for row in rows]
        deviation = statistics.stdev(scores) if len(scores) > 1 else None
        found |= {part: statistics.fmean(scores), f"{part}, deviation": deviation}
    return found


def _removed(report: Report, data: str, rows: Sequence[Row]) -> np.ndarray:
    """Reports and returns the mean points that are lost without each span of layers."""
    count = 1 + max(last for _, last, _ in rows[0]["without"])
    lost = np.full((len(rows), count, count), np.nan)
    for number, row in enumerate(rows):
        for first, last, score in row["without"]:
            lost[number, first, last] = points(row, "dev") - 100 * score
    mean = lost.mean(axis=0)
    how = f"{data}, score x 100 on dev, MiniLM of {count} layers, {len(rows)} seeds"
    how += ", Student's interval of 95 %"
    single = np.diagonal(mean)
    worst = int(single.argmax())
    low, high = _interval(lost[:, worst, worst])
    shown = ", ".join(f"{each:.1f}" for each in single)
    report.verdict(
        f"{BY}: removing the adapters of one layer costs 2 points at most",
        f"at most {MOST:g}",
        f"{shown} by layer; the most: {low:.1f} to {high:.1f}",
        how,
        _verdict(high <= MOST, low > MOST),
    )
    half = count // 2
    lower, upper = lost[:, 0, half - 1], lost[:, half, count - 1]
    low, high = _interval(upper - lower)
    shown = (
        f"{lower.mean():.1f} points without the lower {half}, {upper.mean():.1f} without the upper"
    )
    report.verdict(
        f"{BY}: the adapters of the lower layers matter less",
        "less",
        f"{shown}; {low:+.1f} to {high:+.1f} more",
        how,
        _verdict(low > 0, high < 0),
    )
    everything = [100 * row["without"][count - 1][2] for row in rows]
    report.add("Score x 100 on dev without any adapter", data=data,
               trained=statistics.fmean(points(row, "dev") for row in rows),
               without=statistics.fmean(everything))  # fmt: skip
    return mean


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of 95 % of the mean over seeds; without an end if there is one seed."""
    if len(values) < 2:
        return -math.inf, math.inf
    interval = scipy.stats.ttest_1samp(values, 0.0).confidence_interval()
    return float(interval.low), float(interval.high)


def _verdict(holds: bool, fails: bool) -> Verdict:
    return "reproduced" if holds else "not reproduced" if fails else "undecided"


def _scales(report: Report, data: str, by_std: dict[float, list[Row]]) -> None:
    """Reports the differences of the initial scales to the paper's, by Welch's interval."""
    own = [points(row, "test") for row in by_std[OWN]]
    for std, what in ((1e-7, "about 0"), (1.0, "above 0")):
        other = [points(row, "test") for row in by_std[std]]
        if min(len(own), len(other)) < 2:
            continue
        costs, low, high = welch(own, other)
        if std > OWN:
            holds, fails = low > 0, high <= 0
        else:
            holds, fails = low >= -NEAR and high <= NEAR, low > NEAR or high < -NEAR
        report.verdict(
            f"{BY}: points that an initial deviation of {std:g} costs, beside 0.01",
            what,
            f"{costs:+.1f}, {low:+.1f} to {high:+.1f}",
            f"{data}, score x 100 on test, MiniLM, {len(own)} seeds, Welch's interval of 95 %",
            _verdict(holds, fails),
        )


def draw(report: Report, lost: dict[str, np.ndarray]) -> None:
    """Draws the points that are lost without the adapters of the layers from one to another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(lost), 4), dpi=130, layout="constrained")
    for axis, (data, mean) in zip(figure.subplots(1, len(lost), squeeze=False)[0], lost.items(),
                                    strict=True):  # fmt: skip
        axis.imshow(mean, cmap="Blues")
        for (first, last), value in np.ndenumerate(mean):
            if first <= last:
                colour = "white" if value > np.nanmax(mean) / 2 else "black"
                axis.text(last, first, f"{value:.1f}", ha="center", va="center", color=colour)
        axis.set_title(f"{data}: points lost", loc="left", fontsize=10)
        axis.set_xlabel("last layer without adapters", fontsize=8)
        axis.set_ylabel("first layer without adapters", fontsize=8)
    figure.savefig(report.directory / f"{report.name}.png")
