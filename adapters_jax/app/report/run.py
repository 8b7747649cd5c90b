"""Reports a finished run: a table of results, a picture of curves, and an HTML page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.app.console import duration
from adapters_jax.app.options.flags import words
from adapters_jax.app.options.method import HEAD_ONLY
from adapters_jax.app.options.settings import RunOptions
from adapters_jax.app.options.stored import from_plain
from adapters_jax.app.report import pages
from adapters_jax.auditing import HEADERS, Audit
from adapters_jax.io.atomic import write_file
from adapters_jax.io.run_directory import Run
from adapters_jax.tasks import task_of
from adapters_jax.texts import visible

BLUE, GREY = "#0f62a8", "#6b7280"
_SHARES = ("precision", "recall", "exact_match", "recall_at_1")
PERCENT = ("accuracy", "f1", "f1_micro", "f1_macro", *_SHARES)
TITLES = {HEAD_ONLY: "frozen base, trained head"}
_NOT_SETTINGS = ("data", "options", "summary")  # the page shows these elsewhere


def show_metric(name: str, value: float) -> str:
    """Formats a metric for people: accuracy and F1 in percent, other metrics as they are.

    Example:
        >>> show_metric("accuracy", 0.8541), show_metric("pearson", 0.8541)
        ('85.4 %', '0.854')
    """
    return f"{100 * value:.1f} %" if name in PERCENT else f"{value:.3f}"


def results_table(
    results: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Builds the table of results.

    Args:
        results: one for each method, as `summary.results` in a run's `config.json` holds them.
        metrics: names of the test metrics to show.

    Returns:
        The header, and one row for each method.

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
    """Draws the training loss and the dev metric over the steps, and rewards where there are any.

    Args:
        path: the PNG file to write.
        method: name of the trained method, for the legend.
        records: the records that the training logged.
        metric: name of the dev metric to draw.
        baselines: the dev metric of each baseline, drawn as level lines.
    """
    from matplotlib.figure import Figure

    margins = [(r["step"], r["margin"]) for r in records if "margin" in r]
    count = 3 if margins else 2
    figure = Figure(figsize=(4.5 * count, 3.6), dpi=150, layout="constrained")
    loss_axes, dev_axes, *reward_axes = figure.subplots(1, count)
    factor, unit = (100, " (%)") if metric in PERCENT else (1, "")
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    scores = [(r["step"], factor * r["dev"][metric]) for r in records if "dev" in r]
    steps, raw = zip(*losses, strict=True)
    loss_axes.plot(steps, raw, color=BLUE, alpha=0.25, linewidth=1)
    loss_axes.plot(steps, _smooth(raw), color=BLUE, linewidth=1.8)
    loss_axes.set(title="Training loss", ylabel="loss", ylim=(0, 1.05 * max(raw) or 1))
    label = in_picture(method)
    dev_axes.plot(*zip(*scores, strict=True), "o-", color=BLUE, linewidth=1.8, label=label)
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        label = in_picture(TITLES.get(name, name))
        dev_axes.axhline(factor * value, color=GREY, linestyle=style, linewidth=1.5, label=label)
    dev_axes.set(title=f"Dev {metric}", ylabel=metric + unit)
    dev_axes.legend(frameon=False, loc="best")
    for axes in reward_axes:
        _draw_margins(
            axes, margins, [(r["step"], r["dev"]["margin"]) for r in records if "dev" in r]
        )
    for axes in (loss_axes, dev_axes, *reward_axes):
        axes.set(xlabel="step", xlim=(0, 1.03 * records[-1]["step"]))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _draw_margins(axes: Any, train: Sequence[tuple[int, float]], dev: Sequence[Any]) -> None:
    """Draws by how much the reward of preferred completions is above that of others."""
    steps, raw = zip(*train, strict=True)
    axes.plot(steps, raw, color=BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(raw), color=BLUE, linewidth=1.8, label="train")
    axes.plot(*zip(*dev, strict=True), "o--", color=GREY, linewidth=1.5, label="dev")
    axes.set(title="Reward margin", ylabel="reward of preferred - of other")
    axes.legend(frameon=False, loc="best")


def in_picture(text: str) -> str:
    """A text as matplotlib draws it: without formulas, which it reads between dollars."""
    return visible(text, lines=False).replace("$", r"\$")


def _smooth(values: Sequence[float], share: float = 0.1) -> np.ndarray:
    """The running mean over a share of the values; the window is centred, and cut at the ends."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def write_report(run: Run, config: Mapping[str, Any], counts: Audit) -> None:
    """Writes the page of a finished run, whose curves are drawn already.

    Args:
        run: the run's directory.
        config: the run's configuration, with its summary.
        counts: the audit of what was trained.
    """
    summary, options = config["summary"], from_plain(RunOptions, config["options"])
    usage = task_of(config).usage(run.path.as_posix(), config)
    page = pages.render(
        "run",
        title=f"{config['task']}: {summary['results'][-1]['method']} on "
        f"{Path(config['model']).name}",
        results=results_table(summary["results"], config["metrics"]),
        sentence=_sentence(config),
        curves_uri=pages.data_uri(run.curves),
        samples=[
            (sample["prompt"], sample["completion"], sample["generated"])
            for sample in summary["results"][-1].get("samples", ())
        ],
        trained=(HEADERS, counts.rows()),
        totals=counts.totals(),
        shell=usage.shell,
        python=usage.python,
        again=shlex.join(["adapters-jax", "finetune", *words(options)]),
        configuration=list(settings(config)),
    )
    write_file(run.report, page.encode())


def _sentence(config: Mapping[str, Any]) -> str:
    """The results in words."""
    rows, summary = config["rows"], config["summary"]
    best = config["metrics"][0]
    skipped = summary.get("skipped_steps")
    skips = f" {skipped} steps overflowed float16 and were skipped." if skipped else ""
    return (
        f"Trained on {rows['train']:,} rows, selected on {rows['dev']:,} by {best} (best at step "
        f"{summary['best_step']}: {show_metric(best, summary['dev'][best])}), tested once on "
        f"{rows['test']:,}. The whole run took {duration(summary['seconds'])}.{skips}"
    )


def settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Lists the configuration of a run: each setting that has a value.

    An absolute path is shown as its last part, since the page may be read on another machine.

    Args:
        config: the run's configuration.

    Yields:
        The name of a setting, with dots for nested ones, and its value as text.

    Example:
        >>> config = {"model": "/home/me/tiny", "optimizer": {"clip": 1.0, "dropout": None}}
        >>> list(settings(config))
        [('model', 'tiny'), ('optimizer.clip', '1.0')]
    """
    for key, value in config.items():
        if key in _NOT_SETTINGS:
            continue
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, setting in inner:
            if setting not in (None, [], (), ""):
                yield f"{key}.{name}" if name else key, _shown(setting)


def _shown(setting: Any) -> str:
    if not isinstance(setting, str):
        return json.dumps(setting, ensure_ascii=False)
    path = Path(setting)
    return path.name if path.is_absolute() else setting
