"""The bottleneck adapter against formulas in numpy, as a method and written in by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import InvalidRngError
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.methods.bottleneck import ACTIVATIONS
from adapters_jax.placement import Visit
from adapters_jax.trace.calls import Returned
from adapters_jax.trees import flatten, path_of

D, M = 6, 3
POINT = AttachmentPoint("output", "layer_0/mlp", width=D)
LEAVES = {
    "down/kernel": drawn((D, M), 1),
    "down/bias": drawn((M,), 2),
    "up/kernel": drawn((M, D), 3),
    "up/bias": drawn((D,), 4),
}
FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "identity": lambda x: x,
}


def branch(x, activation="gelu", leaves=LEAVES):
    """up(f(down(x))) in float64."""
    down, down_bias, up, up_bias = (double(leaf) for leaf in leaves.values())
    return FORMULAS[activation](double(x) @ down + down_bias) @ up + up_bias


def layer_norm(x, scale=1.0, bias=0.0, epsilon=1e-5):
    """In float64."""
    centred = double(x) - double(x).mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


NORM = {
    f"{name}/{part}": drawn((D,), 7 + i)
    for i, (name, part) in enumerate(
        (name, part) for name in ("norm_before", "norm_after") for part in ("scale", "bias")
    )
}


def test_every_activation_has_a_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequential(activation):
    x, y = drawn((2, 5, D), 5), drawn((2, 5, D), 6)
    method = aj.Bottleneck("**", M, activation=activation)
    got = method.forward(LEAVES, POINT, x, jnp.asarray(y))
    np.testing.assert_allclose(got, y + branch(y, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [4.0, 1.0, -0.5, 0.0])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_placement_and_scale(placement, scale):
    x, y = drawn((2, 5, D), 5), drawn((2, 5, D), 6)
    method = aj.Bottleneck("**", M, placement=placement, scale=scale, activation="relu")
    got = method.forward(LEAVES, POINT, x, jnp.asarray(y))
    source = y if placement == "sequential" else x
    np.testing.assert_allclose(got, y + scale * branch(source, "relu"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_norms_of_its_own(placement, before, after):
    x, y = 3 + 2 * drawn((2, 5, D), 5), drawn((2, 5, D), 6)
    method = aj.Bottleneck(
        "**", M, placement=placement, scale=0.5, norm_before=before, norm_after=after
    )
    expected = x if placement == "parallel" else y
    if before:
        expected = layer_norm(expected, NORM["norm_before/scale"], NORM["norm_before/bias"])
    expected = 0.5 * branch(expected)
    if after:
        expected = layer_norm(expected, NORM["norm_after/scale"], NORM["norm_after/bias"])
    got = method.forward(LEAVES | NORM, POINT, x, jnp.asarray(y))
    np.testing.assert_allclose(got, y + expected, rtol=1e-5, atol=1e-5)
    assert set(method.leaves(POINT)) == set(method.leaf_names)
    shapes = {name: leaf.shape for name, leaf in method.leaves(POINT).items()}
    count = method.count("", shapes, None)
    wide = {0: "6", 1: "3*6", 2: "5*6"}[before + after]
    assert count.formula == f"2*6*3 + {wide} + 3"
    assert count.parameters == sum(math.prod(shape) for shape in shapes.values())


def test_norms_of_its_own_start_as_plain_ones():
    leaves = aj.Bottleneck("**", M, norm_before=True, norm_after=True).leaves(POINT)
    for name in ("norm_before", "norm_after"):
        for part, value in (("scale", 1.0), ("bias", 0.0)):
            leaf = leaves[f"{name}/{part}"]
            np.testing.assert_array_equal(leaf.init(jax.random.key(0), leaf.shape), value)
    with raises(aj.UserError, "norm_before=1"):
        aj.Bottleneck("**", M, norm_before=1)


class Norms(nn.Module):
    """A layer norm called by position, and one by name."""

    @nn.compact
    def __call__(self, x):
        first = nn.LayerNorm(epsilon=1e-3, name="first")(x)
        return nn.LayerNorm(epsilon=1e-3, name="second")(x=first)


class NnxNorms(nnx.Module):
    def __init__(self):
        self.first = nnx.LayerNorm(D, epsilon=1e-3, rngs=nnx.Rngs(0))
        self.second = nnx.LayerNorm(D, epsilon=1e-3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.second(x=self.first(x))


def test_around_a_norm():
    """norm(x + branch(norm(x))), in both APIs."""
    x = drawn((2, 4, D), 5)
    recipe = aj.Recipe(aj.Bottleneck("*", M, placement="norm", scale=0.5, activation="tanh"))
    model = aj.adapt(Norms(), recipe)
    params = drawn_like(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    expected = double(x)
    for name in ("first", "second"):
        own = params[name]
        norm = lambda x, own=own: layer_norm(x, own["scale"], own["bias"], 1e-3)  # noqa: E731
        leaves = {leaf: own["adapter"][leaf.split("/")[0]][leaf.split("/")[1]] for leaf in LEAVES}
        expected = norm(expected + 0.5 * branch(norm(expected), "tanh", leaves))
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)

    grown = aj.adapt(NnxNorms(), recipe, rngs=nnx.Rngs(0))
    whole = {path: jnp.asarray(leaf) for path, leaf in flatten(params).items()}
    state = nnx.state(grown, nnx.Param)
    nnx.update(grown, jax.tree_util.tree_map_with_path(lambda p, _: whole[path_of(p)], state))
    np.testing.assert_allclose(grown(x), expected, rtol=1e-4, atol=1e-4)


def test_around_a_norm_the_target_has_to_be_one():
    model = aj.adapt(nn.Dense(D), aj.Bottleneck("**", M, placement="norm"))
    with raises(aj.TargetError, "Dense"):
        jax.eval_shape(model.init, jax.random.key(0), drawn((2, D)))
    method, x, y = aj.Bottleneck("**", M, placement="norm"), drawn((2, D), 3), drawn((2, D), 4)
    assert method.changes_input and not aj.Bottleneck("**", M).changes_input
    got = method.forward(LEAVES, POINT, jnp.asarray(x), jnp.asarray(y))  # the norm's input
    np.testing.assert_allclose(got, x + branch(y), rtol=1e-5, atol=1e-5)


def test_any_number_of_leading_axes():
    for shape in ((D,), (4, D), (2, 1, 3, D)):
        y = drawn(shape, 6)
        got = aj.Bottleneck("**", M).forward(LEAVES, POINT, None, jnp.asarray(y))
        np.testing.assert_allclose(got, y + branch(y), rtol=1e-5, atol=1e-5)


def test_kernels_start_truncated_at_two_deviations_and_biases_at_zero():
    std, point = 0.03, AttachmentPoint("output", "", width=300)
    leaves = aj.Bottleneck("**", 200, init_std=std).leaves(point)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "down/kernel": (300, 200),
        "down/bias": (200,),
        "up/kernel": (200, 300),
        "up/bias": (300,),
    }
    for name, leaf in leaves.items():
        value = double(leaf.init(jax.random.key(0), leaf.shape))
        if name.endswith("bias"):
            assert not value.any()
            continue
        assert 1.98 * std < np.abs(value).max() <= 2 * std
        assert abs(value.mean()) < 0.01 * std
        # A Gaussian cut at two of its deviations has 0.8796 of them left.
        assert abs(value.std() - 0.8796 * std) < 0.005 * std


def test_it_starts_near_the_identity():
    y = drawn((50, 128), 5)
    method = aj.Bottleneck("**", 16)
    leaves = {
        name: leaf.init(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(
            method.leaves(AttachmentPoint("output", "", width=128)).items()
        )
    }
    change = double(method.forward(leaves, POINT, y, jnp.asarray(y))) - y
    assert 0 < np.abs(change).max() < 0.05


@pytest.mark.parametrize(
    ("factor", "d", "m"),
    [(16, 768, 48), (10, 768, 76), (2.5, 7, 2), (16, 8, 1), (1e9, 8, 1), (0.5, 8, 16)],
)
def test_the_reduction_factor_rounds_down_to_at_least_one(factor, d, m):
    method = aj.Bottleneck("**", reduction_factor=factor)
    assert method.width(d) == m
    assert method.leaves(AttachmentPoint("output", "", width=d))["down/kernel"].shape == (d, m)


def test_counts():
    assert aj.bottleneck_parameters(1024, 64) == 132_160
    assert aj.bottleneck_parameters(768, 64) == 99_136
    held = sum(math.prod(leaf.shape) for leaf in aj.Bottleneck("**", M).leaves(POINT).values())
    assert aj.bottleneck_parameters(D, M) == held == 2 * D * M + D + M


class Widen(nn.Module):
    """A model with a layer whose output is wider than its input."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D + 1, name="dense")(x)


