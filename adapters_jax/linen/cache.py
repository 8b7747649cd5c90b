"""The cache of a linen model whose rows have an adapter each: which axes of its arrays are rows."""

from typing import Any

import jax
from flax import struct

from adapters_jax.methods.mixed import Grouped
from adapters_jax.trees import Tree


@struct.dataclass
class Cache:
    """The collection "cache" with the axis of the rows for each array; -1 where all share it.

    Rows are the first axis, in scanned layers the one after the layers: there, `cache_index`, which
    flax's attention keeps beside its keys and values, has the layers' axes alone.
    """

    tree: Tree
    axes: tuple[int, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, tree: Any, n: int) -> Any:
        """A cache for n rows; what a call with taken rows returned is returned unchanged."""
        if isinstance(tree, cls | Grouped):
            return tree
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        layers = {path[:-1]: x.ndim for path, x in leaves if _name(path) == "cache_index"}

        def axis(path: Any, x: Any) -> int:
            at = layers.get(path[:-1], 0)
            return at if x.ndim > at and x.shape[at] == n else -1

        return cls(tree, tuple(axis(path, x) for path, x in leaves))

    def row_axes(self) -> Any:
        """The same tree with the axis of the rows for each array."""
        return jax.tree.unflatten(jax.tree.structure(self), self.axes)

    def marking(self, result: tuple[Any, Any]) -> tuple[Any, Any]:
        """What a call returned, with the axes on its changed cache, if that has the same arrays."""
        y, changed = result
        before: Any = jax.tree.structure(self.tree)
        if before != jax.tree.structure(changed.get("cache")):
            return result
        return y, {**changed, "cache": Cache(changed["cache"], self.axes)}


def plain(result: Any) -> Any:
    """What a call returned, with caches as they came; those of taken rows keep their axes."""
    is_own = lambda x: isinstance(x, Cache | Grouped)  # noqa: E731
    return jax.tree.map(lambda x: x.tree if isinstance(x, Cache) else x, result, is_leaf=is_own)


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", ""))
