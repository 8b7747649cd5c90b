"""Qwen 2 and 2.5, with biases on query, key and value, and Qwen 3, with norms of query and key.

Reference: Qwen2.5 technical report (2024), https://arxiv.org/abs/2412.15115; Qwen3 technical report
(2025), https://arxiv.org/abs/2505.09388
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.windows import as_switched, switched


def _read(values: Values) -> dict[str, Any]:
    first = values.get("max_window_layers", 28)
    return switched(values, lambda layer: layer >= first)


def _qwen(*sizes: int, **more: Any) -> Values:
    usual = {"vocab_size": 151936, "rope_theta": 1e6, "max_position_embeddings": 32768}
    return shape(*sizes, **{**usual, **more})


TIED: dict[str, Any] = {"tie_word_embeddings": True}
SIZES: dict[str, Any] = {"vocab_size": 151936, "intermediate_size": 22016}
LONG: dict[str, Any] = {"rope_theta": 5e6, "max_position_embeddings": 262144}
LARGE: dict[str, Any] = {"vocab_size": 152064, "max_position_embeddings": 131072}
LARGE_VL: dict[str, Any] = {**LARGE, "max_position_embeddings": 128000}
KNOWN2 = {
    "0.5B": _qwen(896, 4864, 24, 14, 2, **TIED),
    "1.5B": _qwen(1536, 8960, 28, 12, 2, **TIED),
    "7B": _qwen(3584, 18944, 28, 28, 4, **LARGE),
    "72B": _qwen(8192, 29568, 80, 64, 8, rms_norm_eps=1e-5, **LARGE),
}
KNOWN25 = {
    **KNOWN2,
    "3B": _qwen(2048, 11008, 36, 16, 2, **TIED),
    "14B": _qwen(5120, 13824, 48, 40, 8, rms_norm_eps=1e-5, **LARGE),
    "32B": _qwen(5120, 27648, 64, 40, 8, rms_norm_eps=1e-5, **LARGE),
}
# The text models of those that read images.
KNOWN_VL = {
    "2-VL-2B": KNOWN2["1.5B"],
    "2-VL-7B": _qwen(3584, 18944, 28, 28, 4, vocab_size=152064),
    "2-VL-72B": _qwen(8192, 29568, 80, 64, 8, vocab_size=152064),
    "2.5-VL-3B-Instruct": _qwen(2048, 11008, 36, 16, 2, max_position_embeddings=128000, **TIED),
    "2.5-VL-7B-Instruct": _qwen(3584, 18944, 28, 28, 4, **LARGE_VL),
    "2.5-VL-32B-Instruct": _qwen(5120, 27648, 64, 40, 8, **LARGE_VL),
    "2.5-VL-72B-Instruct": _qwen(8192, 29568, 80, 64, 8, **LARGE_VL),
}
KNOWN3 = {
    "0.6B": _qwen(1024, 3072, 28, 16, 8, **TIED),
    "1.7B": _qwen(2048, 6144, 28, 16, 8, **TIED),
    "4B": _qwen(2560, 9728, 36, 32, 8, **TIED),
    "8B": _qwen(4096, 12288, 36, 32, 8),
    "14B": _qwen(5120, 17408, 40, 40, 8),
    "32B": _qwen(5120, 25600, 64, 64, 8),
}

QWEN2 = Architecture(
    "qwen2",
    "Qwen2ForCausalLM",
    fixed={"attention_bias": True, "attention_output_bias": False},
    defaults={**SIZES, "max_position_embeddings": 32768},
    read=_read,
    write=as_switched,
    known={
        **{f"Qwen/Qwen2-{size}": values for size, values in KNOWN2.items()},
        **{f"Qwen/Qwen2.5-{size}": values for size, values in KNOWN25.items()},
        **{f"Qwen/Qwen{name}": values for name, values in KNOWN_VL.items()},
    },
)
QWEN3 = Architecture(
    "qwen3",
    "Qwen3ForCausalLM",
    fixed={"qk_norm": "head"},
    defaults={**SIZES, "max_position_embeddings": 32768, "head_dim": 128},
    settings=("attention_bias",),
    read=_read,
    write=as_switched,
    known={
        **{
            f"Qwen/Qwen3-{size}": {**values, "head_dim": 128, "max_position_embeddings": 40960}
            for size, values in KNOWN3.items()
        },
        **{
            f"Qwen/Qwen3-VL-{size}-Instruct": {**KNOWN3[like], "head_dim": 128, **LONG}
            for size, like in {"2B": "1.7B", "4B": "4B", "8B": "8B", "32B": "32B"}.items()
        },
    },
)
