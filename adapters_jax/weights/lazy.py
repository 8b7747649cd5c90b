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
    leaf = None if records is None else records.setdefault(path, Tracked(path))
    return Lazy(trace, changed) if leaf is None else watched(trace, changed, leaf)


def watched(trace: "Thin", changed: Changed, leaf: Tracked) -> "Lazy":
    """A weight whose reads are recorded."""
    axes = tuple(frozenset({i}) for i in range(len(changed.shape)))
    return Lazy(trace, changed, leaf, axes)


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

    def within(self, trace: "Thin", changed: Changed | None = None) -> "Lazy":
        """This weight, or what another trace has of it, as a value of that trace."""
        own = self.changed if changed is None else changed
        return Lazy(trace, own, self.leaf, self.axes, self.indexed, self.looked_up, self.spent)

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
        shared = self.indexed | self.looked_up | union(self.axes, batch)
        used = union(self.axes, inputs) - shared
        every = union(self.axes, range(len(self.axes)))
        how = "sum" if self.spent else how
        if how == "lookup":
            used, shared = self.looked_up, self.indexed
        outputs, positions = every - used - shared, union(self.axes, window) & used
        self.leaf.reads.append(Read(operation, how, used, shared, outputs, positions))


def union(axes: Sequence[Axes], which: Any) -> Axes:
    """The leaf's axes in those that the code sees at some positions."""
    return frozenset().union(*(axes[i] for i in which))


# By the name of a primitive: `rule(trace, primitive, values, params, where)` computes it for the
# `Lazy` at a position, and returns None where the sum is to be formed. `rules` fills the table.
Rule = Callable[["Thin", Any, Sequence[Any], Any, int], Any]
RULES: dict[str, Rule] = {}


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
        alone = self.known is not None and all(map(self.knows, values))
        # Of several weights the one with the most axes is followed.
        weight = max(weights, key=lambda x: len(union(x.axes, range(len(x.axes)))))
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

    def process_shard_map(self, primitive: Any, fun: Any, values: Any, /, **params: Any) -> Any:
        """A function on the parts of arrays gets the parts of the sums."""
        values = self._sums(primitive, values)
        return self.parent.process_shard_map(primitive, fun, values, **params)

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
        around = _beneath(current)
        if isinstance(around, Thin):
            with jex.set_current_trace(current):
                yield around
        else:
            inner = Thin(current, known)
            with jex.set_current_trace(inner):
                yield inner


def current() -> Thin | None:
    """The trace of the `thin()` around the caller; None outside, and within another trace."""
    with jex.take_current_trace() as trace, jex.set_current_trace(trace):
        around = _beneath(trace)
        return around if isinstance(around, Thin) else None


def _beneath(trace: Any) -> Any:
    """The trace that computes: a watch of attentions sees the products of whole weights."""
    return trace.parent if hasattr(type(trace), "watches_whole_weights") else trace


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
