"""How each operation is computed for a changed weight; what has no rule gets the formed sum.

An operation that only looks at the weight in another way gives another `Lazy`; a product is
computed thin; jit, checkpoint, cond and scan are entered with the parts of the weight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adapters_jax.trace.primitives import operands_of_scan, rows_of
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.joining import concatenated, stacked
from adapters_jax.weights.lazy import RULES, Lazy, Rule, Thin, formed, lowered, thin
from adapters_jax.weights.products import MEETINGS, multiplied, packed_on


def _view(function: Callable[[Lazy, Any], Any]) -> Rule:
    """The rule of an operation of one weight that only looks at it in another way."""

    def rule(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
        return function(values[where], params) if len(values) == 1 else None

    return rule


def _transpose(x: Lazy, params: Any) -> Lazy | None:
    return x.seen_as(x.changed.transposed(params["permutation"]))


def _reshape(x: Lazy, params: Any) -> Lazy | None:
    shape = params["new_sizes"]
    whole = params["dimensions"] is None and 0 not in shape
    return x.seen_as(x.changed.reshaped(shape)) if whole else None


def _squeeze(x: Lazy, params: Any) -> Lazy | None:
    gone = {axis % x.ndim for axis in params["dimensions"]}
    return x.seen_as(x.changed.reshaped([n for i, n in enumerate(x.shape) if i not in gone]))


def _broadcast(x: Lazy, params: Any) -> Lazy | None:
    shape, where = params["shape"], params["broadcast_dimensions"]
    if any(x.shape[i] != shape[j] for i, j in enumerate(where)):
        return None
    return x.seen_as(x.changed.broadcast(shape, where))


def _cast(x: Lazy, params: Any) -> Lazy | None:
    dtype = params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    stored, seen, new = (jnp.finfo(each).bits for each in (x.changed.base.dtype, x.dtype, dtype))
    if stored > seen < new:  # the weight was rounded on purpose, as in float8
        return None
    return x.seen_as(x.changed.cast(dtype))


def _cut(x: Lazy, shape: Sequence[int], one: Callable[[Array, int, int], Array]) -> Lazy | None:
    """A part of a weight; `one(array, axis, position)` cuts an axis of it, wherever that is."""
    axes = [i for i in range(x.ndim) if shape[i] != x.shape[i]]

    def cut(array: Array, position: dict[int, int]) -> Array:
        for axis in axes:
            if axis in position:
                array = one(array, axis, position[axis])
        return array

    return x.seen_as(x.changed.sliced(cut, axes))


def _slice(x: Lazy, params: Any) -> Lazy | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * x.ndim
    shape = [-((a - b) // step) for a, b, step in zip(starts, limits, steps, strict=True)]

    def one(array: Array, axis: int, at: int) -> Array:
        return jax.lax.slice_in_dim(array, starts[axis], limits[axis], steps[axis], at)

    return _cut(x, shape, one)


def _split(x: Lazy, params: Any) -> list[Lazy] | None:
    sizes, along, found = params["sizes"], params["axis"], list[Lazy]()
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])

        def one(array: Array, axis: int, at: int, start: int = start, size: int = size) -> Array:
            return jax.lax.slice_in_dim(array, start, start + size, axis=at)

        part = _cut(x, [size if i == along else n for i, n in enumerate(x.shape)], one)
        found += [part] if part is not None else []
    return found if len(found) == len(sizes) else None


def _unstack(x: Lazy, params: Any) -> list[Lazy] | None:
    axis = params["axis"]
    each = {**params, "sizes": (1,) * x.shape[axis]}
    parts = [_squeeze(part, {"dimensions": (axis,)}) for part in _split(x, each) or ()]
    found = [part for part in parts if part is not None]
    return found if len(found) == x.shape[axis] else None


def _joined(join: Callable[..., Changed | None], axis: str) -> Rule:
    """The rule of an operation that puts weights, some of them changed, side by side."""

    def rule(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
        lazies = [x for x in values if isinstance(x, Lazy)]
        pieces = [x.changed if isinstance(x, Lazy) else Changed.of(x) for x in values]
        whole = None if any(x.looked_up for x in lazies) else join(pieces, params[axis])
        leaves = {leaf.path: leaf for x in lazies for leaf in x.leaves}
        return None if whole is None else Lazy(trace, whole, tuple(leaves.values()))

    return rule


def _dynamic_slice(
    trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int
) -> Any:
    x, *starts = values
    sizes = params["slice_sizes"]
    if where or any(isinstance(i, Lazy) for i in starts):
        return None

    def one(array: Array, axis: int, at: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], at)

    return _cut(x, sizes, one)


def _gather(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """Rows along one axis; of a matrix they are activations, else the rows may be weights."""
    x, ids = values
    numbers = params["dimension_numbers"]
    along, places = rows_of(params, x.shape)
    fill = params["fill_value"]
    # Outside of the table, a change of a row that is neither 0 nor NaN would change it.
    if where or not along or (fill and not np.isnan(fill)):
        return None
    (axis,) = along
    single = [i for i in numbers.offset_dims if i not in places]  # the axis of a row by itself
    if single and x.ndim > 2:
        return None
    starts = numbers.start_index_map.index(axis)
    ids = ids[..., starts : starts + 1]
    places = [place - sum(i < place for i in single) for place in places]
    rows = ids.ndim - 1
    outside = [i for i in range(rows + x.ndim - 1) if i not in places]

    def take(array: Array, position: dict[int, int]) -> Array:
        """The rows, whose axes are in front of the others."""
        if axis not in position:
            return array
        array = jnp.moveaxis(array, position[axis], 0)
        rest = array.ndim - 1
        own = jax.lax.GatherDimensionNumbers(tuple(range(rows, rows + rest)), (0,), (0,))
        new = {**params, "dimension_numbers": own, "slice_sizes": (1, *array.shape[1:])}
        if not jnp.issubdtype(array.dtype, jnp.inexact):  # packed: outside, the scales are NaN
            new["fill_value"] = 0
        return primitive.bind(array, ids, **new)

    others = dict(zip((i for i in range(x.ndim) if i != axis), places, strict=True))
    changed = x.changed.taken(take, axis, outside, others)
    seen = x.seen_as(changed, looked_up=True)
    if seen is None or x.ndim > 2:
        return seen  # as of experts, whose matrices meet an input later
    seen.record("gather", "lookup")
    return jnp.expand_dims(seen.formed(), single)


def _constraint(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A sharding is asked of the weight alone; the sum of parts is as the parts are."""
    x = values[where]
    return x.seen_as(x.changed.viewed(lambda w: primitive.bind(w, **params), scales=lambda s: s))


