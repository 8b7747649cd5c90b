"""GGUF files (llama.cpp's): `reader` for the whole file, `tensors` for its weights."""

from adapters_jax.interop.gguf.reader import ARCHITECTURES, GGUF, find_gguf, read_gguf

__all__ = ["ARCHITECTURES", "GGUF", "find_gguf", "read_gguf"]
