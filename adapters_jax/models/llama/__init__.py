"""Llama (NNX), from and to Hugging Face checkpoints, and from GGUF."""

from adapters_jax.models.llama.checkpoint import NAMES, load_llama, save_llama
from adapters_jax.models.llama.model import LLAMA_7B, Llama, LlamaConfig

__all__ = ["LLAMA_7B", "NAMES", "Llama", "LlamaConfig", "load_llama", "save_llama"]
