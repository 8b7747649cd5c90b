"""The engine: what all tenants ask for waits in one queue, and one thread computes it.

In each turn the thread makes the steps that are due, all in one program, then runs one batch of
rows, in which waiting tenants take turns. A tenant's requests are done in their order; a tenant
that has no place on the device waits on the host, and takes the place of the one that was named
least recently.
"""

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.adapting import adapt
from adapters_jax.errors import RecipeError, UserError, check_size, shown
from adapters_jax.finetune.tenants.losses import KINDS
from adapters_jax.finetune.tenants.programs import Batch, Programs
from adapters_jax.finetune.tenants.requests import (
    Adam,
    Checked,
    ClosedError,
    Passed,
    Row,
    Snapshot,
    UnknownTenantError,
    checked_rows,
)
from adapters_jax.finetune.tenants.rooms import Fit, Host, Room
from adapters_jax.methods import Method
from adapters_jax.nnx import ADAPTERS
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.bank import Bank
from adapters_jax.trees import leaves_by_path

_CLOSED = "the engine is closed"


class _Pass:
    """Rows of one request, and what was computed of them."""

    def __init__(self, rows: list[Checked], loss: str, backward: bool, buckets: list[int]) -> None:
        self.rows, self.kind, self.backward = rows, KINDS[loss], backward
        self.future: Future[Passed] = Future()
        self.left = len(rows)
        self.logprobs: list[Any] = [None] * len(rows)
        self.losses: list[Any] = [None] * len(rows)
        self.waiting: dict[int, deque[int]] = {}  # the numbers of rows, by the bucket of the length
        for i, bucket in enumerate(buckets):
            self.waiting.setdefault(bucket, deque()).append(i)

    def take(self, i: int, logprobs: np.ndarray, losses: np.ndarray) -> None:
        """Takes the results of a row."""
        n = self.rows[i].tokens.size
        self.logprobs[i], self.losses[i] = logprobs[:n].copy(), losses[:n].copy()
        self.left -= 1

    def result(self) -> Passed:
        """The result, once no row is left."""
        total = math.fsum(float(x.sum(dtype=np.float64)) for x in self.losses)
        return Passed(self.logprobs, self.losses, {"loss:sum": total})


@dataclasses.dataclass(eq=False)
class _Step:
    """A step of AdamW."""

    adam: Adam
    future: "Future[dict[str, float]]" = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(eq=False)
class _Order:
    """Something that is done with a tenant between batches."""

    work: Callable[[], Any]
    future: "Future[Any]" = dataclasses.field(default_factory=Future)


@dataclasses.dataclass(eq=False)
class _Tenant:
    """A tenant; what it has on the host is in its own shapes."""

    name: str
    recipe: Recipe
    fit: Fit
    leaves: Host
    grads: Host = dataclasses.field(default_factory=dict)
    mean: Host = dataclasses.field(default_factory=dict)
    square: Host = dataclasses.field(default_factory=dict)
    step: int = 0
    place: int | None = None  # on the device; then the arrays above are old
    summed: bool = False  # whether it has gradients
    sick: bool = False  # whether one of their losses was not finite
    requests: deque[Any] = dataclasses.field(default_factory=deque)

    def passes(self) -> list[_Pass]:
        """The requests that only read its adapter, and may be computed now."""
        found = []
        for request in self.requests:
            if not isinstance(request, _Pass):
                break
            found.append(request)
        return found


