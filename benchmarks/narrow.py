"""Narrow Llamas, trained on WikiText by `adapters-jax finetune`, to fine-tune on other texts."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
from flax import nnx
from tokenizers import ByteLevelBPETokenizer

from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from benchmarks.harness import DATA, ROOT

WIDTHS, EPOCHS = (64, 128, 256, 512), 4.0
TEXTS = DATA / "wikitext2" / "valid.txt"
END = "<end>"
SHAPE = DecoderConfig(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=512,
)


def path(width: int) -> str:
    """The directory of the checkpoint of a width, from the root of the repository."""
    return f"comparisons/narrow/llama-{width}"


def train(width: int, epochs: float = EPOCHS) -> None:
    """Writes the checkpoint of a width, unless it is there.

    Four layers with heads of 32, and a vocabulary of 4,096 tokens of the same texts.
    """
    out = ROOT / path(width)
    if out.exists():
        return
    made = out.with_name(f"{out.name}-made")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    config = dataclasses.replace(SHAPE, **sizes, **heads)
    save_decoder(made / "random", config, Decoder(config, rngs=nnx.Rngs(jax.random.key(width))))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(TEXTS)], SHAPE.vocab_size, special_tokens=[END], show_progress=False)
    tokenizer.save(str(made / "random" / "tokenizer.json"))
    words = {"eos_token": {"content": END}}
    (made / "random" / "tokenizer_config.json").write_text(json.dumps(words))
    flags = f"--train {TEXTS} --text text --method full --learning-rate 2e-3 --epochs {epochs:g}"
    flags += f" --max-length 128 --batch-size 8 --held-out 50 --runs {made} --name run"
    _command("finetune", "--model", str(made / "random"), *flags.split())
    _command("merge", str(made / "run"), "--out", str(made / "whole"))
    (made / "whole").rename(out)
    shutil.rmtree(made)


def _command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "adapters_jax", *words], cwd=ROOT, check=True)
