"""Further mistakes of newcomers: parameters, targets and states in another library's manner."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state as flax_train_state
from helpers.errors import raises
from test_newcomers import (
    KEY,
    MODEL,
    NET,
    PARAMS,
    RECIPE,
    SGD,
    STATS,
    VARIABLES,
    WHOLE,
    X,
    own,
    state_of,
)

import adapters_jax as aj
from adapters_jax.files.peft import save_peft
from adapters_jax.files.spelling import NAMES

pytestmark = pytest.mark.hostile


@pytest.mark.parametrize(
    "recipe", [RECIPE, aj.Recipe(aj.Bottleneck("body", 2)), aj.Recipe(aj.IA3("body"))]
)
def test_an_adapted_model_without_its_adapters(recipe):
    """Those whose methods change weights would compute what the base computes, silently."""
    model = aj.adapt(NET, recipe)
    with raises(aj.RecipeError, "AdaptedNormed", type(recipe.methods[0]).__name__, "init_adapters"):
        model.apply(VARIABLES, X)
    with raises(aj.RecipeError, "AdaptedNormed", "aj.init_adapters"):
        aj.audit(model, PARAMS)
    assert aj.adapt(NET, aj.Unfreeze("head/**")).apply(VARIABLES, X).shape == (2, 3)


class Deep(nn.Module):
    """A linen model whose layers are scanned, with weights of its own in each."""

    depth: int

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        return layer(name="trunk")(x)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(), (x.shape[-1], x.shape[-1]))
        return x + nn.Dense(x.shape[-1], name="up")(x) @ weight, None


@pytest.mark.parametrize(
    ("other", "inputs", "shown"),
    [
        (Deep(2), X, "trunk/up/kernel is [2, 4, 4], expected [3, 4, 4]"),
        (Deep(3), jnp.ones((2, 5)), "it ran on float32[2, 5]"),
    ],
)
def test_parameters_or_inputs_of_another_shape(other, inputs, shown):
    params = other.init(KEY, X)["params"]
    model = aj.adapt(Deep(3), aj.LoRA("trunk/up", 2))
    with raises(aj.MismatchError, shown):
        aj.init_adapters(model, params, KEY, inputs)


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("trunk/1/up", "'trunk/up' matches scanned layers"),
        ("params/trunk/up", "'trunk/up'"),
        ("/trunk/up", "'trunk/up'"),
        ("trunk/up/", "'trunk/up'"),
        (".*up.*", "no regular expression"),
        ("trunk/(up|down)", "no regular expression"),
    ],
)
def test_targets_in_another_notation(target, shown):
    model = aj.adapt(Deep(2), aj.LoRA(target, 2))
    with raises(aj.TargetError, shown):
        aj.init_adapters(model, Deep(2).init(KEY, X)["params"], KEY, X)


def test_a_target_around_what_can_be_adapted():
    base = nn.Sequential([nn.MultiHeadDotProductAttention(2)])
    model = aj.adapt(base, aj.LoRA("layers_0", 2))
    with raises(aj.TargetError, "'layers_0/**'", "layers_0/"):
        aj.init_adapters(model, base.init(KEY, X)["params"], KEY, X)


def test_a_bank_is_not_changed_in_place():
    bank = aj.Bank(MODEL, WHOLE)
    bank.put("a", (RECIPE, aj.partition(WHOLE, RECIPE)[0]))
    with raises(aj.UserError, "'a'", "bank = bank.put("):
        bank.rows(["a"])


def test_what_a_loss_function_returns():
    def returning(*others):
        return lambda variables, x, key: (jnp.mean(MODEL.apply(variables, x)), *others)

    for metrics, shown in [
        (STATS, "batch_stats as metrics"),
        (1.0, "a float as metrics"),
    ]:
        with raises(aj.UserError, shown, "return loss, {"):
            aj.make_train_step(returning(metrics))(state_of(collections=STATS), X)
    step = aj.make_train_step(returning({"batch_stats": jnp.ones(())}))  # a number of that name
    assert step(state_of(collections=STATS), X)[1]["batch_stats"] == 1


def test_what_an_optimiser_sees():
    mask = jax.tree.map(lambda x: x.ndim > 1, WHOLE)
    with raises(aj.UserError, "body/lora/a", "mask=lambda params"):
        aj.TrainState.create(MODEL, WHOLE, tx=optax.adamw(0.1, mask=mask), key=KEY)
    own = optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
    assert aj.TrainState.create(MODEL, WHOLE, tx=own, key=KEY)
    with raises(aj.UserError, "'head/**'", "tx=0.1", "optax.adam(1e-4)"):
        aj.freeze_base(SGD, RECIPE, groups={"head/**": 0.1})


@pytest.mark.parametrize("name", ["apply_fn", "apply_gradients", "batch_stats"])
def test_a_state_is_not_that_of_flax(name):
    with raises(AttributeError, "TrainState", name, NAMES[name]):
        getattr(state_of(), name)


def test_a_state_of_flax_is_told_from_ours(tmp_path):
    """Both classes are called TrainState."""
    state = flax_train_state.TrainState.create(apply_fn=MODEL.apply, params=WHOLE, tx=SGD)
    given = "flax.training.train_state.TrainState"
    with raises(aj.UserError, given, "an aj.TrainState", "create(model, params, tx=tx, key=key)"):
        aj.make_train_step(lambda params, batch, key: jnp.zeros(()))(state, X)
    for recipe in (None, RECIPE):
        with raises(TypeError, given, "an aj.TrainState", "aj.partition(params, recipe)[0]"):
            aj.save_adapter(tmp_path / "a", state, recipe)
    with raises(TypeError, given, "an aj.TrainState has state.trained"):
        save_peft(tmp_path / "a", RECIPE, state, {"body": "body"}, PARAMS)


def test_a_property_of_a_state_shows_its_own_error():
    abstract = jax.eval_shape(lambda: state_of())
    with raises(AttributeError, "ShapeDtypeStruct", "astype"):
        _ = abstract.params


def test_all_variables_are_not_partitioned():
    with raises(aj.MismatchError, "partition", "batch_stats", "aj.partition(params, recipe)"):
        aj.partition({**VARIABLES, "params": WHOLE}, RECIPE)


def test_a_file_for_a_directory(tmp_path):
    saved = aj.save_adapter(tmp_path / "a", state_of(collections=STATS))
    with raises(aj.AdapterFileError, "adapter.safetensors' is a file", repr(str(saved))):
        aj.load_adapter(saved / "adapter.safetensors", NET, PARAMS, X)


def test_meshes_in_another_notation():
    with raises(aj.ShardingError, "((1,), ('data',))", "'data=4,model=2'"):
        aj.make_mesh(((1,), ("data",)))
    mesh = aj.make_mesh("data=-1")
    with raises(aj.ShardingError, "shard_batch", "aj.make_mesh('data=-1')"):
        aj.shard_batch(mesh, X)
    with raises(aj.ShardingError, "head/kernel", "'data'", "P(None, 'model')"):
        aj.shard(state_of(), mesh, {"head/kernel": "data"})


def test_states_of_one_base_of_numpy_arrays():
    read = jax.tree.map(np.asarray, WHOLE)
    with raises(aj.UserError, "state 1", "jax.device_put(params)"):
        aj.stack_states([state_of(read), state_of(read)])
    there = jax.device_put(read)
    assert aj.stack_states([state_of(there), state_of(there)])


def test_a_weight_whose_use_is_not_known_is_not_quantised():
    with raises(aj.TargetError, "'weight'", "weight (how the model uses it", "pass example inputs"):
        aj.quantize(own(), dtype="int8", targets="weight")


def test_any_function_of_a_banks_model_is_told_which_adapters():
    """The adapters of all rows would broadcast, silently."""

    class Encodes(nnx.Module):
        def __init__(self):
            self.body = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def encode(self, x):
            return self.body(x)

    model = aj.adapt(Encodes(), aj.Bottleneck("body", 2), rngs=nnx.Rngs(0))
    bank = aj.Bank(model, capacity=1)
    assert bank.model.encode(X, adapters=bank.rows([None] * 2)).shape == (2, 4)
    with raises(aj.UserError, "Linear", "adapters=bank.rows([...])"):
        bank.model.encode(X)
