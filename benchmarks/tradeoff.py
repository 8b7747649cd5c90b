"""Compares scores with trainable parameters on MiniLM, as Houlsby et al. 2019 do (figures 1 and 3).

A run takes one data set and calls `adapters-jax compare` with Houlsby's adapters at four widths,
LoRA at two ranks, the top layers, the layer norms, the biases, and full fine-tuning, over three
seeds. For Houlsby at m = 64 and full fine-tuning, the best of three learning rates is chosen on dev
with the first seed; the others have the default of their method. Training takes a part of the rows
for few epochs, so that the grid of 37 cells takes an hour on two cores. An interrupted run
continues with its cells in comparisons/, and the results hold the result of each cell. The paper
reaches 80.0 on GLUE with 3.6 % of the parameters for each task; full fine-tuning of BERT-large
reaches 80.4.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.report import Report, Row, Verdict

GLUE = Path(os.environ.get("GLUE", ROOT.parent / "shared" / "data"))  # with cola/ and stsb/
HOULSBY, FULL = "houlsby --bottleneck-dim 64", "full"
RECIPES = (
    f"{HOULSBY} --learning-rates 2e-3 1e-3 4e-3",
    f"{FULL} --learning-rates 5e-5 2e-5 1e-4",
    *(f"houlsby --bottleneck-dim {m}" for m in (2, 8, 256)),
    *(f"lora --rank {rank}" for rank in (1, 8)),
    *(f"last-layers --layers {k}" for k in (1, 3)),
    "layer-norms",
    "bitfit",
)
DATA = {
    "movies": ["--limit", "4000", "--epochs", "2"],
    "cola": ["--glue", "cola", "--data", str(GLUE / "cola"), "--limit", "4000", "--epochs", "3"],
    "stsb": ["--glue", "stsb", "--data", str(GLUE / "stsb"), "--limit", "3000", "--epochs", "1"],
}
GAP, PERCENT = 0.4, 4.0


def run(report: Report, quick: bool, data: str) -> None:
    """Runs the comparison on one of `DATA`; with two recipes on a few rows if quick."""
    flags = [*DATA[data], "--recipes", *RECIPES, "--seeds", "0", "1", "2"]
    if quick:
        flags = [*DATA[data], "--recipes", HOULSBY, FULL, "--seeds", "0"]
        flags += ["--limit", "32", "--epochs", "1", "--max-length", "16"]
    out = ROOT / "comparisons" / f"{data}{'-quick' if quick else ''}"
    found = compared([*flags, "--evaluations", "1", "--out", str(out)])
    metric, rows = found["metrics"][0], {row["recipe"]: row for row in found["recipes"]}
    for row in sorted(found["recipes"], key=lambda row: row["trainable_parameters"]):
        report.add(f"{data}, test {metric}", **_shown(row, metric))
    _verdict(report, data, metric, rows[HOULSBY], rows[FULL])
    shutil.copy(out / "comparison.png", report.directory / f"{report.name}.png")
    shutil.copy(out / "cells.jsonl", report.directory / f"{report.name}-cells.jsonl")


def compared(flags: list[str]) -> Any:
    """Runs `adapters-jax compare --json`, with its progress shown, and returns its result."""
    command = [sys.executable, "-m", "adapters_jax.app.cli.main", "compare", *flags, "--json"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {ran.returncode}")
    return json.loads(ran.stdout)


def _shown(row: Row, metric: str) -> Row:
    test = row["test"][metric]
    return {
        "recipe": row["recipe"],
        "trainable": row["trainable_parameters"],
        "% of the base": row["percent"],
        "learning rate": row["learning_rate"],
        "tried": row["tuned"],
        "seeds": len(row["seeds"]),
        "mean": 100 * test["mean"],
        "deviation": None if test["deviation"] is None else 100 * test["deviation"],
    }


def _verdict(report: Report, data: str, metric: str, houlsby: Row, full: Row) -> None:
    """Reports whether Houlsby's adapters reach full fine-tuning with few parameters."""
    means = [100 * row["test"][metric]["mean"] for row in (houlsby, full)]
    gap, part = means[1] - means[0], houlsby["percent"]
    what = f"{data}: points that full fine-tuning is above Houlsby, m = 64 ({part:.2g} %)"
    report.claim(what, gap, GAP)
    verdict: Verdict = "reproduced" if gap <= GAP and part <= PERCENT else "not reproduced"
    report.verdict(
        "adapters reach full fine-tuning with 3.6 % of the parameters (Houlsby et al.)",
        "GLUE: 80.0 against 80.4",
        f"{means[0]:.1f} against {means[1]:.1f} with {part:.2g} %",
        f"{data}, test {metric} x 100, MiniLM, mean of {len(full['seeds'])} seeds",
        verdict,
    )
