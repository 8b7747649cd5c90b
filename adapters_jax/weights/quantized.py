"""A frozen weight in few bits: how it is stored, and how a layer reads it.

XLA may compute early whatever depends on parameters alone, and a gradient saves what it will need
again: either would hold the float weights of all layers at once. So a layer reads its weight with
`once`: only after its input is computed, and a second time for its gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from adapters_jax.errors import MissingPackageError
from adapters_jax.trace.inputs import is_abstract

NF4 = (  # Dettmers et al. 2023, appendix E; each is a float32
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Quantized(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
    """A quantised weight, in a box that flax opens where a layer reads the parameter.

    Attributes:
        array: a `qwix.QArray`: integers of the weight's shape, and float32 scales of blocks.
        dtype: the dtype of the weight that layers read.
        spec: the partition spec of its annotation (`nn.with_partitioning`); None without one.
    """

    array: Any
    dtype: Any = struct.field(pytree_node=False)
    spec: Any = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.array.qvalue.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    def astype(self, dtype: Any) -> "Quantized":
        """The same weight, which layers read in another dtype."""
        return self.replace(dtype=jnp.dtype(dtype))

    def unbox(self) -> Float[Array, "..."]:
        """The weight in floats."""
        dequantize, array = _qwix().dequantize, self.array
        if array.qtype == "nf4":
            floats = jax.lax.platform_dependent(array, tpu=_nf4_floats, default=dequantize)
            return floats.astype(self.dtype)
        if array.qvalue.dtype == jnp.int4:
            values = jax.lax.platform_dependent(array.qvalue, cuda=_in_rows, default=lambda x: x)
            array = array.replace(qvalue=values.astype(jnp.int8))
        return dequantize(array).astype(self.dtype)

    def replace_boxed(self, val: Any) -> "Quantized":
        """Raises TypeError: a quantised weight is frozen."""
        raise TypeError(
            "a quantised weight is frozen; write to the tree that aj.dequantize returns"
        )

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        """Returns the box unchanged: lifted transforms stack its arrays themselves."""
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Quantized":
        """Returns the box unchanged, as `add_axis` does."""
        return self


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree is a quantised weight; for `is_leaf`."""
    return isinstance(leaf, Quantized)


def bits_of(dtype: Any) -> int:
    """Bits of one number as XLA stores it; 4 for int4, 64 for a random key."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 64
    integer = jnp.issubdtype(dtype, jnp.integer)
    return jnp.iinfo(dtype).bits if integer else 8 * jnp.dtype(dtype).itemsize


def unboxed(leaf: Any) -> Any:
    """A parameter without flax's boxes; a quantised one keeps its box, which would compute."""
    return leaf if is_quantized(leaf) else nn.meta.unbox(leaf)


def opened(leaf: Quantized) -> Any:
    """A quantised weight in floats, in the box of its annotation; abstract for an abstract one."""
    weight = jax.eval_shape(leaf.unbox) if is_abstract(leaf) else leaf.unbox()
    return weight if leaf.spec is None else nn.Partitioned(weight, names=tuple(leaf.spec))


def _qwix() -> Any:
    """The package qwix, which only quantised bases need."""
    try:
        import qwix
    except ImportError as error:
        raise MissingPackageError("a quantised base", "qwix", "quant") from error
    return qwix


@functools.partial(jax.jit, static_argnames=("qtype", "whole", "blocks"))
def pack(
    weight: Float[Array, "..."], qtype: Any, whole: tuple[int, ...], blocks: tuple[Any, ...]
) -> Any:
    """A weight as a `qwix.QArray`, with float32 scales by the largest magnitude.

    Args:
        weight: the weight, of any float dtype.
        qtype: qwix's type: int8, int4 or nf4.
        whole: axes with a scale for every index.
        blocks: pairs of an axis and the length of its blocks, each with a scale; all other axes
            share a scale.
    """
    full = weight.astype(jnp.float32)
    return _qwix().quantize(full, qtype, channelwise_axes=whole, tiled_axes=dict(blocks))


def numbers_of(values: Int[Array, "..."], qtype: Any) -> Array:
    """The numbers that the scales of a `qwix.QArray` of a type multiply, small or in float32.

    Those of nf4 are chosen by the bits of their index. For a table that is indexed, as in
    `qwix.dequantize`, a TPU's compiler makes a longer program that holds all floats at once.
    """
    if qtype != "nf4":
        return values
    index = values.astype(jnp.int32)

    def chosen(numbers: tuple[float, ...]) -> Any:
        half = len(numbers) // 2
        if not half:
            return jnp.float32(numbers[0])
        return jnp.where(index & half, chosen(numbers[half:]), chosen(numbers[:half]))

    return chosen(NF4)


