"""Which axes of a weight each low-rank factor has: it follows from how the model uses the weight.

Axes that are contracted with an input, or looked up, are A's; axes that the output keeps are B's;
where each use sees one index of an axis (experts, stacked layers, batch letters of an einsum), both
have the axis, so that each index has its own pair of factors. `ecd,edf->ecf` has experts e, inputs
d and outputs f: A is (e, d, r) and B is (e, r, f).
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.trace.reads import Read
from adapters_jax.weights.factors import RANK

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Axes:
    """The roles of a weight's axes, by their numbers; every axis has one role.

    Attributes:
        inputs: axes that only A has.
        outputs: axes that only B has.
        shared: axes that both have.
        window: those of the inputs that run over positions of the input, as a convolution's do.
        lookup: the inputs are looked up (an embedding), so A starts at zero and B random.

    Example:
        >>> experts = Axes(inputs=(1,), outputs=(2,), shared=(0,))
        >>> experts.a_shape((8, 16, 32), rank=4), experts.b_shape((8, 16, 32), rank=4)
        ((8, 16, 4), (8, 4, 32))
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shared: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    lookup: bool = False

    @property
    def features(self) -> tuple[int, ...]:
        """The inputs that are features of the input, not positions."""
        return tuple(i for i in self.inputs if i not in self.window)

    def under(self, layers: int) -> "Axes":
        """The roles of the axes of weights that are stacked on layer axes in front."""
        return self._moved(layers, tuple(range(layers)))

    def inside(self, layers: int) -> "Axes":
        """The roles of the axes of one of the weights that are stacked on layer axes in front."""
        return self._moved(-layers)

    def _moved(self, by: int, front: tuple[int, ...] = ()) -> "Axes":
        inputs, outputs, shared, window = (
            tuple(i + by for i in axes if i + by >= 0)
            for axes in (self.inputs, self.outputs, self.shared, self.window)
        )
        return Axes(inputs, outputs, (*front, *shared), window, self.lookup)

    @property
    def ndim(self) -> int:
        """The number of the weight's axes."""
        return len(self.inputs) + len(self.outputs) + len(self.shared)

    @property
    def a(self) -> tuple[int, ...]:
        """The axes of A; the last one is the rank."""
        return (*self.shared, *self.inputs, RANK)

    @property
    def b(self) -> tuple[int, ...]:
        """The axes of B; the rank is before the outputs."""
        return (*self.shared, RANK, *self.outputs)

    def a_shape(self, shape: Shape, rank: int) -> Shape:
        """The shape of A for a weight of a shape."""
        return tuple(rank if i == RANK else shape[i] for i in self.a)

    def b_shape(self, shape: Shape, rank: int) -> Shape:
        """The shape of B for a weight of a shape."""
        return tuple(rank if i == RANK else shape[i] for i in self.b)

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        """The fan-in, the fan-out and the number of pairs of factors."""
        inputs, outputs, shared = (
            math.prod(shape[i] for i in axes) for axes in (self.inputs, self.outputs, self.shared)
        )
        return inputs, outputs, shared

    def as_matrix(self, weight: Float[Array, "..."]) -> Float[Array, "*shared in out"]:
        """The weight as matrices, one for each index of the shared axes."""
        shape = tuple(weight.shape[i] for i in self.shared)
        ordered = weight.transpose((*self.shared, *self.inputs, *self.outputs))
        return ordered.reshape(*shape, math.prod(weight.shape[i] for i in self.inputs), -1)

    def from_matrix(
        self, matrix: Float[Array, "*shared in out"], shape: Shape
    ) -> Float[Array, "..."]:
        """The inverse of `as_matrix`."""
        order = (*self.shared, *self.inputs, *self.outputs)
        whole = matrix.reshape([shape[i] for i in order])
        return whole.transpose([order.index(i) for i in range(len(shape))])

    def norm(self, weight: Float[Array, "..."]) -> Float[Array, "..."]:
        """The norm of the weight over its inputs, in float32; (*shared, *outputs)."""
        squares = jnp.square(weight.astype(jnp.float32)).sum(axis=self.inputs)
        left = [i for i in range(weight.ndim) if i not in self.inputs]
        return jnp.sqrt(squares).transpose([left.index(i) for i in (*self.shared, *self.outputs)])

    @property
    def text(self) -> str:
        """The roles in few characters: `1>0` for inputs and outputs, `0;1>2` with shared axes."""
        parts = ("".join(map(str, axes)) for axes in (self.shared, self.inputs, self.outputs))
        shared, inputs, outputs = parts
        return f"{shared};{inputs}>{outputs}" if shared else f"{inputs}>{outputs}"


