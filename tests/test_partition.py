"""Trees split and merged, and an optimiser that does not change the base."""

import errno

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import FileSystemError, compare_trees, file_errors
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten, path_of, unflatten

RECIPE = aj.Recipe(aj.LoRA("**/query", rank=2), aj.Unfreeze(("head/*", "**/norm/**")))


def tree():
    return {
        "layer_0": {
            "query": {"kernel": 1.0, "lora": {"a": 2.0, "b": 3.0}},
            "norm": {"scale": 4.0},
        },
        "head": {"bias": 5, "kernel": None},
        "table": 6,
    }


def arrays():
    """A tree of arrays that trains `head`, `norm` and the factors, and an equal tree of ones."""
    values = jax.tree.map(lambda x: jnp.full((2,), float(x)), {**tree(), "head": {"bias": 5}})
    return values, jax.tree.map(jnp.ones_like, values)


def moved(tx, params, gradient):
    """The updates of one step by path, as numbers of their first entries, and the state."""
    state = tx.init(params)
    updates, state = tx.update(gradient, state, params)
    return {path: float(x[0]) for path, x in flatten(updates).items()}, state


def slots(state):
    """How many arrays, other than counters, an optimiser keeps."""
    return sum(x.ndim > 0 for x in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", [dict, flax.core.freeze])
def test_partition_takes_every_leaf_to_one_side_and_merge_trees_is_its_inverse(kind):
    adapters, base = aj.partition(kind(tree()), RECIPE)
    assert adapters == {
        "layer_0": {"query": {"lora": {"a": 2.0, "b": 3.0}}, "norm": {"scale": 4.0}},
        "head": {"bias": 5, "kernel": None},
    }
    assert base == {"layer_0": {"query": {"kernel": 1.0}}, "table": 6}
    assert aj.merge_trees(adapters, base) == tree()
    assert aj.merge_trees(base, kind(adapters)) == tree()
    assert type(aj.merge_trees(kind(adapters), base)["layer_0"]["query"]) is dict


def test_partition_keeps_the_very_leaves_and_changes_nothing_given():
    params, _ = arrays()
    before = {path: id(x) for path, x in flatten(params).items()}
    adapters, base = aj.partition(params, RECIPE)
    adapters["head"]["bias"] = base["new"] = None
    assert {path: id(x) for path, x in flatten(params).items()} == before
    assert base["table"] is params["table"]


def test_nothing_trains_and_everything_trains():
    assert aj.partition(tree(), aj.Recipe()) == ({}, tree())
    assert aj.partition(tree(), aj.full()) == (tree(), {})


def test_a_leaf_of_the_name_of_an_adapter_is_of_the_base_unless_it_is_targeted():
    params = {"key": {"lora": {"a": 1.0}}, "query": {"lora": {"c": 2.0}, "kernel": 3.0}}
    assert aj.partition(params, RECIPE) == ({}, params)


def test_merge_trees_of_three_parts():
    whole = aj.merge_trees({"a": {"x": 1}}, {"a": {"y": {"z": 2}}}, {}, {"b": 3})
    assert whole == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


@pytest.mark.parametrize(
    ("trees", "paths"),
    [
        (({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 3}}), "a/x, a/y"),
        (({"a": 1}, {"b": 2}, {"a": None}), "a"),
        (({"a": {"b": {"c": 2}}}, {"a": 1}), "a"),
        (({"a": 1}, {"a": {"b": {"c": 2}}}), "a"),
    ],
)
def test_overlapping_leaves_are_refused(trees, paths):
    with raises(aj.UserError, f" {paths};"):
        aj.merge_trees(*trees)


def shapes_of(names, *axes, dtype=jnp.float32):
    return {name: jax.ShapeDtypeStruct(axes, dtype) for name in names}


