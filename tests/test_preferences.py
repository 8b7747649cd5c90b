"""Preferences: a training by hand, and the runs that learn them."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.reports import Page
from helpers.tiny import FOODS, write_llama, write_model, write_reviews
from safetensors.numpy import load_file, save_file
from test_preference_rows import TINY, bot, user, write

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.stopping import InterruptedRunError
from adapters_jax.finetune.tasks.base import Setup
from adapters_jax.finetune.tasks.preference import PreferenceTask
from adapters_jax.finetune.tasks.preference_problem import Objective, PreferenceProblem, sides_of

LOSSES = ("dpo", "ipo", "orpo", "kto")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_pairs(rows=40):
    """The preferred answer names the food of the prompt, and the other one another."""
    found = []
    for i in range(rows):
        food, other = FOODS[i % 4], FOODS[(i + 1 + i // 4 % 3) % 4]
        answers = {"chosen": f"It serves {food} dishes", "rejected": f"It serves {other}"}
        found.append({"prompt": f"{'food ' * (1 + i // 4)}{food}", **answers})
    return write(*found, name="pairs.jsonl")


# Training


def prepared(loss, rows=8, lora=0.3, **settings):
    """A problem on a tiny Llama, whose LoRA is away from its start, with its reference."""
    if not Path("tiny").exists():
        write_llama(Path("tiny"), num_hidden_layers=1)
        write_pairs(rows)
    files = dict.fromkeys(("train", "dev", "test"), Path("pairs.jsonl"))
    task = PreferenceTask()
    setup = Setup(
        "tiny", lambda **_: aj.Recipe(aj.LoRA("**/{query,value}", 2)), 4, 0, {}, print,
        loss=loss, beta=0.3, max_length=24, **settings,
    )  # fmt: skip
    found = task.prepare(task.load(files, {}, ()), setup)
    draw = np.random.default_rng(1).normal
    state = nnx.state(found.problem.model, aj.nnx.AdapterParam)
    shaken = jax.tree.map(lambda x: jnp.asarray(draw(0, lora, x.shape), x.dtype), state)
    nnx.update(found.problem.model, shaken)
    for part in found.problem.parts:
        found.problem.reference[part] = found.problem.log_probs(found.problem.decoder.model, part)
    return found


def by_hand(model, batch):
    """The log-probabilities of both segments of each row, each read alone, from all logits."""
    columns = (batch[name] for name in ("input_ids", "segments", "labels"))
    rows = [
        [(ids[segments == each], labels[segments == each]) for each in (1, 2)]
        for ids, segments, labels in zip(*columns, strict=True)
    ]
    ids, labels = np.zeros((2, 2 * len(rows), 24), int)
    for i, (mine, own) in enumerate(pair for row in rows for pair in row):
        ids[i, : len(mine)], labels[i, : len(mine)] = mine, own  # padding after it, which none sees
        labels[i, len(mine) :] = -1
    chances = jax.nn.log_softmax(model(jnp.asarray(ids)))
    own = jnp.take_along_axis(chances, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(labels >= 0, own, 0.0).sum(1).reshape(-1, 2)


def formula(loss, beta, log_probs, batch):
    """The mean loss of a batch and its rewards, as the papers write them."""
    tokens, reference = batch["tokens"], batch.get("reference")
    log = jnp.log
    if loss == "orpo":
        means = log_probs / tokens
        odds = jnp.exp(means) / (1 - jnp.exp(means))
        ratio = odds[:, 0] / odds[:, 1]
        return (-means[:, 0] - beta * log(jax.nn.sigmoid(log(ratio)))).mean(), beta * means
    rewards = beta * (log_probs - reference)
    if loss == "dpo":
        return -log(jax.nn.sigmoid(rewards[:, 0] - rewards[:, 1])).mean(), rewards
    if loss == "ipo":
        gaps = (log_probs - reference) / tokens
        return ((gaps[:, 0] - gaps[:, 1] - 1 / (2 * beta)) ** 2).mean(), rewards
    point = jax.lax.stop_gradient(jnp.maximum(rewards[:, 1].mean(), 0))
    sign = 2 * batch["desirable"] - 1
    return (1 - jax.nn.sigmoid(sign * (rewards[:, 0] - point))).mean(), rewards[:, :1]


@pytest.mark.weekly
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_rewards_and_two_steps_are_those_by_hand(loss):
    problem = prepared(loss).problem
    state = aj.TrainState.create(problem.model, tx=optax.sgd(0.5), key=jax.random.key(0))
    graphdef, trained, rest = nnx.split(problem.model, aj.nnx.AdapterParam, ...)
    step = aj.make_train_step(problem.loss)
    for i in range(2):
        batch = problem.batch(i)

        def slow(trained, batch=batch):
            model = nnx.merge(graphdef, trained, rest)
            return formula(loss, 0.3, by_hand(model, batch), batch)

        (expected, rewards), grads = jax.jit(jax.value_and_grad(slow, has_aux=True))(trained)
        trained = jax.tree.map(lambda x, g: x - 0.5 * g, trained, grads)
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
        if loss == "kto":
            good = batch["desirable"] > 0
            high, low = rewards[good, 0], rewards[~good, 0]
            right = (high[:, None] > low[None]).mean()
        else:
            high, low = rewards.T
            right = (high > low).mean()
        exact = {"rewards_chosen": high.mean(), "rewards_rejected": low.mean(), "accuracy": right}
        exact["margin"] = exact["rewards_chosen"] - exact["rewards_rejected"]
        for name, value in exact.items():
            assert float(metrics[name]) == pytest.approx(float(value), abs=1e-5), name
        ours = jax.tree.leaves(nnx.to_pure_dict(state.adapters))
        theirs = jax.tree.leaves(nnx.to_pure_dict(trained))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_base_is_there_once_in_the_audit_the_plan_and_the_step():
    problem = prepared("dpo").problem
    base = sum(x.size for x in jax.tree.leaves(nnx.state(problem.decoder.model, nnx.Param)))
    counts = aj.audit(problem.model)
    assert counts.frozen_parameters == base
    state = aj.TrainState.create(problem.model, tx=optax.adam(0.1), key=jax.random.key(0))
    own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.base)}
    whole = jax.tree.leaves(nnx.state(problem.decoder.model, nnx.Param))
    assert own == {x.unsafe_buffer_pointer() for x in whole}
    batch = problem.batch(0)
    abstract = aj.abstract_state(problem.model, tx=optax.adam(0.1))
    mesh = aj.make_mesh({"data": 1}, jax.devices()[:1])
    planned = aj.plan(abstract, problem.loss, batch, mesh)
    assert planned.base == 4 * base
    step = aj.make_train_step(problem.loss)
    arguments = step.jitted.lower(state.replace(base=None), state.base, batch).compile()
    sizes = [x.nbytes for x in jax.tree.leaves((state.adapters, state.opt_state, batch))]
    read = arguments.memory_analysis().argument_size_in_bytes
    assert 4 * base < read < 4 * base + sum(sizes) + 64


def test_equal_rewards_are_half_right_and_absent_ones_are_left_out():
    problem = prepared("kto").problem
    rows = np.arange(4)
    batch = problem._columns("dev", rows, np.ones(4, np.float32))
    found = problem.objective.metrics(jnp.asarray(batch["reference"]), batch)
    assert (float(found["accuracy"]), float(found["margin"])) == (0.5, 0.0)
    only = {**batch, "sides": sides_of(np.ones(4), np.ones(4))}
    found = problem.objective.metrics(jnp.asarray(batch["reference"]), only)
    assert float(found["rewards_chosen"]) == 0.0
    assert all(np.isnan(found[name]) for name in ("rewards_rejected", "margin", "accuracy"))


def test_pairs_of_single_completions_are_counted_and_not_made():
    """Beside equal rewards and fillers; of a large part all pairs would take gigabytes."""
    objective, draw = Objective("kto", 0.5), np.random.default_rng(0)
    rows, n = draw.integers(0, 9, (40, 2)).astype(np.float32), 10_000
    batch = {"reference": rows * 0, "desirable": draw.integers(0, 2, 40).astype(np.float32)}
    batch["weight"] = draw.integers(0, 2, 40) * np.float32(1.6)
    batch["sides"] = sides_of(batch["desirable"], batch["weight"])
    good, counts = batch["desirable"] > 0, batch["weight"] > 0
    gaps = rows[good & counts, 0][:, None] - rows[~good & counts, 0]
    right = (0.5 + 0.5 * np.sign(gaps)).mean()
    found = objective.metrics(jnp.asarray(rows), batch)
    assert float(found["accuracy"]) == pytest.approx(right, rel=1e-6)
    many = {name: np.resize(x, (n, *x.shape[1:])) for name, x in batch.items()}
    made = jax.make_jaxpr(objective.metrics)(np.resize(rows, (n, 2)), many).eqns
    assert max(out.aval.size for each in made for out in each.outvars) < 4 * n


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo"])
def test_a_part_of_fillers_alone_leaves_the_metrics_of_its_batch(loss):
    """With --accumulate 2, one row of four is the first part's, and the second has none."""
    objective, draw = Objective(loss, 0.5), np.random.default_rng(0)
    rows, reference = draw.normal(size=(2, 4, 2)).astype(np.float32)
    tokens, weight = np.ones((4, 2), np.float32), np.float32([4, 0, 0, 0])
    whole = {"reference": reference, "tokens": tokens, "weight": weight}
    parts = [{k: x[part] for k, x in whole.items()} for part in (slice(2), slice(2, 4))]
    found = [
        objective.metrics(rows[i : i + 2], part) for i, part in zip((0, 2), parts, strict=True)
    ]
    expected = objective.metrics(rows, whole)
    for name in ("accuracy", "margin", "rewards_chosen", "rewards_rejected"):
        mean = np.mean([float(each[name]) for each in found])
        assert mean == pytest.approx(float(expected[name]), rel=1e-6), name


