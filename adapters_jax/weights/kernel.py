"""The product with a weight in blocks, as a kernel of a TPU that never writes the weight in floats.

A tile of the weight is read in few bits, scaled in fast memory, and multiplied there. XLA writes a
weight whose blocks have scales in floats before each product: four times what int4 takes, and again
in the backward pass. What is computed is the same: numbers times scales in float32, rounded to the
dtype of the input, and products that are summed in float32.

Reference: the pages on Pallas for TPUs, https://docs.jax.dev/en/latest/pallas/tpu/
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adapters_jax.weights.quantized import bits_of, numbers_of

LANES, SUBLANES = 128, 8  # of a register, in numbers of 32 bits
ROWS = 16  # the rows of a tile are a multiple of it: two numbers of 16 bits share a sublane
LONGEST = 1024  # the longest tile of what is contracted
WIDEST = 4096  # the most rows, and the most outputs: more move little less, and leave few steps
MEMORY = 40 * 2**20  # bytes that a tile may take of a core's fast memory: v5p has 64 MiB, v5e 128
MARGIN = 16 * 2**20  # what the compiler may take beside them


class Tile(NamedTuple):
    """Sizes of a tile: rows of the input, outputs, and what is contracted."""

    rows: int
    outputs: int
    inner: int

    def memory(self, itemsize: int) -> int:
        """Bytes of fast memory that it takes; what is read or written is held twice."""
        weight = self.inner * self.outputs * (2 + 4 + 4 + itemsize)  # packed, scaled, and rounded
        moved = 2 * itemsize * self.rows * (self.inner + self.outputs)
        return weight + moved + 2 * 4 * self.rows * self.outputs

    def read(self, rows: int, inner: int, outputs: int, bits: tuple[int, int]) -> int:
        """Bytes that a product reads: an input once for each tile of outputs, and the numbers of
        the weight once for each tile of rows; `bits` are those of a number of both."""
        x = rows * inner * bits[0] * -(-outputs // self.outputs)
        return (x + inner * outputs * bits[1] * -(-rows // self.rows)) // 8


@functools.cache
def tile_of(
    rows: int,
    shape: tuple[int, int],
    block: int,
    along: int,
    contracted: int,
    bits: tuple[int, int],
) -> Tile | None:
    """The tile with which a product reads fewest bytes; None where none fits.

    Args:
        rows: of the input.
        shape: of the weight.
        block: the length of a block.
        along: the axis of the weight that blocks are along.
        contracted: the axis of the weight that the input has.
        bits: those of a number of the input, and of the weight.
    """
    if block % SUBLANES:
        return None
    units = [math.lcm(block, LANES) if axis == along else LANES for axis in (0, 1)]
    inner, outputs = shape[contracted], shape[1 - contracted]
    lengths = range(units[contracted], LONGEST + 1, units[contracted])
    even = [n for n in lengths if inner % n == 0]  # so that no tile has to be cut
    tiles = itertools.product(
        _sizes(ROWS, rows),
        _sizes(units[1 - contracted], outputs),
        even or ([inner] if inner <= LONGEST else lengths),
    )
    found = (
        tile
        for tile in map(Tile._make, tiles)
        if tile.memory(bits[0] // 8) <= MEMORY and max(tile[:2]) <= WIDEST
    )
    best = lambda tile: (tile.read(rows, inner, outputs, bits), -tile.inner)  # noqa: E731
    return min(found, key=best, default=None)


def _sizes(unit: int, axis: int) -> Iterator[int]:
    """A unit, its double and so on, and the first multiple that covers an axis."""
    size, most = unit, -(-axis // unit) * unit
    while size < most:
        yield size
        size *= 2
    yield most


def product(
    x: Float[Array, "rows inner"],
    values: Int[Array, "m n"],
    scales: Float[Array, "blocks others"],
    along: int,
    contracted: int,
    qtype: Any,
    dtype: Any = None,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """`x W`, or `x W^T` where the input has the second axis of the weight.

    Args:
        x: the input.
        values: the numbers of a `qwix.QArray`; `tile_of` has a tile for their shape.
        scales: float32; a row for each block, a column for each index of the other axis.
        along: the axis of the weight that blocks are along.
        contracted: the axis of the weight that the input has.
        qtype: qwix's type, as `numbers_of` takes it.
        dtype: of the result; x's if None.
        interpret: computes it without a TPU.

    Raises:
        ValueError: there is no tile for these sizes.
    """
    # Here, since Pallas takes long to import.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, inner), dtype = x.shape, x.dtype if dtype is None else dtype
    block, outputs = values.shape[along] // len(scales), values.shape[1 - contracted]
    bits = bits_of(x.dtype), bits_of(values.dtype)
    tile = tile_of(rows, values.shape, block, along, contracted, bits)
    if tile is None:
        raise ValueError(
            f"no tile for a weight of {values.shape} in blocks of {block}; see tile_of"
        )
    steps = -(-inner // tile.inner)
    grid = -(-rows // tile.rows), -(-outputs // tile.outputs), steps
    sides = (tile.outputs, tile.inner) if contracted else (tile.inner, tile.outputs)
    blocks = sides[along] // block

    def at(i: Any, j: Any, k: Any) -> tuple[Any, Any]:
        return (j, k) if contracted else (k, j)

    def of_scales(i: Any, j: Any, k: Any) -> tuple[Any, ...]:
        place = at(i, j, k)
        return (place[along], *[0] * len(apart), place[1 - along])

    # A tile has eight rows of an array or all, or any number of an axis before the last two.
    apart = (1,) if blocks % SUBLANES and blocks != len(scales) else ()
    if apart:
        scales = scales[:, None]
    read = tile.read(rows, inner, outputs, bits) + grid[0] * scales.size * 4
    return pl.pallas_call(
        functools.partial(_step, along=along, contracted=contracted, qtype=qtype, inner=inner),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile.rows, tile.inner), lambda i, j, k: (i, k)),
            pl.BlockSpec(sides, at),
            pl.BlockSpec((blocks, *apart, sides[1 - along]), of_scales),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY + MARGIN,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * outputs,
            bytes_accessed=read + rows * outputs * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(x, values, scales)


def _step(
    x: Any,
    values: Any,
    scales: Any,
    out: Any,
    total: Any,
    *,
    along: int,
    contracted: int,
    qtype: Any,
    inner: int,
) -> None:
    """Adds what one tile of the weight gives to a tile of the product, a sum over `inner`."""
    from jax.experimental import pallas as pl

    step, width = pl.program_id(2), x.shape[1]

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    numbers = numbers_of(values[...], qtype).astype(jnp.float32)
    given, by_block = x[...], scales[...].reshape(len(scales), -1)
    if inner % width:  # what a tile holds beyond the end of an axis may be anything
        left = inner - step * width
        given = _before(left, given, 1)
        if along == contracted:
            by_block = _before(left * len(scales) // width, by_block, 0)
        else:
            by_block = _before(left, by_block, 1)
    if along == 0:
        in_blocks = numbers.reshape(len(scales), -1, numbers.shape[1])
        weight = (in_blocks * by_block[:, None]).reshape(numbers.shape)
    else:
        weight = numbers * _beside(by_block.T, numbers.shape[1])
    total[...] += jax.lax.dot_general(
        given,
        weight.astype(x.dtype),
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == -(-inner // width) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _before(end: Any, array: Array, axis: int) -> Array:
    """An array with zeros from an index on."""
    place = jax.lax.broadcasted_iota(jnp.int32, array.shape, axis)
    return jnp.where(place < end, array, jnp.zeros_like(array))


def _beside(scales: Float[Array, "rows blocks"], columns: int) -> Float[Array, "rows columns"]:
    """The scale of each column, where blocks are along a row.

    Mosaic repeats no part of a register, so each register is chosen from the scales in it.
    """
    rows, blocks = scales.shape
    block, parts = columns // blocks, list[Array]()
    for start in range(0, columns, LANES):
        width = min(LANES, columns - start)
        lane = start + jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
        first, last = start // block, (start + width - 1) // block
        part = jnp.broadcast_to(scales[:, first : first + 1], (rows, width))
        for i in range(first + 1, last + 1):
            part = jnp.where(lane < i * block, part, scales[:, i : i + 1])
        parts.append(part)
    return jnp.concatenate(parts, 1)
