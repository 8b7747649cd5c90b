"""GPT-2 (linen), and GPT-3 as a shape."""

from adapters_jax.models.gpt2.model import (
    GPT2,
    GPT2_MEDIUM,
    GPT2_SMALL,
    GPT3_175B,
    NAMES,
    GPT2Config,
    causal_mask,
    load_gpt2,
)

__all__ = [
    "GPT2",
    "GPT2_MEDIUM",
    "GPT2_SMALL",
    "GPT3_175B",
    "NAMES",
    "GPT2Config",
    "causal_mask",
    "load_gpt2",
]
