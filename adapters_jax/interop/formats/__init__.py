"""Formats of adapters: recognised, read and written.

- `base`: the protocol `AdapterFormat`; one module a format: `native`, `peft`, `adapterhub`.
- `registry`: `FORMATS`, and which of them a directory is of.
- `changes`: what an adapter lost on its way.
"""

from adapters_jax.interop.formats.base import CONFIG, HEAD, Adapter, AdapterFormat, Head
from adapters_jax.interop.formats.changes import changes
from adapters_jax.interop.formats.registry import (
    FORMATS,
    Format,
    check_head,
    every_file,
    format_of,
)

__all__ = [
    "CONFIG",
    "FORMATS",
    "HEAD",
    "Adapter",
    "AdapterFormat",
    "Format",
    "Head",
    "changes",
    "check_head",
    "every_file",
    "format_of",
]
