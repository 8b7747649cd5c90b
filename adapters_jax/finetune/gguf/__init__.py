"""GGUF files (llama.cpp's): `header`, `tensors` by their `architectures`, and `adapters`."""
