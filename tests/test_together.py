"""Trainings together: each is what it would be alone."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import adapters_jax as aj
from adapters_jax.testing.linen_model import LinenNet
from adapters_jax.testing.nnx_model import NnxNet
from adapters_jax.testing.subjects import bits, ids, shaken
from adapters_jax.training.together import Optimizers
from adapters_jax.trees import flatten

RECIPE = aj.Recipe(aj.LoRA("**/up", rank=2, dropout=0.3), aj.Bottleneck("**/output", 3))


def adapted(api, recipe=RECIPE):
    if api == "linen":
        base = LinenNet("mlp")
        frozen = shaken(base.init(jax.random.key(0), ids())["params"], 3)
        model = aj.adapt(base, recipe)
        return model, aj.init_adapters(model, frozen, jax.random.key(1), ids())
    base = NnxNet("mlp", rngs=nnx.Rngs(0))
    return (aj.adapt(base, recipe, rngs=nnx.Rngs(1, dropout=2), example_inputs=(ids(),)),)


def loss_of(api, model):
    def loss(whole, batch, key):
        x, y = batch
        if api == "linen":
            logits = model.apply({"params": whole}, x, rngs={"dropout": key})
        else:
            logits = whole(x)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return own.mean(), {"first": own[0, 0]}

    return loss


def batches(n, steps, rows=3):
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, 11, (2, n, rows, 6))) for _ in range(steps)]


def assert_close(got, expected, atol=1e-5):
    for path, x in flatten(expected).items():
        np.testing.assert_allclose(flatten(got)[path], x, atol=atol, rtol=1e-4, err_msg=path)


BOTH = pytest.mark.parametrize("api", ["linen", "nnx"])
SCHEDULE = optax.linear_schedule(0.3, 0.0, 4)
SHARED = optax.adam(2e-2)
OPTIMIZERS = [
    SHARED,
    optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(SCHEDULE)),
    SHARED,
    optax.adamw(1e-2, weight_decay=0.1),
]


@pytest.mark.witness("3-linen")
@BOTH
@pytest.mark.parametrize("accumulate", [1, 3])
def test_trained_together_equals_trained_apart(api, accumulate):
    """Optimisers, schedules, clipping, keys and data of their own."""
    model, *params = adapted(api)
    new = lambda i: aj.TrainState.create(  # noqa: E731
        model, *params, tx=OPTIMIZERS[i], key=jax.random.key(i)
    )
    data = batches(4, steps=3)
    step = aj.make_train_step(loss_of(api, model), accumulate=accumulate)
    together = aj.stack_states([new(i) for i in range(4)])
    measured = []
    for batch in data:
        together, metrics = step(together, batch)
        measured.append(metrics)
    for i, state in enumerate(aj.unstack_states(together)):
        alone = new(i)
        for batch, metrics in zip(data, measured, strict=True):
            alone, own = step(alone, tuple(x[i] for x in batch))
            for name, value in own.items():
                np.testing.assert_allclose(metrics[name][i], value, rtol=2e-4, err_msg=name)
        assert_close(state.adapters, alone.adapters)
        assert jax.tree.structure(state) == jax.tree.structure(alone)
        again, _ = step(state, tuple(x[i] for x in data[0]))  # goes on alone
        alone, _ = step(alone, tuple(x[i] for x in data[0]))
        assert_close(again.adapters, alone.adapters)


@pytest.mark.slow
@pytest.mark.witness("linen")
@BOTH
def test_each_stops_and_fails_for_itself(api):
    model, *params = adapted(api, aj.LoRA("**/up", rank=2))
    new = lambda: aj.TrainState.create(  # noqa: E731
        model, *params, tx=optax.adam(0.1), key=jax.random.key(0)
    )

    def loss(whole, batch, key):
        x, weight = batch
        logits = model.apply({"params": whole}, x) if api == "linen" else whole(x)
        return (logits * weight).mean()

    together = aj.stack_states([new(), new(), new()])
    before = [bits(state.adapters) for state in aj.unstack_states(together)]
    x = jnp.stack([ids()] * 3)
    weights = jnp.array([1.0, jnp.nan, 1.0])
    active = jnp.array([True, True, False])
    step = aj.make_train_step(loss)
    together, metrics = step(together, (x, weights), active)
    after = aj.unstack_states(together)
    assert metrics["finite"].tolist() == [1.0, 0.0, 1.0]
    assert together.step.tolist() == [1, 1, 0]
    changed = [bits(s.adapters) != old for s, old in zip(after, before, strict=True)]
    assert changed == [True, False, False]
    alone, _ = step(new(), (x[0], weights[0]))
    assert_close(after[0].adapters, alone.adapters)
    moments = [int(s.opt_state[0].count) for s in after]
    assert moments == [1, 0, 0]
    together, _ = step(together, (x, jnp.ones(3)), jnp.array([True, True, True]))
    assert together.step.tolist() == [2, 2, 1]
    assert step.jitted._cache_size() == 2  # this one and that of a state alone


def bits_of(state):
    """The bits of all that a step may change, also of random keys."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    plain = lambda x: jax.random.key_data(x) if is_key(x) else x  # noqa: E731
    return bits(jax.tree.map(plain, state.checkpointed))


