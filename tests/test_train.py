"""The training step: values of a hand-written loop, and what it leaves alone."""

import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.adapter import read_adapter
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten, path_of

D, ROWS = 4, 8
ADAM, SGD, STILL = optax.adam(1e-2), optax.sgd(0.5), optax.sgd(0.0)
RECIPE = aj.Recipe(aj.LoRA("up", 2, alpha=3.0), aj.Unfreeze("down/bias"))
APIS = ("linen", "nnx")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def values(dtype=jnp.float32):
    """Parameters of the net below, none of them zero."""

    def some(*shape, seed, dtype=dtype):
        return (0.4 * draw(*shape, seed=seed)).astype(dtype)

    factors = {
        "a": some(D, 2, seed=3, dtype=jnp.float32),
        "b": some(2, 6, seed=4, dtype=jnp.float32),
    }
    return {
        "up": {"kernel": some(D, 6, seed=1), "bias": some(6, seed=2), "lora": factors},
        "down": {"kernel": some(6, 3, seed=5), "bias": some(3, seed=6)},
    }


def batch(seed=7, rows=ROWS):
    return {"x": draw(rows, D, seed=seed), "y": draw(rows, 3, seed=seed + 1)}


class LinenNet(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6, name="up", dtype=self.dtype)(x)
        return nn.Dense(3, name="down", dtype=self.dtype)(nn.tanh(h))


class NnxNet(nnx.Module):
    def __init__(self, dtype=None):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(D, 6, dtype=dtype, param_dtype=dtype or jnp.float32, rngs=rngs)
        self.down = nnx.Linear(6, 3, dtype=dtype, param_dtype=dtype or jnp.float32, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


@functools.cache
def model_of(api, recipe=RECIPE, dtype=None):
    """The adapted model; an NNX one holds the values above."""
    if api == "linen":
        return aj.adapt(LinenNet(dtype), recipe)
    return nnx_model(recipe, dtype)


def nnx_model(recipe=RECIPE, dtype=None):
    model = nnx.eval_shape(lambda: aj.adapt(NnxNet(dtype), recipe, rngs=nnx.Rngs(1)))
    flat = flatten(values(dtype or jnp.float32))
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef, jax.tree_util.tree_map_with_path(lambda p, _: flat[path_of(p)], state)
    )


def state_of(api, tx, recipe=RECIPE, dtype=None, seed=0):
    params = values(dtype or jnp.float32) if api == "linen" else None
    model = model_of(api, recipe, dtype)
    return aj.TrainState.create(model, params, tx=tx, key=jax.random.key(seed))


@functools.cache
def loss_of(api, recipe=RECIPE, dtype=None):
    model = model_of("linen", recipe, dtype)

    def loss(whole, batch, key):
        y = whole(batch["x"]) if api == "nnx" else model.apply({"params": whole}, batch["x"])
        return jnp.mean((y - batch["y"]) ** 2)

    return loss


@functools.cache
def step_of(api, accumulate=1):
    return aj.make_train_step(loss_of(api), accumulate=accumulate)


def by_hand(params, data):
    """The loss in plain arithmetic, with the LoRA scale alpha / r = 1.5."""
    up, down = params["up"], params["down"]
    kernel = up["kernel"] + 1.5 * up["lora"]["a"] @ up["lora"]["b"]
    y = jnp.tanh(data["x"] @ kernel + up["bias"][None]) @ down["kernel"] + down["bias"][None]
    return jnp.mean((y - data["y"]) ** 2)


def hand_gradients(adapters, data):
    """The gradients of the three trained arrays, as a flat tree."""

    def loss(flat):
        params = values()
        params["up"]["lora"] = {"a": flat["up/lora/a"], "b": flat["up/lora/b"]}
        params["down"]["bias"] = flat["down/bias"]
        return by_hand(params, data)

    return jax.value_and_grad(loss)(adapters)


def start():
    params = values()
    return {
        "up/lora/a": params["up"]["lora"]["a"],
        "up/lora/b": params["up"]["lora"]["b"],
        "down/bias": params["down"]["bias"],
    }


