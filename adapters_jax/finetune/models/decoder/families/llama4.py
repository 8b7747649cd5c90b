"""Llama 4 (text): attention to chunks, layers without positions, and experts in some layers.

Reference: Meta, The Llama 4 herd (2025), https://ai.meta.com/blog/llama-4-multimodal-intelligence
"""

from dataclasses import replace
from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.windows import types_of
from adapters_jax.finetune.models.decoder.names import LAYERS, NAMES, with_stacked_experts
from adapters_jax.finetune.models.parts.names import of_layers


def _read(values: Values) -> dict[str, Any]:
    layers = range(values.get("num_hidden_layers", 0))
    every, step = (values.get(name, 1) for name in (INTERVAL, STEP))
    ropes = values.get("no_rope_layers") or [int((i + 1) % every != 0) for i in layers]
    sparse = values.get("moe_layers", [i for i in layers if (i + 1) % step == 0])
    local = "chunked_attention" if values.get("attention_chunk_size") else "full_attention"
    types = values.get("layer_types") or [local if rope else "full_attention" for rope in ropes]
    warms = values.get("attn_temperature_tuning")
    return {
        **{"no_rope_layers": tuple(ropes), "layer_types": tuple(types)},
        "expert_layers": tuple(int(i in sparse) for i in layers),
        "shared_expert_intermediate_size": values.get("moe_intermediate_size"),
        "qk_norm": "unit" if values.get("use_qk_norm") else None,
        "warming_interval": values.get("floor_scale") if warms else None,
        "warming_scale": values.get("attn_scale", 0.1) if warms else 0.0,
    }


def _write(config: Any) -> dict[str, Any]:
    warms = config.warming_interval is not None
    return {
        "no_rope_layers": [int(kind.rope_theta is not None) for kind in config.layer_kinds],
        "layer_types": types_of(config),
        "moe_layers": [i for i, form in enumerate(config.layer_forms) if not form.dense],
        **{"use_qk_norm": config.qk_norm is not None, "attn_temperature_tuning": warms},
        **({"floor_scale": config.warming_interval} if warms else {}),
        **({"attn_scale": config.warming_scale} if warms else {}),
    }


INTERVAL, STEP = "no_rope_layer_interval", "interleave_moe_layer_step"
_NAMES = with_stacked_experts(NAMES, "feed_forward", "gate_up_proj", "down_proj")
_RULES = of_layers(
    *LAYERS,
    mlp__gate="feed_forward.gate_proj",
    mlp__up="feed_forward.up_proj",
    mlp__output="feed_forward.down_proj",
    mlp__shared__gate="feed_forward.shared_expert.gate_proj",
    mlp__shared__up="feed_forward.shared_expert.up_proj",
    mlp__shared__output="feed_forward.shared_expert.down_proj",
)
SCOUT: dict[str, Any] = {
    "max_position_embeddings": 10485760,
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192},
        **{"low_freq_factor": 1.0, "high_freq_factor": 1.0},
    },
}
MAVERICK: dict[str, Any] = {
    **{"max_position_embeddings": 1048576, "num_local_experts": 128},
    **{STEP: 2, "use_qk_norm": False},
}
KNOWN = {"Scout-17B-16E": SCOUT, "Maverick-17B-128E": MAVERICK}

LLAMA4 = Architecture(
    "llama4_text",
    "Llama4ForCausalLM",
    fixed={
        **{"rotary_interleaved": True, "expert_gate": "halves"},
        **{"router_scores": "sigmoid", "expert_reads_weighted": True},
    },
    defaults={
        **{"vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 16384},
        **{"moe_intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 40},
        **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072},
        **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_experts": 16, STEP: 1},
        **{"num_experts_per_tok": 1, "use_qk_norm": True, INTERVAL: 4, "floor_scale": 8192},
        **{"attention_chunk_size": 8192, "attn_temperature_tuning": True, "attn_scale": 0.1},
    },
    settings=(
        *("attention_bias", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        "attention_chunk_size",
    ),
    renamed={
        **{"intermediate_size_mlp": "intermediate_size", "num_local_experts": "num_experts"},
        "intermediate_size": "moe_intermediate_size",
    },
    read=_read,
    write=_write,
    names=replace(_NAMES, rules=(*_RULES, *_NAMES.rules), stacked=()),
    known={
        f"meta-llama/Llama-4-{name}": shape(*(5120, 8192, 48, 40, 8), **more)
        for name, more in KNOWN.items()
    },
)
