"""Continuous batching: requests take a row of the batch, and leave it, between any two steps.

One thread runs the model. Everything else hands it orders: requests, which wait in a queue of
bounded length, and changes of the adapters. In each turn the thread reads one piece of one prompt,
then makes one token for every row whose prompt is read; so a long prompt delays the others by a
piece at a time.

A request keeps the adapter that it came with, also if that is replaced or dropped meanwhile.

Reference: Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative Models
(2022), https://www.usenix.org/conference/osdi22/presentation/yu
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving.choosing import Choice, Token
from adapters_jax.finetune.serving.requests import (
    CLOSING,
    BusyError,
    Counts,
    End,
    FullError,
    Request,
    Rule,
    Scores,
    Served,
    Sink,
    Sizes,
    UnknownModelError,
    check_request,
)
from adapters_jax.finetune.serving.slots import Slots
from adapters_jax.methods.invocation import start_of
from adapters_jax.transforms.bank import Bank
from adapters_jax.transforms.fitting import Fitted


class Engine:
    """A decoder with many adapters that completes requests as they come.

    Args:
        bank: a bank over an NNX decoder, of at least as many places as there are rows.
        sizes: the sizes.

    Attributes:
        sizes: the sizes.
        vocabulary: the number of tokens that the model knows.
        adapters: the adapters that requests can name, by name.
        counts: what it has done since `start`: requests by their end, tokens, steps, changes.

    Raises:
        UserError: the model has positions for fewer tokens than the context, an encoder reads its
            prompts, or the bank has fewer places than there are rows.

    Example:
        >>> import jax.numpy as jnp, adapters_jax as aj
        >>> from flax import nnx
        >>> from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
        >>> from adapters_jax.finetune.serving import TextSink
        >>> config = DecoderConfig(8, 8, 8, 1, 1, 1)  # 8 tokens, one layer
        >>> base, example = Decoder(config, rngs=nnx.Rngs(0)), (jnp.ones((1, 4), int),)
        >>> model = aj.adapt(base, aj.lora(2), rngs=nnx.Rngs(1), example_inputs=example)
        >>> engine = Engine(aj.Bank(model, capacity=5), Sizes(rows=1, context=16))
        >>> sink = TextSink(lambda ids: str(ids), print, print)
        >>> request = engine.submit([1, 2], sink, most=3)  # waits until engine.start()
        >>> engine.alive, engine.waiting, engine.vocabulary
        (False, 1, 8)
    """

    def __init__(self, bank: Bank, sizes: Sizes = Sizes()) -> None:
        model = bank.model
        if not hasattr(model, "empty_cache"):
            raise UserError(
                f"{type(model).__name__} reads prompts with an encoder, which the engine does not "
                "support; serve a decoder"
            )
        longest = getattr(model.config, "longest", None)
        if longest is not None and sizes.context > longest:
            raise UserError(
                f"a context of {sizes.context} tokens: expected at most {longest}, the positions "
                "of the model"
            )
        if bank.capacity < sizes.rows:
            raise UserError(
                f"a bank of {bank.capacity} places: expected at least {sizes.rows}, one for the "
                "adapter of each row"
            )
        self.sizes, self.counts = sizes, Counts()
        self.vocabulary: int = model.config.vocab_size
        self.adapters: dict[str, Served] = {}
        self._slots = Slots(bank, rows=sizes.rows, context=sizes.context, pieces=sizes.pieces)
        self._running: list[Request | None] = [None] * sizes.rows
        self._waiting: deque[Request] = deque()
        self._orders: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(
        self,
        compiled: Callable[[int, int], None] = lambda n, of: None,
        later: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compiles its programs, then begins to work in another thread; call it once.

        Args:
            compiled: is called after each program, with how many there are so far and in all; what
                it raises ends the compiling.
            later: if given, only what suffices for all requests is compiled before; it is called
                after each of the others, which are faster and are compiled beside the requests.
        """
        self._slots.compile(compiled, later)
        self.counts = Counts()
        self._thread.start()

    def close(self) -> None:
        """Ends all requests and stops; does nothing if it is closed already."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._slots.close()

    @property
    def alive(self) -> bool:
        """Whether it works on requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests have a row."""
        return sum(request is not None for request in self._running)

    def check(self, prompt: Sequence[int], most: int, choice: Choice = Choice()) -> None:
        """Raises what `submit` would, whatever waits and whichever adapters there are.

        Args:
            prompt, most, choice: as for `submit`.

        Raises:
            UserError: as for `submit`.
        """
        check_request(prompt, most, choice, self.sizes.context, self.vocabulary)

    def submit(
        self,
        prompt: Sequence[int],
        sink: Sink,
        *,
        model: str | Fitted | None = None,
        most: int,
        choice: Choice = Choice(),
        stop: frozenset[int] = frozenset(),
        seconds: float = 600.0,
        scores: Scores | None = None,
        rule: Rule | None = None,
    ) -> Request:
        """Puts a request into the queue.

        Args:
            prompt: the ids of the prompt's tokens, from 0 to `vocabulary` - 1.
            sink: takes its tokens, as `TextSink` does.
            model: the adapter's name, or what `fit` made of one that has none; None is the base.
            most: the largest number of new tokens; 0 only reads the prompt.
            choice: how tokens are chosen; `step` is the engine's.
            stop: ids of tokens that end it; the sink does not get them.
            seconds: the time after which it ends in any case, in seconds from now.
            scores: takes the log-probabilities of its tokens.
            rule: what its tokens must follow, such as a grammar; the engine's thread has it.

        Returns:
            The request, to give to `cancel`; its tokens go to the sink.

        Raises:
            BusyError: the queue is full, or the engine is closed.
            UnknownModelError: there is no adapter of that name.
            UserError: the prompt is empty, is too long with its new tokens, or it or the bias has a
                token that the model does not know.
        """
        self.check(prompt, most, choice)
        until = time.monotonic() + seconds
        with self._changed:
            adapter = self._served(model).fitted if isinstance(model, str) else model
            self._check_open()
            # Those that are cancelled leave in the next turn, and nobody waits for them.
            if sum(not each.cancelled for each in self._waiting) >= self.sizes.queue:
                raise BusyError(f"the queue is full ({self.sizes.queue} requests); try again later")
            request = Request(list(prompt), adapter, most, choice, stop, sink, until)
            request.scores, request.rule = scores, rule
            request.start = start_of(prompt, adapter.invocation) if adapter else len(prompt)
            self._waiting.append(request)
            self._changed.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request, as soon as the step that runs now is over.

        Args:
            request: what `submit` returned.
        """
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def fit(self, name: str, adapter: Any) -> Fitted:
        """An adapter in the shapes of the bank, for `put`; see `Bank.fit`.

        Args:
            name: its name, for messages.
            adapter: its recipe and its leaves, as `Bank.fit` takes them.
        """
        return self._slots.bank.fit(name, adapter)

    def put(
        self, name: str, fitted: Fitted, about: Any, *, replace: bool = False
    ) -> "Future[None]":
        """Adds an adapter between two steps; requests that come later can name it.

        Args:
            name: what requests call it.
            fitted: what `fit` made of it.
            about: what it is; the engine hands it on.
            replace: whether one of that name is replaced. Its requests go on with it.

        Returns:
            A future; it raises FullError if there are too many, and UserError if the name is taken.

        Raises:
            BusyError: the engine is closed.
            TypeError: `fitted` is not what `fit` returned.
        """
        if not isinstance(fitted, Fitted):
            raise TypeError(
                f"Engine.put: got {type(fitted).__name__}, expected what engine.fit(name, adapter) "
                "returns"
            )
        return self._order(lambda: self._put(name, Served(fitted, about), replace))

    def drop(self, name: str) -> "Future[None]":
        """Takes an adapter away between two steps; its requests go on with it.

        Args:
            name: what requests call it.

        Returns:
            A future; it raises UnknownModelError if no adapter has that name.

        Raises:
            BusyError: the engine is closed.
        """
        return self._order(lambda: self._drop(name))

    def _order(self, work: Callable[[], None]) -> "Future[None]":
        """Has the engine's thread do something between two steps."""
        future: Future[None] = Future()
        with self._changed:
            self._check_open()
            self._orders.append((future, work))
            self._changed.notify()
        return future

    def _check_open(self) -> None:
        if self._closing:
            raise BusyError(CLOSING)

    def _served(self, name: str) -> Served:
        if name not in self.adapters:
            raise UnknownModelError(f"no adapter is named {name!r}")
        return self.adapters[name]

    def _put(self, name: str, served: Served, replace: bool) -> None:
        with self._changed:
            if name in self.adapters and not replace:
                raise UserError(f"the name {name!r} is taken; give another one, or replace it")
            if name not in self.adapters and len(self.adapters) >= self.sizes.adapters:
                raise FullError(f"there are {len(self.adapters)} adapters, the most; remove one")
            self.adapters = {**self.adapters, name: served}
            self.counts.changes += 1

    def _drop(self, name: str) -> None:
        with self._changed:
            self._served(name)
            self.adapters = {n: each for n, each in self.adapters.items() if n != name}
            self.counts.changes += 1

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    if self._closing:
                        return
                self._obey()
                self._turn()
        finally:  # also after a bug, so that nobody waits for ever
            with self._changed:
                self._closing = True
                left = [*filter(None, self._running), *self._waiting]
                self._waiting.clear()
                orders = [*self._orders]
            with contextlib.ExitStack() as told:  # all of them, also if a sink fails
                for request in left:
                    told.callback(request.sink.end, "closed")
                for future, _ in orders:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(BusyError(CLOSING))

    def _obey(self) -> None:
        """Does what was ordered until now, but for what was cancelled."""
        for _ in range(len(self._orders)):
            future, work = self._orders.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                work()
            except UserError as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            finally:
                if not future.done():  # a bug, which ends the engine
                    future.set_exception(BusyError(CLOSING))

    def _has_work(self) -> bool:
        return bool(self._closing or self._orders or self._waiting or any(self._running))

    def _turn(self) -> None:
        """Lets requests leave and join, reads a piece of a prompt, and makes a token a row."""
        self._leave()
        self._join()
        rows = [(row, each) for row, each in enumerate(self._running) if each is not None]
        unread = [(row, each) for row, each in rows if each.read < len(each.prompt)]
        if unread:
            # Prompts are read one after another, that of the earliest deadline first.
            self._read(*min(unread, key=lambda pair: pair[1].deadline))
        live = [(row, each) for row, each in enumerate(self._running) if each and each.made]
        # A request that is alone is computed as a piece of one token, without the other rows.
        if (len(live) == 1 and self.sizes.pieces[0] == 1) or not self._slots.steps:
            for row, each in live:
                acts, may = [each.acts], each.allowed
                token = self._slots.read(
                    row, [each.last], False, *each.ways, acts, made=True, allowed=may
                )
                self._take(row, each, token)
        elif live:
            self._step(dict(live))
        self.counts.steps += 1

    def _leave(self) -> None:
        """Ends requests that nobody waits for, or whose time is over."""
        now = time.monotonic()

        def over(request: Request) -> End | None:
            late: End | None = "timeout" if now > request.deadline else None
            return "cancelled" if request.cancelled else late

        with self._changed:
            gone = [(each, why) for each in self._waiting if (why := over(each))]
            for each, _ in gone:
                self._waiting.remove(each)
        for each, why in gone:
            self._end(each, why)
        for row, request in enumerate(self._running):
            if request is not None and (why := over(request)):
                self._free(row)
                self._end(request, why)

    def _join(self) -> None:
        """Gives free rows to those that wait longest."""
        with self._changed:
            free = [row for row, each in enumerate(self._running) if each is None]
            while free and self._waiting:
                request = self._waiting.popleft()
                row = self._slots.place(free, *request.beginning)
                free.remove(row)
                self._running[row] = request

    def _read(self, row: int, request: Request) -> None:
        """Reads a piece of a prompt; the last one gives the first token."""
        scored = request.scores is not None and request.scores.prompt
        if not request.read:
            self._slots.mark(row, request.choice)
            request.read = 0 if scored else self._slots.reuse(row, *request.beginning)
            self.counts.prompt_tokens += request.read
            self.counts.reused_tokens += request.read
        part = request.prompt[request.read : request.read + self.sizes.pieces[-1]]
        acts = [i >= request.start for i in range(request.read, request.read + len(part))]
        after = request.prompt[request.read + 1 : request.read + 1 + len(part)] if scored else ()
        last = request.read + len(part) == len(request.prompt)
        may = request.allowed if last else None
        token = self._slots.read(
            row, part, not request.read, *request.ways, acts, after, allowed=may
        )
        if request.scores is not None and token.given is not None:
            request.scores.given.append(token.given)
        request.read += len(part)
        self.counts.prompt_tokens += len(part)
        if last:
            self._take(row, request, token)

    def _step(self, live: dict[int, Request]) -> None:
        """Makes one token for each of these rows."""
        rows = [live.get(row) for row in range(self.sizes.rows)]
        made = self._slots.step(
            [request.last if request else None for request in rows],
            [request.adapter if request else None for request in rows],
            [request.choosing if request else Choice() for request in rows],
            [bool(request and request.acts) for request in rows],
            [request.allowed if request else None for request in rows],
        )
        for row, each in live.items():
            self._take(row, each, made[row])

    def _take(self, row: int, request: Request, made: Token) -> None:
        """Hands a token to a request, and frees its row if it was the last one."""
        why: End | None = None
        if not made.finite:
            why = "not finite"
        elif not request.most:
            why = "length"
        elif request.rule is not None and not request.rule.take(made.id):
            why = "stuck"
        elif made.id in request.stop:
            why = "stop"
        else:
            request.made, request.last = request.made + 1, made.id
            self.counts.tokens += 1
            if request.scores is not None:
                request.scores.made.append(made)
            if not request.sink.token(made.id):
                why = "stop"
            elif request.made == request.most:
                why = "length"
        if why is not None:
            self._free(row)
            self._end(request, why)

    def _free(self, row: int) -> None:
        self._running[row] = None
        self._slots.free(row)

    def _end(self, request: Request, why: End) -> None:
        self.counts.ended[why] += 1
        request.sink.end(why)