def test_rewards_of_single_completions_are_means_over_a_batch_and_not_over_its_parts():
    objective, draw = Objective("kto", 0.5), np.random.default_rng(0)
    rows, reference = draw.normal(size=(2, 4, 2)).astype(np.float32)
    good, weight = np.float32([1, 1, 1, 0]), np.ones(4, np.float32)  # none is bad in the first part
    batch = {"reference": reference, "weight": weight, "sides": sides_of(good, weight)}
    parts = [{k: x[part] for k, x in batch.items()} for part in (slice(2), slice(2, 4))]
    found = [objective.metrics(rows[:2], parts[0]), objective.metrics(rows[2:], parts[1])]
    own = 0.5 * (rows - reference)[:, 0]
    exact = {"rewards_chosen": own[:3].mean(), "rewards_rejected": own[3]}
    for name, value in {**exact, "margin": own[:3].mean() - own[3]}.items():
        assert np.mean([float(each[name]) for each in found]) == pytest.approx(value, rel=1e-5)
    whole, split = (prepared("kto", accumulate=n).problem for n in (1, 2))
    for problem, names in (whole, {"accuracy"}), (split, set()):
        _, metrics = problem.loss(problem.model, problem.batch(0), None)
        assert {*metrics} - {*exact, "margin"} == names