@pytest.mark.slow
@BOTH
def test_some_of_many_make_a_step(api):
    """They are what they are alone, and no bit of the others changes."""
    model, *params = adapted(api)
    new = lambda i: aj.TrainState.create(  # noqa: E731
        model, *params, tx=SHARED, key=jax.random.key(i)
    )
    step = aj.make_train_step(loss_of(api, model))
    together, alone = aj.stack_states([new(i) for i in range(5)]), {3: new(3), 1: new(1)}
    before = [bits_of(state) for state in aj.unstack_states(together)]
    for x, y in batches(2, steps=3):
        together, metrics = step(together, (x, y), only=[3, 1])
        for part, i in enumerate(alone):
            alone[i], own = step(alone[i], (x[part], y[part]))
            for name, value in own.items():
                np.testing.assert_allclose(metrics[name][part], value, rtol=2e-4, err_msg=name)
    after = aj.unstack_states(together)
    assert together.step.tolist() == [0, 3, 0, 3, 0]
    for i, state in enumerate(after):
        if i in alone:
            assert_close(state.adapters, alone[i].adapters)
            assert_close(state.opt_state[0].nu, alone[i].opt_state[0].nu)
        else:
            assert bits_of(state) == before[i]
    together, _ = step(together, (x, y), only=np.array([0, 4]))
    assert together.step.tolist() == [1, 3, 0, 3, 1]
    assert step.jitted._cache_size() == 2  # this one and that of a state alone


@pytest.mark.slow
@BOTH
def test_a_step_of_some_does_not_cost_what_all_are(api):
    """Bytes, temporaries and what is not in place are those of the trainings that make it."""
    model, *params = adapted(api)
    state = aj.TrainState.create(model, *params, tx=SHARED, key=jax.random.key(0))
    step = aj.make_train_step(loss_of(api, model))
    found = {}
    for n in (32, 4096):
        many = lambda x, n=n: jax.ShapeDtypeStruct((n, *x.shape), x.dtype)  # noqa: E731
        own = jax.tree.map(many, replace(state, base=None, tx=None, opt_state=None))
        opt_state = (jax.tree.map(many, state.opt_state),)
        own = replace(own, opt_state=opt_state, tx=Optimizers(((SHARED, tuple(range(n))),)))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(own.adapters)) * 3
        (batch,), only = batches(2, steps=1), np.array([n - 1, 0])
        program = step.jitted.lower(own, state.base, batch, None, only).compile()
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes > size
        written = memory.output_size_in_bytes - memory.alias_size_in_bytes
        found[n] = written, memory.temp_size_in_bytes
        # What makes arrays for each of the trainings: rows are written into those that came.
        made = re.findall(rf"= \w+\[{n},\S+ ([\w-]+)\(", program.as_text())
        rows = {"fusion", "scatter", "dynamic-update-slice", "while", "get-tuple-element"}
        assert {*made} <= {"parameter", *rows}
    assert found[4096] == found[32]


def test_each_has_its_loss_scale():
    """An overflow halves the scale of its training alone; one that is not active keeps its own."""
    model, params = adapted("linen", aj.LoRA("**/up", rank=2))

    def loss(whole, batch, key):
        x, weight = batch
        return (model.apply({"params": whole}, x) * weight).mean()

    new = lambda: aj.TrainState.create(  # noqa: E731
        model,
        params,
        tx=optax.sgd(0.1),
        key=jax.random.key(0),
        loss_scale=DynamicScale(scale=8.0, growth_interval=1),
    )
    x, weights = jnp.stack([ids()] * 3), jnp.array([1.0, jnp.inf, 1.0])
    step = aj.make_train_step(loss)
    together, metrics = step(
        aj.stack_states([new(), new(), new()]), (x, weights), jnp.array([True, True, False])
    )
    assert metrics["loss_scale"].tolist() == [8.0, 8.0, 8.0]
    states = aj.unstack_states(together)
    assert [float(state.loss_scale.scale) for state in states] == [8.0, 4.0, 8.0]
    assert [int(state.loss_scale.fin_steps) for state in states] == [1, 0, 0]
    alone, _ = step(new(), (x[0], weights[0]))
    assert_close(states[0].adapters, alone.adapters)
    plain = aj.TrainState.create(model, params, tx=optax.sgd(0.1), key=jax.random.key(0))
    with pytest.raises(aj.MismatchError, match="stack_states: state 1"):
        aj.stack_states([new(), plain])


