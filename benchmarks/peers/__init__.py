"""Compares adapters_jax with PEFT, AdapterHub, qwix and `nnx.LoRA`, and with a step by hand.

All sides have the same arithmetic, shapes, dtype, batch and optimiser. PEFT and AdapterHub's
library run on PyTorch (eager, transformers' own classes, both cores), the others on JAX. All sides
start from one checkpoint and one adapter, written in the layout of each library. They must have
equal losses, logits and trainable counts before they are timed. Each side has its own process, and
they run in turn.
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks.peers import files, latency, steps, uses
from benchmarks.report import Report


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    sizes, rounds = (files.TOY, 2) if quick else (files.Sizes(), 7)
    directory = Path(tempfile.mkdtemp(prefix="adapters-jax-peers-"))
    try:
        files.write(directory, sizes)
        steps.run(report, directory, sizes, rounds)
        latency.run(report, directory, sizes, rounds=3 if quick else 31)
        uses.run(report, directory, sizes, rounds=1 if quick else 11, imports=1 if quick else 7)
    finally:
        shutil.rmtree(directory)