def _nf4_floats(array: Any) -> Float[Array, "..."]:
    """The floats of a `qwix.QArray` of nf4, by `numbers_of`."""
    blocks = [(n, size // n) for size, n in zip(array.qvalue.shape, array.scale.shape, strict=True)]
    values = numbers_of(array.qvalue, "nf4").reshape([n for block in blocks for n in block])
    scales = array.scale.reshape([n for size, _ in blocks for n in (size, 1)])
    return (values * scales).reshape(array.qvalue.shape)


def _in_rows(values: Int[Array, "..."]) -> Int[Array, "..."]:
    """The same numbers, which XLA has to take as they are stored.

    A gradient reads a weight turned around. A GPU's compiler turned the stacked weights of scanned
    layers as a whole, in front of their loop: a copy of a base in int4. It cannot turn a vector.
    """
    return jax.lax.optimization_barrier(values.ravel()).reshape(values.shape)


def once(run: Callable[[Any, Any], Any], weights: Any, inputs: Any, packed: Any = None) -> Any:
    """`run(weights, inputs)` with float weights that live only for this call and for its gradient.

    Args:
        run: a function of the weights in floats and the inputs.
        weights: a tree of `Quantized`; they are frozen, and have no gradient.
        inputs: a tree of arrays.
        packed: the same of one weight and one input by numbers and scales, a `packed.Packed`; None
            where it is not known.
    """
    return _once(run, packed, weights, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _once(run: Callable[..., Any], packed: Any, weights: Any, inputs: Any) -> Any:
    def floats(weights: Any, inputs: Any) -> Any:
        return run(_read(weights, inputs), inputs)

    if packed is None:
        return floats(weights, inputs)
    # By the platform that a program is compiled for, which need not be the one that runs here.
    forms = dict.fromkeys(packed.platforms, packed.forward_by(floats))
    return jax.lax.platform_dependent(weights, inputs, default=floats, **forms)


def _forward(run: Callable[..., Any], packed: Any, weights: Any, inputs: Any) -> Any:
    return _once(run, packed, weights, inputs), (weights, inputs)


def _backward(run: Callable[..., Any], packed: Any, kept: Any, gradient: Any) -> Any:
    def floats(weights: Any, inputs: Any, gradient: Any) -> Any:
        _, pull = jax.vjp(functools.partial(run, _read(weights, gradient)), inputs)
        return pull(gradient)[0]

    weights, inputs = kept
    if packed is None:
        return None, floats(weights, inputs, gradient)
    forms = dict.fromkeys(packed.platforms, packed.backward_by(floats))
    return None, jax.lax.platform_dependent(weights, inputs, gradient, default=floats, **forms)


_once.defvjp(_forward, _backward)


def _read(weights: Any, arrays: Any) -> Any:
    """The float weights, which XLA cannot compute before `arrays`."""
    return jax.tree.map(Quantized.unbox, waiting(weights, arrays), is_leaf=is_quantized)


def waiting(weights: Any, arrays: Any) -> Any:
    """The weights, which XLA cannot read before `arrays` are computed."""
    floats = (x for x in jax.tree.leaves(arrays) if jnp.issubdtype(x.dtype, jnp.inexact))
    before = next((x for x in floats if x.size), None)
    if before is None:
        return weights
    weights, before = jax.lax.optimization_barrier((weights, before))
    return jax.lax.platform_dependent(
        weights, before[(0,) * before.ndim], cpu=_after, default=lambda weights, _: weights
    )


@custom_vmap
def _after(weights: Any, before: Float[Array, ""]) -> Any:
    """The weights unchanged, in a form that depends on a number for XLA.

    XLA's CPU compiler of jaxlib 0.10 drops the barrier. It cannot know whether the number is the
    NaN whose bits are all ones, the only value that would change the weights.
    """
    bits = jax.lax.bitcast_convert_type(before, f"int{8 * before.dtype.itemsize}")

    def same(weight: Quantized) -> Quantized:
        values = weight.array.qvalue
        flip = (bits == -1).astype(values.dtype)
        return weight.replace(array=weight.array.replace(qvalue=values ^ flip))

    return jax.tree.map(same, weights, is_leaf=is_quantized)


@_after.def_vmap
def _after_batched(size: int, batched: Any, weights: Any, before: Any) -> Any:
    """Depends on one number of the batch, so that the weights get no batch axis."""
    return _after(weights, before[0] if batched[1] else before), batched[0]
