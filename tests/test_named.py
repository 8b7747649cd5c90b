"""Named and frozen entries of a recipe: several adapters of one class on one module."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten, unflatten

X = jax.random.normal(jax.random.key(9), (3, 8))
SW = aj.Bottleneck("up_*", 4, name="sw")
NER = aj.Bottleneck("up_*", 2, name="ner")
KEY = jax.random.key(0)


class Linen(nn.Module):
    """Two layers with a residual sum."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(8, name=f"up_{i}")(nn.relu(x))
        return x


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up_0 = nnx.Linear(8, 8, rngs=rngs)
        self.up_1 = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        for layer in (self.up_0, self.up_1):
            x = x + layer(nnx.relu(x))
        return x


class InLinen:
    """The calls of this file on a linen model."""

    def __init__(self):
        self.base = Linen()
        self.params = self.base.init(KEY, X)["params"]

    def adapt(self, recipe, seed=1, on=None):
        model, params = on or (self.base, self.params)
        model = aj.adapt(model, recipe)
        return model, aj.init_adapters(model, params, jax.random.key(seed), X)

    def leaves(self, adapted):
        return flatten(adapted[1])

    def drawn(self, adapted, seed=3):
        """The model with adapters drawn at random."""
        model, params = adapted
        trained, base = aj.partition(params, model.recipe)
        return model, aj.merge_trees(random_like(trained, seed), base)

    def state(self, adapted):
        return aj.TrainState.create(*adapted, tx=optax.sgd(0.1), key=KEY)

    def save(self, directory, adapted):
        return aj.save_adapter(
            directory, aj.partition(adapted[1], adapted[0].recipe)[0], adapted[0].recipe
        )

    def load(self, directory, **options):
        return aj.load_adapter(directory, self.base, self.params, X, **options)

    def __call__(self, adapted):
        return adapted[0].apply({"params": adapted[1]}, X)

    def of(self, state, adapted):
        return adapted[0], state.params

    def recipe(self, adapted):
        return adapted[0].recipe

    def loss(self, model):
        return lambda params, batch, key: jnp.mean(
            (model[0].apply({"params": params}, batch) - 1) ** 2
        )

    def audit(self, adapted):
        return aj.audit(*adapted)

    def merge(self, adapted):
        return self.base.apply({"params": aj.merge(*adapted)}, X)


class InNnx(InLinen):
    """The same calls on an NNX model."""

    def __init__(self):
        self.base = Nnx(nnx.Rngs(0))

    def adapt(self, recipe, seed=1, on=None):
        return aj.adapt(on or self.base, recipe, rngs=nnx.Rngs(seed), example_inputs=(X,))

    def leaves(self, adapted):
        return flatten(nnx.state(adapted, nnx.Param))

    def drawn(self, adapted, seed=3):
        nnx.update(adapted, random_like(nnx.state(adapted, aj.nnx.AdapterParam), seed))
        return adapted

    def state(self, adapted):
        return aj.TrainState.create(adapted, tx=optax.sgd(0.1), key=KEY)

    def save(self, directory, adapted):
        return aj.save_adapter(directory, adapted)

    def load(self, directory, **options):
        return aj.load_adapter(directory, self.base, example_inputs=(X,), **options)

    def __call__(self, adapted):
        return adapted(X)

    def of(self, state, adapted):
        return state.model

    def recipe(self, adapted):
        return aj.nnx.recipe_of(adapted)

    def loss(self, model):
        return lambda model, batch, key: jnp.mean((model(batch) - 1) ** 2)

    def audit(self, adapted):
        return aj.audit(adapted)

    def merge(self, adapted):
        return aj.merge(adapted)(X)


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@pytest.fixture(params=[InLinen, InNnx], ids=["linen", "nnx"])
def api(request):
    return request.param()


