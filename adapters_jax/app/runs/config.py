"""What a run's `config.json` says, and whether two runs are the same one."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from adapters_jax.app.console import Output
from adapters_jax.app.options.flags import plain, words
from adapters_jax.app.options.optimizer import OptimizerOptions
from adapters_jax.app.options.settings import RunOptions
from adapters_jax.data.datasets import TaskData
from adapters_jax.io.run_directory import FORMAT, Run, RunError
from adapters_jax.recipe import Recipe


def shared_config(
    options: RunOptions, sha256: str, task: TaskData, recipe: Recipe, training: OptimizerOptions
) -> dict[str, Any]:
    """What a run's `config.json` says whatever the base is."""
    if training.lora_plus != 1.0 and not any(m.slot == "lora" for m in recipe):
        raise ValueError(f"--lora-plus: a rate for LoRA's B, and {options.method.title} has none")
    own = {field.name: getattr(options, field.name) for field in fields(RunOptions)}
    path = Path(options.model)
    model = str(path.resolve()) if path.exists() else options.model
    return {
        "model": model,
        "base_sha256": sha256,
        "dtype": options.dtype,
        "quantize": options.quantize,
        "task": task.name,
        "rows": {part: len(getattr(task, part)) for part in ("train", "dev", "test")},
        "seed": options.seed,
        "data": plain(options.data),
        "method": options.method.title,
        "recipe": json.loads(recipe.to_json()),
        "optimizer": plain(training),
        "data_sha256": _sha256(task),
        "command": words(RunOptions(**{**own, "model": model})),
        "versions": _versions(),
    }


def check_unfinished(run: Run, config: dict[str, Any]) -> None:
    """Raises RunError where there is nothing to go on with."""
    if "summary" in config:
        raise RunError(f"{run.path} is finished: see {run.report}")
    if "stopped" in config:
        raise RunError(f"{run.path} would stop again: {config['stopped']}")


def check_same(run: Run, config: dict[str, Any], output: Output) -> None:
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
