"""Planning: the memory that a training needs on each device, before anything is allocated.

The step is compiled on abstract arrays for the devices of the mesh, and the compiler's own memory
analysis is read. On a mesh of `aj.devices`, it is that of the accelerator's compiler. A plan for
CPU devices is an estimate: 0.83 to 1.29 times what a TPU's compiler said of the six steps in
benchmarks/results/estimate.md, and further off in the working memory alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.distributed.program import Program, compile_program
from adapters_jax.distributed.sharding import Rules, shard
from adapters_jax.linen import Adapted
from adapters_jax.texts import bytes_text, html_table
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import LossFn, make_eval_step, make_train_step
from adapters_jax.trees import Tree
from adapters_jax.weights.quantized import bits_of, is_quantized

PARTS = (
    "base",
    "adapters",
    "optimizer",
    "inputs",
    "gradients",
    "activations",
    "temporaries",
    "total",
)


@dataclass(frozen=True)
class Plan:
    """Bytes that a training holds on each device, and the program of its step.

    Attributes:
        base: the frozen parameters, and the model's state that is not parameters.
        adapters: what trains, in float32 where the model has half precision.
        optimizer: the optimiser's state.
        gradients: of the trained parameters; they are freed after a step.
        activations: what the forward pass keeps for the backward pass: a step's working memory
            without that of a forward pass and without the gradients.
        temporaries: the working memory of a forward pass.
        batch: rows of a step, over all devices.
        devices: the number of devices.
        trainable_parameters: their number, each counted once over all devices.
        parameters: the number of parameters of base and adapters, likewise.
        inputs: the batch, the step's number and key, and what a device's layout of arrays adds.
        program: what the compiler says of the step; None if it refused a step that does not fit.

    Example:
        >>> found = Plan(
        ...     base=4096, adapters=512, optimizer=1024, gradients=512, activations=256,
        ...     temporaries=64, batch=8, devices=1, trainable_parameters=128, parameters=1152)
        >>> found.total
        6464
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
    inputs: int = 0
    program: Program | None = None

    @property
    def total(self) -> int:
        """The sum of the bytes on a device, which is the compiler's own."""
        held = self.base + self.adapters + self.optimizer + self.inputs
        return held + self.gradients + self.activations + self.temporaries

    def _repr_html_(self) -> str:
        rows = [[name, bytes_text(getattr(self, name))] for name in PARTS]
        rows.append(["trainable parameters", f"{self.trainable_parameters:,}"])
        devices = f"{self.devices} device{'s' * (self.devices > 1)}"
        return html_table([f"{self.batch} rows a step", f"on each of {devices}"], rows)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the total, for JSON."""
        return {**dataclasses.asdict(self), "total": self.total}


def abstract_state(
    model: Adapted | nnx.Module,
    params: Tree = None,
    *,
    collections: Mapping[str, Tree] | None = None,
    tx: optax.GradientTransformation,
) -> TrainState:
    """The abstract state of a training, as shapes.

    Args:
        model: adapted; an NNX model may be abstract (`nnx.eval_shape`).
        params: linen only: its parameters, arrays or abstract.
        collections: linen only: its other collections, arrays or abstract.
        tx: the optimiser.

    Returns:
        What `TrainState.create` returns, with shapes instead of arrays.

    Raises:
        TypeError, RecipeError, UserError: as for `TrainState.create`.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.eval_shape(lambda: aj.adapt(
        ...     nnx.Linear(8, 8, rngs=nnx.Rngs(0)), aj.LoRA("**", rank=2), rngs=nnx.Rngs(1)))
        >>> abstract_state(model, tx=optax.sgd(0.1)).adapters["lora"]["a"].shape
        (8, 2)
    """
    # An NNX model holds its arrays; split, they go through `eval_shape` as linen's parameters do.
    graphdef, held = nnx.split(model) if isinstance(model, nnx.Module) else (None, None)

    def create(held: Any, params: Tree, collections: Any) -> TrainState:
        whole = model if graphdef is None else nnx.merge(graphdef, held)
        key = jax.random.key(0)
        return TrainState.create(whole, params, collections=collections, tx=tx, key=key)

    return jax.eval_shape(create, held, params, collections)


def plan(
    state: TrainState,
    loss_fn: LossFn,
    batch: Tree,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    accumulate: int = 1,
) -> Plan:
    """Plans the memory that every step of a training holds on each device.

    Args:
        state: abstract, as `abstract_state` gives it, or concrete.
        loss_fn: as for `make_train_step`.
        batch: a batch as shapes, or arrays.
        mesh: of the devices: real ones, those of `aj.devices`, or CPU devices for an estimate, as
            many as the mesh has: call `jax.config.update("jax_num_cpu_devices", 64)` before
            anything else. XLA has no half precision on a CPU, so there a model of float32 gives the
            better estimate.
        rules: as for `layout`.
        accumulate: as for `make_train_step`.

    Returns:
        The bytes of each part, whether or not they fit a device; what the compiler says of costs
        and of exchanged bytes is in its `program`.

    Raises:
        ShardingError: a rule or the batch does not fit the mesh.
        TargetError: a rule matches no parameter.
        UserError, MismatchError: as for `make_train_step`.

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
    # A device holds the frozen parameters even where the step does not use them.
    whole = jax.jit(step.jitted.__wrapped__, donate_argnums=0, keep_unused=True)  # type: ignore[attr-defined]
    # As `step` calls it: the base is not donated.
    split = dataclasses.replace(state, base=None)
    found = compile_program(whole.lower(split, state.base, batch))
    program = found if isinstance(found, Program) else None
    adapters = jax.tree.leaves(state.adapters)
    held = {
        "base": sum(map(_held, jax.tree.leaves((state.base, state.other)))),
        "adapters": sum(map(_held, adapters)),
        "optimizer": sum(map(_held, jax.tree.leaves(state.opt_state))),
    }
    inputs = program.arguments - sum(held.values()) if program else 0
    working = max(0, found.total - inputs - sum(held.values()))
    # The compiler does not say what is a gradient; they are as large as the adapters, and all of
    # them are there at the end of the backward pass.
    gradients = min(held["adapters"], working)
    once = _forward(state, loss_fn, batch, accumulate) if program else 0
    temporaries = min(once, working - gradients)
    return Plan(
        **held,
        inputs=inputs,
        gradients=gradients,
        activations=working - gradients - temporaries,
        temporaries=temporaries,
        batch=max(x.shape[0] for x in jax.tree.leaves(batch) if x.shape),
        devices=1 if mesh is None else mesh.size,
        trainable_parameters=sum(x.size for x in adapters),
        # Each quantised weight is one leaf.
        parameters=sum(
            math.prod(x.shape)
            for x in [*adapters, *jax.tree.leaves(state.base, is_leaf=is_quantized)]
        ),
        program=program,
    )


def _forward(state: TrainState, loss_fn: LossFn, batch: Tree, accumulate: int) -> int:
    """The working memory of a forward pass; with accumulation, of one part of the batch."""
    forward = make_eval_step(lambda subject, batch: loss_fn(subject, batch, jax.random.key(0)))
    part = jax.tree.map(lambda x: _part(x, accumulate), batch)
    alone = compile_program(forward.jitted.lower(state, part))  # type: ignore[attr-defined]
    # Arguments are counted with the step.
    return max(0, alone.total - alone.arguments) if isinstance(alone, Program) else 0


def _shape(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _part(x: Any, parts: int) -> Any:
    """One of the parts of an abstract batch, with the sharding of the whole."""
    if not x.shape or parts == 1:
        return x
    return jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _held(x: Any) -> int:
    """The bytes of an abstract array on one device."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * bits_of(x.dtype) // 8