def bottleneck(leaves, prefix, y):
    """A bottleneck by its formula, in float64."""
    down, up = (
        [np.asarray(leaves[f"{prefix}/{part}/{name}"], np.float64) for name in ("kernel", "bias")]
        for part in ("down", "up")
    )
    hidden = y @ down[0] + down[1]
    gelu = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return y + gelu @ up[0] + up[1]


@pytest.mark.slow
def test_two_of_one_class_run_one_after_the_other(api):
    adapted = api.drawn(api.adapt(Recipe(SW, NER)))
    leaves = api.leaves(adapted)
    x = np.asarray(X, np.float64)
    for i in range(2):
        y = np.maximum(x, 0) @ np.asarray(leaves[f"up_{i}/kernel"], np.float64)
        y = y + np.asarray(leaves[f"up_{i}/bias"], np.float64)
        for name in ("sw", "ner"):
            y = bottleneck(leaves, f"up_{i}/adapter_{name}", y)
        x = x + y
    np.testing.assert_allclose(api(adapted), x, rtol=2e-5, atol=2e-4)


def test_two_low_rank_changes_of_one_weight_merge(api):
    recipe = Recipe(aj.LoRA("up_*", 2, name="one"), aj.LoRA("up_1", 3, alpha=6, name="two"))
    adapted = api.drawn(api.adapt(recipe))
    leaves = api.leaves(adapted)
    x = np.asarray(X, np.float64)
    for i in range(2):
        w, b, a1, b1 = (
            np.asarray(leaves[f"up_{i}/{name}"], np.float64)
            for name in ("kernel", "bias", "lora_one/a", "lora_one/b")
        )
        w = w + a1 @ b1
        if i == 1:
            a2, b2 = (np.asarray(leaves[f"up_1/lora_two/{n}"], np.float64) for n in "ab")
            w = w + 2 * (a2 @ b2)
        x = x + np.maximum(x, 0) @ w + b
    np.testing.assert_allclose(api(adapted), x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(api.merge(adapted), x, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_frozen_adapter_is_loaded_and_the_next_one_trains(api, tmp_path):
    first = api.drawn(api.adapt(SW))
    api.save(tmp_path / "sw", first)
    frozen = api.load(tmp_path / "sw", train=False)
    np.testing.assert_array_equal(api(frozen), api(first))
    both = api.adapt(NER, on=frozen)
    counts = api.audit(both)
    own = 2 * (2 * 8 * 4 + 8 + 4), 2 * (2 * 8 * 2 + 8 + 2)
    assert (counts.frozen_adapter_parameters, counts.trainable_parameters) == own
    assert counts.adapter_parameters == sum(own)
    assert counts.frozen_parameters == own[0] + 2 * (8 * 8 + 8)
    state = api.state(both)
    assert {path.split("/")[1] for path in flatten(state.adapters)} == {"adapter_ner"}
    before = {p: np.asarray(x) for p, x in api.leaves(both).items()}
    step = aj.make_train_step(api.loss(both))
    for _ in range(2):
        state, _ = step(state, X)
    after = api.leaves(api.of(state, both))
    moved = {
        path.split("/")[1] for path in after if (np.asarray(after[path]) != before[path]).any()
    }
    assert moved == {"adapter_ner"}
    aj.save_adapter(tmp_path / "both", state)
    again = api.load(tmp_path / "both")
    np.testing.assert_array_equal(api(again), api(api.of(state, both)))
    assert [m.train for m in api.recipe(again)] == [False, True]
    thawed = api.load(tmp_path / "both", train=True)
    assert api.audit(thawed).frozen_adapter_parameters == 0


def test_groups_of_rates_over_a_frozen_adapter(api):
    """The optimiser of groups sees the trained part, without the frozen entry's leaves."""
    both = api.drawn(api.adapt(NER, on=api.drawn(api.adapt(SW))))
    recipe = Recipe(SW).frozen() + NER
    trained = unflatten({p: x for p, x in api.leaves(both).items() if recipe.trains(p)})
    tx = aj.freeze_base(optax.sgd(0.5), recipe, {"**/up/bias": optax.sgd(0.25)})
    updates, _ = tx.update(trained, tx.init(trained), trained)
    for path, update in flatten(updates).items():
        rate = 0.25 if path.endswith("up/bias") else 0.5
        np.testing.assert_allclose(update, -rate * flatten(trained)[path], rtol=1e-6)
    own = {"up_0": {"kernel": np.ones((8, 8))}}
    with raises(aj.RecipeError, "hold nothing of Bottleneck;"):  # the one that trains
        tx.init(own)


def test_an_adapter_goes_from_one_recipe_into_another_by_its_name(tmp_path):
    api = InLinen()
    both = api.drawn(api.adapt(Recipe(SW, NER)))
    ner = both[0].recipe["ner"]
    aj.save_adapter(tmp_path / "ner", aj.partition(both[1], ner)[0], ner)
    alone = api.load(tmp_path / "ner")
    other = aj.adapt(api.base, Recipe(aj.LoRA("up_0", 2)) + ner)
    params = aj.init_adapters(other, api.params, KEY, X)
    params = aj.merge_trees(
        aj.partition(params, Recipe(aj.LoRA("up_0", 2)))[0],
        aj.partition(alone[1], ner)[0],
        api.params,
    )
    np.testing.assert_array_equal(api((other, params)), api(alone))


@pytest.mark.slow
@pytest.mark.witness("linen")
def test_a_bank_of_stacked_adapters_has_each_rows_own(api, tmp_path):
    room = api.load(api.save(tmp_path / "one", api.drawn(api.adapt(Recipe(SW, NER)))), train=None)
    one, two = (api.drawn(api.adapt(Recipe(SW, NER)), seed=seed) for seed in (3, 4))
    bank = aj.Bank(*room) if isinstance(room, tuple) else aj.Bank(room)
    for name, each in (("one", one), ("two", two)):
        directory = api.save(tmp_path / name, each)
        recipe, leaves = aj.read_adapter(directory)
        bank = bank.put(name, (recipe.frozen("sw"), unflatten(leaves)))
    rows = bank.rows(["two", "one", None])
    if isinstance(room, tuple):
        y = bank.model.apply({"params": bank.params}, X, adapters=rows)
        bare = api.base.apply({"params": api.params}, X)
    else:
        y, bare = bank.model(X, adapters=rows), api.base(X)
    np.testing.assert_allclose(y[0], api(two)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[1], api(one)[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[2], bare[2], rtol=1e-5, atol=1e-5)


@pytest.mark.witness("linen")
def test_a_bank_takes_a_state_with_its_frozen_adapter(api, tmp_path):
    api.save(tmp_path / "sw", api.drawn(api.adapt(SW)))
    both = api.drawn(api.adapt(NER, on=api.load(tmp_path / "sw", train=False)))
    bank = aj.Bank(*both) if isinstance(both, tuple) else aj.Bank(both)
    bank = bank.put("ner", api.state(both))
    rows = bank.rows(["ner"] * 3)
    if isinstance(both, tuple):
        y = bank.model.apply({"params": bank.params}, X, adapters=rows)
    else:
        y = bank.model(X, adapters=rows)
    np.testing.assert_allclose(y, api(both), rtol=1e-5, atol=1e-5)


def test_json_has_a_name_and_train_where_they_say_something():
    recipe = Recipe(SW).frozen() + NER + aj.LoRA("up_0", 2)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe(aj.LoRA("a")).to_json().count("train") == 0
    assert recipe["ner"] == Recipe(NER) and recipe.frozen("ner")["ner"].methods[0].train is False
    assert recipe.owner("up_0/adapter_ner/down/kernel").method == NER
    assert recipe.keeps("up_0/adapter_sw/down/kernel")
    assert not recipe.trains("up_0/adapter_sw/down/kernel")
    assert recipe.owner("up_0/adapter/down/kernel") is None


def test_what_a_frozen_entry_cannot_be(api, tmp_path):
    with raises(aj.RecipeError, "train=False", "'sw'", "load_adapter"):
        api.adapt(Recipe(SW).frozen())
    loaded = api.load(api.save(tmp_path / "sw", api.drawn(api.adapt(SW))), train=False)
    with raises(aj.RecipeError, "every entry", "train=True"):
        api.state(loaded)
    with raises(aj.UserError, "train='no'", "True or False"):
        api.load(tmp_path / "sw", train="no")
    with raises(aj.RecipeError, "two methods", "name='first'"):
        api.adapt(Recipe(aj.Bottleneck("up_*", 4), aj.Bottleneck("up_*", 2)))


def test_bad_names():
    for name in ("a/b", "ä", "x" * 65, 3, None, "a b"):
        with raises(aj.UserError, "name=", "letters"):
            aj.LoRA("a", name=name)
    with raises(aj.UserError, "train=1"):
        aj.LoRA("a", train=1)
    for fields in ({"name": "a"}, {"train": False}):
        with raises(aj.UserError, "Unfreeze", "leave both out"):
            aj.Unfreeze("a", **fields)
    with raises(aj.RecipeError, "'es'", "sw, ner"):
        Recipe(SW, NER)["es"]
    with raises(aj.RecipeError, "'es'", "name="):
        Recipe(aj.LoRA("a")).frozen("es")


def test_linen_init_and_files_want_the_frozen_leaves(tmp_path):
    api = InLinen()
    with raises(aj.RecipeError, "init", "frozen"):
        aj.adapt(api.base, Recipe(SW).frozen()).init(KEY, X)
    loaded = api.load(api.save(tmp_path / "sw", api.drawn(api.adapt(SW))), train=False)
    model, params = api.adapt(NER, on=loaded)
    with raises(aj.UserError, "those of 'sw'", "adapters_of"):
        api.save(tmp_path / "part", (model, params))
    wrong = {**params, "up_0": {**params["up_0"], "adapter_sw": params["up_0"]["adapter_ner"]}}
    with raises(aj.MismatchError, "frozen adapters", "up_0/adapter_sw/down/kernel"):
        aj.init_adapters(model, wrong, KEY, X)


def test_quantising_leaves_frozen_adapters_in_floats(tmp_path):
    api = InNnx()
    loaded = api.load(api.save(tmp_path / "sw", api.drawn(api.adapt(SW))), train=False)
    small = aj.quantize(loaded, None, X, dtype="int8")
    kinds = {
        path: type(x) for path, x in flatten(nnx.state(small, aj.nnx.FrozenAdapterParam)).items()
    }
    assert kinds and all(issubclass(kind, jax.Array) for kind in kinds.values())
    np.testing.assert_allclose(api(small), api(loaded), rtol=0.1, atol=0.5)


def factors(rank, seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(12, rank)), "b": rng.normal(size=(rank, 9))}


def test_what_holds_one_adapter_for_a_weight_refuses_two(tmp_path):
    recipe = Recipe(aj.LoRA("q", 2, name="one"), aj.LoRA("q", 3, name="two"))
    tree = {"q": {"lora_one": factors(2, 0), "lora_two": factors(3, 1)}}
    base = {"q": {"kernel": np.ones((12, 9))}}
    said = ("q/kernel", "'one' and 'two'", "recipe['...']")
    with raises(aj.UserError, *said):
        save_peft(tmp_path / "both", recipe, tree, {"q_proj": "q"}, base)
    like = {"q": {"kernel_lora_a": np.zeros((12, 3)), "kernel_lora_b": np.zeros((3, 9))}}
    with raises(aj.RecipeError, *said):
        aj.to_jax_lora((recipe, aj.merge_trees(tree, base)), like, alpha=3)
    one = aj.partition(tree, recipe["one"])[0]
    saved = save_peft(tmp_path / "one", recipe["one"], one, {"q_proj": "q"}, base)
    _, read = load_peft(saved, {"q_proj": "q"}, base)
    np.testing.assert_array_equal(read["q"]["lora"]["b"], np.float32(tree["q"]["lora_one"]["b"]))
    scales = Recipe(aj.IA3("q", name="one"), aj.IA3("q", name="two"))
    two = {"q": {f"ia3_{name}": {"scale": np.ones(9)} for name in ("one", "two")}}
    with raises(aj.UserError, "'one' and 'two'"):
        save_peft(tmp_path / "scales", scales, two, {"q_proj": "q"}, base)


@pytest.mark.parametrize("how", [{}, {"how": "svd", "rank": 9}], ids=["linear", "svd"])
def test_combining_sums_all_that_a_recipe_has_at_a_weight(how):
    recipe = Recipe(aj.LoRA("q", 2, name="one"), aj.LoRA("q", 3, alpha=6, name="two"))
    one, two = factors(2, 0), factors(3, 1)
    base = {"q": {"kernel": np.zeros((12, 9), np.float32)}}
    adapter = recipe, {"q": {"lora_one": one, "lora_two": two}}
    alone = aj.LoRA("q", 3), {"q": {"lora": two}}
    made = aj.combine(base, [adapter, alone], [0.5, -1.0], **how)
    a, b = (np.asarray(x, np.float64) for x in flatten(made.adapters).values())
    first = one["a"] @ one["b"] + 2 * (two["a"] @ two["b"])
    expected = 0.5 * first - two["a"] @ two["b"]
    assert list(flatten(made.adapters)) == ["q/lora/a", "q/lora/b"]
    np.testing.assert_allclose(a @ b, expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_adapter_is_loaded_again_in_its_place(tmp_path):
    api = InLinen()
    first, other = (api.drawn(api.adapt(SW), seed=seed) for seed in (3, 4))
    _, params = api.load(api.save(tmp_path / "first", first), train=False)
    api.save(tmp_path / "other", other)
    again = aj.load_adapter(tmp_path / "other", api.base, params, X, train=False)
    np.testing.assert_array_equal(api(again), api(other))


@pytest.mark.slow
def test_lora_plus_of_the_command_line_finds_named_factors():
    recipe = Recipe(aj.LoRA("q", 2, name="one"), aj.DoRA("k", 2))
    params = {"q": {"lora_one": factors(2, 0)}, "k": {"lora": factors(2, 1)}}
    params["k"]["lora"]["magnitude"] = np.ones(9)
    options = OptimizerOptions(learning_rate=1e-2, lora_plus=4.0, weight_decay=0.0, warmup=0.0)
    tx = options.make(10, recipe)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    for owner, slot in (("q", "lora_one"), ("k", "lora")):
        a, b = (float(jnp.abs(updates[owner][slot][name]).max()) for name in "ab")
        assert b == pytest.approx(4 * a, rel=1e-3)


def test_one_entry_of_a_file_is_loaded_by_its_name(api, tmp_path):
    both = api.drawn(api.adapt(Recipe(SW, NER)))
    saved = api.save(tmp_path / "both", both)
    loaded = api.load(saved, only="ner", train=False)
    assert api.recipe(loaded) == Recipe(NER).frozen()
    own = {path: x for path, x in api.leaves(both).items() if "adapter_sw" not in path}
    found = api.leaves(loaded)
    assert found.keys() == own.keys()
    for path, x in own.items():
        np.testing.assert_array_equal(found[path], x)
    with raises(aj.AdapterFileError, str(tmp_path / "both"), "cola"):
        api.load(saved, only="cola")


@pytest.mark.slow
def test_a_text_of_a_method_has_its_name():
    assert str(NER) == "Bottleneck(targets=('up_*',), name='ner', bottleneck_dim=2)"
    assert str(aj.LoRA("a")) == "LoRA(targets=('a',))"
