"""Calls of a model where each row of the batch has its own adapter.

The model runs once, mapped over the rows: the base's arrays are shared, so that its products stay
those of the whole batch, and each row brings its adapter's arrays. So a row's output is what the
adapter alone computes, whatever the model and the methods are.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from adapters_jax.errors import UserError, shown
from adapters_jax.methods.arrays import over_layers
from adapters_jax.trace.mapping import vmap
from adapters_jax.trace.through import holding
from adapters_jax.weights.meshes import groups_split, over_groups

# Set while a model is traced under a vmap over adapters: for each prompt how many of its tokens
# count, by the path of its attention module. Between `by_rows` and the methods and kernels that
# read it lies the user's own model, whose calls take no argument of ours; and jax does not show
# under a vmap that it is one, since tracers have the shapes of a single row.
_MAPPED: ContextVar[Mapping[str, Any] | None] = ContextVar("mapped", default=None)


def mapping(lengths: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """What is traced in the body is mapped over adapters.

    Args:
        lengths: of the prompts that have fewer tokens than their arrays hold, the number that
            counts, by the path of the attention module; may be traced.
    """
    return holding(_MAPPED, lengths or {})


def mapped() -> bool:
    """Whether what is traced now is mapped over adapters, which some kernels do not stand."""
    return _MAPPED.get() is not None


def counting(path: str, tokens: int) -> Bool[Array, " tokens"] | None:
    """Which of a prompt's tokens count, by the path of its attention module; None for all."""
    length = (_MAPPED.get() or {}).get(path)
    return None if length is None else jnp.arange(tokens) < length


@struct.dataclass
class Rows:
    """The adapter of each row of a batch; `Bank.rows` makes it.

    Attributes:
        adapters: the leaves by path, on a first axis for the groups of rows with one adapter.
        lengths: for each prompt, by the path of its attention module, how many of its tokens the
            group's adapter has.
        each: how many consecutive rows are a group.
        grouped: whether outputs that have rows come as `Grouped`, which the next call takes so.
    """

    adapters: Mapping[str, Array]
    lengths: Mapping[str, Int[Array, " groups"]] = struct.field(default_factory=dict)
    each: int = struct.field(pytree_node=False, default=1)
    grouped: bool = struct.field(pytree_node=False, default=False)

    def __repr__(self) -> str:
        # The repr of a dataclass would print every array.
        return f"Rows({self.total} rows, {len(self.adapters)} leaves)"

    @property
    def groups(self) -> int:
        """The number of groups."""
        return next(iter(self.adapters.values())).shape[0]

    @property
    def total(self) -> int:
        """The number of rows."""
        return self.groups * self.each

    def within(self, path: str, own: Mapping[str, Any]) -> "Rows":
        """The rows for a part of the model, with paths that begin there.

        Args:
            path: the part's path; "" for the whole model.
            own: the part's adapter leaves by path.

        Raises:
            UserError: these are not the leaves that the rows have.
        """
        start = f"{path}/" if path else ""
        mine = {p.removeprefix(start): x for p, x in self.adapters.items() if p.startswith(start)}
        other = sorted(mine.keys() ^ own.keys())
        if other:
            raise UserError(
                f"adapters=: the rows are of a bank of another model: only one has {other[0]}; "
                "give rows of the bank that the model is from"
            )
        return self.replace(adapters=mine)  # type: ignore[attr-defined]


def checked_rows(rows: Any) -> Rows:
    """The rows; raises UserError for anything else."""
    if not isinstance(rows, Rows):
        raise UserError(f"adapters={shown(rows)}, expected rows of a bank; write bank.rows([...])")
    return rows


def needs_rows(cls: type) -> UserError:
    """The error of a bank's model, of that class, that is called without `Rows`."""
    return UserError(
        f"{cls.__name__} is the model of a bank: say which adapter each row has, with "
        "adapters=bank.rows([...]) beside the inputs"
    )


@runtime_checkable
class HasRows(Protocol):
    """A pytree that knows which axes of its arrays are rows, such as a cache of scanned layers."""

    def row_axes(self) -> Any:
        """The same tree with the axis of the rows for each array; -1 where all rows share it."""


@struct.dataclass
class Grouped:
    """A `HasRows` whose rows are split into groups, two axes for one, from one call to the next.

    Inside of a loop over calls, XLA writes into such arrays in place, and copies others.
    """

    tree: Any


_SHARED, _NONE = -1, -2  # in place of an axis, for arrays without rows


def _is_grouped(node: Any) -> bool:
    return isinstance(node, Grouped)


def _has_rows(node: Any) -> bool:
    return isinstance(node, HasRows)


def _plain(tree: Any) -> Any:
    """The tree without marks of groups."""
    return jax.tree.map(lambda n: n.tree if _is_grouped(n) else n, tree, is_leaf=_is_grouped)


