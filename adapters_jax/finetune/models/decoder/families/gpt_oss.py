"""gpt-oss: experts with biases, attention with sinks, and a window in every other layer.

Reference: OpenAI, gpt-oss-120b and gpt-oss-20b model card (2025), https://arxiv.org/abs/2508.10925
"""

from dataclasses import replace
from typing import Any

from adapters_jax.files.names import ParameterRule
from adapters_jax.finetune.models.decoder.architecture import Architecture, shape
from adapters_jax.finetune.models.decoder.families.windows import alternating, types_of
from adapters_jax.finetune.models.decoder.names import NAMES, with_stacked_experts

YARN: dict[str, Any] = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 4096},
}
_NAMES = with_stacked_experts(
    NAMES, "mlp", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"
)
_SINKS = ParameterRule(r"layers/(\d+)/attention/sinks", r"layers.\1.self_attn.sinks")

GPT_OSS = Architecture(
    "gpt_oss",
    "GptOssForCausalLM",
    fixed={
        **{"attention_sinks": True, "router_bias": True, "norm_topk_prob": True},
        # x * sigmoid(1.702 x), though its config.json says silu
        **{"expert_bias": True, "expert_gate": "interleaved", "hidden_act": "quick_gelu"},
    },
    defaults={
        **{"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880},
        **{"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "rope_scaling": YARN},
        **{"max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True},
        **{"num_experts": 128, "num_experts_per_tok": 4, "expert_limit": 7.0},
    },
    settings=(
        *("attention_bias", "sliding_window", "num_experts", "num_experts_per_tok"),
        "expert_limit",
    ),
    renamed={"num_local_experts": "num_experts", "swiglu_limit": "expert_limit"},
    read=lambda values: alternating(values, every=2),
    write=lambda config: {"hidden_act": "silu", "layer_types": types_of(config)},
    supported={"hidden_act": ("silu",), "swiglu_alpha": (1.702,)},
    names=replace(_NAMES, parameters=(*_NAMES.parameters, _SINKS)),
    known={
        f"openai/gpt-oss-{size}": shape(*(2880, 2880, layers, 64, 8), num_local_experts=experts)
        for size, layers, experts in (("20b", 24, 32), ("120b", 36, 128))
    },
)
