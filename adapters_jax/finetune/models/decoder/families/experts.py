"""Mixtral, Qwen 3 with experts and OLMoE: decoders whose feed-forward is a mixture of experts.

Reference: Jiang et al., Mixtral of experts (2024), https://arxiv.org/abs/2401.04088; Qwen3
technical report (2025), https://arxiv.org/abs/2505.09388; Muennighoff et al., OLMoE (2024),
https://arxiv.org/abs/2409.02060
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.names import NAMES, with_experts

OWN = ("num_experts_per_tok", "num_experts")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _qwen(values: Values) -> dict[str, Any]:
    """The window, and the number of experts by its name in transformers 5."""
    found = {}
    if values.get("use_sliding_window"):
        found["sliding_window"] = values.get("sliding_window")
    if values.get("num_local_experts") is not None:
        found["num_experts"] = values["num_local_experts"]
    return found


MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    fixed={"norm_topk_prob": True},
    defaults={
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        **{"max_position_embeddings": 131072, "num_experts": 8, "num_experts_per_tok": 2},
    },
    settings=(*OWN, "sliding_window"),
    renamed={"num_local_experts": "num_experts"},
    names=with_experts(NAMES, "block_sparse_moe", "w1", "w3", "w2"),
    known={
        "mistralai/Mixtral-8x7B-v0.1": shape(4096, 14336, 32, 32, 8, max_position_embeddings=32768),
        "mistralai/Mixtral-8x22B-v0.1": shape(
            6144, 16384, 56, 48, 8, vocab_size=32768, max_position_embeddings=65536
        ),
    },
)
QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    fixed={"qk_norm": "head"},
    defaults={
        **{"num_key_value_heads": 4, "max_position_embeddings": 32768},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    },
    settings=(*OWN, "attention_bias", "norm_topk_prob", "moe_intermediate_size"),
    read=_qwen,
    write=lambda config: {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    },
    supported={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    names=with_experts(NAMES, "mlp", *PROJECTIONS),
    known={
        f"Qwen/Qwen3-{name}": shape(
            *sizes,
            **{"vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "norm_topk_prob": True},
            moe_intermediate_size=inner,
            max_position_embeddings=40960,
        )
        for name, sizes, inner in (
            ("30B-A3B", (2048, 6144, 48, 32, 4), 768),
            ("235B-A22B", (4096, 12288, 94, 64, 4), 1536),
        )
    },
)
OLMOE = Architecture(
    "olmoe",
    "OlmoeForCausalLM",
    fixed={"qk_norm": "projection"},
    defaults={
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        **{"num_experts": 64, "num_experts_per_tok": 8},
    },
    settings=(*OWN, "attention_bias", "norm_topk_prob"),
    supported={"clip_qkv": (None,)},
    names=with_experts(NAMES, "mlp", *PROJECTIONS),
    known={"allenai/OLMoE-1B-7B-0924": shape(2048, 1024, 16, 16, 16, vocab_size=50304)},
)
