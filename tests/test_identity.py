"""The identity of a base: equal for every form of it, different for another base."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.errors import raises
from helpers.hostile import RECIPES, NnxNet, X, linen_base, nnx_base, save

import adapters_jax as aj
from adapters_jax.errors import AdapterMismatchError
from adapters_jax.files.manifest import CONFIG, Manifest

TINY = aj.base_identity(linen_base()[1])


def with_head(recipe):
    return recipe + aj.Unfreeze(("out/**", "scale"))


@pytest.mark.witness("linen-bottleneck", "linen-lora", "linen-unfreeze", "nnx-llama", "nnx-dora")
@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_adapted_trained_and_abstract_bases_have_one_identity(api, method):
    recipe = with_head(RECIPES[method])
    tx, key = optax.sgd(1.0), jax.random.key(0)
    if api == "linen":
        model, params = linen_base()
        adapted = aj.adapt(model, recipe)
        whole = aj.init_adapters(adapted, params, key, X)
        state = aj.TrainState.create(adapted, whole, tx=tx, key=key)
        shapes = jax.eval_shape(lambda: whole)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        found = [aj.base_identity(tree, recipe) for tree in (whole, shapes, state.params)]
        found += [aj.base_identity(tree) for tree in (params, half)]
    else:
        model = nnx_base()
        adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(X,))
        state = aj.TrainState.create(adapted, tx=tx, key=key)
        abstract = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
        found = [aj.base_identity(model) for model in (model, adapted, abstract, state.model)]
        found.append(aj.base_identity(nnx.state(model, nnx.Param)))
    assert set(found) == {TINY}


def changed(tree, **leaves):
    return {**tree, **leaves}


@pytest.mark.parametrize(
    "other",
    [
        lambda tree: changed(tree, scale=np.ones(5)),
        lambda tree: changed(tree, more=np.ones(1)),
        lambda tree: {key: leaf for key, leaf in tree.items() if key != "scale"},
        lambda tree: {("Scale" if key == "scale" else key): leaf for key, leaf in tree.items()},
        lambda tree: changed(tree, out=changed(tree["out"], kernel=np.ones((2, 8)))),
    ],
)
def test_another_tree_has_another_identity(other):
    assert aj.base_identity(other(linen_base()[1])) != TINY


def test_a_configuration_is_known_whatever_its_order():
    one, two = ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1})
    same = [aj.base_identity(config=config).config_sha256 for config in (one, two)]
    assert same[0] == same[1] != aj.base_identity(config={"a": 1, "b": [2, 1]}).config_sha256
    assert aj.base_identity() == aj.BaseIdentity()
    with raises(TypeError, "JSON"):
        aj.base_identity(config={"a": X})


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_train_state_is_saved_with_the_identity_of_its_base(tmp_path, api):
    recipe, key = with_head(RECIPES["lora"]), jax.random.key(0)
    if api == "linen":
        model, params = linen_base()
        model = aj.adapt(model, recipe)
        state = aj.TrainState.create(
            model, aj.init_adapters(model, params, key, X), tx=optax.sgd(1.0), key=key
        )
    else:
        model = aj.adapt(nnx_base(), recipe, rngs=nnx.Rngs(0))
        state = aj.TrainState.create(model, tx=optax.sgd(1.0), key=key)
    saved = aj.save_adapter(tmp_path / "a", state)
    assert Manifest.read(saved / CONFIG).base == TINY
    named = aj.base_identity(id="tiny", config={"d": 4})
    saved = aj.save_adapter(tmp_path / "a", state, base=named)
    expected = aj.BaseIdentity("tiny", named.config_sha256, TINY.tree_sha256)
    assert Manifest.read(saved / CONFIG).base == expected
    other = aj.base_identity({"a": X})
    with raises(aj.UserError, "save_adapter", other.tree_sha256):
        aj.save_adapter(tmp_path / "a", state, base=other)
    with raises(aj.UserError, "base=", "no hash"):
        aj.save_adapter(tmp_path / "a", state, base=aj.BaseIdentity("x", "no hash"))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_another_base_is_refused_unless_asked(tmp_path, api):
    directory = save(tmp_path, api, "lora")
    model = nnx_base()
    model.more = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    ours = aj.base_identity(model).tree_sha256
    with raises(aj.OtherBaseError, directory, TINY.tree_sha256, ours, "any_base=True") as error:
        aj.load_adapter(directory, model, None, X)
    assert isinstance(error.value, aj.AdapterFileError)
    loaded = aj.load_adapter(directory, model, None, X, any_base=True)
    assert loaded.attention.query.lora["a"].shape == (4, 2)
    linen, params = linen_base()
    with raises(aj.OtherBaseError, directory):
        aj.load_adapter(directory, linen, {**params, "more": params["out"]}, X)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_an_identity_that_the_caller_gives_is_compared(tmp_path, api):
    directory = save(tmp_path, api, "lora")
    base = linen_base() if api == "linen" else (nnx_base(), None)
    for given in (
        aj.base_identity(id="tiny"),
        aj.base_identity(id="tiny", config={"of": "the file nothing is known"}),
        aj.base_identity(base[1] if api == "linen" else base[0], id="tiny"),
    ):
        aj.load_adapter(directory, *base, X, base=given)
    other = aj.base_identity(id="small")
    with raises(aj.OtherBaseError, "id 'tiny'", "'small'"):
        aj.load_adapter(directory, *base, X, base=other)
    aj.load_adapter(directory, *base, X, base=other, any_base=True)
    with raises(aj.UserError, "load_adapter", "tree_sha256", "0" * 64):
        aj.load_adapter(directory, *base, X, base=aj.BaseIdentity(tree_sha256="0" * 64))


def test_any_base_still_has_to_fit(tmp_path):
    directory = save(tmp_path, "linen", "llama")
    model = nnx_base()
    model.attention = nnx.MultiHeadAttention(1, 4, decode=False, rngs=nnx.Rngs(0))
    with raises(AdapterMismatchError, "gate is float32[2], expected float32[1]"):
        aj.load_adapter(directory, model, None, X, any_base=True)


def test_parameters_are_for_linen_models_alone():
    with raises(TypeError, "NNX", "aj.load_adapter("):
        aj.load_adapter("a", nnx_base(), X)
    with raises(TypeError, "linen", "aj.load_adapter("):
        aj.load_adapter("a", linen_base()[0])


@pytest.mark.parametrize(
    ("api", "kind", "datum"),
    [
        ("linen", aj.MismatchError, "out/kernel is [4, 4], expected [8, 4]"),
        ("nnx", ValueError, "8"),
    ],
)
def test_wrong_inputs_are_no_error_of_the_file(tmp_path, api, kind, datum):
    directory = save(tmp_path, api, "bottleneck")
    base = linen_base() if api == "linen" else (nnx_base(), None)
    with raises(kind, datum) as error:
        aj.load_adapter(directory, *base, np.ones((1, 3, 8), np.float32))
    assert not isinstance(error.value, aj.AdapterFileError)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_an_adapter_goes_beside_another(tmp_path, api):
    """Of a base that has adapters already, these are neither counted nor compared."""
    directory, first = save(tmp_path, api, "lora"), RECIPES["bottleneck"]
    if api == "linen":
        model, params = linen_base()
        adapted = aj.adapt(model, first)
        params = aj.init_adapters(adapted, params, jax.random.key(0), X)
        both, whole = aj.load_adapter(directory, adapted, params, X)
        assert whole["out"]["adapter"] == params["out"]["adapter"]
        assert both.recipe == first + RECIPES["lora"] and "lora" in whole["attention"]["query"]
    else:
        adapted = aj.adapt(nnx_base(), first, rngs=nnx.Rngs(0))
        both = aj.load_adapter(directory, adapted, None, X)
        assert both.out.adapter["up"]["bias"].shape == (4,) and both.attention.query.lora
