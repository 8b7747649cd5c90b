"""Merging against sums in float64: every layer kind, stacked layers, half precision, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like, shapes
from helpers.errors import raises

import adapters_jax as aj

D, R, SCALE = 4, 2, 1.5
KEY = jax.random.key(0)
X = drawn((2, 3, D), 1)
IDS = np.array([[0, 6, 2], [2, 5, 6]])


def lora(targets="**", **fields):
    return aj.LoRA(targets, R, SCALE * R, **fields)


def grown(base, recipe, *args, dtype=None):
    """An adapted model and drawn parameters, the base's in a dtype of its own."""
    shape = jax.eval_shape(base.init, KEY, *args)["params"]
    if dtype is not None:
        shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shape)
    model = aj.adapt(base, recipe)
    return model, drawn_like(aj.init_adapters(model, shape, KEY, *args))


def product(a, b, order=None):
    """scale * A B, its axes put in the weight's order; `order` may be their equation."""
    a, b = double(a), double(b)
    if isinstance(order, str):
        return SCALE * np.einsum(order, a, b)
    ab = SCALE * (a.reshape(-1, R) @ b.reshape(R, -1)).reshape(a.shape[:-1] + b.shape[1:])
    return ab if order is None else ab.transpose(order)


KINDS = {
    "dense": (nn.Dense(5), X, "kernel", None),
    "general_out": (nn.DenseGeneral((5, 2)), X, "kernel", None),
    "general_in": (nn.DenseGeneral(5, axis=(-2, -1)), X, "kernel", None),
    "general_batch": (nn.DenseGeneral(5, batch_dims=(0,)), X, "kernel", "bir,bro->bio"),
    "einsum": (nn.Einsum((D, 5), "btd,df->btf"), X, "kernel", None),
    "einsum_outputs_first": (nn.Einsum((5, D, 3), "btd,ndh->btnh"), X, "kernel", (1, 0, 2)),
    "einsum_square_turned": (nn.Einsum((D, D), "btd,fd->btf"), X, "kernel", (1, 0)),
    "conv": (nn.Conv(5, (3,)), X, "kernel", None),
    "conv2": (nn.Conv(5, (3, 2)), drawn((2, 5, 4, 3), 1), "kernel", None),
    "embed": (nn.Embed(7, D), IDS, "embedding", None),
}


def pairs(node):
    """The factors in a node, also where the roles of axes are written beside them."""
    return [node] if "a" in node else list(node.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_of_every_layer_kind(kind):
    base, x, weight, order = KINDS[kind]
    if isinstance(base, nn.Einsum):
        base = base.clone(use_bias=False)
    model, params = grown(base, lora(), x)
    before = jax.tree.map(np.copy, params)
    merged = aj.merge(model, params, x)
    assert merged.keys() == params.keys() - {"lora"}
    (pair,) = pairs(params["lora"])
    expected = double(params[weight]) + product(pair["a"], pair["b"], order)
    np.testing.assert_allclose(merged[weight], expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected - double(params[weight])).mean() > 0.3
    if "bias" in params:
        assert merged["bias"] is params["bias"]
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(before)))
    got = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(
        jax.jit(base.apply)({"params": merged}, x), got, rtol=1e-4, atol=1e-4
    )


