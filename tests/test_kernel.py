"""The kernel for weights in blocks, interpreted; and forms of a program for one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from helpers.arrays import double, drawn
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.weights import kernel
from adapters_jax.weights.alone import where_alone

CASES = [  # rows, the weight, its block, qwix's type, the input's dtype, and the longest tile
    (40, (512, 384), 32, "int4", "float32", 1024),
    (40, (512, 300), 32, "int4", "float32", 128),  # several tiles of outputs and of the sum
    (9, (1088, 1100), 64, "int4", "float32", 1024),  # a last tile of the sum that is not full
    (150, (384, 200), 128, "int4", "float32", 128),  # and of rows, each with one block
    (3, (576, 200), 64, "nf4", "float32", 1024),  # nine blocks, and no multiple of a register
    (17, (256, 130), 8, "nf4", "bfloat16", 1024),
    (5, (384, 256), 16, "int8", "bfloat16", 128),
]


@pytest.mark.witness(
    "40-shape1-32-int4-float32-128-blocks first-forward",
    "40-shape1-32-int4-float32-128-blocks last-turned",
    "9-shape2-64-int4-float32-1024-blocks first-turned",
    "150-shape3-128-int4-float32-128-blocks last-forward",
    "3-shape4-64-nf4-float32-1024-blocks first-turned",
    "17-shape5-8-nf4-bfloat16-1024-blocks first-turned",
    "5-shape6-16-int8-bfloat16-128-blocks last-turned",
)
@pytest.mark.parametrize("contracted", [0, 1], ids=["forward", "turned"])
@pytest.mark.parametrize("along", [0, 1], ids=["blocks first", "blocks last"])
@pytest.mark.parametrize(("rows", "shape", "block", "qtype", "dtype", "longest"), CASES)
def test_it_is_the_product_with_the_weight_in_floats(
    rows, shape, block, qtype, dtype, longest, along, contracted, monkeypatch
):
    for name in ("LONGEST", "WIDEST"):
        monkeypatch.setattr(kernel, name, longest)
    monkeypatch.setattr(kernel, "tile_of", kernel.tile_of.__wrapped__)  # which remembers no other
    shape = shape[::-1] if along else shape
    array = qwix.quantize(
        drawn(shape, 1), qtype, channelwise_axes=(1 - along,), tiled_axes={along: block}
    )
    x = jnp.asarray(drawn((rows, shape[contracted]), 2), dtype)
    scales = array.scale.T if along else array.scale
    found = kernel.product(x, array.qvalue, scales, along, contracted, array.qtype, interpret=True)
    assert found.dtype == dtype
    floats = double(qwix.dequantize(array).astype(dtype))
    expected = double(x) @ (floats.T if contracted else floats)
    most = np.abs(expected).max()
    tolerance = 2e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(double(found), expected, atol=tolerance * most)


def test_tiles_fit_the_memory_and_end_where_a_sum_ends():
    bits = (16, 4)
    tile = kernel.tile_of(2048, (4096, 14336), 64, 0, 0, bits)
    assert tile == (1024, 2048, 512)
    assert tile.memory(2) <= kernel.MEMORY < tile._replace(rows=2048).memory(2)
    # x for each of seven tiles of outputs, and the weight for both tiles of rows.
    read = 7 * 2 * 2048 * 4096 + 2 * 4096 * 14336 // 2
    assert tile.read(2048, 4096, 14336, bits) == read
    turned = kernel.tile_of(2048, (4096, 14336), 64, 0, 1, bits)
    assert 14336 % turned.inner == 0 and turned.outputs % 64 == 0
    assert kernel.tile_of(8, (256, 64), 4, 0, 0, bits) is None  # blocks of half a register
    # Gemma 3's vocabulary has no divisor that is a multiple of 128.
    vocabulary = kernel.tile_of(1024, (262_208, 2560), 64, 1, 0, bits)
    assert vocabulary.inner % 128 == 0 and 262_208 % vocabulary.inner
    assert kernel.tile_of(1024, (262_208, 2560), 64, 1, 1, bits).inner == 512


def test_a_weight_without_a_tile_is_refused():
    given = jnp.ones((8, 256)), jnp.ones((256, 64), jnp.int4), jnp.ones((64, 64))
    with pytest.raises(ValueError, match=r"\(256, 64\) in blocks of 4"):
        kernel.product(*given, 0, 0, "int4", interpret=True)


def both(x):
    return where_alone(lambda x: 2 * x, lambda x: 3 * x * x, x)


def lowered(function, mesh):
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(function).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    return "3.0" in text or "dense<3>" in text


def test_a_program_for_one_device_has_its_own_form():
    x = jnp.arange(4.0)
    for run in (both, jax.jit(both)):
        np.testing.assert_array_equal(run(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(both, 1, 1)(jnp.outer(x, x)), 2 * np.outer(x, x))
    one, two = AbstractMesh((1,), ("data",)), AbstractMesh((2,), ("data",))
    assert not lowered(both, one) and lowered(both, two)
    spread = jax.shard_map(both, mesh=two, in_specs=P("data"), out_specs=P("data"))
    assert not lowered(spread, two)


def test_its_derivative_is_that_of_the_general_form():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(jax.grad(lambda x: both(x).sum())(x), 6 * x)
    np.testing.assert_array_equal(
        jax.jit(jax.jvp, static_argnums=0)(both, (x,), (x,))[1], 6 * x * x
    )
