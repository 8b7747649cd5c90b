"""Products by a packed weight's numbers and scales, as accelerators compute them.

They run on a CPU here: `accelerator` takes the branch of a TPU or a GPU where a program has one.
"""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.contract import APIS
from helpers.packed import check_gradients

import adapters_jax as aj
from adapters_jax.trace.primitives import blocks_of
from adapters_jax.weights import factors, kernel, packed
from adapters_jax.weights.packed import split_scales
from adapters_jax.weights.quantized import is_quantized


@pytest.fixture(params=["mesh", "chip"])
def accelerator(request, monkeypatch):
    """Programs take the branch of an accelerator: of several, or of one TPU with its kernel.

    Blocks may be as narrow as tests have them.
    """

    def chosen(*args, default, **platforms):
        return platforms.get("tpu", platforms.get("cuda", default))(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    monkeypatch.setattr(packed, "NARROWEST", 4)
    monkeypatch.setattr(packed, "OUTPUTS", 0)

    def contracted(x, y, kept, precision, dtype):
        # As units for products compute it, which sum bfloat16 in float32.
        wide = jnp.promote_types(dtype, jnp.float32)
        found = factors.contracted(x.cast(wide), y.cast(wide), kept, precision)
        return found.cast(dtype)

    monkeypatch.setattr(packed, "contracted", contracted)
    taken = ["chip", "mesh"].index(request.param)

    def where_alone(*given):
        return given[taken](*given[2:])

    monkeypatch.setattr(packed, "where_alone", where_alone)
    interpreted = functools.partial(kernel.product, interpret=True)
    monkeypatch.setattr(kernel, "product", interpreted)
    return request.param


class Tied(nn.Module):
    """A table that is looked up, and then a head."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(7, 64, dtype=x.dtype)
        return table.attend(jnp.sin(table(jnp.array([[1, 6, 0], [2, 2, 5]])) + x))


class Cut(nn.Module):
    """Columns of a weight of heads, merged into one axis, and a range of its last axis."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("kernel", nn.initializers.normal(), (64, 4, 6), x.dtype)
        return x @ weight[:, 1:3].reshape(64, 12), jnp.einsum("btd,dhk->bthk", x, weight[..., 2:])


class Rows(nn.Module):
    """A table by whose rows a distribution over them is averaged."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(64, 32, dtype=x.dtype)
        return jax.nn.softmax(x) @ table.embedding + table(jnp.array([3]))


class Grouped(nn.Module):
    """A matrix for each of two groups."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("kernel", nn.initializers.normal(), (2, 64, 5), x.dtype)
        return jnp.einsum("gtd,gdf->tgf", x, weight)


X = drawn((2, 3, 64), 1)
SCAN = "scan_remat"
MODELS = [
    *((api, "together", SCAN, "int4") for api in APIS),
    ("nnx", "lora_dense_general", "plain", "int8"),
    ("linen", "lora_embed", "plain", "int4"),
    ("linen", "dora", "plain", "int8"),
    ("nnx", "lora_conv", "plain", "int8"),
]
LAYERS = {
    "dense": (nn.Dense(5, use_bias=False), X),
    "inputs on two axes": (
        nn.DenseGeneral(5, axis=(-2, -1), use_bias=False),
        X.reshape(2, 3, 4, 16),
    ),
    "outputs on two axes": (nn.DenseGeneral((2, 5), use_bias=False), X),
    "outputs first": (nn.Einsum((5, 64), "btd,fd->btf", False), X),
    "heads first": (nn.Einsum((3, 64, 5), "btd,hdk->bthk", False), X),
    "tied": (Tied(), X),
    "cut": (Cut(), X),
    "rows": (Rows(), X),
    "grouped": (Grouped(), X),
}
FORMS = [  # the block, and the dtype that the model computes in
    ("int8", None, "float32"),
    ("int8", None, "bfloat16"),
    ("int8", 16, "float32"),
    ("int4", 32, "float32"),
    ("int4", 32, "bfloat16"),
    ("nf4", 32, "float32"),
]
TILED = ("dense", "inputs on two axes", "outputs on two axes", "outputs first", "tied", "cut")
TOLERANCES = {"float32": 2e-6, "bfloat16": 1e-2}


def both(layer, x, dtype, block, kind):
    """A model with a packed base, its parameters, and the same parameters in floats."""
    params = drawn_like(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda w: jnp.asarray(w, kind), params)
    small = aj.quantize(layer, params, x, dtype=dtype, block=block)
    return aj.adapt(layer, aj.Recipe()), small, aj.dequantize(small)


def with_gradient(model, params, x):
    """The outputs, and the gradient of the input of their weighted sum."""

    def loss(x):
        found = jax.tree.leaves(model.apply({"params": params}, x))
        y = jnp.concatenate([y.ravel() for y in found])
        return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size))).sum(), y

    gradient, y = jax.grad(loss, has_aux=True)(x)
    return y, gradient


