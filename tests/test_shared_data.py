"""Each task on real data: its rows are read, and some are trained, pushed, and come back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny import write_llama
from test_image_classification import write_digits, write_vit
from test_masked_language_modelling import write_masked

from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.run_directory import Run
from benchmarks.baselines import CELLS, DATA, Cell

SHORT = "--epochs 1 --evaluations 1 --limit 32 --batch-size 8 --method lora --rank 2"
SHORT += " --checkpoint-every 1000"
TEXT = "The film was good."
WRITES = ("completion", "conversation", "preference")
PREFERENCE = Cell("preference", "gsm8k", "--train pairs.jsonl")
IMAGES = Cell("image-classification", "digits", "--train digits")


def write_pairs(path):
    """A right and a wrong solution of each question of GSM8K."""
    pairs = []
    for line in (DATA / "gsm8k" / "example_model_solutions.jsonl").read_text().splitlines():
        row = json.loads(line)
        each = [value for value in row.values() if isinstance(value, dict)]
        right, wrong = (
            next((x["solution"] for x in each if x["is_correct"] is is_right), None)
            for is_right in (True, False)
        )
        if right and wrong:
            pairs.append({"prompt": row["question"], "chosen": right, "rejected": wrong})
    path.write_text("\n".join(map(json.dumps, pairs[:120])))


def _case(cell):
    marks = [pytest.mark.slow]  # tests of each task on rows of our own are the quick ones
    if cell is not IMAGES:
        marks.append(pytest.mark.skipif(not (DATA / cell.data).exists(), reason="no such data"))
    return pytest.param(cell, id=cell.task, marks=marks)


# A task of words, one of images, and one that writes. The other tests of each task train it.
TRAINED = ("token-classification", PREFERENCE.task, IMAGES.task)
EVERY = (*CELLS, PREFERENCE, IMAGES)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Gives the words of the command that trains a cell, whose model and rows are made here."""
    monkeypatch.chdir(tmp_path)

    def words(cell):
        more = "--max-length 16"
        if cell.task in WRITES:
            write_llama(Path("tiny"), max_position_embeddings=512)
            more = "--max-length 512 --held-out 8"
            more += " --exact-match 0" if cell.task == "completion" else ""
        elif cell is IMAGES:
            write_vit(Path("tiny"))
            write_digits(Path("digits"))
            more = ""
        else:
            write_masked(Path("tiny"))
        if cell is PREFERENCE:
            write_pairs(Path("pairs.jsonl"))
        short = f"--model tiny --no-baselines {SHORT} {more}"
        return [*cell.words("run", Path("runs")), *short.split()]

    return words


@pytest.mark.witness("regression", "question-answering", "conversation")
@pytest.mark.parametrize("cell", [_case(cell) for cell in EVERY if cell.task not in TRAINED])
def test_its_rows_are_read_and_have_a_loss(cell, words):
    job = parse(Finetune, words(cell)[1:]).prepare(Console(json=True))
    assert job.config["task_type"] == cell.task and job.config["rows"]["train"] == 32
    problem = job.problem
    trained = problem.model if problem.params is None else problem.params
    loss = problem.loss(trained, problem.batch(0), jax.random.key(0))
    assert 0 < jax.tree.leaves(loss)[0] < 100


@pytest.mark.witness("preference")
@pytest.mark.parametrize("cell", [_case(cell) for cell in EVERY if cell.task in TRAINED])
def test_one_command_trains_it_and_it_comes_back(cell, words, capsys):
    assert main(words(cell)) == 0
    config = Run(Path("runs/run")).read_config()
    (ours,) = config["summary"]["results"]
    assert config["task_type"] == cell.task and config["rows"]["train"] == 32
    assert all(np.isfinite(value) for value in ours["test"].values())
    assert main(["push", "runs/run", "me/pushed", "--dry-run"]) == 0
    if cell.task in WRITES:
        prompts = ["It serves French food"]
        both = [
            [*load_generator(path, model="tiny").generate(prompts, max_new_tokens=4)]
            for path in ("runs/run", "pushed")
        ]
        assert both[0] == both[1] and len(both[0]) == 1
        return
    asked = "digits/zero/0.png" if cell is IMAGES else TEXT
    capsys.readouterr()
    assert main(["predict", "runs/run", asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (again,) = load_predictor("pushed", model="tiny").predict([(asked, None)])
    assert found == again.to_dict()
