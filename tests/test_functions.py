"""Attention, activations and norms of our models: values, derivatives, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from scipy.special import expit, ndtr

from adapters_jax.finetune.models.decoder.layers import RMSNorm
from adapters_jax.finetune.models.encoder.layers import LayerNorm
from adapters_jax.finetune.models.parts import functions

X = np.linspace(-9, 9, 361)


def gelu_slope(x):
    return ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def gelu_tanh_slope(x):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * x * (1 - np.tanh(u) ** 2) * inner


def silu_slope(x):
    return expit(x) * (1 + x * (1 - expit(x)))


CASES = {
    "gelu": (functions.gelu, lambda x: nn.gelu(x, approximate=False), gelu_slope),
    "gelu_tanh": (functions.gelu_tanh, lambda x: nn.gelu(x, approximate=True), gelu_tanh_slope),
    "silu": (functions.silu, nn.silu, silu_slope),
}


@pytest.mark.slow
@pytest.mark.witness("gelu", "silu")
@pytest.mark.parametrize("name", CASES)
def test_activations_are_flax_s_with_their_true_derivatives(name):
    ours, theirs, slope = CASES[name]
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_array_equal(ours(x), theirs(x))
    gradient = jax.vmap(jax.grad(ours))(x)
    np.testing.assert_allclose(gradient, slope(X), atol=3e-6)
    _, pushed = jax.jvp(ours, (x,), (2 * jnp.ones_like(x),))
    np.testing.assert_allclose(pushed, 2 * slope(X), atol=6e-6)
    # The derivative of the derivative, where differences of float64 can tell it.
    second = jax.vmap(jax.grad(jax.grad(ours)))(x)
    np.testing.assert_allclose(second, (slope(X + 1e-5) - slope(X - 1e-5)) / 2e-5, atol=3e-5)
    half = jax.vmap(jax.grad(ours))(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    exact = slope(np.asarray(x.astype(jnp.bfloat16), np.float64))
    np.testing.assert_allclose(np.asarray(half, np.float64), exact, atol=4e-3)


EPSILON = 1e-2


def normalized(x, scale, centred):
    """Of float64, the plain formula."""
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale


@pytest.mark.slow
@pytest.mark.parametrize("centred", [True, False])
def test_norms_have_their_derivative(centred):
    def ours(x, scale):
        return functions.normalize(x, scale, EPSILON, centred)

    rng = np.random.default_rng(0)
    x, scale, to_x, to_scale, back = (
        rng.normal(0.3, 1.0, shape) for shape in [(3, 5, 7), 7, (3, 5, 7), 7, (3, 5, 7)]
    )
    single = [jnp.asarray(value, jnp.float32) for value in (x, scale, to_x, to_scale, back)]
    np.testing.assert_allclose(ours(*single[:2]), normalized(x, scale, centred), atol=1e-5)

    def difference(to_x, to_scale, step=1e-6):
        ends = (normalized(x + e * to_x, scale + e * to_scale, centred) for e in (step, -step))
        return (next(ends) - next(ends)) / (2 * step)

    expected = difference(to_x, to_scale)
    _, pushed = jax.jvp(ours, single[:2], single[2:4])
    np.testing.assert_allclose(pushed, expected, atol=1e-5)
    found = jax.vjp(ours, *single[:2])[1](single[4])
    np.testing.assert_allclose(
        sum(float(jnp.vdot(a, b)) for a, b in zip(found, single[2:4], strict=True)),
        np.vdot(back, expected),
        rtol=1e-5,
    )
    # One of the two alone, as where the other is frozen.
    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.vdot(ours(x, single[1]), single[4]))(single[0]), found[0], atol=1e-6
    )
    np.testing.assert_allclose(
        jax.grad(lambda s: jnp.vdot(ours(single[0], s), single[4]))(single[1]), found[1], rtol=1e-6
    )

    def bent(x):
        return jnp.vdot(jax.grad(lambda x: jnp.sum(ours(x, single[1]) ** 3))(x), single[2])

    _, second = jax.jvp(bent, single[:1], single[2:3])
    jax.config.update("jax_enable_x64", True)
    try:
        third = [jnp.asarray(value, jnp.float64) for value in (x, scale, to_x)]

        def cubed(e):
            y = third[0] + e * third[2]
            y = y - y.mean(-1, keepdims=True) if centred else y
            y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + EPSILON) * third[1]
            return jnp.sum(y**3)

        np.testing.assert_allclose(second, jax.grad(jax.grad(cubed))(0.0), rtol=1e-4)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_a_constant_row_has_no_negative_variance():
    x = jnp.full((1, 7), 333.3)
    assert float(jnp.square(x).mean() - jnp.square(x.mean())) < -1e-3  # by cancellation
    assert np.abs(functions.normalize(x, jnp.ones(7), 1e-5, True)).max() < 0.1


@pytest.mark.slow
@pytest.mark.witness("float32-bfloat16")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16])
def test_norms_are_flax_s(dtype, given):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(0.3, 1.0, (3, 5, 7)), given)
    types = {"epsilon": EPSILON, "dtype": dtype, "param_dtype": given}
    params = {name: jnp.asarray(rng.normal(1, 1, 7), given) for name in ("scale", "bias")}
    layer, theirs = LayerNorm(**types), nn.LayerNorm(**types)
    like = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, layer.init(jax.random.key(0), x), like)
    pairs = [(m.apply, ({"params": params}, x)) for m in (layer, theirs)]
    rms = [kind(7, rngs=nnx.Rngs(0), **types) for kind in (RMSNorm, nnx.RMSNorm)]
    for norm in rms:
        norm.scale.set_value(params["scale"])
    for pair in (pairs, [(norm, (x,)) for norm in rms]):
        found, expected = (jax.jit(call)(*given) for call, given in pair)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)

    def slopes(apply):
        def loss(params, x):
            return jnp.sum(jnp.sin(3 * apply({"params": params}, x).astype(jnp.float32)))

        return jax.tree.leaves(jax.grad(loss, (0, 1))(params, x))

    for found, expected in zip(*(slopes(apply) for apply, _ in pairs), strict=True):
        assert found.dtype == expected.dtype == given
        found, expected = (np.asarray(value, np.float32) for value in (found, expected))
        close = 1e-5 if given == jnp.float32 else 2**-7
        np.testing.assert_allclose(found, expected, rtol=close, atol=close)


@pytest.mark.slow
def test_a_gate_has_its_derivative():
    rng = np.random.default_rng(3)
    gate, x, back = (rng.normal(0, 3, (4, 6)) for _ in range(3))
    single = [jnp.asarray(value, jnp.float32) for value in (gate, x, back)]
    for name, part, slope in (
        ("silu", expit, silu_slope),
        ("gelu", ndtr, gelu_slope),
        ("relu", lambda g: g > 0, lambda g: g > 0),
    ):

        def ours(gate, x, name=name):
            return functions.gated(functions.ACTIVATIONS[name], gate, x)

        np.testing.assert_allclose(ours(*single[:2]), gate * part(gate) * x, atol=1e-5)
        found = jax.vjp(ours, *single[:2])[1](single[2])
        np.testing.assert_allclose(found[0], back * slope(gate) * x, atol=2e-5)
        np.testing.assert_allclose(found[1], back * gate * part(gate), atol=2e-5)
        halves = [value.astype(jnp.bfloat16) for value in single]
        half = jax.vjp(ours, *halves[:2])[1](halves[2])
        assert {value.dtype for value in half} == {jnp.dtype(jnp.bfloat16)}
        g, _, b = (np.asarray(value, np.float64) for value in halves)
        np.testing.assert_allclose(
            np.asarray(half[1], np.float64), b * g * part(g), rtol=2**-7, atol=2e-3
        )


@pytest.mark.slow
def test_softmax_has_its_derivative():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 7)), jnp.float32)
    np.testing.assert_array_equal(functions.softmax(x), jax.nn.softmax(x))
    p = np.exp(np.asarray(x, np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = np.einsum("bi,ij->bij", p, np.eye(7)) - np.einsum("bi,bj->bij", p, p)
    found = jax.vmap(jax.jacrev(functions.softmax))(x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(functions.softmax))(x), expected, atol=1e-6)


def test_a_sink_takes_its_share_of_the_softmax_and_of_its_derivative():
    rng = np.random.default_rng(0)
    x, sink = (jnp.asarray(rng.normal(0, 3, shape), jnp.float32) for shape in ((4, 7), (4, 1)))
    whole = np.concatenate([x, sink], axis=1).astype(np.float64)
    p = np.exp(whole) / np.exp(whole).sum(-1, keepdims=True)
    np.testing.assert_allclose(functions.softmax_beside(x, sink), p[:, :-1], atol=1e-6)
    slopes = np.einsum("bi,ij->bij", p, np.eye(8)) - np.einsum("bi,bj->bij", p, p)
    for differentiate in (jax.jacrev, jax.jacfwd):
        of_x, of_sink = jax.vmap(differentiate(functions.softmax_beside, (0, 1)))(x, sink)
        np.testing.assert_allclose(of_x, slopes[:, :-1, :-1], atol=1e-6)
        np.testing.assert_allclose(of_sink, slopes[:, :-1, -1:], atol=1e-6)


@pytest.mark.slow
def test_attention_with_sinks_is_attention_to_a_further_key_without_a_value():
    query, key, value, mask = drawn(3)
    sinks = jnp.asarray(np.random.default_rng(2).normal(0, 2, 6), jnp.float32)
    zeros = jnp.zeros((2, 1, 3, 8))
    longer = (jnp.concatenate([x, zeros], axis=1) for x in (key, value))
    seen = jnp.concatenate([mask, jnp.ones((2, 1, 5, 1), bool)], axis=-1)
    bias = jnp.zeros((1, 6, 1, 8)).at[..., -1].set(sinks[:, None])
    expected = functions.dot_product_attention(query, *longer, mask=seen, bias=bias)
    found = functions.dot_product_attention(query, key, value, mask=mask, sinks=sinks)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - functions.dot_product_attention(query, key, value, mask=mask)).max() > 0.1


def drawn(kv_heads, dtype=jnp.float32):
    shapes = {"query": (2, 5, 6, 8), "key": (2, 7, kv_heads, 8), "value": (2, 7, kv_heads, 8)}
    rng = np.random.default_rng(1)
    parts = [jnp.asarray(rng.normal(0, 1.5, shape), dtype) for shape in shapes.values()]
    mask = jnp.asarray(rng.random((2, 1, 5, 7)) < 0.6).at[..., 0].set(True)
    return (*parts, mask)


@pytest.mark.slow
@pytest.mark.witness("3")
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_attention_is_flax_s(kv_heads):
    query, key, value, mask = drawn(kv_heads)

    def weighed(attention):
        def loss(query, key, value):
            return jnp.sum(jnp.sin(attention(query, key, value, mask=mask)))

        return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

    for found, expected in zip(
        jax.tree.leaves(weighed(functions.dot_product_attention)),
        jax.tree.leaves(weighed(nnx.dot_product_attention)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_attention_drops_as_flax_does():
    *parts, mask = drawn(6)
    options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.4, "deterministic": False}
    for broadcast in (False, True):
        options |= {"broadcast_dropout": broadcast, "mask": mask}
        ours = functions.dot_product_attention(*parts, **options)
        np.testing.assert_allclose(ours, nn.dot_product_attention(*parts, **options), atol=1e-5)
    still = functions.dot_product_attention(*parts, **{**options, "deterministic": True})
    assert np.abs(ours - still).max() > 0.1


def test_attention_in_half_precision_has_a_softmax_in_float32(monkeypatch):
    *parts, mask = drawn(3, jnp.bfloat16)
    softmax, dtypes = functions.softmax, []
    monkeypatch.setattr(functions, "softmax", lambda x: dtypes.append(x.dtype) or softmax(x))
    found = functions.dot_product_attention(*parts, mask=mask)
    assert dtypes == [jnp.float32]
    assert found.dtype == jnp.bfloat16
    exact = functions.dot_product_attention(*(x.astype(jnp.float32) for x in parts), mask=mask)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=1e-2, atol=2e-2)


def kept(layer, layers=(6, 14)):
    """Arrays of the layer's input's size that a layer holds, by XLA's plan of a net's gradient."""

    def temporary(layers):
        def loss(x, kernels):
            for _ in range(layers):
                x = layer(x, *kernels)
            return jnp.sum(x**2)

        kernels = [jnp.zeros((256, 256)) for _ in range(3)]
        x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(x, kernels).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (512 * 256 * 4)

    return (temporary(layers[1]) - temporary(layers[0])) / (layers[1] - layers[0])


@pytest.mark.witness("gelu")
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_an_activation_keeps_its_input_alone(name):
    ours, theirs, _ = CASES[name]
    assert kept(lambda x, a, b, c: ours(x @ a)) < 1.2
    assert kept(lambda x, a, b, c: theirs(x @ a)) > 1.7


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_norm_keeps_its_input_alone():
    def ours(x, a, b, c):
        return functions.normalize(x @ a, b[0], EPSILON, True) + c[0]

    def theirs(x, a, b, c):
        params = {"scale": b[0], "bias": c[0]}
        return nn.LayerNorm(EPSILON).apply({"params": params}, x @ a)

    assert kept(ours) < 1.2
    assert kept(theirs) > 1.7


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_gate_keeps_what_it_multiplies_alone():
    def ours(x, a, b, c):
        return functions.gated(functions.silu, x @ a, x @ b) @ c

    def theirs(x, a, b, c):
        return (functions.silu(x @ a) * (x @ b)) @ c

    assert kept(ours) < 2.2
    assert kept(theirs) > 2.7
