"""Llama (NNX): the model, loading from Hugging Face checkpoints and GGUF, and saving."""

from adapters_jax.models.family import Family
from adapters_jax.models.llama.checkpoint import NAMES, load_llama, save_llama
from adapters_jax.models.llama.config import KNOWN, LLAMA_7B, LlamaConfig
from adapters_jax.models.llama.model import Llama, abstract_llama

FAMILY = Family(
    name="llama",
    kind="decoder",
    config=LlamaConfig,
    build=abstract_llama,
    load=load_llama,
    save=save_llama,
    names=NAMES,
    prefixes={"llama": "model."},
    known=KNOWN,
    layer="layers/{}",
    generates=True,
)

__all__ = ["FAMILY", "LLAMA_7B", "NAMES", "Llama", "LlamaConfig", "load_llama", "save_llama"]
