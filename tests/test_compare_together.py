"""`adapters-jax compare --together`: the results and files of each cell are those of one alone."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews
from safetensors.numpy import load_file
from test_compare import compare

from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.compare import together
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.runs.stopping import Interrupts
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem

RECIPES = ("lora --rank 2 --learning-rates 1e-2 3e-3",)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a model, rows, and a comparison whose cells were trained one by one."""
    directory = tmp_path_factory.mktemp("together")
    write_model(directory / "tiny")
    write_reviews(directory / "reviews.jsonl", rows=100)
    status, _, last = compare(directory, "apart", "--seeds", 0, recipes=RECIPES)
    assert status == 0, last
    return directory


@contextlib.contextmanager
def timed(seconds_together):
    """Within, a step of one cell takes a second, and one of several this many; nothing is run."""

    def fastest(step, state, batch):
        return seconds_together if state.step.ndim else 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "fastest", fastest)
        yield


def together_in(directory, out, *flags, recipes=RECIPES):
    return compare(directory, out, "--seeds", 0, "--together", *flags, recipes=recipes)


def same_cells(directory, out, other="apart"):
    """Asserts that the cells of two comparisons have the same results, logs and adapters."""
    one, two = (directory / each / "cells" for each in (other, out))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        logs = [
            [json.loads(line) for line in (each / name / "metrics.jsonl").read_text().splitlines()]
            for each in (one, two)
        ]
        assert [sorted(line) for line in logs[0]] == [sorted(line) for line in logs[1]]
        for before, after in zip(*logs, strict=True):
            for key in before.keys() & {"loss", "grad_norm", "learning_rate"}:
                assert after[key] == pytest.approx(before[key], rel=1e-4)
            for part in ("dev", "test"):
                assert after.get(part) == before.get(part)
        adapters = [
            load_file(each / name / "adapter" / "adapter.safetensors") for each in (one, two)
        ]
        assert adapters[0].keys() == adapters[1].keys()
        for path, tensor in adapters[0].items():
            np.testing.assert_allclose(adapters[1][path], tensor, rtol=0, atol=2e-5, err_msg=path)
    return names


def counted(make, steps):
    """The maker of a step that notes how many trainings it is given."""

    def making(*args, **options):
        step = make(*args, **options)

        def counting(state, batch, active=None):
            steps.append(state.step.shape)
            return step(state, batch, active)

        return counting

    return making


@pytest.mark.weekly
def test_an_interrupted_group_goes_on_to_the_same_result(directory, monkeypatch):
    """That of cells apart: together again, and one by one where that is faster."""
    batch, seen, steps = LabelledProblem.batch, [], []
    monkeypatch.setattr(together, "make_train_step", counted(together.make_train_step, steps))

    def interrupted(self, step):
        seen.append(step)
        if step == 1 and seen.count(1) == 3:  # the shapes of two cells, then a step
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(LabelledProblem, "batch", interrupted)
    with timed(1.9):
        status, _, last = together_in(directory, "halted")
        assert (status, "SIGTERM" in last, "--together" in last) == (143, True, True)
        monkeypatch.setattr(LabelledProblem, "batch", batch)
        shutil.copytree(directory / "halted", directory / "on-alone")
        assert together_in(directory, "halted")[0] == 0
    assert len(same_cells(directory, "halted")) == 2
    assert steps == [(2,)] * 2  # one before the signal and one after it, each of both cells
    monkeypatch.setattr(together._Group, "run", None)
    with timed(2.1):
        assert together_in(directory, "on-alone")[0] == 0
    same_cells(directory, "on-alone")


