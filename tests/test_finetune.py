"""`adapters-jax finetune` on a tiny model: its results, its files, and its seeds."""

import contextlib
import io
import json
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.commands import announced, command_raises
from helpers.errors import raises
from helpers.labelled import load_labelled
from helpers.tiny import write_model, write_reviews
from safetensors.numpy import load_file

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.method import PRESETS, MethodName, MethodOptions
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.report.findings import read_findings
from adapters_jax.finetune.run_directory import Run, run_name
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.runs.stopping import StoppedError
from adapters_jax.finetune.tasks.base import in_row_order
from adapters_jax.finetune.tasks.classification import Classes
from adapters_jax.finetune.tasks.labelled_problem import FeatureBatches, Head, LabelledProblem
from adapters_jax.finetune.tasks.metrics import compute
from adapters_jax.trees import flatten


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a model and a file of reviews."""
    directory = tmp_path_factory.mktemp("finetune")
    write_model(directory / "tiny")
    write_reviews(directory / "reviews.jsonl")
    return directory


def finetune(directory, *flags):
    """A run's status, its summary, its directory, and its stderr."""
    files = [
        "--model",
        directory / "tiny",
        "--train",
        directory / "reviews.jsonl",
        "--runs",
        directory,
    ]
    rows = ["--text", "review", "--max-length", 8, "--batch-size", 16, "--learning-rate", 0.01]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["finetune", *map(str, [*files, *rows, "--json", *flags])])
    summary = json.loads(out.getvalue()) if status == 0 else None
    path = directory / (flags[flags.index("--name") + 1] if "--name" in flags else "none")
    return status, summary, Run(path), err.getvalue()


@pytest.fixture(scope="module")
def houlsby(directory):
    """A finished run with its baselines."""
    flags = ("--epochs", 8, "--bottleneck-dim", 8, "--evaluations", 2)
    return finetune(directory, *flags, "--name", "houlsby")


def test_it_learns_what_a_constant_cannot(houlsby):
    status, summary, _, _ = houlsby
    assert status == 0
    rows = {row["method"]: row for row in summary["results"]}
    assert list(rows) == ["majority class", "head-only", "houlsby"]
    assert rows["majority class"]["test"]["accuracy"] == 0.5
    assert rows["houlsby"]["test"]["accuracy"] > 0.9, rows
    assert rows["houlsby"]["dev"] == summary["dev"]


@pytest.mark.weekly
def test_what_follows_the_last_step_is_announced(directory, monkeypatch):
    texts = announced(monkeypatch)
    assert finetune(directory, "--epochs", 1, "--no-baselines", "--name", "announced")[0] == 0
    assert texts == [
        "scoring the test rows",
        "predicting the rows of the report",
        "writing the report",
    ]


def test_it_says_which_step_is_kept(houlsby):
    _, summary, run, err = houlsby
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    last = max(r["step"] for r in records if r["method"] == "houlsby")
    best = f"{100 * summary['dev']['accuracy']:.1f} %"
    data = (f"step {summary['best_step']} of {last} ", f"(accuracy {best})", str(run.report))
    assert summary["best_step"] < last
    assert all(each in err.splitlines()[-1] for each in data), err


def test_trainable_parameters_are_exact(houlsby):
    _, summary, run, _ = houlsby
    adapters = 2 * aj.bottleneck_parameters(32, 8)
    norms, head = 3 * 2 * 32, 32 * 2 + 2
    assert summary["trainable_parameters"] == adapters + norms + head
    trainable = [row["trainable_parameters"] for row in summary["results"]]
    assert trainable == [0, head, adapters + norms + head]
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["parameters"] == adapters + norms + head


def test_every_file_is_there(houlsby):
    _, summary, run, printed = houlsby
    names = ["adapter", "config.json", "curves.png", "findings.json", "metrics.jsonl"]
    names.append("report.html")
    assert sorted(path.name for path in run.path.iterdir()) == names
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    config = json.loads(run.config.read_text())
    assert config["target"]["names"] == ["no", "yes"]
    assert config["summary"] == summary
    assert config["optimizer"]["epochs"] == 8
    assert config["versions"]["jax"] == version("jax")
    assert aj.Recipe.from_json(config["recipe"]) == aj.houlsby(8, head="head")
    judged = read_findings(run).judged
    hits = np.equal(judged.column("test", "gold"), judged.column("test", "predicted"))
    assert hits.mean() == summary["results"][-1]["test"]["accuracy"]
    assert "F1 is that of the class yes, the positive one." in printed
    assert "bert/layer_0/attention/output" in printed
    assert "head-only" in printed and "features  compiling" in printed


