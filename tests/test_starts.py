"""Starts of LoRA from both weights and from activations: plain formulas, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.weights.quantized import is_quantized

IN, OUT, R, ALPHA = 32, 24, 3, 6.0
X = drawn((5, IN))
ROUNDS = {"loftq": 1, "loftq_5": 5}


def loftq(start="loftq"):
    return aj.LoRA("**", R, ALPHA, a_init=start)


def numpy_rounds(weight, rounds, quantize):
    """LoftQ's algorithm: the product s A B and the quantised weight, in float64."""
    product = np.zeros_like(weight)
    for _ in range(rounds):
        stored = quantize(weight - product)
        u, s, v = np.linalg.svd(weight - stored)
        product = (u[:, :R] * s[:R]) @ v[:R]
    return product, stored


@pytest.mark.parametrize("start", ROUNDS)
@pytest.mark.parametrize("dtype", ["int4", "nf4", "int8"])
def test_loftq_starts_at_what_quantising_rounds_away(start, dtype):
    block = {} if dtype == "int8" else {"block": 8}
    weight = drawn((IN, OUT))

    def quantize(floats):
        tree = {"kernel": jnp.float32(floats)}
        return double(
            aj.quantize(nn.Dense(OUT, False), tree, X, dtype=dtype, **block)["kernel"].unbox()
        )

    model = aj.adapt(nn.Dense(OUT, False), loftq(start))
    params = aj.init_adapters(model, {"kernel": weight}, jax.random.key(0), X)
    assert not np.any(params["lora"]["a"]) and not np.any(params["lora"]["b"])
    small = aj.quantize(model, params, X, dtype=dtype, **block)
    product, stored = numpy_rounds(double(weight), ROUNDS[start], quantize)
    a, b = (double(small["lora"][name]) for name in "ab")
    # qwix's integers round the largest number of a block at a tie, which the last bit decides.
    if start == "loftq" or dtype == "nf4":
        np.testing.assert_allclose(small["kernel"].unbox(), stored, atol=1e-5)
        np.testing.assert_allclose(ALPHA / R * a @ b, product, atol=1e-5)
    expected = np.linalg.norm(double(weight) - stored - product)
    # Without A B the error is all singular values of W - Q, with it those after the first r.
    error = double(weight) - double(small["kernel"].unbox())
    s, left = np.linalg.svd(error)[1], np.linalg.norm(error - ALPHA / R * a @ b)
    np.testing.assert_allclose(left, np.sqrt(np.sum(s[R:] ** 2)), rtol=1e-4)
    plain = double(weight) - quantize(weight)
    assert left < np.linalg.norm(plain)
    np.testing.assert_allclose(left, expected, rtol=0.05)
    expected = double(X) @ weight
    error = np.linalg.norm(model.apply({"params": small}, X) - expected)
    assert error < 0.95 * np.linalg.norm(double(X) @ plain)

    other = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    other.kernel[...] = jnp.asarray(weight)
    other = aj.quantize(aj.adapt(other, loftq(start), rngs=nnx.Rngs(1)), dtype=dtype, **block)
    np.testing.assert_allclose(other(X), model.apply({"params": small}, X), atol=1e-4)
    again = aj.quantize(model, {**params, "lora": {"a": a + 1, "b": b}}, X, dtype=dtype, **block)
    np.testing.assert_allclose(again["lora"]["a"], a + 1)
    np.testing.assert_array_equal(again["kernel"].unbox(), small["kernel"].unbox())


def test_a_file_of_loftq_gives_its_model_again_on_the_float_base(tmp_path):
    weight, method = {"kernel": jnp.asarray(drawn((IN, OUT)))}, loftq("loftq_5")
    model = aj.adapt(nn.Dense(OUT, False), method)
    params = aj.init_adapters(model, weight, jax.random.key(0), X)
    params = aj.quantize(model, params, X, dtype="nf4", block=8)
    params = {**params, "lora": jax.tree.map(lambda x: x + 0.1, params["lora"])}
    expected = model.apply({"params": params}, X)
    aj.save_adapter(tmp_path / "a", aj.partition(params, method)[0], method)
    again, loaded = aj.load_adapter(tmp_path / "a", nn.Dense(OUT, False), weight, X)
    loaded = aj.quantize(again, loaded, X, dtype="nf4", block=8)
    np.testing.assert_allclose(again.apply({"params": loaded}, X), expected, atol=1e-5)
    small = aj.quantize(nn.Dense(OUT, False), weight, X, dtype="nf4", block=8)
    with raises(aj.RecipeError, "quantised", "a_init='gaussian'", "adapt the float base first"):
        aj.load_adapter(tmp_path / "a", nn.Dense(OUT, False), small, X)


def test_each_layer_of_a_stack_and_each_expert_has_its_own_loftq():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum(
                "ecd,edf->ecf", x, self.param("w", nn.initializers.ones, (2, IN, OUT))
            )

    x, weight = drawn((2, 4, IN)), drawn((2, IN, OUT))
    model = aj.adapt(Experts(), loftq())
    params = aj.init_adapters(model, {"w": weight}, jax.random.key(0), x)
    params = aj.quantize(model, params, x, dtype="int4", block=8)
    error = double(weight) - double(params["w"].unbox())
    for expert in range(2):
        a, b = (double(params["lora"][name])[expert] for name in "ab")
        u, s, v = np.linalg.svd(error[expert])
        np.testing.assert_allclose(ALPHA / R * a @ b, (u[:, :R] * s[:R]) @ v[:R], atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "loftq_5"])
def test_a_quantised_base_says_which_starts_it_can_have(start):
    weight = {"kernel": drawn((IN, OUT))}
    small = aj.quantize(nn.Dense(OUT, False), weight, X, dtype="int8")
    model = aj.adapt(nn.Dense(OUT, False), loftq(start))
    data = (
        "''",
        "quantised",
        "a_init='gaussian'",
        "a_init='uniform'",
        "adapt the float base first",
    )
    with raises(aj.RecipeError, *data):
        aj.init_adapters(model, small, jax.random.key(0), X)
    other = aj.quantize(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), dtype="int8")
    with raises(aj.RecipeError, *data):
        aj.adapt(other, loftq(start), rngs=nnx.Rngs(1))


def test_a_weight_that_stays_in_floats_cannot_start_so():
    model = aj.adapt(nn.Sequential([nn.Dense(8), nn.Dense(8)]), loftq())
    base = jax.eval_shape(lambda: model.inner.init(jax.random.key(0), X)["params"])
    params = aj.init_adapters(model, base, jax.random.key(0), X)
    with raises(aj.RecipeError, "'layers_1'", "a_init='loftq'", "aj.quantize"):
        aj.quantize(model, params, X, targets="layers_0")
    whole = aj.quantize(model, params, X, dtype="nf4", block=4)
    assert is_quantized(whole["layers_1"]["kernel"])
