"""The defaults of a training: the passes over few rows, and the rate of wide bottlenecks."""

import math
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from helpers.errors import raises
from helpers.tiny import (
    BAD,
    FILLER,
    GOOD,
    write_llama,
    write_meanings,
    write_model,
    write_reviews,
)

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.compare.grid import read_candidate
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.config import read_options
from adapters_jax.finetune.runs.prepare import prepare_run, resume_run
from adapters_jax.finetune.tasks.base import TrainedHead, Untrained
from adapters_jax.trees import flatten


@pytest.mark.parametrize(
    ("epochs", "least", "epoch", "enough"),
    [
        (3.0, 340, 29, 12.0),  # 900 rows: 11 epochs would be 319 steps
        (3.0, 340, 113, 4.0),  # 339 steps in 3 epochs
        (1.5, 340, 227, 1.5),
        (3.0, 340, 17, 20.0),  # 340 steps, the fewest rows that reach them
        (3.0, 340, 4, 20.0),
        (30.0, 340, 4, 30.0),
        (3.0, 0, 1, 3.0),
    ],
)
def test_few_rows_are_seen_more_often_and_at_most_20_times(epochs, least, epoch, enough):
    options = OptimizerOptions(epochs=epochs)
    assert options.of_few_rows(least, epoch) == replace(options, epochs=enough)


@pytest.mark.parametrize(
    ("method", "m", "rate"),
    [
        ("houlsby", None, 2e-3),
        ("houlsby", 8, 2e-3),
        ("houlsby", 64, 2e-3),
        ("houlsby", 256, 1e-3),
        ("pfeiffer", 128, 2e-3 / math.sqrt(2)),
    ],
)
def test_wide_bottlenecks_have_a_lower_rate(method, m, rate):
    assert MethodOptions(method, bottleneck_dim=m).learning_rate == pytest.approx(rate, rel=1e-12)
    text = method if m is None else f"{method} --bottleneck-dim {m}"
    assert read_candidate(text).learning_rates == pytest.approx([rate], rel=1e-12)
    assert read_candidate(f"{text} --learning-rates 0.5").learning_rates == (0.5,)


def test_a_lora_plus_of_1_which_older_runs_store_is_none():
    params = {"query": {"lora": {"a": jnp.ones(1), "b": jnp.ones(1)}, "bias": jnp.ones(1)}}
    for recipe in (aj.LoRA("query", 1), aj.Unfreeze("query/bias")):
        none, one = (
            OptimizerOptions(1e-3, lora_plus=ratio).make(2, aj.Recipe(recipe)).init(params)
            for ratio in (None, 1.0)
        )
        assert jax.tree.structure(one) == jax.tree.structure(none)


def test_no_bias_decays_whatever_its_name():
    recipe = aj.Recipe(aj.Compacter("layer", 8, shared_rule=False))
    model = aj.adapt(nn.Dense(8, name="layer"), aj.Compacter("**", 8, shared_rule=False))
    base = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    params = aj.init_adapters(model, base, jax.random.key(1), jnp.ones((1, 8)))
    own = {"layer": {"compacter": jax.tree.map(jnp.ones_like, params["compacter"])}}
    tx = OptimizerOptions(0.5, weight_decay=0.1, warmup=0.0, clip=0.0).make(1, recipe)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, own), tx.init(own), own)
    decayed = {path.rpartition("/")[2] for path, x in flatten(updates).items() if x.any()}
    assert decayed and decayed == {*params["compacter"]} - {"down_bias", "up_bias"}


def test_lora_plus_is_for_every_b_that_trains():
    def pair():
        return {"a": jnp.ones(1), "b": jnp.ones(1)}

    experts = {"lora": {"up": pair(), "down": pair()}}
    params = {"query": {"lora": pair(), "lora_old": pair()}, "experts": experts}
    old = aj.LoRA("query", 1, name="old", train=False)
    recipe = aj.Recipe(aj.LoRA(("query", "experts/*"), 1), old)
    options = OptimizerOptions(0.5, lora_plus=4.0, optimizer="sgd", warmup=0.0, clip=0.0)
    tx = options.make(1, recipe)
    updates = flatten(tx.update(params, tx.init(params), params)[0])
    frozen = {f"query/lora_old/{name}" for name in "ab"}
    rates = {path: 2.0 if path.endswith("/b") else 0.5 for path in updates}
    assert {p: -float(x[0]) for p, x in updates.items()} == rates | dict.fromkeys(frozen, 0.0)


