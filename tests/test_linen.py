"""The linen API: what `adapt` keeps of a module, and where and how often adapters act."""

import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from helpers.arrays import double, drawn, drawn_like, shapes
from helpers.errors import raises

import adapters_jax as aj

D, R = 4, 2
X = drawn((2, 3, D), 1)
KEY = jax.random.key(0)
FACTORS = {"a": (D, R), "b": (R, D)}
DENSE = {"kernel": (D, D), "bias": (D,)}


class Mlp(nn.Module):
    """Compact style."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="down")(nn.relu(nn.Dense(D, name="up")(x)))


class Net(nn.Module):
    """Setup style, with a field, a property, and methods beside the call."""

    width: int = D
    act: object = nn.relu

    def setup(self):
        self.first = nn.Dense(self.width)
        self.last = nn.Dense(D)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.act(self.first(x))

    def decode(self, h):
        return self.last(h)

    @nn.nowrap
    def describe(self):
        return f"a net of width {self.width}"

    @property
    def twice(self):
        return 2 * self.width


def lora(targets, scale=1.0, **fields):
    return aj.LoRA(targets, R, scale * R, **fields)


def abstract(module, *args, **kwargs):
    """The base's parameters, abstract."""
    return jax.eval_shape(module.init, KEY, *args, **kwargs)["params"]


def grown(base, recipe, *args, seed=7):
    """An adapted model and drawn parameters for it, nowhere zero."""
    args = args or (X,)
    model = aj.adapt(base, recipe)
    params = aj.init_adapters(model, abstract(base, *args), KEY, *args)
    return model, drawn_like(params, seed)


def dense(x, params, scale=1.0):
    """A dense layer in float64, with its factors where it has some."""
    p = jax.tree.map(double, params)
    kernel = p["kernel"]
    if "lora" in p:
        kernel = kernel + scale * p["lora"]["a"] @ p["lora"]["b"]
    return x @ kernel + p["bias"]


def mlp(x, params, scale=1.0):
    return dense(np.maximum(dense(x, params["up"], scale), 0), params["down"], scale)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# What adapt keeps


def test_compact_and_setup_modules_keep_their_paths():
    model, params = grown(Mlp(), lora("up", 1.5))
    assert shapes(params) == {"up": DENSE | {"lora": FACTORS}, "down": DENSE}
    close(model.apply({"params": params}, X), mlp(double(X), params, 1.5))

    model, params = grown(Net(), aj.Recipe(lora("**", 1.5)))
    assert shapes(params) == {"first": DENSE | {"lora": FACTORS}, "last": DENSE | {"lora": FACTORS}}
    hidden = np.maximum(dense(double(X), params["first"], 1.5), 0)
    close(model.apply({"params": params}, X), dense(hidden, params["last"], 1.5))


def test_a_method_alone_is_a_recipe():
    assert aj.adapt(Mlp(), lora("up")) == aj.adapt(Mlp(), aj.Recipe(lora("up")))


def test_adapting_twice_is_adding_recipes():
    first, second = aj.Recipe(lora("up")), aj.Recipe(aj.Bottleneck("up", 3), aj.Unfreeze("down/*"))
    twice = aj.adapt(aj.adapt(Mlp(), first), second)
    assert twice == aj.adapt(Mlp(), first + second)
    assert twice.recipe == first + second and twice.inner == Mlp()
    assert shapes(abstract(twice, X)) == shapes(abstract(aj.adapt(Mlp(), first + second), X))


def test_a_changed_weight_comes_before_what_acts_on_the_output():
    adapter = aj.Bottleneck("up", 3, activation="relu")
    x = double(X)
    for recipe in (aj.Recipe(lora("up"), adapter), aj.Recipe(adapter, lora("up"))):
        model, params = grown(Mlp(), recipe)
        up = jax.tree.map(double, params["up"])
        a, b = up["lora"]["a"], up["lora"]["b"]

        def branch(y, p=up["adapter"]):
            hidden = np.maximum(y @ p["down"]["kernel"] + p["down"]["bias"], 0)
            return hidden @ p["up"]["kernel"] + p["up"]["bias"]

        y = x @ up["kernel"] + up["bias"]
        low = x @ a @ b
        y = y + low + branch(y + low)  # LoRA changes the weight, whatever comes behind it
        close(model.apply({"params": params}, X), dense(np.maximum(y, 0), params["down"]))


