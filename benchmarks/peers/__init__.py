"""Compares adapters_jax with PEFT, AdapterHub, qwix, `nnx.LoRA` and SkyRL, and with code by hand.

All sides have the same arithmetic, shapes, dtype, batch and optimiser. PEFT and AdapterHub's
library run on PyTorch (eager, transformers' own classes, both cores), the others on JAX. All sides
start from one checkpoint and one adapter, written in the layout of each library. They must have
equal losses, logits and trainable counts before they are timed. Each side has its own process, and
they run in turn.

`python -m benchmarks peers` measures a step on queries and values, latency, files and imports. Its
further parts have results of their own: `peers-linear`, `peers-generation`, `peers-service`,
`peers-tenants`, and `peers-latency`, which is a part of the whole as well.
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks.peers import files, generation, latency, linear, service, steps, tenants, uses
from benchmarks.report import Report

PARTS = {
    "latency": latency.alone,
    "linear": linear.run,
    "generation": generation.run,
    "service": service.run,
    "tenants": tenants.run,
}


def run(report: Report, quick: bool, part: str = "") -> None:
    """Runs the benchmark, or one of its further parts; at toy sizes if quick."""
    if part:
        PARTS[part](report, quick)
        return
    sizes, rounds = (files.TOY, 2) if quick else (files.Sizes(), 7)
    directory = Path(tempfile.mkdtemp(prefix="adapters-jax-peers-"))
    try:
        files.write(directory, sizes)
        steps.run(report, directory, sizes, rounds)
        latency.run(report, directory, sizes, rounds=3 if quick else 31)
        uses.run(report, directory, sizes, rounds=1 if quick else 11, imports=1 if quick else 7)
    finally:
        shutil.rmtree(directory)
