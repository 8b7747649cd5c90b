"""An attention at its second product: which axes are heads, and what prompts need of it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adapters_jax.trace import parts
from adapters_jax.trace.activations import Columns, Scores, Seen, Softmax, Step
from adapters_jax.trace.parts import Axis
from adapters_jax.trace.registry import Attention

VALUE = -1  # stands for the width of a head's values among the axes of the scores


class UnknownAttention(Exception):
    """Why prompts cannot act in an attention, as the end of a sentence about its module."""


@dataclass(frozen=True)
class Inline:
    """An attention as its second product runs.

    Attributes:
        query: (..., heads, head_dim), as the first product reads it.
        project: `project("key", x)` of x (K, d) is what the module's own projection gives of it,
            (K, kv_heads, head_dim), without rotary embedding and norms.
        logits: the logits of products of queries and keys, by the module's scales and soft caps.
        total: gives the logarithm of the sum of the exponentials of all logits, (..., heads), in
            float32.
        computed: the attention without its arrays.
        before: how many attentions its module has computed before.
        keys_before: how many keys before its own those had.
    """

    sizes: Attention
    query: Array
    project: Callable[[str, Array], Array]
    logits: Step
    total: Callable[[], Array]
    computed: "Computed"
    before: int = 0
    keys_before: int = 0

    def after(self, others: Sequence["Computed"]) -> "Inline":
        """The attention, computed after others of its module."""
        keys = list(dict.fromkeys(other.keys for other in (*others, self.computed)))
        return replace(self, before=len(others), keys_before=keys.index(self.computed.keys))


class Computed(NamedTuple):
    """An attention that a module computed.

    Attributes:
        inputs: the ids of what the projections of its query, key and value read.
        keys: the ids of the projections of its keys and values, and the columns they begin with.
    """

    sizes: Attention
    inputs: tuple[int, ...]
    keys: tuple[tuple[int, int], ...]


def together(each: Sequence[Computed]) -> Attention | None:
    """The sizes of the attention that a module computes, perhaps head by head; None for others."""
    if len(each) < 2:
        return each[0].sizes if each else None
    first = each[0]
    for other in each:
        if other.sizes.heads != 1 or other[:2] != first[:2]:
            return None
    kv_heads = len({other.keys for other in each})
    return replace(first.sizes, heads=len(each), kv_heads=kv_heads)


@dataclass(frozen=True)
class Second:
    """The second product: its operands, and their axes.

    Attributes:
        weights: the softmax.
        value: what it weights.
        summed: the axis of each that is summed.
        batch: the axes of each that are both, in pairs.
        first: whether the weights are the left operand.
    """

    weights: Seen
    value: Seen
    summed: tuple[int, int]
    batch: tuple[tuple[int, int], ...]
    first: bool

    @classmethod
    def of(cls, left: Seen, right: Seen, params: Any) -> "Second":
        """A product, one of whose operands is past its softmax.

        Raises:
            UnknownAttention: it sums over several axes.
        """
        (summed, batch) = params["dimension_numbers"]
        first = left.softmax is not None and left.softmax.stage != "logits"
        if len(summed[0]) != 1:
            raise UnknownAttention("sums over several axes in the product of its weights")
        pair, pairs = (summed[0][0], summed[1][0]), tuple(zip(*batch, strict=True))
        if not first:
            pair, pairs = pair[::-1], tuple((b, a) for a, b in pairs)
            left, right = right, left
        return cls(left, right, pair, pairs, first)

    def labels(self) -> list[Axis | None]:
        """The axes of its result; None for the width of the values.

        Raises:
            UnknownAttention: the values have several axes for their width.
        """
        mine, other = {a for a, _ in self.batch}, {b for _, b in self.batch}
        free = [x for i, x in enumerate(self.weights.axes) if i not in mine | {self.summed[0]}]
        if len(self.value.axes) - len(other) != 2:
            raise UnknownAttention("has values with several axes for their width")
        batch = [self.weights.axes[a] for a, _ in self.batch]
        return [*batch, *free, None] if self.first else [*batch, None, *free]

    @property
    def softmax(self) -> Softmax:
        """What is known of the weights, which `of` has found to be a softmax."""
        return cast(Softmax, self.weights.softmax)

    @property
    def width(self) -> int:
        """The axis of the values that is their width."""
        used = {self.summed[1], *(b for _, b in self.batch)}
        return next(i for i in range(len(self.value.axes)) if i not in used)


def attention_at(second: Second, y: Array) -> tuple[Inline, Array, Step]:
    """What prompts need of an attention, from its second product and the result of that.

    Returns:
        The attention; its result as (..., heads, head_dim); and the way back to the shape of y.

    Raises:
        UnknownAttention: the products are those of no attention that prompts can act in.
    """
    state, scores = second.softmax, second.softmax.scores
    if state.stage != "weights":
        raise UnknownAttention("divides by the sum of its softmax after the second product")
    if state.lost:
        raise UnknownAttention(f"computes a softmax of scores that {state.lost}")
    if state.statistic:
        raise UnknownAttention("sums its weights before the second product")
    position = _position(second, scores)
    if state.over != frozenset(second.weights.axes[second.summed[0]]):
        raise UnknownAttention("takes its softmax over other axes than the positions of its keys")
    side = 0 if scores.axes[position][0] is not None else 1  # of the keys
    query, key = scores.operands[1 - side], scores.operands[side]
    columns = {"key": _known(key, "keys"), "value": _known(second.value, "values")}
    if columns["value"].moved or columns["value"].low != columns["value"].high:
        raise UnknownAttention("mixes the columns of its values")
    if query.columns is None:
        raise UnknownAttention("gets its queries from no product with a weight in its own call")
    if columns["key"].projection.width != columns["value"].projection.width:
        raise UnknownAttention("gets its keys and its values from inputs of different widths")
    heads = _heads(scores, query, 1 - side)
    of_keys = ((scores.axes[i][side], i) for i in heads)
    kv = _kv_heads(key, [(axis, i == heads[0]) for axis, i in of_keys if axis is not None])
    of_values = ((other, parts.of(second.weights.axes[i], scores)) for i, other in second.batch)
    found = [(i, bool(own) and [own[0].axis] == heads[:1]) for i, own in of_values]
    value_heads = _kv_heads(second.value, found)
    tables = {
        "key": _table(key, columns["key"], scores.summed[side], kv),
        "value": _table(second.value, columns["value"], second.width, value_heads),
    }
    if tables["key"].shape != tables["value"].shape:
        raise UnknownAttention("has keys and values of different heads, by number or width")
    rows, there, back = _by_heads(second.labels(), y, scores, heads)
    width, (kv_heads, head_dim) = columns["key"].projection.width, tables["key"].shape
    sizes = Attention(width, math.prod(scores.shape[i] for i in heads), kv_heads, head_dim)

    def project(name: str, x: Array) -> Array:
        return columns[name].project(x)[:, tables[name]]

    def logits(products: Array) -> Array:
        for step in state.steps:
            products = step(products)
        return products

    into = [scores.axes[i][1 - side] for i in (*rows, *heads)] + [scores.summed[1 - side]]
    shape = (*(scores.shape[i] for i in rows), sizes.heads, sizes.head_dim)
    # Rows that keys alone have, as those of a batch that one set of queries reads, are repeated.
    held = [1 if into[i] is None else n for i, n in enumerate(shape[: len(rows)])]
    own = jnp.broadcast_to(_in_order(query.value, into).reshape(*held, *shape[-2:]), shape)
    total = _total(state, [*rows, *heads, position], shape[:-1])
    made = (query.columns, columns["key"], columns["value"])
    inputs = tuple(id(each.projection.source) for each in made)
    keys = tuple((id(each.projection), each.low) for each in made[1:])
    return Inline(sizes, own, project, logits, total, Computed(sizes, inputs, keys)), there, back


def _position(second: Second, scores: Scores) -> int:
    """The axis of the scores that is the positions of the keys."""
    axis = second.weights.axes[second.summed[0]]
    found = parts.of(axis, scores)
    if len(axis) == 1 and found and found[0].size == scores.shape[found[0].axis]:
        both = None not in scores.axes[found[0].axis]
        if not both:
            return found[0].axis
    raise UnknownAttention("sums its values over something else than the positions of its keys")


def _known(seen: Seen, what: str) -> Columns:
    """The projection of keys or values."""
    if seen.columns is None:
        raise UnknownAttention(f"gets its {what} from no product with a weight in its own call")
    if seen.columns.lost:
        raise UnknownAttention(f"has {what} that {seen.columns.lost}")
    return seen.columns


def _heads(scores: Scores, query: Seen, side: int) -> list[int]:
    """The axes of the scores that are heads: columns of the query, from the slowest."""
    found = {}
    for i, axes in enumerate(scores.axes):
        axis = axes[side]
        own = [] if axis is None else _columns(query.axes[axis], query)
        if own:
            found[i] = own[0].stride
            if len(own) > 1 or own[0].size != scores.shape[i]:
                raise UnknownAttention("has query heads that are no columns of its projection")
    return sorted(found, key=lambda i: -found[i])


def _columns(axis: Axis, seen: Seen) -> list[parts.Part]:
    """The parts of an axis that are columns of its projection."""
    return parts.of(axis, seen.columns.projection) if seen.columns else []


def _kv_heads(seen: Seen, pairs: Iterable[tuple[int, bool]]) -> parts.Part | None:
    """The heads among the columns of keys or values; each of them may be repeated.

    Args:
        seen: the keys or values.
        pairs: the axes of them that are heads of the scores too, with whether these are the first.

    Returns:
        The part of an axis that is heads; None for one head.
    """
    found = None
    for axis, first in pairs:
        own = _columns(seen.axes[axis], seen)
        if own and (seen.axes[axis][0] != own[0] or len(own) > 1 or not first):
            raise UnknownAttention(
                "has heads in another order than head i reading key head i // group"
            )
        found = own[0] if own else found
    return found


def _table(seen: Seen, columns: Columns, width: int, heads: parts.Part | None) -> np.ndarray:
    """For each head and each position in its width, the column of the projection."""
    own, size = _columns(seen.axes[width], seen), parts.size_of(seen.axes[width])
    block = max((part.size * part.stride for part in own), default=0)
    # Rotary embeddings mix the columns of a head, but take none of another.
    mixed = max(columns.high - columns.low, columns.moved)
    if not block or block % size or mixed >= block:
        raise UnknownAttention("mixes columns of its projections across heads")
    each = columns.low + block // size * np.arange(size)
    table = (heads.stride * np.arange(heads.size) if heads else np.zeros(1, int))[:, None] + each
    if table.max() >= columns.projection.columns:
        raise UnknownAttention("mixes columns of its projections across heads")
    return table


def _by_heads(
    labels: Sequence[Axis | None], y: Array, scores: Scores, heads: Sequence[int]
) -> tuple[list[int], Array, Step]:
    """The axes of rows; the result as (rows ..., heads, width); and the way back."""
    found: list[int] = []
    for axis in labels:
        for part in (parts.Part(0, scores, VALUE),) if axis is None else axis:
            full = part.axis == VALUE or part.size == scores.shape[part.axis]
            if part.source is not scores or not full:
                raise UnknownAttention("rearranges its weights across positions and heads")
            found.append(part.axis)
    rows = [i for i in found if i not in (*heads, VALUE)]
    absent = [i for i in heads if i not in found]
    if any(scores.shape[i] > 1 for i in absent):
        raise UnknownAttention("sums over its heads")
    width = y.shape[list(labels).index(None)]
    split = [width if i == VALUE else scores.shape[i] for i in found]
    order = [found.index(i) for i in (*rows, *heads, VALUE) if i in found]
    lead = [scores.shape[i] for i in rows]

    def back(changed: Array) -> Array:
        moved = changed.reshape([split[i] for i in order])
        return moved.transpose(np.argsort(order)).reshape(y.shape).astype(y.dtype)

    return rows, y.reshape(split).transpose(order).reshape(*lead, -1, width), back


def _in_order(x: Array, axes: Sequence[int | None]) -> Array:
    """An array with its axes in this order, and those that are not there, of size 1, at the end."""
    rest = [i for i in range(x.ndim) if i not in axes]
    return x.transpose([i for i in axes if i is not None] + rest)


def _total(state: Softmax, order: Sequence[int], shape: Sequence[int]) -> Callable[[], Array]:
    """`total` of an `Inline`; the logits have these axes of the scores, the positions last."""

    def total() -> Array:
        scores, logits = state.scores, state.logits
        found = [part.axis for axis in logits.axes for part in axis] if logits else []
        whole = logits and all(
            part.source is scores and part.size == scores.shape[part.axis]
            for axis in logits.axes
            for part in axis
        )
        if logits is None or logits.value is None or not whole:
            raise UnknownAttention("does not show the logits of its softmax")
        split = logits.value.reshape([scores.shape[i] for i in found])
        moved = split.transpose([found.index(i) for i in order if i in found])
        flat = moved.astype(jnp.float32).reshape(*shape, -1)
        return jax.scipy.special.logsumexp(flat, axis=-1)

    return total
