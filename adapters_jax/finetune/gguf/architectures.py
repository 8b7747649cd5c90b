"""How llama.cpp stores each architecture that we read: its fields, and the names of its tensors.

Fields are named after the architecture, `qwen3.block_count`; the names here leave the prefix out.

Reference: https://github.com/ggml-org/llama.cpp, `conversion` and `src/llama-arch.cpp`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Values = Mapping[str, Any]

# `config.json`'s names for fields that every file has, and for those that it may have.
REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
# Fields that `reader` compares with others, or that change nothing.
CHECKED = (
    *("vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
LAYER_NORM = "attention.layer_norm_epsilon"
OF_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}


@dataclass(frozen=True)
class Layout:
    """An architecture as llama.cpp stores it.

    Attributes:
        model_type: its name in `config.json`.
        modules: Hugging Face's names for modules of a block, with `{}` for an expert's number.
        fields: further fields by their name in `config.json`.
        implied: settings that no field has, from those that are known.
        permuted: whether the rows of query and key are in the order of neighbouring pairs.
        norm_offset: what is added to the scales of norms.
        epsilon: the field of the epsilon of norms.
        partial: whether a part of each head may be rotated.
    """

    model_type: str
    modules: Mapping[str, str] = field(default_factory=lambda: BLOCK)
    fields: Mapping[str, str] = field(default_factory=dict)
    implied: Callable[[Values], Values] = lambda values: {}
    permuted: bool = False
    norm_offset: float = 0.0
    epsilon: str = REQUIRED["rms_norm_eps"]
    partial: bool = False

    @property
    def required(self) -> dict[str, str]:
        """The fields that its files have, by their name in `config.json`."""
        return {**REQUIRED, "rms_norm_eps": self.epsilon}


def _scores(large: int) -> Callable[[Values], Values]:
    """Gemma's factor of scores, which llama.cpp tells by the number of layers of its 27B model."""

    def implied(values: Values) -> Values:
        width = values["hidden_size"] // max(values["num_attention_heads"], 1)
        is_large = values["num_hidden_layers"] == large
        head = values.get("head_dim", width)
        return {"query_pre_attn_scalar": width if is_large else head}

    return implied


LLAMA = Layout("llama", permuted=True)
MIXTRAL = Layout(
    "mixtral",
    modules={
        **BLOCK,
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    fields={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    permuted=True,
)
SOFT_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
WINDOW = {"sliding_window": "attention.sliding_window"}
LOGIT_SCALE = {"logit_scale": "logit_scale"}
SHARED_NORM = {name: x for name, x in BLOCK.items() if name != "ffn_norm"}

ARCHITECTURES: dict[str, Layout] = {
    "llama": LLAMA,
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3", modules={**BLOCK, **QK_NORMS}),
    "qwen3moe": Layout(
        "qwen3_moe",
        modules={**BLOCK, **QK_NORMS, **EXPERTS},
        fields={**OF_EXPERTS, "moe_intermediate_size": "expert_feed_forward_length"},
        implied=lambda values: {"norm_topk_prob": True},
    ),
    "gemma": Layout("gemma", norm_offset=1.0),
    "gemma2": Layout(
        "gemma2",
        modules={**BLOCK, **AROUND},
        fields={**SOFT_CAP, **WINDOW, "attn_logit_softcapping": "attn_logit_softcapping"},
        implied=_scores(large=46),
        norm_offset=1.0,
    ),
    "gemma3": Layout(
        "gemma3_text",
        modules={**BLOCK, **AROUND, **QK_NORMS},
        fields={**SOFT_CAP, **WINDOW, "rope_local_base_freq": "rope.freq_base_swa"},
        implied=_scores(large=62),
        norm_offset=1.0,
    ),
    "phi3": Layout(
        "phi3",
        modules={
            **{name: BLOCK[name] for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_down")},
            "attn_qkv": "self_attn.qkv_proj",
            "ffn_up": "mlp.gate_up_proj",
        },
        fields={**WINDOW, "attention_factor": "rope.scaling.attn_factor"},
        partial=True,
    ),
    "olmo2": Layout(
        "olmo2",
        modules={
            **{name: x for name, x in BLOCK.items() if name not in ("attn_norm", "ffn_norm")},
            **{name: x for name, x in AROUND.items() if name != "ffn_norm"},
            **QK_NORMS,
        },
    ),
    "olmoe": Layout(
        "olmoe",
        modules={**BLOCK, **QK_NORMS, **EXPERTS},
        fields=OF_EXPERTS,
        implied=lambda values: {"norm_topk_prob": False},
    ),
    "granite": Layout(
        "granite",
        fields={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        permuted=True,
    ),
    "smollm3": Layout("smollm3", permuted=True),
    "glm4": Layout(
        "glm4",
        modules={
            **{name: x for name, x in BLOCK.items() if name != "ffn_gate"},
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        implied=lambda values: {"attention_bias": False},
        partial=True,
    ),
    "command-r": Layout("cohere", SHARED_NORM, LOGIT_SCALE, epsilon=LAYER_NORM),
    "cohere2": Layout("cohere2", SHARED_NORM, {**LOGIT_SCALE, **WINDOW}, epsilon=LAYER_NORM),
    "starcoder2": Layout(
        "starcoder2",
        modules={
            **{name: x for name, x in BLOCK.items() if name != "ffn_gate"},
            **{"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        },
        epsilon=LAYER_NORM,
    ),
}
MODEL_TYPES = frozenset(layout.model_type for layout in (*ARCHITECTURES.values(), MIXTRAL))
