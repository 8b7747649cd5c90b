"""The adapter file: what was trained as safetensors, beside the recipe that it was trained by.

A directory holds `adapter.safetensors`, its tensors named by their slash paths, and
`adapter_config.json` with the recipe and versions.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import linen as nn
from flax import nnx

from adapters_jax.adapt import adapt
from adapters_jax.errors import compare_trees
from adapters_jax.linen import init_adapters
from adapters_jax.methods import Method
from adapters_jax.nnx import AdapterParam
from adapters_jax.partition import Tree, flatten, merge_trees, partition, path_of, unflatten
from adapters_jax.recipe import Recipe
from adapters_jax.state import TrainState

FORMAT = 1
TENSORS, CONFIG = "adapter.safetensors", "adapter_config.json"
Adapter = tuple[Recipe | Method, Tree]


class AdapterFileError(ValueError):
    """An adapter directory that cannot be read."""


def save_adapter(
    directory: str | Path, adapters: Any, recipe: Recipe | Method | None = None
) -> Path:
    """Writes an adapter: its recipe and what it trained, never the frozen base.

    The directory appears whole or not at all, and takes the place of an adapter that was there.

    Args:
        directory: where; its parents are made.
        adapters: a `TrainState`; or, together with its recipe, the trained part of a model: a tree
            as `partition` gives, or an NNX state of `AdapterParam`.
        recipe: says what trains; not wanted with a `TrainState`.

    Returns:
        The directory.

    Raises:
        ValueError: there is something else at that path, or a leaf that the recipe does not train.
        TypeError: the recipe is missing, or `adapters` is not a tree.
    """
    if isinstance(adapters, TrainState):
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
    recipe = Recipe(recipe)
    directory = Path(directory)
    place = directory.resolve()  # what a link points to is replaced, not the link
    if directory.exists() and not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} exists and is not an adapter; give another directory")
    flat = {path: np.asarray(nn.meta.unbox(leaf)) for path, leaf in flatten(adapters).items()}
    frozen = [path for path in flat if not recipe.trains(path)]
    if frozen:
        raise ValueError(
            f"save_adapter: the recipe does not train {len(frozen)} of these leaves, such as "
            f"{frozen[0]}; give the trained part alone: adapters, _ = aj.partition(params, recipe)"
        )
    config = {
        "format": FORMAT,
        "adapters_jax": version("adapters-jax"),
        "recipe": json.loads(recipe.to_json()),
        "parameters": sum(x.size for x in flat.values()),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        beside.chmod(0o755)
        tensors = safetensors.flax.save({k: jnp.asarray(v) for k, v in flat.items()})
        _write(beside / TENSORS, tensors)
        _write(beside / CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        _put(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def _put(beside: Path, directory: Path) -> None:
    """Renames a finished directory into its place; what was there stays until then, or returns."""
    if not directory.exists():
        os.replace(beside, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    try:
        os.replace(directory, old)
        os.replace(beside, directory)
    finally:
        if directory.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, directory)


def _write(path: Path, data: bytes) -> None:
    """Writes a file through to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_adapter(directory: str | Path) -> tuple[Recipe, dict[str, jax.Array]]:
    """Reads an adapter as it was written, without a model.

    Returns:
        The recipe, and the trained arrays by path.

    Raises:
        AdapterFileError: the directory is no adapter of this library, or is damaged.
    """
    directory = Path(directory)
    for name in (CONFIG, TENSORS):
        if not (directory / name).is_file():
            raise AdapterFileError(
                f"{directory} has no {name}; give a directory that save_adapter wrote"
            )
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise AdapterFileError(
                f"{directory / CONFIG} is not of format {FORMAT}; it needs another adapters_jax"
            )
        tensors = safetensors.flax.load_file(directory / TENSORS)
    except (json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{directory} is damaged: {error}") from error
    try:
        return Recipe.from_json(config.get("recipe", {})), tensors
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{directory / CONFIG} holds no usable recipe: {error}") from error


def opened(adapter: Adapter | str | Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the leaves by path of an adapter, or of the directory it is in."""
    if isinstance(adapter, str | Path):
        return read_adapter(adapter)
    recipe, tree = adapter
    return Recipe(recipe), {path: nn.meta.unbox(leaf) for path, leaf in flatten(tree).items()}


def load_adapter(
    source: str | Path | Adapter, model: Any, params: Tree = None, *args: Any, **kwargs: Any
) -> Any:
    """Puts a saved adapter onto a base; the recipe comes from the file, with every rank and alpha.

    Args:
        source: a directory that `save_adapter` wrote; or an adapter as a pair, its recipe and what
            it trained, as `stack_layers`, `unstack_layers` and `load_peft` return it.
        model: the base, a linen or NNX module without adapters.
        params: linen only: the base's parameter tree.
        *args: example inputs, of which only shapes matter; NNX needs them where `adapt` does.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        linen: `(adapted model, params)`. NNX: the adapted model.

    Raises:
        AdapterFileError: the directory is no adapter, or is damaged.
        MismatchError: the adapter does not fit this base; every difference is named.
        TargetError: the recipe does not fit this base.
    """
    recipe, found = opened(source)
    tensors = {path: jnp.asarray(leaf) for path, leaf in found.items()}
    subject = "the adapter" if isinstance(source, tuple) else f"the adapter in {source}"
    fix = "Load it onto the base it was trained on."
    if isinstance(model, nnx.Module):
        grown = adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=args or None)
        state = nnx.state(grown, AdapterParam)
        compare_trees(subject, tensors, flatten(state), fix, dtypes=True)
        nnx.update(grown, jax.tree_util.tree_map_with_path(lambda p, _: tensors[path_of(p)], state))
        return grown
    adapted = adapt(model, recipe)
    # The base itself, since PiSSA takes its factors out of the weights.
    whole = init_adapters(adapted, params, jax.random.key(0), *args, **kwargs)
    trained, base = partition(whole, recipe)
    compare_trees(subject, tensors, nn.meta.unbox(flatten(trained)), fix, dtypes=True)
    return adapted, merge_trees(base, unflatten(tensors))
