"""Qwen3-Next and Qwen3.5 (text): most layers have the gated delta rule, some a gated attention.

Reference: Qwen3-Next (2025), https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct; Qwen3.5
(2026), https://huggingface.co/Qwen/Qwen3.5-27B
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.delta import DeltaSizes
from adapters_jax.finetune.models.decoder.families.experts import OWN, PROJECTIONS
from adapters_jax.finetune.models.decoder.families.windows import alternating, types_of
from adapters_jax.finetune.models.decoder.names import NAMES, with_delta, with_experts

SIZES = {
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_key_head_dim": "key_width",
    "linear_value_head_dim": "value_width",
    "linear_conv_kernel_dim": "kernel",
}


def _read(values: Values, fused: bool) -> dict[str, Any]:
    types = alternating(values, values.get("full_attention_interval", 4), "linear_attention")
    given = {ours: values[name] for name, ours in SIZES.items() if name in values}
    return {**types, "delta": DeltaSizes(**given, fused=fused)}


def _write(config: Any) -> dict[str, Any]:
    sizes = {name: getattr(config.delta, ours) for name, ours in SIZES.items()}
    return {**sizes, "layer_types": types_of(config)}


FIXED: dict[str, Any] = {"norm_offset": 1.0, "qk_norm": "head", "attention_gate": True}
DEFAULTS: dict[str, Any] = {
    **{"max_position_embeddings": 32768, "head_dim": 256, "partial_rotary_factor": 0.25},
    **{"num_key_value_heads": 2, "vocab_size": 248320},
}
EXPERTS: dict[str, Any] = {
    **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    **{"num_experts": 256, "num_experts_per_tok": 8},
}
SETTINGS = ("attention_bias", "partial_rotary_factor")
MIXTURE = (*OWN, "moe_intermediate_size", "shared_expert_intermediate_size")
MIXED = with_delta(with_experts(NAMES, "mlp", *PROJECTIONS))
LONG: dict[str, Any] = {"rope_theta": 1e7, "max_position_embeddings": 262144}


QWEN3_NEXT = Architecture(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    fixed={**FIXED, "shared_expert_gate": True},
    defaults={
        **{**DEFAULTS, **EXPERTS, "vocab_size": 151936, "norm_topk_prob": True},
        **{"num_experts": 512, "num_experts_per_tok": 10},
    },
    settings=(*SETTINGS, *MIXTURE, "norm_topk_prob"),
    read=lambda values: _read(values, fused=True),
    write=_write,
    supported={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    names=MIXED,
    known={
        f"Qwen/Qwen3-Next-80B-A3B-{kind}": shape(2048, 5120, 48, 16, 2, **LONG)
        for kind in ("Instruct", "Thinking")
    },
)
QWEN3_5 = Architecture(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    fixed=FIXED,
    defaults={
        **{**DEFAULTS, "num_key_value_heads": 4, "num_attention_heads": 16},
        **{"intermediate_size": 12288, "num_hidden_layers": 32},
    },
    settings=SETTINGS,
    read=lambda values: _read(values, fused=False),
    write=_write,
    names=with_delta(NAMES),
    known={
        f"Qwen/Qwen3.5-{size}": shape(
            *sizes, **LONG, linear_num_value_heads=heads, tie_word_embeddings=tied
        )
        for size, sizes, heads, tied in (
            ("0.8B", (1024, 3584, 24, 8, 2), 16, True),
            ("4B", (2560, 9216, 32, 16, 4), 32, True),
            ("9B", (4096, 12288, 32, 16, 4), 32, False),
            ("27B", (5120, 17408, 64, 24, 4), 48, False),
        )
    },
)
QWEN3_5_MOE = Architecture(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    fixed={**FIXED, "shared_expert_gate": True, "norm_topk_prob": True},
    defaults={
        **{**DEFAULTS, **EXPERTS, "num_attention_heads": 16},
        **{"hidden_size": 2048, "num_hidden_layers": 40},
    },
    absent=("intermediate_size",),
    settings=(*SETTINGS, *MIXTURE),
    read=lambda values: _read(values, fused=False),
    write=_write,
    names=MIXED,
    known={"Qwen/Qwen3.5-35B-A3B": shape(2048, 512, 40, 16, 2, **LONG)},
)
