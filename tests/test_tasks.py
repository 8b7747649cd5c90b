"""Registries: a task and a format that only these tests have work in all commands."""

import json
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.errors import raises
from helpers.labelled import load_labelled
from helpers.tagging import Tagging, TaggingProblem
from helpers.tiny import BAD, FILLER, GOOD, write_model, write_reviews

import adapters_jax as aj
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.data.readers import READERS, read_csv
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs import prepare
from adapters_jax.finetune.runs.stopping import InterruptedRunError
from adapters_jax.finetune.tasks import TASKS, read_run, task_of
from adapters_jax.finetune.tasks.classification import Classes
from adapters_jax.finetune.tasks.completion_problem import token_losses
from adapters_jax.finetune.tasks.regression import Numbers

TAGS = {**dict.fromkeys(GOOD, "plus"), **dict.fromkeys(BAD, "minus")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory, with a model and rows of tagged words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, Tagging.name, Tagging())
    write_model(Path("tiny"))
    draw, rows = random.Random(0), ["words,marks"]
    for _ in range(200):
        words = draw.choices((*GOOD, *BAD, *FILLER), k=5)
        rows.append(f"{' '.join(words)},{' '.join(TAGS.get(word, 'none') for word in words)}")
    Path("words.csv").write_text("\n".join(rows))
    return tmp_path


FINETUNE = (
    "finetune --task tagging --model tiny --train words.csv --text words --columns tags=marks "
    "--method full --epochs 4 --batch-size 16 --learning-rate 0.02 --checkpoint-every 100"
)


def finetune(name, more=""):
    return main(f"{FINETUNE} --name {name} {more}".split())


@pytest.mark.weekly
def test_a_task_of_a_test_trains_resumes_and_predicts(place, monkeypatch, capsys, slow):
    batch = TaggingProblem.batch

    def interrupted(problem, step):
        if step == 20:
            raise InterruptedRunError(signal.SIGTERM)
        return batch(problem, step)

    with monkeypatch.context() as patch:
        patch.setattr(TaggingProblem, "batch", interrupted)
        assert finetune("cut") == 143
    assert main(["finetune", "--resume", "runs/cut"]) == 0
    assert "after step 20 of 40" in capsys.readouterr().out
    config = Run(Path("runs/cut")).read_config()
    assert (config["task_type"], config["tag_names"]) == ("tagging", ["minus", "none", "plus"])
    first, ours = config["summary"]["results"]
    assert ours["test"]["accuracy"] > 0.95
    assert first["test"]["accuracy"] == pytest.approx(3 / 16, 0.4)
    assert "tag these words" in Path("runs/cut/report.html").read_text()

    assert main(["predict", "runs/cut", "the good plot was dull", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tags"] == ["none", "plus", "none", "none", "minus"]
    assert main(["predict", "runs/cut", "fine actors"]) == 0
    assert "['plus', 'none']" in capsys.readouterr().out

    if slow:  # test_resume compares the runs of the library's own tasks each time
        assert finetune("straight") == 0
        for file in ("metrics.jsonl", "adapter/adapter.safetensors"):
            straight, cut = (Path("runs", name, file).read_bytes() for name in ("straight", "cut"))
            assert cut == straight, file


def test_a_run_of_an_unregistered_task_is_an_error(place):
    run = Run(place / "run")
    run.create({"model": "m", "base_sha256": "0", "dtype": "float32", "max_length": 8})
    config = json.loads(run.config.read_text())
    for name in ("unheard-of", ["tagging"]):
        run.config.write_text(json.dumps({**config, "task_type": name}))
        with raises(RunError, run.path, repr(name), ", ".join(TASKS)):
            read_run(run)
    run.config.write_text(json.dumps({**config, "task_type": "tagging", "tag_names": "a"}))
    with raises(RunError, run.config, "tag_names, text, pairs"):
        load_predictor(run.path)
    with raises(RunError, run.path, "adapters-jax predict"):
        load_generator(run.path)


@pytest.mark.witness(
    "--task taging-data0",
    "--task completion-data1",
    "--task classification --columns tags=marks-data5",
    "--task tagging --no-pack-data7",
    "--task classification --metrics bleu-data9",
)
@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("--task taging", ("taging", "tagging")),
        ("--task completion", ("completion", "tiny", "encoder", "tagging")),
        ("--task tagging --columns tag=marks", ("tag=marks", "tags")),
        ("--task tagging --columns tags", ("tags",)),
        ("--task tagging --columns text=words", ("text=words", "tags")),
        ("--task classification --columns tags=marks", ("tags=marks", "classification")),
        ("--task tagging --label marks", ("--label", "classification", "tagging")),
        ("--task tagging --no-pack", ("--pack", "completion", "tagging")),
        ("--task tagging --metrics f1", ("--metrics", "classification", "tagging")),
        ("--task classification --metrics bleu", ("bleu", "accuracy")),
    ],
)
def test_flags_of_other_tasks_are_errors(place, capsys, words, data):
    assert main(f"finetune --model tiny --train words.csv {words}".split()) == 2
    err = capsys.readouterr().err
    assert all(datum in err for datum in data), err


