"""Reads and writes the files of other libraries.

- `huggingface`: base checkpoints (`config.json` + safetensors) from a directory or the Hub;
  `names` maps their tensors' names to our paths.
- `gguf`: llama.cpp's files of Llamas, with weights and tokenizer.
- `peft`, `adapterhub`: adapters of these libraries, both ways. They share `directories`, which
  reads and writes the files, `module_map`, which finds a model's modules by their names in PyTorch,
  and `layouts`, which converts the arrays.
- `formats`: one class for each adapter format, ours included, in one registry; `base_model`
  describes a base model to them.
- `chat`: renders a chat template.
"""
