"""Files of other libraries, read into our trees.

- `huggingface`: base checkpoints (`config.json` + safetensors) from a directory or the Hub;
  `names` maps their tensors' names to our paths.
- `peft`: adapters of Hugging Face PEFT, both ways; `peft_config` knows their settings, `peft_load`
  and `peft_save` go each way.
- `adapterhub`: adapters and heads of AdapterHub, both ways; `adapterhub_config` knows their
  settings, `adapterhub_places` where they put what, `adapterhub_heads` their heads.
- what both share: `directories` reads and writes the files, `places` finds a model's modules by
  their names in PyTorch, `layouts` turns the arrays.
- `gguf`: llama.cpp's files of Llamas, weights and tokenizer; `gguf_tensors` maps their weights.
- `chat`: rendering a chat template.
"""
