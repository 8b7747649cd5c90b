"""The names that checkpoints of Whisper have for our modules; loads and saves such checkpoints."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from adapters_jax.distributed.sharding import Rules
from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.checkpoint import SHARD, filled, save_tensors, tensors_of
from adapters_jax.finetune.models.parts.names import NNX
from adapters_jax.finetune.models.whisper.config import WhisperConfig
from adapters_jax.finetune.models.whisper.model import Whisper, abstract_whisper

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
_NORMS = {
    "attention_norm": "self_attn_layer_norm",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
}
_IN_LAYER = {
    **{f"attention/{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attention/{ours}": f"encoder_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{"mlp/up": "fc1", "mlp/output": "fc2", **_NORMS},
}
_STACK = "(encoder|decoder)"

NAMES = NameTable(
    rules=(
        Rule("decoder/embeddings", "decoder.embed_tokens"),
        Rule("encoder/(conv[12])", r"encoder.\1"),
        Rule(f"{_STACK}/position_embeddings", r"\1.embed_positions"),
        Rule(f"{_STACK}/norm", r"\1.layer_norm"),
        *(
            Rule(rf"{_STACK}/layers/(\d+)/{ours}", rf"\1.layers.\2.{theirs}")
            for ours, theirs in _IN_LAYER.items()
        ),
    ),
    prefixes=("model.",),
    ignored=(r"proj_out\.weight",),  # a copy of the embedding
    stack=NNX,
    tied=("proj_out", "decoder.embed_tokens"),
    heads=("proj_out",),
)


def load_whisper(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> tuple[WhisperConfig, Whisper]:
    """Loads a Whisper from a directory or the Hugging Face Hub.

    Args:
        name_or_path, revision, mesh, rules: as in `load_decoder`, without GGUF files.
        options: `dtype`, `param_dtype`, `attention`, `remat` and `scan` of `Whisper`.

    Raises:
        UserError, MismatchError: as in `load_decoder`.
    """
    config, tensors = huggingface.read_checkpoint(WhisperConfig, name_or_path, revision)
    return config, filled(abstract_whisper(config, **options), tensors, NAMES, mesh, rules)


def save_whisper(
    directory: str | Path,
    config: WhisperConfig,
    model: Whisper,
    *,
    max_shard_size: int = SHARD,
    **more: Any,
) -> None:
    """Writes a checkpoint that `load_whisper` and transformers read; see `save_decoder`."""
    settings = {**more, **config.to_dict()}
    save_tensors(directory, settings, tensors_of(model, NAMES), max_shard_size)
