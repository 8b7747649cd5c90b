"""What a run shows: a table of results, curves as a picture, and one page that holds everything.

The page needs nothing but itself: the picture is inside it, and so is the style.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.app.console import duration
from adapters_jax.app.options.method import HEAD_ONLY
from adapters_jax.app.report import pages, usage
from adapters_jax.audit import HEADERS, Audit
from adapters_jax.io.run_directory import Run

BLUE, GREY = "#0f62a8", "#6b7280"
PERCENT = ("accuracy", "f1", "exact_match")
SAMPLE_HEADER = ("prompt", "reference", "generated")
TITLES = {HEAD_ONLY: "frozen base, trained head"}


def show_metric(name: str, value: float) -> str:
    """A metric for people: accuracy and F1 in percent, correlations as they are.

    Example:
        >>> show_metric("accuracy", 0.8541), show_metric("pearson", 0.8541)
        ('85.4 %', '0.854')
    """
    return f"{100 * value:.1f} %" if name in PERCENT else f"{value:.3f}"


def results_table(
    results: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the results, a row a method.

    Example:
        >>> row = {"method": "lora", "trainable_parameters": 1234, "test": {"f1": 0.5}}
        >>> results_table([row], ["f1"])
        (['method', 'trainable parameters', 'test f1'], [['lora', '1,234', '50.0 %']])
    """
    header = ["method", "trainable parameters", *(f"test {name}" for name in metrics)]
    rows = [
        [
            TITLES.get(row["method"], row["method"]),
            f"{row['trainable_parameters']:,}",
            *(show_metric(name, row["test"][name]) for name in metrics),
        ]
        for row in results
    ]
    return header, rows


def draw_curves(
    path: Path,
    method: str,
    records: Sequence[Mapping[str, Any]],
    metric: str,
    baselines: Mapping[str, float],
) -> None:
    """Draws the training loss and the dev metric over the steps.

    Args:
        path: of the picture to write.
        method: the one that was trained.
        records: what a training logged.
        metric: the dev metric to show.
        baselines: what others reach on dev, drawn as level lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    loss_axes, dev_axes = figure.subplots(1, 2)
    factor, unit = (100, " (%)") if metric in PERCENT else (1, "")
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    scores = [(r["step"], factor * r["dev"][metric]) for r in records if "dev" in r]
    steps, raw = zip(*losses, strict=True)
    loss_axes.plot(steps, raw, color=BLUE, alpha=0.25, linewidth=1)
    loss_axes.plot(steps, _smooth(raw), color=BLUE, linewidth=1.8)
    loss_axes.set(title="Training loss", ylabel="loss", ylim=(0, None))
    dev_axes.plot(*zip(*scores, strict=True), "o-", color=BLUE, linewidth=1.8, label=method)
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        label = TITLES.get(name, name)
        dev_axes.axhline(factor * value, color=GREY, linestyle=style, linewidth=1.5, label=label)
    dev_axes.set(title=f"Dev {metric}", ylabel=metric + unit)
    dev_axes.legend(frameon=False, loc="best")
    for axes in (loss_axes, dev_axes):
        axes.set(xlabel="step", xlim=(0, 1.03 * records[-1]["step"]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _smooth(values: Sequence[float], share: float = 0.1) -> np.ndarray:
    """A running mean over a share of the values, centred and shorter at the ends."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def write_report(run: Run, config: Mapping[str, Any], counts: Audit) -> None:
    """Writes the page of a run that has its curves.

    Args:
        run: where.
        config: of the run, with its summary.
        counts: the audit of what was trained.
    """
    summary = config["summary"]
    title = f"{config['task']}: {summary['results'][-1]['method']} on {Path(config['model']).name}"
    name = run.path.as_posix()
    samples = [[s["prompt"], s["completion"], s["generated"]] for s in _samples(summary)]
    sections = {
        "Results": pages.table(*results_table(summary["results"], config["metrics"]))
        + pages.paragraph(_sentence(config)),
        "Curves": pages.picture(run.curves, "Training loss and dev metric over the steps"),
        **({"Samples": pages.table([*SAMPLE_HEADER], samples, words=3)} if samples else {}),
        "What was trained": pages.table(
            list(HEADERS), [list(row) for row in counts.rows()], words=4
        )
        + "".join(map(pages.paragraph, counts.totals())),
        "How to use it": pages.code(f"{usage.command(config, name)}\n{usage.python(config, name)}"),
        "Configuration": pages.table(["setting", "value"], list(settings(config)), words=2),
    }
    run.report.write_text(pages.page(title, sections), encoding="utf-8")


def _sentence(config: Mapping[str, Any]) -> str:
    """The results in words."""
    rows, summary = config["rows"], config["summary"]
    best = config["metrics"][0]
    return (
        f"Trained on {rows['train']:,} rows, selected on {rows['dev']:,} by {best} (best at step "
        f"{summary['best_step']}: {show_metric(best, summary['dev'][best])}), tested once on "
        f"{rows['test']:,}. The whole run took {duration(summary['seconds'])}."
    )


def _samples(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the trained decoder said of a few test prompts."""
    return summary["results"][-1].get("samples", [])


def settings(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """The configuration as rows; of nested settings, each that says something."""
    for key, value in config.items():
        if key == "summary":
            continue
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, setting in inner:
            if setting not in (None, [], (), ""):
                text = setting if isinstance(setting, str) else json.dumps(setting)
                yield [f"{key}.{name}" if name else key, text]
