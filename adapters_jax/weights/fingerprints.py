"""Fingerprints of frozen weights: a few entries of each, by which it shows that a base moved.

Other people's loops update every parameter that they are told to, and an adapter fits only the base
that it was trained on. So a base is remembered when it gets adapters, and compared where an adapter
is saved, counted or merged.

The last bases are known for the whole process, not in a model. `nnx.jit` gives a
model the static attributes of the first model that it was traced with, whose base may be another
one; as a Variable, a fingerprint would be in every state and checkpoint.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import MismatchError, shortened
from adapters_jax.weights.quantized import NF4, bits_of, is_quantized, unboxed

ENTRIES = 64  # of a leaf
BASES = 64  # that are known; the oldest is forgotten first

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly
_NNX = (
    "train with nnx.Optimizer(model, tx, wrt=aj.nnx.AdapterParam) and gradients of "
    "nnx.DiffState(0, aj.nnx.AdapterParam). If you put another base there on purpose, "
    "model = aj.adapt(model, aj.Recipe(), rngs=nnx.Rngs(0)) accepts it"
)
_LINEN = (
    "train with tx=aj.freeze_base(tx, recipe), or aj.partition(params, recipe)[0] alone. If you "
    "put another base there on purpose, aj.init_adapters(model, params, key, *example_inputs) "
    "accepts it"
)

Index = tuple[np.ndarray, ...]
Key = tuple[str, tuple[int, ...]]


class Fingerprint(NamedTuple):
    """Entries of a leaf.

    Attributes:
        values: the entries, in double precision.
        held: which of them this process has; the others are zeros.
        dtype: the dtype of the leaf.
    """

    values: np.ndarray
    held: np.ndarray
    dtype: Any


Base = Mapping[Key, Fingerprint]
_known: list[Base] = []


def remember(base: Mapping[str, Any]) -> None:
    """Remembers a base as one that adapters are trained on.

    Args:
        base: frozen leaves by path, also quantised ones. Those that are abstract, traced, deleted
            or not of floats are passed over.

    Example:
        >>> weight = np.linspace(0, 1, 12).reshape(3, 4)
        >>> remember({"example/kernel": weight})
        >>> check_unmoved("merge", {"example/kernel": weight.astype(np.float16)}, in_nnx=True)
        >>> check_unmoved("merge", {"example/kernel": weight + 0.01}, in_nnx=True)
        Traceback (most recent call last):
        adapters_jax.errors.MismatchError: merge: 1 of 1 frozen parameters moved after they got ...
    """
    taken = dict(_fingerprints(base))
    if taken:
        others = (known for known in _known if not _holds(taken, known))
        _known[:] = [*others, taken][-BASES:]


def check_unmoved(caller: str, base: Mapping[str, Any], in_nnx: bool) -> None:
    """Raises MismatchError where a base moved after it was remembered.

    The base is compared with that of the known ones which it is most like. Rounded to another
    dtype it has not moved. Where it is unrelated to all of them, it is another base, which somebody
    put there.

    Args:
        caller: the function that compares, for the message.
        base: frozen leaves by path, as in `remember`.
        in_nnx: whether they are of an NNX model, for the message.
    """
    now, bases = dict(_fingerprints(base)), list(_known)
    if any(_holds(known, now) for known in bases):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        likeness = [_likeness(known, now) for known in bases]
        order = sorted(range(len(bases)), key=lambda i: (likeness[i][0], i))
        if not bases or _is_another(*likeness[order[-1]][1:]):
            return
        before = bases[order[-1]]
        moved = {
            key[0]: (distance, float(np.abs(before[key].values).max()))
            for key in before.keys() & now.keys()
            if (distance := _distance(before[key], now[key]))
        }
    if not moved:
        return
    most = sorted(moved, key=lambda path: -moved[path][0])
    texts = [f"{p} by {moved[p][0]:.2g} (entries up to {moved[p][1]:.2g})" for p in most[:3]]
    others = f" and {len(most) - 3} others" if len(most) > 3 else ""
    raise MismatchError(
        f"{caller}: {len(moved)} of {len(base)} frozen parameters moved after they got adapters, "
        f"so that the adapters alone do not give this model: {shortened(', '.join(texts))}{others};"
        f" {_NNX if in_nnx else _LINEN}"
    )


def _fingerprints(base: Mapping[str, Any]) -> Iterator[tuple[Key, Fingerprint]]:
    """The fingerprints of the leaves that have values and are of floats."""
    for path, leaf in base.items():
        leaf = unboxed(leaf)
        arrays = jax.tree.leaves(leaf)
        if not arrays or not all(map(_has_values, arrays)) or not math.prod(leaf.shape):
            continue
        if is_quantized(leaf) or jnp.issubdtype(leaf.dtype, jnp.inexact):
            yield (path, tuple(leaf.shape)), _fingerprint(leaf)


def _has_values(x: Any) -> bool:
    if isinstance(x, jax.Array):
        return not isinstance(x, jax.core.Tracer) and not x.is_deleted()
    return isinstance(x, np.ndarray)


def _fingerprint(leaf: Any) -> Fingerprint:
    """Entries that are spread over a leaf."""
    size = math.prod(leaf.shape)
    flat = np.arange(min(size, ENTRIES))
    if size > ENTRIES:
        # Not in equal steps, which would stay in few columns of a matrix.
        flat = (size * (flat * _GOLDEN % 1)).astype(np.int64)
    index = np.unravel_index(flat, leaf.shape) if leaf.shape else ()
    if not is_quantized(leaf):
        values, held = _entries(leaf, index)
    else:
        array, sizes = leaf.array, leaf.array.scale.shape
        values, held = _entries(array.qvalue, index)
        blocks = tuple(i // (n // m) for i, n, m in zip(index, leaf.shape, sizes, strict=True))
        numbers = np.array(NF4)[values.astype(int)] if array.qtype == "nf4" else values
        scales, there = _entries(array.scale, blocks)
        held &= there
        values = (numbers.astype(np.float32) * scales).astype(leaf.dtype)
    double = np.complex128 if np.iscomplexobj(values) else np.float64
    return Fingerprint(values.astype(double), held, leaf.dtype)


def _entries(x: Any, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Entries of an array, and which of them this process has."""
    n = len(index[0]) if index else 1
    if isinstance(x, np.ndarray):
        return np.atleast_1d(x[index]), np.ones(n, bool)
    values, held = np.zeros(n, x.dtype), np.zeros(n, bool)
    for shard in x.addressable_shards:
        ends = shard.data.shape
        local = [i - (part.start or 0) for i, part in zip(index, shard.index, strict=True)]
        inside = [(i >= 0) & (i < n) for i, n in zip(local, ends, strict=True)]
        here = np.logical_and.reduce([~held, *inside])
        if here.any():
            nearest = tuple(np.clip(i, 0, n - 1) for i, n in zip(local, ends, strict=True))
            values[here] = np.atleast_1d(_taken(shard.data, nearest))[here]
            held |= here
    return values, held


