"""GPT-NeoX and Pythia: attention and feed-forward side by side, each behind its own layer norm.

Checkpoints fuse query, key and value head by head. A quarter of each head is rotated.

Reference: Black et al., GPT-NeoX-20B (2022), https://arxiv.org/abs/2204.06745; Biderman et al.,
Pythia (2023), https://arxiv.org/abs/2304.01373
"""

from typing import Any

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.names import (
    LAYERS,
    MLP_NEOX,
    NORMS_BEFORE,
    fused_by_head,
)
from adapters_jax.finetune.models.parts.names import NNX, of_layers

NAMES = NameTable(
    rules=(
        Rule("embeddings", "embed_in"),
        Rule("norm", "final_layer_norm"),
        Rule("head", "embed_out"),
        *of_layers(
            *LAYERS,
            **fused_by_head("attention.query_key_value"),
            attention__output="attention.dense",
            **MLP_NEOX,
        ),
        *NORMS_BEFORE,
    ),
    prefixes=("gpt_neox.",),
    # Buffers of older files, the causal mask and rotary tables; a head that repeats the embeddings.
    ignored=(
        r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"embed_out\.weight",
    ),
    stack=NNX,
    tied=("embed_out", "embed_in"),
    heads=("embed_out",),
)
SIZES = {  # and the padded vocabulary
    "70m": ((512, 6, 8), 50304),
    "160m": ((768, 12, 12), 50304),
    "410m": ((1024, 24, 16), 50304),
    "1b": ((2048, 16, 8), 50304),
    "1.4b": ((2048, 24, 16), 50304),
    "2.8b": ((2560, 32, 32), 50304),
    "6.9b": ((4096, 32, 32), 50432),
    "12b": ((5120, 36, 40), 50688),
}


def _read(values: Values) -> dict[str, Any]:
    return {"parallel": "own" if values.get("use_parallel_residual", True) else None}


def _write(config: Any) -> dict[str, Any]:
    return {"use_parallel_residual": config.parallel == "own"}


def _neox(width: int, layers: int, heads: int, **more: Any) -> Values:
    return shape(width, 4 * width, layers, heads, heads, **more)


GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    fixed={"norm_type": "layer", "mlp_gate": False, "mlp_bias": True, "head_axis": True},
    defaults={
        **{"rms_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25},
        "attention_bias": True,
    },
    absent=("num_key_value_heads", "head_dim"),
    settings=("attention_bias", "partial_rotary_factor"),
    renamed={
        "layer_norm_eps": "rms_norm_eps",
        "rotary_pct": "partial_rotary_factor",
        "rotary_emb_base": "rope_theta",
    },
    read=_read,
    write=_write,
    names=NAMES,
    known={
        **{
            f"EleutherAI/pythia-{name}": _neox(*sizes, vocab_size=vocab)
            for name, (sizes, vocab) in SIZES.items()
        },
        "EleutherAI/gpt-neox-20b": _neox(6144, 44, 64, vocab_size=50432, hidden_act="gelu_fast"),
    },
)
