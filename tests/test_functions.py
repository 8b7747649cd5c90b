"""Attention and activations of our models: values, derivatives, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from scipy.special import expit, ndtr

from adapters_jax.models import functions

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


def test_softmax_has_its_derivative():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, 7)), jnp.float32)
    np.testing.assert_array_equal(functions.softmax(x), jax.nn.softmax(x))
    p = np.exp(np.asarray(x, np.float64))
    p /= p.sum(-1, keepdims=True)
    wanted = np.einsum("bi,ij->bij", p, np.eye(7)) - np.einsum("bi,bj->bij", p, p)
    found = jax.vmap(jax.jacrev(functions.softmax))(x)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(functions.softmax))(x), wanted, atol=1e-6)


def drawn(kv_heads, dtype=jnp.float32):
    shapes = {"query": (2, 5, 6, 8), "key": (2, 7, kv_heads, 8), "value": (2, 7, kv_heads, 8)}
    rng = np.random.default_rng(1)
    parts = [jnp.asarray(rng.normal(0, 1.5, shape), dtype) for shape in shapes.values()]
    mask = jnp.asarray(rng.random((2, 1, 5, 7)) < 0.6).at[..., 0].set(True)
    return (*parts, mask)


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_attention_is_flax_s(kv_heads):
    query, key, value, mask = drawn(kv_heads)

    def weighed(attention):
        def loss(query, key, value):
            return jnp.sum(jnp.sin(attention(query, key, value, mask=mask)))

        return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

    for found, wanted in zip(
        jax.tree.leaves(weighed(functions.dot_product_attention)),
        jax.tree.leaves(weighed(nnx.dot_product_attention)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_attention_drops_as_flax_does():
    *parts, mask = drawn(6)
    options = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.4, "deterministic": False}
    for broadcast in (False, True):
        options |= {"broadcast_dropout": broadcast, "mask": mask}
        ours = functions.dot_product_attention(*parts, **options)
        np.testing.assert_allclose(ours, nn.dot_product_attention(*parts, **options), atol=1e-5)
    still = functions.dot_product_attention(*parts, **{**options, "deterministic": True})
    assert np.abs(ours - still).max() > 0.1


def test_attention_in_half_precision_has_a_softmax_in_float32():
    *parts, mask = drawn(3, jnp.bfloat16)
    found = functions.dot_product_attention(*parts, mask=mask)
    assert found.dtype == jnp.bfloat16
    exact = functions.dot_product_attention(*(x.astype(jnp.float32) for x in parts), mask=mask)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=1e-2, atol=2e-2)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_an_activation_keeps_its_input_alone(name):
    """By XLA's plan of a frozen net's gradient, a layer holds one array and not two or more."""

    def temporary(activation, layers):
        def loss(x, kernel):
            for _ in range(layers):
                x = activation(x @ kernel)
            return jnp.sum(x)

        shapes = jax.ShapeDtypeStruct((512, 256), jnp.float32), jnp.zeros((256, 256))
        compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (512 * 256 * 4)

    def a_layer(activation):
        return (temporary(activation, 14) - temporary(activation, 6)) / 8

    ours, theirs, _ = CASES[name]
    assert a_layer(ours) < 1.2
    assert a_layer(theirs) > 1.7