def test_a_parallel_adapter_needs_an_output_as_wide_as_the_input():
    x = drawn((2, D))
    model = aj.adapt(Widen(), aj.Bottleneck("dense", M, placement="parallel"))
    with raises(aj.RecipeError, "parallel", "'dense'", "(2, 6)", "(2, 7)"):
        jax.eval_shape(model.init, jax.random.key(0), x)
    method = aj.Bottleneck("**", M, placement="parallel")
    for nothing in (None, (x, x)):
        with raises(aj.RecipeError, type(nothing).__name__, "(2, 6)"):
            method.forward(LEAVES, POINT, nothing, x)


def test_a_target_that_returns_a_tuple_is_refused_with_the_reason():
    model = aj.adapt(nn.RNN(nn.SimpleCell(3), return_carry=True), aj.Bottleneck("**/cell", M))
    with raises(aj.TargetError, "cell (SimpleCell "):
        jax.eval_shape(model.init, jax.random.key(0), drawn((1, 2, D)))


def test_it_fits_float_outputs_of_any_width():
    method = aj.Bottleneck("**", M)
    outputs = [jax.ShapeDtypeStruct((2, d), jnp.float32) for d in (0, 1, 2)]
    points = [Visit("up", returned=Returned.of(None, y)).point(method) for y in outputs]
    assert [point and (point.kind, point.path, point.width) for point in points] == [
        None,
        ("output", "up", 1),
        ("output", "up", 2),
    ]


