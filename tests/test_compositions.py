"""Compositions of named adapters: stack, average, split, batch_split and fuse."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods import METHODS, Count, Leaf, arrays
from adapters_jax.trees import flatten, unflatten

X = jax.random.normal(jax.random.key(9), (4, 6, 8))
KEY = jax.random.key(0)
WIDTHS = {"a": 3, "b": 2, "c": 5}


class Block(nn.Module):
    """A layer whose sum with its input is normalised, in float64 if it must be."""

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="norm")(x + nn.Dense(8, name="ff")(x))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"layer_{i}")(x)
        return x


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(block, x, _):
            return block(x), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(Block(name="layers"), x, None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.ff, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(x + self.ff(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layer_0, self.layer_1 = NnxBlock(rngs), NnxBlock(rngs)

    def __call__(self, x):
        return self.layer_1(self.layer_0(x))


def adapters(placement="sequential", **fields):
    where = "**/norm" if placement == "norm" else "**/ff"
    return [
        aj.Bottleneck(where, width, name=name, placement=placement, **fields)
        for name, width in WIDTHS.items()
    ]


def drawn(params, recipe, seed=3):
    """Parameters whose adapters are far from where they start."""
    flat, trained = flatten(params), recipe.owners(flatten(params))
    keys = jax.random.split(jax.random.key(seed), len(trained))
    new = {
        path: flat[path] + 0.4 * jax.random.normal(key, flat[path].shape)
        for key, path in zip(keys, trained, strict=True)
    }
    return unflatten({**flat, **new}, params)


def adapted(recipe, base=None, x=X):
    base = base or Linen()
    model = aj.adapt(base, recipe)
    params = aj.init_adapters(model, base.init(KEY, x)["params"], jax.random.key(1), x)
    return model, drawn(params, model.recipe)


# The formulas, of arrays in float64.


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def branch(own, name, y):
    of = {key: own[f"adapter_{name}/{key}"] for key in ("down/kernel", "down/bias")}
    of |= {key: own[f"adapter_{name}/{key}"] for key in ("up/kernel", "up/bias")}
    hidden = gelu(y @ of["down/kernel"] + of["down/bias"])
    return hidden @ of["up/kernel"] + of["up/bias"]


def layer_norm(own, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * own["scale"] + own["bias"]


def stacked(names, own, stream, norm):
    for name in names:
        stream = stream + branch(own, name, norm(stream))
    return stream


def averaged(names, shares, own, stream, norm):
    return sum(w * stacked([n], own, stream, norm) for n, w in zip(names, shares, strict=True))


def fused(branches, own, stream, norm, slot="fusion"):
    query = norm(stream) @ own[f"{slot}/query/kernel"] + own[f"{slot}/query/bias"]
    keys = [z @ own[f"{slot}/key/kernel"] + own[f"{slot}/key/bias"] for z in branches]
    scores = np.stack([(query * key).sum(-1) for key in keys])
    shares = np.exp(scores - scores.max(0))
    shares = shares / shares.sum(0)
    value = own.get(f"{slot}/value/kernel", np.eye(8))
    return stream + sum(p[..., None] * (z @ value) for p, z in zip(shares, branches, strict=True))


def over(axis, names, sizes, own, stream, norm):
    parts = np.split(stream, np.cumsum(sizes)[:-1], axis)
    return np.concatenate(
        [stacked([n], own, x, norm) for n, x in zip(names, parts, strict=True)], axis
    )


def fuse_of_stack(own, stream, norm):
    middle = stacked("a", own, stream, norm)
    last = branch(own, "b", norm(middle))  # a stack counts by its last adapter
    return fused([last, branch(own, "c", norm(stream))], own, stream, norm)


def stack_of_fuse(own, stream, norm):
    stream = stacked("a", own, stream, norm)
    branches = [branch(own, name, norm(stream)) for name in "bc"]
    return fused(branches, own, stream, norm, "fusion_fuse_b_c")


CASES = {
    "stack": (aj.stack("a", "c", "b"), lambda *of: stacked("acb", *of)),
    "average": (
        aj.average("a", "b", "c", weights=(3, 1, 4)),
        lambda *of: averaged("abc", (3 / 8, 1 / 8, 4 / 8), *of),
    ),
    "split": (
        aj.split("a", "b", "c", sizes=(1, None, 2)),
        lambda *of: over(1, "abc", (1, 3, 2), *of),
    ),
    "batch_split": (
        aj.batch_split("a", "b", "c", sizes=(1, 1, None)),
        lambda *of: over(0, "abc", (1, 1, 2), *of),
    ),
    "fuse": (
        aj.fuse("a", "b", "c"),
        lambda own, x, norm: fused([branch(own, n, norm(x)) for n in "abc"], own, x, norm),
    ),
    "fuse without values": (
        aj.fuse("a", "b", "c", value=False),
        lambda own, x, norm: fused([branch(own, n, norm(x)) for n in "abc"], own, x, norm),
    ),
    "stack of fuse": (aj.stack("a", aj.fuse("b", "c")), stack_of_fuse),
    "fuse of stack": (aj.fuse(aj.stack("a", "b"), "c"), fuse_of_stack),
    "average of stack": (
        aj.average(aj.stack("a", "b"), "c"),
        lambda *of: (stacked("ab", *of) + stacked("c", *of)) / 2,
    ),
}


def expected(params, formula, placement):
    """The model by the formulas, in float64."""
    x = np.asarray(X, np.float64)
    flat = {path: np.asarray(array, np.float64) for path, array in flatten(params).items()}
    for i in range(2):
        ff, norm = (
            {
                p.removeprefix(f"layer_{i}/{m}/"): v
                for p, v in flat.items()
                if f"layer_{i}/{m}/" in p
            }
            for m in ("ff", "norm")
        )
        h = x @ ff["kernel"] + ff["bias"]
        if placement == "norm":
            x = layer_norm(norm, formula(norm, x + h, lambda x: layer_norm(norm, x)))  # noqa: B023
        else:
            x = layer_norm(norm, x + formula(ff, h, lambda y: y))
    return x


@pytest.mark.witness(
    "stack-norm", "split-sequential", "batch_split-norm", "fuse-norm", "average of stack-sequential"
)
@pytest.mark.parametrize("placement", ["sequential", "norm"])
@pytest.mark.parametrize("case", CASES)
def test_each_composition_is_its_formula(case, placement):
    entries, formula = CASES[case]
    model, params = adapted(aj.Recipe(*adapters(placement), entries))
    y = jax.jit(model.apply)({"params": params}, X)
    np.testing.assert_allclose(y, expected(params, formula, placement), atol=2e-5)
    # Nothing else runs: the adapters one after the other give something else.
    plain = aj.adapt(Linen(), aj.Recipe(*adapters(placement)))
    assert np.abs(y - jax.jit(plain.apply)({"params": params}, X)).max() > 1e-2

    base = Nnx(nnx.Rngs(0))
    same = aj.adapt(base, model.recipe, rngs=nnx.Rngs(1), example_inputs=(X,))
    held = nnx.to_flat_state(nnx.state(same, nnx.Param))
    assert {"/".join(map(str, path)) for path, _ in held} == flatten(params).keys()
    for path, variable in held:
        variable[...] = flatten(params)["/".join(map(str, path))]
    np.testing.assert_allclose(nnx.jit(same)(X), y, atol=1e-5)


@pytest.mark.slow
@pytest.mark.witness("average")
@pytest.mark.parametrize("case", CASES)
def test_in_scanned_layers(case):
    entries, formula = CASES[case]
    recipe = aj.Recipe(*adapters("norm"), entries)
    model, params = adapted(recipe, Scanned())
    flat = flatten(params)
    loose = {
        path.replace("layers/", f"layer_{i}/"): leaf[i]
        for path, leaf in flat.items()
        for i in (0, 1)
    }
    y = jax.jit(model.apply)({"params": params}, X)
    np.testing.assert_allclose(y, expected(loose, formula, "norm"), atol=2e-5)


def test_json_names_and_parts():
    for entries, _ in CASES.values():
        recipe = aj.Recipe(*adapters(), entries)
        assert aj.Recipe.from_json(recipe.to_json()) == recipe
    recipe = aj.Recipe(*adapters(), aj.stack("a", aj.fuse("b", "c", dropout=0.1)))
    nested, outer = recipe.methods[-2:]
    assert (nested.name, outer.members) == ("fuse_b_c", ("a", "fuse_b_c"))
    assert [m.name for m in recipe["fuse_b_c"]] == ["b", "c", "fuse_b_c"]
    assert repr(recipe).count("'fuse_b_c'") == 2


def frozen_and_fused(tmp_path, **fields):
    """Three adapters that were trained alone, loaded and frozen, and a new fusion of them."""
    model, params = Linen(), Linen().init(KEY, X)["params"]
    for each in adapters():
        one, tree = adapted(aj.Recipe(each))
        aj.save_adapter(tmp_path / each.name, aj.partition(tree, one.recipe)[0], one.recipe)
        model, params = aj.load_adapter(tmp_path / each.name, model, params, X, train=False)
    model = aj.adapt(model, aj.fuse("a", "b", "c", **fields))
    return model, aj.init_adapters(model, params, jax.random.key(1), X)


@pytest.mark.slow
def test_fusion_trains_alone_over_frozen_adapters(tmp_path):
    model, params = frozen_and_fused(tmp_path, dropout=0.2)
    assert model.recipe == aj.Recipe(*adapters()).frozen() + aj.fuse("a", "b", "c", dropout=0.2)
    audit = aj.audit(model, params)
    fusion = 2 * (3 * 8 * 8 + 2 * 8)
    bottlenecks = sum(2 * (2 * 8 * m + 8 + m) for m in WIDTHS.values())
    assert (audit.adapter_parameters, audit.trainable_parameters) == (fusion + bottlenecks, fusion)
    state = aj.TrainState.create(model, params, tx=optax.sgd(0.1), key=KEY)

    def loss(params, batch, key):
        return (model.apply({"params": params}, batch, rngs={"dropout": key}) ** 3).mean()

    after, _ = aj.make_train_step(loss)(state, X)
    now, before = flatten(after.adapters), flatten(aj.partition(params, model.recipe)[0])
    moved = {path for path in now if np.abs(now[path] - before[path]).max() > 0}
    assert len(moved) == 2 * 5 and all("/fusion/" in path for path in moved), moved


def test_saved_and_loaded(tmp_path):
    model, params = adapted(aj.Recipe(*adapters("norm"), aj.stack("a", aj.fuse("b", "c"))))
    saved = tmp_path / "a"
    aj.save_adapter(saved, aj.partition(params, model.recipe)[0], model.recipe)
    again, tree = aj.load_adapter(saved, Linen(), Linen().init(KEY, X)["params"], X)
    y = model.apply({"params": params}, X)
    np.testing.assert_array_equal(again.apply({"params": tree}, X), y)
    assert again.recipe == aj.read_adapter(saved)[0] == model.recipe


def test_what_has_no_arrays_is_never_frozen(tmp_path):
    """Else a frozen recipe, or a file loaded with train=False, would wait for its leaves."""
    recipe = aj.Recipe(*adapters(), aj.stack("a", "b"))
    model, params = adapted(recipe)
    assert [m.train for m in recipe.frozen()] == [False] * 3 + [True]
    saved = tmp_path / "a"
    aj.save_adapter(saved, aj.partition(params, recipe)[0], recipe)
    base = Linen().init(KEY, X)["params"]
    frozen, tree = aj.load_adapter(saved, Linen(), base, X, train=False)
    y = model.apply({"params": params}, X)
    np.testing.assert_array_equal(frozen.apply({"params": tree}, X), y)
    with raises(aj.RecipeError, "every entry of the recipe is frozen"):
        aj.TrainState.create(frozen, tree, tx=optax.sgd(0.1), key=KEY)
    both = aj.adapt(frozen, aj.Bottleneck("**/ff", 2, name="d"))
    tree = aj.init_adapters(both, tree, KEY, X)
    aj.save_adapter(tmp_path / "b", aj.adapters_of(tree, both.recipe), both.recipe)
    assert aj.audit(both, tree).trainable_parameters == 2 * (2 * 8 * 2 + 8 + 2)


@pytest.mark.witness("stack of fuse-a run")
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["shapes", "a run"])
@pytest.mark.parametrize("case", ["average", "stack of fuse", "average of stack"])
def test_nnx_models_and_states_are_saved_and_loaded(case, inputs, tmp_path):
    base, recipe = Nnx(nnx.Rngs(0)), aj.Recipe(*adapters(), CASES[case][0])
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1), example_inputs=(X,))
    state = nnx.to_flat_state(nnx.state(model, aj.nnx.AdapterParam))
    for i, (_, variable) in enumerate(state):
        variable[...] += 0.3 * jax.random.normal(jax.random.key(i), variable.shape)
    saved = aj.save_adapter(tmp_path / "model", model)
    again = aj.load_adapter(saved, base, example_inputs=inputs)
    np.testing.assert_array_equal(again(X), model(X))
    linen = aj.adapt(Linen(), recipe)
    params = aj.init_adapters(linen, Linen().init(KEY, X)["params"], KEY, X)
    trained = aj.TrainState.create(linen, drawn(params, recipe), tx=optax.sgd(0.1), key=KEY)
    saved = aj.save_adapter(tmp_path / "state", trained)
    given = () if inputs is None else inputs
    one, tree = aj.load_adapter(saved, Linen(), Linen().init(KEY, X)["params"], *given)
    wanted = linen.apply({"params": drawn(params, recipe)}, X)
    np.testing.assert_array_equal(one.apply({"params": tree}, X), wanted)


@pytest.mark.slow
def test_rows_of_a_bank():
    recipe = aj.Recipe(*adapters(), aj.fuse("a", "b", "c"))
    model, first = adapted(recipe)
    second = drawn(first, recipe, seed=8)
    bank = aj.Bank(model, first)
    for name, params in (("one", first), ("two", second)):
        bank = bank.put(name, (recipe, aj.partition(params, recipe)[0]))
    rows = bank.rows(["one", "two", None, "one"])
    y = bank.model.apply({"params": bank.params}, X, adapters=rows)
    for i, params in ((0, first), (1, second), (3, first)):
        alone = model.apply({"params": params}, X[i : i + 1])[0]
        np.testing.assert_allclose(y[i], alone, atol=1e-5)
    plain = Linen().apply({"params": aj.partition(first, recipe)[1]}, X[2:3])
    np.testing.assert_allclose(y[2], plain[0], atol=1e-5)


def test_a_bank_with_rows_of_its_own_is_refused():
    model, params = adapted(aj.Recipe(*adapters(), aj.batch_split("a", "b")))
    with raises(aj.RecipeError, "batch_split chooses adapters by rows"):
        aj.Bank(model, params)


def test_merging_is_refused():
    model, params = adapted(aj.Recipe(*adapters(), aj.stack("a", "b")))
    with raises(aj.RecipeError, "cannot be folded into a weight"):
        aj.merge(model, params)


def test_adapters_beside_a_composition_run_by_themselves():
    model, params = adapted(aj.Recipe(*adapters(), aj.average("a", "b")))
    wanted = expected(
        params,
        lambda *of: averaged("ab", (0.5, 0.5), of[0], stacked("c", *of), of[2]),
        "sequential",
    )
    np.testing.assert_allclose(model.apply({"params": params}, X), wanted, atol=2e-5)


def test_a_stack_passes_over_modules_without_a_member():
    first = aj.Bottleneck("layer_0/ff", 3, name="a")
    model, params = adapted(aj.Recipe(first, adapters()[1], aj.stack("a", "b")))
    assert not any("layer_1/ff/adapter_a" in path for path in flatten(params))
    wanted = expected(
        params,
        lambda own, *of: stacked("ab" if "adapter_a/up/bias" in own else "b", own, *of),
        "sequential",
    )
    np.testing.assert_allclose(model.apply({"params": params}, X), wanted, atol=2e-5)


def test_a_member_of_another_base_is_refused(tmp_path):
    """Its file says which base it is of, before a composition can name it."""
    other = Linen().init(jax.random.key(5), X)["params"]
    one = aj.Recipe(adapters()[0])
    trained = aj.init_adapters(aj.adapt(Linen(), one), other, KEY, X)
    state = aj.TrainState.create(aj.adapt(Linen(), one), trained, tx=optax.sgd(0.1), key=KEY)
    saved = aj.save_adapter(tmp_path / "a", state)
    base = Linen().init(KEY, X)["params"]
    with raises(aj.MismatchError, "layer_0"):
        aj.load_adapter(saved, Linen(), base, X, train=False)


A, B = adapters()[:2]
BAD = [
    (lambda: aj.Recipe(A, aj.stack("a", "z")), "no entry before it has the name 'z'; there is a"),
    (lambda: aj.Recipe(A, aj.stack("a", "b"), B), "no entry before it has the name 'b'"),
    (lambda: aj.stack("a", "a"), "'a' stands there twice"),
    (lambda: aj.Recipe(A, B, aj.stack("a", "b"), aj.fuse("b")), "'b' runs in stack already"),
    (lambda: aj.fuse(), "members=(), expected the names of adapters"),
    (lambda: aj.stack("a", 3), "expected the names of adapters"),
    (lambda: aj.average("a", "b", weights=(1,)), "expected a number for each"),
    (lambda: aj.average("a", "b", weights=(1, -1)), "with a sum that is not 0"),
    (lambda: aj.split("a", "b", sizes=(None, None)), "one of them None at most"),
    (lambda: aj.split("a", "b", sizes=(0, 2)), "sizes=0, expected a whole number >= 1"),
    (
        lambda: aj.Recipe(A, aj.LoRA("**/ff", name="l"), aj.average("a", "l")),
        "'l' runs LoRA, which acts on weights",
    ),
    (
        lambda: aj.Recipe(
            A, B, aj.LoRA("**/ff", name="l"), aj.split(aj.stack("b", aj.stack("a", "l")))
        ),
        "'stack_b_stack_a_l' runs LoRA, which acts on weights",
    ),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_what_is_wrong_is_said_when_it_is_made(make, words):
    with raises(aj.UserError, words):
        make()


WRONG = [
    (aj.split("a", "b", sizes=(1, 2)), "has 6 along axis -2, which parts of 1, 2 do not fill"),
    (aj.batch_split("a", "b", "c"), "has 4 along axis 0, which parts of 3 equal parts"),
]


@pytest.mark.parametrize(("entries", "words"), WRONG)
def test_parts_that_do_not_fill_the_axis(entries, words):
    with raises(aj.RecipeError, words):
        adapted(aj.Recipe(*adapters(), entries))


def test_members_that_are_not_on_one_module():
    other = aj.Bottleneck("layer_0/ff", 3, name="z")
    with raises(aj.RecipeError, "'z' has no adapter on the output of 'layer_1/ff', where a have"):
        adapted(aj.Recipe(A, other, aj.fuse("a", "z")))


def test_members_of_two_placements():
    around = aj.Bottleneck("**/norm", 3, name="n", placement="norm")
    on = aj.Bottleneck("**/norm", 3, name="o")
    with raises(aj.RecipeError, "some of n, o change the module's input"):
        adapted(aj.Recipe(around, on, aj.average("n", "o")))


def test_a_stack_may_have_both_placements():
    around = aj.Bottleneck("**/norm", 3, name="a", placement="norm")
    on = aj.Bottleneck("**/norm", 3, name="b")
    both = aj.Recipe(around, on)
    model, params = adapted(both + aj.stack("a", "b"))
    plain = aj.adapt(Linen(), both).apply({"params": params}, X)
    np.testing.assert_array_equal(model.apply({"params": params}, X), plain)
    turned = aj.adapt(Linen(), both + aj.stack("b", "a")).apply({"params": params}, X)
    assert np.abs(turned - plain).max() > 1e-3


def test_what_adds_no_branch_is_not_fused():
    @aj.register_method
    @dataclass(frozen=True)
    class Doubled(aj.Method):
        kind, slot, leaf_names = "tests_doubled", "tests_doubled", ("scale",)

        def leaves(self, point):
            return {"scale": Leaf((point.width,), arrays.ones)}

        def count(self, path, shapes, weight):
            return Count("d", shapes["scale"][-1])

        def forward(self, leaves, point, x, y, key=None):
            return y * arrays.beside(leaves["scale"].astype(y.dtype), y)

    try:
        with raises(aj.RecipeError, "fuse: d at 'layer_0/ff' adds no branch to the output"):
            adapted(aj.Recipe(A, Doubled("**/ff", name="d"), aj.fuse("a", "d")))
    finally:
        METHODS.pop("tests_doubled")


@pytest.mark.slow
def test_in_half_precision():
    model, params = adapted(aj.Recipe(*adapters(), aj.fuse("a", "b", "c")))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    y = model.apply({"params": half}, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), model.apply({"params": params}, X), atol=0.15)


class Named(nn.Module):
    """A model whose part has a composition's name."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, name="split")(nn.Dense(8, name="ff")(x))


