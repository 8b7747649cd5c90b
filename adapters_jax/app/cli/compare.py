"""`adapters-jax compare`: recipes, learning rates and seeds on one task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adapters_jax.app.compare.comparison import Comparison
from adapters_jax.app.compare.options import CompareOptions
from adapters_jax.app.console import Console
from adapters_jax.errors import file_errors
from adapters_jax.io.run_directory import Run


@dataclass(frozen=True)
class Compare(CompareOptions):
    """Compares recipes on one task: what each reaches, against the parameters that it trains.

    Every recipe is trained with every learning rate and seed; each such cell is a run of finetune,
    in a directory of its own. The rate is chosen on dev, and what is reported is test: mean and
    standard deviation over the seeds. The same command goes on with a comparison that was cut off,
    and trains nothing twice.

    Args:
        json: print JSON for machines on stdout; everything else goes to stderr.
    """

    examples: ClassVar[str] = """\
  adapters-jax compare --limit 1000 --seeds 0 1
  adapters-jax compare --recipes "houlsby --bottleneck-dim 8" "houlsby --bottleneck-dim 64" full
  adapters-jax compare --recipes "lora --rank 4 --learning-rates 1e-3 4e-3" mine.json --seeds 0 1
  adapters-jax compare --train train.csv --test test.csv --text review --label stars --out stars
  adapters-jax compare --model smollm2-135m --train e2e.csv --prompt mr --completion ref"""

    json: bool = False

    def prepare(self, output: Console) -> Comparison:
        """Reads and checks everything; the directory is made last.

        Raises:
            ValueError: flags, files or rows that cannot be used, or cells of another comparison.
            AssetError: the pinned model or the movie reviews could not be fetched.
            FileSystemError: the directory cannot be made.
        """
        options, grid, cells, out = self.check(output)
        with file_errors(out, "made"):
            out.mkdir(parents=True, exist_ok=True)
        lock = Run(out).lock()
        return Comparison(options, grid, cells, out, output, lock)
