"""Calls of adapted models other than `model(x)`, models in models, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like, shapes
from helpers.errors import raises
from test_styles import KEY, Raw, RawNnx, X, changed, straight_through

import adapters_jax as aj
from adapters_jax.linen import reads_of
from adapters_jax.trace.inputs import Inputs
from adapters_jax.trees import unflatten

LORA = aj.LoRA("**", 2, 3.0)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def adapted(model, *inputs, method=LORA, **kwargs):
    """An adapted linen model, its drawn parameters, and these merged."""
    base = jax.eval_shape(lambda: model.init(KEY, *inputs, **kwargs)["params"])
    model = aj.adapt(model, method)
    params = drawn_like(aj.init_adapters(model, base, KEY, *inputs, **kwargs))
    return model, params, aj.merge(model, params, *inputs, **kwargs)


def shaken(model):
    """An NNX model with noise in all its parameters."""
    state = nnx.state(model, nnx.Param)
    # Not NumPy's arrays: it multiplies them itself, with another last bit on some processors.
    nnx.update(model, jax.tree.map(jnp.asarray, drawn_like(state)))
    return model


class Autoencoder(nn.Module):
    """A model of two methods over raw parameters and submodules, public and private."""

    def setup(self):
        self.encoder, self._head = nn.Dense(5), nn.Dense(4)
        self.w = self.param("w", nn.initializers.ones, (5, 5))

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return jnp.tanh(self.encoder(x)) @ self.w

    def decode(self, h):
        return self._head(h) + h @ self.w[:, :4]

    def get_encoder(self):
        return self.encoder

    def _get_head(self):
        return self._head


class AutoencoderNnx(nnx.Module):
    def __init__(self, rngs):
        self.encoder, self._head = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.w = nnx.Param(jnp.ones((5, 5)))

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return jnp.tanh(self.encoder(x)) @ self.w[...]

    def decode(self, h):
        return self._head(h) + h @ self.w[:, :4]

    def _get_head(self):
        return self._head


H = drawn((3, 5), 2)
CALLS = {
    "call": lambda m: m(X),
    "encode": lambda m: m.encode(X),
    "decode": lambda m: m.decode(H),
    "submodule": lambda m: m.encoder(X),
    "getter": lambda m: m.get_encoder()(X),
    "private_getter": lambda m: m._get_head()(H),
    "private_submodule": lambda m: m._head(H),
    "several": lambda m: m._head(m.encode(X)) + m.decode(H),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_into_a_linen_model_has_its_adapters(name):
    call = CALLS[name]
    model, params, merged = adapted(Autoencoder(), X)
    expected = Autoencoder().apply({"params": merged}, method=call)
    base = Autoencoder().apply({"params": {k: params[k] for k in merged}}, method=call)
    assert np.abs(expected - base).mean() > 0.1
    np.testing.assert_allclose(model.apply({"params": params}, method=call), expected, **CLOSE)
    bound = model.bind({"params": params})
    np.testing.assert_allclose(call(bound), expected, **CLOSE)
    np.testing.assert_allclose(call(bound), expected, **CLOSE)
    jitted = jax.jit(lambda p: call(model.bind({"params": p})))
    np.testing.assert_allclose(jitted(params), expected, **CLOSE)


def test_looking_for_an_evaluation_flag_reads_no_weights():
    """`setup` of the model itself reads a raw weight, which must be the changed one."""
    method = aj.LoRA("**", 2, 3.0, dropout=0.5)
    model, params, merged = adapted(Autoencoder(), X, method=method)
    expected = Autoencoder().apply({"params": merged}, X)
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, **CLOSE)


def test_a_method_by_its_name():
    model, params, merged = adapted(Autoencoder(), X)
    for name, x in (("encode", X), ("decode", H)):
        expected = Autoencoder().apply({"params": merged}, x, method=name)
        for method in (name, getattr(Autoencoder, name)):
            y = model.apply({"params": params}, x, method=method)
            np.testing.assert_allclose(y, expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "getter"])
def test_every_way_into_an_nnx_model_has_its_adapters(name):
    model = aj.adapt(AutoencoderNnx(nnx.Rngs(0)), LORA, rngs=nnx.Rngs(1), example_inputs=(X,))
    merged = aj.merge(shaken(model))
    assert set(nnx.to_pure_dict(nnx.state(model))) == {"encoder", "_head", "w", "lora"}
    np.testing.assert_allclose(CALLS[name](model), CALLS[name](merged), **CLOSE)
    w, a, b = (double(x[...]) for x in (vars(model)["w"], model.lora["a"], model.lora["b"]))
    np.testing.assert_allclose(merged.w[...], changed(w, a, b), **CLOSE)


def test_parameters_that_the_call_does_not_touch():
    """The inputs of another function show how a decoder reads its weights."""

    class Two(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(5), nn.Dense(4)

        def __call__(self, x):
            return self.first(x)

        def both(self, x):
            return self.second(self.first(x))

    both = Two().init(KEY, X, method="both")["params"]
    model = aj.adapt(Two(), aj.LoRA(("first", "second"), 2, 3.0))
    with raises(aj.TargetError, "'second'"):
        aj.init_adapters(model, both, KEY, X)
    params = drawn_like(aj.init_adapters(model, both, KEY, X, method="both"))
    merged = aj.merge(model, params, X, method="both")
    for method in ("both", None):
        got = model.apply({"params": params}, X, method=method)
        expected = Two().apply({"params": merged}, X, method=method)
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_an_entry_point_and_keywords_in_nnx():
    class Keyed(nnx.Module):
        def __init__(self):
            self.w, self.v = nnx.Param(jnp.ones((4, 5))), nnx.Param(jnp.ones((4, 5)))

        def encode(self, *, x, scale=1.0):
            return scale * (x @ self.w[...])

    inputs = aj.inputs(x=X, method="encode")
    model = aj.adapt(Keyed(), aj.LoRA("w", 2, 3.0), rngs=nnx.Rngs(0), example_inputs=inputs)
    shaken(model)
    w = changed(vars(model)["w"][...], *(model.lora["w"][n][...] for n in "ab"))
    np.testing.assert_allclose(model.encode(x=X, scale=2.0), 2 * double(X) @ w, **CLOSE)


def test_everything_on_shapes():
    model, params, merged = adapted(Autoencoder(), X)
    abstract, x = (jax.eval_shape(lambda t=t: t) for t in (params, X))
    assert shapes(aj.init_adapters(model, abstract, KEY, x)) == shapes(params)
    assert shapes(jax.eval_shape(lambda p: aj.merge(model, p, x), abstract)) == shapes(merged)
    y = jax.eval_shape(lambda p, x: model.apply({"params": p}, x), abstract, x)
    assert (y.shape, y.dtype) == ((3, 4), jnp.float32)
    whole = jax.eval_shape(model.init, KEY, x)["params"]
    assert shapes(whole) == shapes(params)
    other = nnx.eval_shape(lambda: AutoencoderNnx(nnx.Rngs(0)))
    other = aj.adapt(other, LORA, rngs=nnx.Rngs(1), example_inputs=(x,))
    assert shapes(nnx.to_pure_dict(nnx.state(other))) == shapes(params)
    y = nnx.eval_shape(lambda m, x: aj.merge(m)(x) + m(x), other, x)
    assert (y.shape, y.dtype) == ((3, 4), jnp.float32)


def test_eight_experts_have_a_pair_each():
    """1,536 parameters: 8 times 4 (16 + 32), as PEFT's `target_parameters`."""
    run = lambda w, x: jnp.einsum("ecd,edf->ecf", x, w["w"])  # noqa: E731
    x, base = jnp.ones((8, 2, 16)), {"w": jax.ShapeDtypeStruct((8, 16, 32), jnp.float32)}
    model = aj.adapt(Raw({"w": (8, 16, 32)}, run), aj.LoRA("**", 4))
    params = aj.init_adapters(model, base, KEY, x)
    assert shapes(params["lora"]) == {"a": (8, 16, 4), "b": (8, 4, 32)}
    report = aj.audit(model, params)
    assert report.adapter_parameters == 1536
    (entry,) = report.entries
    assert (entry.formula, entry.expected, entry.actual) == ("8*(4*(16 + 32))", 1536, 1536)


