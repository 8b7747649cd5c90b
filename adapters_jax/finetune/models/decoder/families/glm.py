"""GLM 4: rotated neighbours in half of each head, a fused feed-forward, four norms from 0414 on.

Reference: GLM team, ChatGLM: a family of large language models from GLM-130B to GLM-4 All Tools
(2024), https://arxiv.org/abs/2406.12793
"""

from dataclasses import replace
from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, shape
from adapters_jax.finetune.models.decoder.names import (
    FUSED_MLP,
    LAYERS,
    MODEL,
    NAMES,
    NORMS_BEFORE,
    PROJECTIONS,
)
from adapters_jax.finetune.models.parts.names import of_layers

NORMS_AROUND = of_layers(
    *LAYERS,
    attention_norm="input_layernorm",
    attention_post_norm="post_self_attn_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_post_norm="post_mlp_layernorm",
)
NINE = (4096, 13696, 40, 32, 2)
VOCAB: dict[str, Any] = {"vocab_size": 151552}

GLM = Architecture(
    "glm",
    "GlmForCausalLM",
    fixed={"rotary_interleaved": True, "attention_output_bias": False},
    defaults={
        **{"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07},
        **{"partial_rotary_factor": 0.5, "attention_bias": True},
        "max_position_embeddings": 131072,
    },
    settings=("partial_rotary_factor", "attention_bias"),
    names=replace(NAMES, rules=(*MODEL, *FUSED_MLP, *PROJECTIONS, *NORMS_BEFORE)),
    known={"zai-org/glm-4-9b-chat-hf": shape(*NINE, **VOCAB)},
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    class_name="Glm4ForCausalLM",
    fixed={**GLM.fixed, "norm_placement": "both"},
    names=replace(NAMES, rules=(*MODEL, *FUSED_MLP, *PROJECTIONS, *NORMS_AROUND)),
    known={
        f"zai-org/GLM-4-{name}-0414": shape(
            *sizes, **VOCAB, **more, rms_norm_eps=1e-5, max_position_embeddings=32768
        )
        for name, sizes, more in (
            ("9B", NINE, {}),
            ("32B", (6144, 23040, 61, 48, 2), {"attention_bias": False}),
        )
    },
)
