"""Samples for training: the server's engine, shared fairly among keys."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_jax.errors import UserError, shown
from adapters_jax.finetune.serving.choosing import TOP, Choice
from adapters_jax.finetune.serving.engine import Engine
from adapters_jax.finetune.serving.requests import BusyError, End, Scores, UnknownModelError
from adapters_jax.finetune.serving.schemas import LONGEST_STOP, LOWEST_TEMPERATURE
from adapters_jax.finetune.tinker import wire
from adapters_jax.transforms.fitting import Fitted

MOST_SAMPLES = 1024
_PAUSE = 0.05  # seconds until a full queue of other requests is asked again


@dataclass
class Weights:
    """What a sampling session samples from; None is the base. Inflight sessions share one."""

    fitted: Fitted | None


@dataclass(frozen=True)
class Asked:
    """A request for samples, checked.

    Attributes:
        prompt: the prompt's tokens.
        n: the number of samples.
        most: the largest number of new tokens of each.
        choice: how tokens are chosen; sample i has the seed plus i.
        ends: tokens that end a sample.
        stops: texts that end a sample.
        prompts: whether the log-probabilities of the prompt's tokens are wanted.
        last: of how many of them; None for all.
        top: how many of the likeliest tokens are wanted at each of these.
        top_made: the same, at each new token.
    """

    prompt: Sequence[int]
    n: int
    most: int
    choice: Choice
    ends: frozenset[int]
    stops: tuple[str, ...]
    prompts: bool
    last: int | None
    top: int
    top_made: int

    @property
    def tokens(self) -> int:
        """The tokens that it may have on its way; a sample costs memory, however short it is."""
        return len(self.prompt) + self.n * max(self.most, 64)


def asked(request: Any, context: int, end: int, seed: int) -> Asked:
    """Checks a client's request; of `prompt` and `sampling_params` as `tinker` reads them.

    Args:
        context: the largest number of tokens of a prompt and its answer together.
        end: the token that ends a text, if the request names none.
        seed: is used if the request has none.

    Raises:
        UserError: something in it is out of its range, or not supported.
    """
    given, prompt = request.sampling_params, []
    for chunk in request.prompt.chunks:
        if chunk.type != "encoded_text":
            raise UserError(f"the prompt has a part of the type {shown(chunk.type)}, no tokens")
        prompt += chunk.tokens
    for name in ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info"):
        if getattr(request, name, None):
            raise UserError(f"{name} is not supported by this server; leave it out")
    room = context - len(prompt)
    most = room if given.max_tokens is None else given.max_tokens
    last, top = request.prompt_logprobs_last_n, request.topk_prompt_logprobs
    if last is not None and not request.prompt_logprobs:
        raise UserError(f"prompt_logprobs_last_n is {last} without prompt_logprobs; give both")
    limits = {
        "num_samples": (request.num_samples, 1, MOST_SAMPLES),
        "max_tokens": (most, 1, room),
        "top_k": (given.top_k, -1, 2**31 - 1),
        "topk_prompt_logprobs": (top, 0, TOP),
        "topk_sample_logprobs": (request.topk_sample_logprobs, 0, TOP),
        "prompt_logprobs_last_n": (1 if last is None else last, 1, max(1, len(prompt) - 1)),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            more = f", since the prompt has {len(prompt)} tokens" if name == "max_tokens" else ""
            raise UserError(f"{name} is {value}, expected {low} to {high}{more}")
    if not (given.temperature == 0 or LOWEST_TEMPERATURE <= given.temperature < 1e4):
        raise UserError(
            f"temperature is {given.temperature:g}, expected 0 or at least {LOWEST_TEMPERATURE}"
        )
    if not 0 < given.top_p <= 1:
        raise UserError(f"top_p is {given.top_p:g}, expected a number above 0, at most 1")
    ends, stops = _stops(given.stop, end)
    number = seed if given.seed is None else given.seed
    choice = Choice(given.temperature, given.top_p, max(given.top_k, 0), number)
    wanted = bool(request.prompt_logprobs) or top > 0
    return Asked(
        prompt,
        request.num_samples,
        most,
        choice,
        ends,
        stops,
        wanted,
        last,
        top,
        request.topk_sample_logprobs,
    )


def _stops(stop: Any, end: int) -> tuple[frozenset[int], tuple[str, ...]]:
    """The tokens and the texts that end a sample; no list at all means the end of a text."""
    if stop is None:
        return frozenset({end}), ()
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = frozenset(each for each in texts if isinstance(each, int))
    words = tuple(each for each in texts if isinstance(each, str))
    if any(not 0 < len(word) <= LONGEST_STOP for word in words) or len(texts) > 64:
        raise UserError(f"stop: expected at most 64, texts of 1 to {LONGEST_STOP} characters")
    return ids, words


class _Sample:
    """A sink that keeps the tokens of one sample, the one that ends it included."""

    def __init__(self, asked: Asked, decode: Callable[[list[int]], str]) -> None:
        self._asked, self._decode = asked, decode
        self._loop = asyncio.get_running_loop()
        self.ids: list[int] = []
        self.done: asyncio.Future[End] = self._loop.create_future()
        # A token has at least a quarter of a character, so no more of them can hold a stop text.
        self._tail = 4 * max(map(len, asked.stops), default=0) + 8

    def token(self, token: int) -> bool:
        """Takes the next token; see `Sink`."""
        self.ids.append(token)
        if token in self._asked.ends:
            return False
        if not self._asked.stops:
            return True
        text = self._decode(self.ids[-self._tail :])
        return not any(stop in text for stop in self._asked.stops)

    def end(self, why: End) -> None:
        """Tells the event loop; see `Sink`."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._ended, why)

    def _ended(self, why: End) -> None:
        if not self.done.done():
            self.done.set_result(why)