def test_a_model_whose_control_flow_depends_on_values():
    def run(w, x):
        return x @ w["w"] if x[0, 0] > 0 else x @ w["w"] * 2

    x = np.abs(X)
    base = {"w": drawn((4, 5))}
    model = aj.adapt(Raw({"w": (4, 5)}, run), LORA)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        aj.init_adapters(model, base, KEY, x)
    params = {**base, "lora": {"a": drawn((4, 2), 1), "b": drawn((2, 5), 2)}}
    w = changed(base["w"], **params["lora"])
    np.testing.assert_allclose(model.apply({"params": params}, x), double(x) @ w, **CLOSE)
    np.testing.assert_allclose(model.apply({"params": params}, -x), -2 * double(x) @ w, **CLOSE)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(model.apply)({"params": params}, x)


def test_control_flow_that_depends_on_a_changed_weight():
    """The condition is that of the merged weight, whose entries are a tenth of the base's."""

    def run(w, x):
        return x if w["w"].sum() > 2.0 else x @ w["w"]

    base = {"w": np.ones((4, 4), np.float32)}
    factors = {"a": np.ones((4, 1), np.float32), "b": np.full((1, 4), -0.9, np.float32)}
    params = {**base, "lora": {"w": factors}}
    model = aj.adapt(Raw({"w": (4, 4)}, run), aj.LoRA("w", 1))
    np.testing.assert_allclose(
        model.apply({"params": params}, X), X @ np.full((4, 4), 0.1), **CLOSE
    )


