"""Adapters of Hugging Face PEFT, both ways.

`lora`, `prompts` and `ia3` are one `peft_type` each, `kinds` the registry of them; `trained` is the
base's own parameters beside them, `config` the settings, and `files` the directory.
"""

from adapters_jax.interop.peft.files import CONFIG, PICKLE, TENSORS, load_peft, save_peft

__all__ = ["CONFIG", "PICKLE", "TENSORS", "load_peft", "save_peft"]
