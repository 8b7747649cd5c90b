"""Placements: found once by a run, kept by models and files, and read by everybody else."""

import contextlib
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from test_old_files import CASES, RECIPES, TOKENS, filled, linen_base, nnx_base

import adapters_jax as aj
from adapters_jax.linen import adapted, points, starting
from adapters_jax.nnx import points as nnx_points
from adapters_jax.nnx.adapted import placements_of
from adapters_jax.placement import Known, in_tree
from adapters_jax.trees import flatten

CONFIG = "adapter_config.json"


def shapes_of(tree):
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def made(api, name):
    """An adapted model with numbers, its placements, and all shapes."""
    if api == "linen":
        base, frozen = linen_base()
        model = aj.adapt(base, RECIPES[name])
        params = aj.init_adapters(model, frozen, jax.random.key(0), TOKENS)
        trained, rest = aj.partition(params, RECIPES[name])
        params = aj.merge_trees(filled(trained), rest)
        return (model, params), model.adapter_placements.placements, shapes_of(params)
    model = aj.adapt(nnx_base(), RECIPES[name], rngs=nnx.Rngs(0), example_inputs=(TOKENS,))
    nnx.update(model, filled(nnx.to_pure_dict(nnx.state(model, aj.nnx.AdapterParam))))
    return model, placements_of(model), shapes_of(nnx.state(model, nnx.Param))


