"""Recognises, reads and writes adapter formats.

- `base`: the protocol `AdapterFormat`; `native`, `peft`, `adapterhub` and `gguf` implement it.
- `registry`: `FORMATS`, and the format of a directory.
- `changes`: how an adapter differs after it was written and read again.
"""

from adapters_jax.files.formats.base import (
    CONFIG,
    HEAD,
    Adapter,
    AdapterFormat,
    Head,
    has_head,
    stand_ins,
)
from adapters_jax.files.formats.changes import changes
from adapters_jax.files.formats.registry import (
    FORMATS,
    every_file,
    format_of,
)

__all__ = [
    "CONFIG",
    "FORMATS",
    "HEAD",
    "Adapter",
    "AdapterFormat",
    "Head",
    "changes",
    "every_file",
    "format_of",
    "has_head",
    "stand_ins",
]
