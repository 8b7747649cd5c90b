"""Methods on outputs of modules that return more than an array, against plain formulas."""

import collections
import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, struct
from flax.core import FrozenDict
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.recipe import as_compared
from adapters_jax.testing import check_method
from adapters_jax.trace import calls
from adapters_jax.trace.calls import Returned, part_of, with_part
from adapters_jax.trees import flatten

B, T, D, M = 2, 3, 4, 2
X, MASK, KEY = drawn((B, T, D), 1), drawn((B, T, 1), 2), jax.random.key(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Pair(NamedTuple):
    weights: Any
    hidden: Any


@struct.dataclass
class Record:
    hidden: Any
    cache: Any = None
    kind: str = struct.field(pytree_node=False, default="record")


# How a module returns its output y beside the attention weights w, and the path of y.
CONTAINERS = {
    "tuple": (lambda y, w: (w, y), "1"),
    "list": (lambda y, w: [y, w, None], "0"),
    "dict": (lambda y, w: {"z": y, "a": w, "n": 3}, "z"),
    "ordered": (lambda y, w: collections.OrderedDict(z=y, a=w), "z"),
    "frozen": (lambda y, w: FrozenDict({"z": y, "a": {"w": w}}), "z"),
    "named": (lambda y, w: Pair(w, y), "hidden"),
    "dataclass": (lambda y, w: Record(y, {"w": w}), "hidden"),
    "nested": (lambda y, w: ({"w": w, "b": [Pair(None, y)]}, jnp.arange(3)), "0/b/0/hidden"),
    "alone": (lambda y, w: (y, jnp.float32(0.5)), "0"),
    "cache": (lambda y, w: ({"k": jnp.stack([y, y]), "index": jnp.int32(2)}, y + 0), "1"),
}


class Layer(nn.Module):
    """y = x W + b beside weights, in a container."""

    container: str

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(D, name="dense")(x)
        return CONTAINERS[self.container][0](y, jnp.einsum("btd,bsd->bts", x, x))


class NnxLayer(nnx.Module):
    def __init__(self, container):
        self.dense = nnx.Linear(D, D, rngs=nnx.Rngs(0))
        self.container = container

    def __call__(self, x):
        return CONTAINERS[self.container][0](self.dense(x), jnp.einsum("btd,bsd->bts", x, x))


def branch(leaves, x):
    """up(tanh(down(x))) in float64."""
    hidden = np.tanh(double(x) @ double(leaves["down"]["kernel"]) + double(leaves["down"]["bias"]))
    return hidden @ double(leaves["up"]["kernel"]) + double(leaves["up"]["bias"])


def dense(params, x):
    return double(x) @ double(params["kernel"]) + double(params["bias"])


def bottleneck(targets=("**", "!*"), **fields):
    return aj.Recipe(aj.Bottleneck(targets, M, activation="tanh", **fields))


def grown(base, recipe, *args, **kwargs):
    """A linen model with parameters, drawn."""
    model = aj.adapt(base, recipe)
    shapes = jax.eval_shape(lambda: model.init(KEY, *args, **kwargs))["params"]
    return model, drawn_like(shapes, 7)


def in_nnx(base, recipe, params, inputs):
    """The same in NNX, with these parameters."""
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
    held = {path: x.shape for path, x in flatten(nnx.state(model, nnx.Param)).items()}
    assert len(held) == len(flatten(params))
    nnx.update(model, params)
    return model


def structure(y):
    """The types of a structure and the order of its names, with arrays by shape."""
    if isinstance(y, dict | FrozenDict):
        return type(y), [(key, structure(x)) for key, x in y.items()]
    if isinstance(y, Record):
        return Record, structure(y.hidden), structure(y.cache), y.kind
    if isinstance(y, tuple | list):
        return type(y), [structure(x) for x in y]
    return getattr(y, "shape", y)


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_output_that_is_meant_is_adapted_and_the_rest_stays(container):
    path = CONTAINERS[container][1]
    model, params = grown(Layer(container), bottleneck(), X)
    y = dense(params["dense"], X)
    expected = y + branch(params["adapter"], y)
    assert np.abs(expected - y).mean() > 0.1
    base = Layer(container).apply({"params": {"dense": params["dense"]}}, X)
    other = in_nnx(NnxLayer(container), bottleneck(), params, (X,))
    for got in (model.apply({"params": params}, X), other(X)):
        assert structure(got) == structure(base)
        np.testing.assert_allclose(part_of(got, path), expected, **CLOSE)
        rest = with_part(got, path, part_of(base, path))
        jax.tree.map(np.testing.assert_allclose, jax.tree.leaves(rest), jax.tree.leaves(base))


class Both(nn.Module):
    """Two outputs of the shape of the input."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="dense")(x), {"copy": jnp.sin(x), "ids": jnp.arange(2)}


class NnxBoth(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(D, D, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x), {"copy": jnp.sin(x), "ids": jnp.arange(2)}


@pytest.mark.parametrize("output", [0, "0", "1/copy"])
def test_output_says_which(output):
    recipe = bottleneck(output=output)
    assert aj.Recipe.from_json(recipe.to_json()) == recipe
    model, params = grown(Both(), recipe, X)
    for got in (
        jax.jit(model.apply)({"params": params}, X),
        in_nnx(NnxBoth(), recipe, params, (X,))(X),
    ):
        first, second = dense(params["dense"], X), np.sin(double(X))
        if str(output) == "0":
            first = first + branch(params["adapter"], first)
        else:
            second = second + branch(params["adapter"], second)
        np.testing.assert_allclose(got[0], first, **CLOSE)
        np.testing.assert_allclose(got[1]["copy"], second, **CLOSE)


@pytest.fixture
def Shift():
    """A method of another package, which adds a trained number to one of several outputs."""

    @aj.register_method
    @dataclasses.dataclass(frozen=True)
    class Shift(aj.Method):
        kind, slot, leaf_names = "shift_of_outputs", "shift_of_outputs", ("bias",)
        output = "1/copy"

        def leaves(self, point):
            return {"bias": aj.Leaf((point.width,), lambda key, shape: jnp.zeros(shape))}

        def count(self, path, shapes, weight):
            return aj.Count(f"{D}", D)

        def forward(self, leaves, point, x, y, key=None):
            return y + leaves["bias"]

    yield Shift
    aj.methods.METHODS.pop("shift_of_outputs")


@pytest.mark.parametrize("placement", ["sequential", "norm"])
def test_two_methods_on_one_module(Shift, placement):
    """On two of its outputs; and on one, where the second runs the module with the first again."""
    output = "0" if placement == "sequential" else "1/copy"
    recipe = aj.Recipe(Shift(("**", "!*")), bottleneck(placement=placement, output=output))
    model, params = grown(Both(), recipe, X)
    first = dense(params["dense"], X)
    second = np.sin(double(X)) + double(params["shift_of_outputs"]["bias"])
    if placement == "sequential":
        first = first + branch(params["adapter"], first)
    else:
        moved = double(X) + branch(params["adapter"], second)
        second = np.sin(moved) + double(params["shift_of_outputs"]["bias"])
    for got in (
        model.apply({"params": params}, X),
        in_nnx(NnxBoth(), recipe, params, (X,))(X),
    ):
        np.testing.assert_allclose(got[0], first, **CLOSE)
        np.testing.assert_allclose(got[1]["copy"], second, **CLOSE)
    assert aj.audit(model, params).adapter_parameters == D + aj.bottleneck_parameters(D, M)


class Outer(nn.Module):
    """A model around a module."""

    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


class NnxOuter(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x)


CAME = ("0: float32[2, 3, 4]", "1/copy: float32[2, 3, 4]", "1/ids: int32[2]")


@pytest.mark.parametrize(
    ("output", "data"),
    [(None, ("2", "output='1/copy'")), ("ids", ("output='ids'",)), ("1/ids", ("output='1/ids'",))],
)
def test_where_none_is_plainly_meant_the_error_lists_what_came(output, data):
    recipe = bottleneck("inner", output=output)
    with raises(aj.TargetError, "inner (Both ", *CAME, *data):
        aj.adapt(Outer(Both()), recipe).init(KEY, X)
    with raises(aj.TargetError, "inner (NnxBoth ", *CAME, *data):
        aj.adapt(NnxOuter(NnxBoth()), recipe, rngs=nnx.Rngs(0), example_inputs=(X,))


def test_linen_modules_that_are_fields_of_others():
    """In a field of any name, also that of the wrapper's own, and in lists of fields."""
    base = Outer(Outer(nn.Sequential([nn.Dense(D), Layer("tuple")])))
    target = "inner/inner/layers_1"
    model, params = grown(base, bottleneck(target), X)
    first, second = (params["inner"]["inner"][f"layers_{i}"] for i in range(2))
    y = dense(second["dense"], dense(first, X))
    got = model.apply({"params": params}, X)
    np.testing.assert_allclose(got[1], y + branch(second["adapter"], y), **CLOSE)
    own = base.init(KEY, X)["params"]
    again = aj.init_adapters(model, own, KEY, X)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, params)


