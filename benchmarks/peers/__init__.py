"""adapters_jax beside what people use today: the same arithmetic, shapes, dtype, batch, optimiser.

PEFT and AdapterHub's library on PyTorch (eager, transformers' own classes, both cores), qwix and
`nnx.LoRA` on JAX, and the same step by hand. All sides start from one checkpoint and one adapter,
written in each library's own layout, and must have equal losses, logits and trainable counts before
anything is timed. Each has a process of its own; they take turns in one run.
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks.peers import files, latency, steps, uses
from benchmarks.report import Report


def run(report: Report, quick: bool) -> None:
    """The whole benchmark; at toy sizes if quick."""
    sizes, rounds = (files.TOY, 2) if quick else (files.Sizes(), 7)
    place = Path(tempfile.mkdtemp(prefix="adapters-jax-peers-"))
    try:
        files.write(place, sizes)
        steps.run(report, place, sizes, rounds)
        latency.run(report, place, sizes, rounds=3 if quick else 31)
        uses.run(report, place, sizes, rounds=1 if quick else 11, imports=1 if quick else 7)
    finally:
        shutil.rmtree(place)
