"""Arrays whose axes are axes of a weight, as the factors of its changes are, and their products."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

RANK = -1  # the axis of a factor that is no axis of the weight
_DONE = -2  # new axis i is _DONE - i while others still have old numbers


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclass(frozen=True)
class Factor:
    """An array whose axes are axes of a weight.

    Attributes:
        array: the array.
        axes: for each axis of the array the axis of the weight that it is, or `RANK`.

    Example:
        >>> rows, columns = Factor(jnp.ones((5, 2)), (0, RANK)), Factor(jnp.ones(2), (RANK,))
        >>> (rows * columns).array.shape, (columns * rows).axes
        ((5, 2), (-1, 0))
    """

    array: Array
    axes: tuple[int, ...]

    def __mul__(self, other: "Factor") -> "Factor":
        """The product at each index of the axes of both, without a sum."""
        axes = (*self.axes, *(axis for axis in other.axes if axis not in self.axes))
        dtype = jnp.promote_types(self.array.dtype, other.array.dtype)
        return Factor(beside(self, axes, dtype) * beside(other, axes, dtype), axes)

    def renamed(self, new: Callable[[int], int]) -> "Factor":
        """The factor of a weight whose axes have new numbers."""
        return replace(self, axes=tuple(i if i == RANK else new(i) for i in self.axes))

    def at(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The positions of axes of the weight."""
        return tuple(map(self.axes.index, axes))

    def cast(self, dtype: Any) -> "Factor":
        """The factor in another dtype."""
        return Factor(cast(self.array, dtype), self.axes)

    def on_axes(self, change: Callable[[Array, dict[int, int]], Array]) -> "Factor":
        """The factor after a change that keeps its axes, given the position of each axis."""
        return replace(self, array=change(self.array, {a: i for i, a in enumerate(self.axes)}))


@dataclass(frozen=True)
class ByFactor:
    """A change of a weight by one factor.

    Attributes:
        by: the factor.
    """

    by: Factor

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factor."""
        return (self.by,)

    def with_factors(self, by: Factor) -> Self:
        """The change with another factor."""
        return replace(self, by=by)

    def renamed(self, new: Callable[[int], int]) -> Self:
        """The change of a weight whose axes have new numbers."""
        return replace(self, by=self.by.renamed(new))


def cast(array: Array, dtype: Any) -> Array:
    """An array in a dtype; the array itself, and no operation, where it has that dtype."""
    return array if array.dtype == dtype else array.astype(dtype)


def beside(factor: Factor, axes: Sequence[int], dtype: Any) -> Array:
    """A factor with its axes in the order of `axes`, and axes of size one for the others."""
    array, found = cast(factor.array, dtype), factor.axes
    order = [found.index(axis) for axis in axes if axis in found]
    if order != sorted(order):
        array = array.transpose(order)
    new = [i for i, axis in enumerate(axes) if axis not in found]
    return jnp.expand_dims(array, new) if new else array


def contracted(
    x: Factor, y: Factor, kept: Collection[int], precision: Any, dtype: Any = None
) -> Factor:
    """The product of two arrays, summed over all axes that are not kept, in their dtype or another.

    It is an einsum, which itself takes ten times as long to trace. The result has first the kept
    axes of both, then those of x, then those of y.

    Example:
        >>> x, y = Factor(jnp.ones((5, 2)), (0, RANK)), Factor(jnp.ones((2, 3)), (RANK, 1))
        >>> contracted(x, y, (0, 1), None).array.shape
        (5, 3)
    """
    x, y = _summed(x, (*kept, *y.axes)), _summed(y, (*kept, *x.axes))
    shared = [axis for axis in x.axes if axis in y.axes]
    batch = [axis for axis in shared if axis in kept]
    inner = [axis for axis in shared if axis not in kept]
    numbers = (x.at(inner), y.at(inner)), (x.at(batch), y.at(batch))
    array = jax.lax.dot_general(
        x.array, y.array, numbers, precision=precision, preferred_element_type=dtype
    )
    free = [axis for f in (x, y) for axis in f.axes if axis not in shared]
    return Factor(array, (*batch, *free))


def _summed(factor: Factor, kept: Collection[int]) -> Factor:
    """A factor summed over the axes that are not kept."""
    gone = tuple(i for i, axis in enumerate(factor.axes) if axis not in kept)
    if not gone:
        return factor
    return Factor(factor.array.sum(gone), tuple(axis for axis in factor.axes if axis in kept))


def reshaped(
    factor: Factor, blocks: Sequence[tuple[list[int], list[int]]], shape: Sequence[int]
) -> Factor | None:
    """A factor of the reshaped weight; None where its axes become parts of one axis."""
    array, axes = factor.array, list(factor.axes)
    for left, right in blocks:
        own = [axes.index(axis) for axis in left if axis in axes]
        if not own:
            continue
        size = math.prod(array.shape[i] for i in own)
        same = len(left) == len(right) == 1  # an axis that stays; a range has part of it
        new = [] if size == 1 and not same else right
        if not same and size not in (1, math.prod(shape[i] for i in right)):
            return None
        rest = [i for i in range(len(axes)) if i not in own]
        array = array.transpose(*own, *rest)
        sizes = [size] if same else [shape[i] for i in new]
        array = array.reshape(*sizes, *array.shape[len(own) :])
        axes = [*(_DONE - i for i in new), *(axes[i] for i in rest)]
    return Factor(array, tuple(_DONE - axis if axis <= _DONE else axis for axis in axes))