def test_square_weights_of_an_einsum_are_folded_the_right_way_round_in_nnx_too():
    for equation, order in (("bd,df->bf", None), ("bd,fd->bf", (1, 0))):
        base = nnx.Einsum(equation, (D, D), rngs=nnx.Rngs(0))
        model = aj.adapt(base, lora(), rngs=nnx.Rngs(1))
        lora_node = model.lora if order is None else model.lora[":1>0"]
        lora_node["b"][...] = drawn((R, D), 2)
        merged = aj.merge(model)
        change = product(lora_node["a"][...], lora_node["b"][...], order)
        got = double(merged.kernel[...])
        np.testing.assert_allclose(got, double(base.kernel[...]) + change, rtol=1e-5, atol=1e-6)
        assert type(merged) is nnx.Einsum and not hasattr(merged, "lora")
        np.testing.assert_array_equal(merged.kernel[...], model.kernel[...])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Einsum((D, D), "btd,fd->btf", use_bias=False, name="mix")(x)
        return nn.Dense(D, name="dense")(jnp.tanh(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


def test_scanned_layers_are_folded_layer_by_layer():
    recipe = lora(alpha_pattern={"**/mix": 5.0 * R})
    model, params = grown(Stack(), recipe, X)
    merged = aj.merge(model, params, X)
    for name, scale, turned in (("mix", 5.0, True), ("dense", SCALE, False)):
        layers = jax.tree.map(double, params["layers"][name])
        for i in range(3):
            (pair,) = pairs(layers["lora"])
            change = scale * pair["a"][i] @ pair["b"][i]
            expected = layers["kernel"][i] + (change.T if turned else change)
            got = merged["layers"][name]["kernel"][i]
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    got = model.apply({"params": params}, X)
    np.testing.assert_allclose(Stack().apply({"params": merged}, X), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_base_is_rounded_once(dtype):
    base = nn.Dense(64)
    model, params = grown(base, lora(), drawn((2, 48)), dtype=dtype)
    assert params["lora"]["a"].dtype == np.float32
    merged = aj.merge(model, params, drawn((2, 48)))
    exact = double(params["kernel"]) + product(params["lora"]["a"], params["lora"]["b"])
    expected = jnp.asarray(exact.astype(np.float32)).astype(dtype)
    assert merged["kernel"].dtype == dtype
    # float32 and float64 sums may fall on the two sides of a tie, which is rare.
    same = np.asarray(merged["kernel"]) == np.asarray(expected)
    assert same.mean() > 0.999
    twice = params["kernel"] + (exact - double(params["kernel"])).astype(dtype)
    assert (np.asarray(merged["kernel"]) == twice).mean() < 0.95


def test_merging_starts_from_the_base_each_time():
    base = nn.Dense(5)
    model, params = grown(base, lora(), X)
    first = aj.merge(model, params, X)
    again = aj.merge(model, params, X)
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    other = params | {"lora": {"a": drawn((D, R), 8), "b": drawn((R, 5), 9)}}
    switched = double(params["kernel"]) + product(other["lora"]["a"], other["lora"]["b"])
    np.testing.assert_allclose(aj.merge(model, other, X)["kernel"], switched, rtol=1e-5, atol=1e-6)
    # A merged base takes a new adapter that starts at nothing.
    fresh = aj.init_adapters(model, first, KEY, X)
    np.testing.assert_array_equal(aj.merge(model, fresh, X)["kernel"], first["kernel"])


def test_only_targets_change_and_unfrozen_parameters_stay_as_trained():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="two")(nn.Dense(D, name="one")(x))

    model, params = grown(Two(), lora("one") + aj.Recipe(aj.Unfreeze("two/**")), X)
    merged = aj.merge(model, params, X)
    assert shapes(merged) == shapes(jax.eval_shape(Two().init, KEY, X)["params"])
    assert merged["two"]["kernel"] is params["two"]["kernel"]
    assert not np.array_equal(merged["one"]["kernel"], params["one"]["kernel"])


def test_a_bottleneck_cannot_be_merged():
    recipe = aj.Recipe(lora(), aj.Bottleneck("**", 2))
    model, params = grown(nn.Dense(D), recipe, X)
    with raises(aj.RecipeError, "Bottleneck", "''", aj.Bottleneck.unmergeable):
        aj.merge(model, params, X)
    model = aj.adapt(nnx.Linear(D, D, rngs=nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
    with raises(aj.RecipeError, "Bottleneck", "''", aj.Bottleneck.unmergeable):
        aj.merge(model)


@pytest.mark.parametrize("known", [True, False])
def test_a_linen_model_merges_without_inputs(known):
    model, params = grown(nn.Dense(D), lora(), X)
    if not known:
        model = aj.adapt(nn.Dense(D), lora())  # which never ran
    with_inputs, without = aj.merge(model, params, X), aj.merge(model, params)
    jax.tree.map(np.testing.assert_array_equal, with_inputs, without)


def test_trees_that_are_not_the_models():
    model, params = grown(nn.Dense(5), lora(), X)
    with raises(aj.MismatchError, "params", "2 missing: lora/a, lora/b."):
        aj.merge(model, {"kernel": params["kernel"], "bias": params["bias"]}, X)
    with raises(aj.MismatchError, "collections (params)", 'variables["params"]'):
        aj.merge(model, {"params": params}, X)
    wide = aj.adapt(nn.Dense(5), aj.LoRA("**", 3))
    with raises(aj.MismatchError, "lora/a is [4, 2], expected [4, 3]"):
        aj.merge(wide, params, X)
    with raises(aj.MismatchError, "LoRA", "18", "27"):
        aj.merge(wide, params)
    with raises(aj.RecipeError, "LoRA"):
        aj.merge(model, {"kernel": params["kernel"], "bias": params["bias"]})
    with raises(TypeError, "aj.merge(model, params, *example_inputs)"):
        aj.merge(model)
    with raises(aj.UserError, "Dense", "aj.adapt"):
        aj.merge(nn.Dense(5), params, X)
