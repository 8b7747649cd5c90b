"""Compares scores with trainable parameters on MiniLM, as Houlsby et al. 2019 do (figures 1 and 3).

A run takes one data set. Houlsby's adapters, m = 64, and full fine-tuning get the same rows, passes
and seeds. The learning rate of each is the best on dev with the first seed. Half of it and twice it
were worse: if the best rate is at an end of the grid, a further one is tried. Dev is scored once in
a pass, and the parameters with the best dev score are tested. The mean number of passes to that
score is shown. The difference is between the means over the seeds, with Welch's interval of 95 %.
Where adapters are behind, more recipes are treated in the same way, to find out why: all layers
without the tables of embeddings, adapters with the dropout and the head's rate of full fine-tuning,
and adapters of four times the width. The other recipes have the default rate of their method and
one seed. A part "whole" trains the two with twenty seeds, for fewer passes over all rows of a set,
as the paper does. The paper reaches 80.0 on GLUE with 3.6 % of the parameters for each task; full
fine-tuning of BERT-large reaches 80.4. An interrupted run reports the finished cells, and the same
command resumes it.
"""

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import replace

from adapters_jax.finetune.compare.grid import read_candidate
from adapters_jax.finetune.compare.tradeoff import tradeoff
from adapters_jax.finetune.report.pictures import write_png
from benchmarks.cells import Cells, Store
from benchmarks.report import Report, Row, Verdict, welch

HOULSBY, FULL = "houlsby --bottleneck-dim 64", "full"
TUNED = {HOULSBY: 1e-3, FULL: 1e-4}  # the rate in the middle of the first ones that are tried
LAYERS, WIDE = "last-layers --layers 6", "houlsby --bottleneck-dim 256"
MORE = " + "  # between a recipe and flags of the comparison
AS_FULL = f"{HOULSBY}{MORE}--dropout 0.1 --head-learning-rate 0.001"
WHY = {LAYERS: 1e-4, AS_FULL: 1e-3, WIDE: 1e-3}
BEHIND = {"wnut17": WHY, "movies": WHY}
OTHERS = (
    "houlsby --bottleneck-dim 8",
    WIDE,
    "lora --rank 8",
    "last-layers --layers 3",
    "layer-norms",
)
ROWS, PASSES, SEEDS = 2000, 8.0, (0, 1, 2, 3, 4)
WHOLE = {"cola": 7696, "stsb": 5175, "wnut17": 3055}  # training rows, without those of test
WHOLE_PASSES = 3.0  # the fewer ones of the paper's {3, 20}
WHOLE_SEEDS = tuple(range(20))  # the verdict of five was undecided
BATCH = 32  # rows in a step by default
MOST = 6  # learning rates of a recipe
GAP, PERCENT = 0.4, 4.0
BELOW = "Points on test x 100 that full fine-tuning is above, with Welch's interval of 95 %"


def run(report: Report, quick: bool, data: str, part: str = "") -> None:
    """Runs the comparison on one data set; two recipes on a few rows if quick."""
    store = Store(report, ["--evaluations", "1", *(["--max-length", "16"] if quick else ())])
    rows, passes, seeds = (32, 1.0, (0, 1)) if quick else (ROWS, PASSES, SEEDS)
    if part and not quick:
        rows, passes, seeds = WHOLE[data], WHOLE_PASSES, WHOLE_SEEDS
    two = quick or bool(part)
    asked: dict[str, Cells] = {}
    for text, middle in (TUNED | ({} if two else BEHIND.get(data, {}))).items():
        recipe, _, more = text.partition(MORE)
        asked[text] = Cells(data, rows, recipe, (middle,), passes, seeds, more=more)
    others = () if two else [recipe for recipe in OTHERS if recipe not in asked]
    asked |= {recipe: Cells(data, rows, recipe, (), passes) for recipe in others}
    with contextlib.suppress(KeyboardInterrupt):  # the tables then hold what is done
        for cells in asked.values():
            one = replace(cells, seeds=seeds[:1])
            rates = (tuned(store, one),) if cells.rates and not quick else cells.rates
            store.train(replace(cells, rates=rates))
    best = {text: cells.best(store.rows) for text, cells in asked.items()}
    found = {text: cells for text, cells in best.items() if cells}
    done = [row for row in store.rows if (row["rows"], row["passes"]) == (rows, passes)]
    report.add(
        "Cells that are done; the same command goes on",
        done=len(done),
        hours=sum(row.get("seconds", 0.0) for row in done) / 3600,
    )
    shown = [summary(recipe, cells, store.rows) for recipe, cells in found.items()]
    metric = next((row["metric"] for row in done if row["metric"]), "")
    for row in sorted(shown, key=lambda row: row["trainable"] or 0):
        report.add(f"{data}, test {metric} x 100", **row)
    trained = {row["recipe"]: row for row in shown if row["trainable"]}
    if trained.keys() >= TUNED.keys():
        draw(report, data, metric, [row for row in trained.values() if MORE not in row["recipe"]])
        what = f"{data}, test {metric} x 100"
        judge(report, what, found[HOULSBY], found[FULL])
        for recipe, cells in found.items():
            if recipe != FULL and len(cells) > 1:
                points, low, high = below(cells, found[FULL])
                row = {"recipe": recipe, "seeds": len(cells), "points": points}
                report.add(BELOW, **row, low=low, high=high)