@dataclass(frozen=True)
class _Parts:
    """The arrays of a tree, for each the axis of the rows, and whether that is two axes already."""

    leaves: list[Any]
    axes: list[int]
    grouped: list[bool]
    structure: Any

    @classmethod
    def of(cls, tree: Any, rows: int) -> "_Parts":
        """The arrays of a tree; of others than `HasRows`, rows are a first axis of that size."""

        def axis(x: Any) -> int:
            return 0 if jnp.ndim(x) > 0 and x.shape[0] == rows else _NONE

        def axes(node: Any) -> Any:
            return node.row_axes() if _has_rows(node) else axis(node)

        def marks(node: Any) -> Any:
            return jax.tree.map(lambda _: _is_grouped(node), node)

        leaves, structure = jax.tree.flatten(tree)
        found = jax.tree.map(axes, _plain(tree), is_leaf=_has_rows)
        marked = jax.tree.map(marks, tree, is_leaf=_is_grouped)
        return cls(leaves, jax.tree.leaves(found), jax.tree.leaves(marked), structure)


def by_rows(run: Callable[[Any, Any, Any], Any], rows: Rows, inputs: Any, keys: Any = None) -> Any:
    """Runs a model on a batch whose rows have an adapter each.

    Args:
        run: `run(adapters, inputs, keys)` gives the model's outputs for some rows of one adapter,
            whose leaves it gets by path.
        rows: the adapter of each row.
        inputs: the model's inputs. Arrays whose first axis is as long as there are rows, and those
            that a `HasRows` says, are split; everything else is for all rows.
        keys: random keys; each group of rows gets its own keys, derived from them.

    Returns:
        The outputs: arrays whose first axis is the rows, or the axis that a `HasRows` says, in the
        order of the rows; of arrays without rows, one for each group, stacked on a first axis. If
        the rows are `grouped`, a `HasRows` comes as `Grouped`, which the next call takes as it is.

    Raises:
        UserError: no input has as many rows.
    """
    groups, given = rows.groups, _Parts.of(inputs, rows.total)
    axis = over_groups(groups)
    split = [i for i, axis in enumerate(given.axes) if axis >= 0]
    if not split:
        shapes = ", ".join(str(list(x.shape)) for x in given.leaves if jnp.ndim(x))
        raise UserError(
            f"adapters= names the adapters of {rows.total} rows, and the inputs are of "
            f"{shapes or 'no shape'}, expected a first axis of {rows.total}"
        )
    # vmap would give every group the same key, and so the same dropout.
    own = jax.tree.map(lambda key: jax.vmap(_fold(key))(jnp.arange(groups)), keys)
    # Filled while `one` is traced, since vmap returns arrays alone, and not how they were nested or
    # where their rows are.
    found: list[_Parts] = []

    def one(adapters: Any, lengths: Any, keys: Any, parts: list[Any]) -> list[Any]:
        leaves = list(given.leaves)
        for i, part in zip(split, parts, strict=True):
            leaves[i] = part
        with mapping(lengths), groups_split(axis):
            y = run(adapters, _plain(jax.tree.unflatten(given.structure, leaves)), keys)
        if rows.grouped:
            y = jax.tree.map(lambda n: Grouped(n) if _has_rows(n) else n, y, is_leaf=_has_rows)
        found.append(_Parts.of(y, rows.each))
        return found[-1].leaves

    parts = [
        given.leaves[i] if given.grouped[i] else _split(given.leaves[i], given.axes[i], groups)
        for i in split
    ]
    where = (0, 0, 0, [given.axes[i] for i in split])
    # The base is in the closure of `run`, so vmap does not map it: its products stay those of the
    # whole batch, each with one read of the weights.
    given_rows = dict(rows.adapters), dict(rows.lengths)
    outputs = vmap(one, where, axis)(*given_rows, own, parts)
    (made,) = found
    merged = [_merged(*each) for each in zip(outputs, made.axes, made.grouped, strict=True)]
    return jax.tree.unflatten(made.structure, merged)


def _fold(key: Any) -> Callable[[Array], Array]:
    """The key of a group by its number; of keys that are stacked over layers, each is folded."""
    # Keys of jax.random.PRNGKey are pairs of uint32, an axis more than those of jax.random.key.
    single = 0 if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    return lambda i: over_layers(lambda k: jax.random.fold_in(k, i), key.ndim - single)(key)


def _split(x: Any, axis: int, groups: int) -> Array:
    """An array whose rows are split into groups: two axes for the axis of the rows."""
    x = jnp.asarray(x)
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def _merged(y: Array, axis: int, grouped: bool) -> Array:
    """An array with groups in front and their rows behind, with both in the rows' place."""
    if axis < 0:
        return y[0] if axis == _SHARED else y
    y = jnp.moveaxis(y, 0, axis)
    if grouped:
        return y
    rows = math.prod(y.shape[axis : axis + 2])
    return y.reshape(*y.shape[:axis], rows, *y.shape[axis + 2 :])
