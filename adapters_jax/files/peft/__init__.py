"""Adapters of Hugging Face PEFT, both ways.

`convert` reads and writes the directory. `lora` with `lora_writing`, `adalora`, `lycoris`, `oft`,
`vera`, `prompts`, `prompt_tuning`, `prefix` and `ia3`, which it calls, convert one or two
`peft_type`s each. `config` has the facts about each, and checks the settings; `checks` has the
modules of both sides.
`parameters` has the layout of factors of `target_parameters`, and `trained` converts the base's own
parameters that train beside a method.
"""

from adapters_jax.files.peft.convert import load_peft, save_peft

__all__ = ["load_peft", "save_peft"]
