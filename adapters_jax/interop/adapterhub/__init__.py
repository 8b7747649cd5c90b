"""Adapters and heads of AdapterHub, both ways.

- `files` reads and writes the directory; `config` checks and interprets its settings.
- `reading` and `writing` convert bottlenecks and LoRA, `heads` converts classification heads.
- `architectures` has the modules to which AdapterHub attaches bottlenecks and LoRA; `blocks` finds
  our counterparts of them.
"""

from adapters_jax.interop.adapterhub.architectures import ALIKE, MODEL_TYPES
from adapters_jax.interop.adapterhub.blocks import find_blocks
from adapters_jax.interop.adapterhub.files import (
    CONFIG,
    FILES,
    HEAD_CONFIG,
    HEAD_TENSORS,
    TENSORS,
    load_adapterhub,
    save_adapterhub,
    to_adapterhub,
)

__all__ = [
    "ALIKE",
    "CONFIG",
    "FILES",
    "HEAD_CONFIG",
    "HEAD_TENSORS",
    "MODEL_TYPES",
    "TENSORS",
    "find_blocks",
    "load_adapterhub",
    "save_adapterhub",
    "to_adapterhub",
]
