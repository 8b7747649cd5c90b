"""The HTTP interface of an engine, in OpenAI's form, as a Starlette application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from adapters_jax.errors import UserError
from adapters_jax.interop import formats
from adapters_jax.serving import schemas
from adapters_jax.serving.adapters import About, DecoderBase
from adapters_jax.serving.engine import BusyError, End, Engine, FullError, UnknownModelError
from adapters_jax.serving.guard import Guard, Limits, failure, refused
from adapters_jax.serving.metrics import Metrics
from adapters_jax.serving.slots import Choice
from adapters_jax.serving.texts import TextSink
from adapters_jax.tasks.completion import NEW_TOKENS

_BROKEN: dict[End, tuple[int, str]] = {
    "timeout": (408, "the answer took longer than the server's limit; ask for fewer tokens"),
    "not finite": (400, "the adapter's numbers are not finite; train it again"),
    "closed": (503, "the server is shutting down; try another one"),
    "cancelled": (408, "the request was cancelled"),
}


# The page is one file, and asks no other host.
_ALONE = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class _Asked:
    """A prompt as tokens, and what ends its answer."""

    ids: list[int]
    adapter: str | None
    stop: frozenset[int]


class _Answer:
    """The text of an answer as it comes from the engine's thread."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[tuple[Any, int]]()
        self.why: End = "cancelled"
        self.tokens = 0

    def put(self, item: Any, tokens: int = 0) -> None:
        """Hands on a piece of text, or the reason of the end; the engine's thread calls it."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (item, tokens))

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of text; afterwards `why` has the reason of the end."""
        while True:
            item, tokens = await self.queue.get()
            self.tokens = max(self.tokens, tokens)
            if isinstance(item, tuple):
                (self.why,) = item
                return
            yield item


