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
ROWS = 16  # of the input, of which a tile has a multiple: two numbers of 16 bits share a sublane
LONGEST = 1024  # the longest tile of what is contracted, but for an axis that no tile divides
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
    rows: int, shape: tuple[int, int], block: int, turned: bool, bits: tuple[int, int]
) -> Tile | None:
    """The tile with which a product reads fewest bytes; None where none fits.

    Args:
        rows: of the input.
        shape: `(k, n)` of the weight, whose scales are of blocks along k.
        block: the length of a block.
        turned: the input has n columns and the product k, as in the gradient of the input.
        bits: those of a number of the input, and of the weight.
    """
    if block % SUBLANES:
        return None
    inner, outputs = reversed(shape) if turned else shape
    by_inner, by_outputs = LANES, math.lcm(block, LANES)
    if not turned:
        by_inner, by_outputs = by_outputs, by_inner
    # What a tile holds beyond the end of an axis may be anything, so the sum has to end with one.
    fits = [n for n in range(by_inner, LONGEST + 1, by_inner) if inner % n == 0] or [inner]
    tiles = itertools.product(_sizes(ROWS, rows), _sizes(by_outputs, outputs), fits)
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
    values: Int[Array, "k n"],
    scales: Float[Array, "blocks n"],
    turned: bool,
    qtype: Any,
    dtype: Any = None,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """`x W` of a weight in blocks along its first axis; `x W^T` if turned.

    Args:
        x: the input, `(rows, k)`, or `(rows, n)` if turned.
        values: the numbers of a `qwix.QArray`, of which `tile_of` has a tile.
        scales: float32, of blocks along k.
        qtype: qwix's type, as `numbers_of` takes it.
        dtype: of the result; x's if None.
        interpret: computes it without a TPU.
    """
    # Here, since Pallas takes long to import.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, inner), dtype = x.shape, x.dtype if dtype is None else dtype
    block, outputs = values.shape[0] // scales.shape[0], values.shape[0 if turned else 1]
    bits = bits_of(x.dtype), bits_of(values.dtype)
    tile = tile_of(rows, values.shape, block, turned, bits)
    assert tile is not None
    steps = inner // tile.inner
    grid = -(-rows // tile.rows), -(-outputs // tile.outputs), steps
    sides = (tile.outputs, tile.inner) if turned else (tile.inner, tile.outputs)

    def at(i: Any, j: Any, k: Any) -> tuple[Any, ...]:
        return (j, k) if turned else (k, j)

    blocks = sides[0] // block

    def of_scales(i: Any, j: Any, k: Any) -> tuple[Any, ...]:
        first, second = at(i, j, k)
        return (first, *[0] * len(apart), second)

    # A tile has eight rows of an array or all, or any number of an axis before the last two.
    apart = (1,) if blocks % SUBLANES and blocks != len(scales) else ()
    if apart:
        scales = scales[:, None]
    read = tile.read(rows, inner, outputs, bits) + grid[0] * scales.size * 4
    return pl.pallas_call(
        functools.partial(_step, turned=turned, qtype=qtype, steps=steps),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile.rows, tile.inner), lambda i, j, k: (i, k)),
            pl.BlockSpec(sides, at),
            pl.BlockSpec((blocks, *apart, sides[1]), of_scales),
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
    turned: bool,
    qtype: Any,
    steps: int,
) -> None:
    """Adds what one tile of the weight gives to a tile of the product."""
    from jax.experimental import pallas as pl

    step = pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    numbers = numbers_of(values[...], qtype).astype(jnp.float32)
    blocks, columns = scales.shape[0], scales.shape[-1]
    scaled = numbers.reshape(blocks, -1, columns) * scales[...].reshape(blocks, 1, columns)
    weight = scaled.reshape(numbers.shape).astype(x.dtype)
    total[...] += jax.lax.dot_general(
        x[...],
        weight,
        (((1,), (1 if turned else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == steps - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)
