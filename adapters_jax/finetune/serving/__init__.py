"""Serving: one base and many adapters, for many requests at a time.

- `choosing`: how tokens are chosen from logits.
- `slots`: the rows of a batch, each with its cache and its adapter; `programs`: what is compiled.
- `engine`: the queue, and the thread that lets requests join and leave between steps.
- `requests`: requests and the adapters that they name; sizes and counts.
- `labels`: labels of texts by an encoder with many adapters.
- `adapters`: reading adapters from anyone, and the recipe that has room for all of them.
- `api`, `completions`, `schemas`, `forms`: the HTTP interface, in OpenAI's form.
- `conversing`: messages, tools and calls of conversations.
- `grammars`: answers that follow a JSON schema.
- `answers`: the answers to one request, as they come from the engine.
- `listening`: connections, from before there is an answer until the last one is whole.
- `guard`: what a request must pass.
- `kept`: adapters that outlive the server.
- `texts`: tokens as pieces of text, and the texts that end a completion.
"""

from adapters_jax.finetune.serving.choosing import Choice
from adapters_jax.finetune.serving.engine import Engine
from adapters_jax.finetune.serving.requests import (
    BusyError,
    FullError,
    Request,
    Scores,
    Sizes,
    UnknownModelError,
)
from adapters_jax.finetune.serving.texts import TextSink

__all__ = [
    "BusyError",
    "Choice",
    "Engine",
    "FullError",
    "Request",
    "Scores",
    "Sizes",
    "TextSink",
    "UnknownModelError",
]