@pytest.mark.weekly
def test_a_format_of_a_test_is_read_by_the_ordinary_command(place, monkeypatch, capsys):
    def read_xyz(path, raw):
        header, records = read_csv(path, raw.replace(b";", b","))
        return header, [(line + 100, fields) for line, fields in records]

    monkeypatch.setitem(READERS, ".xyz", read_xyz)
    lines = write_reviews(Path("reviews.jsonl"), 60).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    text = "".join(f"{row['review']};{row['label']}\n" for row in rows)
    Path("rows.xyz").write_text("review;label\n" + text)
    words = "--text review --method head-only --no-baselines --epochs 1 --max-length 12"
    assert main(f"finetune --model tiny --train rows.xyz {words} --name xyz".split()) == 0
    config = Run(Path("runs/xyz")).read_config()
    assert (config["task"], config["target"]["names"]) == ("rows", ["no", "yes"])
    capsys.readouterr()
    assert main(["predict", "runs/xyz", "--file", "rows.xyz", "--text", "review", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 60
    Path("rows.xyz").write_text("review;label\na;no\n;yes\n")
    assert main(f"finetune --model tiny --train rows.xyz {words} --name bad".split()) == 2
    err = capsys.readouterr().err
    assert "rows.xyz" in err and "line 103" in err
    Path("rows.abc").write_text("x")
    assert main(["finetune", "--model", "tiny", "--train", "rows.abc"]) == 2
    assert " or .xyz" in capsys.readouterr().err


@pytest.mark.slow
def test_the_constant_is_the_most_frequent_class_or_the_mean(place):
    lines = [f"film number {i},{'rare' if i % 4 == 0 else 'usual'}" for i in range(120)]
    Path("uneven.csv").write_text("text,label\n" + "\n".join(lines))
    words = "--method head-only --epochs 1 --max-length 12 --name uneven"
    assert main(f"finetune --model tiny --train uneven.csv {words}".split()) == 0
    rows = Run(Path("runs/uneven")).read_config()["summary"]["results"]
    constant = rows[0]
    assert constant["method"] == "majority class"
    data = load_labelled("uneven.csv")
    for part in ("dev", "test"):
        share = Counter(getattr(data, part).labels.tolist())[1] / len(getattr(data, part))
        assert constant[part]["accuracy"] == share > 0.5
    assert Classes(("a", "b", "c")).constant(data.train, "abc").tolist() == [1, 1, 1]
    numbers = load_labelled(
        write_reviews(Path("n.jsonl")), text="review", label="stars", task="regression"
    )
    mean = np.mean(numbers.train.labels.astype(float))
    assert Numbers.of(numbers.train).constant(numbers.train, "ab").tolist() == [mean, mean]


class Bigrams:
    """A model whose logits for the next token are a row of a table."""

    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)

    def hidden(self, ids, positions, segments):
        return jax.nn.one_hot(ids, 5)

    def logits(self, hidden):
        return hidden @ self.table


@pytest.mark.slow
def test_the_loss_of_a_sequence_is_summed_over_its_labelled_tokens():
    ids = np.array([[1, 2, 3, 4], [4, 3, 0, 1]])
    labels = np.array([[NOTHING, 3, 0, NOTHING], [0, NOTHING, NOTHING, NOTHING]])
    batch = {"input_ids": ids, "labels": labels, "positions": ids, "segments": ids}
    losses = -jax.nn.log_softmax(Bigrams.table)
    expected = [losses[2, 3] + losses[3, 0], losses[4, 0]]
    for most in (2, 4):
        found = token_losses(Bigrams(), batch, most, chunk=3)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_readout_is_restored_from_its_config():
    for readout in (Classes(("no", "yes")), Numbers(2.5, 0.5)):
        values = json.loads(json.dumps(readout.to_config()))
        assert list(values) == ["names", "mean", "std"]
        assert type(readout).from_config(values) == readout
    for std in (0.0, -1.0, float("nan"), float("inf")):
        with raises(aj.UserError, "std"):
            Numbers.from_config({"names": [], "mean": 0.0, "std": std})
    for values in ({"names": ["a"], "mean": 0.0}, {"names": [], "mean": float("inf")}):
        with raises(aj.UserError, "mean"):
            Numbers.from_config({**values, "std": 1.0})
    for names in (("a",), ("a", 1)):
        with raises(aj.UserError, names):
            Classes.from_config({"names": names})


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"kind": "encoder", "target": {"names": ["a", "b"]}}, "classification"),
        ({"kind": "encoder", "target": {"names": [], "mean": 1.0, "std": 2.0}}, "regression"),
        ({"target": {"names": ["a", "b"]}}, "classification"),
        ({"kind": "decoder", "prompts": {}}, "completion"),
        ({"kind": "encoder", "task_type": "tagging"}, "tagging"),
    ],
)
def test_old_runs_have_the_task_that_they_were_trained_on(place, config, name):
    assert task_of(config).name == name