def test_every_difference_of_two_trees_is_named():
    names = [f"x{i:02}" for i in range(13)]
    one, other = shapes_of(["a", "b"], 2), shapes_of(["a"], 2, dtype=jnp.int8)
    compare_trees("these", one, one, "fix", dtypes=True)
    compare_trees("these", shapes_of(["a"], 2), other, "fix")
    with raises(aj.MismatchError, "these", "a is float32[2], expected int8[2]", ". fix") as error:
        compare_trees("these", shapes_of(["a"], 2), other, "fix", dtypes=True)
    assert "missing" not in str(error.value)
    expected, got = shapes_of(["a", *names], 2), shapes_of(["a", *(f"y{n}" for n in names[1:])], 3)
    with raises(
        aj.MismatchError,
        f"13 missing: {', '.join(names[:12])} and 1 more",
        f"12 unexpected: {', '.join(f'y{n}' for n in names[1:])}; ",
        "1 different: a is [3], expected [2]",
    ):
        compare_trees("these", got, expected, "fix")


def test_errors_of_the_system_name_the_file(tmp_path):
    path = tmp_path / "none"
    with raises(FileSystemError, path) as error, file_errors(path):
        path.read_text()
    assert error.value.errno == errno.ENOENT
    with (
        raises(aj.AdapterFileError, path, "written"),
        file_errors(path, "written", aj.AdapterFileError),
    ):
        path.read_text()
    own = FileSystemError("mine")
    with raises(FileSystemError) as error, file_errors(path):
        raise own
    assert error.value is own


def test_flatten_and_unflatten_are_inverses():
    flat = flatten({"a": {"b": 1, "c": {"d": 2}}, 3: {"e": 4}})
    assert flat == {"a/b": 1, "a/c/d": 2, "3/e": 4}
    assert unflatten(flat) == {"a": {"b": 1, "c": {"d": 2}}, "3": {"e": 4}}