SHAPES = {"w": (4, 5), "scale": (4,), "table": (4, 4)}


def mixed(w, x):
    return (x * w["scale"] + w["table"][0]) @ w["w"]


class Integers(nn.Module):
    @nn.compact
    def __call__(self, x):
        ones = nn.initializers.ones
        dtypes = {"table": jnp.int32}
        return mixed(
            {n: self.param(n, ones, s, dtypes.get(n, jnp.float32)) for n, s in SHAPES.items()}, x
        )


class IntegersNnx(RawNnx):
    def __init__(self):
        super().__init__(SHAPES, mixed)
        self.table = nnx.Param(jnp.ones((4, 4), jnp.int32))


@pytest.mark.parametrize(
    ("recipe", "kind", "data"),
    [
        (aj.LoRA("scale", 2), aj.TargetError, ("'scale'", "[4]")),
        (aj.LoRA("table", 2), aj.TargetError, ("'table'", "int32")),
        (aj.LoRA(("w", "scale"), 2), aj.TargetError, ("'scale'", "[4]")),
        (aj.LoRA("w", 5), aj.RecipeError, ("rank 5", "min(4, 5)")),
        (aj.DoRA("w", 5), aj.RecipeError, ("rank 5", "min(4, 5)")),
        (aj.Recipe(aj.LoRA("w", 2), aj.LoRA("**", 2)), aj.RecipeError, ("two", "lora")),
        (aj.Recipe(aj.LoRA("w", 2), aj.DoRA("**", 2)), aj.RecipeError, ("two", "lora")),
        (aj.Recipe(aj.IA3("**"), aj.DoRA("w", 2)), aj.RecipeError, ("DoRA", "''")),
        (aj.LoRA("v", 2), aj.TargetError, ("'v'", "w")),
    ],
)
def test_what_cannot_be_adapted_is_named(recipe, kind, data):
    base = jax.eval_shape(lambda: Integers().init(KEY, X)["params"])
    with raises(kind, *data):
        aj.init_adapters(aj.adapt(Integers(), recipe), base, KEY, X)
    with raises(kind, *data):
        aj.adapt(IntegersNnx(), recipe, rngs=nnx.Rngs(0), example_inputs=(X,))


def test_a_wildcard_that_finds_no_weight_that_meets_an_input():
    run = lambda w, x: x * w["w"][0]  # noqa: E731
    base = {"w": drawn((3, 4))}
    with raises(aj.TargetError, "'**'", "w ("):
        aj.init_adapters(aj.adapt(Raw({"w": (3, 4)}, run), LORA), base, KEY, X)
    with raises(aj.TargetError, "'**'", "w ("):
        other = RawNnx({"w": (3, 4)}, run)
        aj.adapt(other, LORA, rngs=nnx.Rngs(0), example_inputs=(X,))


def test_inside_a_gradient_of_its_own_the_sum_is_read_and_recorded():
    run = lambda w, x: x @ straight_through(w["w"])  # noqa: E731
    model = Raw({"w": (4, 5)}, run)
    variables = unflatten({"params/w": jax.ShapeDtypeStruct((4, 5), jnp.float32)})
    (read,) = reads_of(model, variables, Inputs((X,), {}))[0]["w"].reads
    assert (read.how, read.operation, *read.inputs) == ("sum", "dot_general", 0)
    whole = aj.adapt(model, aj.LoRA("w", 2, 3.0))
    a, b = drawn((4, 2), 1), drawn((2, 5), 2)
    params = {"w": drawn((4, 5)), "lora": {"w": {"a": a, "b": b}}}
    got = jax.grad(lambda p: whole.apply({"params": p}, X).sum())(params)["lora"]["w"]
    slope = double(X).T @ np.ones((3, 5))  # of W', through the identity backwards
    np.testing.assert_allclose(got["a"], 1.5 * slope @ b.T, **CLOSE)
    np.testing.assert_allclose(got["b"], 1.5 * a.T @ slope, **CLOSE)