def test_a_recurrent_cell():
    """Its output is also its carry, which stays as it is."""
    base = nn.RNN(nn.GRUCell(D))
    model, params = grown(base, bottleneck("cell", output=1), X)
    cell = {name: leaf for name, leaf in params["cell"].items() if name != "adapter"}
    y = double(base.apply({"params": {"cell": cell}}, X))
    expected = y + branch(params["cell"]["adapter"], y)
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, **CLOSE)


def test_an_array_alone_has_no_position():
    with raises(aj.TargetError, "Dense", "float32[2, 3, 5]", "output='0'"):
        aj.adapt(nn.Dense(5), bottleneck("**", output=0)).init(KEY, X)
    with raises(aj.TargetError, "Linear", "float32[5]", "output='0'"):
        aj.adapt(nnx.Linear(D, 5, rngs=nnx.Rngs(0)), bottleneck("**", output=0), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("output", [-1, True, "", 1.0, ("1",)])
def test_what_output_cannot_be(output):
    with raises(aj.UserError, f"output={output!r}"):
        aj.Bottleneck("**", M, output=output)


class Fickle(nn.Module):
    """Returns its cache beside its output only when asked for it."""

    @nn.compact
    def __call__(self, x, both=False):
        y = nn.Dense(D, name="dense")(x)
        return (x, y) if both else y


class NnxFickle(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(D, D, rngs=nnx.Rngs(0))

    def __call__(self, x, both=False):
        return (x, self.dense(x)) if both else self.dense(x)


def test_a_later_call_that_returns_something_else_is_an_error_and_never_unadapted():
    model, params = grown(Fickle(), bottleneck(), X)
    other = in_nnx(NnxFickle(), bottleneck(), params, (X,))
    for call in (lambda **k: model.apply({"params": params}, X, **k), lambda **k: other(X, **k)):
        y = dense(params["dense"], X)
        np.testing.assert_allclose(call(), y + branch(params["adapter"], y), **CLOSE)
        with raises(aj.RecipeError, "0: float32[2, 3, 4], 1: float32[2, 3, 4]", "output='1'"):
            call(both=True)


class Stack(nn.Module):
    """Scanned and rematerialised layers that return `(weights, y)`, the first by keyword alone."""

    @nn.compact
    def __call__(self, x):
        _, x = Keyword(name="first")(x=x, mask=MASK)
        body = nn.remat(Body)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(body, length=2, **axes)(name="layers")(x, None)[0]


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Layer("tuple", name="layer")(x)[1], None


class Keyword(nn.Module):
    """Takes its arguments by keyword alone."""

    @nn.compact
    def __call__(self, *, mask, x):
        return mask, nn.Dense(D, name="dense")(x) * mask


class NnxStack(nnx.Module):
    def __init__(self):
        self.first = NnxKeyword()
        self.layers = nnx.vmap(lambda _: NnxBody(), out_axes=0)(jnp.arange(2))

    def __call__(self, x):
        _, x = self.first(x=x, mask=MASK)
        run = nnx.remat(lambda layer, x: layer(x))
        return nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


class NnxBody(nnx.Module):
    def __init__(self):
        self.layer = NnxLayer("tuple")

    def __call__(self, x):
        return self.layer(x)[1]


class NnxKeyword(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(D, D, rngs=nnx.Rngs(0))

    def __call__(self, *, mask, x):
        return mask, self.dense(x) * mask


def test_scanned_rematerialised_and_by_keyword():
    recipe = bottleneck(("first", "layers/layer"), output="1")
    model, params = grown(Stack(), recipe, X)
    first = params["first"]
    y = dense(first["dense"], X) * double(MASK)
    x = y + branch(first["adapter"], y)
    for i in range(2):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["layer"])
        y = dense(own["dense"], x)
        x = y + branch(own["adapter"], y)
    other = in_nnx(NnxStack(), recipe, params, (X,))
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, X), x, **CLOSE)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(other, X), x, **CLOSE)
    assert aj.audit(model, params).adapter_parameters == 3 * aj.bottleneck_parameters(D, M)


