"""DeepSeek V3 and R1: latent attention, and experts that a sigmoid router chooses from groups.

Reference: DeepSeek-V3 technical report (2024), https://arxiv.org/abs/2412.19437
"""

import math
from dataclasses import replace
from typing import Any

from adapters_jax.files.names import ParameterRule
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.experts import PROJECTIONS
from adapters_jax.finetune.models.decoder.latent import LatentSizes
from adapters_jax.finetune.models.decoder.names import LAYERS, NAMES, with_experts
from adapters_jax.finetune.models.decoder.rope import read_scaling
from adapters_jax.finetune.models.parts.names import of_layers

_SIZES = {
    **{"kv_rank": "kv_lora_rank", "query_rank": "q_lora_rank", "plain": "qk_nope_head_dim"},
    **{"rotated": "qk_rope_head_dim", "value": "v_head_dim"},
}


def _read(values: Values) -> dict[str, Any]:
    given: dict[str, Any] = {ours: values.get(theirs) for ours, theirs in _SIZES.items()}
    sizes = LatentSizes(**given)
    scaling = read_scaling(values, values.get("max_position_embeddings", 4096))
    factor, shared = sizes.width**-0.5, values.get("n_shared_experts", 0)
    if scaling and scaling.mscale_all_dim and scaling.factor > 1:
        factor *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2
    first, layers = (values.get(k, 0) for k in ("first_k_dense_replace", "num_hidden_layers"))
    return {
        **{"latent": sizes, "head_dim": sizes.rotated, "attention_multiplier": factor},
        "expert_layers": tuple(int(i >= first) for i in range(layers)),
        "shared_expert_intermediate_size": shared * values.get("moe_intermediate_size", 0) or None,
    }


def _write(config: Any) -> dict[str, Any]:
    inner = config.moe_intermediate_size or config.intermediate_size
    shared = (config.shared_expert_intermediate_size or 0) // inner
    return {
        **{theirs: getattr(config.latent, ours) for ours, theirs in _SIZES.items()},
        **{"qk_head_dim": config.latent.width, "n_shared_experts": shared},
        "first_k_dense_replace": config.expert_layers.count(0),
    }


_RULES = of_layers(
    *LAYERS,
    attention__query_down="self_attn.q_a_proj",
    attention__query_norm="self_attn.q_a_layernorm",
    attention__query_up="self_attn.q_b_proj",
    attention__latent="self_attn.kv_a_proj_with_mqa",
    attention__latent_norm="self_attn.kv_a_layernorm",
    attention__key_value="self_attn.kv_b_proj",
    mlp__shared__gate="mlp.shared_experts.gate_proj",
    mlp__shared__up="mlp.shared_experts.up_proj",
    mlp__shared__output="mlp.shared_experts.down_proj",
)
_ROUTER = (
    ParameterRule(r"layers/(\d+)/mlp/router/kernel", r"layers.\1.mlp.gate.weight", swapped=True),
    ParameterRule(r"layers/(\d+)/mlp/correction", r"layers.\1.mlp.gate.e_score_correction_bias"),
)
_NAMES = with_experts(NAMES, "mlp", *PROJECTIONS)
YARN: dict[str, Any] = {
    **{"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
}

DEEPSEEK_V3 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    fixed={"router_scores": "sigmoid", "router_correction": True},
    defaults={
        **{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432},
        **{"num_hidden_layers": 61, "num_attention_heads": 128, "max_position_embeddings": 4096},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "rotary_interleaved": True},
        **{"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        **{"n_shared_experts": 1, "first_k_dense_replace": 3, "norm_topk_prob": True},
        **{"router_groups": 8, "router_groups_taken": 4, "router_factor": 2.5},
    },
    settings=(
        *("attention_bias", "rotary_interleaved", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "norm_topk_prob", "router_groups", "router_groups_taken"),
        "router_factor",
    ),
    renamed={
        **{"n_routed_experts": "num_experts", "rope_interleave": "rotary_interleaved"},
        **{"n_group": "router_groups", "topk_group": "router_groups_taken"},
        "routed_scaling_factor": "router_factor",
    },
    read=_read,
    write=_write,
    supported={
        **{"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
    },
    names=replace(
        _NAMES,
        rules=(*_RULES, *_NAMES.rules),
        parameters=(*_ROUTER, *_NAMES.parameters),
        ignored=(*_NAMES.ignored, r"layers\.61\..*"),  # a layer that predicts a further token
    ),
    known={
        **{
            f"deepseek-ai/DeepSeek-{name}": shape(
                *(7168, 18432, 61, 128, 128),
                **{"rope_scaling": YARN, "max_position_embeddings": 163840},
            )
            for name in ("V3", "V3-0324", "V3.1", "R1", "R1-0528")
        },
        "moonshotai/Moonlight-16B-A3B": shape(
            *(2048, 11264, 27, 16, 16),
            **{"vocab_size": 163840, "rope_theta": 50000.0, "max_position_embeddings": 8192},
            **{"rms_norm_eps": 1e-5, "q_lora_rank": None, "n_routed_experts": 64},
            **{"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2},
            **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
            first_k_dense_replace=1,
        ),
    },
)
