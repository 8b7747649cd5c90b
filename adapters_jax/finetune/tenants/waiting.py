"""What waits: the requests of each tenant in their order, and whose rows are next."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.finetune.tenants.losses import KINDS
from adapters_jax.finetune.tenants.programs import Batch, Stack
from adapters_jax.finetune.tenants.requests import Adam, Checked, Passed
from adapters_jax.finetune.tenants.rooms import Fit
from adapters_jax.recipe import Recipe


class Pass:
    """Rows of one request, and what was computed of them.

    Args:
        loss: the name of their loss.
        backward: whether their gradients are asked for.
        lengths: the lengths of programs, rising.
    """

    def __init__(
        self, rows: list[Checked], loss: str, backward: bool, lengths: Sequence[int]
    ) -> None:
        self.rows, self.kind, self.backward = rows, KINDS[loss], backward
        self.future: Future[Passed] = Future()
        self.left = len(rows)
        self.waiting: dict[int, deque[int]] = {n: deque() for n in lengths}  # numbers of rows
        self._logprobs: list[Any] = [None] * len(rows)
        self._losses: list[Any] = [None] * len(rows)
        for i, row in enumerate(rows):
            self.waiting[next(n for n in lengths if n >= row.tokens.size)].append(i)

    @property
    def longest(self) -> int:
        """The length of the longest rows that wait; 0 where none do."""
        return max((n for n, rows in self.waiting.items() if rows), default=0)

    def take(self, i: int, logprobs: np.ndarray, losses: np.ndarray) -> None:
        """Takes the results of row i."""
        n = self.rows[i].tokens.size
        self._logprobs[i], self._losses[i] = logprobs[:n].copy(), losses[:n].copy()
        self.left -= 1

    def result(self) -> Passed:
        """The result, once no row is left."""
        with np.errstate(invalid="ignore"):  # infinities of both signs have no sum
            total = np.concatenate(self._losses).sum(dtype=np.float64)
        return Passed(self._logprobs, self._losses, {"loss:sum": float(total)})


def fill(batch: Batch, r: int, row: Checked, kind: int) -> None:
    """Writes a row with a loss into a batch, as its row r."""
    n, given = row.tokens.size, batch.given
    batch.tokens[r, :n], batch.targets[r, :n] = row.tokens, row.targets
    given.kind[r], given.beta[r], given.counts[r, :n] = kind, row.beta, True
    for name in ("weights", "reference", "low", "high", "sequence"):
        getattr(given, name)[r, :n] = getattr(row, name)


@dataclasses.dataclass(eq=False)
class Step:
    """A step of AdamW."""

    adam: Adam
    future: "Future[dict[str, float]]" = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(eq=False)
class Order:
    """Something that is done with a tenant between batches."""

    work: Callable[[], Any]
    future: "Future[Any]" = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(eq=False)
class Tenant:
    """A tenant.

    Attributes:
        fit: how its leaves lie in the room.
        arrays: its arrays in its own shapes, without those that are zeros; old ones while it has a
            place on the device.
        step: the number of steps made.
        summed: whether it has gradients.
        sick: whether one of their losses was not finite.
        requests: what it waits for, in the order of the calls.
    """

    name: str
    recipe: Recipe
    fit: Fit
    arrays: Stack
    step: int = 0
    summed: bool = False
    sick: bool = False
    requests: deque[Any] = dataclasses.field(default_factory=deque)

    def next(self, kind: type) -> bool:
        """Whether its next request is of a kind."""
        return bool(self.requests) and isinstance(self.requests[0], kind)

    def passes(self) -> list[Pass]:
        """The requests with waiting rows that read its adapter as it is now."""
        found = []
        for request in self.requests:
            if not isinstance(request, Pass):
                break
            if request.longest:
                found.append(request)
        return found

    def emptied(self) -> list[Any]:
        """Its requests, which it no longer has afterwards."""
        requests = [*self.requests]
        self.requests.clear()
        return requests

    def stepped(self, norm: float, fine: bool) -> dict[str, float]:
        """The metrics of a step; raises UserError where it was not made."""
        sick, self.summed, self.sick = self.sick, False, False
        if not fine:
            what = "a loss" if sick else f"the gradients' norm ({norm}) or an update"
            raise UserError(
                f"tenant {self.name!r}: {what} is not finite, so that no step was made; the "
                "adapter is as it was, and the gradients are forgotten"
            )
        self.step += 1
        return {"grad_norm": norm, "step": float(self.step)}


def fail(requests: Iterable[Any], error: UserError) -> None:
    """Ends requests with an error."""
    for request in requests:
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)


Rows = list[tuple[Pass, int]]


class Chosen(NamedTuple):
    """The rows of a batch.

    Attributes:
        backward: whether it computes gradients.
        groups: rows of one tenant each.
    """

    length: int
    backward: bool
    groups: list[tuple[Tenant, Rows]]


def choose(
    turns: Mapping[Tenant, Sequence[Pass]], sizes: Sequence[int], each: int, places: int
) -> Chosen:
    """Takes the rows of the next batch from what waits: the tenants give a group in turn.

    Args:
        turns: the requests with waiting rows, of one tenant or more, by whose turn it is.
        sizes: the numbers of groups that programs have, rising.
        each: the most rows of a group.
        places: the most tenants of a batch.
    """
    first = next(iter(turns.values()))[0]
    length, groups, named = first.longest, list[tuple[Tenant, Rows]](), set[Tenant]()
    fitting = [n for n in reversed(first.waiting) if n <= length]
    most = sizes[-1]
    # Shorter rows alone fill only what the program has room for in any case.
    for begin in ([length], fitting):
        waiting = deque(turns)
        while waiting and len(groups) < most:
            tenant = waiting.popleft()
            passes = [x for x in turns[tenant] if x.backward == first.backward]
            begins = any(request.waiting[n] for request in passes for n in begin)
            if begins and (tenant in named or len(named) < places):
                groups.append((tenant, _rows(passes, fitting, each)))
                named.add(tenant)
                waiting.append(tenant)
        most = next(n for n in sizes if n >= len(groups))
    return Chosen(length, first.backward, groups)


def _rows(passes: Sequence[Pass], lengths: Sequence[int], most: int) -> Rows:
    """Takes up to `most` rows from a tenant's requests, by these lengths."""
    found: Rows = []
    for length in lengths:
        for request in passes:
            waiting = request.waiting[length]
            while waiting and len(found) < most:
                found.append((request, waiting.popleft()))
    return found
