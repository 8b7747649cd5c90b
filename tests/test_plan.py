"""Planned bytes: those of arithmetic where there is a formula, and XLA's own elsewhere."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from helpers.tiny import write_llama, write_model
from test_sharding import environment

import adapters_jax as aj
from adapters_jax.distributed.plan import Plan, abstract_state, plan
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.planning import Job, largest_batch
from adapters_jax.finetune.shapes import count_parameters

WIDTH, RANK = 64, 4


class Net(nn.Module):
    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.tanh(nn.Dense(WIDTH, name=f"d{i}", param_dtype=self.dtype, dtype=jnp.float32)(x))
        return x


def planned(recipe, batch=8, tx=None, dtype=jnp.bfloat16, mesh=None, **options):
    x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)
    base = Net(dtype)
    params = jax.eval_shape(base.init, jax.random.key(0), x)["params"]
    model = aj.adapt(base, recipe)
    params = aj.init_adapters(model, params, jax.random.key(0), x)
    state = abstract_state(model, params, tx=tx or optax.adam(1e-3))

    def loss(params, batch, key):
        return jnp.mean(model.apply({"params": params}, batch) ** 2)

    return plan(state, loss, x, mesh, **options)


@pytest.mark.slow
def test_bytes_and_counts_are_those_of_arithmetic():
    lora = planned(aj.LoRA("*", RANK))
    base, adapters = 3 * (WIDTH * WIDTH + WIDTH), 3 * 2 * RANK * WIDTH
    assert lora.base == 2 * base  # bfloat16
    assert lora.adapters == lora.gradients == 4 * adapters
    assert lora.optimizer == 2 * 4 * adapters + 4
    assert (lora.trainable_parameters, lora.parameters) == (adapters, base + adapters)
    assert (lora.batch, lora.devices) == (8, 1)
    parts = (lora.base, lora.adapters, lora.optimizer, lora.gradients)
    assert lora.total == sum(parts) + lora.inputs + lora.activations + lora.temporaries
    assert lora.total == lora.program.total
    assert lora.inputs == 4 * 8 * WIDTH + 4 + 8  # the batch, the step's number and its key
    assert lora.to_dict()["total"] == lora.total
    full = planned(aj.full())
    assert (full.base, full.adapters) == (0, 4 * base)  # what trains is kept in float32
    assert full.optimizer == 2 * 4 * base + 4
    assert full.total > lora.total
    frozen = planned(aj.Unfreeze("d0/bias"), tx=optax.sgd(0.1))
    assert (frozen.adapters, frozen.optimizer) == (4 * WIDTH, 0)


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_parts_share_memory():
    small, large = planned(aj.LoRA("*", RANK), 512), planned(aj.LoRA("*", RANK), 4096)
    per_row = (large.activations - small.activations) / (4096 - 512)
    # At least two layers' outputs, which tanh's derivative needs; not many times as much. That of
    # the third is needed at once, when the others are no longer.
    assert 2 * 4 * WIDTH <= per_row <= 12 * 4 * WIDTH, per_row
    parts = planned(aj.LoRA("*", RANK), 4096, accumulate=8)
    assert parts.activations < large.activations / 2
    assert parts.base == large.base


def test_a_forward_pass_of_parts_has_the_memory_of_one():
    model = aj.adapt(nn.Dense(WIDTH), aj.LoRA("**", RANK))

    def planned(rows, accumulate=1):
        batch = {"x": jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)}
        params = jax.eval_shape(model.init, jax.random.key(0), batch["x"])["params"]
        state = abstract_state(model, params, tx=optax.sgd(0.1))
        return plan(state, loss, batch, accumulate=accumulate)

    def loss(params, batch, key):
        y = model.apply({"params": params}, batch["x"])
        return jnp.mean(jnp.sort(y, axis=0))  # needs the outputs of all rows at once

    whole, part = planned(512), planned(64)
    assert part.temporaries < whole.temporaries / 4
    assert planned(512, accumulate=8).temporaries == part.temporaries


@pytest.mark.weekly
def test_the_largest_batch_that_fits_is_the_largest():
    def plan_of(batch):
        return planned(aj.LoRA("*", RANK), batch)

    memory = plan_of(20 * 512).total + 7
    found = largest_batch(plan_of, memory, unit=512)
    assert found.batch == 20 * 512 and found == plan_of(20 * 512)
    assert largest_batch(plan_of, plan_of(512).total - 1, unit=512) is None
    assert largest_batch(plan_of, 1e15, unit=512, most=2048).batch == 2048


def test_memory_that_does_not_grow_along_a_line():

    def leap(batch):
        return Plan(0, 0, 0, 0, 100 * batch if batch < 5 else 1000 * batch, 0, batch, 1, 0, 0)

    assert largest_batch(leap, 20_000).batch == 20
    assert largest_batch(leap, 4_500).batch == 4
    assert largest_batch(leap, 100).batch == 1
    assert largest_batch(leap, 3.3e6).batch == 3300


def test_memory_along_a_line_is_planned_a_few_times():
    rows = []

    def line(batch):
        rows.append(batch)
        return Plan(1000, 0, 0, 0, 10 * batch, 0, batch, 1, 0, 0)

    assert largest_batch(line, 1000 + 10 * 3335, unit=10).batch == 3330
    assert rows == [10, 20, 320, 3330, 3340]
    rows.clear()
    assert largest_batch(line, 1e15).batch == 2**20
    assert rows == [1, 2, 32, 512, 8192, 2**17, 2**20]


def test_an_nnx_model_plans_like_a_linen_one():
    def build():
        base = nnx.Sequential(*[nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(i)) for i in range(3)])
        return aj.adapt(base, aj.LoRA("layers/*", RANK), rngs=nnx.Rngs(1))

    state = abstract_state(nnx.eval_shape(build), tx=optax.adam(1e-3))
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
    found = plan(state, lambda model, batch, key: jnp.mean(model(batch) ** 2), x)
    linen = planned(aj.LoRA("*", RANK), dtype=jnp.float32)
    for name in ("base", "adapters", "optimizer", "gradients", "parameters"):
        assert getattr(found, name) == getattr(linen, name), name


def test_frozen_parameters_that_a_step_does_not_use_are_held_as_well():
    class Pooled(nnx.Module):
        def __init__(self):
            self.used = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
            self.pooler = nnx.Linear(WIDTH, 512, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.used(x)

    model = nnx.eval_shape(lambda: aj.adapt(Pooled(), aj.LoRA("used", RANK), rngs=nnx.Rngs(1)))
    state = abstract_state(model, tx=optax.adam(1e-3))
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
    found = plan(state, lambda model, batch, key: jnp.mean(model(batch) ** 2), x)
    assert found.base == 4 * (WIDTH * WIDTH + WIDTH + WIDTH * 512 + 512)
    assert found.program.arguments >= found.base + found.adapters + found.optimizer
    assert found.inputs == 4 * 8 * WIDTH + 4 + 8


MESHED = """
import json, jax
from test_plan import planned, RANK
import adapters_jax as aj
one = planned(aj.full(), 1024)
rules = {"*/kernel": jax.sharding.PartitionSpec("fsdp", "model")}
eight = planned(aj.full(), 1024, mesh=aj.make_mesh("data=2,fsdp=2,model=2"), rules=rules)
lora = planned(aj.LoRA("*", RANK), 1024, mesh=aj.make_mesh("data=2,fsdp=2,model=2"), rules=rules)
print(json.dumps([one.to_dict(), eight.to_dict(), lora.to_dict()]))
"""


@pytest.mark.weekly
def test_a_mesh_divides_it():
    run = [sys.executable, "-c", MESHED]
    ran = subprocess.run(run, env=environment(8), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, eight, lora = json.loads(ran.stdout)
    kernels, biases = 3 * WIDTH * WIDTH, 3 * WIDTH
    assert one["adapters"] == 4 * (kernels + biases)
    assert eight["adapters"] == 4 * (kernels // 4 + biases)
    assert eight["optimizer"] == 2 * eight["adapters"] + 4
    assert (eight["devices"], eight["batch"]) == (8, 1024)
    assert eight["activations"] < one["activations"] / 2
    assert lora["base"] == 2 * (kernels // 4 + biases)
    assert lora["adapters"] == 4 * 3 * 2 * RANK * WIDTH  # small: everywhere


@pytest.mark.slow
def test_a_real_state_is_planned_like_its_shapes():
    model = aj.adapt(Net(jnp.float32), aj.LoRA("*", RANK))
    x = np.ones((8, WIDTH), np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    state = aj.TrainState.create(model, params, tx=optax.adam(1e-3), key=jax.random.key(0))
    loss = lambda params, batch, key: jnp.mean(model.apply({"params": params}, batch) ** 2)  # noqa: E731
    assert plan(state, loss, x) == planned(aj.LoRA("*", RANK), dtype=jnp.float32)
    with raises(aj.ShardingError, "7 rows", "2 parts", "data=2"):
        plan(state, loss, x[:7], jax.sharding.AbstractMesh((2,), ("data",)))


def command(*flags):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["plan", *map(str, flags), "--json"])
    return status, out.getvalue(), err.getvalue()


@pytest.mark.weekly
@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_the_command_plans_a_checkpoint_by_its_configuration(model, tmp_path):
    (write_model if model == "tiny" else write_llama)(tmp_path / model)
    flags = ("--model", tmp_path / model, "--batch-size", 4, "--length", 16)
    memory = ("--memory", 1e-6) if model == "tiny" else ()
    status, out, _ = command(*flags, "--method", "lora", "--rank", 2, *memory)
    assert status == 0
    found = json.loads(out)
    lora, full = found["plans"]["lora"], found["plans"]["full"]
    method = MethodOptions("lora", rank=2).on("decoder" if model == "llama" else "encoder")
    counted = count_parameters(str(tmp_path / model), method)
    assert lora["trainable_parameters"] == counted.trainable_parameters
    assert lora["base"] == 2 * counted.frozen_parameters
    assert full["trainable_parameters"] == counted.frozen_parameters
    assert full["gradients"] == 4 * counted.frozen_parameters
    if memory:
        assert found["largest"] == {"lora": None, "full": None}  # not a row fits a kilobyte
    else:
        status, out, _ = command(*flags, "--method", "lora", "--no-full", "--dtype", "float32")
        assert list(json.loads(out)["plans"]) == ["lora"]
        assert json.loads(out)["plans"]["lora"]["base"] == 4 * counted.frozen_parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trained"), [("llama-adapter", 10 * 32 + 4), ("loreft", 2 * 4 * 32 + 4)]
)
def test_a_method_that_numbers_layers_plans_unrolled_ones(method, trained, tmp_path):
    write_llama(tmp_path / "llama")
    flags = ("--model", tmp_path / "llama", "--length", 16, "--no-full")
    status, out, err = command(*flags, "--method", method, "--last", 2)
    assert status == 0, err
    found = json.loads(out)["plans"][method]
    assert found["trainable_parameters"] == 2 * trained


@pytest.mark.parametrize(("model", "scans"), [("large-v3", True), ("large-v3-turbo", False)])
def test_stacks_of_different_numbers_of_layers_are_not_scanned(model, scans):
    options = {field.name: None for field in fields(Job)} | {"method": MethodOptions("lora")}
    assert Job(**options | {"model": f"openai/whisper-{model}"}).scans == scans


def test_a_plan_that_cannot_be_made_is_one_line():
    for flags, *data in (
        (("--mesh", "data=-1"), "--mesh", "data=-1"),
        (("--mesh", "data=64"), "--batch-size 8", "--mesh data=64"),
        (("--mesh", "tensor"), "'tensor'", "NAME=SIZE"),
        (("--mesh", "fdsp=2"), "'fdsp'", "data, fsdp, model"),
        (("--length", 0), "--length"),
        (("--attention", "flash"), "--attention flash", "--device"),
        (("--memory", -1), "--memory"),
    ):
        status, _, err = command("--model", "bert-base", *flags)
        assert status == 2 and all(datum in err for datum in data), err
        assert err.count("\n") == 1