class Sampler:
    """Samples for many keys, which take turns.

    Args:
        engine: the engine; requests of the OpenAI API are in its queue as well.
        decode: gives the text of tokens.
        seconds: the longest time of a sample once it is computed, in seconds.
    """

    def __init__(self, engine: Engine, decode: Callable[[list[int]], str], seconds: float) -> None:
        self._engine, self._decode, self._seconds = engine, decode, seconds
        # As many again as are computed, so that a row that is free is taken at once.
        self._free = 2 * engine.sizes.rows
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def sample(self, owner: str, weights: Weights, asked: Asked) -> bytes:
        """The answer to a request for samples.

        Raises:
            UserError: the engine refuses it, or a sample took too long.
        """
        tasks = [asyncio.ensure_future(self._one(owner, weights, asked, i)) for i in range(asked.n)]
        try:
            made = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        scores = made[0][1]
        given, top = (None, None)
        if asked.prompts:
            given, top = _of_prompt(asked, scores)
        return wire.sampled([sequence for sequence, _ in made], given, top)

    async def _one(
        self, owner: str, weights: Weights, asked: Asked, i: int
    ) -> tuple[wire.Sampled, Scores]:
        scores = Scores(prompt=asked.prompts and i == 0, top=asked.top_made > 0)
        choice = asked.choice._replace(seed=(asked.choice.seed + i) % 2**32)
        async with self._turn(owner):
            sink = _Sample(asked, self._decode)
            while True:
                try:
                    running = self._engine.submit(
                        asked.prompt,
                        sink,
                        model=weights.fitted,
                        most=asked.most,
                        choice=choice,
                        seconds=self._seconds,
                        scores=scores,
                    )
                    break
                except BusyError:
                    if not self._engine.alive:
                        raise
                    await asyncio.sleep(_PAUSE)
            try:
                why = await sink.done
            finally:
                self._engine.cancel(running)  # of no effect once it has ended
        if why not in ("stop", "length"):
            raise UserError(f"the sample ended: {why}")
        logprobs = [token.logprob for token in scores.made]
        likely = None
        if asked.top_made:
            likely = wire.likeliest([token.top for token in scores.made], asked.top_made)
        return wire.Sampled(why, sink.ids, logprobs, likely), scores

    @contextlib.asynccontextmanager
    async def _turn(self, owner: str) -> AsyncIterator[None]:
        """Within, this key has one of the places; keys that wait get them in turn."""
        if self._free:
            self._free -= 1
        else:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(owner, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Gives a place to the key that had none for longest."""
        while self._waiting:
            owner = next(iter(self._waiting))
            queue = self._waiting.pop(owner)
            first = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind the others
            if not first.done():
                first.set_result(None)
                return
        self._free += 1


class Samplers:
    """The sampling sessions of all keys, a bounded number of each.

    Args:
        most: how many a key may have; the one that was used least recently makes room.
        forgot: is called for each session that ends, with its key and the beginning of the names
            of its answers.
    """

    def __init__(self, most: int, forgot: Callable[[str, str], None]) -> None:
        self._most, self._forgot = most, forgot
        self._all: dict[str, OrderedDict[str, Weights]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._all.values()))

    def add(self, owner: str, name: str, weights: Weights) -> None:
        """Adds a session."""
        own = self._all.setdefault(owner, OrderedDict())
        own[name] = weights
        while len(own) > self._most:
            self._forget(owner, next(iter(own)))

    def find(self, owner: str, name: str) -> Weights:
        """The weights of a session.

        Raises:
            UnknownModelError: the key does not have this session, or no longer.
        """
        own = self._all.get(owner, OrderedDict())
        if name not in own:
            raise UnknownModelError(f"there is no sampling session {shown(name)}; begin a new one")
        own.move_to_end(name)
        return own[name]

    def end(self, owner: str, start: str) -> None:
        """Forgets the sessions of a key whose names begin with `start`."""
        own = self._all.get(owner, OrderedDict())
        for name in [each for each in own if each.startswith(start)]:
            self._forget(owner, name)

    def _forget(self, owner: str, name: str) -> None:
        del self._all[owner][name]
        self._forgot(owner, f"{name}:")


def _of_prompt(
    asked: Asked, scores: Scores
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """What the prompt's tokens scored; nothing comes before the first."""
    given = np.concatenate([[np.nan], *(own for own, _ in scores.given)]).astype(np.float32)
    top = None
    if asked.top:
        top = wire.likeliest([likely for _, likely in scores.given], asked.top, before=1)
    if asked.last is not None:
        given[: -asked.last] = np.nan
        if top is not None:
            none = wire.likeliest([], asked.top, before=len(given) - asked.last)
            for whole, part in zip(top, none, strict=True):
                whole[: len(part)] = part
    return given, top
