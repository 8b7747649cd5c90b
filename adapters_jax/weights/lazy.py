"""Inside `thin()`, operations that read a changed weight are computed without forming it.

A `Lazy` stands for a changed weight. An operation that only looks at it in another way (a
transposition, a slice, a cast, one layer of a scan) gives another `Lazy`. A product with an input
is computed as `x W + (x A) B`, a lookup takes rows of W and of A. Everything else gets the sum
`W + A B`. So whatever the model's code does with a weight, it computes what it would compute with
the merged one.

`Thin` is a trace as the ones behind `jax.grad` and `jax.vmap`; see `trace.through`. Only changed
weights are its values; all others pass through it as they are. It computes and does not ask: which
axes a read contracts is found beforehand, in a program that was traced as a whole (`trace.reads`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jaxtyping import Array

from adapters_jax.trace.reads import Read, Tracked
from adapters_jax.trace.through import Through, holding
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.quantized import is_quantized

_RECORDS: ContextVar[dict[str, Tracked] | None] = ContextVar("records", default=None)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Tracked]]:
    """Records how adapted models read their changed weights in its body, by path."""
    records: dict[str, Tracked] = {}
    with holding(_RECORDS, records):
        yield records


def lazy(trace: "Thin", changed: Changed, path: str) -> "Lazy":
    """A changed weight for the code that reads it, recorded where somebody asks."""
    records = _RECORDS.get()
    leaves = () if records is None else (records.setdefault(path, Tracked(path)),)
    return Lazy(trace, changed, leaves)


class Lazy(jax.core.Tracer):
    """A changed weight within a `Thin` trace.

    Attributes:
        changed: the weight, as the code sees it.
        leaves: record the reads, one for each weight that it is made of; none where nobody asks.
        looked_up: the code sees rows of the weight that an input chose.
    """

    __slots__ = ("changed", "leaves", "looked_up")

    def __init__(
        self,
        trace: "Thin",
        changed: Changed,
        leaves: tuple[Tracked, ...] = (),
        looked_up: bool = False,
    ):
        super().__init__(trace, jax.core.ShapedArray(changed.shape, changed.dtype))
        self.changed, self.leaves, self.looked_up = changed, leaves, looked_up

    def full_lower(self) -> Any:
        """The sum, for traces that know nothing of changed weights."""
        # jax asks for this where a value leaves its trace, as into a trace that is above this one.
        return self.formed()

    def formed(self) -> Array:
        """The sum W + A B; that of looked-up rows in their own dtype, as an activation."""
        return self.changed.formed(wide=not self.looked_up)

    def seen_as(self, changed: Changed | None, looked_up: bool = False) -> "Lazy | None":
        """This weight after an operation that looks at it in another way; None for none."""
        if changed is None:
            return None
        return Lazy(self._trace, changed, self.leaves, self.looked_up or looked_up)

    def within(self, trace: "Thin", changed: Changed | None = None) -> "Lazy":
        """This weight, or what another trace has of it, as a value of that trace."""
        return Lazy(trace, changed or self.changed, self.leaves, self.looked_up)

    def record(self, operation: str, how: str = "sum", packed: tuple[str, ...] = ()) -> None:
        """Records how an operation reads the weight, where somebody asks."""
        platforms = packed if is_quantized(self.changed.base) else None
        for leaf in self.leaves:
            leaf.reads.append(Read(operation, how, packed=platforms))


# By the name of a primitive: `rule(trace, primitive, values, params, where)` computes it for the
# `Lazy` at a position, and returns None where the sum is to be formed. `rules` fills the table.
Rule = Callable[["Thin", Any, Sequence[Any], Any, int], Any]
RULES: dict[str, Rule] = {}


class Thin(Through):
    """The trace that computes with changed weights; its other values are those of `parent`."""

    def process_primitive(self, primitive: Any, values: Any, params: Any, /) -> Any:
        """Computes an operation; see the module."""
        where = next((i for i, x in enumerate(values) if isinstance(x, Lazy)), None)
        if where is None:
            return self.parent.process_primitive(primitive, values, params)
        with jex.set_current_trace(self.parent):
            rule = RULES.get(primitive.name)
            result = rule and rule(self, primitive, values, params, where)
            if result is not None:
                return result
            for x in values:
                if isinstance(x, Lazy):
                    x.record(primitive.name, "lookup" if x.looked_up else "sum")
            return primitive.bind(*map(formed, values), **params)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, values: Any, /, **params: Any
    ) -> Any:
        """A function with its own derivative gets the sums."""
        # jax differentiates it by its own rule, which takes arrays. The changes still get their
        # gradients: those of the sum that goes in.
        values = self._sums(primitive, values)
        return self.parent.process_custom_jvp_call(primitive, fun, jvp, values, **params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, values: Any, /, **params: Any
    ) -> Any:
        """A function with its own gradient gets the sums."""
        values = self._sums(primitive, values)
        return self.parent.process_custom_vjp_call(primitive, fun, fwd, bwd, values, **params)

    def process_shard_map(self, primitive: Any, fun: Any, values: Any, /, **params: Any) -> Any:
        """A function on the parts of arrays gets the parts of the sums."""
        # How a factor is split is not what the function's specs say of the weight.
        values = self._sums(primitive, values)
        return self.parent.process_shard_map(primitive, fun, values, **params)

    def _sums(self, primitive: Any, values: Any) -> list[Any]:
        for x in values:
            if isinstance(x, Lazy):
                x.record(primitive.name)
        with jex.set_current_trace(self.parent):
            return [formed(x) for x in values]


def formed(x: Any) -> Any:
    """The sum of a changed weight; anything else as it is."""
    return x.formed() if isinstance(x, Lazy) else x


@contextlib.contextmanager
def thin() -> Iterator[Thin]:
    """Computes with changed weights in its body; nested ones do nothing more."""
    with jex.take_current_trace() as current:
        around = _beneath(current)
        if isinstance(around, Thin):
            with jex.set_current_trace(current):
                yield around
        else:
            inner = Thin(current)
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
