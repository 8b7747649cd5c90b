"""Reports a finished run: a table of results, pictures, and an HTML page."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from adapters_jax.auditing import HEADERS
from adapters_jax.files.atomic import write_file
from adapters_jax.finetune.console import duration
from adapters_jax.finetune.options.flags import from_plain, portable, portable_path, words
from adapters_jax.finetune.options.method import HEAD_ONLY
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.report import pages
from adapters_jax.finetune.report.findings import read_findings
from adapters_jax.finetune.report.papers import bibtex, papers_of
from adapters_jax.finetune.report.pictures import (
    Picture,
    curves,
    figure_of,
    histogram,
    scatter,
    svg,
    write_png,
)
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.tasks import task_of
from adapters_jax.finetune.tasks.metrics import PERCENT, better, show_metric
from adapters_jax.finetune.tasks.views import Histogram, Note, Scatter, View

TITLES = {HEAD_ONLY: "frozen base, trained head"}
# The page shows these elsewhere; what the files of the base say is no setting of the run.
_NOT_SETTINGS = ("data", "options", "summary", "target", "base_files")


def results_table(
    results: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Builds the table of results.

    Args:
        results: one for each method, as `summary.results` in a run's `config.json` holds them.
        metrics: names of the test metrics to show.

    Raises:
        RunError: a result lacks one of the metrics.

    Example:
        >>> row = {"method": "lora", "trainable_parameters": 1234, "test": {"f1": 0.5}}
        >>> results_table([row], ["f1"])
        (['method', 'trainable parameters', 'test f1'], [['lora', '1,234', '50.0 %']])
    """
    if any({*metrics} - row["test"].keys() for row in results):
        raise RunError(
            f"results lack one of the metrics {', '.join(metrics)}: config.json is damaged"
        )
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


def write_report(run: Run, config: Mapping[str, Any]) -> None:
    """Writes the curves and the page of a finished run, from its files.

    Raises:
        RunError: a file of the run is damaged.
    """
    summary, metrics = config["summary"], config["metrics"]
    findings, options = read_findings(run), from_plain(RunOptions, config["options"])
    task, method = task_of(config), summary["results"][-1]["method"]
    drawn = curves(
        [record for record in run.read_log() if record["method"] == method],
        method,
        metrics[0],
        {
            TITLES.get(row["method"], row["method"]): row["dev"][metrics[0]]
            for row in summary["results"][:-1]
        },
        percent=metrics[0] in PERCENT,
    )
    if not drawn:
        raise RunError(
            f"{run.metrics} has no loss and no score of {method}; there is no other copy"
        )
    write_png(run.curves, figure_of(drawn))
    views = task.views(config, findings.judged)
    usage = task.usage(run.where if run.mirror else portable_path(run.path), config)
    page = pages.render(
        "run",
        title=f"{config['task']}: {method} on {Path(config['model']).name}",
        results=results_table(summary["results"], metrics),
        sentence=_sentence(config),
        notes=[*no_better(config), *notes(views)],
        curves=[drawn_svg(picture) for picture in drawn],
        views=[shown_view(view) for view in views if not isinstance(view, Note)],
        samples=[
            (sample["prompt"], sample["completion"], sample["generated"])
            for sample in summary["results"][-1].get("samples", ())
        ],
        trained=(HEADERS, findings.trained),
        totals=findings.totals,
        shell=usage.shell,
        python=usage.python,
        again=portable(shlex.join(["adapters-jax", "finetune", *words(options)]), RunOptions),
        cite=bibtex(papers_of(options.method, config["recipe"])),
        configuration=list(settings(config)),
    )
    write_file(run.report, page.encode())


def no_better(config: Mapping[str, Any]) -> list[str]:
    """A sentence, if a run's score on dev is no better than that of a baseline."""
    *baselines, own = config["summary"]["results"]
    metric = config["metrics"][0]
    as_good = [
        f"{TITLES.get(row['method'], row['method'])} ({show_metric(metric, row['dev'][metric])})"
        for row in baselines
        if not better(metric, own["dev"][metric], row["dev"][metric])
    ]
    if not as_good:
        return []
    return [
        f"{metric} on dev, {show_metric(metric, own['dev'][metric])}, is no better than that of "
        f"the {' and of the '.join(as_good)}: the training does not help; try a lower "
        "--learning-rate, or more --epochs"
    ]


def notes(views: Sequence[View]) -> list[str]:
    """The sentences among views."""
    return [view.text for view in views if isinstance(view, Note)]


def shown_view(view: View) -> tuple[Any, Any]:
    """A view, and its picture if it has one."""
    if isinstance(view, Histogram):
        return view, drawn_svg(histogram(view))
    return view, drawn_svg(scatter(view)) if isinstance(view, Scatter) else None


def drawn_svg(picture: Picture) -> Markup:
    """A picture as a part of a page."""
    return svg(figure_of([picture]), picture.alt)


def _sentence(config: Mapping[str, Any]) -> str:
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