# Commands

TRAIN = "finetune --model tiny --train pairs.jsonl --method lora --rank 4 --learning-rate 0.05"
TRAIN += " --max-length 24 --epochs 2 --batch-size 8 --evaluations 1"


def records(run):
    return list(map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines()))


def made(rows=40):
    write_llama(Path("tiny"), num_hidden_layers=1, chat_template=TINY)
    write_pairs(rows)


def interrupted(stop, words, monkeypatch):
    """Runs a command that is interrupted before a step, and resumes it."""
    batch = PreferenceProblem.batch

    def stopping(problem, step):
        if step == stop:
            raise InterruptedRunError(signal.SIGTERM)
        return batch(problem, step)

    shutil.rmtree("runs/cut", ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceProblem, "batch", stopping)
        assert main(f"{words} --name cut".split()) == 143
    assert main(["finetune", "--resume", "runs/cut"]) == 0


def check_same_result():
    for file in ("metrics.jsonl", "adapter/adapter.safetensors", "reference.safetensors"):
        straight, cut = (Path("runs", run, file).read_bytes() for run in ("straight", "cut"))
        assert cut == straight, file


@pytest.mark.weekly
def test_a_run_learns_preferences_reports_rewards_and_resumes_exactly(monkeypatch, capsys):
    made()
    assert main(f"{TRAIN} --name straight --json".split()) == 0
    captured = capsys.readouterr()
    assert "the task is preference" in captured.err
    assert {"reference  compiling", "lora  compiling"} <= {*captured.err.splitlines()}
    base, ours = json.loads(captured.out)["results"]
    assert (base["test"]["accuracy"], base["test"]["margin"]) == (0.5, 0.0)
    assert ours["test"]["accuracy"] == 1.0 and ours["test"]["margin"] > 0
    first = records("straight")[0]
    assert (first["loss"], first["accuracy"]) == (pytest.approx(np.log(2), rel=1e-6), 0.5)
    names = {"rewards_chosen", "rewards_rejected", "margin", "accuracy", "loss"}
    assert all(names <= r.keys() for r in records("straight") if "loss" in r)
    assert all(names == r["dev"].keys() for r in records("straight") if "dev" in r)
    config = Run(Path("runs/straight")).read_config()
    assert (config["task_type"], config["loss"], config["beta"]) == ("preference", "dpo", 0.1)
    rows = json.loads(Path("runs/straight/findings.json").read_text())["rows"]["test"]
    margins = [row["chosen"] - row["rejected"] for row in rows]
    assert np.mean(margins) == pytest.approx(ours["test"]["margin"], rel=1e-5)
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(ours["test"]["loss"], rel=1e-5)
    sections = Page(Path("runs/straight/report.html").read_text()).sections
    assert {"Reward margins", "Highest losses on dev", "Lengths"} <= sections.keys()
    raw = Path("runs/straight/curves.png").read_bytes()
    assert int.from_bytes(raw[16:20], "big") == 2025  # three pictures side by side
    assert list(load_generator("runs/straight").generate(["food Thai"], max_new_tokens=2))

    computed, log_probs = [], PreferenceProblem.log_probs

    def counted(problem, model, part, *done):
        if model is problem.decoder.model:
            computed.append(part)
        return log_probs(problem, model, part, *done)

    monkeypatch.setattr(PreferenceProblem, "log_probs", counted)
    for stop in (0, 3):  # after the reference, after a few steps
        interrupted(stop, TRAIN, monkeypatch)
        assert computed == ["train", "dev", "test"]  # read when it went on, not computed again
        computed.clear()
        check_same_result()