def test_metrics_have_every_step_and_evaluation(houlsby):
    _, summary, run, _ = houlsby
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    ours = [r for r in records if r["method"] == "houlsby"]
    steps = 8 * -(-384 // 16)
    assert [r["step"] for r in ours if "loss" in r] == list(range(1, steps + 1))
    assert [r["step"] for r in ours if "dev" in r] == list(range(12, steps + 1, 12))
    best = max(r["dev"]["accuracy"] for r in ours if "dev" in r)
    first = next(r for r in ours if "dev" in r and r["dev"]["accuracy"] == best)
    assert (first["step"], first["dev"]) == (summary["best_step"], summary["dev"])
    assert ours[-1]["test"] == summary["results"][-1]["test"]
    losses = [r["loss"] for r in ours if "loss" in r]
    assert np.mean(losses[-6:]) < 0.5 * np.mean(losses[:6])
    rates = [r["learning_rate"] for r in ours if "loss" in r]
    assert max(rates) == pytest.approx(0.01)
    assert rates[0] < rates[3] > rates[-1] > 0


def test_a_saved_run_predicts_what_it_was_evaluated_at(houlsby, directory):
    _, summary, run, _ = houlsby
    task = load_labelled(directory / "reviews.jsonl", text="review")
    found = load_predictor(run.path).predict(task.test.texts)
    ids = [task.test.label_names.index(prediction.label) for prediction in found]
    assert compute(task.metrics, ids, task.test.labels) == summary["results"][-1]["test"]
    assert all(sum(p.probabilities.values()) == pytest.approx(1) for p in found)
    assert all(p.label == max(p.probabilities, key=p.probabilities.get) for p in found)


@pytest.mark.slow
def test_a_seed_decides_everything(directory):
    flags = ("--epochs", 1, "--no-baselines", "--limit", 64)
    runs = [
        finetune(directory, *flags, "--name", f"seed{i}", "--seed", seed)[2]
        for i, seed in enumerate((1, 1))  # the next test has two
    ]
    one, other = (load_file(run.adapter / "adapter.safetensors") for run in runs)
    assert all((one[k] == other[k]).all() for k in one)
    assert runs[0].metrics.read_text() == runs[1].metrics.read_text()


@pytest.mark.slow
def test_a_seed_draws_the_head_the_adapters_and_the_order(directory):
    trees, orders = [], []
    for seed in (0, 1):
        data = DataOptions((directory / "reviews.jsonl",), text="review")
        options = Finetune(str(directory / "tiny"), data, max_length=8, seed=seed, runs=directory)
        problem = replace(options, name=f"draw{seed}").prepare(Console(json=True)).problem
        trees.append(flatten(aj.partition(problem.params, problem.model.recipe)[0]))
        orders.append(problem.batch(0)["input_ids"])
    drawn = [p for p in trees[0] if p.endswith("kernel")]
    assert len(drawn) == 5
    assert all((trees[0][p] != trees[1][p]).all() for p in drawn)
    assert (orders[0] != orders[1]).any()


def test_a_run_saves_the_leaves_of_vera_that_do_not_train(directory):
    data = DataOptions((directory / "reviews.jsonl",), text="review")
    method = MethodOptions("vera", rank=4)
    model, place = str(directory / "tiny"), {"runs": directory, "name": "vera"}
    job = Finetune(model, data, method=method, **place).prepare(Console(json=True))
    problem = job.problem
    key, tx = jax.random.key(0), optax.sgd(0.1)
    job.save(aj.TrainState.create(problem.model, problem.params, tx=tx, key=key))
    assert job.config["ways_out"]["peft"].startswith("yes")
    leaves = aj.read_adapter(job.run.adapter)[1]
    np.testing.assert_array_equal(leaves["vera/left"], problem.params["vera"]["left"])


@pytest.mark.weekly
def test_numbers_are_learnt_and_predicted_on_their_own_scale(directory):
    flags = ("--task", "regression", "--label", "stars", "--text-pair", "topic")
    lora = ("--method", "lora", "--rank", 4, "--epochs", 12, "--max-length", 12)
    lora += ("--evaluations", 1)
    status, summary, run, _ = finetune(directory, *flags, *lora, "--name", "stars")
    assert status == 0
    mean, _, lora = summary["results"]
    assert (mean["method"], mean["test"]) == ("mean", {"pearson": 0.0, "spearman": 0.0})
    assert lora["test"]["pearson"] > 0.9
    assert lora["trainable_parameters"] == 2 * aj.lora_parameters(32, 32, 4) + 33
    predictor = load_predictor(run.path)
    low, high = predictor.predict([("the film was bad", "a"), ("the film was good", "a")])
    assert low.value == pytest.approx(100.5, abs=6)
    assert high.value == pytest.approx(120.5, abs=6)


@pytest.mark.weekly
@pytest.mark.parametrize("flags", [("--method", "head-only"), ("--dtype", "bfloat16")])
def test_other_ways_to_train_save_what_predicts(directory, flags):
    name = flags[1]
    status, summary, run, printed = finetune(
        directory, *flags, "--name", name, "--epochs", 2, "--no-baselines"
    )
    assert status == 0, printed
    assert [row["method"] for row in summary["results"]] == [flags[1].replace(*_HOULSBY)]
    predictor = load_predictor(run.path)
    frozen = predictor.params["bert"]["embeddings"]["word"]["embedding"].dtype
    assert frozen == ("bfloat16" if name == "bfloat16" else "float32")
    trained = jax.tree.leaves(aj.partition(predictor.params, predictor.model.recipe)[0])
    assert {leaf.dtype for leaf in trained} == {jnp.dtype("float32")}
    task = load_labelled(directory / "reviews.jsonl", text="review")
    ids = [task.test.label_names.index(p.label) for p in predictor.predict(task.test.texts)]
    assert compute(task.metrics, ids, task.test.labels) == summary["results"][-1]["test"]


_HOULSBY = ("bfloat16", "houlsby")


def test_a_kernel_that_the_device_does_not_have(directory):
    with command_raises(UserError, "flash", "cpu", "auto"):
        finetune(directory, "--attention", "flash", "--name", "flash")
    assert not (directory / "flash").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(directory):
    flags = ("--learning-rate", 1e30, "--clip", 0, "--name", "diverged", "--no-baselines")
    with command_raises(StoppedError, "step ", directory / "diverged", "--learning-rate", "1e+30"):
        status, _, run, printed = finetune(directory, *flags)
    assert status == 2
    last = printed.strip().splitlines()[-1]
    assert last.startswith("adapters-jax finetune: ")
    recipe, tensors = aj.read_adapter(run.adapter)
    assert recipe == aj.houlsby(head="head")
    assert all(np.abs(x).max() < 2 for x in tensors.values())
    assert json.loads(run.config.read_text())["stopped"] in last
    assert not run.report.exists()


@pytest.mark.slow
def test_the_best_adapter_outlives_a_loss_that_is_not_finite(directory, monkeypatch):
    rows = LabelledProblem.batch

    def poisoned(self, step):
        batch = rows(self, step)
        return {**batch, "weight": batch["weight"] * np.float32("nan" if step == 13 else 1)}

    monkeypatch.setattr(LabelledProblem, "batch", poisoned)
    flags = ("--method", "head-only", "--epochs", 2, "--limit", 160, "--no-baselines")
    with command_raises(StoppedError, "step 14:"):
        _, _, run, _ = finetune(directory, *flags, "--name", "poisoned")
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    scored = {r["step"]: r["dev"]["accuracy"] for r in records if "dev" in r}
    # Step 15 was made before the loss of step 14 was read.
    assert sorted(scored) == [5, 10, 15]
    task = load_labelled(directory / "reviews.jsonl", text="review")
    found = load_predictor(run.path).predict(task.dev.texts)
    ids = [task.dev.label_names.index(prediction.label) for prediction in found]
    assert compute(["accuracy"], ids, task.dev.labels)["accuracy"] == max(scored.values())


@pytest.mark.weekly
def test_accumulation_is_the_same_training(directory):
    adapters = []
    for parts in (1, 4):
        name, some = f"parts{parts}", ("--epochs", 2, "--no-baselines", "--limit", 40)
        flags = ("--method", "head-only", "--accumulate", parts)
        _, _, run, _ = finetune(directory, *flags, *some, "--name", name)
        adapters.append(load_file(run.adapter / "adapter.safetensors"))
    for path, tensor in adapters[0].items():
        np.testing.assert_allclose(adapters[1][path], tensor, atol=1e-6, err_msg=path)


def test_recipes_come_from_flags_or_a_file(tmp_path):
    assert MethodOptions("pfeiffer", reduction_factor=16.0).build(head="head") == aj.pfeiffer(
        reduction_factor=16.0, head="head"
    )
    patterned = MethodOptions("lora", rank_pattern={"layer_0/**": 2}, adapter_dropout=0.1)
    assert patterned.build() == aj.lora(dropout=0.1, rank_pattern={"layer_0/**": 2})
    assert MethodOptions("last-layers").build(layers={"**/layer_{}": 12}) == aj.last_layers(2, 12)
    assert MethodOptions("houlsby", layer_norms="").build() == aj.houlsby(layer_norms=None)
    path = tmp_path / "mine.json"
    path.write_text(aj.lora(4).to_json())
    assert MethodOptions(recipe=path).build() == aj.lora(4)
    assert MethodOptions(recipe=path).build(head="head") == aj.lora(4, head="head")
    path.write_text(aj.full().to_json())
    assert MethodOptions(recipe=path).build(head="head") == aj.full()


def test_every_preset_is_a_method():
    assert get_args(MethodName) == tuple(PRESETS)


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_counts_its_head_once(method):
    recipe = MethodOptions(method).build(head="head", layers={"**/layer_{}": 2})
    assert recipe.trains("head/kernel")


def test_the_schedule_rises_and_falls():
    schedule = OptimizerOptions(warmup=0.25).rates(8, 1.0)
    rates = [float(schedule(step)) for step in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert float(OptimizerOptions(warmup=0.0).rates(2, 1.0)(0)) == 1.0
    for name, last in (("cosine", [1, 0.75, 0.25]), ("constant", [1, 1, 1])):
        schedule = OptimizerOptions(warmup=0.4, schedule=name).rates(5, 1.0)
        assert [float(schedule(step)) for step in (2, 3, 4)] == pytest.approx(last)


@pytest.mark.parametrize("name", ["lion", "adadelta", "sgd", "nadam"])
def test_an_optimiser_of_optax_by_its_name(name):
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    grads = {"dense": {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.full(3, 0.5)}}
    flat = {"warmup": 0.0, "schedule": "constant", "clip": 0.0, "learning_rate": 0.1}
    decay, mask = {}, {"dense": {"kernel": True, "bias": False}}
    if name in ("lion", "adadelta"):
        decay = {"mask" if name == "lion" else "weight_decay_mask": mask, "weight_decay": 0.5}
    ours = OptimizerOptions(optimizer=name, **flat, **{"weight_decay": 0.5} if decay else {})
    theirs = getattr(optax, name)(0.1, **decay)
    found = [
        tx.update(grads, tx.init(params), params)[0] for tx in (ours.make(4, aj.full()), theirs)
    ]
    jax.tree.map(np.testing.assert_allclose, *found)


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        ({"optimizer": "adamv"}, ["adamv", "Did you mean adam?"]),
        ({"optimizer": "scale_by_adam"}, ["scale_by_adam"]),
        ({"optimizer": "Paged"}, ["Paged", "lion"]),
        ({"optimizer": "lbfgs"}, ["lbfgs", "more than gradients"]),
        ({"optimizer": "rprop"}, ["rprop", "learning rate by step"]),
        ({"optimizer": "sm3"}, ["sm3", "learning rate by step"]),
        ({"optimizer": "sgd", "weight_decay": 0.1}, ["--weight-decay", "sgd"]),
    ],
)
def test_an_optimiser_that_cannot_train_is_refused(flags, data):
    with raises(UserError, *data):
        OptimizerOptions(**flags).check()


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-2), ("full", 1e-3), ("head-only", 0.1)])
def test_the_head_has_a_rate_of_its_own(method, rate):
    assert OptimizerOptions(learning_rate=0.1).of(method).head_learning_rate == rate
    assert OptimizerOptions(head_learning_rate=0.3).of(method).head_learning_rate == 0.3


