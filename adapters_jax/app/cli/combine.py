"""`adapters-jax combine`: a weighted sum of the adapters of several runs, as a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax

from adapters_jax.app.console import Console
from adapters_jax.app.options.flags import given
from adapters_jax.io.adapter import read_adapter, save_adapter
from adapters_jax.io.run_directory import Run, RunError, check_base
from adapters_jax.pretrained.decoder import Decoder, load_decoder
from adapters_jax.transforms.combine import combine

_OF_A_TRAINING = ("summary", "stopped", "recipe", "options", "command", "data_sha256")


@dataclass(frozen=True)
class Combine:
    """Sums the LoRA of several runs on one decoder with weights, into a run that generates.

    What is summed is the change of each weight, scale * A B. "linear" is exact, and its rank is the
    sum of all ranks. The others are of full rank, of which the best of --rank is kept; what that
    loses is printed. The first run says how a prompt is put.

    Args:
        runs: directories of the runs.
        weights: one for each run; also negative ones.
        out: directory of the new run, which must not exist.
        how: linear: the sum. svd: the sum at a rank of your choice. ties: each trimmed to its
            largest entries, then the mean of those that agree in sign. dare: entries dropped at
            random, and the others enlarged.
        rank: of the result, but for linear.
        density: part of the entries that ties and dare keep; 0.5 by default.
        seed: of dare.
        json: print what was written as JSON.
    """

    examples: ClassVar[str] = """\
  adapters-jax combine runs/one runs/two --weights 0.7 0.3 --out runs/both
  adapters-jax combine runs/one runs/two --weights 1 -0.5 --how svd --rank 8 --out runs/both"""
    positional: ClassVar[tuple[str, ...]] = ("runs",)

    runs: tuple[Path, ...]
    weights: tuple[float, ...]
    out: Path
    how: Literal["linear", "svd", "ties", "dare"] = "linear"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0
    json: bool = False

    def prepare(self, output: Console) -> Callable[[], None]:
        """Reads the runs and sums them.

        Raises:
            ValueError: a run that cannot be used, runs of different bases, methods other than LoRA,
                or a directory that exists.
            AssetError: the pinned model could not be fetched.
        """
        out = Run(self.out)
        out.refuse_existing()
        runs = [Run(path) for path in self.runs]
        configs = [run.read_config("decoder") for run in runs]
        decoder = _decoder(runs, configs)
        combined = combine(
            decoder.model,
            [read_adapter(run.adapter) for run in runs],
            self.weights,
            how=self.how,
            rank=self.rank,
            density=self.density,
            key=jax.random.key(self.seed),
        )
        made = {**given(self), "runs": [run.path.as_posix() for run in runs]}
        made = {k: v for k, v in made.items() if k not in ("out", "json")}
        kept = {k: v for k, v in configs[0].items() if k not in _OF_A_TRAINING}

        def write() -> None:
            out.create({**kept, "combined": {**made, "error": combined.error}})
            adapters, recipe = combined.adapters, combined.recipe
            save_adapter(out.adapter, adapters, recipe, base=decoder.identity)
            lost = f"; the rank lost {combined.error:.2%} of the sum" if combined.error else ""
            output.say(f"{out.path} holds the sum of {len(runs)} adapters{lost}")
            output.result({"out": out.path.as_posix(), "error": combined.error})

        return write


def _decoder(runs: Sequence[Run], configs: Sequence[dict[str, Any]]) -> Decoder:
    """The one base of all runs; raises RunError where they have different ones."""
    for run, config in zip(runs, configs, strict=True):
        if config["base_sha256"] != configs[0]["base_sha256"]:
            raise RunError(
                f"{run.path} was trained on {config['model']} and {runs[0].path} on "
                f"{configs[0]['model']}, other weights; combine runs on one base"
            )
    decoder = load_decoder(configs[0]["model"], configs[0]["dtype"])
    check_base(runs[0], configs[0], decoder.sha256)
    return decoder