def adam_by_hand(batches, rate, clip=None):
    """Adam in numpy, with an optional clip of the global norm before it."""
    x = start()
    mean = {k: np.zeros(v.shape) for k, v in x.items()}
    square = {k: np.zeros(v.shape) for k, v in x.items()}
    norms = []
    for t, data in enumerate(batches, 1):
        _, g = hand_gradients(x, data)
        norms.append(np.sqrt(sum(np.sum(np.square(v)) for v in g.values())))
        shrink = min(1.0, clip / norms[-1]) if clip else 1.0
        for k in x:
            gk = np.asarray(g[k]) * shrink
            mean[k] = 0.9 * mean[k] + 0.1 * gk
            square[k] = 0.999 * square[k] + 0.001 * gk**2
            update = (mean[k] / (1 - 0.9**t)) / (np.sqrt(square[k] / (1 - 0.999**t)) + 1e-8)
            x[k] = jnp.asarray(x[k] - rate * update, jnp.float32)
    return x, norms


def run(step, state, batches):
    metrics = []
    for data in batches:
        state, found = step(state, data)
        metrics.append({name: float(x) for name, x in found.items()})
    return state, metrics


def close(state, expected, atol=1e-6):
    got = flatten(state.adapters)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=atol, err_msg=name)


def bits(tree):
    return [
        np.asarray(x).tobytes()
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]


@pytest.mark.parametrize("api", APIS)
def test_sgd_is_a_hand_written_step(api):
    data = batch()
    loss, gradient = hand_gradients(start(), data)
    state, (metrics,) = run(step_of(api), state_of(api, SGD), [data])
    close(state, {name: x - 0.5 * gradient[name] for name, x in start().items()})
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
    expected = {"loss": float(loss), "grad_norm": float(norm), "finite": 1.0}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert int(state.step) == 1 and state.step.dtype == jnp.int32


@pytest.mark.parametrize(("api", "clip"), [("linen", None), ("linen", 0.1), ("nnx", None)])
def test_adam_is_a_hand_written_loop_also_with_clipping_around_it(api, clip):
    batches = [batch(seed) for seed in (7, 9, 11)]
    expected, norms = adam_by_hand(batches, 1e-2, clip)
    tx = optax.chain(optax.clip_by_global_norm(clip), ADAM) if clip else ADAM
    state, metrics = run(step_of(api), state_of(api, tx), batches)
    close(state, expected, atol=2e-6)
    # The norm is that before the clip, and the clip is of trained gradients alone.
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], norms, rtol=1e-5)
    assert not clip or min(norms) > clip


def test_a_clip_inside_freeze_base_is_the_same_and_groups_have_their_own():
    data = batch()
    _, gradient = hand_gradients(start(), data)
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    tx = aj.freeze_base(clipped, RECIPE, {"**/bias": optax.sgd(0.25)})
    state, _ = run(step_of("linen"), state_of("linen", tx), [data])
    factors = ("up/lora/a", "up/lora/b")
    norm = np.sqrt(sum(np.sum(np.square(gradient[name])) for name in factors))
    expected = {name: start()[name] - 0.1 / norm * gradient[name] for name in factors}
    close(state, {**expected, "down/bias": start()["down/bias"] - 0.25 * gradient["down/bias"]})


@pytest.mark.parametrize(("api", "parts"), [("linen", 4), ("nnx", 2)])
def test_accumulation_is_one_large_batch(api, parts):
    data = batch()
    whole, (expected,) = run(step_of(api), state_of(api, SGD), [data])
    state, (metrics,) = run(step_of(api, parts), state_of(api, SGD), [data])
    close(state, flatten(whole.adapters))
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert int(state.step) == 1


def test_accumulation_averages_metrics_and_gives_every_part_a_key_of_its_own():
    def loss(params, data, key):
        metrics = {"first": data["x"][0, 0], "draw": jax.random.uniform(key)}
        return jnp.mean(params["down"]["bias"]), metrics

    data = batch()
    state = state_of("linen", optax.sgd(1.0))
    _, metrics = aj.make_train_step(loss, accumulate=2)(state, data)
    np.testing.assert_allclose(metrics["first"], (data["x"][0, 0] + data["x"][4, 0]) / 2, rtol=1e-6)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    draws = [float(jax.random.uniform(key)) for key in keys]
    np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)
    assert draws[0] != draws[1]


