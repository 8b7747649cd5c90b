"""Completions and conversations over an engine, in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.serving import schemas
from adapters_jax.finetune.serving.adapters import DecoderBase
from adapters_jax.finetune.serving.answers import Answer, Answers
from adapters_jax.finetune.serving.api import Api
from adapters_jax.finetune.serving.choosing import Choice
from adapters_jax.finetune.serving.conversing import calls_of, writes_calls
from adapters_jax.finetune.serving.engine import Engine
from adapters_jax.finetune.serving.forms import Form
from adapters_jax.finetune.serving.grammars import Grammar, Grammars
from adapters_jax.finetune.serving.guard import Limits, failure, refused
from adapters_jax.finetune.serving.kept import Kept
from adapters_jax.finetune.serving.requests import CLOSING, End, Scores, Served
from adapters_jax.finetune.tasks.generator import NEW_TOKENS

_BROKEN: dict[End, tuple[int, str]] = {
    "timeout": (408, "the answer took longer than the server's limit; ask for fewer tokens"),
    "not finite": (400, "the adapter's numbers are not finite; train it again"),
    "stuck": (400, "the answer's schema needs more work than its bounds allow; simplify it"),
    "closed": (503, CLOSING),
    "cancelled": (408, "the request was cancelled"),
}


class TextApi(Api):
    """What the paths of a decoder's server do; its arguments are those of `Api`."""

    engine: Engine

    def __init__(
        self, base: DecoderBase, engine: Engine, name: str, limits: Limits, kept: Kept | None = None
    ) -> None:
        super().__init__(base, engine, name, limits, kept)
        self.decoder = base.decoder
        self._grammars = Grammars(self.decoder.tokenizer, engine.vocabulary, self.decoder.end)

    async def complete(self, request: Request) -> Response:
        """Completes prompts."""
        body = schemas.parsed(schemas.CompletionRequest, await request.body())
        served = self._adapter(body.model)
        prompts = served.about.prompts if served else None
        read = [await asyncio.to_thread(self._tokens, each, prompts) for each in body.prompts]
        return await self._answer(request, body, read, served, False)

    def _tokens(self, prompt: str | list[int], prompts: Prompts | None) -> list[int]:
        """The tokens of a prompt, in the format of an adapter's prompts."""
        if not isinstance(prompt, str):
            return prompt
        if prompts is None:
            return self.decoder.tokenizer.encode(prompt).ids
        return prompts.encode(prompt, self.decoder)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        body = schemas.parsed(schemas.ChatRequest, await request.body())
        served = self._adapter(body.model)
        tools = [] if body.tool_choice == "none" else [tool.plain() for tool in body.tools]
        ids = await asyncio.to_thread(self._conversation, body, tools)
        names = [tool["function"]["name"] for tool in tools]

        def calls(text: str) -> tuple[str, list[Any]]:
            before, found = calls_of(text, names)
            return (before, found) if body.parallel_tool_calls else (before, found[:1])

        reads = tools and writes_calls(self.decoder.chat_template or "")
        schema, grammar = body.response_format.wanted, None
        if schema is not None:
            grammar = await asyncio.to_thread(self._grammars.of, schema)
        found = calls if reads else None
        return await self._answer(request, body, [ids], served, True, found, grammar)

    def _conversation(self, body: schemas.ChatRequest, tools: list[Any]) -> list[int]:
        """The tokens of a conversation with tools."""
        messages, decoder = [message.plain() for message in body.messages], self.decoder
        text, _ = decoder.render(messages, tools=tools or None)
        if tools and text == decoder.render(messages)[0]:
            raise UserError(
                f"the chat template of {self.name} shows no tools to the model; leave tools out"
            )
        return decoder.encode(text).ids

    def _wanted(
        self, body: Any, prompts: Sequence[list[int]], grammar: Grammar | None
    ) -> list[Answer]:
        most = body.max_tokens
        if most is None:
            most = getattr(body, "max_completion_tokens", None)
        echo, likeliest = getattr(body, "echo", False), body.likeliest
        answers: list[Answer] = []
        for ids in prompts:
            room = self.engine.sizes.context - len(ids)
            for i in range(body.n):
                # Equal prompts get answers of their own, unless a seed says which ones.
                seed = secrets.randbits(32) if body.seed is None else (body.seed + i) % 2**32
                choice = Choice(
                    body.temperature,
                    body.top_p,
                    body.top_k,
                    seed,
                    presence=body.presence_penalty,
                    frequency=body.frequency_penalty,
                    bias=tuple((int(k), v) for k, v in body.logit_bias.items()),
                )
                scores = None if likeliest is None else Scores(prompt=echo, top=likeliest > 0)
                wanted = max(1, min(NEW_TOKENS, room)) if most is None else most
                rule = None if grammar is None else grammar.copy()
                answers.append(Answer(len(answers), ids, wanted, choice, scores, rule))
        return answers

    async def _answer(
        self,
        request: Request,
        body: Any,
        prompts: Sequence[list[int]],
        served: Served | None,
        chat: bool,
        calls: Callable[[str], tuple[str, list[Any]]] | None = None,
        grammar: Grammar | None = None,
    ) -> Response:
        """Submits prompts, and answers as a stream or as a whole."""
        if body.likeliest is not None and body.stream:
            raise UserError("the body: logprobs: not in a stream; leave one of them out")
        echo, decode = getattr(body, "echo", False), self.decoder.tokenizer.decode
        answers = Answers(
            self.engine,
            self._wanted(body, prompts, grammar),
            adapter=served.fitted if served else None,
            decode=decode,
            ends=frozenset({self.decoder.end, *(served.about.stop if served else ())}),
            stops=body.stops,
            echo=echo,
            seconds=self.limits.seconds,
        )
        form = Form(body.model, chat, decode, body.likeliest or 0, echo, calls)
        if body.stream:
            counted = bool(body.stream_options and body.stream_options.include_usage)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            events = self._events(answers, form, counted)
            return _Stream(answers, events, media_type="text/event-stream", headers=headers)
        await _unless_gone(request, self._whole(answers))
        for each in answers.wanted:
            if each.why in _BROKEN:
                return refused(*_BROKEN[each.why])
        return JSONResponse(form.whole(answers.wanted))

    async def _pieces(self, answers: Answers) -> AsyncGenerator[tuple[Answer, str | None], None]:
        """The pieces of answers; the first one is timed."""
        began, first = time.monotonic(), True
        async with contextlib.aclosing(answers.pieces()) as pieces:
            async for answer, text in pieces:
                if first and text is not None:
                    self.metrics.first.observe(time.monotonic() - began)
                    first = False
                yield answer, text

    async def _whole(self, answers: Answers) -> None:
        """Waits for answers, until one of them is broken."""
        async with contextlib.aclosing(self._pieces(answers)) as pieces:
            async for answer, text in pieces:
                if text is None and answer.why in _BROKEN:
                    return

    async def _events(self, answers: Answers, form: Form, counted: bool) -> AsyncIterator[str]:
        """Answers as a stream; `counted` adds the numbers of tokens."""
        for answer in answers.wanted:
            if before := form.before(answer):
                yield _event(form.piece(answer, before))
        async with contextlib.aclosing(self._pieces(answers)) as pieces:
            async for answer, text in pieces:
                if text is None and answer.why in _BROKEN:
                    yield _event(failure(*_BROKEN[answer.why]))
                    return
                if text is None:
                    for piece in form.ends(answer):
                        yield _event(piece)
                elif form.calls is None:
                    yield _event(form.piece(answer, text))
        if counted:
            yield _event(form.counted(answers.wanted))
        yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Answers as a stream, which end with it."""

    def __init__(self, answers: Answers, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends what comes, until all has or the client is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if `events` never began, or waits behind a piece that nobody takes
            self._answers.close()


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Any) -> None:
    """Does some work; if the client hangs up before, the work is cancelled."""

    async def gone() -> None:
        # The body is read already, so what comes next is the end of the connection.
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(408, "the client hung up")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