def test_fields_properties_and_other_methods_of_the_base_are_there():
    base = Net(act=jnp.tanh)
    model, params = grown(base, lora("**"))
    assert (model.width, model.act, model.twice) == (D, jnp.tanh, 2 * D)
    assert model.describe() == "a net of width 4"
    hidden = np.tanh(dense(double(X), params["first"]))
    variables = {"params": params}
    for method in ("encode", Net.encode, base.encode, lambda m, x: m.encode(x)):
        close(model.apply(variables, X, method=method), hidden)
    both = model.apply(variables, X, method=lambda m, x: m.decode(m.encode(x)))
    close(both, dense(hidden, params["last"]))
    close(model.apply(variables, X, method=Net.__call__), both)
    close(model.bind(variables).encode(X), hidden)
    named = model.apply(variables, x=X, method=lambda m, x: m(x=x))
    close(named, both)


def test_a_compact_method_of_the_base_runs_with_the_adapters():
    class Compact(nn.Module):
        def __call__(self, x):
            return self.encode(x)

        @nn.compact
        def encode(self, x):
            return nn.Dense(D, name="dense")(x)

    model, params = grown(Compact(), lora("dense"))
    for method in (None, "encode", Compact.encode):
        got = model.apply({"params": params}, X, method=method)
        close(got, dense(double(X), params["dense"]))


# Where the adapted model stands in a larger one


class Larger(nn.Module):
    """An adapted part between other layers, run twice."""

    recipe: aj.Recipe
    compact: bool = False

    def setup(self):
        self.part = aj.adapt(Mlp(), self.recipe)
        self.up = nn.Dense(D)

    def __call__(self, x):
        return self.part(self.up(self.part(x)))


def test_an_adapted_part_of_a_larger_model_run_twice():
    larger = Larger(aj.Recipe(lora("up")))
    params = abstract(larger, X)
    part = {"up": DENSE | {"lora": FACTORS}, "down": DENSE}
    assert shapes(params) == {"part": part, "up": DENSE}
    params = drawn_like(params)
    x = dense(mlp(double(X), params["part"]), params["up"])
    close(larger.apply({"params": params}, X), mlp(x, params["part"]))


def test_targets_of_a_part_are_relative_to_it_and_checked():
    with raises(aj.TargetError, "LoRA", "'part/up'"):
        abstract(Larger(aj.Recipe(lora("part/up"))), X)


def test_an_adapted_part_in_a_compact_model():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = aj.adapt(Mlp(name="mlp"), lora("up"))(x)
            return aj.adapt(Mlp(), lora("down"))(x)

    params = drawn_like(abstract(Compact(), X))
    assert shapes(params) == {
        "mlp": {"up": DENSE | {"lora": FACTORS}, "down": DENSE},
        "Mlp_0": {"up": DENSE, "down": DENSE | {"lora": FACTORS}},
    }
    got = Compact().apply({"params": params}, X)
    close(got, mlp(mlp(double(X), params["mlp"]), params["Mlp_0"]))


def test_a_model_with_an_adapted_part_can_be_adapted():
    larger = Larger(aj.Recipe(lora("up")))
    model, params = grown(larger, lora("part/down"))
    both = {"up": DENSE | {"lora": FACTORS}, "down": DENSE | {"lora": FACTORS}}
    assert shapes(params) == {"part": both, "up": DENSE}
    x = dense(mlp(double(X), params["part"]), params["up"])
    close(model.apply({"params": params}, X), mlp(x, params["part"]))


# How often a module is adapted


def test_a_call_of_the_parent_class_is_no_second_call():
    class Scaled(nn.Dense):
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    model, params = grown(Scaled(D), lora("**"))
    low = double(X) @ double(params["lora"]["a"]) @ double(params["lora"]["b"])
    plain = double(X) @ double(params["kernel"]) + double(params["bias"])
    close(model.apply({"params": params}, X), 2 * (plain + low))


def test_a_module_called_several_times_is_adapted_each_time():
    class Thrice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(D, name="layer")
            return layer(layer(layer(x)))

    model, params = grown(Thrice(), lora("layer"))
    x = double(X)
    for _ in range(3):
        x = dense(x, params["layer"])
    np.testing.assert_allclose(model.apply({"params": params}, X), x, rtol=1e-3, atol=1e-3)


