"""The files of base models.

- `huggingface`: checkpoints (`config.json` + safetensors) from a directory or the Hub.
- `gguf`: llama.cpp's files, with weights and tokenizer.
- `chat`: renders a chat template; `sandbox`: its bounds of time, text and memory.
"""
