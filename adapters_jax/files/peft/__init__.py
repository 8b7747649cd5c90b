"""Adapters of Hugging Face PEFT, both ways.

`lora` with `lora_writing`, `prompts` and `ia3` convert one `peft_type` each, and `kinds` is their
registry. `parameters` has the layout of factors of `target_parameters`. `trained` converts the
base's own parameters that train beside them, `config` checks the settings, and `files` reads and
writes the directory.
"""

from adapters_jax.files.peft.files import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