def test_a_batch_that_does_not_divide_is_refused():
    state = state_of("linen", optax.sgd(1.0))
    with raises(aj.UserError, "batch", 8, 3, "accumulate"):
        aj.make_train_step(loss_of("linen"), accumulate=3)(state, batch())
    with raises(aj.UserError, "without axes", "2 parts", "accumulate"):
        aj.make_train_step(loss_of("linen"), accumulate=2)(state, {**batch(), "weight": 1.0})


@pytest.mark.parametrize("accumulate", [0, -1, 1.5, True])
def test_accumulate_is_a_whole_number(accumulate):
    with raises(aj.UserError, "make_train_step", f"accumulate={accumulate}"):
        aj.make_train_step(loss_of("linen"), accumulate=accumulate)


@pytest.mark.parametrize(
    ("api", "bad", "accumulate"),
    [("linen", np.nan, 1), ("linen", np.inf, 1), ("nnx", np.nan, 1), ("nnx", np.inf, 2)],
)
def test_a_loss_that_is_not_finite_changes_nothing(api, bad, accumulate):
    step, good = step_of(api, accumulate), batch()
    state, _ = run(step, state_of(api, ADAM), [good])
    before = bits((state.adapters, state.opt_state))
    spoilt = {**good, "y": good["y"].at[5, 1].set(bad)}
    state, metrics = step(state, spoilt)
    assert float(metrics["finite"]) == 0.0 and not np.isfinite(float(metrics["loss"]))
    assert bits((state.adapters, state.opt_state)) == before
    assert int(state.step) == 2
    state, metrics = step(state, good)
    once, _ = run(step, state_of(api, ADAM), [good, good])
    assert float(metrics["finite"]) == 1.0
    assert bits((state.adapters, state.opt_state)) == bits((once.adapters, once.opt_state))


def test_a_gradient_that_is_not_finite_changes_nothing_though_the_loss_is():
    def loss(params, data, key):
        bias = params["down"]["bias"]
        return jnp.sum(jnp.sqrt(jnp.abs(bias - jax.lax.stop_gradient(bias)))) + 1.0

    state = state_of("linen", optax.sgd(1.0))
    before = bits(state.adapters)
    state, metrics = aj.make_train_step(loss)(state, batch())
    assert float(metrics["loss"]) == 1.0 and float(metrics["finite"]) == 0.0
    assert bits(state.adapters) == before


@pytest.mark.parametrize("api", APIS)
def test_the_state_is_used_up_and_what_the_user_holds_is_not(api):
    model, params = model_of(api), values()
    held = params if api == "linen" else nnx.state(model)
    before, key = bits(held), jax.random.key(3)
    state = aj.TrainState.create(model, params if api == "linen" else None, tx=ADAM, key=key)
    if api == "linen":
        assert state.base["up"]["kernel"] is params["up"]["kernel"]
    base = jax.tree.leaves(state.base)
    base_bits, buffers = bits(base), [x.unsafe_buffer_pointer() for x in base]
    first = state
    state, _ = run(step_of(api), state, [batch()] * 3)
    assert all(x.is_deleted() for x in jax.tree.leaves((first.adapters, first.opt_state)))
    with raises(aj.UserError, "step(state, batch)"):
        step_of(api)(first, batch())
    assert bits(held) == before and not key.is_deleted()
    after = jax.tree.leaves(state.base)
    assert all(x is y for x, y in zip(base, after, strict=True))
    assert bits(after) == base_bits
    assert [x.unsafe_buffer_pointer() for x in after] == buffers
    assert bits(state.adapters) != bits(start())


def test_numpy_parameters_go_to_the_device_once():
    params = jax.tree.map(np.asarray, flax.core.freeze(values()))
    state = aj.TrainState.create(
        model_of("linen"), params, tx=optax.sgd(0.5), key=jax.random.key(0)
    )
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((state.adapters, state.base)))
    same, _ = run(step_of("linen"), state_of("linen", SGD), [batch()])
    state, _ = run(step_of("linen"), state, [batch()])
    assert bits(state.adapters) == bits(same.adapters)


