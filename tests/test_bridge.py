"""Linen modules inside NNX models, NNX modules inside linen ones, and weights in containers.

A model of both APIs computes what the same model of one API computes, with the same parameters.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from helpers.arrays import double, drawn_like, shapes
from helpers.errors import raises
from test_calls import CLOSE, adapted, shaken
from test_styles import KEY, X, changed

import adapters_jax as aj
from adapters_jax.nnx import copy, detach
from adapters_jax.trees import flatten, unflatten
from adapters_jax.weights import fingerprints

LORA = aj.LoRA("**", 2, 3.0)
LEAF_METHODS = [LORA, aj.DoRA("**", 2), aj.IA3("**"), aj.Unfreeze("**")]
METHODS = [*LEAF_METHODS, aj.Bottleneck("**", 2)]
names = lambda methods: [type(method).__name__ for method in methods]  # noqa: E731


class Layer(nn.Module):
    """One of three scanned layers."""

    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(4, name="up")(x)), None


class Tanh(nn.Module):
    """A module without parameters."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(x)


class Block(nn.Module):
    """A linen module with a tied weight, scanned layers and a norm."""

    @nn.compact
    def __call__(self, x):
        w = self.param("tied", nn.initializers.normal(1.0), (4, 6))
        x = nn.LayerNorm(name="norm")(nn.Dense(4, name="head")(Tanh(name="act")(x @ w) @ w.T))
        layers = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class LinenInside(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = bridge.ToNNX(Block(), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


class OnlyLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name="second")(jnp.tanh(nn.Dense(4, name="first")(x)))


class Stack(nnx.Module):
    """An NNX module with layers in a list, and one raw weight that is read twice."""

    def __init__(self, rngs):
        self.layers = nnx.List(nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.tied = nnx.Param(jax.random.normal(rngs.params(), (4, 6)))

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jnp.tanh(x @ self.tied[...]) @ self.tied[...].T


class NnxInside(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(4, name="first")(x))
        return bridge.to_linen(Stack, name="second")(h)


class OnlyNnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 4, rngs=rngs), Stack(rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def loss(y):
    """A loss, and the output that it is of."""
    return (y**2).sum(), y


def linen_inside(method):
    """An adapted NNX model with a linen module, with noise in its parameters."""
    model = aj.adapt(LinenInside(nnx.Rngs(0)), method, rngs=nnx.Rngs(1), example_inputs=(X,))
    state = nnx.state(shaken(model), nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: x / 2, state))
    return model


def params_of(model, kind=nnx.Param):
    """An NNX model's parameters by path."""
    state = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): x[...] for path, x in state}


