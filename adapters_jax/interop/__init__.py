"""Files of other libraries, read into our trees.

- `huggingface`: base checkpoints (`config.json` + safetensors) from a directory or the Hub;
  `names` maps their tensors' names to our paths.
- `gguf`: llama.cpp's files of Llamas, weights and tokenizer; `gguf_tensors` maps their weights.
- `chat`: rendering a chat template.
"""
