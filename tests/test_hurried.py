"""Mistakes of hurried users: each is one sentence that says what to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.trees import flatten, unflatten

pytestmark = pytest.mark.hostile

X, SGD, KEY = jnp.ones((2, 4)), optax.sgd(0.1), jax.random.key(0)
KEYS = jax.random.split(KEY)


def adapted():
    return aj.adapt(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), aj.LoRA("**", 2), rngs=nnx.Rngs(1))


def state_of(**given):
    return aj.TrainState.create(adapted(), **{"tx": SGD, "key": KEY, **given})


def mean(model, batch, key):
    return jnp.mean(model(batch) ** 2)


@pytest.mark.parametrize("key", [0, None, 1.5, np.zeros(2), jnp.zeros((), jnp.uint32), KEYS])
def test_a_key_that_is_none(key):
    with raises(aj.UserError, "key=", "jax.random.key(0)"):
        state_of(key=key)


def test_old_keys_are_keys():
    state, _ = aj.make_train_step(mean)(state_of(key=jax.random.PRNGKey(0)), X)
    assert int(state.step) == 1


@pytest.mark.parametrize("tx", [None, 0.1, optax.adam])
def test_an_optimiser_that_is_none(tx):
    with raises(aj.UserError, "tx=", "optax.adam(1e-4)"):
        state_of(tx=tx)


@pytest.mark.parametrize(("alpha", "shown"), [(1e60, "1e+60"), (1e-60, "1e-60"), (10**400, "1000")])
def test_a_number_that_float32_cannot_hold(alpha, shown):
    with raises(aj.UserError, f"alpha={shown}", "float32"):
        aj.LoRA("**", 2, alpha=alpha)


def test_a_state_that_a_step_took_over(tmp_path):
    step, state = aj.make_train_step(mean), state_of()
    step(state, X)
    with raises(aj.UserError, "state, metrics = step(state, batch)"):
        step(state, X)
    with raises(aj.UserError, "state, metrics = step(state, batch)"):
        aj.save_adapter(tmp_path / "adapter", state)
    with Checkpoints(tmp_path / "saved") as checkpoints:
        with raises(aj.UserError, "state, metrics = step(state, batch)"):
            checkpoints.save(1, state)
        assert checkpoints.steps == []


def test_a_model_in_place_of_a_state():
    with raises(aj.UserError, "AdaptedLinear", "aj.TrainState.create"):
        aj.make_train_step(mean)(adapted(), X)


@pytest.mark.parametrize(
    ("loss", "data"),
    [
        (lambda model, batch, key: model(batch), ["float32", "(2, 4)", "mean"]),
        (lambda model, batch, key: jnp.argmax(model(batch)), ["int32", "()"]),
        (lambda model, batch, key: (model(batch), {}), ["(2, 4)"]),
        (lambda model, batch, key: None, ["NoneType", "float scalar"]),
        (lambda model, batch, key: "0.5", ["str", "float scalar"]),
    ],
)
def test_a_loss_that_is_no_float_scalar(loss, data):
    with raises(aj.UserError, *data):
        aj.make_train_step(loss)(state_of(), X)


def test_a_loss_that_does_not_use_the_model():
    step = aj.make_train_step(lambda model, batch, key: jnp.mean(batch))
    with pytest.warns(aj.AdapterWarning, match="exactly zero"):
        state, _ = step(state_of(), X)
    step(state, X)  # once


def test_a_step_inside_of_a_jitted_function():
    step = aj.make_train_step(mean)
    metrics = jax.jit(lambda state, batch: step(state, batch)[1])(state_of(), X)
    assert metrics["grad_norm"] > 0


def test_a_state_of_numpy_arrays_is_trained():
    state, metrics = aj.make_train_step(mean)(jax.device_get(state_of()), X)
    assert int(state.step) == 1
    assert metrics["grad_norm"] > 0


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.Dense(4, name="a")(x))


LORA = aj.LoRA("a", 2)
BASE = Two().init(jax.random.key(0), X)["params"]


@pytest.mark.parametrize(
    ("other", "kind", "data"),
    [
        (aj.LoRA("a", 3), aj.MismatchError, ["a (LoRA)", 24, "2*(4 + 4) = 16"]),
        (aj.LoRA("*", 2), aj.MismatchError, ["b/lora/a", "no target"]),
        (aj.Bottleneck("a", 2), aj.RecipeError, ["LoRA"]),
        (aj.Unfreeze("a/bias"), aj.RecipeError, ["LoRA"]),
    ],
)
def test_parameters_of_another_recipe(other, kind, data):
    params = aj.init_adapters(aj.adapt(Two(), other), BASE, jax.random.key(1), X)
    model = aj.adapt(Two(), LORA)
    with raises(kind, "TrainState.create", "aj.init_adapters(model", *data):
        aj.TrainState.create(model, params, tx=SGD, key=KEY)


def test_parameters_that_lack_the_adapters_of_a_pattern():
    params = aj.init_adapters(aj.adapt(Two(), LORA), BASE, jax.random.key(1), X)
    with raises(aj.TargetError, "'b'"):
        aj.TrainState.create(aj.adapt(Two(), aj.LoRA(["a", "b"], 2)), params, tx=SGD, key=KEY)


@pytest.mark.parametrize("targets", ["*", "{a|b}"])
def test_parameters_that_lack_adapters_of_a_wildcard(targets):
    params = aj.init_adapters(aj.adapt(Two(), LORA), BASE, jax.random.key(1), X)
    with pytest.warns(aj.AdapterWarning, match=r"targets b \(LoRA\), .* aj\.init_adapters"):
        aj.TrainState.create(aj.adapt(Two(), aj.LoRA(targets, 2)), params, tx=SGD, key=KEY)


@pytest.mark.parametrize("leaf", ["lora/c", "adapter/down/kernel"])
def test_parameters_that_have_leaves_of_other_adapters(leaf):
    params = flatten(aj.init_adapters(aj.adapt(Two(), LORA), BASE, jax.random.key(1), X))
    params = unflatten({**params, f"b/{leaf}": jnp.ones((4, 2))})
    with pytest.warns(aj.AdapterWarning, match=rf"have b/{leaf}, .* aj\.init_adapters"):
        aj.TrainState.create(aj.adapt(Two(), LORA), params, tx=SGD, key=KEY)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_a_learning_rate_that_is_none(rate):
    with raises(aj.UserError, f"learning_rate={rate!r}"):
        aj.lora_plus(optax.sgd, rate, LORA)


def test_progress_of_arrays(tmp_path):
    with raises(aj.UserError, "(3,)", "tolist"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(), progress={"losses": jnp.ones(3)})
