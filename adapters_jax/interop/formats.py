"""Adapters of three formats: recognised, read, and written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adapters_jax.errors import AdapterFileError, OtherBaseError, UserError
from adapters_jax.interop import adapterhub, peft
from adapters_jax.interop.adapterhub import heads
from adapters_jax.interop.base_model import Host
from adapters_jax.io import adapter as files
from adapters_jax.io import hub, manifest
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.io.tensors import open_tensors
from adapters_jax.io.untrusted import read_json
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten, unflatten

Format = Literal["native", "peft", "adapterhub"]
FILES: Mapping[str, tuple[str, ...]] = {
    "native": (manifest.CONFIG, files.TENSORS),
    "peft": (peft.CONFIG, peft.TENSORS),
    "adapterhub": adapterhub.FILES,
}
OWNERS = {"native": "adapters_jax", "peft": "PEFT", "adapterhub": "AdapterHub"}
CONFIG = manifest.CONFIG  # the one name that all three have
HEAD = "head/"
_HEADS = re.compile(r"(?:.*\.)?(?:classifier|heads\.[^.]+\.[14])(?:\.modules_to_save)?\.weight")
_FREE = ("targets", "rank", "alpha", "rank_pattern", "alpha_pattern")
_SIZES = ("bottleneck_dim", "reduction_factor")


def format_of(directory: Path) -> Format:
    """Which library wrote an adapter's directory; raises AdapterFileError where none did."""
    values = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    if "peft_type" in values:
        return "peft"
    if "format" in values:
        return "native"
    if {"config", "name"} <= values.keys():
        return "adapterhub"
    raise AdapterFileError(
        f"{directory} is no adapter: it has no {CONFIG} of adapters_jax, PEFT or AdapterHub"
    )


def said_base(directory: Path, kind: Format) -> str | None:
    """What an adapter's own file calls its base."""
    if kind == "native":
        base = manifest.Manifest.read(directory / CONFIG).base
        return base.id if base else None
    values = read_json(directory / CONFIG)
    name = values.get("base_model_name_or_path" if kind == "peft" else "model_name")
    revision = values.get("revision") if kind == "peft" else None
    if not isinstance(name, str) or not name:
        return None
    return f"{name}@{revision}" if isinstance(revision, str) and hub.is_id(name) else name


def head_of(directory: Path, kind: Format) -> tuple[int | None, str | None]:
    """The width of an adapter's head, and what it reads; None where there is none or nobody says.

    A native adapter on a classifier has a head even where it does not train.
    """
    if kind == "native":
        with open_tensors(directory / files.TENSORS) as file:
            head = file.shapes.get(f"{HEAD}kernel")
            inside = any(path.startswith("bert/") for path in file.shapes)
        return (head.shape[-1] if head else 1 if inside else None), None
    name = peft.TENSORS if kind == "peft" else adapterhub.HEAD_TENSORS
    if not (directory / name).exists():
        return None, None
    with open_tensors(directory / name) as file:
        found = sorted(key for key in file.shapes if _HEADS.fullmatch(key))
        if not found:
            return None, None
        width = file.shapes[found[-1]].shape[0]
    if kind == "peft":
        return width, "pooler"
    return width, heads.pooling_of(read_json(directory / adapterhub.HEAD_CONFIG))