class Tenants:
    """Trains many adapters of one decoder at once, each with the numbers that it would have alone.

    Rows of several tenants are computed by one program, each with its tenant's adapter; methods,
    ranks and losses may differ. Gradients add up over `forward_backward`s until `optim_step`.
    All programs are compiled by `start`. A recipe that `create` sees for the first time compiles
    its initialisation, in the caller's thread.

    Args:
        model: the base, an NNX decoder without adapters. Its arrays are shared and never changed.
        recipe: the largest of everything: ranks, widths, targets, as for `aj.Bank`.
        places: how many tenants are on the device at a time; any number more waits on the host.
        rows: the largest number of rows in a program.
        group: how many rows of one tenant share a copy of its adapter; divides `rows`.
        lengths: the numbers of tokens that programs are compiled for; rows are padded to them.

    Attributes:
        recipe: the largest recipe.
        vocabulary: the number of tokens that the model knows.

    Raises:
        UserError: a size is not a positive whole number, or `group` does not divide `rows`.
        RecipeError: a method of the recipe has dropout, or acts from some tokens on; or the recipe
            does not fit the model or a bank.

    Example:
        >>> import adapters_jax as aj
        >>> from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
        >>> base = Decoder(DecoderConfig(8, 8, 8, 1, 1, 1), rngs=nnx.Rngs(0))
        >>> tenants = Tenants(base, aj.lora(2), places=1, rows=2, group=2, lengths=(4,))
        >>> tenants.start()
        >>> tenants.create("reviews", aj.lora(1), seed=0)
        >>> row = Row([1, 2, 3], [2, 3, 4], {"weights": [0.0, 1.0, 1.0]})
        >>> passed = tenants.forward_backward("reviews", [row], "cross_entropy")
        >>> step = tenants.optim_step("reviews", Adam(learning_rate=0.1))
        >>> passed.result().logprobs[0].shape, step.result()["step"]
        ((3,), 1.0)
        >>> tenants.close()
    """

    def __init__(
        self,
        model: nnx.Module,
        recipe: Recipe | Method,
        *,
        places: int = 8,
        rows: int = 32,
        group: int = 4,
        lengths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        self.recipe = Recipe(recipe)
        for name, value in (("places", places), ("rows", rows), ("group", group)):
            check_size("Tenants", name, value)
        if rows % group:
            raise UserError(f"Tenants: group={group} does not divide rows={rows}")
        self.lengths = tuple(sorted(set(lengths)))
        for length in self.lengths:
            check_size("Tenants", "lengths", length)
        longest = getattr(model, "longest", None)
        if not self.lengths or (longest is not None and self.lengths[-1] > longest):
            raise UserError(
                f"Tenants: lengths={shown(lengths)}, expected one or more, each at most {longest}"
            )
        _check_trainable(self.recipe)
        self.vocabulary: int = model.config.vocab_size  # type: ignore[attr-defined]
        self._base = nnx.split(model)
        adapted = adapt(model, self.recipe, rngs=nnx.Rngs(0), example_inputs=_EXAMPLE)
        # A bank for its model, in which each row has its own adapter; its places are not used.
        split = Bank(adapted, capacity=1).split
        room = Room.of(self.recipe, leaves_by_path(split[1]))
        shapes = sorted({1, rows // group})
        self._programs = Programs(
            split, room, places=places, shapes=shapes, each=group, lengths=self.lengths
        )
        self._starts: dict[Recipe, Any] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._turns: deque[_Tenant] = deque()  # in the order in which they may give rows
        self._placed: dict[_Tenant, None] = {}  # those on the device, last named last
        self._free = list(range(places, 0, -1))
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tenants", daemon=True)

    def start(self, compiled: Callable[[int, int], None] = lambda n, of: None) -> None:
        """Compiles every program, then begins to work in another thread; call it once.

        Args:
            compiled: is called after each program, with how many there are so far and in all; what
                it raises ends the compiling.
        """
        self._initial(self.recipe, 0)
        self._programs.compile(compiled)
        self._thread.start()

    def close(self) -> None:
        """Ends the work after the present batch; requests that wait fail with ClosedError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it works on requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tenants, in the order of their arrival."""
        return tuple(self._tenants)

    def create(self, name: str, recipe: Recipe | Method, seed: int) -> None:
        """Adds a tenant, with the adapter that `aj.adapt(model, recipe, rngs=nnx.Rngs(seed))` has.

        Args:
            name: what requests call it.
            recipe: methods of the largest recipe, or some of them, at its targets, or at some, with
                sizes up to its own.
            seed: of the initial adapter, from 0 to 2**32 - 1.

        Raises:
            UserError: the name is taken or no text, or the seed is out of range.
            RecipeError: the largest recipe lacks a method, or has other settings than sizes.
            MismatchError: a rank or width is larger than that of the largest recipe.
            TargetError: a pattern matches nothing.
            ClosedError: the engine is closed.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f"Tenants.create: name={shown(name)}, expected a text")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"Tenants.create: seed={shown(seed)}, expected 0 to 2**32 - 1")
        recipe = Recipe(recipe)
        _check_trainable(recipe)
        self._check_new(name)
        leaves = self._initial(recipe, seed)
        fit = self._programs.room.fit(name, recipe, {p: x.shape for p, x in leaves.items()})
        tenant = _Tenant(name, recipe, fit, leaves)
        with self._changed:
            self._check_new(name)
            self._tenants[name] = tenant
            self._turns.append(tenant)

    def drop(self, name: str) -> None:
        """Takes a tenant away; its requests that wait fail with UnknownTenantError.

        Raises:
            UnknownTenantError: there is none of that name.
        """
        with self._changed:
            tenant = self._named(name)
            del self._tenants[name]
            self._changed.notify()
        # The thread may compute rows of it now; it forgets the tenant afterwards.
        _fail([tenant], UnknownTenantError(f"tenant {name!r} was dropped"))

    def forward_backward(
        self,
        name: str,
        rows: Sequence[Row],
        loss: str,
        config: Mapping[str, float] | None = None,
        *,
        backward: bool = True,
    ) -> "Future[Passed]":
        """Computes a loss, and adds its gradients to those of the tenant.

        Args:
            name: the tenant.
            rows: one or more texts.
            loss: one of `losses.LOSSES`.
            config: settings of the loss.
            backward: False computes no gradients.

        Raises:
            UserError: the rows, the loss or its settings are not as they should be.
            UnknownTenantError: there is no tenant of that name.
            ClosedError: the engine is closed.
        """
        self._named(name)
        checked = checked_rows(
            rows, loss, config, vocabulary=self.vocabulary, longest=self.lengths[-1]
        )
        buckets = [next(n for n in self.lengths if n >= row.tokens.size) for row in checked]
        return self._queue(name, _Pass(checked, loss, backward, buckets))

    def optim_step(self, name: str, adam: Adam = Adam()) -> "Future[dict[str, float]]":
        """Makes an AdamW step with the gradients since the last one, and forgets them.

        Without any gradients nothing changes, and the norm is 0.

        Args:
            name: the tenant.
            adam: the step's numbers.

        Returns:
            A future of metrics: `grad_norm`, before clipping, and `step`, the number of steps made.
            It raises UserError if a loss, a gradient or an update is not finite; the adapter then
            stays as it was, and the gradients are forgotten.

        Raises:
            UserError: a number is out of its range.
            UnknownTenantError: there is no tenant of that name.
            ClosedError: the engine is closed.
        """
        return self._queue(name, _Step(adam.checked()))

    def snapshot(self, name: str) -> "Future[Snapshot]":
        """The tenant's adapter and optimiser state, after all requests before this one.

        Raises:
            UnknownTenantError: there is no tenant of that name.
            ClosedError: the engine is closed.
        """
        tenant = self._named(name)
        return self._queue(name, _Order(lambda: self._taken(tenant)))

    def restore(self, name: str, snapshot: Snapshot, *, optimizer: bool) -> "Future[None]":
        """Gives a tenant the adapter of a snapshot, and forgets its gradients.

        Args:
            name: the tenant.
            snapshot: of a tenant with an adapter of the same shapes.
            optimizer: whether it gets the optimiser's state too; else it gets a new one.

        Raises:
            MismatchError: the shapes differ.
            UnknownTenantError: there is no tenant of that name.
            ClosedError: the engine is closed.
        """
        tenant = self._named(name)
        tenant.fit.check(name, snapshot.leaves)
        return self._queue(name, _Order(lambda: self._restored(tenant, snapshot, optimizer)))

    def _initial(self, recipe: Recipe, seed: int) -> Host:
        """The leaves of a new adapter."""
        graphdef, state = self._base

        def start(state: Any, seed: Any) -> Any:
            rngs = nnx.Rngs(jax.random.key(seed))
            made = adapt(nnx.merge(graphdef, state), recipe, rngs=rngs, example_inputs=_EXAMPLE)
            return leaves_by_path(nnx.state(made, ADAPTERS))

        if recipe not in self._starts:
            self._starts[recipe] = jax.jit(start).lower(state, np.uint32(seed)).compile()
        return jax.device_get(self._starts[recipe](state, np.uint32(seed)))

    def _check_new(self, name: str) -> None:
        if self._closing:
            raise ClosedError(_CLOSED)
        if name in self._tenants:
            raise UserError(f"Tenants.create: the name {name!r} is taken; drop it, or give another")

    def _named(self, name: str) -> _Tenant:
        if name not in self._tenants:
            raise UnknownTenantError(f"no tenant is named {shown(name)}")
        return self._tenants[name]

    def _queue(self, name: str, request: Any) -> "Future[Any]":
        with self._changed:
            if self._closing:
                raise ClosedError(_CLOSED)
            self._named(name).requests.append(request)
            self._changed.notify()
        return request.future

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    if self._closing:
                        return
                    gone = [each for each in self._turns if not self._stays(each)]
                for tenant in gone:
                    self._forget(tenant)
                self._orders()
                self._steps()
                self._batch()
        finally:  # also after a bug, so that nobody waits for ever
            with self._changed:
                self._closing = True
            _fail(self._turns, ClosedError(_CLOSED))

    def _stays(self, tenant: _Tenant) -> bool:
        return self._tenants.get(tenant.name) is tenant

    def _has_work(self) -> bool:
        return self._closing or any(t.requests or not self._stays(t) for t in self._turns)

    def _forget(self, tenant: _Tenant) -> None:
        """Frees the place of a tenant that was dropped."""
        with self._changed:
            self._turns.remove(tenant)
        if tenant.place is not None:
            self._free.append(tenant.place)
            del self._placed[tenant]

    def _due(self, kind: type) -> list[tuple[_Tenant, Any]]:
        """The tenants whose next request is of a kind, and that request."""
        with self._changed:
            return [(t, t.requests[0]) for t in self._turns if _next(t, kind)]

    def _orders(self) -> None:
        """Does what has to be done between batches."""
        while due := self._due(_Order):
            for tenant, order in due:
                self._end(tenant, order, order.work)

    def _steps(self) -> None:
        """Makes the steps that are due, as many in one program as there are places."""
        due = self._due(_Step)
        for tenant, step in [each for each in due if not each[0].summed]:
            metrics = {"grad_norm": 0.0, "step": float(tenant.step)}
            self._end(tenant, step, lambda metrics=metrics: metrics)
        due = [each for each in due if each[0].summed][: self._programs.places]
        if not due:
            return
        self._place([tenant for tenant, _ in due])
        made = self._programs.step([(t.place, t.step, s.adam) for t, s in due])
        for (tenant, step), (norm, fine) in zip(due, made, strict=True):
            self._end(tenant, step, lambda t=tenant, n=norm, f=fine: _stepped(t, n, f))

    def _batch(self) -> None:
        """Computes one batch of rows, if there are any."""
        chosen = self._chosen()
        if not chosen:
            return
        length, backward, groups = chosen
        self._place([tenant for tenant, _ in groups])
        shapes, each = self._programs.shapes, self._programs.each
        batch = Batch.empty(next(n for n in shapes if n >= len(groups)), each, length)
        for g, (tenant, rows) in enumerate(groups):
            batch.places[g] = tenant.place
            for r, (request, i) in enumerate(rows, g * each):
                _fill(batch, r, request.rows[i], request.kind)
        logprobs, losses = self._programs.run(batch, backward)
        for g, (tenant, rows) in enumerate(groups):
            for r, (request, i) in enumerate(rows, g * each):
                request.take(i, logprobs[r], losses[r])
                tenant.summed |= backward
                tenant.sick |= backward and not np.isfinite(losses[r]).all()
            for request in {id(request): request for request, _ in rows}.values():
                if not request.left:
                    self._end(tenant, request, request.result)

    def _chosen(self) -> tuple[int, bool, list[tuple[_Tenant, list[tuple[_Pass, int]]]]] | None:
        """The next batch: its length, whether it has gradients, and rows in groups by tenant."""
        with self._changed:
            turns = {
                t: p
                for t in self._turns
                if (p := [r for r in t.passes() if any(r.waiting.values())])
            }
        if not turns:
            return None
        first = next(iter(turns.values()))[0]
        backward, length = first.backward, max(n for n, rows in first.waiting.items() if rows)
        groups: list[tuple[_Tenant, list[tuple[_Pass, int]]]] = []
        most = self._programs.shapes[-1]
        # Shorter rows fill what the program has room for in any case.
        for lengths in ((length,), tuple(n for n in reversed(self.lengths) if n < length)):
            waiting = deque(turns)
            while waiting and len(groups) < most:
                tenant = waiting.popleft()
                named = {each for each, _ in groups} | {tenant}
                if len(named) > self._programs.places:
                    continue
                rows = _rows(turns[tenant], backward, lengths, self._programs.each)
                if rows:
                    groups.append((tenant, rows))
                    waiting.append(tenant)
            most = next(n for n in self._programs.shapes if n >= len(groups))
        with self._changed:  # those that were served stand last
            for tenant in dict.fromkeys(tenant for tenant, _ in groups):
                self._turns.remove(tenant)
                self._turns.append(tenant)
        return length, backward, groups

    def _end(self, tenant: _Tenant, request: Any, work: Callable[[], Any]) -> None:
        """Ends a tenant's request, with what `work` returns or raises."""
        with self._changed:
            if request in tenant.requests:  # unless it was dropped
                tenant.requests.remove(request)
        if not request.future.set_running_or_notify_cancel():
            return
        try:
            request.future.set_result(work())
        except UserError as error:
            request.future.set_exception(error)

    def _place(self, tenants: Sequence[_Tenant]) -> None:
        """Gives each of these tenants a place on the device."""
        named = dict.fromkeys(tenants)
        self._placed |= {
            each: self._placed.pop(each, None) for each in named if each in self._placed
        }
        for tenant in [each for each in named if each.place is None]:
            if not self._free:
                self._leave(next(iter(self._placed)))
            tenant.place, self._placed[tenant] = self._free.pop(), None
            arrays = tenant.leaves, tenant.grads, tenant.mean, tenant.square
            self._programs.write(tenant.place, tenant.fit, *arrays)
            tenant.leaves = tenant.grads = tenant.mean = tenant.square = {}

    def _leave(self, tenant: _Tenant) -> None:
        """Takes a tenant to the host."""
        found = self._programs.read(tenant.place, tenant.fit)  # type: ignore[arg-type]
        tenant.leaves, tenant.grads, tenant.mean, tenant.square = found
        if not tenant.summed:
            tenant.grads = {}
        self._free.append(tenant.place)  # type: ignore[arg-type]
        del self._placed[tenant]
        tenant.place = None

    def _taken(self, tenant: _Tenant) -> Snapshot:
        leaves, mean, square = tenant.leaves, tenant.mean, tenant.square
        if tenant.place is not None:
            leaves, _, mean, square = self._programs.read(tenant.place, tenant.fit)
        return Snapshot(tenant.recipe, {**leaves}, {**mean}, {**square}, tenant.step)

    def _restored(self, tenant: _Tenant, snapshot: Snapshot, optimizer: bool) -> None:
        if tenant.place is not None:
            self._leave(tenant)
        tenant.leaves, tenant.grads = {**snapshot.leaves}, {}
        tenant.mean, tenant.square = (
            ({**snapshot.mean}, {**snapshot.square}) if optimizer else ({}, {})
        )
        tenant.step = snapshot.step if optimizer else 0
        tenant.summed = tenant.sick = False


# Of which only the shape matters.
_EXAMPLE = (jnp.zeros((1, 4), jnp.int32),)


def _check_trainable(recipe: Recipe) -> None:
    """Raises RecipeError for methods that draw, or that act on some tokens alone."""
    for method in recipe:
        if method.dropout or method.gated:
            why = "has dropout" if method.dropout else "acts from some tokens on"
            raise RecipeError(
                f"Tenants: {type(method).__name__} {why}, which is not supported; leave that out"
            )


def _next(tenant: _Tenant, kind: type) -> bool:
    return bool(tenant.requests) and isinstance(tenant.requests[0], kind)


def _fail(tenants: Sequence[_Tenant] | deque[_Tenant], error: UserError) -> None:
    """Ends all requests of tenants with an error."""
    for tenant in tenants:
        while tenant.requests:
            future = tenant.requests.popleft().future
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(error)


def _stepped(tenant: _Tenant, norm: float, fine: bool) -> dict[str, float]:
    """The metrics of a step; raises UserError where it was not made."""
    sick, tenant.summed, tenant.sick = tenant.sick, False, False
    if not fine or sick:
        what = "a loss" if sick else f"the gradients' norm ({norm}) or an update"
        raise UserError(
            f"tenant {tenant.name!r}: {what} is not finite, so that no step was made; the adapter "
            "is as it was, and the gradients are forgotten"
        )
    tenant.step += 1
    return {"grad_norm": norm, "step": float(tenant.step)}


def _rows(
    passes: Sequence[_Pass], backward: bool, lengths: Sequence[int], most: int
) -> list[tuple[_Pass, int]]:
    """Takes up to `most` rows of these lengths from a tenant's requests."""
    found: list[tuple[_Pass, int]] = []
    for length in lengths:
        for request in passes:
            waiting = request.waiting.get(length)
            while request.backward == backward and waiting and len(found) < most:
                found.append((request, waiting.popleft()))
    return found


def _fill(batch: Batch, r: int, row: Checked, kind: int) -> None:
    """Writes a row into a batch."""
    n, given = row.tokens.size, batch.given
    batch.tokens[r, :n], batch.targets[r, :n] = row.tokens, row.targets
    given.kind[r], given.beta[r], given.counts[r, :n] = kind, row.beta, True
    for name in ("weights", "reference", "low", "high", "sequence"):
        getattr(given, name)[r, :n] = getattr(row, name)