@pytest.mark.parametrize("api", APIS)
def test_one_compilation_serves_every_step_and_every_state_of_the_same_shapes(api):
    step = step_of(api)
    run(step, state_of(api, ADAM), [batch()])
    compiled = step.jitted._cache_size()
    for seed in (0, 1):
        run(step, state_of(api, ADAM, seed=seed), [batch(), batch(9), batch(11)])
    if api == "nnx":
        again = aj.TrainState.create(nnx_model(), tx=ADAM, key=jax.random.key(0))
        run(step, again, [batch()])
    assert step.jitted._cache_size() == compiled


def keeping():
    """An optimiser whose state is the parameters themselves, a key and a number."""

    def init(params):
        return params, jax.random.key(0), 0.5

    def update(gradient, state, params):
        kept, key, rate = state
        return jax.tree.map(lambda g: -rate * g, gradient), (kept, jax.random.split(key)[0], rate)

    return optax.GradientTransformation(init, update)


def test_an_optimiser_may_keep_parameters_keys_and_numbers():
    step = aj.make_train_step(loss_of("linen"))
    state, metrics = run(step, state_of("linen", keeping()), [batch()] * 3)
    expected, _ = run(step_of("linen"), state_of("linen", SGD), [batch()] * 3)
    close(state, flatten(expected.adapters))
    assert bits(state.opt_state[0]) == bits(state_of("linen", SGD).adapters)
    assert metrics[-1]["finite"] == 1.0 and step.jitted._cache_size() == 1


def test_an_optimiser_that_asks_for_the_loss_gets_it():
    """Alone and together; what asks for more is one sentence."""
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda grads, state, params, *, value: (grads, value)
    )
    tx = aj.freeze_base(optax.chain(SGD, seen), RECIPE)
    alone, metrics = step_of("linen")(state_of("linen", tx), batch())
    assert metrics["loss"] in jax.tree.leaves(alone.opt_state)
    together = aj.stack_states([state_of("linen", tx)] * 2)
    batches = jax.tree.map(lambda *x: jnp.stack(x), batch(), batch())
    together, metrics = step_of("linen")(together, batches)
    for state, loss in zip(aj.unstack_states(together), metrics["loss"], strict=True):
        assert loss in jax.tree.leaves(state.opt_state)
    with raises(aj.UserError, "make_train_step", "value_fn"):
        step_of("linen")(state_of("linen", optax.lbfgs()), batch())


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        return nn.Dense(6, name="up")(x)


