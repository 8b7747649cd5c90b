"""Answers that are on their way: a client asks for one until it is there, and then once more.

The number of answers and of their bytes is bounded for each key, so that a client that never asks
costs no more than that: its oldest answers are forgotten.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from adapters_jax.errors import UserError, visible
from adapters_jax.finetune.serving.requests import BusyError

JSON = "application/json"


@dataclass(frozen=True)
class Bounds:
    """What one key may have at a time.

    Attributes:
        futures: answers that are there or on their way.
        bytes: bytes of answers that are there.
        seconds: how long an answer waits to be asked for.
        tokens: tokens of requests that are on their way.
        models: models that train.
        samplers: sampling sessions; the one that was used least recently makes room.
        sessions: sessions; the one that has been silent for longest makes room.
        polls: questions that wait for an answer; each one holds a connection.
    """

    futures: int = 8192
    bytes: int = 2**28
    seconds: float = 3600.0
    tokens: int = 2**22
    models: int = 32
    samplers: int = 64
    sessions: int = 1024
    polls: int = 256


@dataclass(eq=False)
class Entry:
    """An answer on its way, or there.

    Attributes:
        id: what the client asks for.
        tokens: the tokens that its request has.
        kind: the content type of the answer; empty while there is none.
        failed: whether it is an error.
        made: when it began, then when the answer came, in seconds.
        target: the sampling session in whose list it appears once it is there.
    """

    id: str
    tokens: int
    target: str | None = None
    kind: str = ""
    data: bytes = b""
    failed: bool = False
    made: float = field(default_factory=time.monotonic)
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Owner:
    entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    ended: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    tokens: int = 0
    bytes: int = 0
    polls: int = 0


@dataclass
class _Ended:
    """The requests of a sampling session that ended: their numbers from `first` on."""

    first: int = 1
    ids: deque[Entry] = field(default_factory=deque)
    more: asyncio.Event = field(default_factory=asyncio.Event)

    def trim(self, cursor: int) -> None:
        """Forgets those up to a number."""
        while self.ids and self.first <= cursor:
            self.ids.popleft()
            self.first += 1


class Futures:
    """The answers of all keys; only the event loop's thread uses it."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._owners: dict[str, _Owner] = {}
        self._ended: dict[tuple[str, str], _Ended] = {}

    def find(self, owner: str, name: str) -> Entry | None:
        """An answer of a key; None if there is none of that name, or no more."""
        own = self._owners.get(owner)
        return None if own is None else own.entries.get(name)

    def make(self, owner: str, name: str, tokens: int = 0, target: str | None = None) -> Entry:
        """Begins an answer to a key, its owner.

        Raises:
            BusyError: the key has as many answers or tokens on their way as it may.
            UserError: the request has more tokens than a key may have at all.
        """
        own, bounds = self._owners.setdefault(owner, _Owner()), self._bounds
        if tokens > bounds.tokens:
            raise UserError(
                f"the request has {tokens} tokens, expected at most {bounds.tokens}; send fewer"
            )
        if name in own.ended:
            self._remove(own, name)
        self._forget(own, room=1)
        if len(own.entries) >= bounds.futures or own.tokens + tokens > bounds.tokens:
            raise BusyError("as much is on its way for this key as may be; try again later")
        entry = own.entries[name] = Entry(name, tokens, target)
        own.tokens += tokens
        if target is not None:
            self._list(owner, target)
        return entry

    def _list(self, owner: str, target: str, first: int = 1) -> _Ended:
        """The list of a sampling session; the oldest one of a key that has too many makes room."""
        found = self._ended.get((owner, target))
        if found is None:
            own = [key for key in self._ended if key[0] == owner]
            if len(own) >= self._bounds.futures:
                del self._ended[own[0]]
            found = self._ended[owner, target] = _Ended(first)
        return found

    def end(self, owner: str, entry: Entry, data: bytes, kind: str = JSON) -> None:
        """Puts an answer there."""
        own = self._owners[owner]
        entry.data, entry.kind, entry.made = data, kind, time.monotonic()
        own.tokens -= entry.tokens
        own.bytes += len(data)
        own.ended[entry.id] = entry
        entry.done.set()
        listed = self._ended.get((owner, entry.target or ""))
        if listed is not None:  # else its session is no more
            listed.ids.append(entry)
            listed.trim(listed.first + len(listed.ids) - 1 - self._bounds.futures)
            listed.more.set()
        self._forget(own)

    def fail(self, owner: str, entry: Entry, message: str, category: str = "user") -> None:
        """Puts an error in the place of an answer."""
        entry.failed = True
        error = {"error": visible(message), "category": category}
        self.end(owner, entry, json.dumps(error).encode())

    def drop(self, owner: str, name: str) -> None:
        """Forgets an answer that was fetched."""
        own = self._owners.get(owner)
        if own is not None and name in own.ended:
            self._remove(own, name)

    def _forget(self, own: _Owner, room: int = 0) -> None:
        """Forgets the oldest answers beyond the bounds."""
        oldest = time.monotonic() - self._bounds.seconds
        while own.ended:
            name, entry = next(iter(own.ended.items()))
            many = len(own.entries) + room > self._bounds.futures
            # The last one stays, or a single large answer could never be fetched.
            large = own.bytes > self._bounds.bytes and len(own.ended) > 1
            if not (many or large or entry.made < oldest):
                return
            self._remove(own, name)

    def _remove(self, own: _Owner, name: str) -> None:
        own.bytes -= len(own.ended.pop(name).data)
        entry = own.entries.pop(name)
        # Also where the list of its sampling session still names it, or somebody waits for it.
        entry.data, entry.kind = b"", ""

    async def wait(self, owner: str, event: asyncio.Event, seconds: float) -> bool:
        """Whether an event comes within some seconds.

        Raises:
            BusyError: as many questions of this key wait as may.
        """
        if event.is_set() or seconds <= 0:
            return event.is_set()
        own = self._owners.setdefault(owner, _Owner())
        if own.polls >= self._bounds.polls:
            raise BusyError(f"{own.polls} questions of this key wait, the most; ask again later")
        own.polls += 1
        try:
            async with asyncio.timeout(seconds):
                return await event.wait()
        except TimeoutError:
            return False
        finally:
            own.polls -= 1

    async def ended(self, owner: str, target: str, cursor: int, seconds: float) -> dict[str, Any]:
        """The requests of a sampling session that ended since a cursor, once there are some."""
        if seconds > 0:
            found = self._list(owner, target, cursor + 1)
        else:  # nobody will ask again, and there is nothing to keep for it
            found = self._ended.get((owner, target)) or _Ended(cursor + 1)
        found.trim(cursor)
        if not found.ids:
            found.more.clear()
            await self.wait(owner, found.more, seconds)
        rows: list[dict[str, Any]] = []
        for entry in found.ids:
            size = {} if entry.failed else {"response_payload_uncompressed_size": len(entry.data)}
            rows.append(
                {"state": "failed" if entry.failed else "finished", "request_id": entry.id, **size}
            )
        return {"completions": rows, "cursor": found.first + len(rows) - 1}

    def forget(self, owner: str, session: str) -> None:
        """Forgets the lists of a sampling session and its clones."""
        for key in [key for key in self._ended if key[0] == owner and key[1].startswith(session)]:
            del self._ended[key]


