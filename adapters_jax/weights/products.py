"""Products of an input with a changed weight, without the changed weight: `x W + (x A) B`.

Each function takes a primitive, the weight, the other operands, the primitive's parameters and the
weight's position. It returns None where the changed weight has to be formed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.weights.changes import Change, Changed, LowRank, Scale, dropout
from adapters_jax.weights.factors import RANK, Factor, beside, cast, contracted
from adapters_jax.weights.quantized import is_quantized, once


def _unchanged(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Array:
    """The primitive on the unchanged weight, which if quantised is in floats only meanwhile."""

    def run(weight: Any, others: Sequence[Any]) -> Array:
        operands = [*others[:where], changed.floats(weight), *others[where:]]
        return primitive.bind(*operands, **params)

    packed = is_quantized(changed.base)
    return once(run, changed.base, others) if packed else run(changed.base, others)


def _evaluate(
    changes: Sequence[Change],
    x: Array,
    unchanged: Callable[[Array], Array],
    added: Callable[[LowRank, Array, Array], Array],
    on_input: Callable[[Factor, Array], Array | None],
    on_output: Callable[[Factor, Array], Array],
) -> Array:
    """The product of an input and a changed weight, from the last change to the first."""
    if not changes:
        return unchanged(x)
    *before, last = changes

    def rest(x: Array) -> Array:
        return _evaluate(before, x, unchanged, added, on_input, on_output)

    if isinstance(last, LowRank):
        return added(last, dropout(x, last.dropout, last.key), rest(x))
    scaled = on_input(last.by, x)
    return on_output(last.by, rest(x)) if scaled is None else rest(scaled)


class _Meeting(NamedTuple):
    """How an input meets a weight in a `dot_general`; axes have the numbers of the weight's.

    Attributes:
        primitive: `dot_general`.
        params: its parameters, as pairs.
        where: the weight's position among the operands.
        inner: the axes that are contracted.
        batch: the axes that are batched.
        seen: the axes of the input; those that the weight does not have come after its own.
        out: the axes of the product.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    where: int
    inner: tuple[int, ...]
    batch: tuple[int, ...]
    seen: tuple[int, ...]
    out: tuple[int, ...]

    @classmethod
    def of(cls, primitive: Any, params: Any, where: int, n: int, ndim: int) -> "_Meeting":
        """How an input of `ndim` axes meets a weight of `n` axes."""
        sides, batches = params["dimension_numbers"]
        inner, batch = tuple(sides[where]), tuple(batches[where])
        seen = list(range(n, n + ndim))
        yours = (*sides[1 - where], *batches[1 - where])
        for mine, other in zip((*inner, *batch), yours, strict=True):
            seen[other] = mine
        kept = [i for i in range(n) if i not in seen]
        free = [i for i in seen if i >= n]
        out = (*batch, *kept, *free) if where == 0 else (*batch, *free, *kept)
        return cls(primitive, tuple(params.items()), where, inner, batch, tuple(seen), out)


