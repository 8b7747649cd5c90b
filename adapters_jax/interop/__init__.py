"""Files of other libraries, read into our trees.

- `huggingface`: base checkpoints (`config.json` + safetensors) from a directory or the Hub;
  `names` maps their tensors' names to our paths.
- `gguf`: llama.cpp's files of Llamas, weights and tokenizer.
- `peft`, `adapterhub`: adapters of these libraries, both ways.
- what both share: `directories` reads and writes the files, `module_map` finds a model's modules by
  their names in PyTorch, `layouts` turns the arrays.
- `formats`: one class a format of adapters, ours among them, in one registry; `base_model` is what
  they need to know of a base.
- `chat`: rendering a chat template.
"""