def from_reads(reads: Iterable[Read], ndim: int, layers: int = 0) -> Axes:
    """The roles of the axes of a weight, by the first of its reads that tells them.

    A lookup counts before a product, so that the tied weight of an embedding and an output layer
    is an embedding. A weight that meets no input has its last axis as output.

    Args:
        ndim: the number of the weight's axes.
        layers: how many layer axes its module is stacked on: its first ones, unless the reads show
            as many others, or no inputs but them.
    """
    front = frozenset(range(layers))
    known = [r for r in reads if r.how == "lookup"] or [r for r in reads if r.inputs]
    if not known:
        return Axes(tuple(range(layers, ndim - 1)), (ndim - 1,), tuple(sorted(front)))
    seen = frozenset[int]().union(*(r.shared for r in known)) - known[0].inputs
    front = front if len(seen) < layers and not known[0].inputs <= front else frozenset()
    shared = front | seen
    inputs = known[0].inputs - shared
    outputs = set(range(ndim)) - inputs - shared
    return Axes(
        tuple(sorted(inputs)),
        tuple(sorted(outputs)),
        tuple(sorted(shared)),
        tuple(sorted(known[0].window)),
        lookup=known[0].how == "lookup",
    )


def fitting(
    arrays: Mapping[str, Shape],
    weight: Shape,
    axes_of: Callable[[Axes], Mapping[str, Shape]],
    sliced: Collection[str] = (),
) -> Axes | None:
    """The roles of a weight's axes by the shapes of a method's arrays; None where none fit.

    Where several fit, the first in order: most shared axes first, then shared axes before inputs
    before outputs. Arrays whose roles this does not find have them in their path.

    Args:
        arrays: the shapes of the arrays by name.
        weight: the shape of the weight.
        axes_of: for each array the weight's axes that its own are, given roles; or `RANK`. What it
            leaves out fits everything.
        sliced: the arrays that may have parts of the outputs.

    Example:
        >>> shapes, factors = {"a": (768, 8), "b": (8, 12, 64)}, lambda x: {"a": x.a, "b": x.b}
        >>> fitting(shapes, (768, 12, 64), factors)
        Axes(inputs=(0,), outputs=(1, 2), shared=(), window=(), lookup=False)
    """
    every = range(len(weight))
    counts = [(n, m) for n in reversed(every) for m in range(1, len(weight) - n)]
    for both, met in counts:
        for shared in itertools.combinations(every, both):
            rest = [i for i in every if i not in shared]
            for inputs in itertools.combinations(rest, met):
                axes = Axes(inputs, tuple(i for i in rest if i not in inputs), shared)
                if _fit(arrays, weight, axes, axes_of(axes), sliced):
                    return axes
    return None


def _fit(
    arrays: Mapping[str, Shape],
    weight: Shape,
    axes: Axes,
    own: Mapping[str, Shape],
    sliced: Collection[str],
) -> bool:
    """Whether arrays have the axes of a weight that they should have, and one rank."""
    ranks = set()
    for name, numbers in own.items():
        if len(arrays[name]) != len(numbers):
            return False
        for size, i in zip(arrays[name], numbers, strict=True):
            if i == RANK:
                ranks.add(size)
            elif size != weight[i] and not (name in sliced and i in axes.outputs):
                return False
    return len(ranks) < 2


def halves(weight: Shape, front: Shape, fits: Callable[[int, int], bool]) -> Axes | None:
    """The roles of a weight's axes by the sizes of both sides: shared axes, inputs, outputs.

    Args:
        weight: the shape of the weight.
        front: the sizes of the shared axes.
        fits: whether a fan-in and a fan-out are right.

    Example:
        >>> halves((5, 8, 2, 3), (5,), lambda fan_in, fan_out: fan_in == 16)
        Axes(inputs=(1, 2), outputs=(3,), shared=(0,), window=(), lookup=False)
    """
    n, every = len(front), tuple(range(len(weight)))
    for end in every[n + 1 :] if weight[:n] == front else ():
        if fits(math.prod(weight[n:end]), math.prod(weight[end:])):
            return Axes(every[n:end], every[end:], every[:n])
    return None


def from_text(text: str) -> Axes:
    """The roles that `Axes.text` is of."""
    shared, _, rest = text.rpartition(";")
    inputs, _, outputs = rest.partition(">")
    return Axes(tuple(map(int, inputs)), tuple(map(int, outputs)), tuple(map(int, shared)))


def last_axes(shape: Shape, weight: Shape, before: bool) -> tuple[int, ...] | None:
    """The axes of a weight along which an array of a shape scales it; None where it does not fit.

    Args:
        shape: the array's; its shared axes first.
        before: whether the axes are before the last one: a weight's inputs, not its outputs.
    """
    for layers in reversed(range(len(shape))):
        own = len(shape) - layers
        ends = [len(weight)] if not before else range(len(weight) - 1, layers + own - 1, -1)
        for end in ends:
            axes = (*range(layers), *range(end - own, end))
            if end - own >= layers and tuple(weight[i] for i in axes) == shape:
                return axes
    return None
