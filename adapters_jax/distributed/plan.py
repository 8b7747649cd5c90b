"""Planning: what a training will hold on each device, told before anything is allocated.

The step is compiled on abstract arrays, for as many devices as the mesh has, and XLA's own memory
analysis of the compiled program is read. What XLA plans for the CPU's backend is near to what it
plans for others, and not the same: leave some room.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from adapters_jax.audit import bytes_text
from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.distributed.sharding import Rules, shard
from adapters_jax.linen import Adapted
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import LossFn, make_eval_step, make_train_step
from adapters_jax.trees import Tree
from adapters_jax.weights.quantized import bits_of, is_quantized


@dataclass(frozen=True)
class Plan:
    """Bytes that a training holds on each device.

    Attributes:
        base: the frozen parameters.
        adapters: what trains, in float32 where the model has half precision.
        optimizer: the optimiser's state.
        gradients: of what trains; they are gone after a step.
        activations: what the forward pass keeps for the backward pass: what a step's working memory
            has beyond a forward pass's and the gradients.
        temporaries: the working memory of a forward pass.
        batch: rows a step, over all devices.
        devices: how many.
        trainable_parameters: over all devices, each once.
        parameters: of base and adapters, likewise.
    """

    base: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    temporaries: int
    batch: int
    devices: int
    trainable_parameters: int
    parameters: int

    @property
    def total(self) -> int:
        """The bytes of a device."""
        parts = (self.base, self.adapters, self.optimizer)
        return sum(parts) + self.gradients + self.activations + self.temporaries

    def to_dict(self) -> dict[str, int]:
        """The fields, and the total, for JSON."""
        return {**dataclasses.asdict(self), "total": self.total}

    def rows(self) -> list[tuple[str, str]]:
        """What is held, and how much of it, for a table."""
        names = ("base", "adapters", "optimizer", "gradients", "activations", "temporaries")
        return [(n, bytes_text(getattr(self, n))) for n in names] + [
            ("total", bytes_text(self.total))
        ]


def abstract_state(
    model: Adapted | nnx.Module, params: Tree = None, *, tx: optax.GradientTransformation
) -> TrainState:
    """A training's state as shapes.

    Args:
        model: adapted; an NNX model may be abstract (`nnx.eval_shape`).
        params: linen only: its parameters, arrays or abstract.
        tx: the optimiser.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.eval_shape(lambda: aj.adapt(
        ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2), rngs=nnx.Rngs(1)))
        >>> abstract_state(model, tx=optax.sgd(0.1)).adapters["lora"]["a"].shape
        (8, 2)
    """
    key = jax.random.key(0)
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)

        def create(state: Any) -> TrainState:
            return TrainState.create(nnx.merge(graphdef, state), tx=tx, key=key)

        return jax.eval_shape(create, state)
    return jax.eval_shape(lambda p: TrainState.create(model, p, tx=tx, key=key), params)


def plan(
    state: TrainState,
    loss_fn: LossFn,
    batch: Tree,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    accumulate: int = 1,
) -> Plan:
    """What every step of a training holds on each device.

    Args:
        state: abstract, as `abstract_state` gives it, or a real one.
        loss_fn: as for `make_train_step`.
        batch: a batch as shapes, or arrays.
        mesh: of the devices; there have to be that many, and CPU devices without memory of their
            own do: `jax.config.update("jax_num_cpu_devices", 64)`, before anything else.
        rules: as for `layout`.
        accumulate: as for `make_train_step`.

    Raises:
        ShardingError: a rule or the batch does not fit the mesh.

    Example:
        >>> import adapters_jax as aj, jax.numpy as jnp
        >>> model = nnx.eval_shape(lambda: aj.adapt(
        ...     nnx.Linear(512, 512, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2), rngs=nnx.Rngs(1)))
        >>> found = plan(
        ...     abstract_state(model, tx=optax.adam(0.1)),
        ...     lambda model, batch, key: jnp.mean(model(batch) ** 2),
        ...     jax.ShapeDtypeStruct((4, 512), jnp.float32))
        >>> found.base, found.adapters, found.gradients
        (1050624, 8192, 8192)
    """
    state, batch = jax.tree.map(_shape, (state, batch))
    if mesh is not None:
        state, batch = shard(state, mesh, rules), shard_batch(batch, mesh)
    step = make_train_step(loss_fn, accumulate=accumulate)
    split = dataclasses.replace(state, base=None)
    whole = step.jitted.lower(split, state.base, batch).compile()  # type: ignore[attr-defined]
    forward = make_eval_step(lambda subject, batch: loss_fn(subject, batch, jax.random.key(0)))
    # As a step takes its batch: one part after the other.
    part = jax.tree.map(lambda x: _part(x, accumulate), batch)
    alone = forward.lower(state, part).compile()  # type: ignore[attr-defined]
    working, once = (c.memory_analysis().temp_size_in_bytes for c in (whole, alone))
    adapters = jax.tree.leaves(state.adapters)
    gradients = sum(map(_held, adapters))
    return Plan(
        base=sum(map(_held, jax.tree.leaves((state.base, state.other)))),
        adapters=gradients,
        optimizer=sum(map(_held, jax.tree.leaves(state.opt_state))),
        gradients=gradients,
        activations=max(0, working - once - gradients),
        temporaries=once,
        batch=max(x.shape[0] for x in jax.tree.leaves(batch) if x.shape),
        devices=1 if mesh is None else mesh.size,
        trainable_parameters=sum(x.size for x in adapters),
        parameters=sum(math.prod(x.shape) for x in [*adapters, *_parameters(state.base)]),
    )


def largest_batch(
    planned: Callable[[int], Plan], memory: float, unit: int = 1, most: int = 2**20
) -> Plan | None:
    """The plan of the largest batch that fits a device.

    What a step holds grows with its rows along a line, nearly; the line through what fits and what
    does not says what to plan next, until they are neighbours.

    Args:
        planned: the plan of a batch of so many rows.
        memory: of a device, in bytes.
        unit: rows are a multiple of it: over how many parts a batch is split.
        most: rows at most.

    Returns:
        The plan; None where not even `unit` rows fit.
    """
    fits, above = planned(unit), None
    if fits.total > memory:
        return None
    tried = planned(2 * unit)
    slope = (tried.total - fits.total) / unit
    while True:
        fits, above = (tried, above) if tried.total <= memory else (fits, tried)
        end = most + unit if above is None else above.batch
        if above is not None:
            slope = (above.total - fits.total) / (above.batch - fits.batch)
        rows = fits.batch + (memory - fits.total) / max(slope, 1e-9)
        low, high = fits.batch + unit, end - unit
        if above is None:
            high = min(high, 16 * fits.batch)  # one step at a time: the line is of small batches
        if low > high:
            return fits
        tried = planned(int(min(max(rows, low), high)) // unit * unit)


def _shape(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _part(x: Any, parts: int) -> Any:
    """An abstract batch's part, laid out like the whole."""
    if not x.shape or parts == 1:
        return x
    return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _parameters(base: Tree) -> list[Any]:
    """The leaves of a base; a quantised one counts as the weight that it is."""
    return jax.tree.leaves(base, is_leaf=is_quantized)


def _held(x: Any) -> int:
    """Bytes that a device has of an abstract array."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * bits_of(x.dtype) // 8