def multiplied(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Array | None:
    """`dot_general`: any axes contracted, any batched."""
    (x,) = others
    meeting = _Meeting.of(primitive, params, where, len(changed.shape), x.ndim)
    separable = _separable(changed.changes, meeting.inner, (*meeting.inner, *meeting.batch))
    if not jnp.issubdtype(x.dtype, jnp.floating) or not separable:
        return None
    compute = _product if is_quantized(changed.base) else _jitted_product
    return compute(changed.settled(), x, meeting)


def _product(changed: Changed, x: Array, meeting: _Meeting) -> Array:
    """The product of an input and a changed weight."""
    primitive, pairs, where, inner, batch, seen, out = meeting
    params = dict(pairs)

    def added(change: LowRank, x: Array, y: Array) -> Array:
        both = sorted(change.scaled, key=lambda f: -len(set(f.axes) & set(inner)))
        first, second = (f.cast(x.dtype) for f in both)
        h = contracted(Factor(x, seen), first, (*second.axes, *out), params["precision"])
        last = (second, h) if where == 0 else (h, second)
        part = beside(contracted(*last, out, params["precision"]), out, x.dtype)
        return _sum(y, _ranged(change, part, changed.shape, out.index))

    def on_input(factor: Factor, x: Array) -> Array | None:
        inside = factor.axes and set(factor.axes) <= {*inner, *batch}
        return x * beside(factor, seen, x.dtype) if inside else None

    return _evaluate(
        changed.changes,
        x,
        lambda x: _unchanged(primitive, changed, [x], params, where),
        added,
        on_input,
        lambda factor, y: y * beside(factor, out, y.dtype),
    )


# So it is traced and differentiated once for all layers that are alike.
_jitted_product = jax.jit(_product, static_argnums=2, inline=True)


def _sum(y: Array, part: Array) -> Array:
    """y + part in the dtype of y."""
    return y + cast(part, y.dtype)


def _separable(changes: Sequence[Change], inner: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether ranges are along kept axes, and scales along kept or along other axes alone."""
    for change in changes:
        if isinstance(change, LowRank) and change.start and change.start[0] in outer:
            return False
        if isinstance(change, Scale):
            axes = set(change.by.axes)
            if axes & set(inner) and not axes <= set(outer):
                return False
    return True


def _ranged(
    change: LowRank, y: Array, shape: Sequence[int], position: Callable[[int], int]
) -> Array:
    """A branch with zeros around the range that it is for."""
    if change.start is None:
        return y
    return change.placed(y, shape[change.start[0]], position(change.start[0]))


def convolved(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Array | None:
    """`conv_general_dilated` without groups: a convolution with A, then a product with B."""
    (x,) = others
    numbers = params["dimension_numbers"]
    kept, inner = numbers.rhs_spec[0], numbers.rhs_spec[1:]
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    whole = {*inner, RANK}, {kept, RANK}
    splits = [
        {frozenset(f.axes) for f in c.factors} == {frozenset(side) for side in whole}
        if isinstance(c, LowRank)
        else set(c.by.axes) in ({kept}, {inner[0]}, set())
        for c in changed.changes
    ]
    if where == 0 or grouped or not all(splits) or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    feature, channel = numbers.out_spec[1], numbers.lhs_spec[1]

    def along(array: Array, axis: int, ndim: int) -> Array:
        return array.reshape([-1 if i == axis else 1 for i in range(ndim)])

    def added(change: LowRank, x: Array, y: Array) -> Array:
        a, b = sorted(change.scaled, key=lambda f: kept in f.axes)
        place = [RANK if axis == kept else axis for axis in range(len(changed.shape))]
        kernel = a.array.transpose([a.axes.index(axis) for axis in place]).astype(x.dtype)
        matrix = (b.array if b.axes[0] == RANK else b.array.T).astype(x.dtype)
        h = primitive.bind(x, kernel, **params).astype(x.dtype)
        part = jnp.moveaxis(
            jnp.matmul(jnp.moveaxis(h, feature, -1), matrix, precision=_one(params["precision"])),
            -1,
            feature,
        )
        return _sum(y, _ranged(change, part, changed.shape, lambda axis: feature))

    def on_input(factor: Factor, x: Array) -> Array | None:
        if factor.axes != (inner[0],):
            return None
        return x * along(factor.array, channel, x.ndim).astype(x.dtype)

    def on_output(factor: Factor, y: Array) -> Array:
        return y * along(factor.array, feature, y.ndim).astype(y.dtype)

    return _evaluate(
        changed.changes,
        x,
        lambda x: _unchanged(primitive, changed, [x], params, where),
        added,
        on_input,
        on_output,
    )


def _one(precision: Any) -> Any:
    return precision[0] if isinstance(precision, tuple) else precision


def grouped(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Array | None:
    """`ragged_dot_general` of rows in groups, each with a matrix: a pair of factors for each."""
    x, sizes = others[0], others[1:]
    numbers = params["ragged_dot_dimension_numbers"]
    usual = (((1,), (1,)), ((), ())), (0,), (0,)
    given = (
        numbers.dot_dimension_numbers,
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    expected = {frozenset({0, 1, RANK}), frozenset({0, 2, RANK})}
    fits = all(
        isinstance(c, LowRank) and {frozenset(f.axes) for f in c.factors} == expected
        for c in changed.changes
    )
    if where != 1 or given != usual or not fits or not jnp.issubdtype(x.dtype, jnp.floating):
        return None

    def added(change: LowRank, x: Array, y: Array) -> Array:
        a, b = sorted(change.scaled, key=lambda f: 2 in f.axes)
        left = a.array.transpose([a.axes.index(i) for i in (0, 1, RANK)]).astype(x.dtype)
        right = b.array.transpose([b.axes.index(i) for i in (0, RANK, 2)]).astype(x.dtype)
        h = primitive.bind(x, left, *sizes, **params).astype(x.dtype)
        part = primitive.bind(h, right, *sizes, **params)
        return _sum(y, _ranged(change, part, changed.shape, lambda axis: 1))

    return _evaluate(
        changed.changes,
        x,
        lambda x: _unchanged(primitive, changed, [x, *sizes], params, where),
        added,
        lambda factor, x: None,
        lambda factor, y: y,
    )
