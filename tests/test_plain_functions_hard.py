"""Functions, Equinox and Haiku in styles that are easy to get wrong."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.arrays import drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj

eqx, hk = pytest.importorskip("equinox"), pytest.importorskip("haiku")
KEY, X = jax.random.key(0), drawn((5, 4), 1)


def grown(fn, params, recipe, *inputs, seed=3):
    """An adapted function and its tree with random adapters."""
    model = aj.adapt(fn, params, recipe, example_inputs=inputs)
    tree = aj.init_adapters(model, params, KEY)
    trained, base = aj.partition(tree, aj.Recipe(recipe))
    return model, aj.merge_trees(drawn_like(trained, seed), base)


def bottleneck(leaves, x, scale=1.0):
    """A bottleneck's output, by the formula."""
    down, up = leaves["down"], leaves["up"]
    hidden = jax.nn.relu(x @ down["kernel"] + down["bias"])
    return x + scale * (hidden @ up["kernel"] + up["bias"])


def test_a_tree_with_params_at_its_top_is_refused_with_what_to_write():
    fn, tree = lambda p, x: x @ p["params"]["w"], {"params": {"w": drawn((4, 3))}}
    with raises(aj.UserError, "'params'", "[params]"):
        aj.adapt(fn, tree, aj.LoRA("**", 2), example_inputs=(X,))
    model, adapted = grown(lambda p, x: fn(p[0], x), [tree], aj.LoRA("**", 2), X)
    merged = aj.merge(model, adapted)
    assert jnp.allclose(model(adapted, X), fn(merged[0], X), rtol=1e-5, atol=1e-5)


class TestHaiku:
    recipe = aj.Bottleneck("**/linear", 3, activation="relu")

    def model(self, body):
        """A Haiku function of a body, which gets a module that returns as many numbers as X has."""
        fn = hk.without_apply_rng(hk.transform(body))
        return fn.apply, drawn_like(fn.init(KEY, X), 2)

    def linear(self, params, x):
        return x @ params["w"] + params["b"]

    @pytest.mark.slow
    def test_in_a_loop_over_layers_each_layer_has_its_adapter(self):
        def body(x):
            stack = hk.experimental.layer_stack(3)
            return stack(lambda x: jnp.tanh(hk.Linear(4)(x)))(x)

        fn, params = self.model(body)
        ((name, own),) = params.items()
        model, tree = grown(fn, params, self.recipe, X)
        leaves, expected = tree[name.split("/")[0]]["linear"]["adapter"], X
        for i in range(3):
            layer, adapter = jax.tree.map(lambda x, i=i: x[i], (own, leaves))
            expected = jnp.tanh(bottleneck(adapter, self.linear(layer, expected)))
        assert jnp.allclose(model(tree, X), expected, atol=1e-5)

    @pytest.mark.slow
    def test_in_a_loop_over_layers_a_module_without_parameters_is_not_adapted(self):
        class Act(hk.Module):
            def __call__(self, x):
                return jnp.tanh(x)

        layer = lambda x: Act()(hk.Linear(4)(x))  # noqa: E731
        fn, params = self.model(lambda x: hk.experimental.layer_stack(2)(layer)(x))
        with raises(aj.TargetError, "**/act"):
            aj.adapt(fn, params, aj.Bottleneck("**/act", 3), example_inputs=(X,))
        fn, params = self.model(layer)
        model, tree = grown(fn, params, aj.Bottleneck("act", 3, activation="relu"), X)
        assert jnp.allclose(
            model(tree, X), bottleneck(tree["act"]["adapter"], fn(params, X)), atol=1e-5
        )

    @pytest.mark.parametrize("lift", ["remat", "vmap"])
    def test_in_a_transformation_and_outside_of_it_one_module_has_one_adapter(self, lift):
        lifts = {"remat": hk.remat, "vmap": functools.partial(hk.vmap, split_rng=False)}

        def body(x):
            linear = hk.Linear(4)
            return linear(jnp.tanh(lifts[lift](linear)(x)))

        fn, params = self.model(body)
        model, tree = grown(fn, params, aj.Bottleneck("linear", 3, activation="relu"), X)
        run = lambda x: bottleneck(  # noqa: E731
            tree["linear"]["adapter"], self.linear(params["linear"], x)
        )
        assert jnp.allclose(model(tree, X), run(jnp.tanh(run(X))), atol=1e-5)

    def test_a_jitted_apply_takes_up_no_trace_of_another_call(self):
        fn, params = self.model(lambda x: hk.Linear(4)(x))
        jitted, recipe = jax.jit(fn), aj.Bottleneck("linear", 3, activation="relu")
        base = jitted(params, X)
        model, tree = grown(jitted, params, recipe, X)
        _, other = grown(jitted, params, recipe, X, seed=4)
        for each in (tree, other):
            assert jnp.allclose(model(each, X), bottleneck(each["linear"]["adapter"], base))
        assert (jitted(params, X) == base).all()

    def test_an_ensemble_and_two_models_in_one_tree(self):
        fn, params = self.model(lambda x: hk.Linear(4)(x))
        both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
        model, tree = grown(
            lambda p, x: jax.vmap(fn, (0, None))(p["a"], fn(p["b"], x)),
            {"a": both, "b": params},
            aj.Bottleneck("{a,b}/linear", 3, activation="relu"),
            X,
        )
        x = bottleneck(tree["b"]["linear"]["adapter"], self.linear(params["linear"], X))
        for i, y in enumerate(model(tree, X)):
            leaves, own = jax.tree.map(
                lambda x, i=i: x[i], (tree["a"]["linear"]["adapter"], both["linear"])
            )
            assert jnp.allclose(y, bottleneck(leaves, self.linear(own, x)), atol=1e-5)

    def test_a_function_without_modules_sees_its_own_tree(self):
        seen = []

        def fn(params, x):
            seen.append(jax.tree.map(jnp.shape, params))
            return x @ params["layer"]["w"]

        params = {"layer": {"w": drawn((4, 3))}}
        model, tree = grown(fn, params, aj.Bottleneck(("**", "!layer"), 3), X)
        model(tree, X)
        assert "haiku" in sys.modules and seen[-1] == {"layer": {"w": (4, 3)}}
        assert all(each == seen[-1] for each in seen)


