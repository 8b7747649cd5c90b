"""What a checkpoint keeps of a training's state, as plain arrays by path, and back."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from adapters_jax.files.identity import tree_sha256
from adapters_jax.training.state import TrainState
from adapters_jax.trees import Tree, leaves_by_path, path_of, with_leaves


def identity_of(state: TrainState) -> dict[str, Any]:
    """What a checkpoint belongs to: the recipe, and the paths and shapes of the base."""
    tree = tree_sha256((state.adapters, state.base), state.recipe)
    return {"recipe": json.loads(state.recipe.to_json()), "base": tree}


def kept_of(state: TrainState, best: Tree | None) -> dict[str, Any]:
    """What a checkpoint keeps of a state.

    The frozen leaves of methods are among it, since a new state may have drawn others, such as the
    factors that VeRA's modules share.
    """
    frozen = {p: x for p, x in leaves_by_path(state.base).items() if state.recipe.keeps(p)}
    return {**state.checkpointed, "frozen": frozen, "best": best}


def plain_arrays(kept: dict[str, Any]) -> dict[str, jax.Array]:
    """The same as plain arrays by path; orbax cannot save empty ones."""
    return {path: _plain(x) for path, x in leaves_by_path(kept).items() if jnp.size(x)}


def rebuilt(
    state: TrainState, arrays: Mapping[str, jax.Array], with_best: bool
) -> tuple[dict[str, Any], Tree | None]:
    """The inverse of `plain_arrays`: a state's fields, and the best adapters."""

    def leaf(path: Any, like: Any) -> Any:
        array = arrays.get(path_of(path), like)
        if not _is_key(like):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))

    kept = jax.tree_util.tree_map_with_path(
        leaf, kept_of(state, state.adapters if with_best else None)
    )
    kept["base"] = with_leaves(state.base, kept.pop("frozen"))
    return kept, kept.pop("best")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    """The integers of a key; any other array as it is."""
    return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)


def whole(x: jax.Array) -> Any:
    """An array that several processes hold parts of, in the memory of each."""
    return np.asarray(multihost_utils.process_allgather(_plain(x), tiled=True))


@jax.jit
def copied(arrays: Any) -> Any:
    """Copies on the device, in one program."""
    return jax.tree.map(jnp.copy, arrays)