def test_a_reference_of_other_rows_or_another_base_is_an_error(monkeypatch):
    found, run = prepared("dpo"), Run(Path("run"))
    run.path.mkdir()
    run.write_config({"model": "m", "base_sha256": "0", "dtype": "float32", "max_length": 8})
    kept = dict(found.problem.reference)
    monkeypatch.setattr(type(found), "_compute", lambda self, progress: kept)
    found.begin(run, None)
    arrays = load_file(run.reference)
    np.testing.assert_array_equal(arrays["dev"], kept["dev"])
    for name, data in (("rows", "other rows"), ("base", "another base"), ("dev", "dev")):
        save_file({**arrays, name: arrays[name][:1] + 1}, run.reference)
        with raises(RunError, run.reference, data, "remove"):
            found.begin(run, None)
    run.reference.write_bytes(b"nothing")
    with raises(RunError, run.reference, "remove"):
        found.begin(run, None)
    run.reference.unlink()
    shuffled = Path("pairs.jsonl").read_text().splitlines()[::-1]
    found.begin(run, None)
    Path("pairs.jsonl").write_text("\n".join(shuffled))
    other = prepared("dpo")
    with raises(RunError, run.reference, "other rows"):
        other.begin(run, None)


@pytest.mark.weekly
@pytest.mark.parametrize("loss", ["orpo", "kto"])  # without a reference, and with labels
def test_runs_of_the_other_losses(loss, capsys):
    made()
    assert main(f"{TRAIN} --loss {loss} --beta 0.2 --name it --json".split()) == 0
    base, ours = json.loads(capsys.readouterr().out)["results"]
    assert ours["test"]["margin"] > base["test"]["margin"]
    assert Path("runs/it/reference.safetensors").exists() == (loss != "orpo")
    assert all(np.isfinite(r["loss"]) for r in records("it") if "loss" in r)