@pytest.mark.weekly
def test_a_cell_that_was_further_waits_for_the_others(directory, monkeypatch):
    batch = LabelledProblem.batch

    def interrupted(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(LabelledProblem, "batch", interrupted)
    assert compare(directory, "uneven", "--seeds", 0, recipes=RECIPES)[0] == 143
    monkeypatch.setattr(LabelledProblem, "batch", batch)
    (cell,) = (directory / "uneven" / "cells").iterdir()
    assert (cell / "checkpoints").is_dir()
    with timed(1.9):
        assert together_in(directory, "uneven")[0] == 0
    same_cells(directory, "uneven")


@pytest.mark.weekly
def test_a_cell_that_diverges_stops_alone(directory):
    recipes = ("lora --rank 2 --learning-rates 3e38 1e-2 1e-3",)  # the first one overflows
    with timed(1.9):
        status, summary, last = together_in(directory, "diverged", "--clip", 0, recipes=recipes)
    assert status == 0, last
    lines = (directory / "diverged" / "cells.jsonl").read_text().splitlines()
    cells = {cell["learning_rate"]: cell for cell in map(json.loads, lines)}
    assert [rate for rate, cell in cells.items() if "stopped" in cell] == [3e38]
    assert summary["recipes"][0]["learning_rate"] in (1e-2, 1e-3)


@pytest.mark.weekly
def test_what_cannot_share_a_program_is_said(directory, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(Console, "say", lambda self, text="": said.append(text))
    recipes = ("head-only --learning-rates 1e-2 1e-3",)
    assert together_in(directory, "heads", recipes=recipes)[0] == 0
    alone = [text for text in said if "trained alone" in text]
    assert sorted(text.split(" is ")[0] for text in alone[:2]) == [
        "head-only-lr-0.001-seed-0",
        "head-only-lr-0.01-seed-0",
    ]


@pytest.mark.weekly
def test_decoders_train_together(tmp_path, monkeypatch):
    write_llama(tmp_path / "llama", num_hidden_layers=1)
    write_meanings(tmp_path / "rows.csv", rows=40)
    monkeypatch.chdir(tmp_path)
    words = "compare --model llama --train rows.csv --prompt mr --completion ref --max-length 32"
    words += " --exact-match 0 --epochs 1 --limit 8 --seeds 3 --learning-rates 3e-2 1e-2"
    recipes = ["--recipes", "lora --rank 2 --alpha 2 --targets **/{query,value}"]
    assert main([*words.split(), *recipes, "--out", "apart"]) == 0
    with timed(0.1):
        assert main([*words.split(), *recipes, "--out", "together", "--together"]) == 0
    same_cells(tmp_path, "together")


def decoder_jobs(words, seeds):
    """Open runs of a tiny Llama in the current directory that differ in their seed."""
    write_llama(Path("llama"), num_hidden_layers=1)
    words += " --model llama --method lora --rank 2 --targets **/{query,value}"
    own = [[*words.split(), "--seed", str(seed), "--name", f"seed-{seed}"] for seed in seeds]
    return [parse(Finetune, each).prepare(Console(json=True)) for each in own]


def test_a_program_reads_the_tokens_to_learn_of_every_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long, short = ("food", "Thai " * 19 + "Thai"), ("food " * 19 + "food", "Thai")
    parts = {"train": [long] * 2 + [short] * 6, "dev": [short] * 2, "test": [short]}
    for name, rows in parts.items():
        lines = ["mr,ref", *(f"{mr} {i},{ref}" for i, (mr, ref) in enumerate(rows))]
        Path(f"{name}.csv").write_text("\n".join(lines) + "\n")
    words = "--train train.csv --dev dev.csv --test test.csv --prompt mr --completion ref --no-chat"
    words += " --max-length 46 --exact-match 0 --max-steps 1 --batch-size 4"
    jobs = decoder_jobs(words, (0, 2))  # the long completions share a sequence with seed 2 alone
    assert [job.problem.most for job in jobs] == [32, 48]
    with timed(0.1), Interrupts() as interrupts:
        assert together.train_together(jobs, interrupts, print) == [True, True]
    for job in jobs:
        with Checkpoints(job.run.checkpoints) as checkpoints:
            records = checkpoints.progress()["records"]
        (loss,) = (record["loss"] for record in records if "loss" in record)
        expected = job.problem.loss(job.problem.model, job.problem.batch(0), None)
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_preferences_have_their_reference_before_they_train_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"food {i}", "chosen": "It is Thai", "rejected": "It is"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--train rows.jsonl --task preference --max-length 16 --max-steps 1 --batch-size 4"
    jobs = decoder_jobs(words, (0, 1))
    with timed(9.0), Interrupts() as interrupts:
        assert together.train_together(jobs, interrupts, print) == [False, False]
    assert all(job.run.reference.exists() for job in jobs)
