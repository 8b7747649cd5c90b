"""Granite 3: Llama with factors of embeddings, attention scores, sublayers and logits.

Reference: Granite 3.0 language models (2024),
https://github.com/ibm-granite/granite-3.0-language-models
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, shape

SETTINGS: dict[str, Any] = {
    **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
}
SMALL: dict[str, Any] = {"attention_multiplier": 0.015625, "logits_scaling": 8.0}
LARGE: dict[str, Any] = {"attention_multiplier": 0.0078125, "logits_scaling": 16.0}
VERSIONS = {"3.0": (1e4, 4096, 49155), "3.1": (5e6, 131072, 49155), "3.3": (1e7, 131072, 49159)}
KNOWN = {
    f"ibm-granite/granite-{version}-{size}-instruct": shape(
        *sizes,
        **{**SETTINGS, **factors, "rope_theta": theta, "vocab_size": vocab},
        max_position_embeddings=longest,
    )
    for version, (theta, longest, vocab) in VERSIONS.items()
    for size, sizes, factors in (
        ("2b", (2048, 8192, 40, 32, 8), SMALL),
        ("8b", (4096, 12800, 40, 32, 8), LARGE),
    )
}

GRANITE = Architecture(
    "granite",
    "GraniteForCausalLM",
    defaults={"attention_multiplier": 1.0},
    known=KNOWN,
    settings=(
        *("attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier"),
        *("residual_multiplier", "logits_scaling"),
    ),
)