def test_integer_outputs_are_refused():
    class Index(nn.Module):
        def __call__(self, x):
            return jnp.argmax(x, -1)

    model = aj.adapt(Index(), aj.Bottleneck("**", M))
    with raises(aj.TargetError, "(the model itself) (Index "):
        jax.eval_shape(model.init, jax.random.key(0), drawn((2, D)))


def test_half_precision_stays_and_parameters_are_kept_in_full():
    x = jnp.asarray(drawn((4, D), 1), jnp.bfloat16)
    model = aj.adapt(nn.Dense(D, dtype=jnp.bfloat16), aj.Bottleneck("**", M))
    base = jax.eval_shape(nn.Dense(D).init, jax.random.key(0), x)["params"]
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    abstract = aj.init_adapters(model, base, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract["adapter"])} == {jnp.dtype("float32")}
    assert abstract["kernel"].dtype == jnp.bfloat16
    params = drawn_like(abstract)
    y = model.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    adapter = params["adapter"]
    leaves = {
        f"{side}/{leaf}": adapter[side][leaf]
        for side in ("down", "up")
        for leaf in ("kernel", "bias")
    }
    plain = double(x) @ double(params["kernel"]) + double(params["bias"])
    np.testing.assert_allclose(double(y), plain + branch(plain, leaves=leaves), rtol=0.1, atol=0.3)


def test_dropout_acts_between_the_projections():
    """With identities for projections the hidden entries can be read off the output."""
    leaves = {
        "down/kernel": np.eye(D, dtype=np.float32),
        "down/bias": np.zeros(D, np.float32),
        "up/kernel": np.eye(D, dtype=np.float32),
        "up/bias": np.full(D, 0.5, np.float32),
    }
    method = aj.Bottleneck("**", D, activation="identity", dropout=0.25)
    y = jnp.ones((2000, D))
    evaluated = method.forward(leaves, POINT, None, y)
    np.testing.assert_allclose(evaluated, np.full((2000, D), 2.5), rtol=1e-6)
    trained = np.asarray(method.forward(leaves, POINT, None, y, jax.random.key(0)))
    kept = np.isclose(trained, 1.5 + 1 / 0.75, atol=1e-5)
    assert (kept | np.isclose(trained, 1.5, atol=1e-5)).all()
    assert abs(kept.mean() - 0.75) < 0.02
    assert abs(trained.mean() - 2.5) < 0.03


@pytest.mark.parametrize("fields", [{}, {"scale": 4.0, "activation": "relu"}])
def test_by_hand_it_is_the_same_arithmetic(fields):
    x, y = drawn((2, D), 5), drawn((2, D), 6)
    nested = {
        "down": {"kernel": LEAVES["down/kernel"], "bias": LEAVES["down/bias"]},
        "up": {"kernel": LEAVES["up/kernel"], "bias": LEAVES["up/bias"]},
    }
    scale, activation = fields.get("scale", 1.0), fields.get("activation", "gelu")
    expected = x + scale * branch(x, activation), y + scale * branch(x, activation)
    module = aj.linen.Bottleneck(M, **fields)
    got = module.apply({"params": nested}, x)
    np.testing.assert_allclose(got, expected[0], rtol=1e-5, atol=1e-5)
    got = module.apply({"params": nested}, x, y)
    np.testing.assert_allclose(got, expected[1], rtol=1e-5, atol=1e-5)

    other = aj.nnx.Bottleneck(D, M, rngs=nnx.Rngs(0), **fields)
    for side in ("down", "up"):
        for leaf in ("kernel", "bias"):
            getattr(other, side)[leaf][...] = nested[side][leaf]
    np.testing.assert_allclose(other(x), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other(x, y), expected[1], rtol=1e-5, atol=1e-5)


def test_by_hand_in_linen_dropout_follows_the_key_and_the_flag():
    module = aj.linen.Bottleneck(M, dropout=0.5)
    x = drawn((2, D), 5)
    params = drawn_like(jax.eval_shape(module.init, jax.random.key(0), x))
    rngs = {"dropout": jax.random.key(1)}
    plain = module.apply(params, x)
    np.testing.assert_array_equal(module.apply(params, x, deterministic=True, rngs=rngs), plain)
    dropped = module.apply(params, x, rngs=rngs)
    assert np.abs(dropped - plain).max() > 0.1
    again = module.apply(params, x, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(again, dropped)
    with raises(InvalidRngError, "dropout"):
        module.apply(params, x, deterministic=False)