@pytest.mark.weekly
def test_batches_of_one_label_are_logged_and_resumed(monkeypatch):
    """They have no margin, which is left out of their records."""
    made()
    words = f"{TRAIN} --loss kto --batch-size 2 --epochs 1"
    assert main(f"{words} --name straight".split()) == 0
    found = [record for record in records("straight") if "loss" in record]
    assert {"margin" in record for record in found} == {True, False}
    stop = next(i for i, record in enumerate(found) if "margin" not in record) + 1
    interrupted(stop, words, monkeypatch)
    check_same_result()


@pytest.mark.parametrize(
    ("kind", "words", "data"),
    [
        (UserError, "--beta 0", ["--beta", "0.0"]),
        (UserError, "--beta -1", ["--beta", "-1.0"]),
        (UserError, "--beta nan", ["--beta", "nan"]),
        (UserError, "--loss kto --batch-size 1", ["--loss kto", "1 row", "--batch-size"]),
        (UserError, "--loss kto --accumulate 8", ["--loss kto", "1 row", "--accumulate"]),
        (UserError, "--model bert --loss dpo", ["--loss", "preference", "encoder"]),
        (UserError, "--model bert --beta 0.1", ["--beta", "preference", "encoder"]),
        (UserError, "--task completion --completion chosen --loss dpo", ["--loss", "preference"]),
        (UserError, "--turns last", ["--turns", "conversation", "preference"]),
        (DataError, "--max-length 5", ["pairs.jsonl", "line ", "5 tokens", "--max-length 5"]),
        (DataError, "--dev judged.jsonl", ["judged.jsonl", "pairs.jsonl"]),
        (DataError, "--train judged.jsonl", ["judged.jsonl", "--loss dpo", "--loss kto"]),
        (DataError, "--train good.jsonl --loss kto", ["good.jsonl", "dev", "true", "--dev"]),
    ],
)
def test_commands_that_cannot_learn_are_one_sentence(kind, words, data):
    made()
    judged = [{"prompt": f"food {i}", "completion": "Thai", "label": i % 2 == 0} for i in range(40)]
    write(*judged, name="judged.jsonl")
    write(*judged[::2], name="good.jsonl")
    if "bert" in words:
        write_model(Path("bert"))
        write_reviews(Path("pairs.jsonl"), rows=40)
        words += " --text review"
    with command_raises(kind, *data):
        start = TRAIN.replace("--train pairs.jsonl", "") if "--train" in words else TRAIN
        assert main(f"{start} {words}".split()) == 2
    assert not Path("runs").exists()


def test_lists_of_messages_need_a_chat_template_and_take_no_other(capsys):
    write_llama(Path("plain"), num_hidden_layers=1, chat_template=None)
    made()
    rows = [
        {"chosen": [user(f"food {i}"), bot("It")], "rejected": [user(f"food {i}"), bot("is")]}
        for i in range(40)
    ]
    write(*rows, name="pairs.jsonl")
    with command_raises(UserError, "'plain'", "chat template"):
        assert main(f"{TRAIN} --model plain".split()) == 2
    with command_raises(UserError, "--template", "lists"):
        assert main([*TRAIN.split(), "--template", "Q: {prompt}"]) == 2
    assert main(["data", "pairs.jsonl", "--model", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"][0] == [["<user> food [UNK] <end> <bot>", False], ["It <end>", True]]


def test_older_runs_have_loss_for_turns():
    from adapters_jax.finetune.runs.config import differences, read_options

    run, options = Run(Path("run")), {"model": "tiny", "loss": "last"}
    assert read_options(run, {"options": options}).turns == "last"
    assert read_options(run, {"command": ["--model=tiny", "--loss=all"]}).turns == "all"
    assert read_options(run, {"options": {"loss": "kto"}}).loss == "kto"
    was = {"task_type": "conversation", "loss": "last"}
    assert differences(was, {"task_type": "conversation", "turns": "last"}) == []
    assert differences(was, {"task_type": "conversation", "turns": "all"}) == ["turns"]
