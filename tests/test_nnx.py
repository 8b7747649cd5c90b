"""The NNX API: what it adds, what it leaves alone, and its errors."""

import copy
import functools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.nnx import AdapterParam, weights_of
from adapters_jax.nnx.adapted import _drawn
from adapters_jax.trees import flatten

D = 4


def draw(*shape, seed=0):
    return jnp.asarray(drawn(shape, seed))


def rngs(seed=0):
    return nnx.Rngs(seed)


def adapt(model, *methods, **kwargs):
    return aj.adapt(model, aj.Recipe(*methods), rngs=rngs(1), **kwargs)


def built(build):
    """A module of a function of Rngs, with parameters drawn by numpy, which compiles nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(rngs())))
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, drawn_like(state)))


def dense(rngs):
    return nnx.Linear(D, D, rngs=rngs)


def shake(model, kind=AdapterParam):
    """Draws every parameter of a kind anew, so that no factor is zero."""
    state = nnx.state(model, kind)
    noise = jax.tree.map(lambda x: jnp.asarray(x * np.asarray(0.5, x.dtype)), drawn_like(state, 4))
    nnx.update(model, noise)
    return model


def kinds(model):
    """Every module and Variable by path, with its class."""
    return {"/".join(map(str, path)): type(node) for path, node in nnx.iter_graph(model)}


def trained(model):
    return set(flatten(nnx.state(model, AdapterParam)))


def shapes(model):
    return {path: x.shape for path, x in flatten(nnx.state(model, AdapterParam)).items()}


def test_an_adapter_is_drawn_with_the_next_key_of_the_stream():
    """As a call of the stream gives it, in a trace too."""
    stream, other = nnx.Rngs(3).params, nnx.Rngs(3).params
    drawn = [_drawn(stream), nnx.jit(_drawn)(stream), _drawn(stream)]
    called = [other(), other(), other()]
    assert [*map(str, map(jax.random.key_data, drawn))] == [
        *map(str, map(jax.random.key_data, called))
    ]


class Mlp(nnx.Module):
    def __init__(self, rngs, width=6):
        self.up, self.down = nnx.Linear(D, width, rngs=rngs), nnx.Linear(width, D, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


class Net(nnx.Module):
    """A stem, a norm and a feed-forward sublayer."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(3, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.mlp = Mlp(rngs)

    def __call__(self, x):
        h = self.stem(x)
        return h + self.mlp(self.norm(h))


X = draw(5, 3, seed=9)


def array(x):
    """The numbers of a Variable; of a changed weight, those of the weight itself."""
    if isinstance(x, nnx.Variable) and "seen_from" in x.get_metadata():
        x = x.get_metadata()["seen_from"].variable
    return np.asarray(x[...], np.float64)


def lora_term(linear, x, scale):
    return scale * (array(x) @ array(linear.lora["a"])) @ array(linear.lora["b"])


def gelu(x):
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def bottleneck_term(leaves, x):
    down, up = leaves["down"], leaves["up"]
    hidden = gelu(array(x) @ array(down["kernel"]) + array(down["bias"]))
    return hidden @ array(up["kernel"]) + array(up["bias"])


def plain(linear, x):
    return array(x) @ array(linear.kernel) + array(linear.bias)


