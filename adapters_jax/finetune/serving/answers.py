"""The answers to one request, as the engine's thread makes them: of several prompts, or several
of one prompt."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapters_jax.finetune.serving.choosing import Choice
from adapters_jax.finetune.serving.engine import Engine
from adapters_jax.finetune.serving.requests import BusyError, End, Request, Rule, Scores
from adapters_jax.finetune.serving.texts import TextSink
from adapters_jax.transforms.fitting import Fitted

_PAUSE = 0.05  # seconds until a queue that others have filled is asked again


@dataclass
class Answer:
    """An answer that is wanted, and what came of it.

    Attributes:
        index: its place among the answers to its request.
        ids: the tokens of its prompt.
        most: the largest number of new tokens.
        choice: how tokens are chosen.
        scores: takes the log-probabilities of its tokens; None if nobody wants them.
        rule: what its tokens must follow; None if nothing.
        text: what is written so far.
        tokens: the number of new tokens.
        why: the reason of the end.
    """

    index: int
    ids: Sequence[int]
    most: int
    choice: Choice
    scores: Scores | None = None
    rule: Rule | None = None
    text: str = ""
    tokens: int = 0
    why: End = "cancelled"


class Answers:
    """Several answers that are computed together, as many at a time as the engine has rows.

    Args:
        adapter: the adapter of all of them; None is the base.
        decode: gives the text of tokens.
        ends: ids of tokens that end an answer.
        stops: texts that end an answer.
        echo: whether answers are texts behind those of their prompts.
        seconds: the time after which they end in any case.

    Raises:
        BusyError: the queue is full, or the engine is closed.
        UserError: the engine takes one of the prompts in no case.
    """

    def __init__(
        self,
        engine: Engine,
        wanted: Sequence[Answer],
        *,
        adapter: Fitted | None,
        decode: Callable[[list[int]], str],
        ends: frozenset[int],
        stops: Sequence[str],
        echo: bool,
        seconds: float,
    ) -> None:
        for each in wanted:
            engine.check(each.ids, each.most, each.choice)
        self._engine, self.wanted, self._adapter = engine, wanted, adapter
        self._decode, self._ends, self._stops, self._echo = decode, ends, stops, echo
        self._deadline = time.monotonic() + seconds
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self._running: dict[int, tuple[Request, TextSink]] = {}
        self._next = 0
        self._fill()

    def _put(self, index: int, item: Any) -> None:
        """Hands on a piece of text, or the reason of an end; the engine's thread calls it."""
        # The engine's thread must not touch the loop in another way: asyncio is not thread-safe.
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody reads it
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))

    def _put_end(self, index: int, why: End) -> None:
        self._put(index, (why,))

    def _fill(self) -> bool:
        """Submits what there are rows for; returns whether the queue had no place for it."""
        while self._next < len(self.wanted) and len(self._running) < self._engine.sizes.rows:
            each = self.wanted[self._next]
            decode = _behind(each.ids, self._decode) if self._echo else self._decode
            ends = partial(self._put_end, each.index)
            sink = TextSink(decode, partial(self._put, each.index), ends, self._stops)
            try:
                running = self._engine.submit(
                    each.ids,
                    sink,
                    model=self._adapter,
                    most=each.most,
                    choice=each.choice,
                    stop=self._ends,
                    seconds=self._deadline - time.monotonic(),
                    scores=each.scores,
                    rule=each.rule,
                )
            except BusyError:
                if not self._next:
                    raise
                if self._engine.alive and time.monotonic() < self._deadline:
                    return True
                self._put(each.index, ("timeout" if self._engine.alive else "closed",))
            else:
                self._running[each.index] = running, sink
            self._next += 1
        return False

    async def pieces(self) -> AsyncGenerator[tuple[Answer, str | None], None]:
        """The pieces of text as they come, each with its answer; None is its end."""
        left = len(self.wanted)
        try:
            while left:
                full = self._fill()
                try:
                    async with asyncio.timeout(_PAUSE if full else None):
                        index, item = await self._queue.get()
                except TimeoutError:
                    continue
                answer = self.wanted[index]
                if isinstance(item, tuple):
                    (answer.why,), left = item, left - 1
                    if index in self._running:
                        answer.tokens = self._running.pop(index)[1].tokens
                    yield answer, None
                else:
                    answer.text += item
                    yield answer, item
        finally:
            self.close()

    def close(self) -> None:
        """Ends what is not done yet."""
        for running, _ in self._running.values():
            self._engine.cancel(running)


def _behind(ids: Sequence[int], decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """Gives the text of tokens as it stands behind that of others."""
    start = len(decode([*ids]))
    return lambda more: decode([*ids, *more])[start:]
