"""The adapter file: the trained tensors as safetensors, beside the recipe that trained them.

A directory holds `adapter.safetensors`, its tensors named by their slash paths, and
`adapter_config.json` with the recipe, the base's identity, versions and counts. State that is not a
parameter, such as a batch norm's statistics, is in `state.safetensors`: it belongs to what was
trained, as does every Variable of a class of the user's own, but not caches, sown values and random
streams. docs/format.md specifies the files. They may come from anyone: see `untrusted`.
"""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from jax.experimental import multihost_utils

from adapters_jax.errors import AdapterFileError, OtherBaseError, UserError, first_few, full_name
from adapters_jax.files import hub
from adapters_jax.files.atomic import Content, write_directory
from adapters_jax.files.destinations import own_directory, texts, unmoved
from adapters_jax.files.identity import BaseIdentity, tree_sha256, with_tree
from adapters_jax.files.manifest import CONFIG, Manifest
from adapters_jax.files.untrusted import (
    DTYPES,
    TensorFile,
    check_header,
    name_problem,
    not_finite,
    open_tensors,
)
from adapters_jax.methods import Method
from adapters_jax.nnx import ADAPTERS, recipe_of
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.placement import Known, Placements
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState, check_alive, checked_collections
from adapters_jax.trees import Tree, flatten, leaves_by_path, unflatten, with_leaves
from adapters_jax.weights.fingerprints import check_unmoved
from adapters_jax.weights.quantized import unboxed

TENSORS, STATE = "adapter.safetensors", "state.safetensors"
FILES = (CONFIG, TENSORS, STATE)
_NOT_KEPT = nnx.Any(nnx.Param, nnx.RngState, nnx.Cache, nnx.Intermediate)
_COLLECTIONS_NOT_KEPT = ("cache", "intermediates", "perturbations")
_LOG = logging.getLogger(__name__)