@contextlib.contextmanager
def no_runs():
    """In its body, no model runs to find where adapters attach."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model ran")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted, "points_of", refuse)
        patch.setattr(starting, "points_of", refuse)
        patch.setattr(nnx_points, "_traced", refuse)
        patch.setattr(nnx_points, "known_reads", refuse)
        yield


@pytest.mark.witness(
    "linen-lora", "linen-bottleneck", "linen-prompts", "linen-ia3", "nnx-lora", "nnx-prefix"
)
@pytest.mark.parametrize(("api", "name"), CASES)
def test_a_run_finds_what_a_tree_says_and_more(api, name):
    _, placements, shapes = made(api, name)
    assert placements and all(each.reaches for each in placements)
    assert placements.fit(RECIPES[name], shapes)
    assert not placements.differences(in_tree(RECIPES[name], shapes))
    for each in placements:
        assert (each.axes is not None) == (each.method.acts_on == "weight")
        assert (each.attention is not None) == (each.method.acts_on == "attention")
        assert (each.width > 0) == (each.method.acts_on == "output")
        assert each.with_arrays() == each
        assert each.count.parameters == sum(
            int(np.prod(shapes[path])) for path in each.paths().values()
        )


@pytest.mark.slow
@pytest.mark.witness("linen-lora", "nnx-bottleneck")
@pytest.mark.parametrize(("api", "name"), CASES)
def test_loading_onto_the_same_base_runs_no_model(tmp_path, api, name):
    subject, placements, _ = made(api, name)
    if api == "linen":
        model, params = subject
        expected = model.apply({"params": params}, TOKENS)
        subject = aj.TrainState.create(model, params, tx=adam(), key=jax.random.key(0))
    else:
        expected = subject(TOKENS)
    saved = aj.save_adapter(tmp_path / "a", subject)
    rows = json.loads((saved / CONFIG).read_text())["placements"]
    assert [row["path"] for row in rows] == [each.path for each in placements]
    if api == "linen":
        with no_runs():
            loaded, params = aj.load_adapter(saved, *linen_base())
        found, y = loaded.adapter_placements.placements, loaded.apply({"params": params}, TOKENS)
    else:
        with no_runs():
            loaded = aj.load_adapter(saved, nnx_base())
        found, y = placements_of(loaded), loaded(TOKENS)
    assert found == placements
    np.testing.assert_allclose(y, expected, atol=1e-5)


def adam():
    return optax.adam(1e-3)


def edited(directory, edit):
    """Edits the first placement in a manifest."""
    values = json.loads((directory / CONFIG).read_text())
    edit(values["placements"][0])
    (directory / CONFIG).write_text(json.dumps(values))


@pytest.mark.witness(
    "False-<lambda>-data0",
    "False-<lambda>-data1",
    "False-<lambda>-data2",
    "False-<lambda>-data3",
    "False-<lambda>-data4",
    "False-<lambda>-data5",
    "False-<lambda>-data6",
    "False-<lambda>-data7",
    "False-<lambda>-data8",
    "False-<lambda>-data9",
    "False-<lambda>-data10",
    "False-<lambda>-data11",
    "False-<lambda>-data12",
    "False-<lambda>-data13",
)
@pytest.mark.parametrize(
    ("edit", "data"),
    [
        (lambda row: row.update(path="square"), ["square/lora"]),
        (lambda row: row.update(shape=[5, 6]), ["kernel of (5, 6)", "(6, 6)"]),
        (lambda row: row.update(weight="other"), ["other of (6, 6)", "kernel of (6, 6)"]),
        (lambda row: row.update(inputs=[1], outputs=[0]), ["1>0", "0>1"]),
        (lambda row: row.update(node="up"), ["out/lora/up"]),
        (lambda row: row.update(method=3), ["method=3"]),
        (lambda row: row.update(inputs=[0, 1]), ["[0, 1, 1]"]),
        (lambda row: row.update(shape=["x"]), ["shape=['x']"]),
        (lambda row: row.update(path="../x"), ["'../x'"]),
        (lambda row: row.pop("path"), ["'path' is missing"]),
        (lambda row: row.update(depth=1), ["'depth'"]),
        (lambda row: row.update(lookup=1), ["lookup=1"]),
        (lambda row: row.update(width=-1), ["width=-1"]),
        (lambda row: row.update(attention=[1]), ["attention=[1]"]),
    ],
)
@pytest.mark.parametrize("same_base", [True, False])
def test_placements_that_do_not_fit_are_named(tmp_path, edit, data, same_base):
    base, frozen = linen_base()
    model = aj.adapt(base, aj.LoRA("out", 2))
    params = aj.init_adapters(model, frozen, jax.random.key(0), TOKENS)
    state = aj.TrainState.create(model, params, tx=adam(), key=jax.random.key(0))
    saved = aj.save_adapter(tmp_path / "a", state)
    edited(saved, edit)
    if not same_base:
        values = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps({**values, "base": None}))
    with pytest.raises(aj.AdapterFileError) as caught:
        aj.load_adapter(saved, base, frozen, TOKENS)
    missing = [datum for datum in [*data, CONFIG] if datum not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"


def test_a_base_without_the_module_is_named(tmp_path):
    saved = aj.save_adapter(tmp_path / "a", made("nnx", "lora")[0])
    with raises(aj.OtherBaseError, "another base"):
        aj.load_adapter(saved, nnx.Linear(6, 6, rngs=nnx.Rngs(0)))
    with pytest.raises(aj.AdapterFileError, match="does not fit"):
        aj.load_adapter(saved, nnx.Dict(out=nnx.Linear(6, 6, rngs=nnx.Rngs(0))), any_base=True)


def test_what_is_known_of_other_shapes_is_not_used():
    base, x = nn.Dense(3), jnp.ones((1, 4))
    model = aj.adapt(base, aj.LoRA("**", 2))
    narrow = aj.init_adapters(model, base.init(jax.random.key(0), x)["params"], KEY, x)
    wide = jax.tree.map(lambda leaf: leaf, narrow)
    assert model.placements_in(wide) is model.adapter_placements.placements
    params = base.init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    other = aj.init_adapters(aj.adapt(base, aj.LoRA("**", 2)), params, KEY, jnp.ones((1, 5)))
    assert model.placements_in(other)[0].shape == (5, 3)
    assert Known(model.placements_in(other)).of(model.recipe, shapes_of(narrow))[0].shape == (4, 3)


KEY = jax.random.key(1)


def test_a_model_that_knows_more_is_not_another_one():
    one, two = (aj.adapt(nn.Dense(3), aj.LoRA("**", 2)) for _ in range(2))
    one.init(jax.random.key(0), jnp.ones((1, 4)))
    assert one.adapter_placements.placements and two.adapter_placements.placements is None
    assert one == two and hash(one) == hash(two)
    assert one.clone().adapter_placements is one.adapter_placements


def test_differences_are_of_the_first_kind_that_differs():
    placements = points(aj.adapt(nn.Dense(3), aj.LoRA("**", 2)), jnp.ones((1, 4)))[0]
    (placed,) = placements
    other = type(placements)([replace(placed, method=aj.LoRA("**", 3))])
    (problem,) = placements.differences(other)
    assert "LoRA" in problem
    assert placements.differences(type(placements)()) == ["lora is not here"]
    assert type(placements)().differences(placements) == ["lora is only here"]


class TwoWeights(nnx.Module):
    """Two raw weights with the names of LoRA's factors."""

    def __init__(self):
        self.a, self.b = nnx.Param(jnp.ones((4, 6))), nnx.Param(jnp.ones((6, 4)))

    def __call__(self, x):
        return x @ self.a[...] @ self.b[...]


class LinenTwoWeights(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = (
            self.param("a", nn.initializers.ones, (4, 6)),
            self.param("b", nn.initializers.ones, (6, 4)),
        )
        return x @ a @ b


class LoraBeside(nnx.Module):
    """A submodule with the name of LoRA's slot, beside another."""

    def __init__(self):
        self.lora = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.other = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.other(self.lora(x))


class LinenLoraBeside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="other")(nn.Dense(4, name="lora")(x))


