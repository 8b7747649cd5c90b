"""Phi 3 and 4: Llama whose checkpoints fuse query, key and value, and gate and up.

Reference: Phi-3 technical report (2024), https://arxiv.org/abs/2404.14219; Phi-4 technical report
(2024), https://arxiv.org/abs/2412.08905
"""

from adapters_jax.finetune.models.decoder.architecture import Architecture, shape
from adapters_jax.finetune.models.decoder.names import NAMES_FUSED

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
    names=NAMES_FUSED,
    known=KNOWN,
)