def test_a_module_used_under_two_names_has_one_adapter():
    class User(nn.Module):
        layer: nn.Module

        def __call__(self, x):
            return jnp.tanh(self.layer(x))

    class Shared(nn.Module):
        def setup(self):
            self.layer = nn.Dense(D)
            self.one, self.two = User(self.layer), User(self.layer)

        def __call__(self, x):
            return self.two(self.one(x))

    model, params = grown(Shared(), lora("layer"))
    assert shapes(params) == {"layer": DENSE | {"lora": FACTORS}}
    x = double(X)
    for _ in range(2):
        x = np.tanh(dense(x, params["layer"]))
    close(model.apply({"params": params}, X), x)


def test_a_module_from_outside_is_none_of_the_models_parts():
    class Lent(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="own")(jnp.tanh(self.layer(x)))

    class Lender(nn.Module):
        def setup(self):
            self.layer = nn.Dense(D)
            self.part = aj.adapt(Lent(self.layer), lora("**"))

        def __call__(self, x):
            return self.part(x)

    params = drawn_like(abstract(Lender(), X))
    assert shapes(params) == {"layer": DENSE, "part": {"own": DENSE | {"lora": FACTORS}}}
    expected = dense(np.tanh(dense(double(X), params["layer"])), params["part"]["own"])
    close(Lender().apply({"params": params}, X), expected)


def test_an_embedding_that_is_only_attended_to():
    class Scores(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Embed(7, D, name="embed").attend(x)

    model, params = grown(Scores(), lora("embed"))
    embed = jax.tree.map(double, params["embed"])
    table = embed["embedding"] + (embed["lora"]["a"] @ embed["lora"]["b"]).T  # d is contracted
    close(model.apply({"params": params}, X), X @ table.T)
    close(aj.merge(model, params, X)["embed"]["embedding"], table)


# Lifted transforms


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(D, name="dense")(x)), None


class Stack(nn.Module):
    """Three layers, scanned and rematerialised."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


def test_scan_and_remat_stack_the_leaves():
    model, params = grown(Stack(), lora("layers/dense", 1.5))
    leaves = params["layers"]["dense"]
    assert shapes(leaves["lora"]) == {"a": (3, D, R), "b": (3, R, D)}
    x = double(X)
    for i in range(3):
        x = np.tanh(dense(x, jax.tree.map(lambda leaf, i=i: leaf[i], leaves), 1.5))
    close(model.apply({"params": params}, X), x)


def test_scanned_layers_start_each_from_numbers_of_its_own():
    base = drawn_like(abstract(Stack(), X))
    params = aj.init_adapters(aj.adapt(Stack(), lora("layers/dense")), base, KEY, X)
    a = np.asarray(params["layers"]["dense"]["lora"]["a"])
    assert a.shape == (3, D, R) and len(np.unique(a)) == a.size


class MadeInSetup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(D)

    def __call__(self, x):
        return self.dense(x)


def test_what_setup_makes_is_there_of_a_bound_model():
    model, params = grown(MadeInSetup(), lora("dense"))
    bound = model.bind({"params": params})
    close(bound.dense(X), model.apply({"params": params}, X))


class Jitted(nn.Module):
    """A part traced by nn.jit, which flax keeps for modules of equal fields."""

    part: type

    def setup(self):
        self.one, self.two = self.part(), self.part()

    def __call__(self, x, deterministic=True):
        return self.two(self.one(x))


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="dense")(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="dense")(x)


JitClass = nn.jit(Plain)


class Holder(nn.Module):
    """A module that nn.jit does not trace, around one that it does."""

    def setup(self):
        self.dense = JitClass()

    def __call__(self, x):
        return self.dense(x)


def held(part, leaves):
    """The leaves of the dense layer in a part of `Jitted`."""
    return leaves["dense"]["dense"] if part is Holder else leaves["dense"]


@pytest.mark.parametrize("part", [JitClass, JitMethod, Holder])
def test_nn_jit_takes_up_no_trace_of_the_base_or_of_another_recipe_or_path(part):
    base = Jitted(part)
    plain = drawn_like(abstract(base, X))
    x = double(X)
    expected = dense(dense(x, held(part, plain["one"])), held(part, plain["two"]))
    close(base.apply({"params": plain}, X), expected)
    for one, two in ((1.0, 1.0), (3.0, 3.0), (1.0, 3.0), (3.0, 1.0)):
        patterns = {"one/**": one * R, "two/**": two * R}
        model, params = grown(base, lora("**/dense", alpha_pattern=patterns))
        for name in ("one", "two"):
            assert shapes(held(part, params[name])) == DENSE | {"lora": FACTORS}
        expected = dense(dense(x, held(part, params["one"]), one), held(part, params["two"]), two)
        for _ in range(2):
            close(model.apply({"params": params}, X), expected)
    model, params = grown(base, lora("two/**"))
    assert shapes(params["one"]) == shapes(plain["one"])
    assert shapes(held(part, params["two"])) == DENSE | {"lora": FACTORS}
    assert shapes(abstract(model, X)) == shapes(params)


@pytest.mark.slow
@pytest.mark.witness("JitMethod")
@pytest.mark.parametrize("part", [JitClass, JitMethod])
def test_nn_jit_takes_up_no_trace_without_a_bottleneck_or_with_another(part):
    """nn.jit looks traces up by the hash of a scope's flags, where the interceptor is."""
    base, plain = Jitted(part), Jitted(Plain)
    base.apply({"params": drawn_like(abstract(base, X))}, X)
    for scales in ((1.0, 1.0), (3.0, 1.0), (1.0, 3.0)):
        recipe = aj.Recipe(
            *(
                aj.Bottleneck(f"{n}/dense", 2, scale=s)
                for n, s in zip(("one", "two"), scales, strict=True)
            )
        )
        model, params = grown(base, recipe)
        other = aj.adapt(plain, recipe)
        close(model.apply({"params": params}, X), other.apply({"params": params}, X))
    recipe = aj.Bottleneck("*/dense", 2, dropout=0.5)
    model, params = grown(base, recipe)
    other, rngs = aj.adapt(plain, recipe), {"dropout": KEY}
    expected = other.apply({"params": params}, X, True, rngs=rngs)
    for deterministic in (True, False, True, False):
        got = model.apply({"params": params}, X, deterministic, rngs=rngs)
        assert np.allclose(got, expected, rtol=1e-3, atol=1e-3) == deterministic


