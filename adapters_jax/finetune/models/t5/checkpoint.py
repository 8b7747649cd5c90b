"""The names that checkpoints of T5 have for our modules; loads and saves such checkpoints."""

import re
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from adapters_jax.distributed.sharding import Rules
from adapters_jax.files.names import NameTable, Rule
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.checkpoint import SHARD, filled, save_tensors, tensors_of
from adapters_jax.finetune.models.parts.names import NNX
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.finetune.models.t5.model import T5, abstract_t5


def _sublayer(stack: str, number: int, ours: str, theirs: str, **parts: str) -> tuple[Rule, ...]:
    """Rules for a sublayer of each block of a stack: its norm, and its projections by our names."""
    before, block = rf"({stack})/layers/(\d+)/{ours}", rf"\1.block.\2.layer.{number}"
    projections = (Rule(f"{before}/{own}", f"{block}.{theirs}.{p}") for own, p in parts.items())
    return (Rule(f"{before}_norm", f"{block}.layer_norm"), *projections)


_ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}
_MLP = {"intermediate": "wi", "gate": "wi_0", "up": "wi_1", "output": "wo"}
_SELF, _CROSS, _FEED_FORWARD = "SelfAttention", "EncDecAttention", "DenseReluDense"

NAMES = NameTable(
    rules=(
        Rule("embeddings", "shared"),
        Rule("head", "lm_head"),
        Rule("(encoder|decoder)/norm", r"\1.final_layer_norm"),
        # The first block of each stack holds the biases that all its blocks share.
        Rule(
            "(encoder|decoder)/position_bias",
            rf"\1.block.0.layer.0.{_SELF}.relative_attention_bias",
        ),
        *_sublayer("encoder|decoder", 0, "attention", _SELF, **_ATTENTION),
        *_sublayer("decoder", 1, "cross_attention", _CROSS, **_ATTENTION),
        *_sublayer("encoder", 1, "mlp", _FEED_FORWARD, **_MLP),
        *_sublayer("decoder", 2, "mlp", _FEED_FORWARD, **_MLP),
    ),
    prefixes=("",),
    # Copies of the embedding; biases of older files that nothing reads.
    ignored=(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"lm_head\.weight",
        rf"decoder\.block\.0\.layer\.1\.{_CROSS}\.relative_attention_bias\.weight",
    ),
    stack=NNX,
    tied=("lm_head", "shared"),
    held_twice=("shared",),  # as encoder.embed_tokens and decoder.embed_tokens
)


def load_t5(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> tuple[T5Config, T5]:
    """Loads a T5, Flan-T5 or mT5 from a directory or the Hugging Face Hub.

    Args:
        name_or_path, revision, mesh, rules: as in `load_decoder`, without GGUF files.
        options: `dtype`, `param_dtype`, `attention`, `remat` and `scan` of `T5`.

    Raises:
        UserError, MismatchError: as in `load_decoder`.
    """
    directory = huggingface.resolve(name_or_path, revision)
    config, tensors = huggingface.read_checkpoint(T5Config, directory)
    version = str(read_json(directory / "config.json").get("transformers_version"))
    if not config.tie_word_embeddings and re.match(r"[5-9]\.|\d\d", version):
        # The head of transformers 5 is the embedding where the file lacks it, without its scale.
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    return config, filled(abstract_t5(config, **options), tensors, NAMES, mesh, rules)


def save_t5(
    directory: str | Path, config: T5Config, model: T5, *, max_shard_size: int = SHARD, **more: Any
) -> None:
    """Writes a checkpoint that `load_t5` and transformers read; its arguments: `save_decoder`."""
    settings = {**more, **config.to_dict()}
    save_tensors(directory, settings, tensors_of(model, NAMES), max_shard_size)