def _multiply(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A number times a weight."""
    x, number = values[where], values[1 - where]
    if isinstance(number, Lazy) or jnp.ndim(number):
        return None
    return x.seen_as(x.changed.scaled(number))


def _divide(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A weight over a number."""
    x, number = values
    if where or isinstance(number, Lazy) or jnp.ndim(number):
        return None
    return x.seen_as(x.changed.scaled(1 / number))


def _product(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A weight meets its input."""
    x, others = values[where], [value for i, value in enumerate(values) if i != where]
    for value in others:
        if isinstance(value, Lazy):
            value.record(primitive.name)
    others = [*map(formed, others)]
    y = multiplied(primitive, x.changed, others, params, where)
    packed = packed_on(primitive, x.changed, others[0], params, where) if x.leaves else ()
    x.record(primitive.name, "sum" if y is None else "product", packed)
    return primitive.bind(*map(formed, values), **params) if y is None else y


def _inlined(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """The body of a jitted function, in place of its call."""
    return trace.inlined(params, values)


def _remat(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """The body of `jax.checkpoint`, checkpointed again with the parts of changed weights."""
    # Without the call, what the body computes would be kept for the gradient. The parts are plain
    # arrays, which jax can differentiate; the body puts them together again.
    split, join = _parts(values)
    run = functools.partial(jax.core.eval_jaxpr, params["jaxpr"], ())
    return trace.checkpointed(lambda parts: _inside(run, join(parts)), params)(split)


def _cond(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """One of several branches, each with the changed weights."""
    index, *operands = values
    if isinstance(index, Lazy):
        return None
    split, join = _parts(operands)

    def branch(jaxpr: Any) -> Callable[[Any], Any]:
        return lambda parts: _inside(jex.jaxpr_as_fun(jaxpr), join(parts))

    return jax.lax.switch(index, [branch(jaxpr) for jaxpr in params["branches"]], split)


def _parts(values: Sequence[Any]) -> tuple[list[Any], Callable[[Any], list[Any]]]:
    """Values as a tree of plain arrays, and the function that makes them of it again."""

    def join(parts: Any) -> list[Any]:
        return [
            x.seen_as(part) if isinstance(x, Lazy) else part
            for x, part in zip(values, parts, strict=True)
        ]

    return [x.changed if isinstance(x, Lazy) else x for x in values], join


def _inside(run: Callable[..., Any], values: Sequence[Any]) -> Any:
    """What a body, which jax traces by itself, makes of values, some of them changed weights."""
    with thin() as inner:
        return lowered(run(*(x.within(inner) if isinstance(x, Lazy) else x for x in values)))


def _scan(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A scan over layers, each with its own part of stacked weights."""
    consts, initial, xs = operands_of_scan(values, params)
    # A carry has to be of one type in all rounds; what a round makes of a changed weight is a sum.
    carry = [formed(x) for x in initial]
    for x in initial:
        if isinstance(x, Lazy):
            x.record("scan")
    length = params["length"]
    stacked = [x.changed.layers(length) if isinstance(x, Lazy) else x for x in xs]
    rows = [part.rows if isinstance(x, Lazy) else part for x, part in zip(xs, stacked, strict=True)]

    def body(carry: Any, rows: Any) -> Any:
        layer = [
            x.seen_as(part.layer(row)) if isinstance(x, Lazy) else row
            for x, part, row in zip(xs, stacked, rows, strict=True)
        ]
        results = _inside(jex.jaxpr_as_fun(params["jaxpr"]), [*consts, *carry, *layer])
        return results[: len(carry)], results[len(carry) :]

    carry, made = jax.lax.scan(
        body, carry, rows, length, reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *made]


def _while(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A loop until something is so, with the changed weights that it reads in every round."""
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    if params["cond_jaxpr"].out_avals[0].shape:  # of a batch, as jax's own function cannot have it
        return None
    for x in values[m:]:
        if isinstance(x, Lazy):
            x.record("while")

    goes_on, body = (jex.jaxpr_as_fun(params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    return jax.lax.while_loop(
        lambda carry: _inside(goes_on, [*values[:n], *carry])[0],
        lambda carry: _inside(body, [*values[n:m], *carry]),
        [formed(x) for x in values[m:]],
    )


RULES.update(
    {
        "transpose": _view(_transpose),
        "reshape": _view(_reshape),
        "squeeze": _view(_squeeze),
        "broadcast_in_dim": _view(_broadcast),
        "convert_element_type": _view(_cast),
        "copy": _view(lambda x, params: x),
        "name": _view(lambda x, params: x),
        "slice": _view(_slice),
        "split": _view(_split),
        "unstack": _view(_unstack),
        "concatenate": _joined(concatenated, "dimension"),
        "stack": _joined(stacked, "axis"),
        "dynamic_slice": _dynamic_slice,
        "gather": _gather,
        "sharding_constraint": _constraint,
        "mul": _multiply,
        "div": _divide,
        "neg": _view(lambda x, params: x.seen_as(x.changed.scaled(jnp.float32(-1)))),
        **dict.fromkeys(MEETINGS, _product),
        "jit": _inlined,
        "pjit": _inlined,
        "remat2": _remat,
        "checkpoint": _remat,
        "scan": _scan,
        "cond": _cond,
        "while": _while,
    }
)
