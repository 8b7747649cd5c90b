"""Mistral: a Llama whose tokens see only a window of those before them.

Reference: Jiang et al., Mistral 7B (2023), https://arxiv.org/abs/2310.06825
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape


def _later(*sizes: int, **more: Any) -> Values:
    """A Mistral without a window."""
    return shape(*sizes, **{"rms_norm_eps": 1e-5, "sliding_window": None, **more})


SEVEN = (4096, 14336, 32, 32, 8)
WIDE: dict[str, Any] = {"head_dim": 128, "vocab_size": 131072}
KNOWN = {
    "mistralai/Mistral-7B-v0.1": shape(
        *SEVEN, rms_norm_eps=1e-5, sliding_window=4096, max_position_embeddings=32768
    ),
    "mistralai/Mistral-7B-v0.2": _later(*SEVEN, rope_theta=1e6, max_position_embeddings=32768),
    "mistralai/Mistral-7B-v0.3": _later(
        *SEVEN, rope_theta=1e6, max_position_embeddings=32768, vocab_size=32768
    ),
    "mistralai/Mistral-Nemo-Base-2407": _later(
        5120, 14336, 40, 32, 8, **WIDE, rope_theta=1e6, max_position_embeddings=131072
    ),
    "mistralai/Mistral-Small-Instruct-2409": _later(
        6144, 16384, 56, 48, 8, rope_theta=1e6, vocab_size=32768, max_position_embeddings=32768
    ),
    "mistralai/Mistral-Small-24B-Base-2501": _later(
        5120, 32768, 40, 32, 8, **WIDE, rope_theta=1e8, max_position_embeddings=32768
    ),
    # The text models of those that read images.
    "mistral-community/pixtral-12b": _later(
        5120, 14336, 40, 32, 8, **WIDE, rope_theta=1e9, max_position_embeddings=1_024_000
    ),
    "mistralai/Mistral-Small-3.1-24B-Base-2503": _later(
        5120, 32768, 40, 32, 8, **WIDE, rope_theta=1e9, max_position_embeddings=131072
    ),
}

MISTRAL = Architecture(
    "mistral",
    "MistralForCausalLM",
    defaults={
        **{"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
        "max_position_embeddings": 131072,
    },
    settings=("sliding_window",),
    known=KNOWN,
)
