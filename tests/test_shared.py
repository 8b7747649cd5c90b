"""Leaves that all modules of an entry share, and leaves that a method freezes."""

import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods import METHODS
from adapters_jax.testing import check_method
from adapters_jax.trees import flatten, unflatten

PLUGIN = Path(__file__).parent / "plugin"
X = jax.random.normal(jax.random.key(9), (3, 8))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def plugin():
    """The methods of the package, registered for the tests of this file."""
    sys.path.insert(0, str(PLUGIN))
    import sharing_plugin

    yield sharing_plugin
    sys.path.remove(str(PLUGIN))
    for name in [name for name in sys.modules if name.startswith("sharing_plugin")]:
        del sys.modules[name]
    del METHODS["phm"], METHODS["shared_vera"]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(8, name="up")(x)), None


class Net(nn.Module):
    """Three scanned layers, and one before them."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8, name="first")(x))
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


class Flat(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def moved(tree, seed=3):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape) / 2 for k, x in zip(keys, leaves, strict=True)]
    )


def in_linen(recipe):
    base = Net()
    params = base.init(KEY, X)["params"]
    model = aj.adapt(base, recipe)
    whole = aj.init_adapters(model, params, jax.random.key(1), X)
    return base, params, model, aj.merge_trees(moved(aj.adapters_of(whole, model.recipe)), params)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.slow
def test_one_rule_of_all_layers_also_of_scanned_ones(plugin):
    _, _, model, whole = in_linen(plugin.Phm("**/{up,first}"))
    flat = {path: np.asarray(x, np.float64) for path, x in flatten(whole).items()}
    assert flat["phm/rule"].shape == (2, 2, 2)
    assert sum("rule" in path for path in flat) == 1

    def phm(y, own):
        def factor(left, right):
            products = zip(flat["phm/rule"], own[left] @ own[right], strict=True)
            return sum(np.kron(rule, product) for rule, product in products)

        return y + gelu(y @ factor("s", "t")) @ factor("up_s", "up_t")

    def module(path, i=...):
        return {p.rpartition("/")[2]: x[i] for p, x in flat.items() if p.startswith(f"{path}/")}

    x = np.asarray(X, np.float64)
    own = module("first")
    x = np.tanh(phm(x @ own["kernel"] + own["bias"], own))
    for i in range(3):
        own = module("layers/up", i)
        x = x + np.tanh(phm(x @ own["kernel"] + own["bias"], own))
    np.testing.assert_allclose(model.apply({"params": whole}, X), x, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_gradient_of_a_shared_leaf_is_the_sum_over_its_modules(plugin):
    _, _, model, whole = in_linen(plugin.Phm("**/{up,first}"))

    def loss(rule):
        tree = {**whole, "phm": {"rule": rule}}
        return jnp.square(model.apply({"params": tree}, X)).mean()

    rule = whole["phm"]["rule"]
    along = jax.random.normal(jax.random.key(7), rule.shape)
    ends = [float(loss(rule + sign * 1e-2 * along)) for sign in (1, -1)]
    slope = float(jnp.vdot(jax.grad(loss)(rule), along))
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-2, rtol=2e-2)


@pytest.mark.parametrize("linen", [True, False], ids=["linen", "nnx"])
def test_frozen_leaves_are_counted_apart_kept_and_saved(plugin, linen, tmp_path):
    recipe = plugin.SharedVeRA("**", 4, name="v")
    if linen:
        base, params, model, whole = in_linen(recipe)
        given, modules, kernels = (model, whole), 4, 4 * (64 + 8)
    else:
        base = Flat(nnx.Rngs(0))
        model = aj.adapt(base, recipe, rngs=nnx.Rngs(1), example_inputs=(X,))
        nnx.update(model, moved(nnx.state(model, aj.nnx.ADAPTERS)))
        given, modules, kernels = (model,), 2, 2 * (64 + 8)
    audit = aj.audit(*given)
    assert audit.trainable_parameters == modules * (4 + 8)
    assert audit.frozen_adapter_parameters == 2 * 8 * 4
    assert audit.adapter_parameters == modules * (4 + 8) + 2 * 8 * 4
    assert audit.frozen_parameters == kernels + 2 * 8 * 4
    own = {entry.path: entry.formula for entry in audit.entries if not entry.trained}
    assert own == {"shared_vera_v/left": "8*4", "shared_vera_v/right": "4*8"}
    state = aj.TrainState.create(*given, tx=optax.sgd(0.1), key=KEY)
    if linen:
        step = aj.make_train_step(
            lambda params, x, key: jnp.square(model.apply({"params": params}, x)).mean()
        )
    else:
        step = aj.make_train_step(lambda model, x, key: jnp.square(model(x)).mean())
    before = {p: np.asarray(x) for p, x in flatten(state.adapters).items()}
    frozen = {p: np.asarray(x) for p, x in flatten(state.base).items()}
    assert {path.rpartition("/")[2] for path in before} == {"d", "b"}
    state, _ = step(state, X)
    assert all((x != before[p]).any() for p, x in flatten(state.adapters).items())
    assert all((np.asarray(x) == frozen[p]).all() for p, x in flatten(state.base).items())
    aj.save_adapter(tmp_path / "v", state)
    if linen:
        again, tree = aj.load_adapter(tmp_path / "v", base, params)
        y, expected = again.apply({"params": tree}, X), model.apply({"params": state.params}, X)
        merged = base.apply({"params": aj.merge(again, tree)}, X)
    else:
        again = aj.load_adapter(tmp_path / "v", base)
        y, expected, merged = again(X), state.model(X), aj.merge(again)(X)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)


def test_a_low_rank_change_with_shared_factors_is_its_formula(plugin):
    base, _, model, whole = in_linen(plugin.SharedVeRA("**", 4))
    flat = {path: np.asarray(x, np.float64) for path, x in flatten(whole).items()}
    left, right = flat["shared_vera/left"], flat["shared_vera/right"]
    merged = flatten(aj.merge(model, whole))
    for path in ("first", "layers/up"):
        d, b = (flat[f"{path}/shared_vera/{name}"] for name in "db")
        change = (left * d[..., None, :]) @ right * b[..., None, :]
        expected = flat[f"{path}/kernel"] + change
        np.testing.assert_allclose(merged[f"{path}/kernel"], expected, rtol=1e-5, atol=1e-5)
    y = model.apply({"params": whole}, X)
    np.testing.assert_allclose(
        base.apply({"params": unflatten(merged)}, X), y, rtol=1e-4, atol=1e-4
    )


@pytest.mark.weekly
@pytest.mark.parametrize("kind", ["Phm", "SharedVeRA"])
def test_they_keep_the_contract(plugin, kind):
    assert check_method(getattr(plugin, kind)("**/mlp/up", 4), variants=("plain", "scan")) == [
        "mlp"
    ]


def test_a_plain_function_with_scanned_layers(plugin):
    def predict(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    params = {"layers": jax.random.normal(KEY, (3, 8, 8)) / 3}
    model = aj.adapt(predict, params, plugin.SharedVeRA("**", 4), example_inputs=(X,))
    tree = aj.init_adapters(model, params, KEY)
    assert tree["shared_vera"]["left"].shape == (8, 4)
    tree = {**tree, "shared_vera": moved(tree["shared_vera"])}
    np.testing.assert_allclose(
        model(tree, X), predict(aj.merge(model, tree), X), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_shared(plugin):
    wide = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    with raises(aj.RecipeError, "'left'", "[8, 4] at 'layers/0'", "[4, 4] at 'layers/1'"):
        aj.adapt(wide, plugin.SharedVeRA("layers/*", 4), rngs=nnx.Rngs(1), example_inputs=(X,))
    with raises(aj.RecipeError, "SharedVeRA stands 2 times", "name='first'"):
        aj.Recipe(plugin.SharedVeRA("a"), plugin.SharedVeRA("b"))
    assert len(aj.Recipe(plugin.SharedVeRA("a", name="x"), plugin.SharedVeRA("b"))) == 2
    model = aj.adapt(Flat(nnx.Rngs(0)), plugin.Phm("*"), rngs=nnx.Rngs(1), example_inputs=(X,))
    with raises(aj.RecipeError, "Phm", "rule", "whole model"):
        model.a(X)
    named = nnx.Dict(phm=nnx.Linear(8, 8, rngs=nnx.Rngs(0)))

    class Taken(Flat):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.phm = named

    with raises(aj.RecipeError, "Phm keeps its parameters in phm"):
        aj.adapt(Taken(nnx.Rngs(0)), plugin.Phm(("a", "b")), rngs=nnx.Rngs(1), example_inputs=(X,))


def test_a_detached_model_has_nothing_shared(plugin):
    model = aj.adapt(Flat(nnx.Rngs(0)), plugin.Phm("*"), rngs=nnx.Rngs(1), example_inputs=(X,))
    assert math.prod(model.phm.rule.shape) == 8
    aj.nnx.detach(model)
    assert sorted(flatten(nnx.state(model, nnx.Param))) == [
        "a/bias",
        "a/kernel",
        "b/bias",
        "b/kernel",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        {"shared_leaves": ("scale",)},
        {"shared_leaves": ("group/scale",), "leaf_names": ("group/scale", "bias")},
        {"frozen_leaves": ("other",)},
    ],
    ids=["all", "slash", "unknown"],
)
def test_names_of_leaves_that_are_none(names):
    kind = type("Wrong", (aj.Method,), {"slot": "wrong", "leaf_names": ("scale",), **names})
    with raises(aj.RecipeError, "Wrong", "shared_leaves"):
        kind("**")
