"""Writes the files of a comparison: the summary, one line for each cell, picture and page."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters_jax.errors import file_errors
from adapters_jax.files.atomic import write_file
from adapters_jax.finetune.compare.cells import Cells
from adapters_jax.finetune.compare.grid import Cell, Grid, Result
from adapters_jax.finetune.compare.options import CompareOptions
from adapters_jax.finetune.compare.tradeoff import tradeoff
from adapters_jax.finetune.console import duration
from adapters_jax.finetune.inference.comparison import (
    AGAIN,
    SUMMARY,
    comparison_table,
    read_summary,
    show_spread,
)
from adapters_jax.finetune.options.flags import portable, portable_path, words
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.report import pages
from adapters_jax.finetune.report.papers import bibtex, papers_of
from adapters_jax.finetune.report.pictures import svg, write_png
from adapters_jax.finetune.report.run import notes, settings
from adapters_jax.finetune.run_directory import Run, RunError, damage_errors
from adapters_jax.finetune.tasks import task_of
from adapters_jax.finetune.tasks.base import Usage
from adapters_jax.finetune.tasks.metrics import better, show_metric
from adapters_jax.finetune.tasks.views import Judged

Summary = dict[str, Any]
CELLS, PAGE = "cells.jsonl", "comparison.html"  # files
_SHOWN = ("model", "base_sha256", "dtype", "quantize", "rows", "data_sha256", "max_length")


def summarize(
    options: CompareOptions, grid: Grid, cells: Cells, out: Path, results: Mapping[Cell, Result]
) -> Summary:
    """Builds the content of `comparison.json`."""
    first = cells.checked[grid.candidates[0].text].config
    rows, papers = [], dict[str, None]()
    for candidate in grid.candidates:
        checked = cells.checked[candidate.text]
        papers |= dict.fromkeys(papers_of(candidate.method, checked.config["recipe"]))
        percent = 100 * checked.trainable_parameters / max(checked.base_parameters, 1)
        size = {"trainable_parameters": checked.trainable_parameters, "percent": percent}
        rows.append({**grid.row(candidate, results), **size})
    return {
        "out": out.as_posix(),
        "task": first["task"],
        "metrics": first["metrics"],
        "seeds": list(grid.seeds),
        "tuning_seeds": grid.tuning_seeds,
        "done": len(results),
        "missing": sum(row["missing"] for row in rows),
        "seconds": round(sum(r.get("seconds", 0.0) for r in results.values()), 1),
        "recipes": rows,
        "best": _best(options, grid, rows),
        "command": options.command,
        "notes": notes(task_of(first).views(first, Judged())),
        "papers": [*papers],
        "configuration": {name: first.get(name) for name in (*_SHOWN, "versions")},
    }


def _best(
    options: CompareOptions, grid: Grid, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The recipe with the best mean on dev, its first cell, and the command that trains that."""
    best: Mapping[str, Any] | None = None
    for row in rows:
        mean = row["dev"][grid.metric]["mean"] if "dev" in row else None
        if mean is None:
            continue
        if best is None or better(grid.metric, mean, best["dev"][grid.metric]["mean"]):
            best = row
    if best is None:
        return None
    cell = Cell(best["recipe"], best["learning_rate"], best["seeds"][0])
    alone = replace(options.run_options(cell), baselines=True)
    command = shlex.join(["adapters-jax", "finetune", *words(alone)])
    run = (Path("cells") / cell.name).as_posix()
    return {"recipe": cell.recipe, "seed": cell.seed, "run": run, "command": command}


def write_comparison(out: Path, summary: Summary, results: Sequence[Result]) -> None:
    """Writes the files of a comparison; each file is replaced as a whole."""
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    write_file(out / CELLS, lines.encode())
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    write_file(out / SUMMARY, f"{text}\n".encode())
    task, metric = summary["task"], summary["metrics"][0]
    figure = tradeoff({task: summary["recipes"]}, {task: metric})
    write_png(out / "comparison.png", figure)
    write_file(out / PAGE, _page(out, figure, summary, results).encode())


