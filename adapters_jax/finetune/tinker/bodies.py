"""What all paths of the protocol do with requests: their bodies, keys and numbers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.finetune.serving.schemas import parsed
from adapters_jax.finetune.tinker import wire


class Reader:
    """Reads bodies, two at a time, as each may become much larger."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reading = asyncio.Semaphore(2)

    async def read(self, read: Any, request: Request) -> Any:
        """A body: what a function makes of its bytes, or what a kind of request reads of them."""
        body, encoding = await request.body(), request.headers.get("content-encoding", "")

        def make() -> Any:
            data = wire.unpacked(body, encoding, self._limits.training)
            return parsed(read, data) if isinstance(read, type) else read(data)

        async with self._reading:
            return await asyncio.to_thread(make)


def owner_of(request: Request) -> str:
    """The key that a request has, as the guard noted it."""
    return request.scope["owner"]


def lora_in(about: Any) -> dict[str, Any]:
    """What a client sees of a model's LoRA, if it has one."""
    lora = about["lora"]
    return {"is_lora": lora is not None, "lora_rank": lora["rank"] if lora else None}


def number_in(request: Request, name: str, default: int) -> int:
    """A number of a request's query."""
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{name} is {text!r}, expected a number")
    return int(text)


def time_text(seconds: float) -> str:
    """A time in seconds since 1970, as JSON has it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
