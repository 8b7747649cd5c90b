"""LoRA of other JAX libraries, which keep it in the tree of parameters: both ways.

- `pairs`: how their leaves are named and laid out, and what each pair changes.
- `convert`: a tree of theirs as an adapter of ours, folded into its base, and for PEFT; and an
  adapter of ours in their names and shapes.
"""

from adapters_jax.files.jax_lora.convert import as_peft, from_jax_lora, merge_jax_lora, to_jax_lora

__all__ = ["as_peft", "from_jax_lora", "merge_jax_lora", "to_jax_lora"]