@pytest.mark.slow
def test_checkpoints_of_each(tmp_path):
    """A training goes on from a checkpoint of its own, whoever was beside it."""
    model, params = adapted("linen")
    new = lambda i: aj.TrainState.create(  # noqa: E731
        model, params, tx=OPTIMIZERS[i], key=jax.random.key(i)
    )
    data = batches(2, steps=2)
    step = aj.make_train_step(loss_of("linen", model))
    together, _ = step(aj.stack_states([new(0), new(1)]), data[0])
    second = aj.unstack_states(together)[1]
    with aj.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, second)
    with aj.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(new(1)).state
    assert bits(restored.adapters) == bits(second.adapters)
    again = aj.stack_states([new(3), restored])
    again, _ = step(again, data[1])
    alone, _ = step(second, tuple(x[1] for x in data[1]))
    assert_close(aj.unstack_states(again)[1].adapters, alone.adapters)


def test_the_base_is_there_once():
    """Products with the base are those of one batch, and the base is no output."""
    model, params = adapted("linen", aj.LoRA("**/up", rank=2))
    states = [
        aj.TrainState.create(model, params, tx=SHARED, key=jax.random.key(i)) for i in range(4)
    ]
    together = aj.stack_states(states)
    assert all(
        x is y
        for x, y in zip(
            jax.tree.leaves(together.base), jax.tree.leaves(states[0].base), strict=True
        )
    )

    def flops(state, batch):
        step = aj.make_train_step(loss_of("linen", model)).jitted
        given = state.replace(base=None), state.base, batch, None
        return step.lower(*given).compile().cost_analysis()["flops"]

    (x, y), *_ = batches(4, steps=1, rows=8)
    one = flops(states[0], (x.reshape(32, 6), y.reshape(32, 6)))
    assert flops(together, (x, y)) / one < 1.05


class TestBadInput:
    @pytest.fixture(scope="class", name="state")
    @classmethod
    def _state(cls):
        model, params = adapted("linen", aj.LoRA("**/up", rank=2))
        return aj.TrainState.create(model, params, tx=SHARED, key=jax.random.key(0))

    def test_states_that_differ(self, state):
        model, params = adapted("linen", aj.LoRA("**/up", rank=3))
        other = aj.TrainState.create(model, params, tx=SHARED, key=jax.random.key(0))
        with pytest.raises(aj.UserError, match="state 1 is of another model or recipe"):
            aj.stack_states([state, other])
        model, params = adapted("linen", aj.LoRA("**/up", rank=2))
        other = aj.TrainState.create(model, params, tx=SHARED, key=jax.random.key(0))
        with pytest.raises(aj.UserError, match="state 1 has other arrays as its base"):
            aj.stack_states([state, other])
        with pytest.raises(aj.UserError, match="no states"):
            aj.stack_states([])
        together = aj.stack_states([state, state])
        with pytest.raises(aj.UserError, match="state 1 is of several trainings"):
            aj.stack_states([state, together])
        with pytest.raises(aj.UserError, match="the state of one training"):
            aj.unstack_states(state)

    def test_batches_that_do_not_fit(self, state):
        step = aj.make_train_step(lambda params, batch, key: batch.mean())
        together = aj.stack_states([state, state])
        with pytest.raises(aj.UserError, match=r"shape \[4, 6\], expected a first axis of 2"):
            step(together, ids())
        x = jnp.stack([ids(), ids()])
        with pytest.raises(aj.UserError, match=r"active is int32\[2\], expected bool\[2\]"):
            step(together, x, jnp.array([1, 0]))
        with pytest.raises(aj.UserError, match="active= is for stacked states"):
            step(state, ids(), jnp.array([True]))

    def test_some_that_are_not_there(self, state):
        step = aj.make_train_step(lambda params, batch, key: batch.mean())
        together, x = aj.stack_states([state, state]), jnp.stack([ids(), ids()])
        for only in ([0, 2], [-1, 0], [1, 1], [], [True, False], 1, "0"):
            with pytest.raises(aj.UserError, match="expected numbers of trainings from 0 to 1"):
                step(together, x, only=only)
        with pytest.raises(aj.UserError, match="expected a first axis of 1"):
            step(together, x, only=[1])
        with pytest.raises(aj.UserError, match="only= is for stacked states"):
            step(state, ids(), only=[0])
        with pytest.raises(aj.UserError, match="give one of them"):
            step(together, x, jnp.array([True, True]), only=[0, 1])
        other = replace(state, tx=optax.adam(2e-2))
        with pytest.raises(aj.UserError, match="share an optimiser, and these have 2"):
            step(aj.stack_states([state, other]), x, only=[0, 1])


@BOTH
def test_a_state_of_several_trainings_is_put_onto_a_mesh(api):
    model, *params = adapted(api)

    def new(i):
        return aj.TrainState.create(model, *params, tx=OPTIMIZERS[i], key=jax.random.key(i))

    mesh = aj.make_mesh("data=-1,model=1")
    together = aj.shard(aj.stack_states([new(0), new(1), new(2)]), mesh)
    assert {x.sharding.mesh for x in jax.tree.leaves(together.checkpointed)} == {mesh}
    step = aj.make_train_step(loss_of(api, model))
    (batch,) = batches(3, 1)
    together, _ = step(together, batch)
    for i, one in enumerate(aj.unstack_states(together)):
        alone, _ = step(new(i), jax.tree.map(lambda x, i=i: x[i], batch))
        assert_close(one.trained, alone.trained)
