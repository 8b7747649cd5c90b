"""Products that read a packed weight as it is: its numbers meet the input, its scales the result.

`x (Q s)` is `(x Q) s` where each column of Q has a scale, and the input's gradient is `(g s) Q^T`.
Where blocks of the inputs have scales, it is a sum over the blocks of such products. Compilers
convert small integers on their way into a product; a weight that is scaled first is written in
floats, by a GPU's compiler always, by a TPU's where blocks have scales. One TPU has a kernel for
blocks along the first or the last axes of a weight (`weights.kernel`).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.weights import kernel
from adapters_jax.weights.alone import where_alone
from adapters_jax.weights.factors import Factor, beside, cast, contracted
from adapters_jax.weights.quantized import Quantized, bits_of, numbers_of, waiting

_BLOCK = 1000  # axis i of a weight has the number i, and that of its blocks _BLOCK + i
# A product by blocks needs blocks of at least NARROWEST numbers, since shorter ones leave a matrix
# unit idle, and more than OUTPUTS outputs a row of the input, as heads have: a TPU's compiler
# transposes the input and its gradient for it, which moves more bytes than a narrower weight has.
NARROWEST, OUTPUTS = 16, 16


class View(NamedTuple):
    """What some code did to a packed weight.

    Attributes:
        of: the operation on an array of the weight's shape.
        scales: the operation on the scales, which have the axes of the weight, each with an entry
            for each block along it; None where the result has no scales of this form.
    """

    of: Callable[[Array], Array]
    scales: Callable[[Array], Array | None]


@dataclass(frozen=True)
class Packed:
    """A product of an input and a packed weight, by `dot_general`.

    Attributes:
        views: what the code did to the weight.
        dtype: the dtype that the code sees.
        shape: the shape that the code sees.
        meeting: how the input meets the weight.
        split: the contracted axes with scales for their blocks, and the number of the blocks.
        first: the scales are of contracted axes alone, and meet the input.
        wide: a product by blocks moves less than the weight in floats.
        tiled: one TPU has a kernel for it.
    """

    views: tuple[View, ...]
    dtype: Any
    shape: tuple[int, ...]
    meeting: Any
    split: Mapping[int, int]
    first: bool
    wide: bool = False
    tiled: bool = False

    @classmethod
    def of(cls, weight: Quantized, views: Any, seen: Any, x: Any, meeting: Any) -> "Packed | None":
        """The product; None where it has to be one with the weight in floats.

        Args:
            seen: the shape and dtype that the code sees.
            x: the input's.
        """
        plain = meeting.primitive.name == "dot_general" and weight.array.zero_point is None
        wanted = jnp.issubdtype(seen.dtype, jnp.floating) and seen.dtype.itemsize > 1
        sharded = dict(meeting.params).get("out_sharding") is not None
        _, scales = jax.eval_shape(lambda array: _viewed(array, views), weight.array)
        if not plain or not wanted or sharded or scales is None:
            return None
        counts = dict(enumerate(scales.shape))
        inner = {i: counts.pop(i) for i in meeting.inner}
        if all(counts[i] == 1 for i in counts if i not in meeting.batch):
            return cls(views, seen.dtype, seen.shape, meeting, {}, True)
        split = {i: n for i, n in inner.items() if n > 1}
        length = math.prod(seen.shape[i] // inner[i] for i in inner)
        outputs = math.prod(seen.shape[i] for i in counts if i not in meeting.batch)
        own = {*meeting.inner, *meeting.batch}
        rows = math.prod(x.shape[i] for i, axis in enumerate(meeting.seen) if axis not in own)
        short = length < NARROWEST or outputs <= OUTPUTS * rows
        # A TPU's compiler writes the numbers of nf4 before a product, so they had better be scaled.
        wide = not short and weight.array.qtype != "nf4"
        tiled = bool(split) and cls._is_tiled(weight, scales.shape, seen, x, meeting, rows)
        if split and not (wide or tiled):
            return None
        return cls(views, seen.dtype, seen.shape, meeting, split, False, wide, tiled)

    @staticmethod
    def _is_tiled(
        weight: Quantized, scales: Sequence[int], seen: Any, x: Any, meeting: Any, rows: int
    ) -> bool:
        """Whether the kernel computes the product and its gradient.

        Args:
            scales: the shape of the scales.
            rows: of the input.
        """
        inner, shape = sorted(meeting.inner), seen.shape
        precision = dict(meeting.params)["precision"]
        numbers = [shape[i] // scales[i] for i in inner]
        # All along one axis: whole in those after it, and single numbers in those before.
        start = next((i for i, n in enumerate(numbers) if n > 1), len(inner))
        one = all(scales[i] == 1 for i in inner[start + 1 :])
        ends = inner in ([*range(len(inner))], [*range(len(shape) - len(inner), len(shape))])
        usual = precision in (None, jax.lax.Precision.DEFAULT, (jax.lax.Precision.DEFAULT,) * 2)
        known = x.dtype == seen.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
        # An axis of a mesh in their types would have to be in that of the product.
        split = any(any(jax.typeof(a).sharding.spec) for a in (x, weight.array.qvalue))
        if meeting.batch or not (one and ends and usual and known and rows and math.prod(shape)):
            return False
        along, flat = _flat(shape, inner)
        bits = bits_of(x.dtype), bits_of(weight.array.qvalue.dtype)
        tile = functools.partial(kernel.tile_of, rows, flat, math.prod(numbers), along, bits=bits)
        return not split and all(tile(contracted) for contracted in (0, 1))

    def forward_by(self, floats: Callable[..., Array]) -> Callable[..., Array]:
        """The product on `platforms`, given how it is that of the weight in floats."""
        several = floats if self.split and not self.wide else self.forward
        form = functools.partial(where_alone, self._in_tiles, several)
        return form if self.tiled else several

    def backward_by(self, floats: Callable[..., Array]) -> Callable[..., Array]:
        """The gradient of the input on `platforms`, given how it is that of floats."""
        several = floats if self.split and not self.wide else self.backward
        form = functools.partial(where_alone, self._turned_in_tiles, several)
        return form if self.tiled else several

    def _in_tiles(self, weight: Quantized, x: Array) -> Array:
        """The product by the kernel."""
        m, out = self.meeting, self._out(x)
        return beside(self._by_kernel(weight, Factor(x, m.seen), m.inner, out), m.out, out)

    def _turned_in_tiles(self, weight: Quantized, x: Array, gradient: Array) -> Array:
        """The gradient of the input by the kernel."""
        m = self.meeting
        gone = [i for i in range(len(self.shape)) if i not in m.inner]
        return beside(
            self._by_kernel(weight, Factor(gradient, m.out), gone, x.dtype), m.seen, x.dtype
        )

    def _by_kernel(self, weight: Quantized, x: Factor, inner: Sequence[int], dtype: Any) -> Factor:
        """The product of an array and the weight, flattened to a matrix, over the axes `inner`."""
        array = waiting(weight, x.array).array
        values, scales = _viewed(array, self.views)
        along, flat = _flat(self.shape, self.meeting.inner)
        gone = sorted(inner)
        new = [i for i in range(values.ndim) if i not in gone]
        for i in gone + new:
            if i not in self.meeting.inner:
                scales = jnp.repeat(scales, self.shape[i] // scales.shape[i], i)
        free = [i for i in x.axes if i not in gone]
        rows = beside(x, (*free, *gone), x.array.dtype)
        contracted = 0 if gone[0] == 0 else 1
        y = kernel.product(
            rows.reshape(-1, flat[contracted]),
            values.reshape(flat),
            scales.reshape(flat[0], -1).T if along else scales.reshape(-1, flat[1]),
            along,
            contracted,
            array.qtype,
            dtype,
        )
        sizes = [*rows.shape[: len(free)], *(self.shape[i] for i in new)]
        return Factor(y.reshape(sizes), (*free, *new))

    def _out(self, x: Array) -> Any:
        """The dtype of the product."""
        return self._params["preferred_element_type"] or jnp.result_type(x.dtype, self.dtype)

    def forward(self, weight: Quantized, x: Array) -> Array:
        """The product."""
        out, meeting = self._out(x), self.meeting
        wide = jnp.promote_types(out, jnp.float32)
        values, scales = self._read(weight, x)
        if self.first:
            x = cast(x * beside(scales, meeting.seen, wide), x.dtype)
        pair = (self._split(Factor(x, meeting.seen)), values)
        dtype = wide if self.split else out
        y = self._product(pair if meeting.where else pair[::-1], meeting.out, dtype)
        if self.first:
            return beside(y, meeting.out, out)
        array = y.array * beside(scales, y.axes, wide)
        array = cast(array.sum([y.axes.index(axis) for axis in self._blocks]), out)
        if self.split:  # XLA would keep the sum in the dtype that it is computed in
            array = jax.lax.optimization_barrier(array)
        kept = tuple(axis for axis in y.axes if axis not in self._blocks)
        return beside(Factor(array, kept), meeting.out, out)

    def backward(self, weight: Quantized, x: Array, gradient: Array) -> Array:
        """The gradient of the input, from that of the product; no value of the input is read."""
        wide, meeting = jnp.promote_types(gradient.dtype, jnp.float32), self.meeting
        values, scales = self._read(weight, gradient)
        g = Factor(gradient, meeting.out)
        if not self.first:
            kept = [i for i in meeting.out if i not in (*meeting.seen, *meeting.batch)]
            rest = [i for i in meeting.out if i not in kept]
            axes = (*rest, *self._blocks, *kept)
            # XLA would write a gradient in float32 that is scaled once for each block.
            kind = gradient.dtype if self._blocks else wide
            scaled = beside(g, axes, kind) * beside(scales, axes, kind)
            g = Factor(cast(scaled, gradient.dtype), axes)
        order = self._split(Factor(x, meeting.seen)).axes
        # In this order XLA reads the gradient once for all blocks.
        found = self._product((values, g), order, x.dtype)
        array = beside(found, order, x.dtype).reshape(x.shape)
        return cast(array * beside(scales, meeting.seen, wide), x.dtype) if self.first else array

    @property
    def platforms(self) -> tuple[str, ...]:
        """Those whose compiler does worse with the weight in floats, by what it moves."""
        # A TPU's compiler scales whole columns on their way into a product. A GPU's writes what it
        # has scaled, and of blocks it would write every product.
        return ("tpu",) if self.split else ("cuda",)

    @property
    def _params(self) -> dict[str, Any]:
        return dict(self.meeting.params)

    @property
    def _blocks(self) -> tuple[int, ...]:
        """The axes of the blocks."""
        return tuple(_BLOCK + i for i in self.split)

    def _split(self, factor: Factor) -> Factor:
        """An array whose axes are split into blocks."""
        axes, sizes = list[int](), list[int]()
        for axis, size in zip(factor.axes, factor.array.shape, strict=True):
            n = self.split.get(axis, 0)
            axes += [_BLOCK + axis, axis] if n else [axis]
            sizes += [n, size // n] if n else [size]
        return Factor(factor.array.reshape(sizes), tuple(axes))

    def _product(self, pair: Sequence[Factor], kept: Sequence[int], wide: Any) -> Factor:
        """What the numbers and an array give, of each block, in the dtype `wide`."""
        first, second = pair
        precision = self._params["precision"]
        return contracted(first, second, (*self._blocks, *kept), precision, wide)

    def _read(self, weight: Quantized, before: Array) -> tuple[Factor, Factor]:
        """The numbers, in blocks, and the scales; XLA computes an array of their dtype before."""
        array = waiting(weight, before).array
        values, whole = _viewed(array, self.views)
        # Integers of eight bits are exact in every dtype of floats but those of eight bits.
        values = numbers_of(values, array.qtype).astype(before.dtype)
        found = self._split(Factor(values, tuple(range(values.ndim))))
        axes = list[int]()
        for axis, (n, size) in enumerate(zip(whole.shape, values.shape, strict=True)):
            axes += [_BLOCK + axis if axis in self.split else axis]
            if 1 < n < size and axis not in self.split:
                whole = jnp.repeat(whole, size // n, axis)
        gone = [i for i, n in enumerate(whole.shape) if n == 1]
        left = tuple(axis for i, axis in enumerate(axes) if i not in gone)
        return found, Factor(whole.squeeze(gone), left)


def _flat(shape: Sequence[int], inner: Sequence[int]) -> tuple[int, tuple[int, int]]:
    """The axis of a weight as a matrix that the features `inner` make, and its shape.

    Example:
        >>> _flat((4, 16, 5), (0, 1)), _flat((3, 64), (1,))
        ((0, (64, 5)), (1, (3, 64)))
    """
    along = 0 if min(inner) == 0 else 1
    size = math.prod(shape[i] for i in inner)
    rest = math.prod(shape) // size
    return along, (rest, size) if along else (size, rest)


def rows_of(
    weight: Quantized, views: Sequence[View], along: tuple[int, int], take: Callable[[Array], Array]
) -> Array | None:
    """Rows of a packed weight in floats; None where rows have no scales that are theirs alone.

    Args:
        along: the axis that the rows are taken from, and its size.
        take: takes the rows of an array that has the axes of the weight.
    """
    values, scales = _viewed(weight.array, views)
    if scales is None or scales.shape[along[0]] != along[1]:
        return None
    array = weight.array.replace(qvalue=take(values), scale=take(scales))
    return weight.replace(array=array).unbox()


def _viewed(array: Any, views: Sequence[View]) -> tuple[Array, Any]:
    """The numbers and the scales of an array after some views; None where one leaves no scales."""
    values, scales = array.qvalue, array.scale
    for view in views:
        values, scales = view.of(values), None if scales is None else view.scales(scales)
    return values, scales


def cut_scales(
    cut: Callable[[Array, dict[int, int]], Array], axes: Sequence[int], shape: Sequence[int]
) -> Callable[[Array], Array | None]:
    """How the scales of a weight follow its cut along some axes; see `Changed.sliced`."""

    def of(scales: Array) -> Array | None:
        if any(scales.shape[i] not in (1, shape[i]) for i in axes):
            return None
        return cut(scales, {i: i for i in range(len(shape)) if scales.shape[i] > 1})

    return of


def split_scales(
    blocks: Sequence[tuple[list[int], list[int]]],
    old: Sequence[int],
    new: Sequence[int],
    scales: Array,
) -> Array | None:
    """The scales of a reshaped weight; None where blocks do not stay blocks along axes.

    Args:
        blocks: groups of axes of the old and of the new shape; see `blocks_of`.
        old: the shape of the weight before.
        new: its shape afterwards.
        scales: the scales before.

    Example:
        >>> groups = [([0, 1], [0]), ([2], [1])]
        >>> split_scales(groups, (4, 64, 5), (256, 5), jnp.ones((4, 2, 5))).shape
        (8, 5)
    """
    shape = dict(enumerate(new))
    for left, right in blocks:
        found = {i: old[i] // scales.shape[i] for i in left}
        block = math.prod(found.values())
        tiles = tiles_of({i: new[i] for i in right}, block)
        if tiles is None or tiles_of({i: old[i] for i in left}, block) != found:
            return None
        shape |= {i: new[i] // n for i, n in tiles.items()}
    return scales.reshape(list(shape.values()))


def tiles_of(sizes: Mapping[int, int], block: int) -> dict[int, int] | None:
    """The length of a block along each axis, from the last one; None where blocks do not divide.

    Example:
        >>> tiles_of({0: 12, 1: 32}, 64), tiles_of({0: 12, 1: 32}, 16), tiles_of({0: 12}, 64)
        ({1: 32, 0: 2}, {1: 16, 0: 1}, None)
    """
    tiles = {}
    # The last axis is contiguous in memory, so blocks run along it first.
    for axis, size in sorted(sizes.items(), reverse=True):
        tiles[axis] = math.gcd(block, size)
        if tiles[axis] < min(block, size):
            return None
        block //= tiles[axis]
    return tiles if block == 1 else None