def test_glue_tasks_name_their_own_columns():
    task = DataOptions(glue="STS-B").task_on("encoder", "minilm")
    assert task.name == "regression"
    columns = DataOptions(glue="STS-B").columns_of(task)
    assert columns == {"text": "sentence1", "text_pair": "sentence2"}
    assert DataOptions(glue="STS-B").title == "stsb"
    assert DataOptions(text="a", text_pair="b").columns_of(task) == {"text": "a", "text_pair": "b"}


def test_epochs_may_be_a_fraction():
    options, recipe = OptimizerOptions(epochs=1.5, evaluations=2), aj.full()
    assert (options.steps(100), options.marks(100, recipe)) == (150, {50, 100, 150})
    short = OptimizerOptions(epochs=0.001)
    assert (short.steps(10), short.marks(10, recipe)) == (1, {1})


def test_dev_is_scored_once_the_ranks_of_adalora_stay():
    options = OptimizerOptions(epochs=2.0, evaluations=5)
    recipe = aj.Recipe(aj.AdaLoRA("**/query", rank=4))
    assert options.marks(50, recipe) == {70, 80, 90, 100}  # of every tenth of 100 steps


def test_patience_counts_the_evaluations_in_a_row_that_were_not_the_best():
    problem, state = SimpleNamespace(metrics=("accuracy",)), SimpleNamespace(adapters=None)
    training = Training(problem, OptimizerOptions(patience=2), state, None, 100, set())
    training.log = SimpleNamespace(flush=list)
    left = []
    for training.step, accuracy in ((10, 0.5), (20, 0.4), (30, 0.6), (40, 0.6), (50, 0.1)):
        training._consider(training.step, {"accuracy": accuracy})
        left.append(training.left)
    assert left == [True, True, True, True, False]
    assert training.best_step == 30 and training.impatient
    training.step = training.steps  # the last one ends it in any case
    assert not training.left and not training.impatient
    training.due = True  # a step that is made is scored
    assert training.left