def _taken(x: jax.Array, index: Index) -> np.ndarray:
    """Entries of an array on one device, without a copy of the array."""
    (device,), kind = x.devices(), x.sharding.memory_kind or ""
    # numpy sees an array in the host's memory itself, unless its numbers are smaller than a byte.
    if (device.platform == "cpu" or "host" in kind) and bits_of(x.dtype) >= 8:
        return np.asarray(x)[index]
    with jax.ensure_compile_time_eval():
        return jax.device_get(_gather(x, jax.device_put(index, x.sharding)))


@jax.jit
def _gather(x: jax.Array, index: Any) -> jax.Array:
    return x[index]


def _holds(known: Base, now: Base) -> bool:
    """Whether all leaves of a base are those of another one, which may have more."""
    return now.keys() <= known.keys() and all(
        known[key].dtype == x.dtype and all(map(np.array_equal, known[key][:2], x[:2]))
        for key, x in now.items()
    )


def _likeness(known: Base, now: Base) -> np.ndarray:
    """How much of a base comes from a known one.

    Returns:
        The sum over its leaves of 2 for equal ones down to 0 for unrelated ones; the number of
        equal entries and that of others; and, times the latter, their correlation with the known
        entries, and the part of these that is left in them. Leaves that were of one number count
        in the first alone, as zeros and ones do not say what base they are of.
    """
    found = np.zeros(5)
    for key in known.keys() & now.keys():
        both = known[key].held & now[key].held
        old, new = known[key].values[both], now[key].values[both]
        equal, constant = np.array_equal(old, new), not len(old) or (old == old[0]).all()
        if equal or constant:
            found[:2] += 2 * equal, 0 if constant else len(old)
            continue
        old, new, gap = old - old.mean(), new - new.mean(), np.linalg.norm(old - new)
        product, size = np.vdot(old, new).real, np.linalg.norm(old)
        correlation = product / (size * (np.linalg.norm(new) or 1.0))
        left = product / size**2
        found[0] += np.nan_to_num(max(0.0, 1 - (gap / size) ** 2) + correlation**2)
        found[2:] += len(old) * np.array([1.0, correlation, left])
    return found


def _is_another(equal: float, entries: float, correlation: float, left: float) -> bool:
    """Whether what is not equal does not come from the known base that is most like it.

    A moved base is the known one and a change: all of it is left, however large the change, and of
    an unrelated base nothing, up to chance. Chance is larger where there are few entries. A base of
    zeros makes room for a checkpoint.
    """
    by_chance = min(0.9, 2 / math.sqrt(max(entries, 1)))
    return not equal if not entries else correlation < by_chance * entries or left < entries / 2


def _distance(before: Fingerprint, now: Fingerprint) -> float:
    """How far entries are from earlier ones; 0 where one of the two is the other, rounded."""
    both = before.held & now.held
    old, new = before.values[both], now.values[both]
    if old.dtype != new.dtype:
        return math.inf
    rounded = {before.dtype, now.dtype}
    if new.dtype == np.float64:
        rounded |= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
    pairs = [(old.astype(dtype).astype(new.dtype), new) for dtype in rounded]
    pairs.append((old, new.astype(before.dtype).astype(old.dtype)))
    # What adds a zero to a weight may flush the smallest numbers to zero.
    same = any(_gap(*pair) <= np.finfo(np.float32).tiny for pair in pairs)
    return 0.0 if same else _gap(old, new)


def _gap(one: np.ndarray, two: np.ndarray) -> float:
    """The largest difference; infinite where only one of two numbers is one."""
    other = ~((one == two) | (np.isnan(one) & np.isnan(two)))
    return float(np.nan_to_num(np.abs(one - two)[other], nan=math.inf).max(initial=0.0))