_running: set[Any] = set()  # asyncio keeps weak references of tasks


def background(work: Awaitable[None]) -> Any:
    """Runs something until it is done, whatever becomes of what began it."""
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return task


Start = Callable[[], Awaitable[None]]


class Turns:
    """The requests of one model, in the order of their numbers, each once.

    Args:
        patience: the seconds that a missing number is waited for; then those behind it go on.
    """

    furthest = 4096

    def __init__(self, patience: float) -> None:
        self.next = 0
        self._patience = patience
        self._held: dict[int, tuple[Entry, Start]] = {}
        self._queue: asyncio.Queue[tuple[Entry, Start]] = asyncio.Queue()
        self._late: asyncio.TimerHandle | None = None
        self._task = background(self._work())

    def has(self, number: int) -> bool:
        """Whether a request of this number has come."""
        return number < self.next or number in self._held

    def check(self, number: int) -> None:
        """Raises UserError for a number that is too far ahead to be waited for."""
        if not 0 <= number <= self.next + self.furthest:
            raise UserError(
                f"the sequence number is {number}, expected {self.next}, the next one of this model"
            )

    def add(self, number: int, entry: Entry, start: Start) -> None:
        """Takes a request, which is begun once all before it are."""
        self._held[number] = entry, start
        self._go_on()

    def _go_on(self) -> None:
        before = self.next
        while self.next in self._held:
            self._queue.put_nowait(self._held.pop(self.next))
            self.next += 1
        if self._late is not None and (not self._held or self.next > before):
            self._late.cancel()
            self._late = None
        if self._held and self._late is None:
            loop = asyncio.get_running_loop()
            self._late = loop.call_later(self._patience, self._skip)

    def _skip(self) -> None:
        """Goes on with what there is: the client has given up what is missing."""
        self._late, self.next = None, min(self._held)
        self._go_on()

    async def _work(self) -> None:
        while True:
            _, start = await self._queue.get()
            await start()

    def close(self) -> list[Entry]:
        """Ends; returns the answers of requests that were not begun."""
        self._task.cancel()
        if self._late is not None:
            self._late.cancel()
        left = [entry for entry, _ in self._held.values()]
        while not self._queue.empty():
            left.append(self._queue.get_nowait()[0])
        return left