class NnxDropping(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.norm = nnx.Linear(D, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(self.dropout(x)))


DROPPING = aj.Recipe(aj.LoRA("up", 2, dropout=0.5))


@functools.cache
def dropping(api):
    """A model with dropout in the base and in the adapter, its step, and its evaluation."""
    if api == "linen":
        model = aj.adapt(Dropping(), DROPPING)

        def loss(params, data, key):
            y = model.apply({"params": params}, data, False, rngs={"dropout": key})
            return jnp.mean(y**2)

        def evaluate(params, data):
            return model.apply({"params": params}, data, True)

    else:
        model = aj.adapt(NnxDropping(), DROPPING, rngs=nnx.Rngs(1))
        model.up.lora["b"][...] = values()["up"]["lora"]["b"]

        def loss(model, data, key):
            return jnp.mean((model(data) - 1.0) ** 2)

        def evaluate(model, data):
            return model(data)

    return model, aj.make_train_step(loss), aj.make_eval_step(evaluate)


def dropping_state(api, tx, seed=0):
    model, *_ = dropping(api)
    params = {"up": values()["up"]} if api == "linen" else None
    return aj.TrainState.create(model, params, tx=tx, key=jax.random.key(seed))


@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", APIS)
def test_dropout_differs_from_step_to_step_and_a_run_repeats_bit_for_bit(api):
    _, step, _ = dropping(api)
    x = draw(ROWS, D)
    _, metrics = run(step, dropping_state(api, STILL), [x] * 4)
    assert len({m["loss"] for m in metrics}) == 4
    tx = ADAM if api == "linen" else STILL
    state, first = run(step, dropping_state(api, tx), [x] * 3)
    again, second = run(step, dropping_state(api, tx), [x] * 3)
    assert first == second and bits(state.adapters) == bits(again.adapters)
    if api == "linen":
        _, other = run(step, dropping_state(api, STILL, seed=1), [x] * 4)
        assert not {m["loss"] for m in other} & {m["loss"] for m in metrics}


def test_step_i_uses_the_key_folded_with_i():
    def loss(params, data, key):
        return jnp.sum(params["down"]["bias"]), {"draw": jax.random.uniform(key)}

    _, metrics = run(aj.make_train_step(loss), state_of("linen", STILL, seed=4), [batch()] * 3)
    keys = [jax.random.fold_in(jax.random.key(4), i) for i in range(3)]
    np.testing.assert_allclose(
        [m["draw"] for m in metrics], [jax.random.uniform(key) for key in keys], rtol=1e-6
    )


@pytest.mark.parametrize("api", APIS)
def test_evaluation_drops_nothing_and_changes_nothing(api):
    model, _, evaluate = dropping(api)
    state, x = dropping_state(api, STILL), draw(ROWS, D)
    before = bits(state)
    first, second = evaluate(state, x), evaluate(state, x)
    np.testing.assert_array_equal(first, second)
    up = values()["up"] if api == "linen" else model.up
    if api == "linen":
        expected = x @ (up["kernel"] + up["lora"]["a"] @ up["lora"]["b"]) + up["bias"][None]
    else:
        kernel = up.kernel[...]  # with its change
        expected = (x @ kernel + up.bias[...][None]) / np.sqrt(1.0 + 1e-5)
    np.testing.assert_allclose(first, expected, atol=1e-5)
    assert bits(state) == before
    assert api == "linen" or not model.dropout.deterministic


def test_evaluation_returns_what_the_function_returns():
    data = batch()
    evaluate = aj.make_eval_step(lambda params, data: {"loss": by_hand(params, data), "n": 8})
    found = evaluate(state_of("linen", STILL), data)
    assert int(found["n"]) == 8
    np.testing.assert_allclose(found["loss"], hand_gradients(start(), data)[0], rtol=1e-5)


def test_nnx_statistics_and_dropout_counters_advance_and_are_kept_from_a_bad_batch():
    _, step, _ = dropping("nnx")
    x = draw(ROWS, D)
    fresh = dropping_state("nnx", STILL).model
    state, _ = step(dropping_state("nnx", STILL), x)
    model = state.model
    count = int(fresh.dropout.rngs.count[...])
    assert int(model.dropout.rngs.count[...]) == count + 1
    assert int(model.up.lora["dropout"].rngs.count[...]) == 1
    mean = np.asarray(model.norm.mean[...])
    assert np.abs(mean).max() > 1e-3 and np.all(np.asarray(fresh.norm.mean[...]) == 0.0)
    state, metrics = step(state, x.at[0].set(jnp.nan))
    assert float(metrics["finite"]) == 0.0
    np.testing.assert_array_equal(state.model.norm.mean[...], mean)
    state, metrics = step(state, x)
    assert float(metrics["finite"]) == 1.0 and np.isfinite(state.model.norm.mean[...]).all()
    assert not np.array_equal(state.model.norm.mean[...], mean)


def test_accumulation_carries_statistics_from_part_to_part():
    def loss(model, data, key):
        return jnp.mean(model(data))

    state = aj.TrainState.create(dropping("nnx")[0], tx=STILL, key=jax.random.key(0))
    before = int(state.model.dropout.rngs.count[...])
    state, _ = aj.make_train_step(loss, accumulate=4)(state, draw(ROWS, D))
    assert int(state.model.dropout.rngs.count[...]) == before + 4


@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", APIS)
def test_a_half_precision_base_trains_in_float32(api):
    half = jnp.bfloat16
    state = state_of(api, optax.adam(0.1), dtype=half)
    step = aj.make_train_step(loss_of(api, dtype=half))
    state, metrics = run(step, state, [batch()] * 5)
    assert {x.dtype for x in jax.tree.leaves(state.adapters)} == {np.dtype(np.float32)}
    dtypes = {name: x.dtype for name, x in flatten(state.trained).items()}
    assert dtypes == {"up/lora/a": np.float32, "up/lora/b": np.float32, "down/bias": half}
    assert {x.dtype for x in jax.tree.leaves(state.base)} == {np.dtype(half)}
    expected = hand_gradients(start(), batch())[0]
    np.testing.assert_allclose(metrics[0]["loss"], expected, rtol=0.05)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert step.jitted._cache_size() == 1


@pytest.mark.parametrize("api", APIS)
def test_updates_too_small_for_half_precision_add_up(api, tmp_path):
    model = {"linen": aj.adapt(nn.Dense(1), aj.Unfreeze("bias"))}.get(api)
    params = {"bias": jnp.ones(1, jnp.bfloat16), "kernel": jnp.ones((1, 1), jnp.bfloat16)}
    if api == "nnx":
        base = nnx.Linear(1, 1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        base.bias[...] = params["bias"]
        model, params = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0)), None
    state = aj.TrainState.create(model, params, tx=optax.sgd(1e-3), key=jax.random.key(0))
    step = aj.make_train_step(
        lambda whole, x, key: jnp.sum(whole["bias"] if api == "linen" else whole.bias[...])
    )
    for _ in range(64):
        state, _ = step(state, jnp.ones(1))
    whole = state.params["bias"] if api == "linen" else state.model.bias[...]
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(whole, jnp.asarray([1 - 0.064], jnp.bfloat16))
    aj.save_adapter(tmp_path / "adapter", state)
    assert read_adapter(tmp_path / "adapter")[1]["bias"].dtype == jnp.bfloat16


