"""Compacter against its formula in float64 NumPy, its leaves that modules share, and its counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises
from test_bottleneck import FORMULAS, layer_norm

import adapters_jax as aj
from adapters_jax.finetune.models import bert
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.testing import check_method
from adapters_jax.trees import flatten

D, M, N = 12, 6, 3
POINT = AttachmentPoint("output", "layer_0/mlp", width=D)
X, Y = drawn((2, 5, D), 5), drawn((2, 5, D), 6)
SETTINGS = {
    "paper": {},
    "rank": {"phm_rank": 2, "placement": "parallel", "scale": 3.0},
    "full": {"full": True, "activation": "tanh"},
    "own": {"shared_rule": False, "norm_before": True},
    "own_factored": {"shared_rule": False, "factored_rule": True, "train_rule": False},
    "factored": {"factored_rule": True, "shared_weights": True},
    "no_bias": {"bias": False, "full": True, "norm_after": True, "placement": "parallel"},
}


def method_of(name, **more):
    return aj.Compacter("**", M, phm_dim=N, **SETTINGS[name], **more)


def leaves_of(method, point=POINT):
    shapes = {name: jnp.zeros(leaf.shape) for name, leaf in method.leaves(point).items()}
    return drawn_like(shapes, 3)


def whole(leaves, name):
    if name in leaves:
        return double(leaves[name])
    return np.einsum("nar,nrb->nab", *(double(leaves[f"{name}_{s}"]) for s in ("left", "right")))


def project(leaves, side, x):
    """The projection by its definition, a sum of Kronecker products."""
    rule = whole(leaves, "rule" if "rule" in leaves or "rule_left" in leaves else f"{side}_rule")
    kernel = sum(map(np.kron, rule, whole(leaves, f"{side}_weight")))
    return x @ kernel + (double(leaves[f"{side}_bias"]).ravel() if f"{side}_bias" in leaves else 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_formula(name):
    method = method_of(name)
    leaves = leaves_of(method)
    source = double(X if method.placement == "parallel" else Y)
    if method.norm_before:
        source = layer_norm(source, leaves["norm_before/scale"], leaves["norm_before/bias"])
    hidden = FORMULAS[method.activation](project(leaves, "down", source))
    branch = method.scale * project(leaves, "up", hidden)
    if method.norm_after:
        branch = layer_norm(branch, leaves["norm_after/scale"], leaves["norm_after/bias"])
    got = method.forward(leaves, POINT, X, jnp.asarray(Y))
    np.testing.assert_allclose(got, Y + branch, rtol=1e-5, atol=1e-4 * np.abs(branch).max())


@pytest.mark.parametrize("name", SETTINGS)
def test_counts(name):
    method = method_of(name)
    shapes = {name: leaf.shape for name, leaf in method.leaves(POINT).items()}
    counted = set(method.own_leaves) - set(method.frozen_leaves)
    count = method.count("", shapes, None)
    assert count.parameters == sum(math.prod(shapes[leaf]) for leaf in counted)
    assert count.parameters == eval(count.formula)
    stacked = {leaf: (7, *x) if leaf in method.own_leaves else x for leaf, x in shapes.items()}
    again = method.count("", stacked, None)
    assert (again.parameters, again.copies) == (count.parameters, 7)


@pytest.mark.slow
def test_bert_base_has_the_published_numbers():
    model, ids = bert.Bert(bert.BERT_BASE), jnp.ones((1, 4), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    for recipe, expected in (
        (aj.compacter(), 24 * (2 * (768 + 24) + 768 + 24) + 4**3),
        (aj.compacter(targets="**/mlp/output"), 28_576),
    ):
        adapted = aj.adapt(model, recipe)
        abstract = aj.init_adapters(adapted, params, jax.random.key(1), ids)
        audit = aj.audit(adapted, abstract)
        assert audit.adapter_parameters == audit.trainable_parameters == expected
        assert {entry.formula for entry in audit.entries} == {"3*192*4 + 3*6*4", "4*4*4"}
    assert 24 * (2 * (768 + 24) + 768 + 24) + 4**3 == 57_088


def test_one_rule_of_all_modules_is_stored_once():
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2}
    config = bert.BertConfig(**sizes, num_attention_heads=2, intermediate_size=12)
    model, ids = bert.Bert(config), jnp.ones((2, 4), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    adapted = aj.adapt(model, aj.compacter(4, phm_dim=2))
    flat = flatten(aj.init_adapters(adapted, params, jax.random.key(1), ids))
    assert [path for path in flat if "rule" in path] == ["compacter/rule"]
    assert sum(path.endswith("compacter/down_weight_left") for path in flat) == 4


def test_starts():
    key, wide = jax.random.key(0), AttachmentPoint("output", "x", width=800)

    def start(name, **settings):
        leaf = aj.Compacter("**", 400, **settings).leaves(wide)[name]
        return np.asarray(leaf.init(key, leaf.shape))

    assert 0.5 < start("rule", init_std=0.25).std() / 0.25 < 1.5
    uniform = start("rule", rule_init="uniform", init_std=2.0)
    assert 1.5 < np.abs(uniform).max() < 2.0
    assert np.isclose(start("down_weight", full=True).std(), math.sqrt(2 / 300), rtol=0.02)
    assert np.isclose(start("down_weight_left").std(), math.sqrt(2 / 201), rtol=0.1)
    assert not start("down_bias").any() and not start("up_bias").any()


def test_what_does_not_fit_is_an_error():
    with raises(aj.RecipeError, "layer_0/mlp", "12", "phm_dim=5"):
        aj.Compacter("**", 5, phm_dim=5).leaves(POINT)
    with raises(aj.RecipeError, "bottleneck 6", "phm_dim=4"):
        aj.Compacter("**", reduction_factor=2).leaves(POINT)
    with raises(aj.RecipeError, "Compacter", "share every array", "up_weight_right"):
        aj.Compacter("**", 4, shared_weights=True, bias=False)
    with raises(aj.UserError, "bottleneck_dim=4 and reduction_factor=2"):
        aj.Compacter("**", 4, 2)
    with raises(aj.UserError, "rule_init='glorot'"):
        aj.Compacter("**", 4, rule_init="glorot")


@pytest.mark.slow
def test_the_whole_contract():
    method = aj.Compacter("**/mlp/output", 4, phm_dim=2)
    assert check_method(method, start_tolerance=1e-3, variants=("plain",)) == ["mlp"]


@pytest.mark.witness("factored")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank", "own_factored", "factored", "no_bias"])
def test_the_whole_contract_with_other_settings(name):
    settings = {**SETTINGS[name], "placement": "sequential", "init_std": 0.3}
    method = aj.Compacter("**/mlp/output", 4, phm_dim=2, **settings)
    variants = ("plain", "scan") if name == "factored" else ("plain",)  # shared by all layers
    assert check_method(method, start_tolerance=math.inf, variants=variants) == ["mlp"]
