"""Products of an input with a changed weight, without the changed weight: `x W + (x A) B`."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from adapters_jax.weights.changes import Added, Changed, LowRank, Rotation, Scale, dropout
from adapters_jax.weights.factors import RANK, Factor, beside, cast, contracted
from adapters_jax.weights.observed import Observed
from adapters_jax.weights.packed import Packed
from adapters_jax.weights.quantized import is_quantized, once

Axes = tuple[int, ...]
ADAPTED_PRODUCT = "adapted_product"  # what a policy of `jax.checkpoint` calls `x W + (x A) B`


class Meeting(NamedTuple):
    """How an input meets a weight; axes have the numbers of the weight's.

    Attributes:
        params: its parameters, as pairs.
        where: the weight's position among the operands.
        inner: the features that are contracted.
        batch: the axes that are batched.
        seen: the axes of the input; those that the weight does not have come after its own.
        out: the axes of the product.
        thin: `thin(meeting, a, b, x, rest)` is `(x A) B`, as the product has it.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    where: int
    inner: Axes
    batch: Axes
    seen: Axes
    out: Axes
    thin: Callable[..., Array]

    def bind(self, x: Any, weight: Any, rest: Sequence[Any]) -> Array:
        """The operation on a weight or a factor in its place."""
        operands = (weight, x) if self.where == 0 else (x, weight)
        return self.primitive.bind(*operands, *rest, **dict(self.params))


