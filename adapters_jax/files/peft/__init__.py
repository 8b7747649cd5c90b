"""Adapters of Hugging Face PEFT, both ways.

`lora` with `lora_writing`, `prompts` and `ia3` convert one `peft_type` each, and `convert` calls
them. `config` has the facts about each, and checks the settings. `parameters` has the layout of
factors of `target_parameters`, and `trained` converts the base's own parameters that train beside a
method. `files` reads and writes the directory.
"""

from adapters_jax.files.peft.files import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