@pytest.mark.parametrize("part", [JitClass, JitMethod])
def test_nn_jit_takes_up_no_trace_of_training_in_evaluation(part):
    model, params = grown(Jitted(part), lora("*/dense", dropout=0.5))
    rngs = {"dropout": KEY}
    plain = dense(dense(double(X), params["one"]["dense"]), params["two"]["dense"])
    for deterministic in (True, False, True, False):
        got = model.apply({"params": params}, X, deterministic, rngs=rngs)
        assert np.allclose(got, plain, rtol=1e-3, atol=1e-3) == deterministic


def test_nn_jit_is_not_traced_again_and_again():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(self.path)
            return nn.Dense(D, name="dense")(x)

    model, params = grown(Jitted(nn.jit(Counted)), lora("*/dense"))
    model.apply({"params": params}, X)
    before = len(traces)
    for _ in range(3):
        model.apply({"params": params}, X)
    assert len(traces) == before
    assert jax.make_jaxpr(model.apply)({"params": params}, X)


def test_vmap_over_parameters():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            heads = nn.vmap(
                Plain,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return heads(name="heads")(x)

    model, params = grown(Heads(), lora("heads/dense"))
    leaves = params["heads"]["dense"]
    expected = [dense(double(X), jax.tree.map(lambda leaf, i=i: leaf[i], leaves)) for i in range(2)]
    close(model.apply({"params": params}, X), expected)


# Other collections, and boxes


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(D, name="dense")(x)
        self.sow("intermediates", "hidden", x)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


def test_other_collections_pass_through():
    model, params = grown(Normed(), lora("dense"))
    hidden = dense(double(X), params["dense"])
    norm = jax.tree.map(double, params["norm"])
    stats = {"norm": {"mean": drawn((D,), 3), "var": drawn((D,), 4) ** 2}}
    variables = {"params": params, "batch_stats": stats}
    scaled = (hidden - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
    close(model.apply(variables, X), scaled * norm["scale"] + norm["bias"])

    y, updates = model.apply(variables, X, True, mutable=["batch_stats", "intermediates"])
    mean, var = hidden.mean((0, 1)), hidden.var((0, 1))
    normal = (hidden - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, normal * norm["scale"] + norm["bias"], rtol=1e-3, atol=1e-3)
    close(updates["batch_stats"]["norm"]["mean"], 0.99 * stats["norm"]["mean"] + 0.01 * mean)
    close(updates["intermediates"]["hidden"][0], hidden)
    initial = jax.eval_shape(model.init, KEY, X)
    assert set(initial) == {"params", "batch_stats"}
    _, captured = model.apply(variables, X, capture_intermediates=True)
    assert "dense" in captured["intermediates"]


def test_boxed_parameters_stay_boxed():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    base = nn.Dense(D, kernel_init=kernel_init)
    boxed = abstract(base, X)
    assert isinstance(boxed["kernel"], nn.Partitioned)
    model = aj.adapt(base, lora("**"))
    params = aj.init_adapters(model, boxed, KEY, X)
    assert params["kernel"] == boxed["kernel"] and shapes(params["lora"]) == FACTORS
    params = drawn_like(params)
    plain = nn.meta.unbox(params)
    expected = dense(double(X), plain)
    close(model.apply({"params": params}, X), expected)
    folded = aj.merge(model, params, X)
    assert folded["kernel"].names == ("in", "out")
    close(base.apply({"params": folded}, X), expected)
    # A checkpoint has no boxes.
    bare = aj.init_adapters(model, nn.meta.unbox(boxed), KEY, X)
    assert shapes(bare) == DENSE | {"lora": FACTORS}
    close(aj.merge(model, plain, X)["kernel"], folded["kernel"].value)


# Names


class Own(nn.Module):
    """A base with modules of the names that methods use."""

    name_: str = "lora"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, name=self.name_)(x)
        return nn.Dense(D, name="adapter")(x)


def test_base_modules_named_as_slots_are_no_adapter_leaves():
    model, params = grown(Own(), aj.Recipe(lora("**"), aj.Bottleneck("lora", 3)))
    adapter = {"down": {"kernel": (D, 3), "bias": (3,)}, "up": {"kernel": (3, D), "bias": (D,)}}
    assert shapes(params) == {
        "lora": DENSE | {"lora": FACTORS, "adapter": adapter},
        "adapter": DENSE | {"lora": FACTORS},
    }
    adapters, base = aj.partition(params, model.recipe)
    assert shapes(base) == {"lora": DENSE, "adapter": DENSE}
    assert shapes(adapters) == {
        "lora": {"lora": FACTORS, "adapter": adapter},
        "adapter": {"lora": FACTORS},
    }


class Taken(nn.Module):
    """A base that has something named `lora` in a module that can be a target."""

    by_hand: bool = False

    @nn.compact
    def __call__(self, x):
        if self.by_hand:
            return aj.linen.LoRADense(D, rank=R, name="dense")(x)
        return Odd(name="odd")(x)


class Odd(nn.Dense):
    features: int = D

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.ones, (D, D))
        return nn.Dense(D, name="lora")(inputs @ kernel)


