"""Products of an input with a changed weight, without the changed weight: `x W + (x A) B`.

Each function takes a primitive, the weight, the other operands, the primitive's parameters and the
weight's position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.weights.changes import (
    LETTERS,
    RANK,
    Change,
    Changed,
    Factor,
    LowRank,
    Scale,
    dropout,
)
from adapters_jax.weights.quantized import is_quantized, once


class Product(NamedTuple):
    """A product with a changed weight.

    Attributes:
        y: the result; None where the changed weight has to be formed for it.
        inputs: the axes of the weight that are contracted.
        batch: the axes that are batched.
        window: the contracted axes that run over positions of the input.
    """

    y: Array | None
    inputs: Sequence[int] = ()
    batch: Sequence[int] = ()
    window: Sequence[int] = ()


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
    branch: Callable[[LowRank, Array], Array],
    on_input: Callable[[Factor, Array], Array | None],
    on_output: Callable[[Factor, Array], Array],
) -> Array:
    """The product of an input and a changed weight, from the last change to the first."""
    if not changes:
        return unchanged(x)
    *before, last = changes

    def rest(x: Array) -> Array:
        return _evaluate(before, x, unchanged, branch, on_input, on_output)

    if isinstance(last, LowRank):
        y = rest(x)
        return y + branch(last, x).astype(y.dtype)
    scaled = on_input(last.by, x)
    return on_output(last.by, rest(x)) if scaled is None else rest(scaled)


def _dropped(change: LowRank, x: Array) -> Array:
    return dropout(x, change.dropout, change.key)


def multiplied(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Product:
    """`dot_general`: any axes contracted, any batched."""
    (x,) = others
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    inner, own = (left, right) if where == 0 else (right, left)
    batch, own_batch = (left_batch, right_batch) if where == 0 else (right_batch, left_batch)
    n, outer = len(changed.shape), [*inner, *batch]
    if not jnp.issubdtype(x.dtype, jnp.floating) or not _separable(changed.changes, inner, outer):
        return Product(None, inner, batch)
    w = list(LETTERS[:n])
    xs = list(LETTERS[n : n + x.ndim])
    for mine, yours in zip(outer, (*own, *own_batch), strict=True):
        xs[yours] = w[mine]
    kept = [c for i, c in enumerate(w) if i not in outer]
    free = [c for i, c in enumerate(xs) if i not in (*own, *own_batch)]
    shared = [w[i] for i in batch]
    out = [*shared, *kept, *free] if where == 0 else [*shared, *free, *kept]
    precision = params["precision"]

    def einsum(form: str, *operands: Array) -> Array:
        return jnp.einsum(form, *(a.astype(x.dtype) for a in operands), precision=precision)

    def branch(change: LowRank, x: Array) -> Array:
        both = sorted(change.factors, key=lambda f: -len(set(f.axes) & set(inner)))
        first, second = (f.letters(w) for f in both)
        needed = {*second, *out}
        hidden = [c for c in xs if c in needed]
        hidden += [c for c in first if c in needed and c not in hidden]
        result = [c for c in out if c in hidden or c in second]
        middle = "".join(hidden)
        h = einsum(f"{''.join(xs)},{first}->{middle}", _dropped(change, x), both[0].array)
        y = einsum(f"{middle},{second}->{''.join(result)}", h, both[1].array)
        y = jnp.expand_dims(y, [i for i, c in enumerate(out) if c not in result])
        return _ranged(change, y, changed.shape, lambda axis: out.index(w[axis]))

    def on(letters: Sequence[str], factor: Factor, array: Array) -> Array:
        own = factor.letters(w)
        order = sorted(range(len(own)), key=lambda i: letters.index(own[i]))
        by = factor.array.transpose(order).astype(array.dtype)
        return array * jnp.expand_dims(by, [i for i, c in enumerate(letters) if c not in own])

    def on_input(factor: Factor, x: Array) -> Array | None:
        inside = factor.axes and set(factor.axes) <= {*inner, *batch}
        return on(xs, factor, x) if inside else None

    y = _evaluate(
        changed.changes,
        x,
        lambda x: _unchanged(primitive, changed, [x], params, where),
        branch,
        on_input,
        lambda factor, y: on(out, factor, y),
    )
    return Product(y, inner, batch)


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
) -> Product:
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
        return Product(None, inner, window=inner[1:])
    feature, channel = numbers.out_spec[1], numbers.lhs_spec[1]

    def along(array: Array, axis: int, ndim: int) -> Array:
        return array.reshape([-1 if i == axis else 1 for i in range(ndim)])

    def branch(change: LowRank, x: Array) -> Array:
        a, b = sorted(change.factors, key=lambda f: kept in f.axes)
        place = [RANK if axis == kept else axis for axis in range(len(changed.shape))]
        kernel = a.array.transpose([a.axes.index(axis) for axis in place]).astype(x.dtype)
        matrix = (b.array if b.axes[0] == RANK else b.array.T).astype(x.dtype)
        h = primitive.bind(_dropped(change, x), kernel, **params).astype(x.dtype)
        y = jnp.moveaxis(
            jnp.matmul(jnp.moveaxis(h, feature, -1), matrix, precision=_one(params["precision"])),
            -1,
            feature,
        )
        return _ranged(change, y, changed.shape, lambda axis: feature)

    def on_input(factor: Factor, x: Array) -> Array | None:
        if factor.axes != (inner[0],):
            return None
        return x * along(factor.array, channel, x.ndim).astype(x.dtype)

    def on_output(factor: Factor, y: Array) -> Array:
        return y * along(factor.array, feature, y.ndim).astype(y.dtype)

    y = _evaluate(
        changed.changes,
        x,
        lambda x: _unchanged(primitive, changed, [x], params, where),
        branch,
        on_input,
        on_output,
    )
    return Product(y, inner, window=inner[1:])


def _one(precision: Any) -> Any:
    return precision[0] if isinstance(precision, tuple) else precision


def grouped(
    primitive: Any, changed: Changed, others: Sequence[Any], params: Any, where: int
) -> Product:
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
        return Product(None, (1,), (0,)) if (where, given) == (1, usual) else Product(None)

    def branch(change: LowRank, x: Array) -> Array:
        a, b = sorted(change.factors, key=lambda f: 2 in f.axes)
        left = a.array.transpose([a.axes.index(i) for i in (0, 1, RANK)]).astype(x.dtype)
        right = b.array.transpose([b.axes.index(i) for i in (0, RANK, 2)]).astype(x.dtype)
        h = primitive.bind(_dropped(change, x), left, *sizes, **params).astype(x.dtype)
        y = primitive.bind(h, right, *sizes, **params)
        return _ranged(change, y, changed.shape, lambda axis: 1)

    y = _evaluate(
        changed.changes,
        x,
        lambda x: _unchanged(primitive, changed, [x, *sizes], params, where),
        branch,
        lambda factor, x: None,
        lambda factor, y: y,
    )
    return Product(y, (1,), (0,))