def rewrite_comparison(out: Path) -> None:
    """Writes the files of a comparison anew, from its summary and its cells.

    Raises:
        RunError: one of these two is absent or damaged.
    """
    summary = read_summary(out)
    with file_errors(out / CELLS, error=RunError):
        lines = (out / CELLS).read_text(encoding="utf-8").splitlines()
    with damage_errors(f"a file of {out}", AGAIN):
        write_comparison(out, summary, [json.loads(line) for line in lines])


def _usage(out: Path, best: Mapping[str, Any]) -> Usage | None:
    """How to use the best cell; None if it is not there, or an older version wrote the summary."""
    run = Run(out / best.get("run", ""))
    if "run" not in best or not run.path.exists():
        return None
    config = run.read_config(None)
    return task_of(config).usage(f"{portable_path(out)}/{best['run']}", config)


def _page(out: Path, figure: Any, summary: Summary, results: Sequence[Result]) -> str:
    best, metric = summary["best"], summary["metrics"][0]
    usage = _usage(out, best) if best else None
    base = Path(summary["configuration"]["model"]).name
    return pages.render(
        "comparison",
        title=f"{summary['task']}: {len(summary['recipes'])} recipes on {base}",
        metric=metric,
        results=comparison_table(summary, ("dev", "test")),
        sentence=_sentence(summary),
        notes=summary.get("notes", ()),
        picture=svg(figure, _alt(summary)),
        cells=_cells_table(metric, results),
        again=portable(summary["command"], CompareOptions),
        best=best,
        seed=best["seed"] if usage else None,
        usage=usage,
        alone=portable(best["command"], RunOptions) if best else None,
        cite=bibtex(summary.get("papers", ())),
        configuration=list(settings(summary["configuration"])),
    )


def _alt(summary: Summary) -> str:
    """The picture in words."""
    metric = summary["metrics"][0]
    points = [
        f"{row['recipe']}: {row['trainable_parameters']:,}, {show_spread(metric, spread)}"
        for row in summary["recipes"]
        if (spread := row.get("test", {}).get(metric)) and spread["mean"] is not None
    ]
    start = f"Trainable parameters and test {metric} of each recipe"
    return f"{start}. {'; '.join(points)}." if points else f"{start}; none is finished."


def _sentence(summary: Summary) -> str:
    """Describes in words how the results were made, and which runs are missing."""
    rows, metric = summary["configuration"]["rows"], summary["metrics"][0]
    tuned = any(row["learning_rate"] is None or row["tuned"] for row in summary["recipes"])
    sentences = [
        f"Trained on {rows['train']:,} rows; mean and standard deviation of test ({rows['test']:,} "
        f"rows) over up to {len(summary['seeds'])} seeds. The {summary['done']} runs took together "
        f"{duration(summary['seconds'])}."
    ]
    if tuned:
        seeds = summary["seeds"][: summary["tuning_seeds"]]
        which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
        sentences.append(
            f"Learning rates were chosen by {metric} on dev ({rows['dev']:,} rows) with {which}."
        )
    if summary["best"] is not None:
        sentences.append(f"The best on dev is {summary['best']['recipe']}.")
    if summary["missing"]:
        left = [f"{r['recipe']} ({r['missing']})" for r in summary["recipes"] if r["missing"]]
        sentences.append(f"{summary['missing']} runs are missing: {'; '.join(left)}.")
    return " ".join(sentences)


def _cells_table(metric: str, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    header = ["recipe", "learning rate", "seed", f"dev {metric}", f"test {metric}", "took"]
    return header, [
        [
            result["recipe"],
            f"{result['learning_rate']:g}",
            str(result["seed"]),
            *(
                ["diverged", "", ""]
                if "stopped" in result
                else [
                    show_metric(metric, result["dev"][metric]),
                    show_metric(metric, result["test"][metric]),
                    duration(result["seconds"]),
                ]
            ),
        ]
        for result in results
    ]