def save_adapter(
    directory: str | Path,
    adapters: Any,
    recipe: Recipe | Method | None = None,
    *,
    collections: Mapping[str, Tree] | None = None,
    base: BaseIdentity | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter: its recipe, its tensors and its statistics, not the frozen base.

    The tensors are those that train, and those of its recipe's frozen entries.

    State that is not a parameter belongs to the adapter: a batch norm's statistics, and any other
    NNX Variable or linen collection, without caches and random streams. It is bit-exact after
    `load_adapter`. Arrays of an NNX model that are not Variables are taken for constants.

    The directory appears whole or not at all, and replaces an adapter of this library of that name;
    other files beside it are never lost. If there are several processes, all of them must call
    this; the first one writes.

    Args:
        directory: the directory to write; its parents are created. Also an address in an object
            store, `"gs://bucket/mine"` or `"s3://bucket/mine"`.
        adapters: a `TrainState` or an adapted NNX model; or, together with its recipe, the
            adapter's part of a model: a tree as `adapters_of` gives, or an NNX state of `ADAPTERS`,
            which has no statistics.
        recipe: what trains; leave it out with a `TrainState` or a model, which have one.
        collections: the statistics of a linen model, where `adapters` is a tree of its parameters:
            `{"batch_stats": variables["batch_stats"]}`.
        base: the base that it was trained on, from `base_identity`; a `TrainState` and a model add
            the hash of their parameter tree.
        beside: further text files by name, such as `{"README.md": aj.model_card(...)}`.

    Returns:
        The directory.

    Raises:
        UserError: the path holds anything else, the recipe does not train a leaf, the file format
            cannot hold a leaf, a trained number is not finite, an NNX model has no adapters, or
            `base` or `recipe` is not that of the state or model.
        AdapterFileError: the settings of the adapter there are damaged.
        MismatchError: frozen parameters moved since the model got its adapters.
        TypeError: `directory` is no path, the recipe is missing, `adapters` is not a tree, or
            collections are given beside a `TrainState` or a model.
        FileSystemError: the disk is full or cannot be written; the old directory is unchanged.

    Example:
        >>> import tempfile
        >>> from adapters_jax import LoRA
        >>> leaves = {"query": {"lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_adapter(f"{folder}/a", leaves, LoRA("query", rank=1))
        ...     recipe, tensors = read_adapter(saved)
        >>> recipe, tensors["query/lora/a"].shape
        (Recipe(
          LoRA(targets=('query',), rank=1),
        ), (3, 1))
    """
    check_directory("save_adapter", directory, "save_adapter(directory, adapters, recipe)")
    if isinstance(adapters, TrainState | nnx.Module):
        if collections is not None:
            raise TypeError("save_adapter: collections are for a tree of adapters; leave them out")
        adapters, recipe, base, other, placements = _parts_of(adapters, recipe, base)
    else:
        placements = None
        other = checked_collections("save_adapter", collections)
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"save_adapter: {full_name(type(adapters))} is not a tree of adapters; give an "
            "aj.TrainState, an adapted NNX model, or aj.partition(params, recipe)[0] and the recipe"
        )
    if recipe is None:
        raise TypeError(
            "save_adapter: the recipe is missing; write save_adapter(directory, adapters, recipe), "
            "or give an aj.TrainState"
        )
    recipe = Recipe(recipe)
    files = (CONFIG, TENSORS, STATE, *(beside or ()))
    directory = own_directory(directory, "adapters_jax", files, CONFIG, "recipe")
    leaves = flatten(adapters)
    _check_kept(leaves, recipe)
    flat = {path: _plain(leaf) for path, leaf in leaves.items()}
    state = {path: _plain(leaf) for path, leaf in state_by_path(other).items()}
    _check_savable(flat, state)
    config = Manifest.of(recipe, base, flat, state, placements).to_bytes(directory / CONFIG)
    written: dict[str, Content] = {**texts(beside), TENSORS: _writer(flat, directory / TENSORS)}
    if state:
        written[STATE] = _writer(state, directory / STATE)
    written[CONFIG] = config
    if jax.process_index() == 0:
        write_directory(directory, written)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_adapter {directory}")
    return directory


def check_directory(caller: str, directory: Any, call: str) -> None:
    """Raises TypeError where an argument is no path, as where arguments are swapped."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"{caller}: the directory is a {type(directory).__name__}, expected a path; "
            f"write {call}"
        )


def _parts_of(
    subject: TrainState | nnx.Module, recipe: Recipe | Method | None, base: BaseIdentity | None
) -> tuple[Tree, Recipe, BaseIdentity, Any, Placements]:
    """The adapters, the recipe, the base's identity, other state than parameters, the placements.

    Raises:
        UserError: `recipe` or `base` is given and is another one.
    """
    if isinstance(subject, TrainState):
        check_alive(subject)
        adapters, own = subject.trained, subject.recipe
        frozen, other, known = subject.base, subject.other, subject.placements or Known()
    else:
        own = recipe_of(subject)
        adapters, frozen, other = nnx.state(subject, ADAPTERS, nnx.Param, ...)
        known = Known(placements_of(subject))
    if recipe is not None and Recipe(recipe) != own:
        raise UserError(
            f"save_adapter: the recipe {recipe} is given, and what is saved has the recipe {own}; "
            "leave the recipe out"
        )
    in_nnx = isinstance(subject, nnx.Module) or subject.graphdef is not None
    tree = tree_sha256((adapters, frozen), own)
    leaves = {**flatten(adapters), **flatten(frozen)}
    placements = known.of(own, {path: tuple(unboxed(x).shape) for path, x in leaves.items()})
    kept = {path: x for path, x in leaves.items() if own.keeps(path)}
    check_unmoved("save_adapter", {p: x for p, x in leaves.items() if p not in kept}, in_nnx)
    return unflatten(kept), own, with_tree(base, tree, "save_adapter"), other, placements


def state_by_path(other: Any) -> dict[str, Any]:
    """The state that an adapter's files hold, by path.

    Args:
        other: linen's collections, or an `nnx.State`; arrays or abstract.

    Returns:
        The leaves by their paths in the model, in linen without the collection's name, so that both
        APIs have the same paths. Arrays that are no Variables are constants, and left out.

    Raises:
        UserError: two collections have an array at one path.

    Example:
        >>> state_by_path({"batch_stats": {"norm": {"mean": 1.0}}, "cache": {"index": 3}})
        {'norm/mean': 1.0}
    """
    found: dict[str, Any] = {}
    twice: list[str] = []
    for part in _parts(other).values():
        leaves = {path: x for path, x in leaves_by_path(part).items() if not _is_key(x)}
        twice += sorted(found.keys() & leaves.keys())
        found |= leaves
    if twice:
        raise UserError(
            f"two collections of {', '.join(other)} have an array at {', '.join(twice)}, and an "
            "adapter's files name state by its path alone; rename one of the variables"
        )
    return found


def with_state(other: Tree, leaves: Mapping[str, Any]) -> Tree:
    """State with new leaves by path, the inverse of `state_by_path`; what it leaves out stays.

    Example:
        >>> with_state({"batch_stats": {"norm": {"mean": 1.0}}}, {"norm/mean": 2.0})
        {'batch_stats': {'norm': {'mean': 2.0}}}
    """
    parts = {name: with_leaves(part, leaves) for name, part in _parts(other).items()}
    return parts[""] if isinstance(other, nnx.State) else {**other, **parts}


def _parts(other: Any) -> dict[str, Tree]:
    """What is kept: linen's collections by name, or one `nnx.State` under an empty name."""
    if isinstance(other, nnx.State):
        kept = nnx.All(nnx.Variable, nnx.Not(_NOT_KEPT))
        return {"": nnx.filter_state(other, kept)}
    return {name: x for name, x in (other or {}).items() if name not in _COLLECTIONS_NOT_KEPT}


def _is_key(x: Any) -> bool:
    """Whether a leaf is a random key."""
    return jax.dtypes.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _writer(tensors: Mapping[str, np.ndarray], target: Path) -> Callable[[Path], None]:
    """A function that writes tensors to a path, which is renamed to `target` later."""

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode & 0o777  # that of the umask, which safetensors ignores
        try:
            safetensors.numpy.save_file(dict(tensors), path)
        except safetensors.SafetensorError as error:  # its text ends with the system's error number
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
        path.chmod(mode)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        check_header(length, path.stat().st_size, target)

    return write


def _plain(leaf: Any) -> np.ndarray:
    """A leaf as a C-contiguous numpy array, in the dtype that jax would give it."""
    leaf = nn.meta.unbox(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype), order="C")


def _check_kept(leaves: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises UserError where leaves are not the recipe's, as in a whole tree, or are missing."""
    owners = [owner for owner in recipe.owners(leaves).values() if not owner.shared]
    there = {owner.method for owner in owners}
    lacking = [f"those of {m.name!r}" for m in recipe.attached if not m.train and m not in there]
    lacking += [path for owner in owners for path in owner.paths().values() if path not in leaves]
    if lacking:
        raise UserError(
            f"save_adapter: the adapter lacks {first_few(list(dict.fromkeys(lacking)))}; give all "
            "of it, frozen leaves too: aj.adapters_of(params, recipe), an aj.TrainState, or "
            "nnx.state(model, aj.nnx.ADAPTERS)"
        )
    frozen = [path for path in leaves if not recipe.keeps(path)]
    if frozen:
        raise UserError(
            f"save_adapter: the recipe does not train {len(frozen)} of these leaves, such as "
            f"{frozen[0]}; give the trained part alone: adapters, _ = aj.partition(params, recipe)"
        )


def _check_savable(flat: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
    """Raises UserError for leaves that an adapter's files cannot hold."""
    problems = [problem for path in (*flat, *state) if (problem := name_problem(path))]
    problems += [
        f"{path} has the dtype {array.dtype}, which an adapter file cannot hold; train floats"
        for path, array in flat.items()
        if array.dtype not in DTYPES.values() or not _kept(array.dtype)
    ]
    problems += [
        f"{path} has the dtype {array.dtype}, which a safetensors file cannot hold"
        for path, array in state.items()
        if array.dtype not in DTYPES.values()
    ]
    if problems:
        raise UserError(f"save_adapter: {'; '.join(problems)}")
    wrong = not_finite(flat)
    if wrong:
        raise UserError(
            f"save_adapter: {wrong} has numbers that are not finite; save a state from before "
            "training diverged"
        )


@contextlib.contextmanager
def opened_adapter(directory: Path) -> Iterator[tuple[Manifest, TensorFile, TensorFile | None]]:
    """The manifest of an adapter, its tensors, and its state if it has any; opened but not read."""
    for name in (CONFIG, TENSORS):
        if not os.path.lexists(directory / name):
            inner = directory / "adapter"  # where a run of the command line has its own
            if os.path.isfile(inner / CONFIG):
                raise AdapterFileError(f"{directory} has no {name}; its adapter is in {inner}")
            raise AdapterFileError(
                f"{directory} has no {name}; give a directory that save_adapter wrote. One of "
                "PEFT is read by load_peft(directory, NAMES, base) of adapters_jax.files.peft, "
                "one of AdapterHub by load_adapterhub of adapters_jax.files.adapterhub; "
                "`adapters-jax convert THEIRS OURS --to native --model BASE` makes one of either"
            )
    with contextlib.ExitStack() as files:
        with unmoved(directory):
            manifest, state = Manifest.read(directory / CONFIG), None
            tensors = files.enter_context(open_tensors(directory / TENSORS))
            if manifest.state_tensors:
                state = files.enter_context(open_tensors(directory / STATE))
        if state is not None:
            manifest.check_state(state.shapes, state.path)
        yield manifest, tensors, state


def read_arrays(file: TensorFile, manifest: Manifest) -> dict[str, jax.Array]:
    """The tensors by path; raises AdapterFileError if they contradict the manifest."""
    for path, leaf in file.shapes.items():
        if not _kept(leaf.dtype):
            raise AdapterFileError(
                f"{file.path} has {leaf.dtype} in {path}, expected floats that jax keeps: "
                "call jax.config.update('jax_enable_x64', True) for those of 64 bits"
            )
    manifest.check_counts(file.shapes, file.path)
    return jax.device_put(file.read())


def read_state(file: TensorFile) -> dict[str, jax.Array]:
    """The state that is not parameters by path, of any dtype and any value."""
    return jax.device_put(file.read(finite=False))


def _kept(dtype: Any) -> bool:
    """Whether a dtype is a float (or complex) that jax keeps as it is."""
    floats = jnp.issubdtype(dtype, jnp.inexact)
    return floats and jax.dtypes.canonicalize_dtype(dtype) == dtype


def find_adapter(directory: str | Path, revision: str | None = None) -> Path:
    """A directory, or the snapshot of an id on the Hub; raises AdapterFileError if neither."""
    return hub.find(directory, revision, FILES)


def read_adapter(
    directory: str | Path, *, revision: str | None = None, base: BaseIdentity | None = None
) -> tuple[Recipe, dict[str, jax.Array]]:
    """Reads an adapter as it was written, without a model.

    State that is not a parameter, which only `load_adapter` restores, is not read, with a warning.

    Args:
        directory: as written by `save_adapter`, or an id on the Hugging Face Hub, or an address in
            an object store.
        revision: a branch, tag or commit on the Hub.
        base: the base that it is for, from `base_identity`, as for a `Bank`; None reads any.

    Returns:
        The recipe, and the trained arrays by path, `"query/lora/a"`, in the shapes and dtypes of
        the file.

    Raises:
        OtherBaseError: it was trained on another base than `base`.
        AdapterFileError: neither the disk nor the Hub has the directory, it does not hold an
            adapter of this library, or it is damaged.

    Example:
        >>> import tempfile
        >>> from adapters_jax import Unfreeze
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained = {"head": {"bias": np.array([1.0, 2.0], np.float32)}}
        ...     saved = save_adapter(f"{folder}/a", trained, Unfreeze("head/**"))
        ...     recipe, arrays = read_adapter(saved)
        >>> arrays["head/bias"].tolist()
        [1.0, 2.0]
    """
    with opened_adapter(find_adapter(directory, revision)) as (manifest, file, state):
        known = manifest.base.differences(base) if manifest.base and base else ""
        if known:
            raise OtherBaseError(
                f"the adapter in {file.path.parent} was trained on another base: {known}; read it "
                "for that base, or, where you know that it fits this one, without base="
            )
        if state is not None:
            _LOG.warning("%s is not read, only load_adapter restores it", state.path)
        return manifest.recipe, read_arrays(file, manifest)