def test_a_metric_cannot_have_a_name_of_the_steps_own():
    step = aj.make_train_step(lambda params, data, key: (jnp.sum(params["bias"]), {"loss": 1.0}))
    model = aj.adapt(nn.Dense(1), aj.Unfreeze("bias"))
    params = {"bias": jnp.ones(1), "kernel": jnp.ones((1, 1))}
    state = aj.TrainState.create(model, params, tx=SGD, key=jax.random.key(0))
    with raises(aj.UserError, "make_train_step", "metrics named loss"):
        step(state, jnp.ones(1))


@pytest.mark.parametrize("excluded", ["!down", "!**/{down|head}/**"])
@pytest.mark.parametrize("api", APIS)
def test_targets_may_exclude_what_has_no_adapter(api, excluded):
    recipe = aj.Recipe(aj.LoRA(("**", excluded), 2, alpha=3.0))
    state = state_of(api, ADAM, recipe)
    assert {*flatten(state.adapters)} == {"up/lora/a", "up/lora/b"}
    with raises(aj.TargetError, "'lost'"):
        aj.TrainState.create(
            aj.adapt(LinenNet(), aj.LoRA(("up", "lost", excluded), 2)),
            values(),
            tx=ADAM,
            key=jax.random.key(0),
        )


def test_a_subset_of_targets_may_exclude_what_has_no_adapter():
    model = aj.adapt(LinenNet(), aj.IA3(("**", "!down"), feed_forward=("**", "!down")))
    key, x = jax.random.key(0), jnp.ones((2, 4))
    params = aj.init_adapters(model, LinenNet().init(key, x)["params"], key, x)
    state = aj.TrainState.create(model, params, tx=ADAM, key=key)
    assert {*flatten(state.adapters)} == {"up/ia3/scale"}


def test_an_integer_leaf_in_the_base_stays_as_it_is():
    recipe = aj.Recipe(aj.Unfreeze("scale"))
    model = aj.adapt(LinenNet(), recipe)
    params = {"scale": draw(6), "table": jnp.arange(6, dtype=jnp.int8)}
    state = aj.TrainState.create(model, params, tx=optax.sgd(1.0), key=jax.random.key(0))
    step = aj.make_train_step(lambda p, data, key: jnp.sum(p["scale"] * p["table"]))
    state, _ = step(state, batch())
    np.testing.assert_allclose(state.adapters["scale"], params["scale"] - np.arange(6), rtol=1e-5)
    assert state.params["table"] is params["table"] and state.base["table"].dtype == jnp.int8


