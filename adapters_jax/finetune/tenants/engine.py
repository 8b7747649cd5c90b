"""The engine: what all tenants ask for waits in one queue, and one thread computes it.

In each turn the thread makes the steps that are due, all in one program, then runs one batch of
rows, where waiting tenants take turns. A tenant's requests are done in their order; a tenant
that has no place on the device waits on the host, and takes the place of the one that was named
least recently.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.adapting import adapt
from adapters_jax.distributed.mesh import batch_parts
from adapters_jax.errors import MismatchError, RecipeError, UserError, check_size, shown
from adapters_jax.finetune.tenants.places import Places
from adapters_jax.finetune.tenants.programs import Batch, Programs, Stack
from adapters_jax.finetune.tenants.requests import (
    Adam,
    ClosedError,
    Passed,
    Row,
    Snapshot,
    UnknownTenantError,
    checked_rows,
)
from adapters_jax.finetune.tenants.rooms import Fit, Host, Room
from adapters_jax.finetune.tenants.waiting import Order, Pass, Step, Tenant, choose, fail, fill
from adapters_jax.methods import Method, PromptTuning
from adapters_jax.nnx import ADAPTERS
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.bank import Bank
from adapters_jax.trees import leaves_by_path
from adapters_jax.weights.meshes import mesh_of

_CLOSED = "the engine is closed"


class Tenants:
    """Trains many adapters of one decoder at once, each with the numbers that it would have alone.

    Rows of several tenants are computed by one program, each with its tenant's adapter; methods,
    ranks and losses may differ. Gradients add up over `forward_backward`s until `optim_step`.
    Requests of one tenant are done in the order of the calls. Each raises UnknownTenantError where
    there is no tenant of that name, and ClosedError where the engine is closed.

    All programs are compiled by `start`. A recipe that `create` sees for the first time compiles
    its initialisation, in the caller's thread.

    Args:
        model: the base, an NNX decoder without adapters. Its arrays are shared and never changed.
            On a mesh (see `aj.shard`) rows are split over `data` and `fsdp`, and every device has
            the adapters whole.
        recipe: the largest of everything: ranks, widths, targets, as for `aj.Bank`.
        places: how many tenants are on the device at a time; any number more waits on the host.
        rows: the largest number of rows in a program.
        group: how many rows of one tenant share a copy of its adapter; divides `rows`.
        lengths: the numbers of tokens that programs are compiled for; rows are padded to them.

    Attributes:
        recipe: the largest recipe.
        vocabulary: the number of tokens that the model knows.

    Raises:
        UserError: the model is no decoder, a size is not a positive whole number, or `group` or
            the parts of the mesh do not divide `rows`.
        RecipeError: a method of the recipe has dropout, or acts from some tokens on or at
            placeholders; or the recipe does not fit the model or a bank.

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
        # An encoder would read the targets, too.
        if not hasattr(model, "hidden") or hasattr(model, "encoder"):
            raise UserError(f"Tenants: {type(model).__name__} is no decoder, which is what trains")
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
            most = f", each at most {longest}" if longest else ""
            raise UserError(f"Tenants: lengths={shown(lengths)}, expected one or more{most}")
        _check_trainable(self.recipe)
        self.vocabulary: int = model.config.vocab_size  # type: ignore[attr-defined]
        self._base = nnx.split(model)
        mesh = mesh_of(self._base[1])
        parts = 1 if mesh is None else batch_parts(mesh.shape)
        if rows % parts:
            raise UserError(
                f"Tenants: rows={rows} do not split into {parts} parts, as many as the base's mesh "
                f"splits rows into; give a multiple of {parts}"
            )
        adapted = adapt(model, self.recipe, rngs=nnx.Rngs(0), example_inputs=_EXAMPLE)
        # A bank, since each row of its model has its own adapter; its places are not used.
        split = Bank(adapted, capacity=1).split
        room = Room.of(self.recipe, leaves_by_path(split[1]))
        groups = rows // group
        least = parts if groups % parts == 0 else math.lcm(group, parts) // group
        self._programs = Programs(
            split,
            room,
            places=places,
            sizes=sorted({least, groups}),
            each=group,
            lengths=self.lengths,
        )
        self._starts: dict[Recipe, tuple[Any, Fit]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._turns: deque[Tenant] = deque()  # in front those whose turn comes first
        self._places = Places(self._programs)
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tenants", daemon=True)

    def start(self, compiled: Callable[[int, int], None] = lambda n, of: None) -> None:
        """Compiles every program, then begins to work in another thread; call it once.

        Args:
            compiled: is called after each program, with how many there are so far and in all; what
                it raises ends the compiling.
        """
        self._initial("", self.recipe, 0)
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
        leaves, fit = self._initial(name, recipe, seed)
        tenant = Tenant(name, recipe, fit, Stack(leaves, {}, {}, {}))
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
            # The thread may compute rows of it now; it forgets the tenant afterwards.
            requests = tenant.emptied()
            self._changed.notify()
        fail(requests, UnknownTenantError(f"tenant {name!r} was dropped"))

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
            rows: one or more texts.
            loss: one of `losses.LOSSES`.
            config: settings of the loss.
            backward: False computes no gradients.

        Raises:
            UserError: the rows, the loss or its settings are not as they should be.
        """
        self._named(name)
        checked = checked_rows(
            rows, loss, config, vocabulary=self.vocabulary, longest=self.lengths[-1]
        )
        return self._queue(name, Pass(checked, loss, backward, self.lengths))

    def optim_step(self, name: str, adam: Adam = Adam()) -> "Future[dict[str, float]]":
        """Makes an AdamW step with the gradients since the last one, and forgets them.

        Without any gradients nothing changes, and the norm is 0.

        Returns:
            A future of metrics: `grad_norm`, before clipping, and `step`, the number of steps made.
            It raises UserError if a loss, a gradient or an update is not finite; the adapter then
            stays as it was, and the gradients are forgotten.

        Raises:
            UserError: a number is out of its range.
        """
        return self._queue(name, Step(adam.checked()))

    def snapshot(self, name: str) -> "Future[Snapshot]":
        """The tenant's adapter and optimiser state, after all requests before this one."""
        tenant = self._named(name)
        return self._queue(name, Order(lambda: self._snapshot(tenant)))

    def restore(self, name: str, snapshot: Snapshot, *, optimizer: bool) -> "Future[None]":
        """Gives a tenant the adapter of a snapshot, and forgets its gradients.

        Args:
            snapshot: of a tenant with the same recipe.
            optimizer: whether it gets the optimiser's state too; else it gets a new one.

        Raises:
            MismatchError: the shapes or the recipes differ.
        """
        tenant = self._named(name)
        tenant.fit.check(name, snapshot.leaves)
        for moments in (snapshot.mean, snapshot.square):
            tenant.fit.check(name, moments, some=True)
        if snapshot.recipe != tenant.recipe:
            raise MismatchError(
                f"tenant {name!r} has {tenant.recipe}, and the snapshot is of {snapshot.recipe}; "
                "restore it to a tenant that was created with the snapshot's recipe"
            )
        return self._queue(name, Order(lambda: self._restore(tenant, snapshot, optimizer)))

    def _initial(self, name: str, recipe: Recipe, seed: int) -> tuple[Host, Fit]:
        """The leaves of a new adapter, and how they lie in the room."""
        graphdef, state = self._base

        def start(state: Any, seed: Any) -> Any:
            rngs = nnx.Rngs(jax.random.key(seed))
            made = adapt(nnx.merge(graphdef, state), recipe, rngs=rngs, example_inputs=_EXAMPLE)
            return leaves_by_path(nnx.state(made, ADAPTERS))

        known = self._starts.get(recipe)
        if known is None:
            lowered = jax.jit(start).lower(state, np.uint32(seed))
            # A recipe that does not fit is refused before anything is compiled.
            shapes = {path: leaf.shape for path, leaf in lowered.out_info.items()}
            fit = self._programs.room.fit(name, recipe, shapes)
            known = lowered.compile(), fit
            with self._changed:  # several threads may create tenants
                self._starts[recipe] = known
                if len(self._starts) > _RECIPES:
                    self._starts.pop(next(iter(self._starts)))
        made, fit = known
        return jax.device_get(made(state, np.uint32(seed))), fit

    def _check_new(self, name: str) -> None:
        if self._closing:
            raise ClosedError(_CLOSED)
        if name in self._tenants:
            raise UserError(f"Tenants.create: the name {name!r} is taken; drop it, or give another")

    def _named(self, name: str) -> Tenant:
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
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    if self._closing:
                        return
                    gone = [each for each in self._turns if not self._stays(each)]
                for tenant in gone:
                    with self._changed:
                        self._turns.remove(tenant)
                    self._places.leave(tenant)
                for tenant, order in self._due(Order):
                    self._end(tenant, order, order.work)
                self._steps()
                self._batch()
        finally:  # also after a bug, so that nobody waits for ever
            with self._changed:
                self._closing = True
                requests = [each for tenant in self._turns for each in tenant.emptied()]
            fail(requests, ClosedError(_CLOSED))

    def _stays(self, tenant: Tenant) -> bool:
        return self._tenants.get(tenant.name) is tenant

    def _has_work(self) -> bool:
        return self._closing or any(t.requests or not self._stays(t) for t in self._turns)

    def _due(self, kind: type) -> list[tuple[Tenant, Any]]:
        """The tenants whose next request is of a kind, and that request."""
        with self._changed:
            return [(each, each.requests[0]) for each in self._turns if each.next(kind)]

    def _steps(self) -> None:
        """Makes the steps that are due, as many in one program as there are places."""
        due = self._due(Step)
        for tenant, step in due:
            if not tenant.summed:
                metrics = {"grad_norm": 0.0, "step": float(tenant.step)}
                self._end(tenant, step, partial(dict, metrics))
        due = [each for each in due if each[0].summed][: self._programs.places]
        if not due:
            return
        places = self._places.of([tenant for tenant, _ in due])
        given = [(place, t, step.adam) for place, (t, step) in zip(places, due, strict=True)]
        made = self._programs.step([(place, t.step, adam, t.sick) for place, t, adam in given])
        for (tenant, step), (norm, fine) in zip(due, made, strict=True):
            self._end(tenant, step, partial(tenant.stepped, norm, fine))

    def _batch(self) -> None:
        """Computes one batch of rows, if there are any."""
        programs = self._programs
        with self._changed:
            turns = {each: passes for each in self._turns if (passes := each.passes())}
        if not turns:
            return
        length, backward, groups = choose(turns, programs.sizes, programs.each, programs.places)
        with self._changed:  # those that are served stand last
            for tenant in dict.fromkeys(tenant for tenant, _ in groups):
                self._turns.remove(tenant)
                self._turns.append(tenant)
        size = next(n for n in programs.sizes if n >= len(groups))
        batch = Batch.empty(size, programs.each, length)
        batch.places[: len(groups)] = self._places.of([tenant for tenant, _ in groups])
        rows = [
            (r, tenant, *row)
            for g, (tenant, rows) in enumerate(groups)
            for r, row in enumerate(rows, g * programs.each)
        ]
        for r, _, request, i in rows:
            fill(batch, r, request.rows[i], request.kind)
        logprobs, losses = programs.run(batch, backward)
        for r, tenant, request, i in rows:
            request.take(i, logprobs[r], losses[r])
            tenant.summed |= backward
            tenant.sick |= backward and not np.isfinite(losses[r]).all()
            if not request.left:
                self._end(tenant, request, request.result)

    def _end(self, tenant: Tenant, request: Any, work: Callable[[], Any]) -> None:
        """Ends a tenant's request, with what `work` returns or raises."""
        with self._changed:
            waits = request in tenant.requests  # unless the tenant was dropped
            if waits:
                tenant.requests.remove(request)
        waits = waits and request.future.set_running_or_notify_cancel()
        try:
            result = work()
        except Exception as error:
            if waits:
                request.future.set_exception(error)
            if not isinstance(error, UserError):  # a bug, which ends the engine
                raise
        else:
            if waits:
                request.future.set_result(result)

    def _snapshot(self, tenant: Tenant) -> Snapshot:
        leaves, _, mean, square = self._places.arrays(tenant)
        return Snapshot(tenant.recipe, {**leaves}, {**mean}, {**square}, tenant.step)

    def _restore(self, tenant: Tenant, snapshot: Snapshot, optimizer: bool) -> None:
        self._places.leave(tenant)
        moments = (snapshot.mean, snapshot.square) if optimizer else ({}, {})
        tenant.arrays = Stack(snapshot.leaves, {}, *moments)
        tenant.step = snapshot.step if optimizer else 0
        tenant.summed = tenant.sick = False


_RECIPES = 64  # the number of recipes whose initialisations stay compiled

# Only its shape matters.
_EXAMPLE = (jnp.zeros((1, 4), jnp.int32),)


def _check_trainable(recipe: Recipe) -> None:
    """Raises RecipeError for methods that draw, or that act on some tokens alone."""
    for method in recipe:
        reasons = (
            ("has dropout", method.dropout),
            ("acts from some tokens on", method.gated),
            ("acts where placeholders are in front of rows", isinstance(method, PromptTuning)),
        )
        if why := next((why for why, holds in reasons if holds), None):
            raise RecipeError(
                f"Tenants: {type(method).__name__} {why}, which is not supported; leave that out"
            )
