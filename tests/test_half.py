"""Training in float16: what is learnt is what float32 learns, and overflows are skipped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.runs.loop import PATIENCE, Log
from adapters_jax.finetune.tasks.base import NotFiniteError
from adapters_jax.trees import flatten

X = jax.random.normal(jax.random.key(3), (32, 8))
Y = jnp.sin(2 * X[:, :1])
SHRINK = 1e-6  # gradients of this size are zero in float16


class Linen(nn.Module):
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="up", dtype=self.dtype)(x))
        return nn.Dense(1, name="down", dtype=self.dtype)(x).astype(jnp.float32)


class Nnx(nnx.Module):
    def __init__(self, dtype, rngs):
        self.up = nnx.Linear(8, 16, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(16, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x))).astype(jnp.float32)


def started(api, dtype, loss_scale=None):
    recipe = aj.LoRA("up", 4)
    given = {"tx": optax.adam(1e-2), "key": jax.random.key(0), "loss_scale": loss_scale}
    if api == "nnx":
        model = aj.adapt(Nnx(dtype, nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
        return aj.TrainState.create(model, **given), lambda model, x: model(x)
    params = Linen().init(jax.random.key(0), X)["params"]
    model = aj.adapt(Linen(dtype), recipe)
    params = aj.init_adapters(model, params, jax.random.key(1), X)
    return aj.TrainState.create(model, params, **given), lambda p, x: model.apply({"params": p}, x)


def train(api, dtype, loss_scale=None, *, steps=40, accumulate=1):
    state, run = started(api, dtype, loss_scale)

    def loss(subject, batch, key):
        x, y, factor = batch
        return SHRINK * jnp.mean(factor * (run(subject, x) - y) ** 2)

    step, found = aj.make_train_step(loss, accumulate=accumulate), []
    for _ in range(steps):
        state, metrics = step(state, (X, Y, jnp.ones_like(Y)))
        found.append({name: float(x) for name, x in metrics.items()})
    assert step.jitted._cache_size() == 1
    return state, found


@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_with_a_loss_scale_it_learns_what_float32_learns(api):
    _, expected = train(api, jnp.float32)
    _, without = train(api, jnp.float16)
    state, found = train(api, jnp.float16, DynamicScale())
    losses, scaled = ([m["loss"] for m in metrics] for metrics in (expected, found))
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(scaled, losses, rtol=0.01)
    np.testing.assert_allclose(found[0]["grad_norm"], expected[0]["grad_norm"], rtol=0.01)
    assert without[-1]["loss"] > 1.2 * losses[-1]  # its gradients vanish
    assert {m["loss_scale"] for m in found} == {65536.0}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.adapters))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scale_that_is_too_high_is_halved_and_its_steps_change_nothing_else(accumulate):
    high = DynamicScale(scale=2.0**38, growth_interval=5)
    state, _ = started("linen", jnp.float16)
    start = flatten(jax.device_get(state.adapters))
    state, found = train("linen", jnp.float16, high, steps=20, accumulate=accumulate)
    skipped = [m["finite"] == 0.0 for m in found]
    count = skipped.index(False)
    assert 0 < count < 10
    halved = [2.0 ** (38 - accumulate * i) for i in range(count)]
    assert [m["loss_scale"] for m in found[:count]] == halved
    state, _ = train("linen", jnp.float16, high, steps=count, accumulate=accumulate)
    assert int(state.step) == count
    after = flatten(jax.device_get(state.adapters))
    assert all((after[path] == leaf).all() for path, leaf in start.items())
    assert int(optax.tree.get(state.opt_state, "count")) == 0
    assert max(m["loss_scale"] for m in found[count:]) >= 2 * found[count]["loss_scale"]


def test_a_checkpoint_has_the_scale(tmp_path):
    state, _ = train("linen", jnp.float16, DynamicScale(scale=2.0**45), steps=2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
        fresh, _ = started("linen", jnp.float16, DynamicScale())
        found = checkpoints.restore(fresh).state
        assert float(found.loss_scale.scale) == 2.0**43
        with raises(aj.MismatchError, "loss_scale/scale"):
            checkpoints.restore(started("linen", jnp.float16)[0])


@pytest.mark.parametrize("scale", [True, 2.0, 65536, DynamicScale])
def test_a_loss_scale_that_is_none_is_an_error(scale):
    with raises(aj.UserError, "loss_scale=", "DynamicScale()"):
        started("linen", jnp.float16, scale)


def records(finite, patience, window=2):
    log, found = Log(window, lambda step: 0.5, patience), []
    for i, ok in enumerate(finite):
        value = float(i) if ok else float("nan")
        found += log.add(i + 1, {"loss": value, "grad_norm": value, "finite": float(ok)})
    return found + log.flush()


def test_skipped_steps_are_counted_and_are_in_no_mean():
    rows = records([0, 0, 0, 1, 1, 1, 1, 0], patience=4)
    assert [row.get("skipped", 0) for row in rows] == [2, 1, 0, 1]
    assert [row.get("loss") for row in rows] == [None, 3.0, 4.5, 6.0]


@pytest.mark.parametrize(("patience", "first"), [(1, 1), (3, 4)])
def test_as_many_in_a_row_as_there_is_patience_for_stop(patience, first):
    with raises(NotFiniteError, f"step {first}:") as caught:
        records([0, 0, 1, 0, 0, 0, 1], patience)
    assert caught.value.step == first


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from helpers.tiny import write_model, write_reviews

    place = tmp_path_factory.mktemp("half")
    write_model(place / "tiny")
    write_reviews(place / "reviews.jsonl")
    return place


def finetune(place, name, *more):
    from adapters_jax.finetune.cli.main import main

    flags = ["--model", place / "tiny", "--train", place / "reviews.jsonl", "--text", "review"]
    flags += ["--max-length", 8, "--batch-size", 16, "--limit", 160, "--epochs", 3]
    flags += ["--bottleneck-dim", 4, "--learning-rate", 0.01, "--no-baselines"]
    flags += ["--evaluations", 1, "--runs", place, "--name", name]
    status = main(["finetune", *map(str, [*flags, *more])])
    return status, json.loads((place / name / "config.json").read_text())


def losses_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.weekly
def test_a_run_in_float16_is_the_run_in_float32(place):
    for dtype in ("float32", "float16"):
        status, config = finetune(place, dtype, "--dtype", dtype)
        assert status == 0 and config["dtype"] == dtype
    half, full = losses_of(place / "float16"), losses_of(place / "float32")
    assert full[-1] < 0.96 * full[0] and half != full
    np.testing.assert_allclose(half, full, atol=0.003)


@pytest.mark.weekly
def test_overflows_are_reported_and_too_many_stop_the_run(place, monkeypatch, capsys):
    from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem

    rows, bad = LabelledProblem.batch, set()

    def poisoned(self, step):
        batch = rows(self, step)
        return {**batch, "weight": batch["weight"] * np.float32("nan" if step in bad else 1)}

    monkeypatch.setattr(LabelledProblem, "batch", poisoned)
    bad |= {3, 4}
    status, config = finetune(place, "skips", "--dtype", "float16")
    assert status == 0 and config["summary"]["skipped_steps"] == 2
    assert "2 steps skipped" in capsys.readouterr().out
    assert "2 steps overflowed float16" in (place / "skips" / "report.html").read_text()
    bad |= set(range(5, 5 + PATIENCE - 2))
    status, config = finetune(place, "stops", "--dtype", "float16")
    err = capsys.readouterr().err
    assert status == 2 and "step 4: " in err and "--dtype bfloat16" in err
    assert "skipped" not in config and config["stopped"] in err


def decoder(place, name, factor, *tensors):
    """A tiny Llama with some of its weights multiplied; returns a function that finetunes it."""
    from helpers.tiny import write_llama, write_meanings
    from safetensors.numpy import load_file, save_file

    from adapters_jax.finetune.cli.main import main

    path = write_llama(place / name) / "model.safetensors"
    found = load_file(path)
    scaled = {k: x * np.float32(factor) if k.endswith(tensors) else x for k, x in found.items()}
    assert sum(scaled[k] is not found[k] for k in found) >= len(tensors)
    save_file(scaled, path, {"format": "pt"})
    rows = write_meanings(place / "meals.csv", rows=64)

    def run(dtype, epochs=3):
        flags = ["--model", place / name, "--train", rows, "--prompt", "mr", "--completion", "ref"]
        flags += ["--max-length", 16, "--method", "lora", "--rank", 2, "--no-chat"]
        flags += ["--alpha", 2, "--targets", "**/{query,value}"]
        flags += ["--epochs", epochs, "--batch-size", 8, "--learning-rate", 0.05]
        flags += ["--exact-match", 0, "--no-baselines", "--evaluations", 1]
        flags += ["--dtype", dtype, "--runs", place / "runs", "--name", f"{name}-{dtype}"]
        status = main(["finetune", *map(str, flags)])
        directory = place / "runs" / f"{name}-{dtype}"
        return status, json.loads((directory / "config.json").read_text()), directory

    return run


@pytest.mark.weekly
def test_a_decoder_learns_in_float16_what_it_learns_in_float32(tmp_path, capsys):
    run = decoder(tmp_path, "llama", 1.0, "norm.weight")
    (_, _, full), (status, config, half) = run("float32"), run("float16")
    assert status == 0 and "skipped_steps" not in config["summary"]
    found, expected = losses_of(half), losses_of(full)
    assert expected[-1] < 0.95 * expected[0] and found != expected
    np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.slow
def test_a_decoders_overflows_are_skipped_counted_and_shown(tmp_path, capsys):
    run = decoder(tmp_path, "steep", 1000.0, "embed_tokens.weight")  # which is the head's, too
    status, config, directory = run("float16")
    skipped = config["summary"]["skipped_steps"]
    assert status == 0 and 0 < skipped < PATIENCE
    assert f"{skipped} steps skipped" in capsys.readouterr().out
    assert f"{skipped} steps overflowed float16" in (directory / "report.html").read_text()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("skipped", 0) for row in rows) == skipped
    assert np.isfinite(losses_of(directory)).all()


@pytest.mark.slow
def test_a_decoder_whose_steps_are_not_finite_stops_with_the_cause(tmp_path, monkeypatch, capsys):
    from adapters_jax.finetune.tasks.completion_problem import CompletionProblem

    rows, bad = CompletionProblem.batch, set(range(2, 2 + PATIENCE))

    def poisoned(self, step):
        batch = rows(self, step)
        return {**batch, "weight": batch["weight"] * np.float32("nan" if step in bad else 1)}

    monkeypatch.setattr(CompletionProblem, "batch", poisoned)
    status, config, _ = decoder(tmp_path, "bad", 1.0, "norm.weight")("float16", epochs=5)
    err = capsys.readouterr().err
    assert status == 2 and "step 3: " in err and "--dtype bfloat16" in err
    assert config["stopped"] in err and "summary" not in config


@pytest.mark.slow
def test_a_decoder_whose_activations_overflow_stops_with_the_cause(tmp_path, capsys):
    run = decoder(tmp_path, "large", 1000.0, "gate_proj.weight", "up_proj.weight")
    status, config, _ = run("float16")
    err = capsys.readouterr().err
    assert status == 2 and "the loss on dev is not finite" in err and "--dtype bfloat16" in err
    assert config["stopped"] in err and "summary" not in config
