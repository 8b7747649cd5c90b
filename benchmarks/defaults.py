"""Chooses passes and learning rates on small data by dev, and reports the defaults on test.

Each data set gives 900 training rows. `adapters-jax compare` trains Houlsby's adapters and LoRA on
them: for 12 passes at several learning rates, and for other numbers of passes at the rate of the
preset. Houlsby's adapters also get the dropout of the checkpoint, 0.1, and the head's learning rate
of full fine-tuning, alone and both. The frozen base with a trained head, at its own defaults, is
the baseline. On 4,000 rows of CoLA, Houlsby's adapters at m = 256 get several rates; the rates of m
= 64 on more rows are those of `tradeoff`, which is read. Settings are ranked by dev, each score
divided by the best of its data set and method, and by the mean of the scores themselves; test is
only reported. Dev is scored once in a pass, where a run of `finetune` scores it twice. CoLA's score
differs most between seeds, so each score of an adapter on its 900 rows is the mean of three. An
interrupted run writes the tables of what is done, and the same command goes on.
"""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.finetune.options.method import PRESETS
from benchmarks import tradeoff
from benchmarks.cells import SETS, Cells, Store, read
from benchmarks.readme import RESULTS
from benchmarks.report import Report, Row

ROWS, WIDE_ROWS, WIDE_PASSES = 900, 4000, 3.0
FROZEN, WIDE = "head-only", "houlsby --bottleneck-dim 256"
METHODS = {"houlsby": (2e-3, 1e-3, 4e-3, 5e-4), "lora": (2e-3, 4e-3, 1e-3, 8e-3)}
PASSES, OTHERS = 12.0, (3.0, 24.0)  # 12 passes are the default on 900 rows
SEEDS = {"cola": (0, 1, 2)}
DROPOUT, HEAD_RATE = "--dropout 0.1", "--head-learning-rate 0.001"
# Both at half the rate: at the default one they find no entity of WNUT-17, see `tradeoff`.
MORE = {DROPOUT: 2e-3, HEAD_RATE: 2e-3, f"{DROPOUT} {HEAD_RATE}": 1e-3}
WIDE_RATES = (1e-3, 2e-3, 5e-4)


def grid() -> Iterator[Cells]:
    """The trainings, the most telling first."""
    yield from (Cells(data, ROWS, FROZEN) for data in SETS)
    for data in SETS:
        for method, rates in METHODS.items():
            yield Cells(data, ROWS, method, rates, PASSES, SEEDS.get(data, (0,)))
    for passes in OTHERS:
        for data in SETS:
            for method, rates in METHODS.items():
                yield Cells(data, ROWS, method, rates[:1], passes, SEEDS.get(data, (0,)))
    for more, rate in MORE.items():
        for data in SETS:
            yield Cells(data, ROWS, "houlsby", (rate,), PASSES, SEEDS.get(data, (0,)), more=more)
    yield Cells("cola", WIDE_ROWS, WIDE, WIDE_RATES, WIDE_PASSES)


def run(report: Report, quick: bool) -> None:
    """Trains the cells that are missing; a few on a few rows if quick."""
    chosen, more = list(grid()), ["--evaluations", "1"]
    if quick:
        chosen = [Cells("movies", 32, "lora", (), PASSES), Cells("movies", 32, FROZEN)]
        more += ["--max-length", "16"]
    store = Store(report, more)
    with contextlib.suppress(KeyboardInterrupt):  # the tables then hold what is done
        for cells in chosen:
            store.train(cells)
    finished = [row for cells in chosen for row in cells.of(store.rows)]
    of = sum(len(cells) for cells in chosen)
    report.add("Cells that are done; the same command goes on", done=len(finished), of=of)
    write(report, finished)