class NnxNamed(nnx.Module):
    def __init__(self, rngs):
        self.ff, self.stack = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def split(self):
        return self.ff, self.stack

    def __call__(self, x):
        return x + self.stack(self.ff(x))


@pytest.mark.parametrize("kind", ["stack", "split"])
def test_a_model_may_have_a_part_of_a_compositions_name(kind):
    members = [aj.Bottleneck("ff", 3, name=n) for n in "ab"]
    around = [aj.Bottleneck("{|ff}", 3, name=n) for n in "ab"]
    for chosen in (members, around):
        recipe = aj.Recipe(*chosen, getattr(aj, kind)("a", "b"))
        model, params = adapted(recipe, Named())
        wanted = model.apply({"params": params}, X)
        plain = Named().apply({"params": aj.partition(params, recipe)[1]}, X)
        assert np.abs(wanted - plain).max() > 1e-2
        same = aj.adapt(NnxNamed(nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1), example_inputs=(X,))
        flat = {path.replace("split/", "stack/"): x for path, x in flatten(params).items()}
        for path, variable in nnx.to_flat_state(nnx.state(same, nnx.Param)):
            variable[...] = flat["/".join(map(str, path))]
        np.testing.assert_allclose(same(X), wanted, atol=1e-5)
        aj.nnx.detach(same)
        np.testing.assert_allclose(same(X), plain, atol=1e-5)


