"""DoRA, PiSSA and slices: values of plain formulas, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.trees import flatten
from adapters_jax.weights.axes import Axes

IN, OUT, R, ALPHA = 5, 7, 3, 6.0
X = drawn((2, IN))
DORA = aj.DoRA("**", R, ALPHA)
PISSA = aj.LoRA("**", R, ALPHA, a_init="pissa")
OLORA = aj.LoRA("**", R, ALPHA, a_init="olora")


def dense(method, seed=1):
    """An adapted dense layer with no zero anywhere."""
    model = aj.adapt(nn.Dense(OUT), method)
    base = jax.eval_shape(lambda: nn.Dense(OUT).init(jax.random.key(0), X)["params"])
    return model, drawn_like(aj.init_adapters(model, base, jax.random.key(0), X), seed)


def turned(p, scale=ALPHA / R):
    """The weight with its change, in float64."""
    return double(p["kernel"]) + scale * double(p["lora"]["a"]) @ double(p["lora"]["b"])


def test_dora_is_the_formula_in_both_apis():
    model, params = dense(DORA)
    weight = turned(params)
    ratio = double(params["lora"]["magnitude"]) / np.linalg.norm(weight, axis=0)
    expected = double(X) @ (weight * ratio) + double(params["bias"])
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)

    other = aj.adapt(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), DORA, rngs=nnx.Rngs(1))
    nnx.update(other, params)
    np.testing.assert_allclose(other(X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aj.merge(other)(X), expected, rtol=1e-5, atol=1e-5)


def test_an_output_without_a_weight_is_as_in_the_base():
    model = aj.adapt(nn.Dense(OUT), DORA)
    base = {"kernel": np.array(drawn((IN, OUT))), "bias": drawn((OUT,))}
    base["kernel"][:, 1] = 0.0
    params = aj.init_adapters(model, base, jax.random.key(0), X)

    def sum_of(p):
        return jnp.sum(model.apply({"params": p}, X))

    expected = nn.Dense(OUT).apply({"params": base}, X)
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=1e-5)
    np.testing.assert_allclose(aj.merge(model, params)["kernel"], base["kernel"], rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.grad(sum_of)(params)["lora"].values())


def test_the_norm_is_not_differentiated():
    model, params = dense(DORA)
    norm = np.linalg.norm(turned(params), axis=0)

    def with_constant_norm(p):
        scaled = p["lora"]["magnitude"] / norm
        return jnp.sum((X @ (p["kernel"] + 2.0 * p["lora"]["a"] @ p["lora"]["b"])) * scaled)

    got = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, X)))(params)["lora"]
    expected = jax.grad(with_constant_norm)(params)["lora"]
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("a_init", ["gaussian", "pissa", "olora"])
def test_dora_starts_at_the_norm_of_the_weight(a_init):
    model = aj.adapt(nn.Dense(OUT), aj.DoRA("**", R, a_init=a_init))
    kernel = drawn((IN, OUT))
    params = {"kernel": kernel, "bias": drawn(OUT)}
    grown = aj.init_adapters(model, params, jax.random.key(0), X)
    norm = np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(grown["lora"]["magnitude"], norm, rtol=1e-5)
    expected = X @ kernel + params["bias"]
    np.testing.assert_allclose(model.apply({"params": grown}, X), expected, atol=1e-5)


def test_init_of_the_model_itself_starts_there_too():
    for method in (DORA, PISSA, OLORA):
        model = aj.adapt(nn.Dense(OUT), method)
        params = model.init(jax.random.key(0), X)["params"]
        plain = nn.Dense(OUT).init(jax.random.key(0), X)["params"]
        expected = nn.Dense(OUT).apply({"params": plain}, X)
        np.testing.assert_allclose(model.apply({"params": params}, X), expected, atol=1e-5)


def test_dora_on_a_convolution_takes_the_norm_over_the_window():
    conv = nn.Conv(OUT, (3,))
    x = drawn((2, 6, IN))
    model = aj.adapt(conv, aj.DoRA("**", R, ALPHA))
    base = jax.eval_shape(lambda: conv.init(jax.random.key(0), x)["params"])
    params = drawn_like(aj.init_adapters(model, base, jax.random.key(0), x))
    a, b = double(params["lora"]["a"]), double(params["lora"]["b"])
    weight = double(params["kernel"]) + ALPHA / R * np.einsum("wir,ro->wio", a, b)
    ratio = double(params["lora"]["magnitude"]) / np.sqrt((weight**2).sum((0, 1)))
    folded = {"kernel": (weight * ratio).astype(np.float32), "bias": params["bias"]}
    expected = conv.apply({"params": folded}, x)
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


def test_dora_on_an_embedding_takes_the_norm_over_the_vocabulary():
    embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
    model = aj.adapt(embed, aj.DoRA("**", 2, 4.0), rngs=nnx.Rngs(1))
    params = drawn_like(jax.tree.map(lambda x: x[...], nnx.to_pure_dict(nnx.state(model))))
    nnx.update(model, params)
    weight = double(params["embedding"])
    weight += 2.0 * double(params["lora"]["a"]) @ double(params["lora"]["b"])
    weight *= double(params["lora"]["magnitude"]) / np.linalg.norm(weight, axis=0)
    ids = np.array([[0, 4], [3, 3]])
    np.testing.assert_allclose(model(ids), weight[ids], rtol=1e-4, atol=1e-5)
    x = drawn((3, 4), 1)
    np.testing.assert_allclose(model.attend(x), double(x) @ weight.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aj.merge(model).embedding[...], weight, rtol=1e-4, atol=1e-5)


def test_dora_refuses_slices():
    with raises(aj.UserError, "slices", "pissa"):
        aj.DoRA("**", 2, slices=((0, 1),))


def test_pissa_takes_the_principal_components_out_of_the_weight():
    model = aj.adapt(nn.Dense(OUT), PISSA)
    params = {"kernel": drawn((IN, OUT)), "bias": drawn(OUT)}
    grown = aj.init_adapters(model, params, jax.random.key(0), X)
    u, s, v = np.linalg.svd(double(params["kernel"]))
    principal = (u[:, :R] * s[:R]) @ v[:R]
    a, b = grown["lora"]["a"], grown["lora"]["b"]
    np.testing.assert_allclose(ALPHA / R * a @ b, principal, atol=1e-5)
    np.testing.assert_allclose(grown["kernel"], params["kernel"] - principal, atol=1e-5)
    np.testing.assert_allclose(np.sum(np.square(a), 0), np.sum(np.square(b), 1), rtol=1e-4)


def test_olora_takes_the_first_columns_of_the_qr_decomposition_out_of_the_weight():
    model = aj.adapt(nn.Dense(OUT), OLORA)
    params = {"kernel": drawn((IN, OUT)), "bias": drawn(OUT)}
    grown = aj.init_adapters(model, params, jax.random.key(0), X)
    q, r = np.linalg.qr(double(params["kernel"]).T)
    a, b = double(grown["lora"]["a"]), double(grown["lora"]["b"])
    np.testing.assert_allclose(a @ b, (q[:, :R] @ r[:R]).T, atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(R), atol=1e-5)  # orthonormal, and A is triangular
    np.testing.assert_allclose(np.triu(a, 1), 0, atol=1e-6)
    np.testing.assert_allclose(grown["kernel"], params["kernel"] - ALPHA / R * a @ b, atol=1e-5)
    expected = double(X) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(model.apply({"params": grown}, X), expected, atol=1e-4)


@pytest.mark.parametrize("method", [DORA, PISSA, OLORA], ids=["dora", "pissa", "olora"])
def test_a_file_is_loaded_onto_the_base_it_was_made_from(method, tmp_path):
    base = {"kernel": jnp.asarray(drawn((IN, OUT))), "bias": jnp.asarray(drawn(OUT))}
    model = aj.adapt(nn.Dense(OUT), method)
    params = aj.init_adapters(model, base, jax.random.key(0), X)
    adapters, frozen = aj.partition(params, method)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    expected = model.apply({"params": aj.merge_trees(adapters, frozen)}, X)
    aj.save_adapter(tmp_path / "adapter", adapters, method)

    again, loaded = aj.load_adapter(tmp_path / "adapter", nn.Dense(OUT), base, X)
    np.testing.assert_allclose(again.apply({"params": loaded}, X), expected, atol=1e-5)
    other = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))
    nnx.update(other, base)
    np.testing.assert_allclose(aj.load_adapter(tmp_path / "adapter", other)(X), expected, atol=1e-5)
    np.testing.assert_array_equal(other.kernel[...], base["kernel"])


def test_slices_change_their_outputs_alone():
    method = aj.LoRA("**", 2, 4.0, slices=((0, 2), (5, 7)))
    model, params = dense(method)
    assert params["lora"]["b"].shape == (2, 4)
    base = nn.Dense(OUT).apply({"params": {k: params[k] for k in ("kernel", "bias")}}, X)
    change = double(X) @ (2.0 * double(params["lora"]["a"]) @ double(params["lora"]["b"]))
    expected = double(base)
    expected[:, 0:2] += change[:, :2]
    expected[:, 5:7] += change[:, 2:]
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, atol=1e-5)
    merged = aj.merge(model, params, X)
    np.testing.assert_allclose(nn.Dense(OUT).apply({"params": merged}, X), expected, atol=1e-5)
    np.testing.assert_array_equal(merged["kernel"][:, 2:5], params["kernel"][:, 2:5])
    assert aj.audit(model, params).entries[0].formula == "2*(5 + 4)"


@pytest.mark.parametrize(
    "slices",
    [
        ((2, 1),),
        ((0, 3), (2, 4)),
        ((1, 1),),
        ((-1, 2),),
        3,
        ((0, 2**31),),
        ((False, 2),),
        ((0, 1, 2),),
    ],
)
def test_slices_have_to_be_ranges_in_order(slices):
    with raises(aj.UserError, f"slices={slices}", "((0, 768),)"):
        aj.LoRA("**", 2, slices=slices)


def test_slices_have_to_fit_the_layer():
    with raises(aj.RecipeError, "((0, 9),)", "''"):
        dense(aj.LoRA("**", 2, slices=((0, 9),)))
    for axes, outputs in ((Axes((0,), (1, 2)), (5, 6)), (Axes((0, 1, 2), ()), ())):
        point = AttachmentPoint("weight", "x", {"w": (4, 5, 6)}, weight="w", axes=axes)
        with raises(aj.RecipeError, "((0, 2),)", "'x'", outputs):
            aj.LoRA("**", 2, slices=((0, 2),)).leaves(point)


def test_slices_of_a_kernel_whose_outputs_are_first():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (OUT, IN)).T

    method = aj.LoRA("**", 2, 4.0, slices=((0, 2), (5, 7)))
    model = aj.adapt(Turned(), method)
    params = drawn_like(aj.init_adapters(model, {"kernel": drawn((OUT, IN))}, jax.random.key(0), X))
    weight, (a, b) = double(params["kernel"]), (double(params["lora"][name]) for name in "ab")
    change = 2.0 * (a @ b).T
    weight[0:2] += change[:2]
    weight[5:7] += change[2:]
    expected = double(X) @ weight.T
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aj.merge(model, params, X)["kernel"], weight, rtol=1e-5, atol=1e-5)


def test_a_rank_as_large_as_the_weight_can_make_any_change():
    """A of full rank, and B by least squares: a random change of the weight is met to 1e-5."""
    model, params = dense(aj.LoRA("**", min(IN, OUT)))
    delta = drawn((IN, OUT), seed=9)
    params["lora"]["b"] = np.linalg.lstsq(params["lora"]["a"], delta, rcond=None)[0]
    expected = params["kernel"] + delta
    np.testing.assert_allclose(aj.merge(model, params, X)["kernel"], expected, atol=1e-5)


def test_patterns_that_exclude():
    params = {f"layer_{i}": {"query": {"kernel": np.ones((4, 4))}} for i in range(3)}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x = Layer(name=f"layer_{i}")(x)
            return x

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, use_bias=False, name="query")(x)

    def grown(*methods):
        model = aj.adapt(Net(), aj.Recipe(*methods))
        return set(flatten(aj.init_adapters(model, params, jax.random.key(0), X[:, :4])))

    added = grown(aj.LoRA(("**/query", "!layer_1/**"), 2)) - set(flatten(params))
    assert {path.split("/")[0] for path in added} == {"layer_0", "layer_2"}
    recipe = aj.Recipe(aj.Unfreeze(("**", "!layer_0/**")), aj.Unfreeze("layer_0/query/kernel"))
    assert all(map(recipe.trains, flatten(params)))
    for targets, data in (
        (("**/query", "!layer_9/**"), ("'!layer_9/**'", "nothing", "layer_0")),
        (("**/query", "!**"), ("'!**'", "everything", "layer_0/query")),
        (("!**/query",), (("!**/query",), "'**/query'")),
    ):
        with raises(aj.TargetError, *data):
            grown(aj.LoRA(targets, 2))
