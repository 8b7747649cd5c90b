"""Writes and reads a run's `config.json`, and compares the settings of two runs."""

import hashlib
import itertools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from adapters_jax.errors import UserError
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.options.flags import absolute, from_plain, plain
from adapters_jax.finetune.options.method import DEFAULT
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.pretrained.record import OF_BASE, BaseRecord, changes, with_changes
from adapters_jax.finetune.run_directory import FORMAT, Run, RunError
from adapters_jax.finetune.tasks import task_of
from adapters_jax.methods import AdaLoRA, LoRA
from adapters_jax.recipe import Recipe, as_compared

_TURNS = ("assistant", "last", "all")  # the values of --turns, which was --loss
_ELSEWHERE = ("--runs=", "--name=")  # the run's directory, which is not among its options


def shared_config(
    options: RunOptions,
    base: BaseRecord,
    task: TaskData,
    recipe: Recipe,
    training: OptimizerOptions,
) -> dict[str, Any]:
    """The part of `config.json` that runs on encoders and decoders share."""
    if training.lora_plus not in (None, 1.0) and not any(isinstance(m, LoRA) for m in recipe):
        raise UserError(
            f"--lora-plus: for methods with LoRA; {options.title} has none, leave it out"
        )
    if training.target_rank and not any(isinstance(m, AdaLoRA) for m in recipe):
        raise UserError(
            f"--target-rank: for adalora, and {options.title} has no budget; leave it out"
        )
    own = {field.name: getattr(options, field.name) for field in fields(RunOptions)}
    names = {"model": _anywhere(options.model), "init_from": _anywhere(options.init_from)}
    return {
        "model": names["model"],
        **base.to_config(),
        "dtype": options.dtype,
        "quantize": options.quantize,
        "task": task.name,
        "rows": {part: len(getattr(task, part)) for part in ("train", "dev", "test")},
        "seed": options.seed,
        "data": plain(options.data),
        "method": options.title,
        "recipe": json.loads(recipe.to_json()),
        "optimizer": plain(training),
        "data_sha256": _sha256(task),
        "options": plain(RunOptions(**{**own, **names})),
        "versions": _versions(),
        **({"streamed": True} if task.streamed else {}),
    }


def _anywhere(name: str | None) -> str | None:
    """The name of a model or an adapter that means the same in any directory."""
    return str(absolute(Path(name))) if name and Path(name).exists() else name


def read_options(run: Run, config: Mapping[str, Any]) -> RunOptions:
    """Reads the options that a run was started with.

    Runs of older versions store them as the words of a command line, in `command`.

    Raises:
        RunError: an option is unknown or has the wrong type, or there are no options.
    """
    found = _stored_options(run, config)
    if found.method.recipe is not None and found.method.method == DEFAULT:
        # A run that was started when houlsby was the default stores it beside its recipe.
        return replace(found, method=replace(found.method, method=None))
    return found


def _stored_options(run: Run, config: Mapping[str, Any]) -> RunOptions:
    """The options as a run stores them."""
    options, command = config.get("options"), config.get("command")
    try:
        if isinstance(options, dict):
            return from_plain(RunOptions, _with_label(_with_turns(options)))
        if isinstance(command, list):
            words = [w for w in command if not w.startswith(_ELSEWHERE)]
            was = {f"--loss={turns}": f"--turns={turns}" for turns in _TURNS}
            return parse(RunOptions, [was.get(word, word) for word in words])
    except UserError as error:
        raise RunError(f"{run.config} is damaged: its options: {error}") from error
    raise RunError(f"{run.where} was not written by adapters-jax finetune; start a new run")


def read_schedule(run: Run, config: Mapping[str, Any]) -> OptimizerOptions:
    """Reads what a run's training took from defaults or options, such as the learning rate.

    Raises:
        RunError: they are absent, or of the wrong type.
    """
    stored = config.get("optimizer")
    try:
        kept = {name: stored[name] for name in ("epochs", "learning_rate")}  # type: ignore[index]
        others = {"head_learning_rate", "dropout"} & stored.keys()  # type: ignore[union-attr]
        kept |= {name: stored[name] for name in others}  # type: ignore[index]
        return from_plain(OptimizerOptions, kept)
    except (LookupError, TypeError, UserError) as error:
        raise RunError(f"{run.config} is damaged: its optimizer: {error}") from error


