"""The tenants on the device: stacked adapters, gradients and optimiser states, and the programs.

All programs are compiled at once. Each has fixed shapes, so that what is not there is padding: rows
of a group, groups of a batch. The first place is for such groups; its adapter changes nothing.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from adapters_jax.finetune.tenants.losses import Given, token_losses
from adapters_jax.finetune.tenants.requests import Adam
from adapters_jax.finetune.tenants.rooms import Fit, Room
from adapters_jax.methods.mixed import Rows
from adapters_jax.training.losses.chunked import token_log_probs
from adapters_jax.weights.meshes import mesh_of, on_mesh

Leaves = dict[str, Array]


class Stack(NamedTuple):
    """Arrays by path: of one tenant, or of all on the device, with their places in front."""

    leaves: Any
    grads: Any
    mean: Any
    square: Any


class Tables(NamedTuple):
    """What `Fit` says of the tenant at each place."""

    scales: Any
    sizes: Any
    lengths: Any

    @classmethod
    def empty(cls, room: Room, places: int) -> "Tables":
        """Tables of idle adapters."""
        return cls(
            np.ones((places, len(room.idle)), np.float32),
            np.zeros((places, len(room.trained), room.ndim), np.int32),
            np.zeros((places, len(room.prompts)), np.int32),
        )

    def write(self, place: int, fit: Fit) -> None:
        """Takes a tenant in."""
        self.scales[place], self.sizes[place], self.lengths[place] = fit[1:]


class Batch(NamedTuple):
    """Rows for one program, in groups with an adapter each.

    Attributes:
        places: the place of each group's adapter, int32 (groups,).
        tokens: int32 (rows, length), each group's rows behind those of the one before.
        targets: likewise; -1 is padding.
        given: what the losses read.
    """

    places: Any
    tokens: Any
    targets: Any
    given: Given

    @classmethod
    def empty(cls, groups: int, each: int, length: int) -> "Batch":
        """A batch of padding, to write into."""
        shape = groups * each, length
        given: dict[str, Any] = {name: np.zeros(shape, np.float32) for name in Given._fields}
        given["kind"], given["counts"] = np.zeros(shape[0], np.int32), np.zeros(shape, bool)
        given["beta"] = np.zeros(shape[0], np.float32)
        places, tokens = np.zeros(groups, np.int32), np.zeros(shape, np.int32)
        return cls(places, tokens, np.full(shape, -1, np.int32), Given(**given))


Due = tuple[int, int, Adam, bool]  # a place, the steps before, the numbers, whether it may not be


class Steps(NamedTuple):
    """Steps of some tenants; the first `n` of the arrays count."""

    n: Any
    places: Any
    steps: Any
    numbers: Any
    sick: Any

    @classmethod
    def of(cls, most: int, steps: Sequence[Due]) -> "Steps":
        """Steps as arrays."""
        places, before, sick = (np.zeros(most, np.int32) for _ in range(3))
        numbers = np.zeros((most, len(Adam._fields)), np.float32)
        for i, each in enumerate(steps):
            places[i], before[i], numbers[i], sick[i] = each
        return cls(np.int32(len(steps)), places, before, numbers, sick)


class Programs:
    """The device's side of the engine.

    Args:
        split: graph, adapter and rest of a bank's model, as `Bank.split` gives them.
        room: the largest adapter.
        places: how many tenants are on the device at a time.
        sizes: the numbers of groups that a batch may have, rising.
        each: the number of rows of a group.
        lengths: the numbers of tokens that a row may have, rising.

    Attributes:
        tables: what the tenants at the places need beside their arrays.
    """

    def __init__(
        self,
        split: tuple[Any, Any, Any],
        room: Room,
        *,
        places: int,
        sizes: Sequence[int],
        each: int,
        lengths: Sequence[int],
    ) -> None:
        self._graphdef, self._adapter, self._base = split
        self._mesh = mesh_of(self._base)
        self.room, self.places, self.each = room, places, each
        self.sizes, self.lengths = tuple(sizes), tuple(lengths)
        self.tables = Tables.empty(room, places + 1)
        self._stack: Any = None
        self._compiled: dict[Any, Any] = {}

    def compile(self, compiled: Callable[[int, int], None] = lambda n, of: None) -> None:
        """Makes the arrays and compiles every program; `compiled` is called after each."""
        idle = {path: x.astype(np.float32) for path, x in self.room.idle.items()}
        whole = None if self._mesh is None else NamedSharding(self._mesh, P())
        self._stack = jax.jit(self._idle, out_shardings=whole)(idle)
        stack, tables, sizes = self._stack, self.tables, self.tables.sizes
        mine, place = self._padded(Stack({}, {}, {}, {})), np.int32(0)
        jobs: dict[Any, tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]] = {
            "step": (self._steps, (0,), (stack, sizes, Steps.of(self.places, []))),
            "write": (self._written, (0,), (stack, mine, place)),
            "read": (self._taken, (), (stack, place)),
        }
        for groups, length in itertools.product(self.sizes, self.lengths):
            batch = Batch.empty(groups, self.each, length)
            given = self._base, stack.leaves, tables, batch
            jobs[groups, length, False] = self._forward, (), given
            jobs[groups, length, True] = self._backward, (0,), (stack.grads, *given)
        # Ahead of time, so that a call of other shapes fails where it would compile anew.
        for n, (name, (run, donated, given)) in enumerate(jobs.items(), 1):
            jitted = jax.jit(run, donate_argnums=donated, out_shardings=whole)
            with on_mesh(self._mesh):  # over which the model splits the rows
                self._compiled[name] = jitted.lower(*given).compile()
            compiled(n, len(jobs))

    def run(self, batch: Batch, backward: bool) -> tuple[np.ndarray, np.ndarray]:
        """Runs a batch; returns log-probabilities and losses, and adds up gradients if asked."""
        groups, length = batch.places.size, batch.tokens.shape[1]
        program = self._compiled[groups, length, backward]
        given = self._base, self._stack.leaves, self.tables, batch
        if backward:
            grads, *found = program(self._stack.grads, *given)
            self._stack = self._stack._replace(grads=grads)
        else:
            found = program(*given)
        logprobs, losses = jax.device_get(found)
        return logprobs, losses

    def step(self, steps: Sequence[Due]) -> list[tuple[float, bool]]:
        """Makes steps; of each its gradients' norm, and whether all was finite and so done."""
        given = Steps.of(self.places, steps)
        self._stack, found = self._compiled["step"](self._stack, self.tables.sizes, given)
        norms, fine = jax.device_get(found)
        return [(float(norms[i]), bool(fine[i])) for i in range(len(steps))]

    def write(self, place: int, fit: Fit, mine: Stack) -> None:
        """Puts a tenant into a place; its arrays have its own shapes, and absent ones are zeros."""
        self.tables.write(place, fit)
        self._stack = self._compiled["write"](self._stack, self._padded(mine), np.int32(place))

    def read(self, place: int, fit: Fit) -> Stack:
        """A tenant's arrays, in its own shapes."""
        found = jax.device_get(self._compiled["read"](self._stack, np.int32(place)))
        return Stack(*map(fit.cut, found))

    def _padded(self, mine: Stack) -> Stack:
        """A tenant's arrays in the room's shapes."""
        rest = (self.room.padded(each, zeros=True) for each in mine[1:])
        return Stack(self.room.padded(mine.leaves), *rest)

    def _idle(self, idle: Leaves) -> Stack:
        """The arrays of all places, each with an idle adapter."""

        def copies(x: Array) -> Array:
            return jnp.broadcast_to(x, (self.places + 1, *x.shape))

        def zeros() -> Leaves:
            return {path: jnp.zeros_like(copies(idle[path])) for path in self.room.trained}

        leaves = {path: copies(x) for path, x in idle.items()}
        return Stack(leaves, zeros(), zeros(), zeros())

    def _forward(self, base: Any, leaves: Leaves, tables: Tables, batch: Batch) -> Any:
        mine = {path: _at(x, batch.places) for path, x in leaves.items()}
        return self._passed(base, mine, tables, batch)[1]

    def _backward(
        self, grads: Leaves, base: Any, leaves: Leaves, tables: Tables, batch: Batch
    ) -> Any:
        mine = {path: _at(x, batch.places) for path, x in leaves.items()}
        trained = {path: mine[path] for path in self.room.trained}

        def loss(trained: Leaves) -> Any:
            return self._passed(base, mine | trained, tables, batch)

        found, (logprobs, losses) = jax.grad(loss, has_aux=True)(trained)
        # Several groups may have one tenant's rows.
        added = {
            path: x.at[batch.places].add(found[path], mode="promise_in_bounds")
            for path, x in grads.items()
        }
        return added, logprobs, losses

    def _passed(self, base: Any, mine: Leaves, tables: Tables, batch: Batch) -> Any:
        """The sum of all losses; the log-probabilities and the losses of all tokens."""
        scales, lengths = tables.scales[batch.places], tables.lengths[batch.places]
        adapters = {}
        for i, (path, like) in enumerate(self.room.idle.items()):
            scale = scales[:, i].reshape(-1, *(1,) * like.ndim)
            adapters[path] = (mine[path] * scale).astype(like.dtype)
        prompts = {path: lengths[:, i] for i, path in enumerate(self.room.prompts)}
        rows = Rows(adapters, prompts, self.each)
        model = nnx.merge(self._graphdef, self._adapter, base)
        # A row without tokens gets one, since a softmax needs something to see.
        there = batch.given.counts.at[:, 0].set(True)
        hidden = model.hidden(batch.tokens, there.astype(jnp.int32), adapters=rows)
        logprobs = token_log_probs(hidden, lambda x: model.logits(x, adapters=rows), batch.targets)
        losses = token_losses(logprobs, batch.given)
        return losses.sum(), (logprobs, losses)

    def _steps(self, stack: Stack, sizes: Int[Array, "places leaves axes"], steps: Steps) -> Any:
        def one(i: Array, carry: Any) -> Any:
            stack, norms, fine = carry
            place = steps.places[i]
            mine = jax.tree.map(lambda x: _at(x, place), stack)
            after, norm, good = self._step(
                mine, sizes[place], jax.tree.map(lambda x: x[i], steps[2:])
            )
            stack = jax.tree.map(lambda x, new: x.at[place].set(new), stack, after)
            return stack, norms.at[i].set(norm), fine.at[i].set(good)

        # A loop, so that steps of few tenants neither read nor write the others' arrays.
        none = jnp.zeros(self.places), jnp.zeros(self.places, bool)
        stack, *found = jax.lax.fori_loop(0, steps.n, one, (stack, *none))
        return stack, found

    def _step(
        self,
        mine: Stack,
        sizes: Int[Array, "leaves axes"],
        due: tuple[Int[Array, ""], Float[Array, " numbers"], Int[Array, ""]],
    ) -> tuple[Stack, Array, Array]:
        """A tenant after its step, its gradients' norm, and whether the step was made."""
        step, numbers, sick = due
        adam = Adam(*numbers)
        grads = {path: _own(x, sizes[i]) for i, (path, x) in enumerate(mine.grads.items())}
        norm = optax.tree.norm(grads)
        most = jnp.where(adam.grad_clip_norm > 0, adam.grad_clip_norm, jnp.inf)
        clipped, _ = optax.clip_by_global_norm(most).update(grads, optax.EmptyState())
        leaves = {path: mine.leaves[path] for path in grads}
        scaled = optax.scale_by_adam(adam.beta1, adam.beta2, adam.eps)
        state = optax.ScaleByAdamState(step, mine.mean, mine.square)
        updates, state = scaled.update(clipped, state)
        updates = {
            path: _own(-adam.learning_rate * (x + adam.weight_decay * leaves[path]), sizes[i])
            for i, (path, x) in enumerate(updates.items())
        }
        # A sum of squares is finite only if all numbers are.
        good = (sick == 0) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        after = mine._replace(
            leaves=mine.leaves | {path: leaves[path] + x for path, x in updates.items()},
            mean=state.mu,
            square=state.nu,
        )
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, mine)
        zeros = {path: jnp.zeros_like(x) for path, x in mine.grads.items()}
        return kept._replace(grads=zeros), norm, good

    @staticmethod
    def _written(stack: Stack, whole: Stack, place: Any) -> Stack:
        return jax.tree.map(lambda x, new: x.at[place].set(new), stack, whole)

    @staticmethod
    def _taken(stack: Stack, place: Any) -> Stack:
        return jax.tree.map(lambda x: _at(x, place), stack)


def _at(x: Array, places: Any) -> Array:
    """What is at some places; they are there, so that no bounds are checked."""
    return x.at[places].get(mode="promise_in_bounds")


def _own(x: Array, sizes: Int[Array, " axes"]) -> Array:
    """Numbers with zeros where a tenant's leaf is padded, or does not train."""
    inside = sizes[0] > 0
    for axis in range(x.ndim):
        inside = inside & (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < sizes[axis])
    return jnp.where(inside, x, 0.0)