def test_a_recipe_that_trains_integers_is_refused_by_name():
    params = {"scale": draw(6), "table": jnp.arange(6, dtype=jnp.int8), "on": jnp.array(True)}
    model = aj.adapt(LinenNet(), aj.full())
    with raises(aj.RecipeError, "on (bool)", "table (int8)") as caught:
        aj.TrainState.create(model, params, tx=STILL, key=jax.random.key(0))
    assert "scale" not in str(caught.value)

    class Net(nnx.Module):
        def __init__(self):
            self.scale, self.table = nnx.Param(draw(6)), nnx.Param(jnp.arange(6, dtype=jnp.int8))

    model = aj.adapt(Net(), aj.full(), rngs=nnx.Rngs(0))
    with raises(aj.RecipeError, "table (int8)"):
        aj.TrainState.create(model, tx=STILL, key=jax.random.key(0))


def test_create_names_what_is_missing():
    create = functools.partial(aj.TrainState.create, tx=STILL, key=jax.random.key(0))
    with raises(TypeError, "TrainState.create(model, params, tx=tx, key=key)"):
        create(model_of("linen"))
    with raises(TypeError, "TrainState.create", "NNX", "params"):
        create(model_of("nnx"), values())
    with raises(TypeError, "LinenNet", "aj.adapt(model, recipe)"):
        create(LinenNet(), values())
    with raises(aj.UserError, "NnxNet", "aj.adapt(model, recipe)"):
        create(NnxNet())
    params = values()
    del params["up"]["lora"]
    with raises(aj.RecipeError, "LoRA", "aj.init_adapters(model, params, key, *example_inputs)"):
        create(model_of("linen"), params)
    with raises(aj.RecipeError, "the recipe unfreezes", "aj.init_adapters("):
        create(aj.adapt(LinenNet(), aj.Unfreeze("**/bias")), {"scale": draw(6)})


def test_a_state_has_only_the_view_of_its_own_api():
    with raises(TypeError, "NNX", "state.model"):
        _ = state_of("nnx", STILL).params
    with raises(TypeError, "linen", "state.params"):
        _ = state_of("linen", STILL).model


def test_the_views_of_a_state_are_whole():
    state = state_of("linen", STILL)
    assert flatten(state.params).keys() == flatten(values()).keys()
    model = state_of("nnx", STILL).model
    np.testing.assert_array_equal(model(batch()["x"]), model_of("nnx")(batch()["x"]))
    assert isinstance(model.down.bias, AdapterParam)


def test_the_metrics_of_the_loss_come_along():
    def loss(params, data, key):
        return by_hand(params, data), {"accuracy": jnp.float32(0.25)}

    _, (metrics,) = run(aj.make_train_step(loss), state_of("linen", STILL), [batch()])
    assert set(metrics) == {"loss", "grad_norm", "finite", "accuracy"}
    assert metrics["accuracy"] == 0.25


@pytest.mark.slow
def test_full_fine_tuning_is_the_same_step():
    recipe = aj.full()
    params = {k: {n: x for n, x in v.items() if n != "lora"} for k, v in values().items()}
    model = aj.adapt(LinenNet(), recipe)
    state = aj.TrainState.create(model, params, tx=optax.sgd(0.5), key=jax.random.key(0))

    def loss(params, data):
        y = jnp.tanh(data["x"] @ params["up"]["kernel"] + params["up"]["bias"][None])
        y = y @ params["down"]["kernel"] + params["down"]["bias"][None]
        return jnp.mean((y - data["y"]) ** 2)

    gradient = flatten(jax.grad(loss)(params, batch()))
    state, _ = run(aj.make_train_step(loss_of("linen", recipe)), state, [batch()])
    assert jax.tree.leaves(state.base) == []
    close(state, {name: x - 0.5 * gradient[name] for name, x in flatten(params).items()})
