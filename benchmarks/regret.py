"""What LoRA needs on a decoder: ranks, rates, scales, modules and batches, beside full fine-tuning.

After "LoRA Without Regret" (Schulman et al. 2025, thinkingmachines.ai/blog/lora), which trains
larger models for longer. Every cell is a training of SmolLM2-135M by `adapters-jax compare`: one
pass over 400 rows of E2E in sequences of 128 tokens, or over rows of another set in sequences of
256, 4 in a step unless the batch is what is asked about. The default recipe also trains for the
three passes of a default run. The score is minus the loss on dev. The rate of each recipe is the
best one with the first seed, and half of it and twice of it were worse. Recipes that are compared
have the same number of parameters, their own best rates, and three seeds. The difference of two
recipes has Welch's interval of 95 % over the seeds. Four narrower Llamas, which are trained here on
WikiText, show the best rate by width, with 800 rows and 8 sequences in a step. An interrupted run
reports what is finished, and the same command goes on.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import Cells, Store
from benchmarks.narrow import EPOCHS, WIDTHS, path, train
from benchmarks.report import Report, Row, Verdict, welch
from benchmarks.tradeoff import tuned

BASE, BATCH, SEEDS = "smollm2-135m", 4, (0, 1, 2)
SETS = {"e2e": 400, "gsm8k": 200, "wikitext2": 400, "conversations": 100}  # rows
LINEAR, ATTENTION, MLP = "** !**/{embeddings|head}/**", "**/attention/*", "**/mlp/*"
FULL = "full"


def lora(rank: int, alpha: float = 32, targets: str = LINEAR) -> str:
    """A recipe of LoRA, as `adapters-jax compare --recipes` takes it."""
    return f"lora --rank {rank} --alpha {alpha:g} --targets {targets}"


ALL = lora(16)
# About as many parameters as `ALL` has: 4.88 million of 135.
HOULSBY = "houlsby --bottleneck-dim 70"
EQUAL = {
    "LoRA on all linear layers, r = 16": ALL,
    "LoRA on attention, r = 42": lora(42, targets=ATTENTION),
    "LoRA on feed-forward layers, r = 26": lora(26, targets=MLP),
    "Houlsby's adapters, m = 70": HOULSBY,
    "parallel adapters, m = 141": "parallel --bottleneck-dim 141",
}
COMPARED = (ALL, FULL, *[*EQUAL.values()][1:])
# 192 is the highest rank here: keys and values have as many outputs.
RANKS, BATCHES = (1, 4, 16, 64, 192), (1, 16)
EXTREMES = RANKS[0], RANKS[-1]
LEAST, BLOG = 0.01, "Schulman et al."
PUBLISHED = {
    "LoRA on attention": (f"{BLOG}: ", "above 0"),
    "LoRA on feed-forward layers": (f"{BLOG}: ", "0"),
}
DEFAULT, PASSES = 1.3e-3, 3.0  # LoRA's default rate on this base, and the passes of a default run
# Rates to begin at, on `BASE` and on the narrow Llamas.
FIRST = {"lora": 2.6e-3, "houlsby": 1e-3, "parallel": 1e-3, FULL: 1e-4}
NARROW, NARROW_BATCH, NARROW_ROWS = {lora(8): 8e-3, FULL: 1.6e-3}, 8, 800
PARTS = 12  # of a training's steps, in the picture of losses
EXPONENT = 0.781  # of the width, for Llamas
WITHIN = 1.02  # the loss at the default rate / at the best rate
NAMES = ("base", "data", "batch", "passes", "recipe")
Key = tuple[Any, ...]  # the values of these


def questions() -> list[Cells]:
    """The recipes, the most telling first; those that are compared have three seeds."""

    def ask(recipe: str, data: str = "e2e", batch: int = BATCH) -> Cells:
        rate = FIRST[recipe.split()[0]]
        return Cells(data, SETS[data], recipe, (rate,), 1.0, (0,), BASE, batch)

    by_default = [replace(ask(ALL, data), rates=(DEFAULT,), passes=PASSES) for data in SETS]
    narrow = [Cells("e2e", NARROW_ROWS, recipe, (rate,), 1.0, (0,), path(width), NARROW_BATCH)
              for width in WIDTHS for recipe, rate in NARROW.items()]  # fmt: skip
    batches = [ask(recipe, batch=batch) for batch in BATCHES for recipe in (ALL, FULL)]
    return [
        *(ask(ALL, data) for data in SETS),
        *(ask(recipe) for recipe in COMPARED),
        *(replace(ask(recipe), seeds=SEEDS) for recipe in COMPARED),
        *(ask(lora(rank)) for rank in EXTREMES),
        *(ask(lora(rank, rank)) for rank in EXTREMES),
        *by_default,
        *narrow,
        *batches,
        *(ask(lora(rank)) for rank in RANKS),
        *(replace(each, seeds=SEEDS) for each in batches),
        *(ask(lora(rank, rank)) for rank in RANKS),
        *(ask(recipe, data) for data in SETS for recipe in (FULL, HOULSBY)),
    ]


def run(report: Report, quick: bool) -> None:
    """Trains the cells that are missing; two narrow ones on a few rows if quick."""
    store = Store(report, ["--evaluations", "1", "--no-together"])
    asked = _quick() if quick else questions()
    with contextlib.suppress(KeyboardInterrupt):  # the tables then hold what is done
        for each in asked:
            if each.base in map(path, WIDTHS):
                train(int(each.base.rsplit("-", 1)[1]), 0.05 if quick else EPOCHS)
            one = replace(each, seeds=SEEDS[:1])
            rate = each.rates[0] if quick else tuned(store, one)
            store.train(replace(each, rates=(rate,)))
    found: dict[Key, list[Row]] = {}
    for each in asked:
        _add_losses(store, each)
        if cells := replace(each, seeds=SEEDS).best(store.rows):
            found[tuple(getattr(each, name) for name in NAMES)] = cells
    store.save()
    hours = sum(row.get("seconds", 0.0) for row in store.rows) / 3600
    report.add("Cells that are done; the same command goes on", done=len(store.rows), hours=hours)
    shown = {key: _row(key, cells, store.rows) for key, cells in found.items()}
    for row in shown.values():
        report.add("The best rate of each recipe", **row)
    # A rate at an end of those tried may not be the best one: nothing is judged by it.
    judge(report, {key: found[key] for key, row in shown.items() if row["inside"]}, store.rows)
    draw(report, store.rows)


def _quick() -> list[Cells]:
    return [
        Cells("e2e", 32, recipe, (FIRST[recipe.split()[0]],), 1.0, (0,), path(64), 4)
        for recipe in (lora(8), FULL)
    ]


def _add_losses(store: Store, asked: Cells) -> None:
    """Adds the losses of each training, means of parts of its steps, if its metrics are here."""
    for row in replace(asked, seeds=SEEDS).with_any_rate(store.rows):
        path = store.root / asked.name / "cells" / row["run"] / "metrics.jsonl"
        if "losses" in row or not path.exists():
            continue
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [step["loss"] for step in steps if "loss" in step and "step" in step]
        parts = np.array_split(losses, PARTS)
        row["losses"] = [round(float(part.mean()), 4) for part in parts if part.size]


def _losses(cells: Sequence[Row]) -> list[float]:
    return [-row["score"]["dev"] for row in cells]


def _row(key: Key, cells: Sequence[Row], tried: Sequence[Row]) -> Row:
    about = dict(zip(NAMES, key, strict=True))
    shared = {**about, "seed": cells[0]["seed"]}
    about["base"] = Path(about["base"]).name
    rates = sorted(row["learning_rate"] for row in tried if {**row, **shared} == row)
    losses = _losses(cells)
    return {
        **about,
        "trainable": cells[0].get("trainable_parameters"),
        "best rate": cells[0]["learning_rate"],
        "tried": ", ".join(f"{rate:g}" for rate in rates),
        "inside": rates[0] < cells[0]["learning_rate"] < rates[-1],
        "seeds": len(cells),
        "loss on dev": statistics.fmean(losses),
        "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
    }


def judge(report: Report, found: Mapping[Key, Sequence[Row]], rows: Sequence[Row] = ()) -> None:
    """Reports of each rule whether it holds here, as far as its cells are finished."""
    of = {recipe: cells for (*shared, recipe), cells in found.items()
          if shared == [BASE, "e2e", BATCH, 1.0]}  # fmt: skip
    rates = {recipe: cells[0]["learning_rate"] for recipe, cells in of.items()}
    for data in SETS:
        ours, full = (found.get((BASE, data, BATCH, 1.0, recipe)) for recipe in (ALL, FULL))
        if ours and full:
            both = ours[0]["learning_rate"], full[0]["learning_rate"]
            _ratio(report, f"{data}, SmolLM2-135M, rank 16", *both)
    if {ALL, FULL} <= of.keys():
        what = f"{BLOG}: LoRA's loss is that of full fine-tuning"
        _compare(report, what, _losses(of[ALL]), _losses(of[FULL]), "0")
    small, large = BATCHES
    what = (
        f"{BLOG}: LoRA's loss above full fine-tuning's, more at a batch of {large} than of {small}"
    )
    _compare(report, what, _gaps(found, large), _gaps(found, small), "above 0")
    _judge_widths(report, found)
    for (base, data, batch, passes, recipe), cells in found.items():
        if (base, batch, recipe) == (BASE, BATCH, ALL):
            _claim_default(report, f"{data}, {_passes(passes)}", cells, rows)
    for name, recipe in EQUAL.items():
        if recipe in of and ALL in of and recipe != ALL:
            # The blog compares attention and feed-forward layers; it gives no figure for adapters.
            source, published = PUBLISHED.get(name.split(", ")[0], ("", "no figure"))
            what = f"{source}{name}: the loss above that of all linear layers, equal parameters"
            _compare(report, what, _losses(of[recipe]), _losses(of[ALL]), published)
    same = "the best rate does not depend on the rank"
    for what, published, recipes in (
        # The blog says it of a fixed alpha.
        (f"{BLOG}: {same} (alpha = 32)", "within a factor of 2", {r: lora(r) for r in RANKS}),
        (f"{same} (alpha = r)", "no figure", {r: lora(r, r) for r in RANKS}),
    ):
        best = {rank: rates[recipe] for rank, recipe in recipes.items() if recipe in rates}
        if {*EXTREMES} <= best.keys():
            least, most = min(best.values()), max(best.values())
            verdict: Verdict = "reproduced" if most <= 2 * least else "not reproduced"
            shown, ranks = (", ".join(f"{x:g}" for x in part) for part in (best.values(), best))
            report.verdict(what, published, shown, f"ranks {ranks}", verdict)


def _ratio(report: Report, where: str, lora: float, full: float) -> None:
    """Reports whether LoRA's best rate is 10 times that of full fine-tuning."""
    verdict: Verdict = "reproduced" if 5 <= lora / full <= 20 else "not reproduced"
    how = f"{where}, {lora:g} and {full:g}; rates in factors of 2"
    what = f"{BLOG}: the best rate is 10 times that of full fine-tuning"
    report.verdict(what, "10", f"{lora / full:g}", how, verdict)