@pytest.mark.weekly
def test_an_old_run_predicts_and_resumes(place, capsys):
    write_reviews(Path("reviews.jsonl"), 60)
    words = "--text review --method head-only --epochs 1 --max-length 12 --no-baselines"
    assert main(f"finetune --model tiny --train reviews.jsonl {words} --name now".split()) == 0
    now = Run(Path("runs/now"))
    config = now.read_config()
    expected = [p.probabilities for p in load_predictor(now.path).predict([("good", None)])]
    shutil.copytree("runs/now", "runs/before")
    before = Run(Path("runs/before"))
    del config["task_type"], config["summary"], config["data"]["columns"]
    config["data"]["task"] = "classification"
    before.write_config(config)
    found = [p.probabilities for p in load_predictor(before.path).predict([("good", None)])]
    assert found == expected
    shutil.rmtree(before.adapter)
    before.write_config({**config, "task_type": "unheard-of"})
    assert main(["finetune", "--resume", "runs/before"]) == 2
    assert "task_type" in capsys.readouterr().err
    before.write_config(config)
    assert main(["finetune", "--resume", "runs/before"]) == 0
    tensors = [run.adapter / "adapter.safetensors" for run in (now, before)]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_question_answering_trains_longer_by_default_unless_flags_say_so():
    task, options = TASKS["question-answering"], RunOptions()
    found = prepare._training(options, task)
    assert (found.epochs, found.batch_size) == (4.0, 8)
    given = replace(options, optimizer=OptimizerOptions(epochs=1.0, batch_size=32))
    found = prepare._training(given, task)
    assert (found.epochs, found.batch_size) == (1.0, 32)
    head = replace(options, method=MethodOptions("head-only"))
    assert prepare._training(head, task).epochs == 20.0
    assert prepare._training(options, TASKS["multilabel"]).batch_size == 32