def filled(model, flat):
    """Gives an NNX model parameters by path, and no others."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    new = [(path, x.replace(flat["/".join(map(str, path))])) for path, x in state]
    assert len(new) == len(flat)
    nnx.update(model, nnx.from_flat_state(new))


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path], leaf, **CLOSE, err_msg=path)


def assert_same(model, params, linen):
    """An NNX model and a linen model compute the same, with the same gradients of the adapters."""
    trained, frozen = aj.partition(params, linen.recipe)
    run = lambda t: loss(linen.apply({"params": aj.merge_trees(t, frozen)}, X))  # noqa: E731
    wrt = nnx.DiffState(0, aj.nnx.AdapterParam)
    got, y = nnx.jit(nnx.grad(lambda m: loss(m(X)), argnums=wrt, has_aux=True))(model)
    expected, same = jax.jit(jax.grad(run, has_aux=True))(trained)
    np.testing.assert_allclose(y, same, **CLOSE)
    got = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(got)}
    assert_close(got, flatten(expected))
    assert all(np.abs(x).max() > 1e-3 for x in got.values())


@pytest.mark.weekly
@pytest.mark.parametrize("method", METHODS, ids=names(METHODS))
def test_linen_inside_nnx_computes_as_linen_alone(method):
    model = linen_inside(method)
    assert_same(model, unflatten(params_of(model)), aj.adapt(OnlyLinen(), method))
    if method in LEAF_METHODS:
        merged = aj.merge(model)
        np.testing.assert_allclose(merged(X), model(X), **CLOSE)
    else:
        merged = copy(model)
        detach(merged)
    assert nnx.graphdef(merged) == nnx.graphdef(LinenInside(nnx.Rngs(0)))


def test_compositions_on_linen_modules_inside_nnx():
    two = (aj.Bottleneck("**/{head,up}", 2, name=name) for name in "ab")
    recipe = aj.Recipe(*two, aj.average("a", "b", weights=(3, 1)))
    model = linen_inside(recipe)
    assert_same(model, unflatten(params_of(model)), aj.adapt(OnlyLinen(), recipe))


class Attends(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.MultiHeadDotProductAttention(2, deterministic=True, name="attention")(x[None])
        return nn.Dense(4, name="out")(h[0])


class AttendsInside(nnx.Module):
    def __init__(self, rngs):
        self.block = bridge.ToNNX(Attends(), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return self.block(x)


class AttendsAlone(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Attends(name="block")(x)


@pytest.mark.slow
def test_prompts_in_the_attention_of_linen_inside_nnx():
    """With a second method that is attached later, and acts on the same linen module."""
    first, second = aj.LlamaAdapter("**/attention", 3), aj.Bottleneck("**/attention", 2)
    model = aj.adapt(AttendsInside(nnx.Rngs(0)), first, rngs=nnx.Rngs(1), example_inputs=(X,))
    model = shaken(aj.adapt(model, second, rngs=nnx.Rngs(2), example_inputs=(X,)))
    linen = aj.adapt(AttendsAlone(), aj.Recipe(first, second))
    assert_same(model, unflatten(params_of(model)), linen)


class Unused(LinenInside):
    def __call__(self, x):
        self.second(x)
        return self.first(x)


@pytest.mark.slow
def test_adapters_in_linen_that_the_outputs_do_not_depend_on_are_an_error():
    base = Unused(nnx.Rngs(0))
    with raises(aj.TargetError, "second/head"):
        aj.adapt(base, aj.Bottleneck("second/head", 2), rngs=nnx.Rngs(1), example_inputs=(X,))


class Both(nnx.Module):
    """Raw weights in a container, then a linen module."""

    def __init__(self, rngs):
        self.ws = nnx.data([nnx.Param(jax.random.normal(rngs.params(), (4, 4)))])
        self.second = bridge.ToNNX(Attends(), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        return jnp.tanh(self.second(x @ self.ws[0][...]))


class Stacked(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(Both)(nnx.Rngs(0).split(3))

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


@pytest.mark.slow
def test_stacked_layers_of_both_apis():
    """Each of the layers computes what it computes alone, with its own adapters."""
    methods = aj.LoRA("{ws,second/out}", 2, 3.0), aj.Bottleneck("second/{out,attention}", 2)
    whole = [dataclasses.replace(m, targets=f"layers/{m.targets[0]}") for m in methods]
    model = aj.adapt(Stacked(), aj.Recipe(*whole), rngs=nnx.Rngs(1), example_inputs=(X,))
    flat, x = params_of(shaken(model)), X
    for i in range(3):
        one = aj.adapt(
            Both(nnx.Rngs(0)), aj.Recipe(*methods), rngs=nnx.Rngs(1), example_inputs=(X,)
        )
        filled(one, {path.removeprefix("layers/"): leaf[i] for path, leaf in flat.items()})
        x = one(x)
    np.testing.assert_allclose(model(X), x, **CLOSE)


def test_dropout_on_the_outputs_of_linen_inside_nnx_is_refused_by_name():
    method = aj.Bottleneck("second/head", 2, dropout=0.1)
    with raises(aj.RecipeError, "'second/head'", "0.1"):
        aj.adapt(LinenInside(nnx.Rngs(0)), method, rngs=nnx.Rngs(1), example_inputs=(X,))


@pytest.mark.witness("LoRA")
@pytest.mark.parametrize("method", LEAF_METHODS, ids=names(LEAF_METHODS))
def test_nnx_inside_linen_computes_as_nnx_alone(method):
    linen, params, merged = adapted(NnxInside(), X, method=method)
    model = aj.adapt(OnlyNnx(nnx.Rngs(0)), method, rngs=nnx.Rngs(1), example_inputs=(X,))
    filled(model, flatten(params))
    assert_same(model, params, linen)
    y = linen.apply({"params": params}, X)
    np.testing.assert_allclose(NnxInside().apply({"params": merged}, X), y, **CLOSE)


def test_the_formula_of_lora_on_both_sides_of_either_bridge():
    model = linen_inside(aj.LoRA("{first,second/head}", 2, 3.0))
    linen, params, _ = adapted(NnxInside(), X, method=aj.LoRA("{first,second/layers/1}", 2, 3.0))
    flat = {**flatten(params), **{f"nnx/{path}": x for path, x in params_of(model).items()}}
    for path in ("first", "second/layers/1", "nnx/first", "nnx/second/head"):
        ab = (flat[f"{path}/lora/{name}"] for name in "ab")
        flat[f"{path}/kernel"] = changed(flat[f"{path}/kernel"], *ab)

    def dense(path, x):
        return x @ double(flat[f"{path}/kernel"]) + double(flat[f"{path}/bias"])

    h = np.tanh(dense("first", double(X)))
    for i in range(2):
        h = np.tanh(dense(f"second/layers/{i}", h))
    w = double(flat["second/tied"])
    y = linen.apply({"params": params}, X)
    np.testing.assert_allclose(y, np.tanh(h @ w) @ w.T, **CLOSE)

    h, w = np.tanh(dense("nnx/first", double(X))), double(flat["nnx/second/tied"])
    h = dense("nnx/second/head", np.tanh(h @ w) @ w.T)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    h = h * flat["nnx/second/norm/scale"] + flat["nnx/second/norm/bias"]
    for i in range(3):
        kernel, bias = (double(flat[f"nnx/second/layers/up/{n}"][i]) for n in ("kernel", "bias"))
        h = h + np.tanh(h @ kernel + bias)
    np.testing.assert_allclose(model(X), h, **CLOSE)


@pytest.mark.slow
def test_a_quantised_base_on_both_sides_of_either_bridge():
    small = aj.quantize(LinenInside(nnx.Rngs(0)), X, dtype="int8")
    model = shake_adapters(aj.adapt(small, LORA, rngs=nnx.Rngs(1), example_inputs=(X,)))
    floats = aj.dequantize(model)
    np.testing.assert_allclose(floats(X), model(X), **CLOSE)
    np.testing.assert_allclose(aj.merge(floats)(X), model(X), **CLOSE)
    kinds = {path: type(x) for path, x in params_of(floats).items()}
    assert kinds.keys() == params_of(model).keys()

    base = NnxInside().init(KEY, X)["params"]
    linen = aj.adapt(NnxInside(), LORA)
    params = aj.init_adapters(linen, aj.quantize(NnxInside(), base, X, dtype="int8"), KEY, X)
    trained, frozen = aj.partition(params, linen.recipe)
    params = aj.merge_trees(drawn_like(trained), frozen)
    y = linen.apply({"params": params}, X)
    np.testing.assert_allclose(linen.apply({"params": aj.dequantize(params)}, X), y, **CLOSE)
    assert jax.tree.structure(aj.dequantize(aj.partition(params, linen.recipe)[1])) == (
        jax.tree.structure(base)
    )


def shake_adapters(model):
    nnx.update(model, drawn_like(nnx.state(model, aj.nnx.AdapterParam)))
    return model


def test_adapters_of_both_sides_in_files(tmp_path):
    model = linen_inside(LORA)
    base = LinenInside(nnx.Rngs(0))
    nnx.update(base, nnx.state(model, lambda path, x: type(x) is nnx.Param))
    aj.save_adapter(tmp_path / "nnx", model)
    loaded = aj.load_adapter(tmp_path / "nnx", base, None, X)
    np.testing.assert_array_equal(loaded(X), model(X))
    report = aj.audit(model)
    count = sum(x.size for x in params_of(model, aj.nnx.AdapterParam).values())
    assert report.adapter_parameters == count == sum(e.expected for e in report.entries)

    fingerprints._known.clear()  # the other model's draws are in part those of this one
    linen, params, _ = adapted(NnxInside(), X)
    trained, frozen = aj.partition(params, linen.recipe)
    aj.save_adapter(tmp_path / "linen", trained, linen.recipe)
    linen, again = aj.load_adapter(tmp_path / "linen", NnxInside(), frozen, X)
    assert shapes(again) == shapes(params)
    for tree in (again, aj.merge_trees(unflatten(flatten(trained)), frozen)):
        np.testing.assert_array_equal(
            linen.apply({"params": tree}, X), linen.apply({"params": params}, X)
        )
    assert aj.audit(linen, params).adapter_parameters == sum(
        x.size for x in jax.tree.leaves(trained)
    )


def test_a_linen_model_with_an_nnx_list_initialises_its_adapters():
    linen, params, _ = adapted(NnxInside(), X)
    assert shapes(linen.init(KEY, X)["params"]) == shapes(params)


@pytest.mark.witness("method0")
@pytest.mark.parametrize("method", [aj.Bottleneck("**", 2), aj.Bottleneck("second", 2)])
def test_nnx_inside_linen_with_adapters_on_outputs(method):
    """On linen's modules, of which the NNX module as a whole is one; not on its parts."""
    linen = aj.adapt(NnxInside(), method)
    base = NnxInside().init(KEY, X)["params"]
    if method.targets == ("**",):
        with pytest.warns(aj.AdapterWarning, match="second/layers/0"):
            params = aj.init_adapters(linen, base, KEY, X)
    else:
        params = aj.init_adapters(linen, base, KEY, X)
        assert shapes(linen.init(KEY, X)["params"]) == shapes(params)
    params = jax.tree.map(lambda x: x / 2, drawn_like(params))
    targets = tuple(f"!second/{part}" for part in ("layers/**", "layers"))
    nnx_method = aj.Bottleneck((*method.targets, *targets), 2)
    model = aj.adapt(OnlyNnx(nnx.Rngs(0)), nnx_method, rngs=nnx.Rngs(1), example_inputs=(X,))
    filled(model, flatten(params))
    assert_same(model, params, linen)


