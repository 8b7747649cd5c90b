"""`--budget`: as many epochs as fit into a time, or the size that fits into a number."""

import json
import weakref

import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import write_model, write_reviews

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.method import SIZES
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.runs.budget import Cost, fitted, measured, seconds_of
from adapters_jax.finetune.runs.job import Job


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The words of a short run."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny")
    write_reviews(tmp_path / "reviews.jsonl")
    flags = "--model tiny --train reviews.jsonl --text review --max-length 8 --batch-size 16"
    return ["finetune", *flags.split(), "--method", "lora", "--name", "run"]


@pytest.mark.parametrize("text", ["10 minutes", "", "0s", "-5m", "m", "9" * 400 + "h"])
def test_other_texts_are_no_times(text):
    with raises(UserError, text[:40], "1h30m"):
        seconds_of(text)


def test_what_fits_is_what_the_parts_take():
    cost, options = Cost(compile=10.0, epoch=20.0, score=4.0), OptimizerOptions(evaluations=2)
    found = fitted(options, cost, 200.0, 50, "200s").epochs
    assert found == int((0.9 * 200 - 10 - 2 * 4) / (20 + 2 * 4) * 50) / 50
    assert cost.total(found, 2) <= 0.9 * 200
    assert fitted(options, cost, 1e6, 50, "300h").epochs == 20
    assert fitted(OptimizerOptions(epochs=3.0), cost, 1e6, 50, "300h").epochs == 3
    with raises(UserError, "--budget 15s", " 6 s"):
        fitted(options, cost, 15.0, 50, "15s")  # a step: (10 + 8 + 28 / 50) / 0.9 - 15 = 5.6


@pytest.mark.weekly
def test_each_shape_of_a_batch_is_measured_once(words, monkeypatch):
    found, times = [], []

    def clock():
        times.append(None)
        return float(len(times))

    def look(job):
        found.append((job.problem, measured(job.problem, job.optimizer, False, clock)))
        return job

    monkeypatch.setattr(Job, "_in_budget", look)
    assert main([*words, "--epochs", "1"]) == 0
    ((problem, cost),) = found
    steps = len(problem.train)
    shapes = {problem.batch(number)["input_ids"].shape for number in range(steps)}
    assert cost == Cost(compile=0.0, epoch=2.0 * steps, score=1.0)  # a batch and its step
    assert len(times) == 2 * (steps + 2 * (len(shapes) + 1))  # two of each shape, and of dev


@pytest.mark.slow
def test_one_batch_of_each_shape_is_kept(words, monkeypatch):
    made, alive = [], []

    def look(job):
        batch = type(job.problem).batch

        def counted(self, step):
            found = batch(self, step)
            made.append(weakref.ref(found["input_ids"]))
            alive.append(sum(each() is not None for each in made))
            return found

        monkeypatch.setattr(type(job.problem), "batch", counted)
        measured(job.problem, job.optimizer, False)
        monkeypatch.setattr(type(job.problem), "batch", batch)
        return job

    monkeypatch.setattr(Job, "_in_budget", look)
    assert main([*words, "--epochs", "1"]) == 0
    shapes = 1  # all reviews are short
    assert len(alive) > 5 and max(alive) <= shapes + 2


def test_an_epoch_of_one_step_is_measured_with_the_budget_of_ranks_of_all_epochs(words):
    own = ["adalora" if word == "lora" else word for word in words[1:]]
    job = parse(Finetune, [*own, "--limit", "8"]).prepare(Console(json=True))
    assert len(job.problem.train) == 1
    assert measured(job.problem, job.optimizer, False).epoch > 0


@pytest.mark.weekly
def test_without_epochs_there_are_up_to_twenty(words, tmp_path):
    assert main([*words, "--budget", "9h", "--no-baselines", "--limit", "32"]) == 0
    config = json.loads((tmp_path / "runs/run/config.json").read_text())
    assert config["optimizer"]["epochs"] == config["options"]["optimizer"]["epochs"] == 20


@pytest.mark.slow
def test_a_run_keeps_the_epochs_that_fit(words, tmp_path, capsys):
    assert main([*words, "--budget", "1h", "--epochs", "1.5"]) == 0
    config = json.loads((tmp_path / "runs/run/config.json").read_text())
    assert (config["options"]["budget"], config["optimizer"]["epochs"]) == (None, 1.5)
    assert config["options"]["optimizer"]["epochs"] == 1.5
    assert "fit into 1h" in capsys.readouterr().out


@pytest.mark.slow
def test_a_time_that_is_too_short_ends_in_one_sentence(words):
    with command_raises(UserError, "--budget 0.001s", "one step"):
        assert main([*words, "--budget", "0.001s"]) == 2


def _prepared(words, more):
    """The job of a run, without the method of `words`."""
    return parse(Finetune, [*words[1:-4], "--name", "run", *more]).prepare(Console(json=False))


@pytest.mark.witness("lora-700-5-640", "compacter-900-104-880")
@pytest.mark.parametrize(
    ("method", "budget", "size", "count"),
    [
        ("lora", "700", 5, 5 * 2 * (32 + 32)),
        ("loha", "1500", 5, 5 * 2 * 2 * (32 + 32)),
        ("houlsby", "700", 4, 2 * (2 * 4 * 32 + 4 + 32)),
        # Rules that all share, then factors and biases at 2 places; a width of 108 has 904.
        ("compacter", "900", 104, 4**3 + 2 * 3 * (32 + 104)),
        ("houlsby", "10%", None, None),
    ],
)
def test_a_budget_of_parameters_chooses_the_rank_or_the_width(
    words, tmp_path, method, budget, size, count
):
    job = _prepared(words, ["--method", method, "--budget", budget])
    field = SIZES[method]
    chosen = getattr(job.options.method, field)
    found = aj.audit(job.problem.model, job.problem.params)
    if size is None:
        base = found.frozen_parameters + found.trainable_parameters - found.adapter_parameters
        one = 2 * (2 * 32 + 1)
        assert found.adapter_parameters <= base / 10 < found.adapter_parameters + one + 200
    else:
        assert (chosen, found.adapter_parameters) == (size, count)
    assert job.config["options"]["budget"] is None
    assert job.config["options"]["method"][field] == chosen
    job.run.unlock(job.lock)


@pytest.mark.witness("more1-parts1", "more2-parts2", "more3-parts3", "more7-parts7")
@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--method", "lora", "--rank", "4", "--budget", "2000"], ["chooses --rank", "leave it"]),
        (["--method", "lora", "--budget", "3"], ["3 parameters", "--rank 1"]),
        (["--method", "full", "--budget", "5%"], ["no size of full"]),
        (["--method", "lora", "--rank-pattern", "**", "4", "--budget", "2000"], ["--rank-pattern"]),
        (
            ["--reduction-factor", "16", "--budget", "2000"],
            ["--bottleneck-dim", "--reduction-fact"],
        ),
        (["--method", "lora", "--budget", "9" * 5000], ["number of parameters"]),
        (["--method", "lora", "--budget", "9" * 400 + "%"], ["number of parameters"]),
        (["--budget", "5 %"], ["such as 90s", "1% of the base"]),
    ],
)
def test_a_budget_of_parameters_that_does_not_fit_ends_in_one_sentence(words, more, parts):
    with raises(UserError, *parts):
        _prepared(words, more)
