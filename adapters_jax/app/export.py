"""An adapter with its model card, written for others in the format of their library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_jax.app.report.card import Source, card_of
from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.interop import formats
from adapters_jax.interop.directories import empty_directory
from adapters_jax.interop.formats import FILES, OWNERS, Format
from adapters_jax.io import hub
from adapters_jax.io.run_directory import Run, check_base, check_finished
from adapters_jax.io.untrusted import read_json
from adapters_jax.pretrained.base_model import load_host

CARD, RUN_CONFIG = "README.md", "config.json"
# Of a run's configuration, what says nothing of the machine it ran on or of single rows.
_PUBLIC: tuple[str, ...] = (
    "kind",
    "model",
    "base_sha256",
    "dtype",
    "max_length",
    "metrics",
    "pooling",
    "target",
)
_PUBLIC += ("text", "text_pair", "pairs", "prompts", "pack", "prompt", "completion", "task")
_PUBLIC += ("rows", "seed", "quantize", "method", "optimizer", "data_sha256", "versions", "format")


@dataclass(frozen=True)
class Written:
    """What was written, and what that cost.

    Attributes:
        files: bytes by name.
        parameters: of the source.
        notes: what is not in the files as it was, in words; empty where nothing was lost.
    """

    files: Mapping[str, int]
    parameters: int
    notes: Sequence[str]


def open_source(name: str, model: str | None = None, pooling: str | None = None) -> Source:
    """Reads an adapter from wherever it is, and its base.

    Args:
        name: a run's directory, an adapter's of adapters_jax, PEFT or AdapterHub, or an id on the
            Hub of any of these, with `@` and a revision or without.
        model: its base; by default the run's, or what the adapter's file calls it.
        pooling: what an encoder's head reads; a run knows.

    Raises:
        ValueError: there is none, it is damaged, or it says what cannot be honoured; the base is
            not known, or another one.
        AssetError: the pinned model could not be fetched.
    """
    every = {RUN_CONFIG, *(name for names in FILES.values() for name in names)}
    run = Run(hub.find(name, None, sorted(every)))
    config = None
    if run.config.is_file() and "base_sha256" in read_json(run.config):  # and no model's
        config = run.read_config(None)
        check_finished(run, config)
        pooling = config.get("pooling", pooling)
    kind = formats.format_of(run.adapter if config or run.adapter.is_dir() else run.path)
    base = model or (config["model"] if config else formats.said_base(run.adapter, kind))
    if base is None:
        raise AdapterFileError(
            f"{name!r} does not say what it was trained on; add --model with a pinned model, a "
            "directory, or an id on the Hugging Face Hub"
        )
    width, said = formats.head_of(run.adapter, kind)
    host = load_host(base, width, said or pooling)
    if config:
        check_base(run, {**config, "model": base}, host.sha256)
    recipe, leaves = formats.read(run.adapter, kind, host)
    return Source(kind, host, recipe, leaves, config)


def export(
    source: Source,
    directory: Path,
    to: Format,
    *,
    name: str | None = None,
    head: bool = True,
    license: str | None = None,
) -> Written:
    """Writes an adapter in a format, with its card; a run's goes with what prediction needs.

    Args:
        source: the adapter.
        directory: a new or empty one; it appears whole or not at all.
        to: the format.
        name: by which the card loads it; by default the directory.
        head: whether an encoder's head goes along.
        license: for the card.

    Returns:
        What was written, read again to see what it cost.

    Raises:
        ValueError: the format has no such thing as the adapter; everything is named at once.
    """
    empty_directory(directory)
    if not head:
        if to == "native":
            raise UserError("--no-head: a native adapter holds all that its recipe trains")
        source = source.without_head()
    formats.check_head(source.host, source.leaves, to)
    shown = name or directory.as_posix()
    notes = _notes(source, to, head)
    beside = {CARD: card_of(source, to, shown, license, notes)}
    if to == "native" and source.config:
        beside[RUN_CONFIG] = json.dumps(_public(source.config), indent=2, ensure_ascii=False) + "\n"
    formats.write(
        directory,
        to,
        source.host,
        source.recipe,
        source.leaves,
        name=re.sub(r"[^\w-]+", "-", shown.split("/")[-1]),
        labels=source.labels,
        beside=beside,
    )
    again = formats.read(directory, to, source.host)
    notes += formats.changes((source.recipe, source.leaves), again)
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    return Written(sizes, sum(leaf.size for leaf in source.leaves.values()), notes)


def _notes(source: Source, to: Format, head: bool) -> list[str]:
    """What another library's files have no place for, and where it is said instead."""
    if to == "native":
        return []
    notes, config = [], source.config or {}
    target = config.get("target", {})
    if not head:
        notes.append("the head is left out")
    elif source.labels and to == "peft":
        notes.append(f"PEFT's files do not name classes: 0 to n are {', '.join(source.labels)}")
    elif target and not source.labels:
        mean, std = target["mean"], target["std"]
        notes.append(f"the head's output y means {mean:g} + {std:g} y, which no file but this says")
    if config.get("quantize"):
        notes.append(f"it was trained on a base in {config['quantize']}, and suits that best")
    if config.get("prompts"):
        said = json.dumps(config["prompts"], ensure_ascii=False)
        notes.append(f"how prompts were put is said here alone: {said}")
    return notes


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """What others may know of a run's configuration, which is what its predictions need."""
    kept = {key: config[key] for key in _PUBLIC if key in config}
    summary = dict(config.get("summary", {}))
    summary.pop("run", None)
    rows = summary.get("results", [])
    summary["results"] = [{k: v for k, v in row.items() if k != "samples"} for row in rows]
    path = Path(kept["model"])
    return {**kept, "model": path.name if path.exists() else kept["model"], "summary": summary}


def describe(written: Written, to: Format, where: str) -> list[str]:
    """What was written, and what it cost, for people."""
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in written.files.items())
    lines = [f"{where} holds {written.parameters:,} parameters for {OWNERS[to]}: {sizes}"]
    lines += written.notes or ["read again, every tensor and setting is as it was"]
    return lines
