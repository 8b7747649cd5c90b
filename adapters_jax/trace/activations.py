"""What is known of activations between the projections and the second product of an attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.trace.parts import Axis, Part

Step = Callable[[Array], Array]  # what is done to every number alike


@dataclass(frozen=True, eq=False)
class Projection:
    """A product of an activation with a weight, `x W`.

    Attributes:
        width: the size of the axis of x that is summed.
        columns: how many sums there are.
        project: `project(x)` for x (rows, width) is (rows, columns).
        source: x, where the projection is computed, and not only read.
    """

    width: int
    columns: int
    project: Step
    source: Any = None


@dataclass(frozen=True)
class Columns:
    """The columns of a projection in an activation.

    Attributes:
        projection: the projection.
        low, high: the smallest and the largest offset at which its parts begin.
        moved: how far a column is at most from its place among those that it was joined with.
        bias: (columns,), what was added to each column; None for nothing.
        steps: what was done to every number alike since.
        lost: why the numbers are others than the projection's; empty if they are not. Scales by
            position and the rotation of pairs, as norms and rotary embeddings have, do not count.
    """

    projection: Projection
    low: int = 0
    high: int = 0
    moved: int = 0
    bias: Any = None
    steps: tuple[Step, ...] = ()
    lost: str = ""

    def project(self, x: Array) -> Array:
        """What the projection gives of x (rows, width), with what comes after: (rows, columns)."""
        y = self.projection.project(x)
        y = y if self.bias is None else y + self.bias.astype(y.dtype)
        for step in self.steps:
            y = step(y)
        return y


def together(several: Sequence[Any]) -> Columns:
    """The columns of numbers that are computed from several ones."""
    first, steps = several[0], several[0].steps
    for other in several[1:]:
        same = [a is b for a, b in zip(steps, other.steps, strict=False)]
        steps = steps[: [*same, False].index(False)]
    lost = next((columns.lost for columns in several if columns.lost), "")
    if any(step is not jnp.negative for c in several for step in c.steps[len(steps) :]):
        lost = "are computed from one another"  # not by the signs of a rotation
    if any(columns.projection is not first.projection for columns in several):
        lost = "are computed from several projections"
    if any(columns.bias is not first.bias for columns in several):
        lost = "have a bias in parts"
    low, high = min(c.low for c in several), max(c.high for c in several)
    moved = max(columns.moved for columns in several)
    return Columns(first.projection, low, high, moved, first.bias, steps, lost)


@dataclass(frozen=True, eq=False)
class Scores:
    """The first product.

    Attributes:
        operands: what it reads.
        axes: for each axis of the scores the axes of both operands; None where one has none.
        summed: the axis of each operand that is summed.
        shape: the shape of the scores.
    """

    operands: tuple["Seen", "Seen"]
    axes: tuple[tuple[int | None, int | None], ...]
    summed: tuple[int, int]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Softmax:
    """An activation on the way from the first product to the second.

    Attributes:
        scores: the first product.
        steps: what was done to every score alike before the softmax.
        stage: "logits", "exponentials" or "weights".
        logits: the activation, with masks, whose exponentials are taken.
        statistic: whether the numbers are maxima or sums over others.
        over: the parts of the axes over which the statistic was taken, or the one divided by.
        lost: why it is not known what was done to the scores; empty if it is.
    """

    scores: Scores
    steps: tuple[Step, ...] = ()
    stage: str = "logits"
    logits: "Seen | None" = None
    statistic: bool = False
    over: frozenset[Part] = frozenset()
    lost: str = ""


@dataclass(frozen=True)
class Seen:
    """An activation.

    Attributes:
        value: its numbers; None where only the shape is known.
        axes: the parts of its axes.
        columns: set where it has the columns of a projection.
        softmax: set between the products of an attention.
        made: the products of two activations that it is made of, whatever was done to them, each
            with whether an exponential came after.
    """

    value: Any
    axes: tuple[Axis, ...]
    columns: Columns | None = None
    softmax: Softmax | None = None
    made: Mapping[Scores, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """One operation, some of whose inputs are activations.

    Attributes:
        primitive: the primitive; None for an operation of `Graph` alone.
        values: its inputs; of those that are read and not computed, the shape and dtype.
        known: what is known of them; None for what is no activation.
        watch: the trace that sees it; None for one of a graph.
    """

    name: str
    primitive: Any
    values: Sequence[Any]
    known: Sequence[Seen | None]
    params: Any
    shapes: Sequence[tuple[int, ...]]
    watch: Any = None

    def repeats(self, x: Any) -> frozenset[int]:
        """The axes along which a value that is no activation repeats itself."""
        return self.watch.repeats(x) if self.watch else frozenset()


Result = list[Seen] | None  # what is known of the results of an operation; None for nothing
Rule = Callable[[Operation], Result]