def _gaps(found: Mapping[Key, Sequence[Row]], batch: int) -> list[float]:
    """LoRA's loss above full fine-tuning's with the same seed, at a batch."""
    shared = BASE, "e2e", batch, 1.0
    ours, full = (
        {row["seed"]: -row["score"]["dev"] for row in found.get((*shared, recipe), ())}
        for recipe in (ALL, FULL)
    )
    return [ours[seed] - full[seed] for seed in ours if seed in full]


def _judge_widths(report: Report, found: Mapping[Key, Sequence[Row]]) -> None:
    """Reports the rules of LoRA's best rate on the narrow Llamas."""
    recipe, full = NARROW
    best = {}
    for width in WIDTHS:
        shared = path(width), "e2e", NARROW_BATCH, 1.0
        rates = {each: cells[0]["learning_rate"] for each in NARROW
                 if (cells := found.get((*shared, each)))}  # fmt: skip
        if recipe in rates:
            best[width] = rates[recipe]
        if rates.keys() == NARROW.keys():
            _ratio(report, f"e2e, a Llama of {width}, rank 8", rates[recipe], rates[full])
    least, most = min(WIDTHS), max(WIDTHS)
    if {least, most} <= best.keys():
        falls, law = best[least] / best[most], (most / least) ** EXPONENT
        verdict: Verdict = "reproduced" if law / 2 <= falls <= 2 * law else "not reproduced"
        widths, shown = (", ".join(f"{x:g}" for x in part) for part in (best, best.values()))
        report.verdict(f"Tinker's cookbook: the best rate falls as width^-{EXPONENT}",
                       f"{law:.2g} times from {least} to {most}", f"{falls:g} times: {shown}",
                       f"E2E, Llamas of {widths}, rank 8", verdict)  # fmt: skip


