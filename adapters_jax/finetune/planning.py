"""Plans of one method on one model: of a batch, of the largest batch that fits, and the costs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from adapters_jax.distributed.mesh import batch_parts
from adapters_jax.distributed.plan import Plan, abstract_state, plan
from adapters_jax.distributed.program import Program
from adapters_jax.finetune.options.method import BY_NUMBER, MethodOptions
from adapters_jax.finetune.shapes import adapted_shape, find_shape
from adapters_jax.finetune.tasks.decoder import chunk_of
from adapters_jax.methods.invocation import from_invocation
from adapters_jax.training.losses import cross_entropy
from adapters_jax.training.state import TrainState
from adapters_jax.transforms.prompting import virtual_tokens


@dataclass(frozen=True)
class Planned:
    """The plans of a method, and the costs of its step: all of them None for a CPU."""

    asked: Plan
    largest: Plan | None
    costs: dict[str, float | None]


@dataclass(frozen=True)
class Job:
    """The plans of one method.

    Args:
        model: as in `adapted_shape`.
        rows: sequences in a step.
        length: tokens in a sequence.
        dtype: dtype of the base model and its arithmetic.
        quantize: the quantised dtype of the base; None does not quantise.
        remat: whether layers are recomputed in the backward pass.
        attention: "auto", "dense" or "flash"; see `models.parts.attention.attention_function`.
        accelerator: whether the devices are those of `aj.devices`; a CPU compiles for float32.
        limit: the bytes of a device, for the largest batch that fits; None looks for none.
    """

    model: str
    method: MethodOptions
    mesh: Mesh
    rows: int
    length: int
    dtype: str
    quantize: str | None
    remat: bool
    attention: str
    accelerator: bool
    limit: float | None
    say: Callable[[str], None]

    @functools.cached_property
    def scans(self) -> bool:
        """Whether the layers are scanned: they are alike, and the recipe has no numbers of them.

        Stacks of different numbers of layers are not: `costs` knows what one layer of all adds.
        """
        family, config = find_shape(self.model)
        alike = family.scans and len(family.layers(config)) == 1
        return alike and self.method.recipe is None and self.method.method not in BY_NUMBER

    @functools.cached_property
    def state(self) -> tuple[Any, TrainState]:
        """The adapted model without arrays, and the abstract state of its training."""
        return self._state(None)

    def _state(self, layers: int | None) -> tuple[Any, TrainState]:
        settings: dict[str, Any] = {"scan": self.scans and not layers, "remat": self.remat}
        settings["attention"] = self.attention
        if self.accelerator:
            dtype = jnp.dtype(self.dtype)
            settings |= {"dtype": dtype, "param_dtype": dtype}
        model, params = adapted_shape(self.model, self.method, self.quantize, layers, **settings)
        return model, abstract_state(model, params, tx=optax.adamw(1e-4))

    def run(self) -> Planned:
        """The plan of the given batch, and of the largest batch that fits."""
        planned = functools.cache(self.plan)
        asked = planned(self.rows)
        costs = self.costs(asked) if self.accelerator else {}
        unit = batch_parts(self.mesh.shape)
        largest = None if self.limit is None else largest_batch(planned, self.limit, unit=unit)
        return Planned(asked, largest, costs)

    def plan(self, batch: int, layers: int | None = None, chunk: int | None = None) -> Plan:
        """Compiles a step.

        Args:
            batch: sequences in it.
            layers: the number of layers, which are then unrolled; None has all.
            chunk: positions whose logits are held at once; None as in `adapters-jax finetune`.
        """
        few = f", {layers} layer{'s' * (layers > 1)} of it," if layers else ""
        self.say(f"compiling {self.method.title} of {self.model}{few} for {batch} x {self.length}")
        family, config = find_shape(self.model)
        model, state = self._state(layers) if layers else self.state
        inputs = config.inputs(batch, self.length + virtual_tokens(state.recipe))
        chunk = chunk or chunk_of(state.recipe, batch, self.length, self.mesh)
        found = plan(state, _loss_of(model, family.kind, chunk), inputs, self.mesh)
        if self.accelerator or self.dtype == "float32":
            return found
        # XLA's CPU compiler computes bfloat16 in float32, so its figures are those of float32.
        half = {name: getattr(found, name) // 2 for name in ("base", "activations", "temporaries")}
        return replace(found, program=None, **half)

    def costs(self, asked: Plan) -> dict[str, float | None]:
        """What the compiler says of a step's costs.

        It counts the body of a loop once. So these are the costs with all logits at once, and
        those of scanned layers are computed from one and two layers that are not scanned.
        """
        if asked.program is None:
            return {}
        stated = _stated(asked.program)
        if not asked.program.loops or not any(stated.values()):
            return stated
        counts = (1, 2) if self.scans else (None,)
        plans = (self.plan(asked.batch, layers, self.length) for layers in counts)
        one, *more_layers = ((x.program and _stated(x.program)) or {} for x in plans)
        if not more_layers:
            return one
        (two,) = more_layers
        more = find_shape(self.model)[1].num_layers - 1
        return {name: _along(one.get(name), two.get(name), more) for name in stated}


def largest_batch(
    planned: Callable[[int], Plan], memory: float, unit: int = 1, most: int = 2**20
) -> Plan | None:
    """Finds the largest batch that fits a device.

    A step's memory grows almost linearly with its rows. The line through a batch that fits and one
    that does not gives the next batch to plan, until the two are neighbours.

    Args:
        planned: gives the plan for a number of rows.
        memory: of a device, in bytes.
        unit: the rows are a multiple of it: the number of parts that a batch is split into.
        most: the largest number of rows to plan.

    Returns:
        The plan of the largest batch; None where not even `unit` rows fit.
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
        # A slope of 0 would divide by it: small batches may be padded to one size.
        rows = fits.batch + (memory - fits.total) / max(slope, 1e-9)
        low, high = fits.batch + unit, end - unit
        if above is None:
            high = min(high, 16 * fits.batch)  # the line of small batches misleads
        if low > high:
            return fits
        tried = planned(int(min(max(rows, low), high)) // unit * unit)


def _stated(program: Program) -> dict[str, float | None]:
    return {name: getattr(program, name) for name in ("flops", "bytes_accessed", "seconds")}


def _along(one: float | None, two: float | None, more: int) -> float | None:
    """The cost of `more` layers beside the first, each as much as the second; None if unknown."""
    return None if one is None or two is None else one + more * (two - one)


def _loss_of(model: Any, kind: str, chunk: int) -> Callable[[Any, Any, Any], Any]:
    """The loss of the next tokens, or a loss of an encoder's hidden states.

    An encoder-decoder writes what it reads, so its logits are of the tokens themselves.
    """

    def loss(subject: Any, ids: Any, key: Any) -> Any:
        if kind == "decoder":
            acts = from_invocation(vars(subject).get("adapter_recipe", ()), ids)
            hidden, labels = subject.hidden(ids, **acts)[:, :-1], ids[:, 1:]
            return cross_entropy(hidden, subject.logits, labels, chunk=chunk)
        if kind == "encoder-decoder":
            hidden = subject.hidden(ids, None, subject.shifted(ids))
            return cross_entropy(hidden, subject.logits, ids, chunk=chunk)
        if not isinstance(model, nnx.Module):
            subject = partial(model.apply, {"params": subject})
        return jnp.mean(jnp.square(subject(ids).astype(jnp.float32)))

    return loss