class TextApi:
    """What the paths of a decoder's server do.

    Args:
        base: the decoder.
        engine: its engine, which has been started.
        name: what requests call the base.
        limits: the limits of requests.
    """

    def __init__(self, base: DecoderBase, engine: Engine, name: str, limits: Limits) -> None:
        self.base, self.engine, self.name, self.limits = base, engine, name, limits
        self.metrics = Metrics(engine)
        self.began = int(time.time())
        self._reading = asyncio.Lock()

    def routes(self) -> list[Route]:
        """The paths."""
        one = "/v1/adapters/{name}"
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/adapters", self.adapters),
            Route(one, self.put, methods=["PUT"]),
            Route(one, self.drop, methods=["DELETE"]),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/metrics", self.show_metrics),
            Route("/healthz", self.health),
        ]

    async def health(self, _: Request) -> Response:
        """Whether the engine works."""
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    async def show_metrics(self, _: Request) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def predict(self, request: Request) -> Response:
        """Refuses: a decoder labels nothing."""
        schemas.parsed(schemas.PredictRequest, await request.body())
        raise UserError(f"{self.name} is a decoder, which labels no texts; use /v1/completions")

    async def models(self, _: Request) -> Response:
        """The base and the adapters."""
        names = [self.name, *self.engine.adapters]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """The base or an adapter."""
        name = request.path_params["name"]
        self._adapter(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        parent = {} if name == self.name else {"parent": self.name}
        kept = {"id": name, "object": "model", "created": self.began, "owned_by": "adapters_jax"}
        return {**kept, **parent}

    async def adapters(self, _: Request) -> Response:
        """The adapters, and what they are."""
        rows = [{"name": n, **each.about.shown} for n, each in self.engine.adapters.items()]
        return JSONResponse({"base": self.name, "adapters": rows})

    async def put(self, request: Request) -> Response:
        """Adds an adapter of the files in a form, or replaces one."""
        name = self._free_name(request.path_params["name"])
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "expected multipart/form-data with the adapter's files")
        known = formats.every_file()
        async with request.form(max_files=len(known), max_fields=0) as form:
            files = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
            names = [file.filename or "" for file in files]
            wrong = [each for each in names if each not in known or names.count(each) > 1]
            if wrong or not files:
                raise UserError(
                    f"the form has the files {', '.join(names) or 'none'}, expected one each of "
                    f"those of an adapter, such as adapter_config.json and adapter.safetensors"
                )
            contents = {file.filename: await file.read() for file in files}
        async with self._reading:  # one at a time: reading takes memory
            fitted, about = await asyncio.to_thread(self._read, name, contents)
        there = name in self.engine.adapters
        await asyncio.wrap_future(self.engine.put(name, fitted, about, replace=True))
        return JSONResponse({"name": name, **about.shown}, 200 if there else 201)

    def _read(self, name: str, contents: dict[Any, bytes]) -> tuple[Any, About]:
        """Reads an adapter of files from anyone."""
        with tempfile.TemporaryDirectory() as folder:
            for file, content in contents.items():
                Path(folder, file).write_bytes(content)
            try:
                read = self.base.read(Path(folder))
                return self.engine.fit(name, (read.recipe, read.leaves)), read.about
            except UserError as error:
                raise UserError(
                    str(error).replace(f"{folder}/", "").replace(folder, name)
                ) from None

    async def drop(self, request: Request) -> Response:
        """Drops an adapter."""
        name = request.path_params["name"]
        await asyncio.wrap_future(self.engine.drop(name))
        return JSONResponse({"name": name, "deleted": True})

    def _free_name(self, name: str) -> str:
        if name == self.name or not schemas.matches_name(name):
            raise UserError(
                f"an adapter cannot be named {name!r}, expected up to 64 letters, digits, dots, "
                "dashes and underscores, and not the base's name"
            )
        return name

    def _adapter(self, model: str) -> tuple[str | None, About]:
        """The adapter that a request names, and what it is."""
        if model == self.name:
            return None, About({})
        served = self.engine.adapters.get(model)
        if served is None:
            raise UnknownModelError(
                f"no model is named {model!r}; GET /v1/models lists those that there are"
            )
        return model, served.about

    async def complete(self, request: Request) -> Response:
        """Completes a prompt."""
        body = schemas.parsed(schemas.CompletionRequest, await request.body())
        adapter, about = self._adapter(body.model)
        ids = body.prompt
        if isinstance(ids, str):
            prompts, decoder = about.prompts, self.base.decoder
            if prompts is None:
                ids = decoder.tokenizer.encode(ids).ids
            else:
                ids = await asyncio.to_thread(prompts.encode, ids, decoder)
        return await self._answer(request, body, self._asked(ids, adapter, about), False)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        body = schemas.parsed(schemas.ChatRequest, await request.body())
        adapter, about = self._adapter(body.model)
        decoder = self.base.decoder
        messages = [message.plain() for message in body.messages]
        text, _ = await asyncio.to_thread(decoder.render, messages)
        ids = decoder.tokenizer.encode(text, add_special_tokens=False).ids
        return await self._answer(request, body, self._asked(ids, adapter, about), True)

    def _asked(self, ids: list[int], adapter: str | None, about: About) -> _Asked:
        return _Asked(ids, adapter, frozenset({self.base.decoder.end, *about.stop}))

    async def _answer(self, request: Request, body: Any, asked: _Asked, chat: bool) -> Response:
        """Submits a prompt, and answers as a stream or as a whole."""
        room = self.engine.sizes.context - len(asked.ids)
        wanted = body.max_tokens or getattr(body, "max_completion_tokens", None)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        answer, decode = _Answer(), self.base.decoder.tokenizer.decode
        sink = TextSink(decode, answer.put, lambda why: answer.put((why,)), body.stops)
        running = self.engine.submit(
            asked.ids,
            sink,
            model=asked.adapter,
            most=wanted or max(1, min(NEW_TOKENS, room)),
            choice=Choice(body.temperature, body.top_p, body.top_k, seed),
            stop=asked.stop,
            seconds=self.limits.seconds,
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
        return JSONResponse({**form.whole(text, answer.why), "usage": usage()})


class _Form:
    """The JSON of an answer, as OpenAI's."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat = chat
        self.head = {"created": int(time.time()), "model": model}
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, text: str, why: str) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": text}
        said = {"message": message} if self.chat else {"text": text}
        return self._of("chat.completion" if self.chat else "text_completion", said, why)

    def piece(self, text: str, why: str | None) -> dict[str, Any]:
        """A piece of an answer."""
        delta = {"role": "assistant", "content": text} if text else {}
        said = {"delta": delta} if self.chat else {"text": text}
        return self._of("chat.completion.chunk" if self.chat else "text_completion", said, why)

    def _of(self, kind: str, said: dict[str, Any], why: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": why}
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


_STATUS: dict[type[Exception], int] = {UnknownModelError: 404, BusyError: 429, FullError: 409}


async def _refuse(_: Request, error: Exception) -> Response:
    """The answer to a request that cannot be done."""
    if isinstance(error, HTTPException):
        return refused(error.status_code, str(error.detail), error.headers)
    return refused(_STATUS.get(type(error), 400), str(error))


def application(api: Any, page: str, limits: Limits, key: str | None = None) -> Starlette:
    """The application.

    Args:
        api: what its paths do.
        page: the HTML of its page.
        limits: the limits of requests.
        key: the API key that requests need; without one, only this machine's browsers may ask.
    """
    description = schemas.openapi(version("adapters-jax"))

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _ALONE})

    async def describe(_: Request) -> Response:
        return JSONResponse(description)

    return Starlette(
        routes=[Route("/", show_page), Route("/openapi.json", describe), *api.routes()],
        middleware=[Middleware(Guard, limits=limits, key=key, requests=api.metrics.requests)],
        exception_handlers={UserError: _refuse, HTTPException: _refuse},
    )
