"""The adapter file: what was trained as safetensors, beside the recipe that it was trained by.

A directory holds `adapter.safetensors`, its tensors named by their slash paths, and
`adapter_config.json` with the recipe, the base's identity, versions and counts; docs/format.md says
it all. A file may come from anyone: see `untrusted`.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from jax.experimental import multihost_utils

from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.io import hub
from adapters_jax.io.atomic import Content, write_directory
from adapters_jax.io.identity import BaseIdentity, tree_sha256, with_tree
from adapters_jax.io.manifest import CONFIG, Manifest
from adapters_jax.io.tensors import (
    DTYPES,
    TensorFile,
    check_header,
    name_problem,
    not_finite,
    open_tensors,
)
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState
from adapters_jax.trees import flatten

TENSORS = "adapter.safetensors"


def save_adapter(
    directory: str | Path,
    adapters: Any,
    recipe: Recipe | Method | None = None,
    *,
    base: BaseIdentity | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter: its recipe and what it trained, never the frozen base.

    The directory appears whole or not at all, and takes the place of an adapter that was there. Of
    several processes all call it, and the first one writes.

    Args:
        directory: where; its parents are made.
        adapters: a `TrainState`; or, together with its recipe, the trained part of a model: a tree
            as `partition` gives, or an NNX state of `AdapterParam`.
        recipe: says what trains; not wanted with a `TrainState`.
        base: which base it was trained on, as `base_identity` says; of a `TrainState` the tree is
            known without.
        beside: further texts by file name, such as `{"README.md": aj.model_card(...)}`.

    Returns:
        The directory.

    Raises:
        ValueError: there is something else at that path, a leaf that the recipe does not train or a
            file cannot hold, numbers that are not finite, or a base of another tree than the
            state's.
        TypeError: the recipe is missing, or `adapters` is not a tree.
        OSError: the disk is full or cannot be written; what was there is as it was.

    Example:
        >>> import tempfile
        >>> from adapters_jax import LoRA
        >>> leaves = {"query": {"lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}}
        >>> with tempfile.TemporaryDirectory() as place:
        ...     saved = save_adapter(f"{place}/a", leaves, LoRA("query", rank=1))
        ...     recipe, tensors = read_adapter(saved)
        >>> recipe, tensors["query/lora/a"].shape
        (Recipe(
          LoRA(targets=('query',), rank=1),
        ), (3, 1))
    """
    if isinstance(adapters, TrainState):
        own = tree_sha256((adapters.adapters, adapters.base), adapters.recipe)
        base = with_tree(base, own, "save_adapter")
        adapters, recipe = adapters.trained, adapters.recipe
    if recipe is None:
        raise TypeError(
            "save_adapter(directory, adapters, recipe) wants the recipe, or a TrainState"
        )
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"save_adapter: {type(adapters).__name__} is not a tree of adapters; for an NNX model "
            "write aj.save_adapter(directory, nnx.state(model, aj.nnx.AdapterParam), recipe)"
        )
    recipe, directory = Recipe(recipe), Path(directory)
    there = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if there and not (directory / CONFIG).is_file():
        raise UserError(f"{directory} exists and is not an adapter; give another directory")
    flat = {path: _plain(leaf) for path, leaf in flatten(adapters).items()}
    _check_savable(flat, recipe)
    config = Manifest.of(recipe, base, flat).to_bytes(directory / CONFIG)

    def write_tensors(path: Path) -> None:
        try:
            safetensors.numpy.save_file(flat, path)
        except safetensors.SafetensorError as error:  # with the system's number in its text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
        path.chmod(0o644)  # safetensors writes it for its owner alone
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        check_header(length, path.stat().st_size, directory / TENSORS)

    files: dict[str, Content] = {**texts(beside), TENSORS: write_tensors, CONFIG: config}
    if jax.process_index() == 0:
        write_directory(directory.resolve(), files)  # of a link, what it points to is replaced
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_adapter {directory}")
    return directory


def texts(beside: Mapping[str, str] | None) -> dict[str, bytes]:
    """Texts as the files of a directory; raises ValueError where a name is no plain one."""
    for name in beside or {}:
        if Path(name).name != name:
            raise UserError(f"{name!r} is no name of a file in the adapter's directory")
    return {name: text.encode("utf-8") for name, text in (beside or {}).items()}


def _plain(leaf: Any) -> np.ndarray:
    """A leaf as an array that lies in order, of a dtype that jax would give it."""
    leaf = nn.meta.unbox(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype), order="C")


def _check_savable(flat: Mapping[str, np.ndarray], recipe: Recipe) -> None:
    """Raises ValueError for what no adapter file holds."""
    frozen = [path for path in flat if not recipe.trains(path)]
    if frozen:
        raise UserError(
            f"save_adapter: the recipe does not train {len(frozen)} of these leaves, such as "
            f"{frozen[0]}; give the trained part alone: adapters, _ = aj.partition(params, recipe)"
        )
    problems = [problem for path in flat if (problem := name_problem(path))]
    problems += [
        f"{path} is of {array.dtype}, which no adapter file holds; train floats"
        for path, array in flat.items()
        if array.dtype not in DTYPES.values() or not _kept(array.dtype)
    ]
    if problems:
        raise UserError(f"save_adapter: {'; '.join(problems)}")
    wrong = not_finite(flat)
    if wrong:
        raise UserError(
            f"save_adapter: numbers that are not finite in {wrong}; save a state from before "
            "training diverged"
        )


@contextlib.contextmanager
def opened_adapter(directory: Path) -> Iterator[tuple[Manifest, TensorFile]]:
    """What an adapter says of itself, and its tensors, which are not read yet."""
    for name in (CONFIG, TENSORS):
        if not os.path.lexists(directory / name):
            raise AdapterFileError(
                f"{directory} has no {name}; give a directory that save_adapter wrote"
            )
    manifest = Manifest.read(directory / CONFIG)
    with open_tensors(directory / TENSORS) as file:
        yield manifest, file


def read_arrays(file: TensorFile, manifest: Manifest) -> dict[str, jax.Array]:
    """The tensors by path; raises AdapterFileError where they are not what the manifest says."""
    for path, leaf in file.shapes.items():
        if not _kept(leaf.dtype):
            raise AdapterFileError(
                f"{file.path} has {leaf.dtype} in {path}, expected floats that jax keeps: "
                "call jax.config.update('jax_enable_x64', True) for those of 64 bits"
            )
    manifest.check_counts(file.shapes, file.path)
    return jax.device_put(file.read())


def _kept(dtype: Any) -> bool:
    """Whether a dtype is one of floats, and jax has arrays of it."""
    floats = jnp.issubdtype(dtype, jnp.inexact)
    return floats and jax.dtypes.canonicalize_dtype(dtype) == dtype


def find_adapter(directory: str | Path, revision: str | None = None) -> Path:
    """A directory, or the two files of an id on the Hub; raises AdapterFileError for neither."""
    return hub.find(directory, revision, (CONFIG, TENSORS))


def read_adapter(
    directory: str | Path, *, revision: str | None = None
) -> tuple[Recipe, dict[str, jax.Array]]:
    """Reads an adapter as it was written, without a model.

    Args:
        directory: as written by `save_adapter`, or an id on the Hugging Face Hub.
        revision: a branch, tag or commit there.

    Returns:
        The recipe, and the trained arrays by path.

    Raises:
        AdapterFileError: the directory is no adapter of this library, or is damaged; or there is
            none, here or on the Hub.
    """
    with opened_adapter(find_adapter(directory, revision)) as (manifest, file):
        return manifest.recipe, read_arrays(file, manifest)
