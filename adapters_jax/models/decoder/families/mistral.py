"""Mistral: Llama in which each token sees a window of those before it.

Reference: Jiang et al., Mistral 7B (2023), https://arxiv.org/abs/2310.06825
"""

from adapters_jax.models.decoder.architecture import Architecture

MISTRAL = Architecture(
    "mistral",
    "MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    settings=("sliding_window",),
)
