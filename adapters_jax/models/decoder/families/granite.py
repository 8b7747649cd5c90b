"""Granite 3: Llama with factors of embeddings, attention scores, sublayers and logits.

Reference: Granite 3.0 language models (2024),
https://github.com/ibm-granite/granite-3.0-language-models
"""

from adapters_jax.models.decoder.architecture import Architecture

GRANITE = Architecture(
    "granite",
    "GraniteForCausalLM",
    defaults={"attention_multiplier": 1.0},
    settings=(
        *("attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier"),
        *("residual_multiplier", "logits_scaling"),
    ),
)
