"""Converts arrays between the layouts of PyTorch's adapters ("theirs") and ours.

Theirs have the output axis first: A `(r, in)`, B `(out, r)`, a convolution's A `(r, in, window)`
and B `(out, r, 1)`. Ours have it last: `(in, r)` and `(r, out)`, `(window, in, r)` and `(r, out)`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from adapters_jax.targets import join

Array = Shaped[np.ndarray, "..."]


class Span(NamedTuple):
    """The part of a fused axis that is ours, from `start` to `stop` of `total`, in any unit.

    An axis of several blocks has such a part in each, as where heads have their query, key and
    value side by side.
    """

    start: int
    stop: int
    total: int
    blocks: int = 1

    def of(self, array: Array, axis: int = -1) -> Array | None:
        """Our part of an array; None if the axis does not divide so.

        Example:
            >>> Span(2, 3, 3).of(np.arange(6))
            array([4, 5])
            >>> Span(2, 3, 3, blocks=2).of(np.arange(6))
            array([2, 5])
        """
        size, rest = divmod(array.shape[axis], self.blocks)
        if rest or size * self.start % self.total or size * self.stop % self.total:
            return None
        bounds = [bound * size // self.total for bound in (self.start, self.stop)]
        parts = [np.split(x, bounds, axis=axis)[1] for x in np.split(array, self.blocks, axis)]
        return np.concatenate(parts, axis) if len(parts) > 1 else parts[0]


WHOLE = Span(0, 1, 1)


def joined(parts: Sequence[Array], blocks: int = 1) -> Array:
    """Arrays side by side along the last axis, in each of its blocks; undoes `Span.of`.

    Example:
        >>> joined([np.array([0, 3]), np.array([1, 4]), np.array([2, 5])], blocks=2)
        array([0, 1, 2, 3, 4, 5])
    """
    if len(parts) == 1:
        return parts[0]
    rows = zip(*(np.split(part, blocks, -1) for part in parts), strict=True)
    return np.concatenate([block for row in rows for block in row], -1)


def spans(sizes: Sequence[int], blocks: int = 1) -> list[Span]:
    """The span of each of several parts of these sizes, in their order.

    Example:
        >>> spans([4, 2, 2])
        [Span(start=0, stop=4, total=8, blocks=1), Span(start=4, stop=6, total=8, blocks=1), ...
    """
    stops = list(accumulate(sizes))
    each = zip(sizes, stops, strict=True)
    return [Span(stop - size, stop, stops[-1], blocks) for size, stop in each]


def outputs_last(array: Array) -> Array:
    """Their weight `(out, in)` or `(out, in, window)` as ours, `(in, out)` or `(window, in, out)`.

    Example:
        >>> outputs_last(np.zeros((8, 3, 5, 5))).shape
        (5, 5, 3, 8)
    """
    return array.transpose(*range(2, array.ndim), 1, 0)


def outputs_first(array: Array) -> Array:
    """Our weight as theirs; undoes `outputs_last`."""
    n = array.ndim
    return array.transpose(n - 1, n - 2, *range(n - 2))


@dataclass(frozen=True)
class ModuleReference:
    """A module of our model, as the counterpart of a PyTorch module or of a part of one.

    Attributes:
        path: its path in our model.
        leaves: the base's arrays in it, by name; only their shapes are needed.
        part: our part of the outputs if their module fuses several of ours.
    """

    path: str
    leaves: Mapping[str, Any]
    part: Span | None = None

    @property
    def weight(self) -> str:
        """The name of its weight: `kernel`, `embedding`, `scale`."""
        return next((name for name in self.leaves if name != "bias"), "bias")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its weight."""
        return tuple(self.leaves[self.weight].shape)

    def node(self, slot: str) -> tuple[str, str]:
        """The path of the target that its weight is, and of the node with a method's leaves."""
        several = sum(name != "bias" and len(x.shape) > 1 for name, x in self.leaves.items()) > 1
        own = (self.weight,) if several else ()
        return join(self.path, *own), join(self.path, slot, *own)

    @property
    def blocks(self) -> int:
        """The number of blocks of the outputs of their module; see `Span`."""
        return self.part.blocks if self.part else 1

    @property
    def width(self) -> int:
        """The number of its outputs, which have an axis of blocks where theirs have blocks."""
        return math.prod(self.shape[-2 if self.blocks > 1 else -1 :])


@dataclass(frozen=True)
class ParameterReference:
    """A parameter that a module of ours holds itself, as the counterpart of one in PyTorch.

    Attributes:
        path: its path in our model.
        shape: its shape, `(in, out)` or `(experts, in, out)`.
        swapped: whether theirs has the last two axes the other way round.
        is_transposed: whether their module says that it is `(experts, in, out)`.
        part: our part of the outputs if their parameter fuses several of ours.
    """

    path: str
    shape: tuple[int, ...]
    swapped: bool
    is_transposed: bool
    part: Span = WHOLE

    @property
    def outputs(self) -> int:
        """The number of outputs of their whole parameter."""
        return self.shape[-1] * self.part.total // (self.part.stop - self.part.start)


def our_factors(
    reference: ModuleReference, a: Array, b: Array, magnitude: Array | None = None
) -> dict[str, Array] | None:
    """Converts their factors to our leaves of one module; returns None if they do not fit.

    Example:
        >>> reference = ModuleReference("query", {"kernel": np.zeros((6, 4))})
        >>> factors = our_factors(reference, np.ones((2, 6)), np.ones((4, 2)))
        >>> factors["a"].shape, factors["b"].shape
        ((6, 2), (2, 4))
    """
    shape, rank, part = reference.shape, len(a), reference.part or WHOLE
    own = part.of(b, axis=0)
    if b.size != math.prod(b.shape[:2]) or own is None or b.shape[1] != rank:
        return None
    a = outputs_last(a)
    b = own.reshape(len(own), rank).T
    flat = a.ndim == 2
    for n in range(1, len(shape)):
        inputs, outputs = shape[:n], shape[n:]
        same = math.prod(inputs) == len(a) if flat else inputs == a.shape[:-1]
        if same and math.prod(outputs) == b.shape[1]:
            leaves = {"a": a.reshape(*inputs, rank), "b": b.reshape(rank, *outputs)}
            if magnitude is not None:
                lengths = part.of(magnitude.ravel())
                if lengths is None or lengths.size != math.prod(outputs):
                    return None
                leaves["magnitude"] = lengths.reshape(outputs)
            return leaves
    return None


def their_factors(
    reference: ModuleReference, leaves: Mapping[str, Array], slices: Iterable[tuple[int, int]] = ()
) -> tuple[Array, Array]:
    """Converts our leaves to their A and B; outputs outside the slices get zeros.

    A kernel with more than one input axis counts as a convolution's.
    """
    a, b = leaves["a"], leaves["b"]
    if slices:
        columns = [i for start, stop in slices for i in range(start, stop)]
        part, b = b, np.zeros((len(b), reference.width), b.dtype)
        b[:, columns] = part
    outputs = b.reshape(len(b), -1).T
    return outputs_first(a), outputs.reshape(*outputs.shape, *(1,) * (a.ndim - 2))


def our_leaf(
    reference: ModuleReference, name: str, tensor: Array, fan_in_fan_out: bool
) -> Array | None:
    """Converts a tensor of theirs to our base's leaf; returns None if it does not fit."""
    shape = tuple(reference.leaves[name].shape)
    if name == "kernel" and not (fan_in_fan_out and tensor.ndim == 2):
        tensor = outputs_last(tensor) if tensor.ndim > 1 else tensor
    if reference.part and tensor.ndim:
        own = reference.part.of(tensor)
        if own is None:
            return None
        tensor = own
    if tensor.size != math.prod(shape):
        return None
    # A kernel with an axis for heads has more axes than their matrix.
    split = 0 < tensor.ndim < len(shape) and tensor.shape[0] in accumulate(shape, mul)
    return tensor.reshape(shape) if split or tensor.shape == shape else None


def their_leaf(name: str, parts: Sequence[Array], fan_in_fan_out: bool, blocks: int = 1) -> Array:
    """Converts our arrays, one for each part, to their tensor."""
    if blocks > 1:  # the last two axes of ours are blocks and features
        parts = [part.reshape(*part.shape[:-2], -1) for part in parts]
    whole = joined(parts, blocks)
    if name != "kernel" or whole.ndim < 2 or (fan_in_fan_out and whole.ndim == 2):
        return whole
    return outputs_first(whole)


def rounded(number: float) -> float:
    """Rounds to 12 digits, which hides the error of a squared root; makes whole numbers ints."""
    number = float(f"{number:.12g}")
    return int(number) if number == int(number) else number
