"""Inside `thin()`, operations that read a changed weight are computed without forming it.

A `Lazy` stands for a changed weight. An operation that only looks at it in another way (a
transposition, a slice, a cast, one layer of a scan) gives another `Lazy`. A product with an input
is computed as `x W + (x A) B`, a lookup takes rows of W and of A. Everything else gets the sum
`W + A B`. So whatever the model's code does with a weight, it computes what it would compute with
the merged one.

`Thin` is a trace as the ones behind `jax.grad` and `jax.vmap`, by the interface that `jax.core`
has for them. Only changed weights are its values; all others pass through it as they are.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.weights.changes import Changed
from adapters_jax.weights.products import convolved, grouped, multiplied
from adapters_jax.weights.reach import operands_of_scan

Axes = frozenset[int]


@dataclass(frozen=True)
class Read:
    """One operation that reads a leaf.

    Attributes:
        operation: the name of the primitive.
        how: "product" and "lookup" are computed thin; "sum" forms the changed weight.
        inputs: axes of the leaf that are contracted with the input, or looked up.
        window: those of them that run over positions of the input, as a convolution's do.
        shared: axes of the leaf of which the operation sees one index, or batches.
        outputs: the other axes of the leaf.
    """

    operation: str
    how: str
    inputs: Axes = frozenset()
    shared: Axes = frozenset()
    outputs: Axes = frozenset()
    window: Axes = frozenset()


@dataclass
class Tracked:
    """A leaf whose reads are recorded.

    Attributes:
        path: the path of the leaf.
        reads: its reads so far.
        reaches: whether the model's outputs depend on it.
    """

    path: str
    reads: list[Read] = field(default_factory=list)
    reaches: bool = True


_RECORDS: ContextVar[dict[str, Tracked] | None] = ContextVar("records", default=None)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Tracked]]:
    """Records how adapted models read their changed weights in its body, by path."""
    records: dict[str, Tracked] = {}
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


def lazy(trace: "Thin", changed: Changed, path: str) -> "Lazy":
    """A changed weight for the code that reads it, recorded where somebody asks."""
    records = _RECORDS.get()
    if records is None:
        return Lazy(trace, changed)
    axes = tuple(frozenset({i}) for i in range(len(changed.shape)))
    return Lazy(trace, changed, records.setdefault(path, Tracked(path)), axes)


class Lazy(jax.core.Tracer):
    """A changed weight within a `Thin` trace.

    Attributes:
        changed: the weight, as the code sees it.
        leaf: records the reads; None where nobody asks.
        axes: while reads are recorded: for each axis that the code sees, the leaf's axes in it.
        indexed: axes of the leaf of which the code sees one index.
        looked_up: axes of the leaf of which the code sees the rows that an input chose.
        spent: the code sees a result of the weight in which the weight's axes are still found.
    """

    __slots__ = ("axes", "changed", "indexed", "leaf", "looked_up", "spent")

    def __init__(
        self,
        trace: "Thin",
        changed: Changed,
        leaf: Tracked | None = None,
        axes: tuple[Axes, ...] = (),
        indexed: Axes = frozenset(),
        looked_up: Axes = frozenset(),
        spent: bool = False,
    ):
        super().__init__(trace, jax.core.ShapedArray(changed.shape, changed.dtype))
        self.changed, self.leaf, self.axes = changed, leaf, axes
        self.indexed, self.looked_up, self.spent = indexed, looked_up, spent

    def full_lower(self) -> Any:
        """The sum, for traces that know nothing of changed weights."""
        return self.formed()

    def formed(self) -> Array:
        """The sum W + A B; that of looked-up rows in their own dtype, as an activation."""
        return self.changed.formed(wide=not self.looked_up)

    def seen_as(
        self,
        changed: Changed | None,
        axes: Sequence[Axes] = (),
        indexed: Axes = frozenset(),
        looked_up: Axes = frozenset(),
    ) -> "Lazy | None":
        """This weight after an operation that looks at it in another way."""
        if changed is None:
            return None
        left: Axes = frozenset().union(*axes)
        return Lazy(
            self._trace,
            changed,
            self.leaf,
            tuple(axes) if self.leaf else (),
            (self.indexed | indexed) - left if self.leaf else frozenset(),
            self.looked_up | looked_up,
            self.spent,
        )

    def record(
        self,
        operation: str,
        how: str,
        inputs: Sequence[int] = (),
        batch: Sequence[int] = (),
        window: Sequence[int] = (),
    ) -> None:
        """Records a read that contracts or batches the given axes, as the code sees them."""
        if self.leaf is None:
            return
        shared = self.indexed | self.looked_up | _union(self.axes, batch)
        used = _union(self.axes, inputs) - shared
        every = _union(self.axes, range(len(self.axes)))
        how = "sum" if self.spent else how
        if how == "lookup":
            used, shared = self.looked_up, self.indexed
        outputs, positions = every - used - shared, _union(self.axes, window) & used
        self.leaf.reads.append(Read(operation, how, used, shared, outputs, positions))


def _union(axes: Sequence[Axes], which: Any) -> Axes:
    return frozenset().union(*(axes[i] for i in which))


class Thin(jax.core.Trace):
    """The trace that computes with changed weights; its values are those of `parent`.

    Args:
        parent: the trace that it stands on.
        known: None, or while reads are recorded: the values that follow from variables and
            constants alone, by id. A weight is followed through operations with these.
    """

    def __init__(self, parent: Any, known: dict[int, Any] | None = None):
        super().__init__()
        self.parent, self.known = parent, known
        # flax compares traces by this reference: for it and for caches this is the parent's trace.
        self._weakref = parent._weakref

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parent, name)  # what this trace has no rule for, the parent does

    def stage_value(self, val: Any) -> Any:
        """A constant as a value."""
        return self.parent.stage_value(val)

    def process_primitive(self, primitive: Any, values: Any, params: Any, /) -> Any:
        """Computes an operation; see the module."""
        result = self._computed(primitive, values, params)
        if self.known is not None and all(map(self.knows, values)):
            self.learn(result if primitive.multiple_results else [result])
        return result

    def knows(self, x: Any) -> bool:
        """Whether a value follows from variables and constants alone, not from inputs."""
        if isinstance(x, Lazy):
            return not x.looked_up
        return not isinstance(x, jax.core.Tracer) or id(x) in (self.known or ())

    def learn(self, values: Iterable[Any]) -> None:
        """Remembers values that follow from variables and constants alone."""
        if self.known is not None:
            self.known.update((id(x), x) for x in values)

    def _computed(self, primitive: Any, values: Any, params: Any) -> Any:
        where = next((i for i, x in enumerate(values) if isinstance(x, Lazy)), None)
        if where is None:
            return self.parent.process_primitive(primitive, values, params)
        with jex.set_current_trace(self.parent):
            rule = RULES.get(primitive.name)
            result = rule and rule(self, primitive, values, params, where)
            return self._by_sum(primitive, values, params) if result is None else result

    def _by_sum(self, primitive: Any, values: Any, params: Any) -> Any:
        """The operation on the formed sums."""
        weights = [x for x in values if isinstance(x, Lazy)]
        weights.sort(key=lambda x: -len(frozenset().union(*x.axes)))  # matrices before their scales
        alone = self.known is not None and all(map(self.knows, values))
        # Of several weights the one with the most axes is followed.
        weight = max(weights, key=lambda x: len(_union(x.axes, range(len(x.axes)))))
        for x in weights:
            if not alone or x is not weight:
                x.record(primitive.name, "lookup" if x.looked_up else "sum")
        result = primitive.bind(*map(formed, values), **params)
        if not alone:
            return result
        several = primitive.multiple_results
        made = [self._spent(weight, y) for y in (result if several else [result])]
        if not any(isinstance(y, Lazy) for y in made) and not weight.spent:
            weight.record(primitive.name, "sum")
        return made if several else made[0]

    def _spent(self, weight: Lazy, y: Any) -> Any:
        """A result in which the axes of the weight are found, if it has the weight's shape."""
        if jnp.shape(y) != weight.shape or not jnp.issubdtype(y.dtype, jnp.inexact):
            return y
        changed = Changed.of(y)
        return Lazy(self, changed, weight.leaf, weight.axes, weight.indexed, spent=True)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, values: Any, /, **params: Any
    ) -> Any:
        """A function with a derivative of its own gets the sums."""
        values = self._sums(primitive, values)
        return self.parent.process_custom_jvp_call(primitive, fun, jvp, values, **params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, values: Any, /, **params: Any
    ) -> Any:
        """A function with a gradient of its own gets the sums."""
        values = self._sums(primitive, values)
        return self.parent.process_custom_vjp_call(primitive, fun, fwd, bwd, values, **params)

    def _sums(self, primitive: Any, values: Any) -> list[Any]:
        for x in values:
            if isinstance(x, Lazy):
                x.record(primitive.name, "sum")
        with jex.set_current_trace(self.parent):
            return [formed(x) for x in values]