@pytest.mark.witness(
    "tiny-flags0-houlsby-0.002", "llama-flags2-lora-0.013", "llama-flags5-None-0.013"
)
@pytest.mark.parametrize(
    ("model", "flags", "method", "rate"),
    [
        ("tiny", [], "houlsby", 2e-3),
        ("llama", [], "lora", 0.013),  # 5e-4 (2000 / 32)^0.781
        ("llama", ["--method", "lora", "--rank", "4", "--targets", "**/mlp/*"], "lora", 0.013),
        ("llama", ["--learning-rate", "0.5"], "lora", 0.5),
        ("llama", ["--method", "houlsby"], "houlsby", 2e-3),
        ("llama", ["--recipe", "{}/mine.json", "--optimizer", "lion"], None, 0.013),
    ],
)
def test_a_decoder_gets_lora_on_all_linear_layers_at_the_rate_of_its_width(
    tmp_path, model, flags, method, rate, capsys
):
    if model == "tiny":
        write_model(tmp_path / "tiny")
        rows = ["--train", str(tmp_path / "rows.jsonl"), "--text", "review"]
        write_reviews(tmp_path / "rows.jsonl")
    else:
        write_llama(tmp_path / "llama", num_hidden_layers=1)
        rows = ["--train", str(tmp_path / "rows.csv"), "--prompt", "mr", "--completion", "ref"]
        write_meanings(tmp_path / "rows.csv")
    (tmp_path / "mine.json").write_text(aj.Recipe(aj.LoRA("**/query", 2)).to_json())
    flags = [flag.format(tmp_path) for flag in flags]
    words = [*rows, "--model", str(tmp_path / model), "--runs", str(tmp_path / "runs"), *flags]
    job = parse(Finetune, words).prepare(Console(json=False))
    stored = job.run.read_config()
    assert ("rate 0.013 is one for adamw" in capsys.readouterr().out) == ("lion" in flags)
    assert stored["optimizer"]["learning_rate"] == job.optimizer.learning_rate == rate
    assert stored["options"]["method"]["method"] == method
    if method == "lora":
        (lora,) = job.problem.recipe
        narrow = "--targets" in flags
        assert (lora.rank, lora.alpha) == (4 if narrow else 16, 32.0)
        adapted = {entry.path.split("/", 2)[2] for entry in aj.audit(job.problem.model).entries}
        names = {"mlp/gate", "mlp/up", "mlp/output"}
        attention = {f"attention/{name}" for name in ("query", "key", "value", "output")}
        assert adapted == names if narrow else adapted == names | attention
    job.run.unlock(job.lock)


def test_a_method_that_older_runs_store_beside_a_recipe_is_none(tmp_path):
    stored = {"options": {"method": {"method": "houlsby", "recipe": "mine.json"}}}
    assert read_options(Run(tmp_path), stored).method == MethodOptions(recipe=Path("mine.json"))


@pytest.fixture
def prepared(tmp_path, capsys):
    """Prepares a run with options, without a step; returns its job and what it printed."""
    write_model(tmp_path / "tiny")
    write_reviews(tmp_path / "reviews.jsonl")
    data = DataOptions(train=(tmp_path / "reviews.jsonl",), text="review")

    def prepare(**options):
        mine = {"model": str(tmp_path / "tiny"), "data": data, "max_length": 8, **options}
        run = Run(tmp_path / "run")
        job = prepare_run(RunOptions(**mine), run, Console(json=False), time.perf_counter())
        return job, capsys.readouterr().out

    return prepare