def scaled_sizes(function, *args):
    """The sizes of the arrays of floats that a program multiplies."""
    found = re.findall(r":(?:bf|f)\d+\[([\d,]*)\] = mul", str(jax.make_jaxpr(function)(*args)))
    return {math.prod(int(n) for n in dims.split(",") if n) for dims in found}


@pytest.mark.witness(
    "mesh-grouped-nf4-32-float32",
    "mesh-rows-int8-None-bfloat16",
    "mesh-heads first-int4-32-float32",
    "mesh-tied-int8-16-float32",
    "mesh-outputs on two axes-int8-None-float32",
    "chip-inputs on two axes-int4-32-float32",
    "chip-outputs on two axes-nf4-32-float32",
    "chip-tied-nf4-32-float32",
    "chip-outputs first-int4-32-bfloat16",
)
@pytest.mark.parametrize(("dtype", "block", "kind"), FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_product_and_its_gradient_are_those_of_the_weight_in_floats(
    name, dtype, block, kind, accelerator
):
    layer, x = LAYERS[name]
    model, small, floats = both(layer, x, dtype, block, kind)
    x = jnp.asarray(x, kind)
    found = jax.jit(with_gradient, static_argnums=0)(model, small, x)
    with jax.enable_x64(True):
        wide, rounded = jax.tree.map(lambda a: jnp.asarray(double(a)), (floats, x))
        expected = jax.jit(with_gradient, static_argnums=0)(model, wide, rounded)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == kind
        most = np.abs(double(other)).max()
        np.testing.assert_allclose(double(mine), double(other), atol=TOLERANCES[kind] * most)
    packed_sizes = {
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(small, is_leaf=is_quantized)
        if is_quantized(leaf)
    }
    run = lambda x: with_gradient(model, small, x)  # noqa: E731
    by_kernel = accelerator == "chip" and block and name in TILED
    assert ("pallas_call" in str(jax.make_jaxpr(run)(x))) == bool(by_kernel)
    # nf4 in blocks; and rows that are averaged while each has several scales.
    in_floats = block == 16 if name == "rows" else dtype == "nf4"
    assert by_kernel or bool(packed_sizes & scaled_sizes(run, x)) == in_floats


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("accelerator", ["mesh"], indirect=True)
def test_blocks_are_for_many_outputs_and_long_enough(monkeypatch):
    monkeypatch.setattr(packed, "OUTPUTS", 16)
    layer = nn.Dense(136, use_bias=False)
    for rows, block, expected in ((8, 32, False), (9, 32, True), (8, 2, True)):
        x = drawn((rows, 64))
        model, small, _ = both(layer, x, "int4", block, "float32")
        sizes = scaled_sizes(lambda x: model.apply({"params": small}, x), x)  # noqa: B023
        assert (64 * 136 in sizes) == expected


PACKED = [  # rows of the input, what a base is quantised to, and the packed reads of three
    (8, {"dtype": "int8"}, {"cuda": 3, "tpu": 0}),
    (8, {"dtype": "int4"}, {"cuda": 2, "tpu": 1}),  # 192 inputs have three blocks
    (1, {"dtype": "nf4"}, {"cuda": 2, "tpu": 1}),
    (1, {"dtype": "int4", "block": 8}, {"cuda": 0, "tpu": 3}),
    (1, {"dtype": "int4", "block": 4}, {"cuda": 0, "tpu": 0}),  # too short
]


@pytest.mark.witness("8-how0-expected0", "1-how4-expected4")
@pytest.mark.parametrize(("rows", "how", "expected"), PACKED)
def test_the_audit_says_where_packed_weights_turn_into_floats(rows, how, expected):
    x = jnp.ones((rows, 64))
    layer = nn.Sequential([nn.Dense(192), nn.Dense(64), nn.Dense(5)])
    params = drawn_like(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    params = aj.quantize(layer, params, x, **how)
    model = aj.adapt(layer, aj.LoRA("layers_1", rank=2))
    params = aj.init_adapters(model, params, jax.random.key(0), x)
    draw, widths = nnx.Rngs(0), (64, 192, 64, 5)
    parts = [nnx.Linear(*pair, rngs=draw) for pair in itertools.pairwise(widths)]
    small = aj.quantize(nnx.Sequential(*parts), x, **how)
    other = aj.adapt(small, aj.LoRA("layers/1", rank=2), rngs=draw, example_inputs=(x,))
    for audit in (aj.audit(model, params, inputs=(x,)), aj.audit(other, inputs=(x,))):
        assert audit.packed == {"reads": 3, **expected}
        line = "of 3 reads of quantized weights, {cuda} are packed on a GPU, {tpu} on one TPU"
        assert line.format(**expected) in str(audit)


@pytest.mark.slow
@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("api", "case", "variant", "dtype"), MODELS)
def test_whole_models_train_as_on_floats(api, case, variant, dtype):
    """Scanned, recomputed, convolved, under DoRA and with bottlenecks."""
    check_gradients(api, case, variant, dtype)


@pytest.mark.usefixtures("accelerator")
def test_a_batch_of_adapters_reads_a_packed_weight_once():
    base = nn.Dense(16)
    params = drawn_like(jax.eval_shape(base.init, jax.random.key(0), X)["params"])
    model = aj.adapt(base, aj.LoRA("**", 2))
    small = aj.quantize(base, params, X, dtype="int4", block=16)
    adapters, frozen = aj.partition(
        aj.init_adapters(model, small, jax.random.key(1), X), model.recipe
    )
    stacked = drawn_like(jax.tree.map(lambda x: jnp.zeros((5, *x.shape)), adapters))

    def run(adapters, x):
        return model.apply({"params": aj.merge_trees(adapters, frozen)}, x)

    x = drawn((5, 2, 64))
    expected = jax.vmap(lambda a, x: model.apply({"params": aj.merge_trees(a, floats)}, x))
    floats = aj.dequantize(frozen)
    np.testing.assert_allclose(jax.vmap(run)(stacked, x), expected(stacked, x), atol=1e-5)
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(lambda a, x: run(a, x).sum())))(stacked, x))
    assert "i4[64,16]" in text and "[5,64,16]" not in text and "[5,4,16,16]" not in text


