"""A changed weight, `W' = scale * (W + A B)`, which is not computed until something reads it.

Everything here is arithmetic on arrays: what the change is (`LowRank`, `Scale`), how it looks after
the weight was transposed, sliced or cast (`Changed`), and its sum in the weight's own shape. How a
model's operations meet a changed weight is in `lazy`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.trace.primitives import blocks_of
from adapters_jax.trace.through import holding
from adapters_jax.weights.factors import (
    RANK,
    ByFactor,
    Factor,
    beside,
    cast,
    contracted,
    reshaped,
)
from adapters_jax.weights.gates import Gate
from adapters_jax.weights.observed import Observed
from adapters_jax.weights.packed import View, cut_scales, rows_of, split_scales
from adapters_jax.weights.quantized import is_quantized, once


@dataclass(frozen=True)
class LowRank:
    """Adds a product of two factors to a weight, or to a range of one of its axes.

    Attributes:
        a: one factor.
        b: the other.
        start: `(axis, index)` of the first entry of the range; None for the whole weight.
        dropout: probability of zeroing an entry of the input of the product, while training.
        key: the key of the dropout, or one for each index of the weight's first axis; None in
            evaluation.
        scale: multiplies the product.
        gate: the inputs that it is for; None for all.

    Example:
        >>> a, b = Factor(jnp.ones((4, 2)), (0, RANK)), Factor(jnp.ones((2, 3)), (RANK, 1))
        >>> LowRank(a, b, scale=0.5).applied(jnp.zeros((4, 3)))[0]
        Array([1., 1., 1.], dtype=float32)
    """

    a: Factor
    b: Factor
    start: tuple[int, int] | None = None
    dropout: float = 0.0
    key: Any = None
    scale: float = 1.0
    gate: Gate | None = None

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Both factors."""
        return self.a, self.b

    @property
    def scaled(self) -> tuple[Factor, Factor]:
        """Both factors, the second times the scale."""
        return self.a, Factor(self.b.array * self.scale, self.b.axes)

    def with_factors(self, a: Factor, b: Factor) -> "LowRank":
        """The change with other factors."""
        return replace(self, a=a, b=b)

    def renamed(self, new: Callable[[int], int]) -> "LowRank":
        """The change of a weight whose axes have new numbers."""
        start = self.start and (new(self.start[0]), self.start[1])
        return replace(self, a=self.a.renamed(new), b=self.b.renamed(new), start=start)

    def product(self, ndim: int, dtype: Any = jnp.float32) -> Array:
        """The scaled A B in the axes of the weight; axes that neither has are of size one."""
        a, b = (f.cast(dtype) for f in self.scaled)
        return beside(contracted(a, b, range(ndim), "highest"), range(ndim), dtype)

    def applied(self, weight: Array) -> Array:
        """The changed weight; raises RecipeError for a change of some inputs alone."""
        if self.gate is not None:
            raise self.gate.refused("other than in a product with its input")
        change = self.product(weight.ndim, weight.dtype)
        if self.start is not None:
            axis = self.start[0]
            change = self.placed(change, weight.shape[axis], axis)
        return weight + change

    def placed(self, part: Array, size: int, axis: int) -> Array:
        """A part that is for the range alone, with zeros around it.

        Args:
            part: the part.
            size: how many entries the whole has along the axis.
            axis: the axis of the part that has the range.
        """
        if self.start is None:
            return part
        edges = [(0, 0, 0)] * part.ndim
        edges[axis] = (self.start[1], size - self.start[1] - part.shape[axis], 0)
        return jax.lax.pad(part, jnp.zeros((), part.dtype), edges)


@dataclass(frozen=True)
class Scale(ByFactor):
    """Multiplies a weight by a factor along some of its axes.

    Attributes:
        by: the factor.

    Example:
        >>> Scale(Factor(jnp.asarray([1.0, 2.0]), (1,))).applied(jnp.ones((1, 2)))
        Array([[1., 2.]], dtype=float32)
    """

    def applied(self, weight: Array) -> Array:
        """The changed weight."""
        return weight * beside(self.by, range(weight.ndim), weight.dtype)


