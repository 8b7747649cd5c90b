"""Serving: one base and many adapters, for many requests at a time.

- `slots`: the rows of a batch, each with a cache and an adapter of its own; the compiled programs.
- `engine`: the queue, and the thread that lets requests join and leave between steps.
- `adapters`: reading adapters from anyone, and the recipe that has room for all of them.
- `api`, `schemas`, `metrics`: the HTTP interface, in OpenAI's form.
- `guard`, `server`: what a request must pass; listening and draining.
- `texts`: tokens as pieces of text, and the texts that end a completion.
"""

from adapters_jax.serving.engine import (
    BusyError,
    Engine,
    FullError,
    Request,
    Sizes,
    UnknownModelError,
)
from adapters_jax.serving.slots import Choice
from adapters_jax.serving.texts import TextSink

__all__ = [
    "BusyError",
    "Choice",
    "Engine",
    "FullError",
    "Request",
    "Sizes",
    "TextSink",
    "UnknownModelError",
]
