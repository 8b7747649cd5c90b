"""Phi 3 and 4: Llama whose checkpoints fuse query, key and value, and gate and up.

Reference: Phi-3 technical report (2024), https://arxiv.org/abs/2404.14219; Phi-4 technical report
(2024), https://arxiv.org/abs/2412.08905
"""

from adapters_jax.models.decoder.architecture import Architecture
from adapters_jax.models.decoder.names import NAMES_FUSED

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
    names=NAMES_FUSED,
)