@dataclass(frozen=True)
class Added:
    """Adds an array to a weight, so that whatever reads it forms the sum.

    The array may be what a function makes of several: it is made where the weight is read, and a
    loop over stacked layers makes that of one layer at a time.

    Attributes:
        arrays: the array, which may lack axes of the weight. Or what `make` gets: their first axes
            are those of stacked layers and experts, the same for each; the others are `RANK`.
        make: the function, of the arrays of one layer and expert. It returns the entries in order.
        axes: the weight's axes that its result has, in order.

    Example:
        >>> halves = tuple(Factor(jnp.ones((2, 2)), (RANK, RANK)) for _ in range(2))
        >>> Added(halves, jnp.kron, (0, 1)).applied(jnp.zeros((4, 4)))[0]
        Array([1., 1., 1., 1.], dtype=float32)
    """

    arrays: tuple[Factor, ...]
    make: Callable[..., Array] | None = None
    axes: tuple[int, ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The arrays."""
        return self.arrays

    def with_factors(self, *arrays: Factor) -> "Added":
        """The change with other arrays."""
        return replace(self, arrays=arrays)

    def renamed(self, new: Callable[[int], int]) -> "Added":
        """The change of a weight whose axes have new numbers."""
        arrays = tuple(each.renamed(new) for each in self.arrays)
        return replace(self, arrays=arrays, axes=tuple(map(new, self.axes)))

    def made(self, shape: Sequence[int]) -> "Added":
        """The change of a weight of this shape with one array."""
        if self.make is None:
            return self
        shared, make = [i for i in self.arrays[0].axes if i != RANK], self.make
        for _ in shared:
            make = jax.vmap(make)
        axes = (*shared, *self.axes)
        array = make(*(each.array for each in self.arrays)).reshape([shape[i] for i in axes])
        return Added((Factor(array, axes),))

    def applied(self, weight: Array) -> Array:
        """The changed weight."""
        (whole,) = self.made(weight.shape).arrays
        return weight + beside(whole, range(weight.ndim), weight.dtype)


@dataclass(frozen=True)
class Rotation(ByFactor):
    """Multiplies a weight's inputs by a matrix in blocks: it is `R W`, and `(x R) W` of an input.

    Attributes:
        by: the blocks, (blocks, k, k), or (1, k, k) if all are one, behind axes of stacked layers
            and experts; the last three axes are `RANK`.
        inputs: the weight's axes that are its inputs, of blocks k entries in all.

    Example:
        >>> swap = Factor(jnp.asarray([[[0.0, 1.0], [1.0, 0.0]]]), (RANK, RANK, RANK))
        >>> Rotation(swap, (0,)).applied(jnp.asarray([[1.0], [2.0]])).tolist()
        [[2.0], [1.0]]
    """

    inputs: tuple[int, ...]

    def renamed(self, new: Callable[[int], int]) -> "Rotation":
        """The change of a weight whose axes have new numbers."""
        return Rotation(self.by.renamed(new), tuple(map(new, self.inputs)))

    def rotated(self, x: Array, axes: Sequence[int], inverse: bool = False) -> Array:
        """An array with `x R` in place of its inputs, or with `R x`.

        Args:
            x: the array.
            axes: for each of its axes the weight's, or another number.
            inverse: the latter.
        """
        shared = [axis for axis in self.by.axes if axis != RANK]
        others = [axis for axis in axes if axis not in (*shared, *self.inputs)]
        order = [axes.index(axis) for axis in (*shared, *others, *self.inputs)]
        by = cast(self.by.array, x.dtype)
        *stacked, blocks, size, _ = by.shape
        moved = x.transpose(order)
        # A row of inputs for each block.
        split = moved.reshape(*moved.shape[: len(order) - len(self.inputs)], -1, 1, size)
        by = by.reshape(*stacked, *(1,) * len(others), blocks, size, size)
        made = jnp.matmul(split, by.mT if inverse else by, precision="highest")
        return made.reshape(moved.shape).transpose([order.index(i) for i in range(x.ndim)])

    def applied(self, weight: Array) -> Array:
        """The changed weight."""
        return self.rotated(weight, range(weight.ndim), inverse=True)


Change = LowRank | Scale | Added | Rotation | Observed


def _uncut(change: Change) -> tuple[int, ...]:
    """The axes along which no part of a change is one: that of its range, the inputs it mixes."""
    if isinstance(change, Rotation):
        return change.inputs
    return change.start[:1] if isinstance(change, LowRank) and change.start else ()


_EVALUATION = ContextVar("evaluation", default=False)


def without_dropout(evaluation: bool = True) -> AbstractContextManager[None]:
    """Reads of changed weights in its body are without dropout, where `evaluation` is true."""
    return holding(_EVALUATION, evaluation)


def dropout(x: Float[Array, "..."], rate: float, key: Any) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and scales the rest; x itself where `key` is None."""
    if key is None or rate == 0.0 or _EVALUATION.get():
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


@dataclass(frozen=True)
class Changed:
    """A weight as some code sees it, with its changes; equal to `formed()`.

    Attributes:
        base: the weight, an array or `Quantized`, in its stored dtype.
        shape: the shape that the code sees.
        dtype: the dtype that the code sees.
        views: what the code did to a quantised weight, which is in floats only where it is used.
    """

    base: Any
    changes: tuple[Change, ...]
    shape: tuple[int, ...]
    dtype: Any
    views: tuple[View, ...] = field(default=())

    @classmethod
    def of(cls, base: Any, changes: Sequence[Change] = ()) -> "Changed":
        """A weight with its changes."""
        return cls(base, tuple(changes), tuple(base.shape), jnp.dtype(base.dtype))

    def floats(self, base: Any) -> Array:
        """The unchanged weight in floats as the code sees it, from the value of `base`."""
        array = base.unbox() if is_quantized(base) else base
        for view in self.views:
            array = view.of(array)
        return cast(array, self.dtype)

    def formed(self, wide: bool = True) -> Float[Array, "..."]:
        """The changed weight: sums and products in float32 and cast once, or in its own dtype."""
        if not self.changes:
            return self.floats(self.base)
        # As merging sums, so that a read that forms the weight gives what the merged model gives.
        dtype = jnp.promote_types(self.base.dtype, jnp.float32) if wide else self.dtype
        whole = replace(self, dtype=dtype).floats(self.base)
        for change in self.changes:
            whole = change.applied(whole)
        return whole.astype(self.dtype)

    @property
    def made(self) -> "Changed":
        """The weight with arrays in place of functions that make them."""
        # A part of a weight has a part of an array, but not of what makes it.
        changes = (c.made(self.shape) if isinstance(c, Added) else c for c in self.changes)
        return replace(self, changes=tuple(changes))

    def settled(self) -> "Changed":
        """The weight without the keys of dropout that does not act in an evaluation."""
        # jax finds a jitted function again by its arguments, and the context is not one of them.
        if not _EVALUATION.get():
            return self
        changes = (replace(c, key=None) if isinstance(c, LowRank) else c for c in self.changes)
        return replace(self, changes=tuple(changes))

    def cast(self, dtype: Any) -> "Changed":
        """The weight in another float dtype."""
        return replace(self, dtype=jnp.dtype(dtype))

    def viewed(
        self,
        view: Callable[[Array], Array],
        changes: Sequence[Change] | None = None,
        scales: Callable[[Array], Array | None] | None = None,
    ) -> "Changed":
        """The weight after an operation such as a transposition.

        Args:
            view: the operation on the unchanged weight.
            changes: the changes after it; by default those of now.
            scales: the operation on the scales of a packed weight; by default, none is known.
        """
        changed = self.changes if changes is None else tuple(changes)
        # A packed weight stays packed: it is opened where it is used, and nowhere earlier.
        if not is_quantized(self.base):
            base = view(self.base)
            return Changed(base, changed, tuple(base.shape), self.dtype)
        shape = jax.eval_shape(view, jax.ShapeDtypeStruct(self.shape, self.dtype)).shape
        views = (*self.views, View(view, scales or (lambda scales: None)))
        return Changed(self.base, changed, tuple(shape), self.dtype, views)

    def transposed(self, order: Sequence[int]) -> "Changed":
        """The transposed weight."""
        new = {old: i for i, old in enumerate(order)}
        changes = [change.renamed(new.__getitem__) for change in self.changes]
        return self.viewed(turn := lambda w: w.transpose(order), changes, turn)

    def reshaped(self, shape: Sequence[int]) -> "Changed | None":
        """The reshaped weight; None where axes of both factors would become one axis."""
        blocks = blocks_of(self.shape, shape)
        changes = [_reshaped(change, blocks, shape) for change in self.made.changes]
        if any(change is None for change in changes):
            return None
        kept = [change for change in changes if change is not None]
        scales = functools.partial(split_scales, blocks, self.shape, shape)
        return self.viewed(lambda w: w.reshape(shape), kept, scales)

    def broadcast(self, shape: Sequence[int], where: Sequence[int]) -> "Changed":
        """The weight with new axes.

        Args:
            shape: the shape with the new axes.
            where: for each axis of the weight its position in `shape`.
        """
        changes = [change.renamed(where.__getitem__) for change in self.made.changes]

        def scales(scales: Array) -> Array:
            sizes = dict(zip(where, scales.shape, strict=True))
            return scales.reshape([sizes.get(i, 1) for i in range(len(shape))])

        return self.viewed(lambda w: jax.lax.broadcast_in_dim(w, shape, where), changes, scales)

    def scaled(self, number: Any) -> "Changed":
        """The weight times a number."""
        return replace(self, changes=(*self.changes, Scale(Factor(jnp.asarray(number), ()))))

    def sliced(
        self, cut: Callable[[Array, dict[int, int]], Array], axes: Sequence[int]
    ) -> "Changed | None":
        """A part of the weight.

        Args:
            cut: cuts an array, given where it has each axis of the weight.
        """
        changes = self.made.changes
        if any(axis in _uncut(change) for change in changes for axis in axes):
            return None
        parts = [c.with_factors(*(f.on_axes(cut) for f in c.factors)) for c in changes]
        own = {i: i for i in range(len(self.shape))}
        scales = cut_scales(cut, axes, self.shape)
        return self.viewed(lambda w: cut(w, own), parts, scales)

    def taken(
        self,
        take: Callable[[Array, dict[int, int]], Array],
        axis: int,
        rows: Sequence[int],
        others: Mapping[int, int],
    ) -> "Changed | None":
        """Rows of the weight along an axis.

        Args:
            take: takes the rows of an array, given where it has each axis of the weight, and puts
                the axes of the rows in front; an array that lacks the axis stays as it is.
            rows: the axes that the rows have in the result.
            others: the axes of the result by those of the weight.
        """

        def one(factor: Factor) -> Factor:
            kept = tuple(i if i == RANK else others[i] for i in factor.axes if i != axis)
            front = rows if axis in factor.axes else ()
            return Factor(factor.on_axes(take).array, (*front, *kept))

        changes = []
        for change in self.made.changes:
            if axis in _uncut(change):
                return None
            if isinstance(change, LowRank) and change.start:
                change = replace(change, start=(others[change.start[0]], change.start[1]))
            if isinstance(change, Rotation):
                change = replace(change, inputs=tuple(others[i] for i in change.inputs))
            changes.append(change.with_factors(*map(one, change.factors)))

        def view(weight: Array) -> Array:
            whole = one(Factor(weight, tuple(range(weight.ndim))))
            order = sorted(range(len(whole.axes)), key=whole.axes.__getitem__)
            return whole.array.transpose(order)

        if is_quantized(self.base):
            read = rows_of(self.base, self.views, (axis, self.shape[axis]), view)
            if read is None:
                read = once(lambda weight, _: view(self.floats(weight)), self.base, ())
            read = cast(read, self.dtype)
            return Changed(read, tuple(changes), tuple(read.shape), self.dtype)
        return self.viewed(view, changes)

    def layers(self, length: int) -> "Layers":
        """The weight as a stack of layers on its first axis."""
        to_front = lambda array, position: jnp.moveaxis(array, position[0], 0)  # noqa: E731
        along = any(isinstance(change, Added) and 0 in change.axes for change in self.changes)
        whole = self.made if along else self
        if any(0 in _uncut(change) for change in self.changes):
            whole = Changed.of(self.formed())
        elif self.views:
            whole = replace(whole, base=self.floats(self.base), views=())
        rows, rest = [], []
        for change in whole.changes:
            front = [f.on_axes(to_front) if 0 in f.axes else f for f in change.factors]
            rows.append([f.array if 0 in f.axes else None for f in front])
            key = change.key if isinstance(change, LowRank) else None
            rows[-1].append(None if key is None else jax.random.split(key, length))
            rest.append(change.with_factors(*front))
        return Layers((whole.base, rows), whole, tuple(rest))


@dataclass(frozen=True)
class Layers:
    """A changed weight as a stack of layers.

    Attributes:
        rows: the arrays that have an entry for each layer, on their first axis.
        whole: the weight.
        changes: its changes, whose factors have the layers first.
    """

    rows: Any
    whole: Changed
    changes: tuple[Change, ...]

    def layer(self, row: Any) -> Changed:
        """The weight of one layer, given its arrays, one entry of `rows`."""
        base, arrays = row
        changes = []
        for change, (*own, key) in zip(self.changes, arrays, strict=True):
            factors = [
                factor if array is None else Factor(array, tuple(i for i in factor.axes if i != 0))
                for factor, array in zip(change.factors, own, strict=True)
            ]
            change = change.with_factors(*factors).renamed(lambda axis: axis - 1)
            changes.append(replace(change, key=key) if isinstance(change, LowRank) else change)
        return Changed(base, tuple(changes), self.whole.shape[1:], self.whole.dtype)


for _cls, _data in (
    (LowRank, ["a", "b", "key", "gate"]),
    (Scale, ["by"]),
    (Added, ["arrays"]),
    (Rotation, ["by"]),
    (Changed, ["base", "changes"]),
):
    _static = [f.name for f in fields(_cls) if f.name not in _data]
    jax.tree_util.register_dataclass(_cls, data_fields=_data, meta_fields=_static)


def _reshaped(
    change: Change, blocks: Sequence[tuple[list[int], list[int]]], shape: Sequence[int]
) -> Change | None:
    """A change of the reshaped weight; None where low rank or the range does not survive."""
    factors = [reshaped(factor, blocks, shape) for factor in change.factors]
    kept = [factor for factor in factors if factor is not None]
    if len(kept) < len(factors):
        return None
    if isinstance(change, LowRank) and change.start:
        left, right = next(block for block in blocks if change.start[0] in block[0])
        if len(left) > 1 or len(right) > 1:
            return None
        change = replace(change, start=(right[0], change.start[1]))
    if isinstance(change, Rotation):
        own = [block for block in blocks if not {*block[0]}.isdisjoint(change.inputs)]
        if any(len(left) > 1 or len(right) > 1 for left, right in own):
            return None
        new = {left[0]: right[0] for left, right in own}
        change = replace(change, inputs=tuple(new[i] for i in change.inputs))
    return change.with_factors(*kept)