def tuned(store: Store, cells: Cells) -> float:
    """The learning rate that is best on dev with the first seed, and worse at half and twice of it.

    If there is none within `MOST` rates, the best one. Finished cells of other rates count too:
    scores can have a second peak beyond a rate that both its neighbours are worse than.

    Args:
        store: the finished cells.
        cells: those of the rate to begin at, with one seed.
    """
    (middle,) = cells.rates
    rates = {middle / 2, middle, 2 * middle}
    rates |= {row["learning_rate"] for row in cells.with_any_rate(store.rows)}
    while True:
        tried = store.train(replace(cells, rates=tuple(sorted(rates))))
        best = max(tried, key=lambda row: row["score"]["dev"])["learning_rate"]
        missing = {best / 2, 2 * best} - rates
        if not missing or len(rates) >= MOST:
            return float(best)
        rates |= missing


def summary(recipe: str, cells: Sequence[Row], tried: Sequence[Row]) -> Row:
    """The row of a recipe; the score of a training that diverged is 0.

    If all of them diverged, what is not known is None; "inside" is so if one rate was tried.

    Args:
        recipe: the recipe, with its further flags.
        cells: its cells with the chosen learning rate, one of each seed.
        tried: all finished cells.
    """
    rate = cells[0]["learning_rate"]
    names = ("recipe", "rows", "passes", "more", "seed")
    same = [row for row in tried if all(row.get(name) == cells[0].get(name) for name in names)]
    rates = [row["learning_rate"] for row in same]
    scores = [100 * row["score"]["test"] for row in cells]
    ended = [row for row in cells if "stopped" not in row]
    # A pass has up to a few steps more than this: the last batch of each length can be small.
    of_pass = cells[0]["rows"] / BATCH
    return {
        "recipe": recipe,
        "trainable": ended[0]["trainable_parameters"] if ended else None,
        "learning rate": rate,
        "tried": ", ".join(f"{each:g}" for each in sorted(rates)),
        "inside": min(rates) < rate < max(rates) if len(rates) > 1 else None,
        "seeds": len(cells),
        "diverged": len(cells) - len(ended),
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "best pass": _mean([round(row["best_step"] / of_pass) for row in ended]),
        "minutes each": _mean([row["seconds"] / 60 for row in ended]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def draw(report: Report, data: str, metric: str, shown: Sequence[Row]) -> None:
    """Draws the scores on test against the trainable parameters."""
    points = []
    for row in shown:
        known = read_candidate(row["recipe"])
        score = {"mean": row["mean"] / 100, "deviation": (row["deviation"] or 0.0) / 100}
        names = {"recipe": row["recipe"], "method": known.method.method, "family": known.family}
        size = {"size": known.size, "size_name": known.size_name}
        trainable = {"trainable_parameters": row["trainable"]}
        points.append({**names, **size, **trainable, "test": {metric: score}})
    write_png(report.directory / f"{report.name}.png", tradeoff({data: points}, {data: metric}))


def below(ours: Sequence[Row], full: Sequence[Row]) -> tuple[float, float, float]:
    """The points, score on test x 100, that full fine-tuning is above, and Welch's interval."""
    scores = [[100 * row["score"]["test"] for row in cells] for cells in (full, ours)]
    return welch(*scores)


def judge(report: Report, what: str, ours: Sequence[Row], full: Sequence[Row]) -> None:
    """Reports whether Houlsby's adapters reach full fine-tuning with few parameters.

    Args:
        report: the report.
        what: the data set and the metric.
        ours: the cells of Houlsby's adapters, one of each seed.
        full: those of full fine-tuning.
    """
    points, low, high = below(ours, full)
    sizes = [max(row.get("trainable_parameters", 0) for row in cells) for cells in (ours, full)]
    part = 100 * sizes[0] / sizes[1]
    own, theirs = (100 * statistics.fmean(row["score"]["test"] for row in x) for x in (ours, full))
    claim = f"{what}: points that full fine-tuning is above Houlsby, m = 64 ({part:.2g} %)"
    report.claim(claim, points, GAP)
    verdict: Verdict = "undecided"
    if low > GAP or part > PERCENT:
        verdict = "not reproduced"
    elif high <= GAP:
        verdict = "reproduced"
    report.verdict(
        "adapters reach full fine-tuning with 3.6 % of the parameters (Houlsby et al.)",
        "GLUE: 80.0 against 80.4",
        f"{own:.1f} against {theirs:.1f} with {part:.2g} %, {low:.1f} to {high:.1f} points below",
        f"{what}, MiniLM, {len(full)} seeds, the difference by Welch's interval of 95 %",
        verdict,
    )