def test_adapters_on_outputs_of_parts_of_an_nnx_module_are_refused_by_name():
    model = aj.adapt(NnxInside(), aj.Bottleneck("second/layers/*", 2))
    with raises(aj.TargetError, "second/layers/0", "around it"):
        aj.init_adapters(model, NnxInside().init(KEY, X)["params"], KEY, X)


class ListInside(nn.Module):
    """A linen module with an NNX module inside, which has a list."""

    @nn.compact
    def __call__(self, x):
        return bridge.to_linen(Stack, name="stack")(nn.Dense(4, name="up")(x))


def test_bridges_in_bridges():
    """NNX in linen in NNX, and all in NNX once more."""

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.second = bridge.ToNNX(ListInside(), rngs=rngs).lazy_init(X)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    method = aj.LoRA(("second/stack/layers/*", "second/stack/tied", "second/up"), 2, 3.0)
    model = aj.adapt(Outer(nnx.Rngs(0)), method, rngs=nnx.Rngs(1), example_inputs=(X,))
    flat = params_of(shaken(model))
    assert sum("lora" in path for path in flat) == 8
    h = np.tanh(double(X) @ double(flat["first/kernel"]) + double(flat["first/bias"]))
    for i, path in enumerate(("up", "stack/layers/0", "stack/layers/1")):
        ab = (flat[f"second/{path}/lora/{name}"] for name in "ab")
        h = h @ changed(flat[f"second/{path}/kernel"], *ab) + double(flat[f"second/{path}/bias"])
        h = np.tanh(h) if i else h
    w = changed(flat["second/stack/tied"], *(flat[f"second/stack/lora/tied/{n}"] for n in "ab"))
    np.testing.assert_allclose(model(X), np.tanh(h @ w) @ w.T, **CLOSE)
    merged = aj.merge(model)
    np.testing.assert_allclose(merged(X), model(X), **CLOSE)
    assert nnx.graphdef(merged) == nnx.graphdef(Outer(nnx.Rngs(0)))


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Dense(4, kernel_init=init, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        self.sow("intermediates", "h", x)
        return nn.Dropout(0.5, deterministic=not train)(x)

    def encode(self, x):
        return 2 * self(x)


def test_state_functions_and_partitioning_of_linen_inside_nnx():
    """State is updated and sown as without adapters, and the parameters stay as they are."""
    with nnx.use_eager_sharding(False):
        base = bridge.ToNNX(Stateful(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
        method = aj.Recipe(aj.LoRA("up", 2), aj.Unfreeze("norm/{scale,bias}"))
        model = shake_adapters(aj.adapt(base, method, rngs=nnx.Rngs(1), example_inputs=(X,)))
        merged, own = aj.merge(model), params_of(model)
        trained = params_of(model, aj.nnx.AdapterParam)
        np.testing.assert_allclose(model.encode(X), 2 * merged(X), **CLOSE)
        train = nnx.jit(lambda m: m(X, train=True, mutable=True))
        np.testing.assert_allclose(train(model), train(merged), **CLOSE)
    assert_close(params_of(model), own)
    assert params_of(model, aj.nnx.AdapterParam).keys() == trained.keys()
    got, expected = (
        {"/".join(path): x for path, x in nnx.to_flat_state(nnx.state(m, nnx.Not(nnx.RngState)))}
        for m in (model, merged)
    )
    assert got.keys() - expected.keys() == {"up/lora/a", "up/lora/b"}
    assert np.abs(expected["norm/mean"][...]).max() > 1e-3
    for path, x in expected.items():
        assert got[path].get_metadata() == x.get_metadata()
        if not isinstance(x, nnx.Param):
            assert type(got[path]) is type(x)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, **CLOSE),
                got[path].get_value(),
                x.get_value(),
            )


class TwoFunctions(nn.Module):
    def setup(self):
        self.up = nn.Dense(4)

    def __call__(self, x):
        return self.up(x)

    def twice(self, x):
        return self.up(self.up(x))


def test_the_adapter_on_a_linen_output_acts_in_calls_alone():
    """As in linen: on `__call__` of the module, and not on other functions of it."""
    base = bridge.ToNNX(TwoFunctions(), rngs=nnx.Rngs(0)).lazy_init(X)
    model = aj.adapt(base, aj.Bottleneck(("**", "!up"), 2), rngs=nnx.Rngs(1), example_inputs=(X,))
    assert set(params_of(shake_adapters(model))) - set(params_of(base)) == {
        f"adapter/{part}/{name}" for part in ("down", "up") for name in ("kernel", "bias")
    }
    np.testing.assert_array_equal(model.twice(X), base.twice(X))
    assert jnp.abs(model(X) - base(X)).max() > 0.1


class Boxed(nnx.Module):
    """Raw weights in a container: `read` takes them out of it."""

    def __init__(self, container, read):
        self.ws, self.read = container, read

    def __call__(self, x):
        up, down = self.read(self.ws)
        return x @ up[...] @ down[...]


def raw():
    return nnx.Param(jnp.ones((4, 5))), nnx.Param(jnp.ones((5, 4)))


def named():
    return dict(zip(("up", "down"), raw(), strict=True))


def by_name(ws):
    assert sorted(ws) == ["down", "up"] and len(ws) == 2
    return ws["up"], ws["down"]


CONTAINERS = {
    "nnx.List": (lambda: nnx.List(raw()), tuple, "ws/0", "ws/1"),
    "list": (
        lambda: nnx.data(list(raw())),
        lambda ws: [*ws] if type(ws) is list else None,
        "ws/0",
        "ws/1",
    ),
    "tuple": (
        lambda: nnx.data(raw()),
        lambda ws: ws if type(ws) is tuple else None,
        "ws/0",
        "ws/1",
    ),
    "nnx.Dict": (lambda: nnx.Dict(named()), by_name, "ws/up", "ws/down"),
    "dict": (lambda: nnx.data(named()), by_name, "ws/up", "ws/down"),
    "dict of numbers": (
        lambda: nnx.data(dict(enumerate(raw()))),
        lambda ws: (ws[0], ws[1]),
        "ws/0",
        "ws/1",
    ),
    "list of dicts": (
        lambda: nnx.data([named()]),
        lambda ws: by_name(ws[0]),
        "ws/0/up",
        "ws/0/down",
    ),
    "dict of dicts": (
        lambda: nnx.data({"a": named()}),
        lambda ws: by_name(ws["a"]),
        "ws/a/up",
        "ws/a/down",
    ),
    "dict of lists": (lambda: nnx.Dict(a=nnx.List(raw())), lambda ws: ws["a"], "ws/a/0", "ws/a/1"),
}


def weights(model, paths):
    """The weights at some paths in float64, changed where they have adapters."""
    flat = params_of(model)
    for path in paths:
        module, _, name = path.rpartition("/")
        ab = [flat.get(f"{module}/lora/{name}/{factor}") for factor in "ab"]
        yield double(flat[path]) if ab[0] is None else changed(flat[path], *ab)


@pytest.mark.witness("nnx.List", "dict of lists")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_weights_in_containers(kind, tmp_path):
    make, read, *paths = CONTAINERS[kind]
    base = shaken(Boxed(make(), read))
    for targets, count in (("**", 2), (paths[1], 1)):
        method = aj.LoRA(targets, 2, 3.0)
        model = aj.adapt(base, method, rngs=nnx.Rngs(1), example_inputs=(X,))
        np.testing.assert_array_equal(model(X), base(X))
        shake_adapters(model)
        up, down = weights(model, paths)
        expected = double(X) @ up @ down
        np.testing.assert_allclose(nnx.jit(lambda m: m(X))(model), expected, **CLOSE)
        merged = aj.merge(model)
        np.testing.assert_allclose(merged(X), expected, **CLOSE)
        assert nnx.graphdef(merged) == nnx.graphdef(base)
        assert len(params_of(model, aj.nnx.AdapterParam)) == 2 * count
        assert aj.audit(model).adapter_parameters == 2 * 9 * count
        aj.save_adapter(tmp_path / str(count), model)
        loaded = aj.load_adapter(tmp_path / str(count), base, None, X)
        np.testing.assert_array_equal(loaded(X), model(X))
        nnx.update(model, nnx.state(Boxed(make(), read)))  # a base's own state fits as ever
        assert all(jnp.all(params_of(model)[path] == 1) for path in paths)


@pytest.mark.witness("nnx.List", "dict of lists")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_quantised_weights_in_containers(kind):
    make, read, *paths = CONTAINERS[kind]
    base = shaken(Boxed(make(), read))
    small = aj.quantize(base, X, dtype="int8")
    floats = aj.dequantize(small)
    assert nnx.graphdef(floats) == nnx.graphdef(base)
    assert any(np.any(params_of(floats)[path] != params_of(base)[path]) for path in paths)
    np.testing.assert_allclose(small(X), floats(X), **CLOSE)
    model = shake_adapters(aj.adapt(small, LORA, rngs=nnx.Rngs(1), example_inputs=(X,)))
    up, down = weights(aj.dequantize(model), paths)
    np.testing.assert_allclose(model(X), double(X) @ up @ down, **CLOSE)


Pair = collections.namedtuple("Pair", ["up", "down"])


def test_other_containers_are_refused_by_name():
    base = Boxed(nnx.data(Pair(*raw())), tuple)
    for change in (
        lambda: aj.adapt(base, LORA, rngs=nnx.Rngs(1), example_inputs=(X,)),
        lambda: aj.quantize(base, X, dtype="int8"),
    ):
        with raises(aj.RecipeError, "'ws/down'", "'!ws/down'"):
            change()


class RawInLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        make = lambda rngs: Boxed(nnx.List(raw()), tuple)  # noqa: E731
        return bridge.to_linen(make, name="second")(x)


def test_numbered_weights_inside_linen_are_refused_by_name():
    with raises(aj.RecipeError, "'second/ws/0'", "nnx.Dict"):
        adapted(RawInLinen(), X)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(5, name="up"), name="norm")(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, aj.DoRA("**", 2)], ids=["LoRA", "DoRA"])
def test_names_with_slashes(method):
    """The scale of a weight norm is named `up/kernel/scale`, in one name."""
    model, params, merged = adapted(Normed(), X, method=method)
    assert shapes(params["norm"]) == {"up/kernel/scale": (5,)}
    y = model.apply({"params": params}, X)
    np.testing.assert_allclose(Normed().apply({"params": merged}, X), y, **CLOSE)
    if method == LORA:
        w = changed(params["up"]["kernel"], *(params["up"]["lora"][n] for n in "ab"))
        w = w / np.linalg.norm(w, axis=0) * params["norm"]["up/kernel/scale"]
        np.testing.assert_allclose(y, double(X) @ w + params["up"]["bias"], **CLOSE)