def multiplied(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Array | None:
    """The product of a changed weight and its input; None where the sum has to be formed.

    Args:
        others: its other operands, first the input.
        where: the weight's position among its operands.
    """
    x, *rest = others
    meeting = _meeting(primitive, changed, x, params, where)
    if meeting is None:
        return None
    # A packed weight has views, functions that are new each time: no earlier trace would be found.
    alike = primitive.name == "dot_general" and not is_quantized(changed.base)
    compute = _jitted_product if alike else _product
    return compute(changed.settled(), x, rest, meeting)


def packed_on(
    primitive: Any, changed: Changed, x: Array, params: Any, where: int
) -> tuple[str, ...]:
    """The platforms on which `multiplied` reads a quantised weight without its floats."""
    meeting = _meeting(primitive, changed, x, params, where)
    if meeting is None or not is_quantized(changed.base):
        return ()
    packed = Packed.of(changed.base, changed.views, changed, x, meeting)
    return () if packed is None else packed.platforms


def _meeting(primitive: Any, changed: Changed, x: Array, params: Any, where: int) -> Meeting | None:
    """How the input meets the weight; None where the sum has to be formed."""
    added = any(isinstance(change, Added) for change in changed.changes)
    if added or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    return MEETINGS[primitive.name](primitive, params, where, changed, x.ndim)


def _product(changed: Changed, x: Array, rest: Sequence[Any], meeting: Meeting) -> Array:
    """The product of an input and a changed weight, from the last change to the first."""
    if not changed.changes:
        return _unchanged(changed, x, rest, meeting)
    last = changed.changes[-1]
    if isinstance(last, Observed):
        y = _product(replace(changed, changes=changed.changes[:-1]), x, rest, meeting)
        return y + last.noted(x, meeting.seen, meeting.inner, meeting.batch).astype(y.dtype)
    if isinstance(last, Scale):
        inside, axes = replace(changed, changes=changed.changes[:-1]), last.by.axes
        if axes and {*axes} <= {*meeting.inner, *meeting.batch}:
            x = x * beside(last.by, meeting.seen, x.dtype)
            return _product(inside, x, rest, meeting)
        y = _product(inside, x, rest, meeting)
        return y * beside(last.by, meeting.out, y.dtype)
    if isinstance(last, Rotation):
        x = last.rotated(x, meeting.seen)
        return _product(replace(changed, changes=changed.changes[:-1]), x, rest, meeting)
    scales = [i for i, change in enumerate(changed.changes) if isinstance(change, Scale | Rotation)]
    first = scales[-1] + 1 if scales else 0
    y = _product(replace(changed, changes=changed.changes[:first]), x, rest, meeting)
    for change in (c for c in changed.changes[first:] if isinstance(c, LowRank)):
        part = meeting.thin(meeting, change, dropout(x, change.dropout, change.key), rest)
        if change.start is not None:  # zeros around the range that the change is for
            axis = change.start[0]
            part = change.placed(part, changed.shape[axis], meeting.out.index(axis))
        y = y + cast(part, y.dtype)
    return _stored_once(y)


# So it is traced and differentiated once for all layers that are alike.
_jitted_product = jax.jit(_product, static_argnums=3, inline=True)


def _stored_once(y: Array) -> Array:
    """A sum of products that a gradient reads again as one array.

    XLA's CPU compiler would store both products for the gradient and add them in each reader.
    jaxlib 0.10 drops the barrier.
    """
    # Not in a rule of `jax.custom_jvp` for gradients alone: within jit and vmap, jax takes the
    # order of the result's axes from the function without the rule, and branches have another.
    barrier = jax.lax.optimization_barrier
    y = jax.lax.platform_dependent(y, cpu=barrier, default=lambda y: y)
    return checkpoint_name(y, ADAPTED_PRODUCT)


def _unchanged(changed: Changed, x: Array, rest: Sequence[Any], meeting: Meeting) -> Array:
    """The primitive on the unchanged weight, which if quantised is never in floats as a whole."""

    def run(weight: Any, given: Sequence[Any]) -> Array:
        x, *rest = given
        return meeting.bind(x, changed.floats(weight), rest)

    if not is_quantized(changed.base):
        return run(changed.base, [x, *rest])
    packed = Packed.of(changed.base, changed.views, changed, x, meeting)
    if packed is None:
        return once(run, changed.base, [x, *rest])
    return once(lambda weight, x: run(weight, [x]), changed.base, x, packed)


def _dot(primitive: Any, params: Any, where: int, changed: Changed, ndim: int) -> Meeting | None:
    """`dot_general`: any axes contracted, any batched."""
    n = len(changed.shape)
    sides, batches = params["dimension_numbers"]
    inner, batch = tuple(sides[where]), tuple(batches[where])
    seen = list(range(n, n + ndim))
    yours = (*sides[1 - where], *batches[1 - where])
    for mine, other in zip((*inner, *batch), yours, strict=True):
        seen[other] = mine
    kept = [i for i in range(n) if i not in seen]
    free = [i for i in seen if i >= n]
    out = (*batch, *kept, *free) if where == 0 else (*batch, *free, *kept)
    pairs = tuple(params.items())
    meeting = Meeting(primitive, pairs, where, inner, batch, tuple(seen), out, _dot_thin)
    return meeting if _separable(changed, inner, (*inner, *batch)) else None


def _separable(changed: Changed, inner: Axes, outer: Axes) -> bool:
    """Whether ranges are along kept axes, and scales along kept or along other axes alone."""
    for change in changed.changes:
        if isinstance(change, LowRank) and change.start and change.start[0] in outer:
            return False
        if isinstance(change, LowRank) and change.gate and len(outer) > len(inner):
            return False  # experts, whose inputs may be any of the tokens
        if isinstance(change, Rotation) and (
            {*change.inputs} != {*inner} or not {*change.by.axes} <= {RANK, *outer}
        ):
            return False
        if isinstance(change, Scale):
            axes = set(change.by.axes)
            if axes & set(inner) and not axes <= set(outer):
                return False
    return True


def _dot_thin(meeting: Meeting, change: LowRank, x: Array, rest: Sequence[Any]) -> Array:
    # The factor that shares more axes with the input goes first: it makes the input small.
    both = sorted(change.scaled, key=lambda f: -len(set(f.axes) & set(meeting.inner)))
    first, second = (f.cast(x.dtype) for f in both)
    precision, out = dict(meeting.params)["precision"], meeting.out
    h = contracted(Factor(x, meeting.seen), first, (*second.axes, *out), precision)
    if change.gate is not None:
        h = change.gate.on(h, [i for i in meeting.seen if i not in meeting.inner])

    def times(second: Factor, h: Factor, out: Axes) -> Array:
        # In the order of the operands, so that XLA transposes nothing.
        last = (second, h) if meeting.where == 0 else (h, second)
        return beside(contracted(*last, out, precision), out, x.dtype)

    rows = [i for i in meeting.seen if i in out and i not in meeting.batch]
    if len(rows) < 2:
        return times(second, h, out)

    def in_rows(second: Factor, h: Factor) -> Array:
        # For the gradient of B, XLA's CPU compiler contracts several axes by a transposed copy of
        # the cotangent. Others need one axis no more, and devices may split each of them.
        start, sizes = h.axes.index(rows[0]), [h.array.shape[i] for i in h.at(rows)]
        one = jax.lax.collapse(h.array, start, start + len(rows))
        fewer = tuple(i for i in out if i not in rows[1:])
        y = times(second, Factor(one, tuple(i for i in h.axes if i not in rows[1:])), fewer)
        start = fewer.index(rows[0])
        return y.reshape(*y.shape[:start], *sizes, *y.shape[start + 1 :])

    run = functools.partial(times, out=out)
    return jax.lax.platform_dependent(second, h, cpu=in_rows, default=run)


def _conv(primitive: Any, params: Any, where: int, changed: Changed, ndim: int) -> Meeting | None:
    """`conv_general_dilated` without groups: a convolution with A, then a product with B."""
    numbers = params["dimension_numbers"]
    kept, *inner = numbers.rhs_spec
    plain = params["feature_group_count"] == params["batch_group_count"] == 1
    expected = {frozenset({*inner, RANK}), frozenset({kept, RANK})}
    fits = all(
        {frozenset(f.axes) for f in c.factors} == expected
        if isinstance(c, LowRank) and not c.gate
        else isinstance(c, Scale) and set(c.by.axes) in ({kept}, {inner[0]}, set())
        for c in changed.changes
    )
    if where == 0 or not plain or not fits:
        return None
    seen, out = list(range(ndim, 2 * ndim)), list(range(ndim, 2 * ndim))
    seen[numbers.lhs_spec[1]], out[numbers.out_spec[1]] = inner[0], kept
    pairs, axes = tuple(params.items()), (tuple(seen), tuple(out))
    return Meeting(primitive, pairs, where, (inner[0],), (), *axes, _conv_thin)


def _conv_thin(meeting: Meeting, change: LowRank, x: Array, rest: Sequence[Any]) -> Array:
    params = dict(meeting.params)
    kept = params["dimension_numbers"].rhs_spec[0]
    feature = params["dimension_numbers"].out_spec[1]
    a, b = sorted(change.scaled, key=lambda f: kept in f.axes)
    kernel = _ordered(a, [RANK if i == kept else i for i in range(x.ndim)], x.dtype)
    h = meeting.bind(x, kernel, rest).astype(x.dtype)
    precision = params["precision"]  # of both operands, or of each
    one = precision[0] if isinstance(precision, tuple) else precision
    matrix = _ordered(b, [RANK, kept], x.dtype)
    h = jnp.moveaxis(h, feature, -1)
    y = jnp.matmul(h.reshape(-1, h.shape[-1]), matrix, precision=one)
    return jnp.moveaxis(y.reshape(*h.shape[:-1], -1), -1, feature)


def _groups(primitive: Any, params: Any, where: int, changed: Changed, ndim: int) -> Meeting | None:
    """`ragged_dot_general` of rows in groups, each with a matrix: a pair of factors for each."""
    numbers = params["ragged_dot_dimension_numbers"]
    usual = (((1,), (1,)), ((), ())), (0,), (0,)
    given = (
        numbers.dot_dimension_numbers,
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    expected = {frozenset({0, 1, RANK}), frozenset({0, 2, RANK})}
    fits = all(
        isinstance(c, LowRank) and {frozenset(f.axes) for f in c.factors} == expected and not c.gate
        for c in changed.changes
    )
    if where != 1 or given != usual or not fits:
        return None
    return Meeting(
        primitive, tuple(params.items()), where, (1,), (0,), (3, 1), (3, 2), _groups_thin
    )


def _groups_thin(meeting: Meeting, change: LowRank, x: Array, rest: Sequence[Any]) -> Array:
    a, b = sorted(change.scaled, key=lambda f: 2 in f.axes)
    h = meeting.bind(x, _ordered(a, [0, 1, RANK], x.dtype), rest).astype(x.dtype)
    return meeting.bind(h, _ordered(b, [0, RANK, 2], x.dtype), rest)


def _ordered(factor: Factor, axes: Sequence[int], dtype: Any) -> Array:
    """The array of a factor with its axes in an order."""
    return factor.array.transpose([factor.axes.index(axis) for axis in axes]).astype(dtype)


# How the input meets the weight, by the name of the primitive; None where no thin product is right.
MEETINGS = {"dot_general": _dot, "conv_general_dilated": _conv, "ragged_dot_general": _groups}