def test_paths_of_nnx_states_lists_and_boxes_are_names_joined_by_slashes():
    class Net(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([nnx.Param(jnp.ones(1)), nnx.Dict(value=nnx.Param(jnp.ones(1)))])

    paths = jax.tree_util.tree_leaves_with_path(nnx.state(Net()))
    assert [path_of(path) for path, _ in paths] == ["parts/0", "parts/1/value"]
    boxed = {"bias": nn.Partitioned(jnp.ones(1), ("x",)), "list": [1.0]}
    paths = jax.tree_util.tree_leaves_with_path(boxed)
    assert [path_of(path) for path, _ in paths] == ["bias", "list/0"]


def test_freeze_base_on_a_whole_tree_moves_only_what_trains_and_keeps_nothing_of_the_rest():
    params, gradient = arrays()
    tx = aj.freeze_base(optax.adam(0.25), RECIPE)
    updates, state = moved(tx, params, gradient)
    trained = ["head/bias", "layer_0/norm/scale", "layer_0/query/lora/a", "layer_0/query/lora/b"]
    assert sorted(path for path, u in updates.items() if u != 0.0) == trained
    np.testing.assert_allclose([updates[path] for path in trained], -0.25, rtol=1e-5)
    assert updates["table"] == updates["layer_0/query/kernel"] == 0.0
    assert slots(state) == 2 * len(trained)


def test_freeze_base_ignores_even_a_gradient_that_is_not_finite():
    params, gradient = arrays()
    gradient["table"] = jnp.full((2,), jnp.nan)
    updates, _ = moved(aj.freeze_base(optax.sgd(1.0), RECIPE), params, gradient)
    assert updates["table"] == 0.0 and updates["head/bias"] == -1.0


def test_freeze_base_on_the_trained_part_alone_is_the_plain_optimiser():
    params, gradient = (aj.partition(x, RECIPE)[0] for x in arrays())
    plain, plain_state = moved(optax.adamw(0.5), params, gradient)
    frozen, frozen_state = moved(aj.freeze_base(optax.adamw(0.5), RECIPE), params, gradient)
    assert frozen == plain
    assert slots(frozen_state) == slots(plain_state) == 8


def test_freeze_base_passes_on_extra_arguments():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda x: factor * x, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, gradient = arrays()
    tx = aj.freeze_base(scaled, RECIPE)
    updates, _ = tx.update(gradient, tx.init(params), params, factor=3.0)
    assert updates["head"]["bias"][0] == 3.0 and updates["table"][0] == 0.0


def test_groups_have_rates_and_decay_of_their_own_and_the_first_match_wins():
    params, gradient = arrays()
    groups = {
        "**/lora/b": optax.sgd(16.0),
        "**/{bias,scale}": optax.adamw(0.5, weight_decay=0.0),
        "**/lora/*": optax.sgd(2.0),
    }
    tx = aj.freeze_base(optax.adamw(0.5, weight_decay=0.5), RECIPE, groups)
    updates, state = moved(tx, params, gradient)
    assert updates["layer_0/query/lora/b"] == -16.0
    assert updates["layer_0/query/lora/a"] == -2.0
    np.testing.assert_allclose(updates["head/bias"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["layer_0/norm/scale"], -0.5, rtol=1e-5)
    assert updates["table"] == 0.0
    assert slots(state) == 4


def test_what_no_group_takes_decays():
    params, gradient = arrays()
    tx = aj.freeze_base(
        optax.adamw(0.5, weight_decay=0.5), RECIPE, {"**/{bias,scale}": optax.adamw(0.5)}
    )
    updates, _ = moved(tx, params, gradient)
    # Adam's first step is the rate; decay adds rate * 0.5 * parameter.
    np.testing.assert_allclose(updates["layer_0/query/lora/b"], -0.5 - 0.25 * 3.0, rtol=1e-5)
    np.testing.assert_allclose(updates["head/bias"], -0.5 - 0.5 * 1e-4 * 5.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_group_may_be_called_as_labels_are(name):
    params = {name: jnp.ones(1), "free": jnp.ones(1), "frozen": jnp.ones(1)}
    recipe = aj.Recipe(aj.Unfreeze((name, "free")))
    updates, _ = moved(
        aj.freeze_base(optax.sgd(1.0), recipe, {name: optax.sgd(8.0)}), params, params
    )
    assert updates == {name: -8.0, "free": -1.0, "frozen": 0.0}


def test_a_group_that_means_no_trained_leaf_is_an_error():
    params, _ = arrays()
    tx = aj.freeze_base(optax.sgd(1.0), RECIPE, {"**/lora/c": optax.sgd(2.0)})
    with raises(aj.TargetError, "freeze_base groups", "'**/lora/c'"):
        tx.init(params)
    tx = aj.freeze_base(optax.sgd(1.0), RECIPE, {"table": optax.sgd(2.0)})
    with raises(aj.TargetError, "freeze_base groups", "'table'"):
        tx.init(params)


@pytest.mark.parametrize("wrt", [AdapterParam, nnx.Param])
def test_freeze_base_on_an_nnx_state(wrt):
    recipe = aj.Recipe(aj.LoRA("**", rank=2), aj.Unfreeze("bias"))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    linear = nnx.merge(graphdef, jax.tree.map(jnp.asarray, drawn_like(state)))
    model = aj.adapt(linear, recipe, rngs=nnx.Rngs(1))
    bias, b = model.bias[...], model.lora["b"][...]
    tx = aj.freeze_base(optax.adam(0.25), recipe, {"bias": optax.sgd(1.0)})
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    loss = nnx.grad(lambda model: model(jnp.ones((2, 4))).sum(), argnums=nnx.DiffState(0, wrt))
    nnx.jit(lambda model, optimizer: optimizer.update(model, loss(model)))(model, optimizer)
    np.testing.assert_array_equal(nnx.state(model)["kernel"][...], linear.kernel[...])
    np.testing.assert_allclose(model.bias[...], bias - 2.0)
    np.testing.assert_allclose(abs(model.lora["b"][...] - b), 0.25, rtol=1e-4)
    assert slots(nnx.state(optimizer)) == 4