def formed(x: Any) -> Any:
    """The sum of a changed weight; anything else as it is."""
    return x.formed() if isinstance(x, Lazy) else x


@contextlib.contextmanager
def thin(known: dict[int, Any] | None = None) -> Iterator[Thin]:
    """Computes with changed weights in its body; nested ones do nothing more.

    Args:
        known: see `Thin`.
    """
    with jex.take_current_trace() as current:
        if isinstance(current, Thin):
            with jex.set_current_trace(current):
                yield current
        else:
            inner = Thin(current, known)
            with jex.set_current_trace(inner):
                yield inner


def current() -> Thin | None:
    """The trace of the `thin()` around the caller; None outside, and within another trace."""
    with jex.take_current_trace() as trace, jex.set_current_trace(trace):
        return trace if isinstance(trace, Thin) else None


def computed_thin(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs within `thin()` and returns sums."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if current():
            return function(*args, **kwargs)
        with thin():
            return lowered(function(*args, **kwargs))

    return run


def lowered(tree: Any) -> Any:
    """A tree with the sums of changed weights; to be called where `thin()` was entered.

    Without changed weights it is the very tree, since jax would sort its dictionaries.
    """
    if not any(isinstance(x, Lazy) for x in jax.tree.leaves(tree, is_leaf=_is_lazy)):
        return tree
    return jax.tree.map(formed, tree, is_leaf=_is_lazy)


def _is_lazy(x: Any) -> bool:
    return isinstance(x, Lazy)


# --- rules: `rule(trace, primitive, values, params, where)` is None where the sum is to be formed

Rule = Callable[[Thin, Any, Sequence[Any], Any, int], Any]


def _view(function: Callable[[Lazy, Any], Lazy | None]) -> Rule:
    """The rule of an operation of one weight that only looks at it in another way."""

    def rule(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
        return function(values[where], params) if len(values) == 1 else None

    return rule


def _transpose(x: Lazy, params: Any) -> Lazy | None:
    order = params["permutation"]
    return x.seen_as(x.changed.transposed(order), [x.axes[i] for i in order] if x.axes else ())


def _reshape(x: Lazy, params: Any) -> Lazy | None:
    shape = params["new_sizes"]
    if params["dimensions"] is not None or 0 in shape:
        return None
    axes = x.changed.axes_after(shape, x.axes) if x.axes else ()
    return x.seen_as(x.changed.reshaped(shape), axes)


def _squeeze(x: Lazy, params: Any) -> Lazy | None:
    gone = {axis % x.ndim for axis in params["dimensions"]}
    kept = [i for i in range(x.ndim) if i not in gone]
    shape = [x.shape[i] for i in kept]
    axes = [x.axes[i] for i in kept] if x.axes else ()
    return x.seen_as(x.changed.reshaped(shape), axes, _union(x.axes, gone) if x.axes else Axes())


def _broadcast(x: Lazy, params: Any) -> Lazy | None:
    shape, where = params["shape"], params["broadcast_dimensions"]
    if any(x.shape[i] != shape[j] for i, j in enumerate(where)):
        return None
    axes = [x.axes[where.index(j)] if x.axes and j in where else Axes() for j in range(len(shape))]
    return x.seen_as(x.changed.broadcast(shape, where), axes if x.axes else ())


def _cast(x: Lazy, params: Any) -> Lazy | None:
    dtype = params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return x.seen_as(x.changed.cast(dtype), x.axes)


def _slice(x: Lazy, params: Any) -> Lazy | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * x.ndim
    cut = [i for i in range(x.ndim) if (starts[i], limits[i], steps[i]) != (0, x.shape[i], 1)]

    def one(array: Array, position: dict[int, int]) -> Array:
        for axis in cut:
            if axis in position:
                array = jax.lax.slice_in_dim(
                    array, starts[axis], limits[axis], steps[axis], position[axis]
                )
        return array

    return x.seen_as(x.changed.sliced(one, cut), x.axes)


def _dynamic_slice(
    trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int
) -> Any:
    x, *starts = values
    sizes = params["slice_sizes"]
    if where or any(isinstance(i, Lazy) for i in starts):
        return None
    cut = [i for i in range(x.ndim) if sizes[i] != x.shape[i]]

    def one(array: Array, position: dict[int, int]) -> Array:
        for axis in cut:
            if axis in position:
                array = jax.lax.dynamic_slice_in_dim(
                    array, starts[axis], sizes[axis], position[axis]
                )
        return array

    return x.seen_as(x.changed.sliced(one, cut), x.axes)


def _gather(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """Rows along one axis; of a matrix they are activations, else the rows may be weights."""
    x, ids = values
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if where or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    whole = all(size == (1 if i == axis else x.shape[i]) for i, size in enumerate(sizes))
    if not whole or numbers.collapsed_slice_dims != (axis,):
        return None
    rows = ids.ndim - 1
    outside = [i for i in range(rows + x.ndim - 1) if i not in numbers.offset_dims]

    def take(array: Array, position: dict[int, int]) -> Array:
        """The rows, whose axes are in front of the others."""
        if axis not in position:
            return array
        array = jnp.moveaxis(array, position[axis], 0)
        rest = array.ndim - 1
        own = jax.lax.GatherDimensionNumbers(tuple(range(rows, rows + rest)), (0,), (0,))
        new = {**params, "dimension_numbers": own, "slice_sizes": (1, *array.shape[1:])}
        return primitive.bind(array, ids, **new)

    others = dict(zip((i for i in range(x.ndim) if i != axis), numbers.offset_dims, strict=True))
    changed = x.changed.taken(take, axis, outside, others)
    axes = [Axes()] * (rows + x.ndim - 1)
    for old, new in others.items():
        axes[new] = x.axes[old] if x.axes else Axes()
    seen = x.seen_as(
        changed, axes if x.axes else (), looked_up=x.axes[axis] if x.axes else Axes({0})
    )
    if seen is None or x.ndim > 2:
        return seen
    seen.record("gather", "lookup")
    return seen.formed()


def _constraint(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A sharding is asked of the weight alone; the sum of parts is as the parts are."""
    x = values[where]
    return x.seen_as(x.changed.viewed(lambda w: primitive.bind(w, **params)), x.axes)


def _multiply(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A number times a weight."""
    x, number = values[where], values[1 - where]
    if isinstance(number, Lazy) or jnp.ndim(number):
        return None
    return x.seen_as(x.changed.scaled(number), x.axes)


def _divide(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A weight over a number."""
    x, number = values
    if where or isinstance(number, Lazy) or jnp.ndim(number):
        return None
    return x.seen_as(x.changed.scaled(1 / number), x.axes)


def _product(compute: Callable[..., Any]) -> Rule:
    """The rule of an operation in which a weight meets its input."""

    def rule(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
        x = values[where]
        others = [formed(value) for i, value in enumerate(values) if i != where]
        for i, value in enumerate(values):
            if i != where and isinstance(value, Lazy):
                value.record(primitive.name, "sum")
        found = compute(primitive, x.changed, others, params, where)
        how = "sum" if found.y is None else "product"
        x.record(primitive.name, how, found.inputs, found.batch, found.window)
        if found.y is not None:
            return found.y
        return primitive.bind(*(formed(value) for value in values), **params)

    return rule


def _inlined(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """The body of a jitted function, in place of its call."""
    with jex.set_current_trace(trace):
        return jex.jaxpr_as_fun(params["jaxpr"])(*values)


def _remat(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """The body of `jax.checkpoint`, checkpointed again with the parts of changed weights."""
    split, join = _parts(values)
    known = [trace.knows(x) for x in values]

    def body(parts: Any) -> Any:
        with thin(trace.known) as inner:
            inner.learn(part for part, own in zip(parts, known, strict=True) if own)
            inside = join(inner, parts)
            return lowered(jax.core.eval_jaxpr(params["jaxpr"], (), *inside))

    again = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return again(split)


def _cond(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """One of several branches, each with the changed weights."""
    index, *operands = values
    if isinstance(index, Lazy):
        return None
    split, join = _parts(operands)
    known = [trace.knows(x) for x in operands]

    def thinly(jaxpr: Any) -> Callable[[Any], Any]:
        def branch(parts: Any) -> Any:
            with thin(trace.known) as inner:
                inner.learn(part for part, own in zip(parts, known, strict=True) if own)
                return lowered(jex.jaxpr_as_fun(jaxpr)(*join(inner, parts)))

        return branch

    return jax.lax.switch(index, [thinly(jaxpr) for jaxpr in params["branches"]], split)


def _parts(values: Sequence[Any]) -> tuple[list[Any], Callable[[Thin, Any], list[Any]]]:
    """Values as a tree of plain arrays, and the function that makes them of it again."""

    def join(trace: Thin, parts: Any) -> list[Any]:
        return [
            Lazy(trace, part, x.leaf, x.axes, x.indexed, x.looked_up, x.spent)
            if isinstance(x, Lazy)
            else part
            for x, part in zip(values, parts, strict=True)
        ]

    return [x.changed if isinstance(x, Lazy) else x for x in values], join


def _scan(trace: Thin, primitive: Any, values: Sequence[Any], params: Any, where: int) -> Any:
    """A scan over layers, each with its own part of stacked weights."""
    consts, initial, xs = operands_of_scan(values, params)
    carry = [formed(x) for x in initial]
    for x in initial:
        if isinstance(x, Lazy):
            x.record("scan", "sum")
    length = params["length"]
    stacked = [x.changed.layers(length) if isinstance(x, Lazy) else x for x in xs]
    rows = [part.rows if isinstance(x, Lazy) else part for x, part in zip(xs, stacked, strict=True)]
    known = [trace.knows(x) for x in xs]

    def body(carry: Any, rows: Any) -> Any:
        with thin(trace.known) as inner:
            inner.learn(row for row, own in zip(rows, known, strict=True) if own)
            inside = [
                Lazy(
                    inner,
                    part.layer(row),
                    x.leaf,
                    x.axes[1:],
                    x.indexed | (x.axes[0] if x.axes else Axes()),
                    x.looked_up,
                    x.spent,
                )
                if isinstance(x, Lazy)
                else row
                for x, part, row in zip(xs, stacked, rows, strict=True)
            ]
            results = lowered(
                jex.jaxpr_as_fun(params["jaxpr"])(*_over(inner, consts), *carry, *inside)
            )
        return results[: len(carry)], results[len(carry) :]

    carry, made = jax.lax.scan(
        body, carry, rows, length, reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *made]


def _over(trace: Thin, values: Sequence[Any]) -> list[Any]:
    """Changed weights of an outer trace, as values of this one."""
    return [
        Lazy(trace, x.changed, x.leaf, x.axes, x.indexed, x.looked_up, x.spent)
        if isinstance(x, Lazy)
        else x
        for x in values
    ]


RULES: dict[str, Rule] = {
    "transpose": _view(_transpose),
    "reshape": _view(_reshape),
    "squeeze": _view(_squeeze),
    "broadcast_in_dim": _view(_broadcast),
    "convert_element_type": _view(_cast),
    "copy": _view(lambda x, params: x),
    "name": _view(lambda x, params: x),
    "slice": _view(_slice),
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "sharding_constraint": _constraint,
    "mul": _multiply,
    "div": _divide,
    "neg": _view(lambda x, params: x.seen_as(x.changed.scaled(jnp.float32(-1)), x.axes)),
    "dot_general": _product(multiplied),
    "conv_general_dilated": _product(convolved),
    "ragged_dot_general": _product(grouped),
    "jit": _inlined,
    "pjit": _inlined,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "cond": _cond,
}
