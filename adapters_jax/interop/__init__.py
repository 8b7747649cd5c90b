"""Files of other libraries, read into our trees.

- `huggingface`: base checkpoints (`config.json` + safetensors) from a directory or the Hub;
  `names` maps their tensors' names to our paths.
- `peft`: adapters of Hugging Face PEFT, both ways; `peft_config` knows their settings,
  `peft_places` their names, `peft_layouts` their arrays; `peft_load` and `peft_save` go each way.
- `gguf`: llama.cpp's files of Llamas, weights and tokenizer; `gguf_tensors` maps their weights.
- `chat`: rendering a chat template.
"""
