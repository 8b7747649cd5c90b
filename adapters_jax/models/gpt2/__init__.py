"""GPT-2 (linen), and the shape of GPT-3."""

from adapters_jax.models.family import Family
from adapters_jax.models.gpt2.checkpoint import NAMES, load_gpt2
from adapters_jax.models.gpt2.config import GPT2_MEDIUM, GPT2_SMALL, GPT3_175B, KNOWN, GPT2Config
from adapters_jax.models.gpt2.model import GPT2

FAMILY = Family(
    name="gpt2",
    kind="decoder",
    config=GPT2Config,
    build=GPT2,
    load=load_gpt2,
    names=NAMES,
    prefixes={"gpt2": "transformer."},
    known=KNOWN,
)

__all__ = [
    "FAMILY",
    "GPT2",
    "GPT2_MEDIUM",
    "GPT2_SMALL",
    "GPT3_175B",
    "NAMES",
    "GPT2Config",
    "load_gpt2",
]
