"""The files of base models.

- `huggingface`: checkpoints (`config.json` + safetensors) from a directory or the Hub.
- `gguf`: llama.cpp's files, with weights and tokenizer.
- `typed_settings`: checks of settings that a file of others holds.
- `chat`: renders a chat template; `sandbox`: its bounds of time, text and memory.
"""
