"""Adapters of Hugging Face PEFT, both ways: `reading`, `writing`, and `config`, their settings."""

from adapters_jax.interop.peft.files import CONFIG, PICKLE, TENSORS, load_peft, save_peft

__all__ = ["CONFIG", "PICKLE", "TENSORS", "load_peft", "save_peft"]