def test_a_parallel_adapter_reads_the_first_array_of_the_signature():
    data = ("parallel", "'first'", "(2, 3, 1)", "(2, 3, 4)")  # which here is the mask
    with raises(aj.RecipeError, *data):
        grown(Stack(), bottleneck("first", placement="parallel", output=1), X)


class Named(nn.Module):
    """A norm that is called by keyword, beside another array, and returns a dictionary."""

    @nn.compact
    def __call__(self, ids, x, scale):
        return {"y": nn.LayerNorm(name="norm")(x) * scale, "n": ids}


class NnxNamed(nnx.Module):
    def __init__(self):
        self.norm = nnx.LayerNorm(D, rngs=nnx.Rngs(0))

    def __call__(self, ids, x, scale):
        return {"y": self.norm(x) * scale, "n": ids}


@pytest.mark.parametrize("placement", ["parallel", "norm"])
def test_the_input_is_found_among_keywords_and_all_else_is_kept(placement):
    inputs = {"scale": X, "x": X, "ids": jnp.arange(3)}  # one array twice
    recipe = bottleneck(placement=placement)
    model, params = grown(Named(), recipe, **inputs)

    def norm(x):
        centred = double(x) - double(x).mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        own = params["norm"]
        return (y * double(own["scale"]) + double(own["bias"])) * double(X)

    if placement == "parallel":
        expected = norm(X) + branch(params["adapter"], X)
    else:
        expected = norm(double(X) + branch(params["adapter"], norm(X)))
    other = in_nnx(NnxNamed(), recipe, params, aj.inputs(**inputs))
    for got in (model.apply({"params": params}, **inputs), other(**inputs)):
        np.testing.assert_allclose(got["y"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got["n"], np.arange(3))


def test_which_argument_is_the_input():
    class Module:
        def __call__(self, ids, x=None, mask=None, **more):
            pass

    ids, module = np.arange(3), Module()
    assert calls.input_of(module, (ids, X), {"mask": MASK}) is X
    assert calls.input_of(module, (ids,), {"mask": MASK, "x": X}) is X
    assert calls.input_of(module, (ids,), {"other": X, "mask": MASK}) is MASK
    assert calls.input_of(module, (ids,), {"other": X}) is X
    assert calls.input_of(module, (ids, 1.0), {}) is ids
    assert calls.input_of(module, (), {}) is None
    again = calls.with_input(lambda *a, **k: (a, k), module, (ids,), {"mask": X, "x": X})
    assert again(3) == ((ids,), {"mask": X, "x": 3})
    again = calls.with_input(lambda *a: a, module, (X, X), {})
    assert again(3) == (3, X)
    again = calls.with_input(lambda *a, **k: (a, k), module, (ids, X), {"mask": MASK})
    assert again(3) == ((ids, 3), {"mask": MASK})


class Codec(nnx.Module):
    """Is not called: its functions are."""

    def __init__(self):
        self.dense = nnx.Linear(D, D, rngs=nnx.Rngs(0))

    def encode(self, x):
        return jnp.tanh(self.dense(x))

    def decode(self, x, mask=None):
        return self.dense(x) if mask is None else self.dense(x) * mask


class Model(nnx.Module):
    def __init__(self):
        self.codec, self.head = Codec(), nnx.Linear(D, D, rngs=nnx.Rngs(1))

    def __call__(self, x, mask=None):
        return self.head(self.codec.encode(x))

    def score(self, x, mask=None):
        return self.codec.decode(self.codec.encode(x), mask)


class LinenCodec(nn.Module):
    def setup(self):
        self.dense = nn.Dense(D)

    def encode(self, x):
        return jnp.tanh(self.dense(x))

    def decode(self, x):
        return self.dense(x)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        codec = LinenCodec(name="codec")
        return codec.decode(codec.encode(x))


def test_methods_on_outputs_act_on_what_call_returns():
    data = ("`__call__`", "Bottleneck", "decode, encode")
    with raises(aj.TargetError, "codec (Codec ", *data):
        aj.adapt(Model(), bottleneck("codec"), rngs=nnx.Rngs(0), example_inputs=(X,))
    with raises(aj.TargetError, "codec (LinenCodec ", *data):
        aj.adapt(LinenModel(), bottleneck("codec")).init(KEY, X)
    recipe, score = bottleneck("head"), aj.inputs(X, method="score")
    with raises(aj.TargetError, "head (Linear did not run its `__call__`"):
        aj.adapt(Model(), recipe, rngs=nnx.Rngs(0), example_inputs=score)


def test_the_functions_of_flax_layers_are_not_proposed():
    attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
    with raises(aj.TargetError, "MultiHeadAttention", "example_inputs") as caught:
        aj.adapt(nnx.Sequential(attention), bottleneck("layers/0"), rngs=nnx.Rngs(0))
    assert "init_cache" not in str(caught.value)


@pytest.mark.parametrize(
    "inputs", [aj.inputs(X, mask=MASK, method="score"), aj.inputs(x=X, method=Model.score)]
)
def test_other_functions_of_a_model_with_a_bottleneck_within(inputs):
    model = aj.adapt(Model(), bottleneck("codec/dense"), rngs=nnx.Rngs(0), example_inputs=inputs)
    nnx.update(model, drawn_like(jax.tree.map(lambda x: x, nnx.state(model, nnx.Param)), 3))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))["codec"]["dense"]

    def layer(x):
        y = dense(params, x)
        return y + branch(params["adapter"], y)

    expected = layer(np.tanh(layer(X)))
    np.testing.assert_allclose(model.score(X), expected, **CLOSE)
    np.testing.assert_allclose(model.score(X, MASK), expected * double(MASK), **CLOSE)


