"""Gemma 4 (text): wider heads in layers with full attention, keys and values that layers share,
separate inputs for each layer, values with norms.

Reference: Gemma 4 (2026), https://ai.google.dev/gemma/docs/core/model_card_4
"""

from collections.abc import Mapping
from typing import Any

from adapters_jax.errors import UserError, shown
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.windows import alternating, types_of
from adapters_jax.finetune.models.decoder.names import NAMES_PER_LAYER

EXPERTS = {
    **{"num_experts": "num_experts", "top_k_experts": "num_experts_per_tok"},
    "moe_intermediate_size": "moe_intermediate_size",
}
HEADS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


def _read(values: Values) -> dict[str, Any]:
    types = alternating(values, 6)["layer_types"]
    types = (*types[:-1], "full_attention") if types else types  # the last one, whatever is said
    shares = values.get("attention_k_eq_v", False)
    sizes = {ours: values[ours] for ours in HEADS.values() if ours in values}
    if not shares:  # the setting has no effect then
        sizes.pop("num_global_key_value_heads", None)
    sizes = {"global_head_dim": 512, **sizes}
    if "per_layer_config" in values:
        sizes = _of_layers(values["per_layer_config"], types)
    names = ("rope_theta", "rope_local_base_freq")
    mixed = {name: values[name] for name in EXPERTS.values() if name in values}
    return {
        **(mixed if values.get("enable_moe_block") else {}),
        **{"layer_types": types, "embedding_multiplier": values.get("hidden_size", 1) ** 0.5},
        **{name: values[name] for name in names},
        **sizes,
    }


def _of_layers(given: Any, types: tuple[str, ...]) -> dict[str, Any]:
    """The sizes of heads with full attention, which must be alike."""
    whole = {str(at) for at, each in enumerate(types) if each == "full_attention"}
    each = given if isinstance(given, Mapping) else {}
    # transformers writes all numbers as long as the longest, "05" beside "11".
    each = {str(at).lstrip("0") or "0": own for at, own in each.items()}
    alike = all(own == each.get(min(whole, default="")) for own in each.values())
    first: dict[str, Any] = next(iter(each.values()), {})
    if set(each) != whole or not alike or not set(first) <= HEADS.keys():
        raise UserError(
            f"per_layer_config={shown(given)}, expected {' and '.join(HEADS)} of the layers with "
            "full attention, the same in all of them."
        )
    return {HEADS[name]: value for name, value in first.items()}


def _write(config: Any) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        whole |= {"rope_type": scaling.rope_type, "partial_rotary_factor": scaling.proportion}
        whole |= {} if scaling.factor == 1.0 else {"factor": scaling.factor}
    return {
        "layer_types": types_of(config),
        "rope_parameters": {"full_attention": whole, "sliding_attention": local},
        "enable_moe_block": config.num_experts > 0,
        **{name: getattr(config, ours) or None for name, ours in EXPERTS.items()},
    }


LARGE: dict[str, Any] = {
    **{"attention_k_eq_v": True, "sliding_window": 1024, "max_position_embeddings": 262144},
    **{"hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0},
}

GEMMA4 = Architecture(
    "gemma4_text",
    "Gemma4ForCausalLM",
    fixed={
        **{"norm_placement": "both", "qk_norm": "head", "attention_multiplier": 1.0},
        **{"value_norm": True, "layer_scalar": True, "experts_beside": True, "router_scale": True},
        **{"norm_topk_prob": True, "expert_gate": "halves"},
    },
    defaults={
        **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30},
        **{"num_attention_heads": 8, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
        "tie_word_embeddings": True,
        **{"num_key_value_heads": 4, "sliding_window": 512, "max_position_embeddings": 131072},
        **{"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "vocab_size": 262144},
        "rope_scaling": {"rope_type": "proportional", "proportion": 0.25, "factor": 1.0},
    },
    absent=("rope_theta", "rope_scaling"),
    settings=(
        *("attention_bias", "sliding_window", "final_logit_softcapping", "attention_k_eq_v"),
        *("num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input"),
        *("vocab_size_per_layer_input", *HEADS.values()),
    ),
    renamed={"hidden_activation": "hidden_act", "top_k_experts": "num_experts_per_tok"},
    read=_read,
    write=_write,
    supported={
        "use_bidirectional_attention": (None, False, "vision"),  # the latter among images
        "enable_moe_block": (False, True),
    },
    names=NAMES_PER_LAYER,
    known={
        "google/gemma-4-E4B": shape(
            *(2560, 10240, 42, 8, 2),
            **{"num_kv_shared_layers": 18, "final_logit_softcapping": 30.0},
        ),
        "google/gemma-4-31B": shape(5376, 21504, 60, 32, 16, **LARGE, num_global_key_value_heads=4),
        "google/gemma-4-26B-A4B": shape(
            *(2816, 2112, 30, 16, 8),
            **{**LARGE, "num_global_key_value_heads": 2, "enable_moe_block": True},
            **{"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        ),
    },
)