class TestEquinox:
    @pytest.mark.slow
    def test_a_module_whose_array_is_tied_to_another(self):
        class Tied(eqx.Module):
            shared: eqx.nn.Shared

            def __init__(self, key):
                table = eqx.nn.Embedding(7, 4, key=key)
                head = eqx.nn.Linear(4, 7, use_bias=False, key=key)
                where = lambda pair: pair[1].weight  # noqa: E731
                self.shared = eqx.nn.Shared((table, head), where, lambda pair: pair[0].weight)

            def __call__(self, token):
                table, head = self.shared()
                return head(table(token))

        base = Tied(KEY)
        recipe = aj.Bottleneck("shared/pytree/1", 3, activation="relu")
        model = aj.adapt(base, recipe, example_inputs=(jnp.array(3),))
        tree = aj.init_adapters(model, base, KEY)
        trained, rest = aj.partition(tree, aj.Recipe(recipe))
        tree = aj.merge_trees(drawn_like(trained), rest)
        leaves = tree["shared"]["pytree"]["1"]["adapter"]
        expected = bottleneck(leaves, base(jnp.array(3)))
        assert jnp.allclose(model(tree, jnp.array(3)), expected, atol=1e-5)

    def test_a_static_part_that_is_closed_over_takes_changed_weights_alone(self):
        base = eqx.nn.MLP(4, 4, 6, 1, key=KEY)
        arrays, static = eqx.partition(base, eqx.is_array)
        fn = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)  # noqa: E731
        model, tree = grown(fn, arrays, aj.LoRA("**", 2), X)
        assert jnp.allclose(model(tree, X), fn(aj.merge(model, tree), X), atol=1e-5)
        with raises(aj.UserError, "eqx.partition(model, eqx.is_array)"):
            aj.adapt(fn, arrays, aj.Bottleneck("layers/0", 3), example_inputs=(X,))
        whole = lambda model, x: fn(eqx.filter(model, eqx.is_array), x)  # noqa: E731
        with raises(aj.UserError, "eqx.partition(model, eqx.is_array)"):
            aj.adapt(whole, base, aj.Bottleneck("layers/0", 3), example_inputs=(X,))

        def parted(model, x):
            return jax.vmap(eqx.combine(*eqx.partition(model, eqx.is_array)))(x)

        aj.adapt(parted, base, aj.Bottleneck("layers/0", 3), example_inputs=(X,))

    def test_a_jitted_part_of_a_module_is_traced_once(self):
        traced = []

        class Net(eqx.Module):
            layer: eqx.nn.Linear

            @eqx.filter_jit
            def run(self, x):
                traced.append(1)
                return jax.vmap(self.layer)(x)

            def __call__(self, x):
                return self.run(x)

        base = Net(eqx.nn.Linear(4, 4, key=KEY))
        recipe = aj.Bottleneck("layer", 3, activation="relu")
        model = aj.adapt(base, recipe, example_inputs=(X,))
        tree = aj.init_adapters(model, base, KEY)
        trained, rest = aj.partition(tree, aj.Recipe(recipe))
        outputs, counts = [], []
        for seed in range(3):
            tree = aj.merge_trees(drawn_like(trained, seed), rest)
            outputs.append(model(tree, X))
            counts.append(len(traced))
            expected = bottleneck(tree["layer"]["adapter"], base(X))
            assert jnp.allclose(outputs[-1], expected, atol=1e-5)
        assert counts[0] == counts[2] - 1  # the base's own call