def test_a_run_says_how_often_it_sees_few_rows_and_records_it(prepared):
    job, printed = prepared(optimizer=OptimizerOptions(batch_size=16))
    steps, rows = len(job.problem.train), job.config["rows"]["train"]
    passes = math.ceil(340 / steps)
    assert 3 < passes < 20
    assert f"{passes} epochs, so that {rows} rows make {passes * steps} steps" in printed
    assert job.optimizer.epochs == job.config["optimizer"]["epochs"] == passes
    assert job.config["options"]["optimizer"]["epochs"] is None  # as it was asked for


@pytest.mark.slow
@pytest.mark.witness("options1-20.0", "options2-3.0")
@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"optimizer": OptimizerOptions(batch_size=16, epochs=1.5)}, 1.5),
        ({"method": MethodOptions("head-only")}, 20.0),
        ({"budget": "9h"}, 3.0),  # before the steps are measured
    ],
)
def test_epochs_that_were_asked_for_are_taken_as_they_are(prepared, options, epochs):
    job, printed = prepared(**options)
    assert job.optimizer.epochs == epochs
    assert "so that" not in printed


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_defaults_that_it_began_with(prepared):
    wide = {"method": MethodOptions("houlsby", bottleneck_dim=256)}
    job, _ = prepared(**wide)
    before = {**job.config["optimizer"], "epochs": 3.0, "learning_rate": 2e-3}
    job.run.create({**job.config, "optimizer": before})
    again = resume_run(job.run, job.console, time.perf_counter())
    assert again.config["optimizer"] == before
    assert (again.optimizer.epochs, again.optimizer.learning_rate) == (3.0, 2e-3)
    job.run.unlock(again.lock)


@pytest.mark.witness("damage0")
@pytest.mark.parametrize("damage", [{"epochs": "two"}, None])
def test_a_run_whose_passes_cannot_be_read_does_not_go_on(prepared, damage):
    job, _ = prepared()
    job.run.create({**job.config, "optimizer": damage and {**job.config["optimizer"], **damage}})
    with raises(RunError, job.run.config, "optimizer"):
        resume_run(job.run, job.console, time.perf_counter())


@pytest.mark.slow
def test_a_wide_bottleneck_trains_at_its_own_rate_unless_flags_say_so(prepared):
    wide = MethodOptions("houlsby", bottleneck_dim=256)
    assert prepared(method=wide)[0].config["optimizer"]["learning_rate"] == 1e-3
    asked = OptimizerOptions(learning_rate=0.5)
    assert prepared(method=wide, optimizer=asked)[0].optimizer.learning_rate == 0.5


def test_a_run_makes_as_many_steps_as_asked(prepared):
    job, _ = prepared(optimizer=OptimizerOptions(max_steps=7, evaluations=1))
    epoch = len(job.problem.train)
    assert job.optimizer.steps(epoch) == 7 != epoch
    assert max(job.optimizer.marks(epoch, job.problem.recipe)) == 7
    assert job.options.optimizer.epochs == 7 / epoch
    with raises(UserError, "--max-steps 7", "--epochs 2"):
        prepared(optimizer=OptimizerOptions(max_steps=7, epochs=2.0))


def test_the_head_of_the_baseline_sees_few_rows_as_often(prepared, tmp_path):
    rows = [f"{word} B-word\n{filler} O\n" for word in GOOD + BAD for filler in FILLER]
    (tmp_path / "rows.conll").write_text("\n".join(rows))
    job, _ = prepared(data=DataOptions(train=(tmp_path / "rows.conll",)))
    assert job.config["task_type"] == "token-classification"
    constant, head = job.prepared.baselines()
    assert isinstance(constant, Untrained)
    assert isinstance(head, TrainedHead)
    assert job._of_head(head).epochs == job.optimizer.epochs == 20.0
    assert job._of_head(replace(head, least_steps=0)).epochs == 3.0
    assert job._passes(head) == 20.0
    assert job._passes(constant) == 0.0  # the model computes nothing for it