@pytest.mark.slow
def test_looked_up_rows_are_scaled_alone_and_others_are_not_there():
    table = nn.Embed(50, 64)
    params = table.init(jax.random.key(0), jnp.array([0]))["params"]
    model, rows = aj.adapt(table, aj.Recipe()), jnp.array([[3, 49, 50, -1]])
    for dtype in ("int8", "int4", "nf4"):
        small = aj.quantize(table, params, rows, dtype=dtype)
        run = lambda x, small=small: model.apply({"params": small}, x)  # noqa: E731
        expected = model.apply({"params": aj.dequantize(small)}, rows)
        assert jnp.isnan(expected).any() and not jnp.isnan(expected).all()
        np.testing.assert_array_equal(run(rows), expected)
        assert 50 * 64 not in scaled_sizes(run, rows)


@pytest.mark.parametrize(
    ("old", "new", "scales", "expected"),
    [
        ((4, 64, 5), (256, 5), (4, 2, 5), (8, 5)),
        ((4, 64, 5), (256, 5), (1, 1, 5), (1, 5)),
        ((256, 5), (4, 64, 5), (2, 5), (2, 1, 5)),
        ((256, 5), (4, 64, 5), (8, 1), (4, 2, 1)),
        ((4, 64), (256,), (1, 64), None),  # numbers that share a scale are apart
        ((96, 5), (3, 32, 5), (2, 5), None),  # a block of 48 is no number of rows of 32
        ((6, 5), (30,), (6, 1), (6,)),
    ],
)
def test_scales_of_a_reshaped_weight(old, new, scales, expected):
    groups, array = blocks_of(old, new), drawn(scales)
    found = split_scales(groups, old, new, jnp.asarray(array))
    assert (found is None) == (expected is None)
    if expected:
        whole = lambda a, shape: functools.reduce(  # noqa: E731
            lambda a, i: np.repeat(a, shape[i] // a.shape[i], i), range(len(shape)), a
        )
        assert found.shape == expected
        np.testing.assert_array_equal(whole(np.asarray(found), new), whole(array, old).reshape(new))
