"""LoRA of diffusion models in files of Diffusers, kohya's scripts and LyCORIS, both ways.

- `spelling`: how these files name their parts, modules and tensors.
- `convert`: such a file as an adapter of ours, for a user's own model; and our adapters as a file.
"""

from adapters_jax.files.diffusers.convert import load_diffusers, save_diffusers

__all__ = ["load_diffusers", "save_diffusers"]
