"""The commands on tiny checkpoints of decoders, one of each kind of layers and files.

What the commands do with a decoder depends on its `Architecture` alone: test_decoder_families reads
and writes the files of every family, and the live tests train, merge and convert adapters on each.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.tiny import write_llama, write_meanings

from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.models.decoder import DecoderConfig, load_decoder

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
TRAIN = (
    "finetune --model base --train rows.csv --prompt mr --completion ref --max-length 24 "
    "--name mine --method lora --rank 2 --epochs 1 --exact-match 0 --no-baselines --limit 16 "
    "--learning-rate 0.01"
)
WITNESSES = (
    "llama",
    "gpt2",  # transposed and fused kernels, learnt positions
    "gpt_neox",  # fused by heads, and an output layer of its own
    "gpt_oss",  # experts in one tensor, and sinks
    "deepseek_v3",  # latent attention, and unlike layers
    "qwen3_next",  # linear attention, and an expert for all
)
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


@pytest.mark.witness("llama")
@pytest.mark.slow
@pytest.mark.parametrize("name", WITNESSES)
def test_a_decoder_is_trained_used_merged_converted_and_pushed(name, run):
    shutil.copytree(FIXTURES / name, "base")
    write_llama(Path("words"), num_hidden_layers=1)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("words", file), "base")
    more = " --targets **/{query_up,key_value}" if name == "deepseek_v3" else ""
    run(TRAIN + more)
    adapted = logits(load_generator("runs/mine").model)
    assert np.abs(adapted - logits(load_decoder("base")[1])).max() > 1e-2
    run("generate runs/mine --prompt food --max-new-tokens 2")
    run("merge runs/mine --out merged")
    np.testing.assert_allclose(logits(load_decoder("merged")[1]), adapted, atol=1e-4)
    assert read_arrays("merged").keys() == read_arrays("base").keys()
    written, read = (DecoderConfig.from_json(Path(d, "config.json")) for d in ("merged", "base"))
    assert written.to_dict() == read.to_dict()
    assert json.loads(Path("merged", "config.json").read_text())["eos_token_id"] == 2
    run("convert runs/mine there --to peft")
    assert Path("there", "adapter_model.safetensors").exists()
    run("push runs/mine me/mine --dry-run")