def test_files_and_recipes_before_output(tmp_path):
    recipe = bottleneck(output=0)
    (row,) = json.loads(recipe.to_json())["methods"]
    assert row["output"] == "0"
    del row["output"]
    before = aj.Recipe.from_json({"methods": [row]})
    assert before == bottleneck() != recipe
    now = json.loads(before.to_json())
    assert now["methods"][0]["output"] is None
    assert as_compared({"methods": [row]}) == as_compared(now)
    assert as_compared(now) != as_compared(json.loads(recipe.to_json()))

    model, params = grown(Both(), recipe, X)
    adapters, base = aj.partition(params, recipe)
    aj.save_adapter(tmp_path / "a", adapters, recipe)
    again, loaded = aj.load_adapter(tmp_path / "a", Both(), base, X)
    assert again.recipe == recipe
    got, expected = (m.apply({"params": p}, X) for m, p in ((again, loaded), (model, params)))
    np.testing.assert_array_equal(got[0], expected[0])


def test_it_is_not_merged():
    model, params = grown(Layer("tuple"), bottleneck(), X)
    with raises(aj.RecipeError, "Bottleneck", "nonlinearity"):
        aj.merge(model, params, X)


def test_modules_and_what_is_no_container_are_not_looked_into():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    y = {"b": (module, X), "a": None, "c": "text"}
    returned = Returned.of(X, y)
    assert list(returned.parts) == ["b/0", "b/1", "c"]
    assert returned.chosen(None) == "b/1"
    new = with_part(y, "b/1", MASK)
    assert new["b"][0] is module and new["b"][1] is MASK and list(new) == list(y)
    assert y["b"][1] is X
    assert Returned.of(None, None).chosen(None) is None


@pytest.mark.slow
def test_the_contract():
    method = aj.Bottleneck("**/gated", M, output="gate", init_std=1e-3)
    assert check_method(method, start_tolerance=1e-3) == ["gated"]