def _passes(passes: float) -> str:
    return f"{passes:g} pass" + "es" * (passes != 1)


def _claim_default(report: Report, what: str, best: Sequence[Row], rows: Sequence[Row]) -> None:
    """Claims that the default rate loses little to the best one."""
    named = (*NAMES, "seed")
    same = [row for row in rows if all(row[name] == best[0][name] for name in named)]
    by_rate = {row["learning_rate"]: row for row in same}
    if DEFAULT in by_rate:
        loss, least = _losses([by_rate[DEFAULT], best[0]])
        claim = f"loss on dev at the default rate / at the best of {len(by_rate)}, LoRA, {what}"
        report.claim(claim, round(loss / least, 4), WITHIN)


def _compare(
    report: Report, what: str, ours: Sequence[float], theirs: Sequence[float], published: str
) -> None:
    """Reports the difference of two mean losses; a hundredth is the least that differs from 0."""
    if min(len(ours), len(theirs)) < 2:
        return
    above, low, high = welch(ours, theirs)
    verdict: Verdict = "undecided"
    if published == "0":
        if low >= -LEAST and high <= LEAST:
            verdict = "reproduced"
        elif low > LEAST or high < -LEAST:
            verdict = "not reproduced"
    elif low > 0:
        verdict = "reproduced"
    elif high <= 0:
        verdict = "not reproduced"
    shown = f"{above:+.3f}, {low:+.3f} to {high:+.3f}"
    how = f"E2E, SmolLM2-135M, dev, {len(ours)} seeds, best rates, Welch's interval"
    report.verdict(what, published, shown, how, verdict)


