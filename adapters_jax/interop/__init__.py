"""Files of other libraries, read into our trees.

- `huggingface`: base checkpoints (`config.json` + safetensors) from a directory or the Hub.
"""
