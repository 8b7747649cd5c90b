"""GGUF files (llama.cpp's): `reader` for the whole file, `tensors` for its weights."""

from adapters_jax.interop.gguf.architectures import MODEL_TYPES
from adapters_jax.interop.gguf.reader import GGUF, find_gguf, read_gguf

__all__ = ["GGUF", "MODEL_TYPES", "find_gguf", "read_gguf"]
