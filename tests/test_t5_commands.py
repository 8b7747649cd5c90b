"""The commands on tiny encoder-decoders, and the loss that they train."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.commands import command_raises
from helpers.tiny import write_meanings

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.batches import Batches
from adapters_jax.finetune.data.packing import Example, pair
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.models.t5 import load_t5
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.tasks.completion_problem import token_losses

FIXTURES = Path(__file__).parent / "fixtures" / "t5"
TRAIN = (
    "finetune --model base --train rows.csv --prompt mr --completion ref --max-length 32 "
    "--name mine --method lora --rank 4 --no-baselines --learning-rate 0.02"
)
SHORT = f"{TRAIN} --epochs 1 --exact-match 0 --limit 16"
IDS = np.array([[4, 9, 5, 6, 11, 7]])


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command that has to work in a directory with rows, and returns its output."""
    monkeypatch.chdir(tmp_path)
    write_meanings(tmp_path / "rows.csv", rows=40)

    def run(words):
        assert main(words.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def logits(model):
    return np.asarray(nnx.jit(lambda model: model(IDS))(model))


@pytest.mark.slow
def test_the_loss_is_that_of_the_completions_and_padding_has_none():
    examples = [Example([3, 8, 1], [4, 6, 8, 7, 1]), Example([3, 3, 3, 3, 10, 1], [4, 1])]
    batch = Batches([pair(each) for each in examples], None, 2, None, buckets=(8,))[0]
    _, model = load_t5(FIXTURES / "flan_t5")
    losses = nnx.jit(lambda model, batch: token_losses(model, batch, most=6, chunk=4))(model, batch)
    logits_of = nnx.jit(lambda model, *args: model(*args))
    assert batch["input_ids"].shape == (2, 8)
    for (prompt, completion), loss in zip(examples, losses, strict=True):
        written = np.array([[0, *completion[:-1]]])
        each = np.asarray(logits_of(model, np.array([prompt]), None, written)[0], np.float64)
        logs = each - np.log(np.exp(each).sum(-1, keepdims=True))
        expected = -sum(logs[i, token] for i, token in enumerate(completion))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.weekly
def test_a_tiny_checkpoint_is_audited_and_planned(run):
    shutil.copytree(FIXTURES / "mt5", "base")
    flags = "--model base --method lora --rank 2 --targets **/{query,value}"
    counts = json.loads(run(f"audit {flags} --json"))
    # query and value of three attentions, with two heads of width 6
    assert counts["adapter_parameters"] == 3 * 2 * 2 * (16 + 12)
    plan = json.loads(run(f"plan {flags} --length 8 --batch-size 1 --no-full --json"))
    assert plan["plans"]["lora"]["trainable_parameters"] == counts["adapter_parameters"]


@pytest.mark.slow
def test_the_top_layers_are_those_of_each_stack(run):
    shutil.copytree(FIXTURES / "t5", "base")  # of three layers and two
    flags = SHORT.replace("lora --rank 4", "prefix-tuning --last 1").split()[1:]
    recipe = parse(Finetune, flags).prepare(Console(json=True)).problem.recipe
    tops = ("encoder/layers/2/attention", "decoder/layers/1/attention")
    assert recipe == aj.Recipe(aj.PrefixTuning(tops))
    counts = json.loads(run("audit --model base --method prefix-tuning --last 1 --json"))
    config = json.loads(Path("base", "config.json").read_text())
    assert counts["adapter_parameters"] == 2 * 2 * 20 * config["num_heads"] * config["d_kv"]


@pytest.mark.slow
def test_texts_without_prompts_are_not_for_an_encoder(run):
    shutil.copytree(FIXTURES / "t5", "base")
    with command_raises(UserError, "--text", "'base'", "--prompt", "--completion"):
        words = "finetune --model base --train rows.csv --text mr --name mine"
        assert main(words.split()) == 2
    with command_raises(DataError, "--max-length 4", "line 10 (5 tokens)"):
        assert main(TRAIN.replace("32", "4").split()) == 2


@pytest.mark.witness("t5")
@pytest.mark.weekly
@pytest.mark.parametrize("name", ["t5", "mt5"])  # tied and not; flan_t5 is trained below
def test_an_encoder_decoder_is_trained_used_merged_converted_and_pushed(name, run):
    shutil.copytree(FIXTURES / name, "base")
    Path("base", "expected.npz").unlink()
    run(SHORT)
    adapted = logits(load_generator("runs/mine").model)
    assert np.abs(adapted - logits(load_t5("base")[1])).max() > 1e-2
    run("generate runs/mine --prompt food --max-new-tokens 2")
    run("merge runs/mine --out merged")
    np.testing.assert_allclose(logits(load_t5("merged")[1]), adapted, atol=1e-4)
    assert read_arrays("merged").keys() == read_arrays("base").keys()
    config = json.loads(Path("merged", "config.json").read_text())
    base = json.loads(Path("base", "config.json").read_text())
    assert {key: config[key] for key in base} == base
    assert Path("merged", "tokenizer.json").exists()
    run("convert runs/mine there --to peft")
    settings = json.loads(Path("there", "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"
    card = Path("there", "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card and "text2text-generation" in card
    run("push runs/mine me/mine --dry-run")


def test_metrics_of_texts_need_prompts_to_generate_for(run):
    shutil.copytree(FIXTURES / "t5", "base")
    with command_raises(UserError, "--metrics exact_match", "--exact-match"):
        assert main(f"{SHORT} --metrics exact_match perplexity".split()) == 2


@pytest.mark.weekly
def test_a_run_is_selected_by_rouge(run):
    pytest.importorskip("rouge_score", reason="needs rouge-score: adapters-jax[rouge]")
    shutil.copytree(FIXTURES / "flan_t5", "base")
    run(f"{TRAIN} --epochs 1 --exact-match 2 --limit 16 --metrics rougeL exact_match")
    config = json.loads(Path("runs/mine/config.json").read_text())
    assert config["metrics"] == ["rougeL", "exact_match"]
    (row,) = config["summary"]["results"]
    assert list(row["test"]) == ["rougeL", "exact_match"]
    assert 0.0 <= row["test"]["exact_match"] <= row["test"]["rougeL"] <= 1.0


@pytest.mark.weekly
def test_it_learns_to_answer_prompts(run):
    shutil.copytree(FIXTURES / "flan_t5", "base")
    targets = "**/{query,value,up,head}"
    Path("asked.csv").write_text("mr\nfood food Thai\nfood Greek\n")
    write_meanings(Path("rows.csv"), rows=480)  # of few epochs, each of which is scored and saved
    run(f"{TRAIN} --epochs 5 --evaluations 1 --exact-match 0 --rank 8 --targets {targets}")
    lines = run("generate runs/mine --file asked.csv --max-new-tokens 8 --json").splitlines()
    assert [json.loads(line)["completion"] for line in lines] == [
        "It serves Thai dishes",
        "It serves Greek dishes",
    ]