def write(report: Report, cells: Sequence[Row], results: Path = RESULTS) -> None:
    """Writes the tables of finished cells.

    Args:
        report: the report.
        cells: the cells, as `Store.train` returns them.
        results: the directory with the cells of `tradeoff`.
    """
    small = [cell for cell in cells if cell["recipe"] in METHODS]
    for method in METHODS:
        for row in ranked([cell for cell in small if cell["recipe"] == method]):
            report.add(f"Dev, {ROWS} rows: each setting, relative to the best", **row)
    for row in ranked(_of_tradeoff(results)):
        report.add("Dev, the rows of tradeoff: each rate, relative to the best", **row)
    for cell in cells:
        if cell["recipe"] == WIDE:
            scores = {f"{part} x 100": 100 * score for part, score in cell["score"].items()}
            report.add(f"{WIDE} on {cell['data']}", **_about(cell), **scores)
    frozen = {cell["data"]: cell["score"]["test"] for cell in cells if cell["recipe"] == FROZEN}
    for found in _settings(small):
        if _is_default(found[0]) and found[0]["data"] in frozen:
            _beside(report, found, 100 * frozen[found[0]["data"]])


def _settings(cells: Sequence[Row]) -> list[list[Row]]:
    """The cells of each setting on a data set, one of each seed."""
    names = ("data", "recipe", "passes", "learning_rate", "more")
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for cell in cells:
        settings.setdefault(tuple(cell.get(name) for name in names), []).append(cell)
    return [*settings.values()]


def _mean(cells: Sequence[Row], part: str) -> float:
    return statistics.fmean(cell["score"][part] for cell in cells)


def _about(cell: Row) -> Row:
    names = ("data", "rows", "metric", "recipe", "passes")
    return {**{name: cell[name] for name in names}, "learning rate": cell["learning_rate"]}


def _beside(report: Report, cells: Sequence[Row], frozen: float) -> None:
    """Reports a default, by its seeds, and the frozen base with a trained head, by test x 100."""
    ours, seeds = 100 * _mean(cells, "test"), {"seeds": len(cells)}
    scores = {"frozen base": frozen, "default": ours, "points above": ours - frozen}
    report.add("Test: the default beside the frozen base", **_about(cells[0]), **seeds, **scores)
    what = f"{cells[0]['data']}, {cells[0]['rows']} rows: points that the frozen base is above"
    report.claim(f"{what} {cells[0]['recipe']} by default", frozen - ours, 0.0)


def ranked(cells: Sequence[Row]) -> list[Row]:
    """The settings of a method, the best on dev first; means are None if a data set lacks one."""
    best: dict[str, float] = {}
    settings: dict[tuple[float, float, str], list[list[Row]]] = {}
    for found in _settings(cells):
        first = found[0]
        best[first["data"]] = max(_mean(found, "dev"), best.get(first["data"], 0.0))
        setting = first["passes"], first["learning_rate"], first.get("more", "")
        settings.setdefault(setting, []).append(found)
    rows = []
    for (passes, rate, more), sets in settings.items():
        scores = {found[0]["data"]: _mean(found, "dev") for found in sets}
        parts = {data: score / (best[data] or 1.0) for data, score in scores.items()}
        means = [statistics.fmean(x.values()) for x in (parts, scores)]
        mean, score = means if parts.keys() == best.keys() else (None, None)
        first = sets[0][0]
        row = {"method": first["recipe"], "passes": passes, "learning rate": rate, "more": more}
        row |= {"default": _is_default(first), "mean": mean}
        rows.append({**row, "score x 100": score and 100 * score, **parts})
    return sorted(rows, key=lambda row: -(row["mean"] or 0.0))


def _is_default(cell: Row) -> bool:
    own = PASSES, PRESETS[cell["recipe"].split()[0]].learning_rate
    return own == (cell["passes"] or PASSES, cell["learning_rate"]) and not cell.get("more")


def _of_tradeoff(results: Path) -> list[Row]:
    """The cells of `tradeoff`, as it is now, with its first seed: those of Houlsby, m = 64."""
    planned = {"recipe": tradeoff.HOULSBY, "seed": tradeoff.SEEDS[0]}
    planned |= {"rows": tradeoff.ROWS, "passes": tradeoff.PASSES}
    return [
        cell
        for data in SETS
        for cell in read(results / f"tradeoff-{data}-cells.jsonl")
        if {**cell, **planned} == cell
    ]