@pytest.mark.parametrize(("by_hand", "path"), [(True, "dense"), (False, "odd")])
def test_a_name_that_the_base_uses_raises(by_hand, path):
    model = aj.adapt(Taken(by_hand), lora(path))
    for start in (
        lambda: aj.init_adapters(model, abstract(Taken(by_hand), X), KEY, X),
        lambda: abstract(model, X),
    ):
        with raises(aj.RecipeError, "LoRA", f"{path}/lora"):
            start()


# init_adapters


def test_init_adapters_lists_every_difference_at_once():
    model = aj.adapt(Mlp(), lora("up"))
    params = abstract(Mlp(), X)
    del params["down"]["bias"]
    params["down"]["extra"] = params["up"]["bias"]
    params["up"]["kernel"] = jax.ShapeDtypeStruct((D, D + 1), jnp.float32)
    with raises(
        aj.MismatchError,
        "1 missing: down/bias;",
        "1 unexpected: down/extra;",
        "1 different: up/kernel is [4, 5], expected [4, 4].",
        "variables['params']",
    ):
        aj.init_adapters(model, params, KEY, X)


def test_init_adapters_given_variables_instead_of_parameters():
    model = aj.adapt(Mlp(), lora("up"))
    with raises(aj.MismatchError, "collections (params)", 'variables["params"]'):
        aj.init_adapters(model, {"params": abstract(Mlp(), X)}, KEY, X)


