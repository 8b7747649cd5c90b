"""`adapters-jax compare`: compares recipes on one task, over learning rates and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters_jax.finetune.compare.options import CompareOptions
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command

if TYPE_CHECKING:
    from adapters_jax.finetune.compare.comparison import ComparisonJob


@dataclass(frozen=True)
class Compare(CompareOptions, Command):
    """Compares recipes on one task: the score of each, and the parameters that it trains.

    Each recipe is trained with its learning rates and seeds. Each of these cells is a run of
    finetune, in its own directory. The learning rate is chosen on dev. The report shows the mean
    and standard deviation on test over the seeds. The same command continues a comparison that was
    interrupted, and trains nothing twice.
    """

    examples = """\
  adapters-jax compare --limit 1000 --seeds 0 1
  adapters-jax compare --recipes "houlsby --bottleneck-dim 8" \\
    "houlsby --bottleneck-dim 64" full
  adapters-jax compare --recipes "lora --rank 4 --learning-rates 1e-3 4e-3" \\
    mine.json --seeds 0 1
  adapters-jax compare --train train.csv --test test.csv --text review \\
    --label stars --out stars
  adapters-jax compare --model smollm2-135m --train e2e.csv --prompt mr \\
    --completion ref"""

    def prepare(self, console: Console) -> ComparisonJob:
        """Reads and checks everything, then makes the directory."""
        from adapters_jax.finetune.compare.comparison import prepare_comparison

        return prepare_comparison(self, console)