@pytest.mark.weekly
def test_a_run_ends_when_its_patience_does(directory):
    flags = ["--epochs", 6, "--evaluations", 1, "--patience", 2]
    flags += ["--learning-rate", 1e-9, "--head-learning-rate", 1e-9]
    _, summary, run, err = finetune(directory, *flags, "--no-baselines", "--name", "patience")
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    scored = [record["step"] for record in records if "dev" in record]
    assert len(scored) == 3
    assert summary["best_step"] == scored[0]
    assert summary["ended_after_step"] == scored[2]
    assert f"ended after step {scored[2]}, since --patience ran out" in err


def test_decay_leaves_biases_and_norms_alone():
    params = {
        "a": {"bias": 1.0},
        "b": {"scale": 1.0},
        "c": {"kernel": 1.0},
        "head": {"kernel": 1.0},
    }
    params = jax.tree.map(jnp.asarray, params)
    options = OptimizerOptions(0.1, 0.2, weight_decay=0.5, warmup=0.0)
    tx = options.make(10, aj.full())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = [float(-leaf) for leaf in jax.tree.leaves(updates)]
    assert moved == pytest.approx([0.0, 0.0, 0.05, 0.1])


def test_feature_batches_show_every_row_once_an_epoch():
    rows = np.arange(10, dtype=np.float32)[:, None]
    batches = FeatureBatches(rows, np.arange(10), 4, seed=3)
    epochs = []
    for epoch in range(2):
        seen = [batches[3 * epoch + i] for i in range(3)]
        kept = np.concatenate([batch["labels"][batch["weight"] > 0] for batch in seen])
        assert sorted(kept.tolist()) == list(range(10))
        assert all((b["features"][:, 0] == b["labels"]).all() for b in seen)
        epochs.append(kept.tolist())
    assert epochs[0] != epochs[1]
    np.testing.assert_array_equal(batches[4]["features"], batches[4]["features"])


@pytest.mark.slow
def test_filler_rows_do_not_count():
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1], np.int32)
    model, classes = aj.adapt(Head(2), aj.full()), Classes(("no", "yes"))
    params = model.init(jax.random.key(0), rows)["params"]
    batches = FeatureBatches(rows, labels, 4, seed=None)
    problem = LabelledProblem(model, params, ("features",), classes, batches, {}, {}, ())
    losses = classes.losses(model.apply({"params": params}, rows), {"labels": labels})
    for step, part in enumerate((slice(0, 4), slice(4, 5))):
        loss = problem.loss(params, problem.batch(step), jax.random.key(0))
        assert float(loss) == pytest.approx(float(losses[part].mean()), rel=1e-5)


def test_outputs_go_back_to_their_rows():
    batches = [
        {"index": np.array([2, 0]), "x": np.array([[2.0], [0.0]])},
        {"index": np.array([1, -1]), "x": np.array([[1.0], [9.0]])},
    ]
    assert in_row_order(lambda batch: batch["x"], batches).tolist() == [[0.0], [1.0], [2.0]]


def test_run_names_are_safe():
    assert run_name("google/bert", "rte", "lora") == "bert-rte-lora"
    assert run_name("../x y/", "a b", "..") == "x-y-a-b"