def test_init_adapters_given_the_key_first():
    with raises(aj.UserError, "params", "PRNGKeyArray"):
        aj.init_adapters(aj.adapt(Mlp(), lora("up")), KEY, abstract(Mlp(), X), X)


def test_init_adapters_takes_abstract_inputs_keywords_and_any_mapping():
    class Asks(nn.Module):
        @nn.compact
        def __call__(self, ids, mask, *, key=None, scale=1.0, mode="a"):
            return scale * nn.Dense(D, name="dense")(mask * nn.Embed(5, D, name="embed")(ids))

    ids, mask = np.array([[1, 4, 0]]), drawn((1, 3, 1))
    base = drawn_like(abstract(Asks(), ids, mask))
    model = aj.adapt(Asks(), lora("*"))
    plain = aj.init_adapters(model, base, KEY, ids, mask)
    assert shapes(plain["embed"]) == {"embedding": (5, D), "lora": {"a": (5, R), "b": (R, D)}}
    expected = jax.tree.leaves(plain)
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (ids, mask)]
    ways = [
        aj.init_adapters(model, base, KEY, *inputs),
        aj.init_adapters(model, base, KEY, ids, mask=inputs[1], scale=2.0, mode="b"),
        aj.init_adapters(model, base, KEY, mask=mask, ids=ids, key=jax.random.key(1)),
        aj.init_adapters(model, freeze(base), KEY, ids, mask),
        aj.init_adapters(model, plain, KEY, ids, mask),
        jax.jit(lambda p, k: aj.init_adapters(model, p, k, *inputs))(base, KEY),
    ]
    for params in ways:
        assert all(map(np.array_equal, jax.tree.leaves(params), expected))
        assert jax.tree.structure(params) == jax.tree.structure(plain)
    other = aj.init_adapters(model, base, jax.random.key(1), ids, mask)
    assert (np.asarray(other["dense"]["lora"]["a"]) != plain["dense"]["lora"]["a"]).all()


def test_abstract_parameters_stay_abstract_and_concrete_ones_are_not_copied():
    shape = abstract(Mlp(), X)
    model = aj.adapt(Mlp(), aj.Bottleneck("up", 3))
    params = aj.init_adapters(model, shape, KEY, X)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    base = drawn_like(shape)
    before = jax.tree.map(np.copy, base)
    params = aj.init_adapters(model, base, KEY, X)
    assert params["up"]["kernel"] is base["up"]["kernel"]
    assert "adapter" in params["up"] and "adapter" not in base["up"]
    assert all(map(np.array_equal, jax.tree.leaves(base), jax.tree.leaves(before)))


def test_example_inputs_that_do_not_fit():
    model = aj.adapt(Mlp(), lora("up"))
    for args, given in (((), "()"), ((X, "x"), "(float32[2, 3, 4], 'x')")):
        with raises(aj.UserError, "Mlp", given):
            aj.init_adapters(model, abstract(Mlp(), X), KEY, *args)
    with pytest.raises(IndexError) as bug:  # of the model, to which a number has no axes
        aj.init_adapters(model, abstract(Mlp(), X), KEY, 3)
    assert "Mlp" in bug.value.__notes__[-1] and "(3)" in bug.value.__notes__[-1]
    with raises(aj.MismatchError, "up/kernel is [4, 4], expected [5, 4]"):
        aj.init_adapters(model, abstract(Mlp(), X), KEY, drawn((2, 5)))


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    class Buggy(nn.Module):
        @nn.compact
        def __call__(self, x):
            raise KeyError(nn.Dense(D, name="up")(x).shape)

    model = aj.adapt(Buggy(), lora("up"))
    with pytest.raises(KeyError) as caught:
        aj.init_adapters(model, abstract(Mlp(), X), KEY, X)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert (frames[-1].name, frames[-1].filename) == ("__call__", __file__)
    assert (
        "Buggy" in caught.value.__notes__[-1] and "float32[2, 3, 4]" in caught.value.__notes__[-1]
    )


