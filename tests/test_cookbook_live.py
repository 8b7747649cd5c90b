"""Recipes of Tinker's cookbook, unchanged but for names and sizes, train on `serve --train`.

They are supervised chat, preferences (DPO, whose loss the client computes itself) and
reinforcement learning with a reward that is checked. `.ci/run cookbook` has the packages.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.serving import serving
from helpers.tiny import write_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("tinker_cookbook", reason="needs pip install adapters-jax[cookbook-test]")
pytestmark = pytest.mark.slow

MODEL, DPO = "tiny", str(Path(__file__).parent / "fixtures" / "cookbook_dpo.py")
COMMON = ["renderer_name=qwen3_instruct", f"model_name={MODEL}", "learning_rate=0.02"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What runs a recipe on a server, and reads the metrics of its steps."""
    folder = tmp_path_factory.mktemp("cookbook")
    write_base(folder / MODEL)
    write_rows(folder)
    kept = ("--rank", "8", "--context", "256", "--rows", "4", "--keep", str(folder / "kept"))
    with contextlib.chdir(folder), serving(MODEL, "--train", *kept) as server:

        def run(recipe, *flags):
            own = {"TINKER_API_KEY": "tml-any", "HF_HUB_OFFLINE": "1"}
            log = folder / Path(recipe).name
            words = [*COMMON, f"base_url={server.address}", f"log_path={log}", *flags]
            entry = [recipe] if recipe == DPO else ["-m", recipe]
            command = [sys.executable, *entry, *words]
            done = subprocess.run(
                command, env={**os.environ, **own}, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]

        yield run


def write_base(directory):
    """A random Llama whose tokens are bytes and those of ChatML."""
    write_llama(directory, vocab_size=272, max_position_embeddings=256)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(folder):
    """Conversations, and pairs of answers."""

    def said(role, text):
        return {"role": role, "content": text}

    chats = [
        {"messages": [said("user", f"Name fruit {i}."), said("assistant", "Fig.")]}
        for i in range(16)
    ]
    pairs = [
        {
            "comparison": {
                "prompt_conversation": [said("user", f"Help with {i}?")],
                "completion_A": [said("assistant", "Gladly.")],
                "completion_B": [said("assistant", "No.")],
            },
            "label": "A",
        }
        for i in range(16)
    ]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)


def test_supervised_chat(run):
    steps = run(
        "tinker_cookbook.recipes.chat_sl.train",
        *("dataset=chats.jsonl", "lora_rank=8", "batch_size=8", "num_epochs=8"),
        *("max_length=200", "eval_every=0", "save_every=0"),
    )
    losses = [step["train_mean_nll"] for step in steps]
    assert len(losses) == 16
    # No further: the unembedding is the embedding here, which LoRA leaves as it is.
    assert losses[-1] < losses[0] - 0.4


def test_preferences_with_the_clients_own_loss(run):
    steps = run(DPO, "pairs=pairs.jsonl")
    assert steps[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the base
    assert steps[-1]["dpo_loss"] < 0.5
    assert steps[-1]["margin"] > 0.3


def test_reinforcement_learning(run):
    """What a token's logarithm is in sampling is what it is in the pass that trains."""
    steps = run(
        "tinker_cookbook.recipes.math_rl.train",
        *("env=arithmetic", "lora_rank=8", "group_size=8", "groups_per_batch=4"),
        *("max_tokens=5", "max_steps=4", "eval_every=0", "save_every=0"),
    )
    assert len(steps) == 4
    assert all(abs(step["optim/kl_sample_train_v1"]) < 1e-5 for step in steps)
    assert np.isfinite([step["env/all/reward/total"] for step in steps]).all()
    assert steps[0]["optim/entropy"] == pytest.approx(math.log(272), rel=0.2)
