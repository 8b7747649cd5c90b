"""Converts parameters between checkpoints of PyTorch ("theirs") and our trees, by a `NameTable`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.distributed.mesh import place
from adapters_jax.errors import BaseMismatchError, UserError, compare_trees, first_few
from adapters_jax.files.layouts import WHOLE, Span, spans
from adapters_jax.files.names import ROW, NameTable, Source


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which `numpy.asarray` reads anew each time.

    Args:
        shape: its shape, known without reading it.
        dtype: its dtype, likewise.

    Example:
        >>> np.asarray(Stored((2,), np.float64, lambda: np.ones(2)))
        array([1., 1.])
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The number of bytes of its numbers."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


Tensor = np.ndarray | Stored


def from_tensors(tensors: Mapping[str, Tensor], names: NameTable, like: Any) -> Any:
    """Converts a checkpoint's tensors to a model's parameters.

    Args:
        tensors: the checkpoint's tensors by name; see `read_tensors`. They are read one by one.
        names: the model's table.
        like: the model's parameters, which may be abstract; they set the structure, dtypes and
            shardings of the result.

    Raises:
        BaseMismatchError: tensors are missing, unexpected, of another shape or no floating-point
            numbers; the message names all of them by path and by name, with the shapes that a
            checkpoint has.

    Example:
        >>> like = {"query": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
        >>> from adapters_jax.files.names import Rule
        >>> table = NameTable((Rule("query", "q_proj"),))
        >>> from_tensors({"q_proj.weight": np.ones((3, 2))}, table, like)["query"]["kernel"].shape
        (2, 3)
    """
    found = names.canonical(tensors)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    # In the error, our arrays have both names, and unused tensors have only theirs.
    expected: dict[str, Any] = {}
    got: dict[str, Any] = {}
    used, reads = set(), []
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        reads.append((*names.sources(path, leaf.shape), leaf))
    parts = _parts(reads)
    for sources, stacked, leaf in reads:
        for own, source in sources.items():
            shape = leaf.shape[1:] if stacked else leaf.shape
            whole = source.shape(shape, parts.get(own, WHOLE))
            for name in source.names(shape):
                label = f"{own} ({name})"
                expected[label] = jax.ShapeDtypeStruct(whole, leaf.dtype)
                used.add(name)
                if name in found:
                    got[label] = found[name]
    got |= {name: t for name, t in found.items() if name not in used and not names.ignores(name)}
    fix = "Is it of this architecture and size?"
    compare_trees("the checkpoint", got, expected, fix, error=BaseMismatchError)
    _check_floats(got)

    def read(sources: Mapping[str, Source], stacked: bool, leaf: Any) -> jax.Array:
        shape = leaf.shape[1:] if stacked else leaf.shape
        arrays = (
            _of(source, found, shape, parts.get(own, WHOLE)) for own, source in sources.items()
        )
        return _stacked(arrays, leaf) if stacked else _placed(next(arrays), leaf)

    return jax.tree_util.tree_unflatten(structure, [read(*each) for each in reads])


def _check_floats(tensors: Mapping[str, Tensor]) -> None:
    """Raises BaseMismatchError for tensors of integers, as quantised checkpoints have them."""
    wrong = [
        f"{k} ({x.dtype})" for k, x in tensors.items() if not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if wrong:
        raise BaseMismatchError(
            f"the checkpoint holds no floating-point numbers in {first_few(wrong, 12)}; a "
            "quantised base cannot be read: give the one that it was made from."
        )


def _of(
    source: Source, found: Mapping[str, Tensor], shape: tuple[int, ...], span: Span
) -> np.ndarray:
    """Our array of one layer, of their tensors."""
    rows = [source.take(np.asarray(found[name]), span) for name in source.names(shape)]
    return np.stack(rows) if ROW in source.name else rows[0].reshape(shape)


def _parts(reads: Iterable[tuple[Mapping[str, Source], bool, Any]]) -> dict[str, Span]:
    """Which part of their tensor each of our arrays is, by our path, where theirs is fused."""
    fused: dict[str, list[tuple[int, str, int]]] = {}
    blocks: dict[str, int] = {}
    for sources, stacked, leaf in reads:
        size = math.prod(leaf.shape[1:] if stacked else leaf.shape)
        for own, source in sources.items():
            if source.part:
                fused.setdefault(source.name, []).append((source.part[0], own, size))
                blocks[source.name] = leaf.shape[-2] if source.by_head else 1
    found: dict[str, Span] = {}
    for name, parts in fused.items():
        _, paths, sizes = zip(*sorted(parts), strict=True)
        found |= zip(paths, spans(sizes, blocks[name]), strict=True)
    return found


def _stacked(layers: Iterable[np.ndarray], like: Any) -> jax.Array:
    """Stacks layers along a first axis one by one, so that memory holds at most one twice."""
    where = row = getattr(like, "sharding", None)
    if isinstance(where, NamedSharding):
        row = NamedSharding(where.mesh, P(*where.spec[1:]))
    one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=row)
    whole = jnp.zeros(like.shape, like.dtype, device=where)
    # Without the wait, JAX would queue the copies of all layers, and hold them at the same time.
    for i, layer in enumerate(layers):
        whole = jax.block_until_ready(_put(whole, _placed(layer, one), i, where))
    return whole


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(whole: jax.Array, layer: jax.Array, i: int, where: Any) -> jax.Array:
    """Replaces one row of an array in place."""
    whole = whole.at[i].set(layer)
    return whole if where is None else jax.lax.with_sharding_constraint(whole, where)


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """Converts an array to the dtype and sharding of another."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(array, like.dtype)
    return place(array.astype(like.dtype, copy=False), sharding)


def to_tensors(tree: Any, names: NameTable) -> dict[str, np.ndarray]:
    """Converts a model's parameters to a checkpoint's tensors; the inverse of `from_tensors`.

    Args:
        tree: the parameters, also of scanned layers.
        names: the model's table; its first prefix begins every name but the heads'.

    Raises:
        UserError: the tree lacks some of the arrays that one of their tensors fuses.

    Example:
        >>> from adapters_jax.files.names import Rule
        >>> table = NameTable((Rule("query", "q_proj"),), prefixes=("model.",))
        >>> tensors = to_tensors({"query": {"kernel": np.ones((2, 3))}}, table)
        >>> tensors["model.q_proj.weight"].shape
        (3, 2)
    """
    parts: dict[str, list[tuple[Source, np.ndarray]]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array, path = np.asarray(leaf), jax.tree_util.keystr(keys, simple=True, separator="/")
        sources, stacked = names.sources(path, array.shape)
        for own, source in zip(array if stacked else [array], sources.values(), strict=True):
            own_head = source.name.split(".")[0] in names.heads
            prefix = names.head_prefix if own_head else "".join(names.prefixes[:1])
            rows = own if ROW in source.name else [own]
            for name, row in zip(source.names(own.shape), rows, strict=True):
                parts.setdefault(prefix + name, []).append((source, row))
    return {name: np.ascontiguousarray(_fused(name, each)) for name, each in parts.items()}


def _fused(name: str, parts: Sequence[tuple[Source, np.ndarray]]) -> np.ndarray:
    """Their tensor, of the arrays of ours that it fuses."""
    ordered = sorted(parts, key=lambda each: each[0].part or (0, 1))
    arrays, (source, first) = [array for _, array in ordered], ordered[0]
    count = source.part[1] if source.part else 1
    if len(arrays) != count:
        raise UserError(f"{name} fuses {count} of our arrays, and the tree has {len(arrays)}.")
    whole = np.concatenate(arrays, axis=-1) if count > 1 else first
    return source.turned(whole.reshape(*whole.shape[:-2], -1) if source.by_head else whole, True)
