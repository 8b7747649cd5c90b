"""Adapters and heads of AdapterHub, both ways.

- `reading`, `writing`: their tensors; `config`: their settings; `heads`: classification heads.
- `blocks`: where AdapterHub puts bottlenecks and LoRA in a model.
"""

from adapters_jax.interop.adapterhub.files import (
    CONFIG,
    FILES,
    HEAD_CONFIG,
    HEAD_TENSORS,
    TENSORS,
    load_adapterhub,
    save_adapterhub,
)

__all__ = [
    "CONFIG",
    "FILES",
    "HEAD_CONFIG",
    "HEAD_TENSORS",
    "TENSORS",
    "load_adapterhub",
    "save_adapterhub",
]