def draw(report: Report, rows: Sequence[Row]) -> None:
    """Draws the loss on E2E against the learning rate, and against steps, a curve a recipe.

    The curves are those of the first seed; where there are more, bars show the mean and its
    interval at the best rate.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(12, 4), dpi=130, layout="constrained")
    ranks = {f"r = {rank}": lora(rank) for rank in RANKS} | {"all weights": FULL}
    panels = {"By rank, alpha = 32": ranks, "About 4.9 million parameters": EQUAL}
    asked = [row for row in rows if [row[name] for name in NAMES[:-1]] == [BASE, "e2e", BATCH, 1.0]
             and math.isfinite(row["score"]["dev"])]  # fmt: skip
    seeds = {recipe: [row for row in asked if row["recipe"] == recipe]
             for recipes in panels.values() for recipe in recipes.values()}  # fmt: skip
    of = {recipe: [row for row in found if row["seed"] == 0] for recipe, found in seeds.items()}
    best = {recipe: max(found, key=lambda row: row["score"]["dev"], default={})
            for recipe, found in of.items()}  # fmt: skip
    *axes, last = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for axis, (title, recipes) in zip(axes, panels.items(), strict=True):
        for name, recipe in recipes.items():
            points = sorted((row["learning_rate"], -row["score"]["dev"]) for row in of[recipe])
            if points:
                (line,) = axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, label=name
                )
                rate = best[recipe]["learning_rate"]
                losses = _losses([r for r in seeds[recipe] if r["learning_rate"] == rate])
                if len(losses) > 1:
                    bar = {"color": line.get_color(), "marker": "_", "capsize": 4, "alpha": 0.6}
                    axis.errorbar(rate, statistics.fmean(losses), half_interval(losses), **bar)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        _name(axis, title, "learning rate", "loss on dev; bars: 95 % over seeds, at the best rate")
    for recipe, name in {recipe: name for name, recipe in (ranks | EQUAL).items()}.items():
        if parts := best[recipe].get("losses"):
            x = (np.arange(len(parts)) + 0.5) / len(parts)
            last.plot(x, parts, label=f"{name}, rate {best[recipe]['learning_rate']:g}")
    _name(last, "Each at its best rate", "part of the steps", "loss of training")
    figure.savefig(report.directory / f"{report.name}.png")


def half_interval(losses: Sequence[float]) -> float:
    """Half of the interval of 95 % of the mean, by Student's t."""
    from scipy.stats import sem, t

    return float(sem(losses) * t.ppf(0.975, len(losses) - 1))


def _name(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.legend(fontsize=7) if axis.lines else None
