"""State that is not a parameter: what of it an adapter's files hold, in linen and NNX.

Statistics, such as those of a batch norm, belong to what was trained, and so does every Variable of
a class of the user's own. Caches, sown values and random streams do not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adapters_jax.errors import UserError
from adapters_jax.trees import Tree, leaves_by_path, with_leaves

_NOT_KEPT = nnx.Any(nnx.Param, nnx.RngState, nnx.Cache, nnx.Intermediate)
_COLLECTIONS_NOT_KEPT = ("cache", "intermediates", "perturbations")


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
