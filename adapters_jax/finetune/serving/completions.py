"""Completions and conversations over an engine, in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving import schemas
from adapters_jax.finetune.serving.adapters import About, DecoderBase
from adapters_jax.finetune.serving.api import Api
from adapters_jax.finetune.serving.engine import Engine
from adapters_jax.finetune.serving.guard import Limits, failure, refused
from adapters_jax.finetune.serving.kept import Kept
from adapters_jax.finetune.serving.requests import End, Scores
from adapters_jax.finetune.serving.slots import Choice, Token
from adapters_jax.finetune.serving.texts import TextSink
from adapters_jax.finetune.tasks.generator import NEW_TOKENS

_BROKEN: dict[End, tuple[int, str]] = {
    "timeout": (408, "the answer took longer than the server's limit; ask for fewer tokens"),
    "not finite": (400, "the adapter's numbers are not finite; train it again"),
    "closed": (503, "the server is shutting down; try another one"),
    "cancelled": (408, "the request was cancelled"),
}


@dataclass(frozen=True)
class _Asked:
    """A prompt as tokens, and what ends its answer."""

    ids: list[int]
    adapter: str | None
    stop: frozenset[int]


class _Answer:
    """The text of an answer as it comes from the engine's thread."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.why: End = "cancelled"

    def put(self, item: Any) -> None:
        """Hands on a piece of text, or the reason of the end; the engine's thread calls it."""
        # The engine's thread must not touch the loop in another way: asyncio is not thread-safe.
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody reads it
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of text; afterwards `why` has the reason of the end."""
        while True:
            item = await self.queue.get()
            if isinstance(item, tuple):
                (self.why,) = item
                return
            yield item


class TextApi(Api):
    """What the paths of a decoder's server do.

    Args:
        base: the decoder.
        engine: its engine, which has been started.
        name: what requests call the base.
        limits: the limits of requests.
        kept: where adapters that come later are kept.
    """

    engine: Engine

    def __init__(
        self,
        base: DecoderBase,
        engine: Engine,
        name: str,
        limits: Limits,
        kept: Kept | None = None,
    ) -> None:
        super().__init__(base, engine, name, limits, kept)
        self.decoder = base.decoder

    async def complete(self, request: Request) -> Response:
        """Completes a prompt."""
        body = schemas.parsed(schemas.CompletionRequest, await request.body())
        adapter, about = self._adapter(body.model)
        ids = body.prompt
        if isinstance(ids, str):
            prompts, decoder = about.prompts, self.decoder
            if prompts is None:
                ids = (await asyncio.to_thread(decoder.tokenizer.encode, ids)).ids
            else:
                ids = await asyncio.to_thread(prompts.encode, ids, decoder)
        return await self._answer(request, body, self._asked(ids, adapter, about), False)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        body = schemas.parsed(schemas.ChatRequest, await request.body())
        adapter, about = self._adapter(body.model)
        decoder = self.decoder
        messages = [message.plain() for message in body.messages]
        text, _ = await asyncio.to_thread(decoder.render, messages)
        ids = (await asyncio.to_thread(decoder.encode, text)).ids
        return await self._answer(request, body, self._asked(ids, adapter, about), True)

    def _asked(self, ids: list[int], adapter: str | None, about: About) -> _Asked:
        return _Asked(ids, adapter, frozenset({self.decoder.end, *about.stop}))

    async def _answer(self, request: Request, body: Any, asked: _Asked, chat: bool) -> Response:
        """Submits a prompt, and answers as a stream or as a whole."""
        room = self.engine.sizes.context - len(asked.ids)
        wanted = body.max_tokens or getattr(body, "max_completion_tokens", None)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        if body.likeliest is not None and body.stream:
            raise UserError("the body: logprobs: not in a stream; leave one of them out")
        scores = None if body.likeliest is None else Scores(top=body.likeliest > 0)
        answer, decode = _Answer(), self.decoder.tokenizer.decode
        sink = TextSink(decode, answer.put, lambda why: answer.put((why,)), body.stops)
        running = self.engine.submit(
            asked.ids,
            sink,
            model=asked.adapter,
            most=wanted or max(1, min(NEW_TOKENS, room)),
            choice=Choice(body.temperature, body.top_p, body.top_k, seed),
            stop=asked.stop,
            seconds=self.limits.seconds,
            scores=scores,
        )
        form = _Form(body.model, chat)

        async def pieces() -> AsyncGenerator[str, None]:
            began, first = time.monotonic(), True
            try:
                async for piece in answer.pieces():
                    if first:
                        self.metrics.first.observe(time.monotonic() - began)
                    first = False
                    yield piece
            finally:
                self.engine.cancel(running)  # of no effect once it has ended

        def usage() -> dict[str, int]:
            made, given = sink.tokens, len(asked.ids)
            counts = {"prompt_tokens": given, "completion_tokens": made}
            return {**counts, "total_tokens": given + made}

        async def events() -> AsyncIterator[str]:
            async with contextlib.aclosing(pieces()) as texts:
                async for text in texts:
                    yield _event(form.piece(text, None))
            if answer.why in _BROKEN:
                yield _event(failure(*_BROKEN[answer.why]))
                return
            yield _event(form.piece("", answer.why))
            if body.stream_options and body.stream_options.include_usage:
                yield _event({**form.piece("", None), "choices": [], "usage": usage()})
            yield "data: [DONE]\n\n"

        if body.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events(), media_type="text/event-stream", headers=headers)
        text = await _unless_gone(request, _joined(pieces()))
        if answer.why in _BROKEN:
            return refused(*_BROKEN[answer.why])
        seen = None
        if scores is not None:
            seen = form.logprobs(scores.made[: sink.tokens], body.likeliest, decode)
        return JSONResponse({**form.whole(text, answer.why, seen), "usage": usage()})


class _Form:
    """The JSON of an answer, as OpenAI's."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.head = {"created": int(time.time()), "model": model}
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, text: str, why: str, logprobs: Any = None) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text}
        said = {"message": message} if self.chat else {"text": text}
        said["logprobs"] = logprobs
        return self._of("chat.completion" if self.chat else "text_completion", said, why)

    def logprobs(self, made: Sequence[Token], k: int, decode: Any) -> dict[str, Any]:
        """The log-probabilities of new tokens, and of the `k` likeliest ones in their places."""
        texts = [decode([token.id]) for token in made]
        tops = [
            {
                decode([i]): p
                for i, p in zip(
                    token.top.ids.tolist()[:k], token.top.logprobs.tolist(), strict=False
                )
            }
            for token in made
        ]
        if not self.chat:
            starts = [0, *itertools.accumulate(map(len, texts))][:-1]
            own = [token.logprob for token in made]
            return {
                "tokens": texts,
                "token_logprobs": own,
                "top_logprobs": tops,
                "text_offset": starts,
            }

        def one(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

        rows = [
            {**one(text, token.logprob), "top_logprobs": [one(*pair) for pair in top.items()]}
            for text, token, top in zip(texts, made, tops, strict=True)
        ]
        return {"content": rows, "refusal": None}

    def piece(self, text: str, why: str | None) -> dict[str, Any]:
        """A piece of an answer."""
        delta = {"role": "assistant", "content": text} if text else {}
        said = {"delta": delta} if self.chat else {"text": text}
        return self._of("chat.completion.chunk" if self.chat else "text_completion", said, why)

    def _of(self, kind: str, said: dict[str, Any], why: str | None) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, **said, "finish_reason": why}
        return {"id": self.id, "object": kind, **self.head, "choices": [choice]}


def _event(value: Any) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _joined(pieces: AsyncGenerator[str, None]) -> str:
    async with contextlib.aclosing(pieces) as texts:
        return "".join([text async for text in texts])


async def _unless_gone(request: Request, work: Any) -> str:
    """The result of some work; if the client hangs up before, the work is cancelled."""

    async def gone() -> None:
        # The body is read already, so what comes next is the end of the connection.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(408, "the client hung up")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