def test_in_equinox():
    eqx = pytest.importorskip("equinox", reason="needs equinox: pip install equinox")

    class Mlp(eqx.Module):
        first: eqx.nn.Linear
        second: eqx.nn.Linear

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    keys = jax.random.split(KEY, 2)
    base = Mlp(eqx.nn.Linear(8, 8, key=keys[0]), eqx.nn.Linear(8, 8, key=keys[1]))
    x = X[0, 0]
    members = [aj.Bottleneck("first", 3, name=n) for n in "ab"]
    recipe = aj.Recipe(*members, aj.average("a", "b", weights=(3, 1)))
    model = aj.adapt(base, recipe, example_inputs=(x,))
    tree = drawn(aj.init_adapters(model, base, jax.random.key(1), x), recipe)
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}
    own = {p.removeprefix("first/"): v for p, v in flat.items() if p.startswith("first/")}
    y = own["weight"] @ np.asarray(x, np.float64) + own["bias"]
    y = averaged("ab", (0.75, 0.25), own, y, lambda y: y)
    wanted = flat["second/weight"] @ np.maximum(y, 0) + flat["second/bias"]
    np.testing.assert_allclose(model(tree, x), wanted, atol=1e-5)


class Two(nn.Module):
    """A layer with two outputs."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="one")(x), nn.Dense(4, name="two")(x)


class OfTwo(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Two(name="two")(x)


@pytest.mark.slow
def test_members_act_on_the_output_that_they_name():
    first, second = (aj.Bottleneck("two", 3, name=name, output=1) for name in "ab")
    model, params = adapted(aj.Recipe(first, second, aj.average("a", "b")), OfTwo())
    y = model.apply({"params": params}, X)
    base = OfTwo().apply({"params": params}, X)
    np.testing.assert_array_equal(y[0], base[0])
    own = {
        path.removeprefix("two/"): np.asarray(x, np.float64) for path, x in flatten(params).items()
    }
    wanted = averaged("ab", (0.5, 0.5), own, np.asarray(base[1], np.float64), lambda y: y)
    np.testing.assert_allclose(y[1], wanted, atol=2e-5)
    _, params = adapted(aj.Recipe(first, second, aj.fuse("a", "b")), OfTwo())
    assert params["two"]["fusion"]["query"]["kernel"].shape == (4, 4)
    other = aj.Bottleneck("two", 3, name="b", output=0)
    with raises(aj.RecipeError, "'two'", "several outputs"):
        adapted(aj.Recipe(first, other, aj.average("a", "b")), OfTwo())


@pytest.mark.slow
def test_parts_of_a_split_know_their_positions():
    """LoReFT on the first and last position of a part is that of the whole text's."""
    reft = aj.LoReFT("layer_0", rank=2, prefix_positions=1, suffix_positions=1, name="r")
    params = adapted(aj.Recipe(reft))[1]
    other = aj.Bottleneck("layer_0", 2, name="b")
    for entries, part in (
        (aj.split("r", "b", sizes=(4, 2)), (slice(None), slice(4))),
        (aj.batch_split("r", "b", sizes=(3, 1)), (slice(3),)),
    ):
        model, both = adapted(aj.Recipe(reft, other, entries))
        both = unflatten({**flatten(both), **flatten(params)})
        outputs = []
        for net in (aj.adapt(Linen(), aj.Recipe(reft)), model):
            _, seen = net.apply({"params": both}, X, capture_intermediates=True)
            outputs.append(seen["intermediates"]["layer_0"]["__call__"][0][part])
        np.testing.assert_allclose(*outputs, atol=1e-6)


@pytest.mark.slow
def test_two_stacks_without_names_on_one_module():
    model, params = adapted(aj.Recipe(*adapters(), aj.stack("b", "a"), aj.stack("c")))
    wanted = expected(params, lambda *of: stacked("bac", *of), "sequential")
    np.testing.assert_allclose(model.apply({"params": params}, X), wanted, atol=2e-5)
