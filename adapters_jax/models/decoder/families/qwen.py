"""Qwen 2 and 2.5, with biases on query, key and value, and Qwen 3, with norms of query and key.

Reference: Qwen2.5 technical report (2024), https://arxiv.org/abs/2412.15115; Qwen3 technical report
(2025), https://arxiv.org/abs/2505.09388
"""

from typing import Any

from adapters_jax.models.decoder.architecture import Architecture, Values
from adapters_jax.models.decoder.families.windows import as_switched, switched


def _read(values: Values) -> dict[str, Any]:
    first = values.get("max_window_layers", 28)
    return switched(values, lambda layer: layer >= first)


QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    fixed={"attention_bias": True, "attention_output_bias": False},
    defaults={"max_position_embeddings": 32768},
    read=_read,
    write=as_switched,
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    fixed={"qk_norm": "head"},
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    settings=("attention_bias",),
    read=_read,
    write=as_switched,
)
