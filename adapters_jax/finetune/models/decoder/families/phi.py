"""Phi 3 and 4: Llama whose checkpoints fuse query, key and value, and gate and up; Phi 1 to 2.

Reference: Li et al., Textbooks are all you need II: phi-1.5 (2023),
https://arxiv.org/abs/2309.05463; Phi-3 technical report (2024), https://arxiv.org/abs/2404.14219;
Phi-4 technical report (2024), https://arxiv.org/abs/2412.08905
"""

from dataclasses import replace

from adapters_jax.files.names import Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture, shape
from adapters_jax.finetune.models.decoder.names import (
    LAYERS,
    MODEL,
    NAMES,
    NAMES_FUSED,
    NORMS_BEFORE,
    PROJECTIONS,
)
from adapters_jax.finetune.models.parts.names import of_layers

# The scaling of rotary positions, a table, is left out: no shape depends on it.
KNOWN = {
    "microsoft/Phi-3-mini-4k-instruct": shape(3072, 8192, 32, 32, 32, vocab_size=32064),
    "microsoft/Phi-3.5-mini-instruct": shape(
        3072, 8192, 32, 32, 32, vocab_size=32064, max_position_embeddings=131072
    ),
    "microsoft/Phi-3-medium-4k-instruct": shape(5120, 17920, 40, 40, 10, vocab_size=32064),
    "microsoft/phi-4": shape(5120, 17920, 40, 40, 10, vocab_size=100352, rope_theta=250_000.0),
    "microsoft/Phi-4-mini-instruct": shape(
        *(3072, 8192, 32, 24, 8),
        **{"vocab_size": 200064, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        max_position_embeddings=131072,
    ),
}

PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    defaults={
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        "original_max_position_embeddings": 4096,
    },
    settings=("sliding_window", "partial_rotary_factor"),
    supported={"embd_pdrop": (0.0,), "resid_pdrop": (0.0,)},
    rope_key="type",
    tokens={"eos_token_id": 32000, "pad_token_id": 32000},
    names=NAMES_FUSED,
    known=KNOWN,
)

OWN = of_layers(
    *LAYERS, attention__output="self_attn.dense", mlp__up="mlp.fc1", mlp__output="mlp.fc2"
)
# The models before Phi 3 are no Llamas: attention and feed-forward read one layer norm.
PHI = Architecture(
    "phi",
    "PhiForCausalLM",
    fixed={
        **{"parallel": "shared", "norm_type": "layer", "mlp_gate": False, "head_bias": True},
        **{"attention_bias": True, "mlp_bias": True},
    },
    defaults={"rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    settings=("partial_rotary_factor",),
    renamed={"layer_norm_eps": "rms_norm_eps"},
    # Phi 2 was trained with a dropout of 0.1, which is not here.
    supported={"qk_layernorm": (False,), "tie_word_embeddings": (False,)},
    names=replace(
        NAMES, rules=(Rule("norm", "final_layernorm"), *OWN, *MODEL, *PROJECTIONS, *NORMS_BEFORE)
    ),
    known={
        "microsoft/phi-1": shape(2048, 8192, 24, 32, 32, vocab_size=51200),
        "microsoft/phi-1_5": shape(2048, 8192, 24, 32, 32, vocab_size=51200),
        "microsoft/phi-2": shape(
            2560, 10240, 32, 32, 32, vocab_size=51200, partial_rotary_factor=0.4
        ),
    },
)
