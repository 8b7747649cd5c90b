"""Sums of adapters: of products, exact where they can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.trees import flatten

IN, OUT = 6, 5
X = drawn((3, IN))
BASE = {"query": {"kernel": drawn((IN, OUT), 1)}, "value": {"kernel": drawn((IN, OUT), 2)}}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return [nn.Dense(OUT, use_bias=False, name=name)(x) for name in ("query", "value")]


def adapter(recipe, seed, base=BASE):
    """A recipe and its factors, none of them zero."""
    recipe = aj.Recipe(recipe)
    model = aj.adapt(Net(), recipe)
    shapes = jax.eval_shape(lambda: aj.init_adapters(model, base, jax.random.key(0), X))
    rng = np.random.default_rng(seed)
    trained, _ = aj.partition(shapes, recipe)
    return recipe, jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), trained)


ONE = adapter(aj.LoRA("*", 2, 6.0), 3)
TWO = adapter(aj.LoRA("query", 3, 2.0, rank_stabilized=True), 4)


def change(adapter, name):
    """scale * A B in float64; zero where the adapter is not."""
    (method,), tree = adapter
    if name not in tree:
        return np.zeros((IN, OUT))
    factors = tree[name]["lora"]
    return method.scale_at(name) * double(factors["a"]) @ double(factors["b"])


def changes(combined):
    """The same of a result, by merging it into a base of zeros."""
    model = aj.adapt(Net(), combined.recipe)
    zeros = jax.tree.map(np.zeros_like, BASE)
    merged = aj.merge(model, aj.merge_trees(zeros, combined.adapters), X)
    return {name: double(merged[name]["kernel"]) for name in BASE}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0), (0.0, 1.0)])
def test_linear_is_the_sum_of_products(weights):
    combined = aj.combine(BASE, [ONE, TWO], weights)
    for name, got in changes(combined).items():
        expected = weights[0] * change(ONE, name) + weights[1] * change(TWO, name)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert combined.error == 0.0
    (method,) = combined.recipe
    assert (method.rank_at("query"), method.rank_at("value")) == (5, 2)
    assert method.scale_at("query") == method.scale_at("value") == 1.0


def test_svd_is_the_nearest_of_its_rank_and_its_error_is_returned():
    combined = aj.combine(BASE, [ONE, TWO], [1.0, 0.5], how="svd", rank=2)
    lost = whole = 0.0
    for name, got in changes(combined).items():
        expected = change(ONE, name) + 0.5 * change(TWO, name)
        u, s, v = np.linalg.svd(expected)
        np.testing.assert_allclose(got, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
        lost, whole = lost + np.sum(s[2:] ** 2), whole + np.sum(s**2)
    assert combined.error == pytest.approx(np.sqrt(lost / whole), rel=1e-4)
    assert aj.combine(BASE, [ONE, TWO], [1.0, 0.5], how="svd", rank=5).error < 1e-5


def test_ties_by_hand():
    weights, density = (1.0, -0.5), 0.4
    combined = aj.combine(BASE, [ONE, TWO], weights, how="ties", rank=OUT, density=density)
    expected = np.zeros((IN, OUT))
    parts = []
    for adapter, weight in zip((ONE, TWO), weights, strict=True):
        delta = change(adapter, "query")
        least = sorted(np.abs(delta).ravel())[-round(density * delta.size)]
        parts.append(weight * np.where(np.abs(delta) >= least, delta, 0.0))
    for i in range(IN):
        for j in range(OUT):
            sign = np.sign(sum(p[i, j] for p in parts))
            agreeing = [p[i, j] for p in parts if p[i, j] != 0 and np.sign(p[i, j]) == sign]
            expected[i, j] = np.mean(agreeing) if agreeing else 0.0
    np.testing.assert_allclose(changes(combined)["query"], expected, atol=1e-5)


def test_all_entries_kept_is_the_sum_and_a_key_is_for_dare_alone():
    key = jax.random.key(0)
    run = functools.partial(aj.combine, BASE, [ONE, TWO], [1.0, 0.5], rank=OUT)
    expected = changes(run(how="svd"))
    for options in ({"how": "dare", "density": 1.0}, {"how": "svd"}):
        found = changes(run(key=key, **options))
        for name, change_of_weight in expected.items():
            np.testing.assert_allclose(found[name], change_of_weight, atol=1e-5)


def test_dare_keeps_a_part_and_its_mean():
    means, key = [], jax.random.key(0)
    for i in range(40):
        own = jax.random.fold_in(key, i)
        combined = aj.combine(BASE, [ONE], [2.0], how="dare", rank=OUT, density=0.5, key=own)
        got, expected = changes(combined)["query"], 2.0 * change(ONE, "query")
        kept = np.abs(got) > 1e-4
        np.testing.assert_allclose(got[kept], 2.0 * expected[kept], rtol=1e-2, atol=1e-4)
        means.append(kept.mean())
    assert 0.45 < np.mean(means) < 0.55


@pytest.mark.slow
def test_layers_in_a_stack_are_summed_each_by_itself():
    """As many layers as the rank, so that shapes alone could not tell them from it."""
    layers, rank = 2, 2
    base = {"query": {"kernel": drawn((layers, IN, OUT))}}
    recipe = aj.Recipe(aj.LoRA("query", rank, 4.0))
    factors = [(drawn((layers, IN, rank), s), drawn((layers, rank, OUT), s + 1)) for s in (5, 7)]
    trees = [(recipe, {"query": {"lora": {"a": a, "b": b}}}) for a, b in factors]
    expected = sum(2.0 * double(a) @ double(b) for a, b in factors)
    for how, r in (("linear", None), ("svd", 4)):
        combined = aj.combine(base, trees, [1, 1], how=how, rank=r)
        assert combined.recipe == aj.Recipe(aj.LoRA("query", 4))
        got = combined.adapters["query"]["lora"]
        np.testing.assert_allclose(double(got["a"]) @ double(got["b"]), expected, atol=1e-4)
    ties = aj.combine(base, trees, [1, 1], how="ties", rank=5, density=0.5)
    single = [
        aj.combine(
            {"query": {"kernel": base["query"]["kernel"][i]}},
            [(recipe, jax.tree.map(lambda x, i=i: x[i], tree)) for _, tree in trees],
            [1, 1],
            how="ties",
            rank=5,
            density=0.5,
        )
        for i in range(layers)
    ]
    for i, one in enumerate(single):
        a, b = (ties.adapters["query"]["lora"][n][i] for n in "ab")
        mine = one.adapters["query"]["lora"]
        np.testing.assert_allclose(a @ b, mine["a"] @ mine["b"], atol=1e-4)


@pytest.mark.slow
def test_an_nnx_model_and_directories_do(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            self.query = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
            self.heads = nnx.LinearGeneral(IN, (2, 3), rngs=nnx.Rngs(0))

    recipe = aj.Recipe(aj.LoRA("*", 2, 6.0))
    saved = []
    for seed in (1, 2):
        model = aj.adapt(Model(), recipe, rngs=nnx.Rngs(seed))
        state = jax.tree.map(lambda x: x + 0.1, nnx.state(model, aj.nnx.AdapterParam))
        saved.append(aj.save_adapter(tmp_path / str(seed), state, recipe))
    combined = aj.combine(Model(), [aj.read_adapter(d) for d in saved], [0.5, 0.25])
    both = aj.save_adapter(tmp_path / "both", combined.adapters, combined.recipe)
    merged = [aj.merge(aj.load_adapter(directory, Model())) for directory in (*saved, both)]
    base = Model()
    for name in ("query", "heads"):
        one, two, both = (
            double(getattr(m, name).kernel[...]) - double(getattr(base, name).kernel[...])
            for m in merged
        )
        np.testing.assert_allclose(both, 0.5 * one + 0.25 * two, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        ({"weights": [1.0]}, "2 1"),
        ({"weights": [1.0, float("nan")]}, "weight=nan"),
        ({"how": "sum"}, "how='sum' linear svd ties dare"),
        ({"how": "svd"}, "how='svd' rank"),
        ({"rank": 2}, "how='linear' rank"),
        ({"how": "svd", "rank": 0}, "rank=0"),
        ({"how": "svd", "rank": 6}, "6 5"),
        ({"how": "ties", "rank": 2, "density": 0.0}, "density=0.0"),
        ({"how": "ties", "rank": 2, "density": 1.5}, "density=1.5"),
        ({"how": "dare", "rank": 2}, "key=jax.random.key"),
        ({"base": {"other": {"kernel": np.ones((2, 2))}}}, "'query'"),
        ({"adapters": [adapter(aj.DoRA("*", 2), 1), ONE]}, "DoRA 'query'"),
        ({"adapters": [adapter(aj.Unfreeze("*/kernel"), 1), ONE]}, "query/kernel"),
        ({"adapters": [adapter(aj.Bottleneck("query", 2), 1), ONE]}, "Bottleneck 'query'"),
    ],
)
def test_bad_input(arguments, data):
    plain = {"base": BASE, "adapters": [ONE, TWO], "weights": [1.0, 1.0]} | arguments
    with raises(aj.UserError, *data.split()):
        aj.combine(**plain)


@pytest.mark.parametrize("other", ["ab", (ONE[0], ONE[1], 1.0), [*ONE]])
def test_an_adapter_is_a_recipe_and_a_tree(other):
    with raises(TypeError, "combine: ", "aj.read_adapter"):
        aj.combine(BASE, [ONE, other], [1.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerging_returns_a_bound_of_its_error(dtype):
    base = jax.tree.map(lambda x: jnp.asarray(x, dtype), BASE)
    recipe, adapters = ONE
    model = aj.adapt(Net(), recipe)
    merged = aj.merge(model, aj.merge_trees(adapters, base), X)
    back, error = aj.unmerge(model, aj.merge_trees(adapters, merged), X)
    off = max(np.abs(double(a) - double(b)).max() for a, b in _pairs(back, base))
    assert 0 < off <= error < 8 * off
    assert {x.dtype for x in jax.tree.leaves(back)} == {np.dtype(dtype)}
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in _pairs(back, base))


def _pairs(one, other):
    one, other = flatten(one), flatten(other)
    return [(one[path], other[path]) for path in other]


def test_unmerging_dora_is_refused():
    recipe, adapters = adapter(aj.DoRA("*", 2), 1)
    model = aj.adapt(Net(), recipe)
    with raises(aj.RecipeError, "DoRA", "'query'"):
        aj.unmerge(model, aj.merge_trees(adapters, BASE), X)


def test_switching_by_merging_with_the_kept_base_is_exact():
    recipe, adapters = ONE
    model = aj.adapt(Net(), recipe)
    first = aj.merge(model, aj.merge_trees(adapters, BASE), X)
    other = aj.adapt(Net(), TWO[0])
    aj.merge(other, aj.merge_trees(TWO[1], BASE), X)
    again = aj.merge(model, aj.merge_trees(adapters, BASE), X)
    for a, b in _pairs(first, again):
        np.testing.assert_array_equal(a, b)


class Gate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False, name="gate")(x)


@pytest.mark.slow
def test_a_sum_of_ranks_above_the_sizes_of_a_layer_is_exact():
    base = {"gate": {"kernel": np.zeros((IN, 1), np.float32)}}
    tree = {"gate": {"lora": {"a": drawn((IN, 1), 1), "b": drawn((1, 1), 2)}}}
    one = aj.Recipe(aj.LoRA("gate", 1)), tree
    combined = aj.combine(base, [one, one], [1.0, 2.0])
    model = aj.adapt(Gate(), combined.recipe)
    merged = aj.merge(model, aj.merge_trees(base, combined.adapters), np.ones((1, IN)))
    expected = 3 * double(tree["gate"]["lora"]["a"]) @ double(tree["gate"]["lora"]["b"])
    np.testing.assert_allclose(merged["gate"]["kernel"], expected, atol=1e-6)
