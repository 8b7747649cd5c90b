"""Llama 1 to 3.3, and SmolLM2: the architecture that the others vary.

Reference: Touvron et al., LLaMA (2023), https://arxiv.org/abs/2302.13971; Dubey et al., The Llama 3
herd of models (2024), https://arxiv.org/abs/2407.21783
"""

from adapters_jax.models.decoder.architecture import Architecture

LLAMA = Architecture(
    "llama",
    "LlamaForCausalLM",
    settings=("attention_bias", "mlp_bias"),
    known={"llama-7b": {}},
)