def read(directory: Path, kind: Format, host: Host) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the trained leaves by path.

    Raises:
        AdapterFileError: the files are damaged or for another base, or say what cannot be honoured.
    """
    if kind == "peft":
        recipe, leaves = peft.load_peft(directory, host.names, host.params)
        return recipe, flatten(leaves)
    if kind == "adapterhub":
        pooling = host.pooling if host.pooling in heads.POOLINGS else None
        recipe, leaves = adapterhub.load_adapterhub(
            directory, host.names, host.params, pooling=pooling
        )
        return recipe, flatten(leaves)
    base = manifest.Manifest.read(directory / CONFIG).base or BaseIdentity()
    inside = isinstance(host.params, dict) and "bert" in host.params  # how wide may not be known
    found = dataclasses.replace(base, tree_sha256=None) if inside else base
    differences = found.differences(host.identity)
    if differences:
        raise OtherBaseError(
            f"the adapter in {directory} was trained on another base than {host.name!r}: "
            f"{differences}; name the one that it was trained on"
        )
    return files.read_adapter(directory)


def write(
    directory: Path,
    to: Format,
    host: Host,
    recipe: Recipe,
    leaves: Mapping[str, Any],
    *,
    name: str = "adapter",
    labels: Sequence[str] = (),
    beside: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter in a format; the directory appears whole or not at all.

    Raises:
        ValueError: the format has no such thing, or the directory holds something.
    """
    tree = unflatten(dict(leaves))
    has_head = any(path.startswith(HEAD) for path in leaves)
    if to == "native":
        files.save_adapter(directory, tree, recipe, base=host.identity, beside=beside)
    elif to == "peft":
        peft.save_peft(
            directory,
            recipe,
            tree,
            host.names,
            host.params,
            prefix=_peft_prefix(host, has_head),
            beside=beside,
            task_type="CAUSAL_LM"
            if host.is_decoder
            else "SEQ_CLS"
            if has_head
            else "FEATURE_EXTRACTION",
            base_model_name_or_path=host.public,
            revision=hub.split(host.name)[1] if host.public else None,
        )
    else:
        adapterhub.save_adapterhub(
            directory,
            recipe,
            tree,
            host.names,
            host.params,
            name=name,
            prefix="roberta." if host.is_roberta else None,
            pooling=host.pooling if has_head else None,
            labels=labels,
            beside=beside,
            model_name=host.public,
        )


def _peft_prefix(host: Host, has_head: bool) -> str | None:
    """PEFT's modules are those of the class that its task makes of a base."""
    if host.is_decoder:
        return None
    return "" if not has_head else "roberta." if host.is_roberta else "bert."


def check_head(host: Host, leaves: Mapping[str, Any], to: Format) -> None:
    """Raises ValueError where a head would read something else in the other library."""
    if to == "native" or not any(path.startswith(HEAD) for path in leaves):
        return
    where = {"peft": ("pooler",), "adapterhub": ("pooler", "cls")}[to]
    if to == "peft" and host.is_roberta:
        problem = "a RoBERTa's head in PEFT has two layers, and this one has one"
    elif host.pooling is None:
        problem = "nobody says what its head reads: add --pooling pooler, cls or mean"
    elif host.pooling not in where:
        problem = f"its head reads {host.pooling}, and {OWNERS[to]}'s {' or '.join(where)}"
    else:
        return
    raise UserError(
        f"the head cannot go to {OWNERS[to]}: {problem}; --no-head leaves it out, and the adapter "
        "needs another one there"
    )


def changes(
    before: tuple[Recipe, Mapping[str, Any]], after: tuple[Recipe, Mapping[str, Any]]
) -> list[str]:
    """What an adapter that was written and read again is not as it was, each in words."""
    (old, ours), (new, theirs) = before, after
    found = [
        f"{len(paths)} tensors {word}, such as {paths[0]}"
        for word, paths in (
            ("are gone", sorted(ours.keys() - theirs.keys())),
            ("are new", sorted(theirs.keys() - ours.keys())),
            ("are others", _unequal(ours, theirs)),
        )
        if paths
    ]
    fields: dict[str, None] = {}
    for path in ours.keys() & theirs.keys():
        pair = old.owner(path), new.owner(path)
        if pair[0] and pair[1]:
            fields |= dict.fromkeys(_fields(pair[0][1], pair[1][1]))
    return found + sorted(fields)


def _unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    both = ours.keys() & theirs.keys()
    return sorted(path for path in both if not np.array_equal(ours[path], theirs[path]))


def _fields(old: Any, new: Any) -> list[str]:
    """The fields of a method that became others; sizes are seen by the tensors."""
    kind = type(old).__name__
    if type(new) is not type(old):
        return [f"{kind} is read as {type(new).__name__}"]
    pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)]
    return [
        f"{kind}.{name} {was!r} is read as {now!r}"
        for name, was, now in pairs
        if was != now and name not in (*_FREE, *_SIZES)
    ]