def test_rows_that_a_batch_looks_up_one_by_one_are_a_lookup():
    """As of `eqx.nn.Embedding`, which takes one index; jax gathers then with starts on all axes."""
    table, ids = {"w": drawn((7, 4))}, jnp.array([[6, 2, 0], [2, 5, 6]])
    one = lambda p, i: jnp.tanh(p["w"][i])  # noqa: E731
    fn = jax.vmap(jax.vmap(one, (None, 0)), (None, 0))
    model, tree = grown(fn, table, aj.LoRA("**", 2), ids)
    whole = table["w"] + tree["lora"]["a"] @ tree["lora"]["b"]
    assert jnp.allclose(model(tree, ids), jnp.tanh(whole[ids]), atol=1e-5)
    assert "computed thin: 1 of 1" in str(aj.audit(model, tree, inputs=(ids,)))


def test_loaded_functions_equal_adapted_ones(tmp_path):
    fn, params = lambda p, x: x @ p["w"], {"w": drawn((4, 3))}
    recipe = aj.Recipe(aj.LoRA("**", 2))
    model, tree = grown(fn, params, recipe, X)
    aj.save_adapter(tmp_path / "a", aj.partition(tree, recipe)[0], recipe)
    loaded, again = aj.load_adapter(tmp_path / "a", fn, params, X)
    assert loaded == model and hash(loaded) == hash(model)
    assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (again, tree)), strict=True))
    assert loaded != aj.adapt(lambda p, x: fn(p, x), params, recipe, example_inputs=(X,))
    assert loaded != aj.adapt(fn, {"w": drawn((4, 2))}, recipe, example_inputs=(X,))


def test_the_base_of_an_adapted_function_is_quantised():
    fn, params = (
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"],
        {"a": drawn((4, 6)), "b": drawn((6, 3))},
    )
    with raises(TypeError, "aj.quantize(adapted, params)"):
        aj.quantize(fn, params, X)
    model, tree = grown(fn, params, aj.LoRA("a", 2), X)
    small = aj.quantize(model, tree, dtype="int8")
    again = aj.dequantize(small)
    assert not (again["a"] == tree["a"]).all() and jnp.allclose(again["a"], tree["a"], atol=0.05)
    assert jnp.allclose(model(small, X), model(again, X), atol=1e-5)
    pairs = zip(*map(jax.tree.leaves, (small["lora"], tree["lora"])), strict=True)
    assert all((x == y).all() for x, y in pairs)


ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from helpers.arrays import drawn, drawn_like
import adapters_jax as aj

params, x = {"a": drawn((4, 6), 1), "b": drawn((6, 3), 2)}, drawn((8, 4), 3)
specs = {"a": P(None, "model"), "b": P("model", None)}

def placed(p, x):
    return jnp.einsum("bf,fd->bd", jnp.tanh(x @ p["a"]), p["b"], out_sharding=P("data", None))

def sharded(p, x):
    def run(p, x):
        return jax.lax.psum(jnp.tanh(x @ p["a"]) @ p["b"], "model")
    return jax.shard_map(run, in_specs=(specs, P("data")), out_specs=P("data"))(p, x)

for kind, fn in ((AxisType.Explicit, placed), (AxisType.Auto, sharded)):
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2)):
        own = jax.tree.map(jax.device_put, params, specs)
        rows, recipe = jax.device_put(x, P("data", None)), aj.Recipe(aj.LoRA(("a", "b"), 2))
        model = aj.adapt(fn, own, recipe, example_inputs=(rows,))
        trained, base = aj.partition(aj.init_adapters(model, own, jax.random.key(0)), recipe)
        assert (model(aj.merge_trees(trained, base), rows) == fn(own, rows)).all()
        tree = aj.merge_trees(drawn_like(trained), base)
        y = jax.jit(model.__call__)(tree, rows)
        assert y.sharding.spec[0] == "data" and len(y.sharding.device_set) == 4
        merged = aj.merge(model, tree)
        assert jnp.abs(fn(merged, rows) - y).max() < 2e-5 * jnp.abs(y).max()
        grads = jax.grad(lambda t: jnp.square(model(aj.merge_trees(t, base), rows)).mean())(trained)
        assert all(jnp.abs(grads["lora"][name]["b"]).max() > 0 for name in "ab")
        print("exact", kind)
"""


@pytest.mark.weekly
def test_weights_that_lie_on_several_devices_explicitly_or_in_shards():
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    variables = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES], env=variables, capture_output=True, text=True
    )
    assert run.stdout.count("exact") == 2, run.stderr[-3000:]