def normed(norm, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * array(norm.scale) + array(norm.bias)


def test_the_given_model_is_left_as_it_is_and_shares_its_arrays():
    base = built(Net)
    before, leaves = kinds(base), flatten(nnx.state(base))
    attributes = {path: set(vars(module)) for path, module in nnx.iter_modules(base)}
    model = adapt(base, aj.LoRA("mlp/*", 2), aj.Bottleneck("stem", 2), aj.Unfreeze("norm/*"))
    assert kinds(base) == before
    assert {path: set(vars(module)) for path, module in nnx.iter_modules(base)} == attributes
    after = flatten(nnx.state(model))
    assert all(after[path] is leaf for path, leaf in leaves.items())
    shake(model)
    assert all(flatten(nnx.state(base))[path] is leaf for path, leaf in leaves.items())
    assert type(base.norm.scale) is nnx.Param and type(model.norm.scale) is AdapterParam


def test_the_adapters_compute_what_the_papers_say():
    model = adapt(
        built(Net), aj.LoRA("mlp/*", 2, alpha=3.0), aj.Bottleneck(("stem", "mlp/down"), 2)
    )
    shake(model)
    stem = plain(model.stem, X)
    h = stem + bottleneck_term(model.stem.adapter, stem)
    up, down = model.mlp.up, model.mlp.down
    hidden = model.norm(h)
    hidden = np.tanh(plain(up, hidden) + lora_term(up, hidden, 1.5))
    y = plain(down, hidden) + lora_term(down, hidden, 1.5)
    y = y + bottleneck_term(down.adapter, y)
    np.testing.assert_allclose(model(X), h + y, atol=1e-5)


def test_a_changed_weight_comes_before_what_acts_on_the_output():
    methods = aj.LoRA("stem", 2), aj.Bottleneck("stem", 2)
    first, second = (adapt(built(Net), *order) for order in (methods, methods[::-1]))
    shake(first)
    nnx.update(second, nnx.state(first))
    linear, y = first.stem, plain(first.stem, X)
    branch = lora_term(linear, X, 1.0)
    expected = y + branch + bottleneck_term(linear.adapter, y + branch)
    np.testing.assert_allclose(first.stem(X), expected, atol=1e-5)
    np.testing.assert_allclose(second.stem(X), expected, atol=1e-5)


def test_the_parallel_form_reads_the_sublayers_input():
    methods = aj.Bottleneck("mlp", 2, placement="parallel", scale=4.0)
    model = shake(adapt(built(Net), methods, example_inputs=(X,)))
    h = draw(5, D)
    base = model.mlp.down(jnp.tanh(model.mlp.up(h)))
    expected = base + 4.0 * bottleneck_term(model.mlp.adapter, h)
    np.testing.assert_allclose(model.mlp(h), expected, atol=1e-5)
    np.testing.assert_allclose(model.mlp(x=h), expected, atol=1e-5)


def test_parallel_beside_a_layer_that_changes_the_width_is_refused():
    model = adapt(built(Net), aj.Bottleneck("stem", 2, placement="parallel"))
    with raises(aj.RecipeError, "Bottleneck", "'stem'", (5, 3), (5, D)):
        model(X)


def test_an_optimizer_of_flax_trains_adapters_alone():
    model = shake(adapt(built(Net), aj.LoRA("**/up", 2), aj.Unfreeze("stem/bias")))
    frozen = nnx.state(model, nnx.Not(AdapterParam))
    before = {path: np.asarray(x) for path, x in flatten(frozen).items()}
    old = flatten(nnx.state(model, AdapterParam))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean(model(X) ** 2)

        where = nnx.DiffState(0, AdapterParam)
        value, gradient = nnx.value_and_grad(loss, argnums=where)(model)
        optimizer.update(model, gradient)
        return value, gradient

    start, gradient = step(model, optimizer)
    flat = flatten(gradient)
    assert set(flat) == {"mlp/up/lora/a", "mlp/up/lora/b", "stem/bias"}
    for path, x in flatten(nnx.state(model, AdapterParam)).items():
        assert np.abs(flat[path]).max() > 1e-4
        np.testing.assert_allclose(x, old[path] - 0.5 * flat[path], atol=1e-6)
    for path, x in flatten(nnx.state(model, nnx.Not(AdapterParam))).items():
        np.testing.assert_array_equal(x, before[path])
    assert step(model, optimizer)[0] < start


class Tied(nnx.Module):
    """Two names for one table; the state knows it by the first of them."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, D, rngs=rngs)
        self.head = nnx.Linear(D, 7, use_bias=False, rngs=rngs)
        self.output = self.embed.embedding
        self.again = self.head

    def __call__(self, ids):
        return self.embed(ids) @ self.output[...].T + self.again(self.embed(ids))


def test_unfreeze_makes_the_right_variables_trainable():
    model = adapt(built(Net), aj.Unfreeze(("**/bias", "stem/*")))
    assert trained(model) == {
        "stem/kernel",
        "stem/bias",
        "norm/bias",
        "mlp/up/bias",
        "mlp/down/bias",
    }
    assert kinds(model)["norm/scale"] is nnx.Param


def test_a_tied_parameter_trains_once_under_its_first_name():
    model = adapt(built(Tied), aj.Unfreeze("embed/**"))
    assert trained(model) == {"embed/embedding"}
    assert model.output is model.embed.embedding and type(model.output) is AdapterParam
    assert aj.audit(model).trainable_parameters == 7 * D
    ids = jnp.array([1, 2])
    gradient = nnx.grad(lambda m: jnp.sum(m(ids) ** 2), argnums=nnx.DiffState(0, AdapterParam))
    (leaf,) = jax.tree.leaves(nnx.jit(gradient)(model))
    table, head = model.output[...], model.head.kernel[...]

    def by_hand(table):
        return jnp.sum((table[ids] @ table.T + table[ids] @ head) ** 2)

    np.testing.assert_allclose(leaf, jax.jit(jax.grad(by_hand))(table), rtol=1e-4)


def test_another_name_of_something_shared_raises_with_the_right_one():
    with raises(aj.TargetError, "Unfreeze", "'output'", "embed/embedding"):
        adapt(built(Tied), aj.Unfreeze("output"))
    with raises(aj.TargetError, "LoRA", "'head'", "shared with again"):
        adapt(built(Tied), aj.LoRA("head", 2))


@pytest.mark.parametrize("inputs", [None, (jnp.array([[1, 2]]),)], ids=["known", "traced"])
def test_a_weight_that_two_modules_hold_is_no_target(inputs):
    class Towers(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(D, D, rngs=rngs)
            self.a, self.b = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, ids):
            return self.b(self.a(self.embed(ids)))

    def adapted(method):
        return adapt(built(Towers), method, example_inputs=inputs)

    for method in (aj.LoRA("a", 2), aj.LoRA("*", 2), aj.DoRA("a", 2)):
        with raises(aj.TargetError, "a/kernel is the same parameter as b/kernel", "'!a'"):
            adapted(method)
    assert trained(adapted(aj.LoRA(("*", "!a"), 2))) == {"embed/lora/a", "embed/lora/b"}
    model = adapted(aj.Unfreeze("a/kernel"))
    assert trained(model) == {"a/kernel"} and model.b.kernel is model.a.kernel
    model = shake(adapted(aj.Bottleneck("b", 2)))
    assert trained(model) == {
        f"b/adapter/{n}/{x}" for n in ("down", "up") for x in ("bias", "kernel")
    }


def test_a_shared_module_is_adapted_once_and_stays_shared():
    model = shake(adapt(built(Tied), aj.LoRA("again", 2)))
    assert model.head is model.again
    assert trained(model) == {"again/lora/a", "again/lora/b"}
    ids = jnp.array([1, 2])
    table = model.output
    h = array(table)[ids]
    expected = h @ array(table).T + h @ array(model.head.kernel)
    expected = expected + lora_term(model.head, h, 1.0)
    np.testing.assert_allclose(model(ids), expected, atol=1e-5)


def test_lora_on_a_tied_embedding_acts_on_both_sides():
    class Lm(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, D, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(jnp.tanh(self.embed(ids)))

    model = shake(adapt(built(Lm), aj.LoRA("embed", 2, alpha=3.0)))
    lora = model.embed.lora
    table = array(model.embed.embedding) + 1.5 * array(lora["a"]) @ array(lora["b"])
    ids = jnp.array([3, 0])
    np.testing.assert_allclose(model(ids), np.tanh(table[ids]) @ table.T, atol=1e-5)


def test_lists_and_dicts_of_modules_have_paths():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(3)])
            self.heads = nnx.Dict(a=nnx.Linear(D, 2, rngs=rngs), b=nnx.Linear(D, 2, rngs=rngs))

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.heads["a"](x) + self.heads["b"](x)

    model = adapt(built(Deep), aj.LoRA(("layers/{0,2}", "heads/*"), 1), aj.Unfreeze("layers/1/*"))
    assert shapes(model) == {
        "layers/0/lora/a": (D, 1),
        "layers/0/lora/b": (1, D),
        "layers/1/kernel": (D, D),
        "layers/1/bias": (D,),
        "layers/2/lora/a": (D, 1),
        "layers/2/lora/b": (1, D),
        "heads/a/lora/a": (D, 1),
        "heads/a/lora/b": (1, 2),
        "heads/b/lora/a": (D, 1),
        "heads/b/lora/b": (1, 2),
    }
    shake(model)
    x = draw(5, D)
    h = plain(model.layers[0], x) + lora_term(model.layers[0], x, 1.0)
    h = plain(model.layers[1], h)
    h = plain(model.layers[2], h) + lora_term(model.layers[2], h, 1.0)
    expected = sum(plain(head, h) + lora_term(head, h, 1.0) for head in model.heads.values())
    np.testing.assert_allclose(model(x), expected, atol=1e-5)


def test_adapting_twice_adds_and_two_of_one_kind_clash():
    once = shake(adapt(built(Net), aj.LoRA("stem", 2)))
    twice = adapt(once, aj.Bottleneck("stem", 2, init_std=0.0), aj.LoRA("mlp/up", 2))
    assert trained(once) == {"stem/lora/a", "stem/lora/b"}
    assert trained(twice) > trained(once) and "stem/adapter/up/bias" in trained(twice)
    assert aj.nnx.recipe_of(twice) == aj.nnx.recipe_of(once) + aj.Recipe(
        aj.Bottleneck("stem", 2, init_std=0.0), aj.LoRA("mlp/up", 2)
    )
    assert type(twice.stem) is type(once.stem) is not nnx.Linear
    assert aj.audit(twice).adapter_parameters == 2 * (3 + D) + (2 * 2 * D + D + 2) + 2 * (D + 6)
    np.testing.assert_allclose(twice(X), once(X), atol=1e-6)
    with raises(aj.RecipeError, "'stem'", "lora"):
        adapt(once, aj.LoRA("*", 2))


def test_a_name_that_the_base_uses_raises():
    class Taken(nnx.Module):
        def __init__(self, name, value):
            self.part = built(dense)
            setattr(self.part, name, value)

        def __call__(self, x):
            return self.part(x)

    for value in (nnx.Param(jnp.ones(2)), "a word"):
        with raises(aj.RecipeError, "LoRA", "part/lora,"):
            adapt(Taken("lora", value), aj.LoRA("part", 2))
    with raises(aj.RecipeError, "Bottleneck", "part/adapter,"):
        adapt(Taken("adapter", nnx.Dict()), aj.Bottleneck("part", 2))


def test_base_parameters_named_like_an_adapters_raise():
    class Own(nnx.Module):
        def __init__(self):
            self.lora = nnx.Dict(a=nnx.Param(jnp.ones(2)))
            self.part = built(dense)

        def __call__(self, x):
            return self.part(x)

    with raises(aj.RecipeError, "LoRA", " lora,"):
        adapt(Own(), aj.LoRA("**", 2))
    assert trained(adapt(Own(), aj.LoRA("part", 2))) == {"part/lora/a", "part/lora/b"}


def test_streams_that_are_missing_are_named():
    base = built(dense)
    recipe = aj.Recipe(aj.LoRA("**", 2, dropout=0.5))
    with raises(TypeError, "LoRA", "aj.adapt(model, recipe)"):
        aj.adapt(aj.LoRA("**", 2), nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with raises(TypeError, "NNX", "rngs=nnx.Rngs(0)"):
        aj.adapt(base, recipe)
    with raises(TypeError, type(jax.random.key(0)).__name__, "rngs=nnx.Rngs(0)"):
        aj.adapt(base, recipe, rngs=jax.random.key(0))
    with raises(aj.UserError, "stream dropout;", "rngs=nnx.Rngs(params=0, dropout=1)"):
        aj.adapt(base, recipe, rngs=nnx.Rngs(params=0))
    with raises(aj.UserError, "stream params;", "rngs=nnx.Rngs(0)"):
        aj.adapt(base, recipe, rngs=nnx.Rngs(dropout=0))
    aj.adapt(base, aj.LoRA("**", 2), rngs=nnx.Rngs(params=0))
    aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(dropout=0))


def test_a_bottleneck_on_a_composite_module_asks_for_example_inputs():
    with raises(aj.TargetError, "Bottleneck", "'mlp'", "mlp (Mlp ", "example_inputs=(...)"):
        adapt(built(Net), aj.Bottleneck("mlp", 2))
    inputs = (jax.ShapeDtypeStruct((1, 3), jnp.float32),)
    model = adapt(built(Net), aj.Bottleneck("mlp", 2), example_inputs=inputs)
    assert shapes(model)["mlp/adapter/down/kernel"] == (D, 2)
    whole = shake(adapt(built(Net), aj.Bottleneck("**/{mlp,stem}", 2), example_inputs=[X]))
    y = whole.norm(whole.stem(X))
    inner = whole.mlp.down(jnp.tanh(whole.mlp.up(y)))
    expected = whole.stem(X) + inner + bottleneck_term(whole.mlp.adapter, inner)
    np.testing.assert_allclose(whole(X), expected, atol=1e-5)


def test_widths_of_plain_layers_are_known_without_examples():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 5, (3,), rngs=rngs)
            self.up = nnx.ConvTranspose(2, 3, (3,), rngs=rngs)
            self.flipped = nnx.ConvTranspose(2, 3, (3,), transpose_kernel=True, rngs=rngs)
            self.einsum = nnx.Einsum("bi,oi->bo", (11, 2), rngs=rngs)
            self.turned = nnx.Einsum("bi,oki->bko", (5, 6, 2), rngs=rngs)
            self.general = nnx.LinearGeneral(4, (2, 6), rngs=rngs)
            self.embed = nnx.Embed(9, 7, rngs=rngs)
            self.batch, self.rms = nnx.BatchNorm(8, rngs=rngs), nnx.RMSNorm(10, rngs=rngs)
            self.group = nnx.GroupNorm(12, 3, rngs=rngs)

    model = adapt(nnx.eval_shape(lambda: Plain(rngs())), aj.Bottleneck("*", 2))
    widths = {path.split("/")[0]: s[0] for path, s in shapes(model).items() if "down/ker" in path}
    convolutions = {"conv": 5, "up": 3, "flipped": 3}
    norms = {"batch": 8, "rms": 10, "group": 12}
    products = {"einsum": 11, "turned": 5, "general": 6}
    assert widths == {**convolutions, **products, "embed": 7, **norms}
    batched = nnx.eval_shape(lambda: nnx.Einsum("bi,io->ob", (2, 3), rngs=rngs()))
    with raises(aj.TargetError, "example_inputs"):  # its output ends with an axis of the input
        adapt(batched, aj.Bottleneck("**", 2))


@pytest.mark.witness("False")
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_transposed_convolution_needs_no_examples(transpose_kernel):
    def layer(rngs):
        return nnx.ConvTranspose(D, 3, (2, 2), 2, transpose_kernel=transpose_kernel, rngs=rngs)

    x = draw(1, 5, 6, D)
    assert weights_of(built(layer), aj.inputs(x)) == weights_of(built(layer))
    model = shake(adapt(built(layer), aj.LoRA("**", 2)))
    np.testing.assert_allclose(aj.merge(model)(x), model(x), atol=1e-5)


def test_example_inputs_that_the_model_does_not_take_are_a_mistake():
    for inputs, shown in (((), "()"), ((draw(5, 3),) * 9, "float32[5, 3]")):
        with raises(aj.UserError, "Net", shown):
            adapt(built(Net), aj.Bottleneck("mlp", 2), example_inputs=inputs)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    class Buggy(nnx.Module):
        def __init__(self):
            self.mlp = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            raise KeyError(self.mlp(x).shape)

    with pytest.raises(KeyError) as caught:
        adapt(Buggy(), aj.Bottleneck("mlp", 2), example_inputs=(draw(5, 3),))
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert (frames[-1].name, frames[-1].filename) == ("__call__", __file__)
    assert "Buggy" in caught.value.__notes__[-1] and "float32[5, 3]" in caught.value.__notes__[-1]
    with pytest.raises(TypeError) as caught:  # inputs that no layer of the model can take
        adapt(built(Net), aj.Bottleneck("mlp", 2), example_inputs=(draw(5, 4),))
    assert "float32[5, 4]" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("method", "kind", "data"),
    [
        (aj.LoRA("mlp/middle", 2), aj.TargetError, ("LoRA: ", "'mlp/middle'", "mlp/up")),
        (aj.LoRA("norm", 2), aj.TargetError, ("LoRA: ", "'norm'", "norm (")),
        (aj.Unfreeze("mlp/bias"), aj.TargetError, ("Unfreeze: ", "'mlp/bias'", "mlp/up/bias")),
        (aj.LoRA("stem", 4), aj.RecipeError, ("LoRA: rank 4 at 'stem'", "min(3, 4) = 3;")),
        (
            aj.LoRA("stem", 2, rank_pattern={"mlp/up": 1}),
            aj.TargetError,
            ("LoRA rank_pattern: ", "'mlp/up'"),
        ),
        ([aj.LoRA("stem", 2), aj.LoRA("*", 2)], aj.RecipeError, ("'stem'", "lora")),
    ],
)
def test_errors_are_those_of_linen(method, kind, data):
    class LinenMlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="down")(jnp.tanh(nn.Dense(6, name="up")(x)))

    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(D, name="stem")(x)
            return h + LinenMlp(name="mlp")(nn.LayerNorm(name="norm")(h))

    recipe = aj.Recipe(*(method if isinstance(method, list) else [method]))
    with raises(kind, *data):
        aj.adapt(built(Net), recipe, rngs=rngs(), example_inputs=(X,))
    params = jax.eval_shape(LinenNet().init, jax.random.key(0), X)["params"]
    with raises(kind, *data):
        aj.init_adapters(aj.adapt(LinenNet(), recipe), params, jax.random.key(0), X)


def test_a_raw_weight_needs_example_inputs():
    class Odd(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((D, D)))

        def __call__(self, x):
            return x @ self.w[...]

    with raises(aj.TargetError, "'**'", "example_inputs"):
        adapt(Odd(), aj.LoRA("**", 2))
    x = draw(5, D)
    model = shake(aj.adapt(Odd(), aj.LoRA("**", 2), rngs=rngs(), example_inputs=(x,)))
    np.testing.assert_allclose(
        model(x),
        array(x) @ array(vars(model)["w"]) + lora_term(model, array(x), 1.0),
        atol=1e-5,
    )


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.drop = nnx.Dropout(rate, rngs=rngs if rate else None)
        self.dense, self.norm = nnx.Linear(D, D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, x):
        return self.norm(x + jnp.tanh(self.dense(self.drop(x))))


class Stack(nnx.Module):
    """Three blocks made by vmap and run by scan, recomputed in the backward pass."""

    def __init__(self, rngs, rate=0.0, remat=True):
        self.remat = remat

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Block(rngs, rate)

        self.blocks = blocks(rngs)

    def __call__(self, x):
        def run(block, x):
            return block(x)

        run = nnx.remat(run) if self.remat else run
        return nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


STACKED = {
    "lora": (aj.LoRA("blocks/dense", 2, alpha=3.0), ()),
    "bottleneck": (aj.Bottleneck("blocks/dense", 2), ()),
    "norm": (aj.Bottleneck("blocks/norm", 2), ()),
    "composite": (aj.Bottleneck("blocks", 2), (draw(1, D),)),
}


@pytest.mark.witness("bottleneck", "composite")
@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_are_adapted_one_by_one(name):
    method, examples = STACKED[name]
    model = shake(adapt(built(Stack), method, example_inputs=examples or None))
    assert all(shape[0] == 3 for shape in shapes(model).values())
    x = draw(5, D)
    expected = array(x)
    graphdef, state = nnx.split(model.blocks)
    for i in range(3):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], state))
        y = plain(block.dense, expected)
        if name == "lora":
            y = y + lora_term(block.dense, expected, 1.5)
        if name == "bottleneck":
            y = y + bottleneck_term(block.dense.adapter, y)
        y = normed(block.norm, expected + np.tanh(y))
        leaves = {"norm": block.norm, "composite": block}.get(name)
        expected = y + (bottleneck_term(leaves.adapter, y) if leaves else 0.0)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, x), expected, atol=1e-4)


class StackedOnTheSecondAxis(nnx.Module):
    """As many layers as inputs and outputs, so that no shape tells the axes apart."""

    axes = nnx.StateAxes({nnx.Param: 1, ...: 0})

    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(D, D, rngs=rngs), out_axes=self.axes)
        self.layers = make(rngs.split(D))

    def __call__(self, x):
        run = lambda layer, x: layer(x)  # noqa: E731
        return nnx.scan(run, in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


@pytest.mark.parametrize("method", [aj.LoRA("layers", 2), aj.IA3("layers")])
def test_layers_on_another_axis_are_refused(method):
    x = draw(5, D)
    with raises(aj.RecipeError, type(method).__name__, "layers/kernel", [D, D, D], "axis 0"):
        adapt(built(StackedOnTheSecondAxis), method, example_inputs=(x,))


def test_layer_axes_are_the_same_with_and_without_example_inputs():
    recipe = aj.LoRA("blocks/dense", 2, dropout=0.5), aj.Bottleneck("blocks/norm", 2)
    base = nnx.eval_shape(lambda: Stack(rngs(), rate=0.5))
    alone = adapt(base, *recipe)
    traced = adapt(base, *recipe, example_inputs=(draw(1, D),))
    assert nnx.split(alone)[0] == nnx.split(traced)[0]
    assert shapes(alone) == shapes(traced)


def test_stacked_layers_have_a_dropout_stream_each():
    model = shake(adapt(built(Stack), aj.LoRA("blocks/dense", 4, dropout=0.5)))
    keys = model.blocks.dense.lora["dropout"].rngs.key[...]
    assert keys.shape == (3,)
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 3
    run, x = nnx.jit(lambda model, x: model(x)), draw(5, D)
    first, second = run(model, x), run(model, x)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(model.blocks.dense.lora["dropout"].rngs.count[...], [2, 2, 2])
    model.eval()
    np.testing.assert_array_equal(run(model, x), run(model, x))


@pytest.mark.slow
def test_remat_changes_no_gradient():
    gradients = []
    for remat in (True, False):
        model = shake(
            adapt(
                built(functools.partial(Stack, remat=remat)),
                aj.LoRA("blocks/dense", 2, dropout=0.5),
            )
        )
        state = aj.TrainState.create(model, tx=optax.sgd(1.0), key=jax.random.key(0))
        step = aj.make_train_step(lambda model, x, key: jnp.mean(model(x) ** 2 * x))
        state, metrics = step(state, draw(5, D))
        gradients.append((float(metrics["grad_norm"]), jax.tree.leaves(state.adapters)))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for one, other in zip(gradients[0][1], gradients[1][1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    "method", [aj.LoRA("up", 2, dropout=0.5), aj.Bottleneck("up", 6, dropout=0.5)]
)
def test_train_and_eval_switch_the_dropout_of_adapters(method):
    model, x = shake(adapt(built(Mlp), method)), jnp.asarray(np.tile(drawn((1, D)), (4000, 1)))
    first, second = model(x), model(x)
    assert not np.array_equal(first, second)
    model.eval()
    clean = model(x)
    np.testing.assert_array_equal(clean, model(x))
    y = plain(model.up, x)
    lora = method.slot == "lora"
    branch = lora_term(model.up, x, 1.0) if lora else bottleneck_term(model.up.adapter, y)
    np.testing.assert_allclose(model.up(x), y + branch, atol=1e-5)
    model.train()
    assert not np.array_equal(model(x), clean)
    # Every row has a mask of its own, and on the average the branch is what it is without one.
    np.testing.assert_allclose(np.mean(model.up(x) - y, 0), branch[0], atol=0.1)


def test_the_dropout_of_adapters_is_on_at_first_whatever_the_mode_of_the_base(tmp_path):
    x = draw(16, D)
    base = nnx.Sequential(nnx.Linear(D, D, rngs=rngs()), nnx.Dropout(0.5, rngs=rngs()))
    base.eval()
    model = shake(adapt(base, aj.LoRA("layers/0", 2, dropout=0.5)))
    loaded = aj.load_adapter(aj.save_adapter(tmp_path / "adapter", model), base)
    for each in (model, loaded):
        assert each.layers[1].deterministic and not np.array_equal(each(x), each(x))
        each.eval()
        np.testing.assert_array_equal(each(x), each(x))
    np.testing.assert_array_equal(loaded(x), model(x))


def test_abstract_models_are_adapted_without_allocating():
    recipe = aj.Recipe(
        aj.LoRA("blocks/dense", 2, dropout=0.5), aj.Bottleneck("blocks", 2), aj.Unfreeze("**/bias")
    )

    def build():
        return aj.adapt(Stack(rngs(), rate=0.5), recipe, rngs=rngs(1), example_inputs=(draw(1, D),))

    around = nnx.eval_shape(build)
    streams = rngs(1)
    inside = aj.adapt(
        nnx.eval_shape(lambda: Stack(rngs(), rate=0.5)),
        recipe,
        rngs=streams,
        example_inputs=(jax.ShapeDtypeStruct((1, D), jnp.float32),),
    )
    concrete = build()
    for model in (around, inside):
        leaves = jax.tree.leaves(nnx.state(model))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        assert kinds(model) == kinds(concrete)
        assert shapes(model) == shapes(concrete)
        assert aj.audit(model) == aj.audit(concrete)
    assert int(streams.params.count[...]) == 0
    with raises(aj.TargetError, "LoRA", "'nowhere'"):
        aj.adapt(around, aj.LoRA("nowhere", 2), rngs=rngs())


def test_the_same_seed_gives_the_same_adapters_and_another_seed_others():
    base = built(Net)
    one, same, other = (
        flatten(nnx.state(aj.adapt(base, aj.LoRA("mlp/*", 2), rngs=nnx.Rngs(s)), AdapterParam))
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one["mlp/up/lora/a"], same["mlp/up/lora/a"])
    assert not np.array_equal(one["mlp/up/lora/a"], other["mlp/up/lora/a"])
    assert not np.array_equal(one["mlp/up/lora/a"], one["mlp/down/lora/a"][:D])
    assert np.all(one["mlp/up/lora/b"] == 0.0)


def test_jit_split_merge_and_copies_are_the_model():
    model = shake(adapt(built(Net), aj.LoRA("mlp/*", 2), aj.Bottleneck("stem", 2)))
    expected = model(X)
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(model, X), expected, atol=1e-6)
    graphdef, adapters, rest = nnx.split(model, AdapterParam, ...)
    merged = nnx.merge(graphdef, adapters, rest)
    assert kinds(merged) == kinds(model)
    np.testing.assert_array_equal(merged(X), expected)
    doubled = nnx.merge(graphdef, jax.tree.map(lambda x: 2 * x, adapters), rest)
    assert np.abs(doubled(X) - expected).max() > 1e-2
    copied = copy.deepcopy(model)
    assert type(copied.stem) is type(model.stem)
    np.testing.assert_array_equal(copied(X), expected)


def test_two_adaptations_give_one_class_and_one_structure():
    one, two = (adapt(Net(rngs(i)), aj.LoRA("mlp/*", 2)) for i in range(2))
    assert type(one.mlp.up) is type(two.mlp.up) is type(one.mlp.down)
    assert type(one.mlp.up).__name__ == "AdaptedLinear"
    assert isinstance(one.mlp.up, nnx.Linear) and isinstance(one.mlp, Mlp)
    assert type(one.mlp) is type(two.mlp) and type(one.mlp).__name__ == "AdaptedMlp"
    assert nnx.split(one)[0] == nnx.split(two)[0]
    calls = []

    @nnx.jit
    def run(model, x):
        calls.append(x)
        return model(x)

    run(one, X), run(two, X)
    assert len(calls) == 1


class Special(nnx.Param):
    """A parameter of a class of its own."""


class WithSpecial(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(D, D, rngs=rngs)
        self.scale = Special(draw(D))

    def __call__(self, x):
        return self.dense(x) * self.scale[...][None]


def test_merging_gives_every_class_back():
    base = built(WithSpecial)
    model = shake(adapt(base, aj.LoRA("dense", 2, alpha=3.0, dropout=0.5), aj.Unfreeze("scale")))
    assert isinstance(model.scale, AdapterParam) and isinstance(model.scale, Special)
    assert trained(model) == {"dense/lora/a", "dense/lora/b", "scale"}
    again = adapt(model, aj.Unfreeze(("scale", "dense/bias")))
    assert type(again.scale) is type(model.scale)
    model.eval()
    merged = aj.merge(model)
    assert kinds(merged) == kinds(base) == kinds(aj.merge(again))
    assert not hasattr(merged, "adapter_recipe") and not hasattr(merged.dense, "adapter_methods")
    lora = model.dense.lora
    kernel = array(model.dense.kernel) + 1.5 * array(lora["a"]) @ array(lora["b"])
    np.testing.assert_allclose(merged.dense.kernel[...], kernel, atol=1e-6)
    np.testing.assert_array_equal(merged.scale[...], model.scale[...])
    x = draw(5, D)
    np.testing.assert_allclose(merged(x), model(x), atol=1e-5)
    with raises(aj.UserError, "WithSpecial", "aj.adapt(model, recipe)"):
        aj.merge(merged)


class Quantised(nnx.Module):
    """A dense layer whose weight is int8, with a scale."""

    def __init__(self, rngs):
        self.table = nnx.Param(jnp.arange(D * D, dtype=jnp.int8).reshape(D, D))
        self.scale = nnx.Param(jnp.full((D,), 0.1))
        self.head = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return self.head(x @ self.table[...].astype(x.dtype) * self.scale[...][None])


def test_a_base_with_an_integer_leaf_trains_its_adapters():
    model = shake(adapt(built(Quantised), aj.LoRA("head", 2), aj.Unfreeze("scale")))
    table, x = model.table[...], draw(5, D)
    state = aj.TrainState.create(model, tx=optax.sgd(1e-4), key=jax.random.key(0))
    step = aj.make_train_step(lambda model, x, key: jnp.mean(model(x) ** 2))
    state, first = step(state, x)
    state, second = step(state, x)
    assert float(second["loss"]) < float(first["loss"])
    assert state.model.table[...] is table and table.dtype == jnp.int8
    assert set(flatten(state.adapters)) == {"head/lora/a", "head/lora/b", "scale"}


def test_the_output_keeps_the_dtype_of_the_base():
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    linear = built(lambda rngs: nnx.Linear(D, D, **half, rngs=rngs))
    model = shake(adapt(linear, aj.LoRA("**", 2), aj.Bottleneck("**", 2)))
    x = draw(5, D)
    output = nnx.jit(lambda model, x: model(x))(model, x)
    assert output.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(nnx.state(model, AdapterParam))} == {np.dtype("f4")}
    y = plain(model, x) + lora_term(model, x, 1.0)
    expected = y + bottleneck_term(model.adapter, y)
    np.testing.assert_allclose(array(output), expected, atol=0.2)


def test_a_bottleneck_by_hand():
    adapter = shake(
        aj.nnx.Bottleneck(D, 2, rngs=rngs(), scale=0.5, activation="relu", dropout=0.5), nnx.Param
    )
    adapter.eval()
    x, y = draw(2, 5, D), draw(2, 5, D, seed=1)
    down, up = adapter.down, adapter.up
    hidden = np.maximum(array(x) @ array(down["kernel"]) + array(down["bias"]), 0.0)
    branch = 0.5 * (hidden @ array(up["kernel"]) + array(up["bias"]))
    np.testing.assert_allclose(adapter(x), x + branch, atol=1e-5)
    np.testing.assert_allclose(adapter(x, y), y + branch, atol=1e-5)
    adapter.train()
    assert not np.array_equal(adapter(x), adapter(x))
    assert set(shapes(adapter)) == {f"{p}/{n}" for p in ("down", "up") for n in ("kernel", "bias")}
    with raises(aj.UserError, "Bottleneck", "bottleneck_dim=0"):
        aj.nnx.Bottleneck(D, 0, rngs=rngs())


def test_a_lora_linear_by_hand():
    layer = aj.nnx.LoRALinear(
        D, 6, rank=2, alpha=3.0, rngs=rngs(), lora={"rank_stabilized": True}, use_bias=False
    )
    x = draw(5, D)
    np.testing.assert_array_equal(layer(x), x @ layer.kernel[...])
    shake(layer)
    expected = array(x) @ array(layer.kernel) + lora_term(layer, x, 3.0 / np.sqrt(2.0))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    assert isinstance(layer, aj.nnx.LoRALinear)
    assert trained(layer) == {"lora/a", "lora/b"}
    with raises(aj.RecipeError, "rank 9 at ''", "min(4, 6) = 4"):
        aj.nnx.LoRALinear(D, 6, rank=9, rngs=rngs())


def test_multi_head_attention_is_adapted_in_its_projections():
    attention = built(lambda rngs: nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs))
    model = shake(adapt(attention, aj.LoRA("{query,out}", 2, alpha=3.0)))
    query, out = model.query, model.out
    x = draw(1, 5, D)
    term = np.einsum("btr,rnh->btnh", array(x) @ array(query.lora["a"]), array(query.lora["b"]))
    kernel = np.einsum("btd,dnh->btnh", x, array(query.kernel)) + array(query.bias)
    np.testing.assert_allclose(query(x), kernel + 1.5 * term, atol=1e-5)
    assert shapes(model) == {
        "query/lora/a": (D, 2),
        "query/lora/b": (2, 2, 2),
        "out/lora/a": (2, 2, 2),
        "out/lora/b": (2, D),
    }
    h = draw(1, 5, 2, 2)
    term = np.einsum("btnh,nhr->btr", h, array(out.lora["a"])) @ array(out.lora["b"])
    kernel = np.einsum("btnh,nhd->btd", h, array(out.kernel)) + array(out.bias)
    np.testing.assert_allclose(out(h), kernel + 1.5 * term, atol=1e-5)


def test_tracing_a_model_again_makes_no_new_classes():
    made = []
    for _ in range(2):
        adapt(built(Net), aj.Bottleneck("mlp", 2), example_inputs=(X,))
        made.append(aj.nnx.points._recording_class.cache_info().misses)
    assert made[0] == made[1] > 0


def test_adapters_of_several_tasks_share_one_base():
    base = built(Net)
    models = [aj.adapt(base, aj.LoRA("mlp/*", 2), rngs=nnx.Rngs(i)) for i in range(2)]
    for i, model in enumerate(models):
        model.mlp.up.lora["b"][...] = draw(2, 6, seed=i)
        assert model.stem.kernel[...] is base.stem.kernel[...]
    assert np.abs(models[0](X) - models[1](X)).max() > 1e-3
    nnx.update(models[0], nnx.state(models[1], AdapterParam))
    np.testing.assert_array_equal(models[0](X), models[1](X))


def test_a_second_recipe_adapts_the_base_and_not_the_first_adapter():
    """`**` is no factor of LoRA, and (IA)^3 scales the bias that LoRA's product has beside it."""
    base, x = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), drawn((2, 4))
    base.bias[...] = jnp.asarray(drawn((4,), 1))
    model = aj.adapt(base, aj.LoRA("**", 2), rngs=nnx.Rngs(1), example_inputs=(x,))
    model = aj.adapt(model, aj.IA3("**"), rngs=nnx.Rngs(2), example_inputs=(x,))
    nnx.update(model, drawn_like(nnx.state(model, aj.nnx.AdapterParam)))
    assert [placed.prefix for _, placed, _ in aj.nnx.adapted_points(model)] == ["lora", "ia3"]
    weight = double(base.kernel[...]) + double(model.lora["a"][...]) @ double(model.lora["b"][...])
    expected = (double(x) @ weight + double(base.bias[...])) * double(model.ia3["scale"][...])
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    np.testing.assert_allclose(aj.merge(model)(x), expected, atol=1e-5)
