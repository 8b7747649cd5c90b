"""Reads and writes adapter directories of other libraries: JSON settings, safetensors tensors.

A pickled file is never opened, because unpickling runs whatever code the file holds.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from safetensors.numpy import save

from adapters_jax.errors import AdapterFileError, UserError, file_errors, full_name, shortened
from adapters_jax.files import hub
from adapters_jax.files.adapter import TENSORS, texts
from adapters_jax.files.atomic import write_directory
from adapters_jax.files.layouts import Array
from adapters_jax.files.manifest import CONFIG
from adapters_jax.files.tensors import read_tensors
from adapters_jax.files.untrusted import read_json
from adapters_jax.trees import Tree, flatten


def read_pair(
    directory: Path, config: str, tensors: str, pickle: str, advice: str
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Reads the settings and the tensors of a directory.

    Args:
        directory: the directory with both files.
        config, tensors: the files' names.
        pickle: the name of a pickled file that the directory may have instead of `tensors`.
        advice: how to convert the pickled file, for the message.

    Raises:
        AdapterFileError: a file is absent, pickled or damaged, or exceeds a limit of ours.
    """
    lacking = [name for name in (config, tensors) if not (directory / name).is_file()]
    if lacking:
        # A pickled file is never fetched from the Hub, so it may exist there.
        possible = (directory / pickle).exists() or hub.commit_of(directory)
        pickled = f"; {advice}" if possible else ""
        own = (directory / TENSORS).is_file()
        ours = "; it has an adapter of adapters_jax, which aj.load_adapter reads" if own else ""
        raise AdapterFileError(f"{directory} lacks {' and '.join(lacking)}{pickled}{ours}")
    return read_json(directory / config), read_tensors(directory / tensors)


def pair(
    config: tuple[str, Mapping[str, Any]], tensors: tuple[str, Mapping[str, Array]]
) -> dict[str, bytes]:
    """Returns the bytes of both files by name; each argument is a file's name and its content."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors[1].items()}
    text = json.dumps(config[1], indent=2, sort_keys=True) + "\n"
    return {config[0]: text.encode(), tensors[0]: save(whole, {"format": "pt"})}


def write(directory: Path, files: Mapping[str, bytes], beside: Mapping[str, str] | None) -> Path:
    """Writes files and further texts, by name, as a directory that appears whole or not at all."""
    write_directory(directory.resolve(), {**texts(beside), **files})
    return directory


def empty_directory(directory: str | Path) -> Path:
    """Returns the path of a new or empty directory; raises `UserError` for any other."""
    directory = Path(directory)
    if _names(directory):
        raise UserError(f"{directory} exists and is not empty; give another directory")
    return directory


def adapter_directory(owner: str, directory: str | Path, files: Collection[str], mark: str) -> Path:
    """Returns the path of a directory that is new, empty, or just an adapter of one format.

    Args:
        owner: the format's library, for the message.
        directory: the directory.
        files: the names of all files that the adapter may have.
        mark: a key of the format's `adapter_config.json` that no other format has.

    Raises:
        UserError: there is a file of another name, or an adapter of another format.
        AdapterFileError: its `adapter_config.json` is damaged.
    """
    directory = Path(directory)
    names = _names(directory)
    others = names - {*files}
    if names and (others or CONFIG not in names or not _has(directory / CONFIG, mark)):
        raise UserError(
            f"{directory} exists and is not just an adapter of {owner}: it has "
            f"{shortened(', '.join(sorted(others or names)))}; give another directory"
        )
    return directory


def _has(config: Path, key: str) -> bool:
    """Whether a file has a key, or is gone since another process replaces its directory."""
    try:
        return key in read_json(config)
    except AdapterFileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return True
        raise


def _names(directory: Path) -> set[str]:
    """The names in a directory, none if it is absent, with a / behind those of directories.

    Raises:
        UserError: it is a file.
    """
    with file_errors(directory):
        try:
            with os.scandir(directory) as entries:
                return {f"{each.name}/" if each.is_dir() else each.name for each in entries}
        except FileNotFoundError:  # so is one that another process moves away meanwhile
            return set()
        except NotADirectoryError:
            raise UserError(f"{directory} is not a directory; give another path") from None


def flat_leaves(owner: str, adapters: Tree) -> dict[str, Array]:
    """Returns a tree's leaves by path; raises `TypeError` for anything but a tree."""
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"{owner}: {full_name(type(adapters))} is not a tree of adapters; write "
            "adapters, _ = aj.partition(params, recipe), or nnx.state(model, aj.nnx.AdapterParam); "
            "an aj.TrainState has state.trained"
        )
    return {path: np.asarray(nn.meta.unbox(leaf)) for path, leaf in flatten(adapters).items()}


def field_problems(
    config: Mapping[str, Any],
    supported: Collection[str],
    idle: Collection[str],
    expected: Callable[[str, Any], list[str]],
) -> list[str]:
    """Lists the unsupported settings, each as `field=value` with the reason.

    Args:
        config: the settings.
        supported: the supported fields.
        idle: fields without effect. All others must be null, false or empty.
        expected: returns the problems of a supported field's value, given both.
    """
    problems = []
    for field, found in config.items():
        if field in idle or found is None:
            continue
        if field in supported:
            problems += [f"{field}={found!r}, {reason}" for reason in expected(field, found)]
        elif found is not False and found not in ({}, [], ""):
            problems.append(f"{field}={found!r} is not supported")
    return problems