def test_another_method_in_a_recipe_changes_no_other_adapters_start():
    base = drawn_like(abstract(Mlp(), X))

    def start(*methods):
        return aj.init_adapters(aj.adapt(Mlp(), aj.Recipe(*methods)), base, KEY, X)

    adapter = aj.Bottleneck("up", 3)
    alone, other = start(lora("down")), start(adapter)
    both = start(adapter, aj.LoRA("{up,down}", R))
    a = np.asarray(both["down"]["lora"]["a"])
    np.testing.assert_array_equal(a, alone["down"]["lora"]["a"])
    for name in ("down", "up"):
        expected = other["up"]["adapter"][name]["kernel"]
        np.testing.assert_array_equal(both["up"]["adapter"][name]["kernel"], expected)
    assert (a != np.asarray(both["up"]["lora"]["a"])).all()


def test_patterns_that_match_nothing_raise_in_both_kinds_of_init():
    recipe = aj.Recipe(aj.LoRA("**/{upp,dwn}", R))
    model, params = aj.adapt(Mlp(), recipe), abstract(Mlp(), X)
    for start in (lambda: aj.init_adapters(model, params, KEY, X), lambda: abstract(model, X)):
        with raises(aj.TargetError, "LoRA", "'**/{upp,dwn}'") as error:
            start()
        detail, advice = str(error.value).split("\n")
        assert detail.endswith(": up, down")  # the nearest paths, and no others
        assert "'**/{upp,dwn}'" in advice and "aj.suggest(model, *inputs)" in advice
    for recipe, data in {
        lora("relu"): ("LoRA: ", "'relu'"),
        lora("**/nothing"): ("LoRA: ", "'**/nothing'"),
        aj.Unfreeze("down/wieght"): ("Unfreeze: ", "'down/wieght'", "down/bias"),
        lora("up", rank_pattern={"down": 1}): ("LoRA rank_pattern: ", "'down'"),
    }.items():
        with raises(aj.TargetError, *data):
            aj.init_adapters(aj.adapt(Mlp(), recipe), params, KEY, X)


def test_a_model_without_parameters():
    class Sum(nn.Module):
        def __call__(self, x):
            return x.sum(-1)

    model = aj.adapt(Sum(), lora("**"))
    with raises(aj.TargetError, "LoRA", "'**'", "(the model itself)", "aj.suggest"):
        aj.init_adapters(model, {}, KEY, X)


def test_a_target_that_takes_no_input():
    class Positions(nn.Module):
        @nn.compact
        def __call__(self):
            return self.param("table", nn.initializers.ones, (3, D))

    class Placed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + Positions(name="positions")()

    model, params = grown(Placed(), aj.Bottleneck("positions", 2, activation="identity"))
    p = jax.tree.map(double, params["positions"])
    down, up = p["adapter"]["down"], p["adapter"]["up"]
    hidden = p["table"] @ down["kernel"] + down["bias"]
    close(model.apply({"params": params}, X), X + p["table"] + hidden @ up["kernel"] + up["bias"])


def test_the_table_of_an_adapted_model_shows_its_adapters_without_a_warning():
    adapted = aj.adapt(nn.Sequential([nn.Dense(5), nn.Dense(3)]), aj.LoRA("layers_0", rank=2))
    with warnings.catch_warnings(record=True) as seen:  # flax catches those that are errors
        warnings.simplefilter("always")
        table = adapted.tabulate(jax.random.key(0), jnp.ones((1, 4)))
    assert not seen
    assert "lora" in table and "Total Parameters: 61" in table  # 4*5+5 + 5*3+3 + 2*(4+5)


def test_a_call_on_its_adapters_traces_no_initialiser(monkeypatch):
    """flax's `param` does, in each call of each layer."""
    drawn_shapes = []

    def normal(std):
        return lambda key, shape: drawn_shapes.append(shape) or jnp.full(shape, 0.1)

    monkeypatch.setattr("adapters_jax.methods.arrays.truncated_normal", normal)
    model, base = aj.adapt(Mlp(), aj.Bottleneck("up", 2)), Mlp().init(KEY, X)["params"]
    params = aj.init_adapters(model, base, KEY, X)
    assert (D, 2) in drawn_shapes
    drawn_shapes.clear()
    model.apply({"params": params}, X)
    assert drawn_shapes == []
    params["up"]["adapter"]["down"]["kernel"] = jnp.ones((D, 3))
    with pytest.raises(Exception, match="shape"):
        model.apply({"params": params}, X)
