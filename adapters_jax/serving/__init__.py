"""Serving: one base and many adapters, for many requests at a time.

- `slots`: the rows of a batch, each with a cache and an adapter of its own; the compiled programs.
- `engine`: the queue, and the thread that lets requests join and leave between steps.
- `texts`: tokens as pieces of text, and the texts that end a completion.
"""

from adapters_jax.serving.engine import BusyError, Engine, Request, Sizes, UnknownModelError
from adapters_jax.serving.slots import Choice
from adapters_jax.serving.texts import TextSink

__all__ = [
    "BusyError",
    "Choice",
    "Engine",
    "Request",
    "Sizes",
    "TextSink",
    "UnknownModelError",
]