def _with_turns(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the key `turns`, which was called `loss` in older runs."""
    if settings.get("loss") not in _TURNS:
        return dict(settings)
    return {"turns": settings["loss"], **{k: v for k, v in settings.items() if k != "loss"}}


def _with_label(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose data have no label where it is the default, which older runs store."""
    data = settings.get("data")
    if not isinstance(data, dict) or data.get("label") != "label":
        return dict(settings)
    scored = data.get("task") == "sentence-embedding"  # its default is no column
    return {**settings, "data": data if scored else {**data, "label": None}}


def comparable(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its options in the current form, for a comparison."""
    others = {key: value for key, value in config.items() if key != "command"}
    return {**others, "options": plain(read_options(run, config))}


def check_unfinished(run: Run, config: dict[str, Any]) -> None:
    """Raises RunError if the run is finished, or would stop again."""
    if "summary" in config:
        raise RunError(f"{run.where} is finished: see {run.report}")
    if "stopped" in config:
        raise RunError(f"{run.where} would stop again: {config['stopped']}")


def check_same(
    run: Run, config: dict[str, Any], console: Console, any_base: bool = False
) -> dict[str, Any]:
    """Raises RunError if a run would continue with other settings than it was started with.

    Returns:
        The configuration with which it continues: the new one, and what changed of the base.
    """
    before = run.read_config(None)
    check_unfinished(run, before)
    differing = differences(comparable(run, before), comparable(run, config))
    if "versions" in differing:
        differing.remove("versions")
        console.say(changed_versions(before, config))
    if differing:
        raise RunError(
            f"{run.where} was started with another {', '.join(differing)} than there is now; put "
            "that back, or start a new run"
        )
    found = changes(run, before, config)
    if found and not any_base:
        versions = changed_versions(before, config)
        raise RunError(
            f"{run.where} was started with other rows or another base: {'; '.join(found)} "
            f"({versions}); put that back, start a new run, or go on knowingly with --any-base"
        )
    return with_changes(before, config, found)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the settings that differ between two configurations of runs.

    An option at its default is no difference, since newer versions have more of them. Nor is
    `{a,b}` for `{a|b}` in a recipe. What comes of the base is for `changes`.
    """

    def today(config: Mapping[str, Any]) -> dict[str, Any]:
        stored = {**_with_label(_with_turns(json.loads(json.dumps(config)))), "format": FORMAT}
        for key in ("ways_out", *OF_BASE):  # the first follows from the others
            stored.pop(key, None)
        if isinstance(stored.get("data"), dict):  # its task is the task_type
            stored["data"] = {k: v for k, v in stored["data"].items() if k != "task" and v}
            if isinstance(stored["data"].get("train"), str):  # older runs have one file
                stored["data"]["train"] = [stored["data"]["train"]]
        if isinstance(stored.get("optimizer"), dict):
            stored["optimizer"] = plain(OptimizerOptions()) | stored["optimizer"]
        stored["recipe"] = as_compared(stored.get("recipe"))
        stored["task_type"] = stored.get("task_type") or task_of(stored).name
        return stored

    was, are = today(before), today(now)
    return [key for key in sorted(was.keys() | are.keys()) if was.get(key) != are.get(key)]


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A sentence on the versions that changed since a run was started."""
    was, are = before.get("versions"), now["versions"]
    was = was if isinstance(was, Mapping) else {}
    changed = ", ".join(f"{k} {was.get(k)} -> {are[k]}" for k in are if was.get(k) != are[k])
    return f"{changed}: what follows may differ in the last digits"


def _sha256(task: TaskData) -> str:
    """The SHA-256 of all texts and labels."""
    digest = hashlib.sha256()
    for p in (task.train, task.dev, task.test):
        digest.update(b"[[" if p is task.train else b", [")
        # The hash is in the files of runs, so it stays that of the JSON text of all parts.
        for piece in itertools.chain(_json(p.texts), [", "], _json(p.labels), ["]"]):
            digest.update(piece.encode())
    digest.update(b"]")
    return digest.hexdigest()


def _json(values: Any) -> Iterator[str]:
    """The JSON text of texts or labels, in pieces."""
    if not isinstance(values, Sequence):
        yield json.dumps(values, default=lambda labels: labels.tolist())
        return
    yield "["
    for number, value in enumerate(values):
        yield f"{', ' * (number > 0)}{json.dumps(value, default=lambda x: x.tolist())}"
    yield "]"


def _versions() -> dict[str, str]:
    """The versions and the device that the figures of a run may depend on."""
    packages = ("adapters-jax", "jax", "flax", "optax", "tokenizers")
    found = {name: version(name) for name in packages}
    return {**found, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
