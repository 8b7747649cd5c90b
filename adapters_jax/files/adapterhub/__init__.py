"""Adapters and heads of AdapterHub, both ways.

- `files` reads and writes the directory; `config` checks and interprets its settings.
- `convert` converts bottlenecks, Compacter and LoRA, `reft` LoReFT, `heads` classification heads.
- `architectures` has the modules to which AdapterHub attaches bottlenecks and LoRA; `blocks` finds
  our counterparts of them.
"""

from adapters_jax.files.adapterhub.files import load_adapterhub, save_adapterhub

__all__ = ["load_adapterhub", "save_adapterhub"]