@pytest.mark.parametrize("model", [TwoWeights, LinenTwoWeights, LoraBeside, LinenLoraBeside])
def test_names_of_the_base_that_are_those_of_a_method(tmp_path, model):
    x, recipe, base = jnp.arange(8.0).reshape(2, 4) / 8, aj.LoRA("**", 2), model()
    if isinstance(base, nnx.Module):
        adapted = aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=(x,))
        nnx.update(adapted, filled(nnx.to_pure_dict(nnx.state(adapted, aj.nnx.AdapterParam))))
        audit, trained = aj.audit(adapted), nnx.state(adapted, aj.nnx.AdapterParam)
        run, merged = lambda: adapted(x), aj.merge(adapted)(x)
        saved = aj.save_adapter(tmp_path / "a", adapted)
        loaded = aj.load_adapter(saved, base, example_inputs=(x,))(x)
    else:
        frozen = base.init(jax.random.key(0), x)["params"]
        adapted = aj.adapt(base, recipe)
        params = aj.init_adapters(adapted, frozen, jax.random.key(0), x)
        trained, rest = aj.partition(params, recipe)
        trained = filled(trained)
        params = aj.merge_trees(trained, rest)
        audit, run = aj.audit(adapted, params), lambda: adapted.apply({"params": params}, x)
        merged = base.apply({"params": aj.merge(adapted, params, x)}, x)
        saved = aj.save_adapter(tmp_path / "a", trained, recipe)
        again, params = aj.load_adapter(saved, base, frozen, x)
        loaded = again.apply({"params": params}, x)
    weights = {TwoWeights: 2 * 2 * (4 + 6), LinenTwoWeights: 2 * 2 * (4 + 6)}.get(model, 2 * 2 * 8)
    assert audit.adapter_parameters == weights == sum(x.size for x in jax.tree.leaves(trained))
    np.testing.assert_allclose(run(), merged, rtol=1e-5)
    np.testing.assert_allclose(run(), loaded, rtol=1e-6)


def test_lora_plus_finds_every_b():
    base, frozen = linen_base()
    recipe = aj.Recipe(aj.LoRA(("experts", "square", "out"), 2))
    model = aj.adapt(base, recipe)
    params = aj.init_adapters(model, frozen, jax.random.key(0), TOKENS)
    trained, _ = aj.partition(params, recipe)
    tx = aj.lora_plus(optax.sgd, 1.0, recipe, ratio=4.0)
    ones = jax.tree.map(jnp.ones_like, trained)
    updates = flatten(tx.update(ones, tx.init(trained), trained)[0])
    rates = {path: float(-leaf.ravel()[0]) for path, leaf in updates.items()}
    assert rates == {path: 4.0 if path.endswith("/b") else 1.0 for path in flatten(trained)}
    assert any("/lora/up/b" in path for path in rates) and any(":" in path for path in rates)


def test_a_bank_of_bottlenecks_without_a_scale_is_refused():
    x = jnp.ones((2, 4))
    base = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    idle = aj.Bottleneck("**", 2, scale=0.0)
    bank = aj.Bank(aj.adapt(base, idle, rngs=nnx.Rngs(0), example_inputs=(x,)))
    other = aj.adapt(base, aj.Bottleneck("**", 2), rngs=nnx.Rngs(0), example_inputs=(x,))
    with raises(aj.RecipeError, "scale=0.0", "Bottleneck"):
        bank.put("one", (other.adapter_recipe, nnx.state(other, aj.nnx.AdapterParam)))


class AroundAdapted(nn.Module):
    """A model with an adapted model inside."""

    inside: aj.Method

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(aj.adapt(nn.Dense(4), self.inside)(x))


@pytest.mark.slow
@pytest.mark.witness("inside0-method0", "inside2-method2")
@pytest.mark.parametrize(
    ("inside", "method"),
    [
        (aj.DoRA("**", 2), aj.IA3("*")),
        (aj.IA3("**"), aj.LoRA("*", 2)),
        (aj.IA3("**"), aj.DoRA("Dense_0", 2)),
    ],
)
def test_an_adapted_model_inside_another_is_adapted_again(inside, method):
    base, x = AroundAdapted(inside), jnp.arange(8.0).reshape(2, 4) / 8
    frozen = filled(jax.eval_shape(base.init, KEY, x)["params"])
    model = aj.adapt(base, method)
    params = aj.init_adapters(model, frozen, KEY, x)
    trained, rest = aj.partition(params, method)
    params = aj.merge_trees(filled(trained), rest)
    assert "Dense_0" in trained
    y = model.apply({"params": params}, x)
    merged = aj.merge(model, params, x)
    np.testing.assert_allclose(y, base.apply({"params": merged}, x), rtol=1e-5)
    assert abs(y - base.apply({"params": frozen}, x)).max() > 0.05
    gradient = jax.grad(lambda p: jnp.sum(model.apply({"params": aj.merge_trees(p, rest)}, x)))
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient(filled(trained))))


@pytest.mark.slow
def test_loading_onto_an_adapted_nnx_model_adds_the_file_alone(tmp_path):
    first = aj.adapt(nnx_base(), aj.LoRA("square", 2), rngs=nnx.Rngs(0), example_inputs=(TOKENS,))
    saved = aj.save_adapter(tmp_path / "a", made("nnx", "bottleneck")[0])
    loaded = aj.load_adapter(saved, first, example_inputs=(TOKENS,), any_base=True)
    kinds = [type(each.method).__name__ for each in placements_of(loaded)]
    assert kinds == ["LoRA", "Bottleneck", "Bottleneck"]
