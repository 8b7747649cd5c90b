"""Each task on real data: one command trains it; it predicts, is pushed, and comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import write_llama
from test_image_classification import write_digits, write_vit
from test_masked_language_modelling import write_masked

from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.run_directory import Run
from benchmarks.baselines import CELLS, DATA, Cell

SHORT = "--epochs 1 --evaluations 1 --limit 32 --batch-size 8 --method lora --rank 2"
SHORT += " --checkpoint-every 1000"
TEXT = "The film was good."
# What each task predicts from the command line, in the order of its columns.
ASKED = {
    "question-answering": ["What was good?", TEXT],
    "regression": [TEXT, "It was bad."],
    "sentence-embedding": [TEXT, "It was bad."],
    "multiple-choice": [TEXT, "It was bad.", "It rained."],
    "masked-language-modelling": ["The film was [MASK] ."],
}
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


@pytest.mark.parametrize("cell", [_case(cell) for cell in (*CELLS, PREFERENCE, IMAGES)])
def test_one_command_trains_it_and_it_comes_back(cell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny, writes = Path("tiny"), cell.task in ("completion", "conversation", "preference")
    more = "--max-length 16"
    if writes:
        write_llama(tiny, max_position_embeddings=512)
        more = "--max-length 512 --held-out 8"
        more += " --exact-match 0" if cell.task == "completion" else ""
    elif cell is IMAGES:
        write_vit(tiny)
        write_digits(Path("digits"))
        more = ""
    else:
        write_masked(tiny)
    if cell is PREFERENCE:
        write_pairs(Path("pairs.jsonl"))
    words = cell.words("run", Path("runs"))
    assert main([*words, "--model", "tiny", "--no-baselines", *SHORT.split(), *more.split()]) == 0
    config = Run(Path("runs/run")).read_config()
    (ours,) = config["summary"]["results"]
    assert config["task_type"] == cell.task and config["rows"]["train"] == 32
    assert all(np.isfinite(value) for value in ours["test"].values())
    assert main(["push", "runs/run", "me/pushed", "--dry-run"]) == 0
    if writes:
        prompts = ["It serves French food"]
        both = [
            [*load_generator(path, model="tiny").generate(prompts, max_new_tokens=4)]
            for path in ("runs/run", "pushed")
        ]
        assert both[0] == both[1] and len(both[0]) == 1
        return
    asked = ASKED.get(cell.task, [TEXT])
    asked = ["digits/zero/0.png"] if cell is IMAGES else asked
    capsys.readouterr()
    assert main(["predict", "runs/run", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = tuple(asked) if len(asked) > 1 else (asked[0], None)
    (again,) = load_predictor("pushed", model="tiny").predict([row])
    assert found == again.to_dict()
