"""`adapters-jax plan`: what a training will hold on each device, before there is any device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from adapters_jax.app.console import Console
from adapters_jax.app.options.method import MethodOptions
from adapters_jax.app.shapes import adapted_shape, find_shape
from adapters_jax.audit import bytes_text
from adapters_jax.checks import check_number, check_size
from adapters_jax.distributed.mesh import ShardingError, batch_parts, make_mesh, mesh_sizes
from adapters_jax.distributed.plan import Plan, abstract_state, largest_batch, plan

FULL = MethodOptions("full")
BY_NUMBER = ("llama-adapter", "prefix-tuning", "last-layers")  # methods of some layers, by number
ROWS = ("base", "adapters", "optimizer", "gradients", "activations", "temporaries", "total")


@dataclass(frozen=True)
class PlanTraining:
    """Plans what each device holds in training a recipe, and in full fine-tuning; needs no weights.

    The step is compiled for as many devices as the mesh has, which this machine only pretends to
    have, and XLA's own memory analysis is read. XLA has no half precision on a CPU: there the
    working memory is that of the float32 program, halved. What trains, its gradients and AdamW's
    moments are float32. Layers are scanned, where a recipe does not number them, and recomputed in
    the backward pass.

    Args:
        model: a known shape such as llama-7b, a directory with config.json, a GGUF file, or an id
            on the Hugging Face Hub.
        method: the recipe.
        mesh: devices, as fsdp=8,model=8; by default one.
        batch_size: sequences a step, over all devices.
        length: tokens a sequence.
        dtype: of the base and its arithmetic.
        remat: recompute each layer in the backward pass instead of storing it.
        memory: of a device, in GB: also finds the largest batch that fits.
        full: also plan full fine-tuning.
        json: print JSON.
    """

    examples: ClassVar[str] = """\
  adapters-jax plan --model bert-large --method houlsby --batch-size 32 --length 128
  adapters-jax plan --model llama-7b --method lora --memory 80
  adapters-jax plan --model gpt3-175b --method lora --rank 4 --mesh fsdp=8,model=8"""

    model: str
    method: MethodOptions = field(default_factory=lambda: MethodOptions("lora"))
    mesh: str = "data=1"
    batch_size: int = 8
    length: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = True
    memory: float | None = None
    full: bool = True
    json: bool = False

    def prepare(self, output: Console) -> Callable[[], None]:
        """Checks the flags, and takes as many devices as the mesh has.

        Raises:
            ValueError: a model, a recipe, a mesh or a batch that cannot be used.
            AssetError: the pinned model could not be fetched.
        """
        check_size("the plan", "--length", self.length)
        check_size("the plan", "--batch-size", self.batch_size)
        if self.memory is not None:
            check_number("the plan", "--memory", self.memory)
        mesh = _pretended(self.mesh, self.batch_size)
        methods = [self.method, *([FULL] if self.full and self.method != FULL else [])]
        shapes = [self._state(method) for method in methods]

        def work() -> None:
            plans = {
                method.title: self._plans(method, shape, mesh, output)
                for method, shape in zip(methods, shapes, strict=True)
            }
            self._show(plans, mesh, output)

        return work

    def _state(self, method: MethodOptions) -> tuple[Any, Any, Any]:
        """The model, its parameters in linen, and a training's state; all of them shapes."""
        scan = method.recipe is None and method.method not in BY_NUMBER
        options = {"scan": scan, "remat": self.remat}
        model, params = adapted_shape(self.model, method, **options)
        return model, params, abstract_state(model, params, tx=optax.adamw(1e-4))

    def _plans(
        self, method: MethodOptions, shape: Any, mesh: Mesh, output: Console
    ) -> tuple[Plan, Plan | None]:
        """The plan of the batch, and of the largest that fits."""
        loss = _loss_of(shape[0], find_shape(self.model)[0].kind)

        @functools.cache
        def of(batch: int) -> Plan:
            output.say(f"compiling {method.title} of {self.model} for {batch} x {self.length}")
            ids = jax.ShapeDtypeStruct((batch, self.length), jnp.int32)
            return self._stored(plan(shape[2], loss, ids, mesh))

        asked = of(self.batch_size)
        if self.memory is None:
            return asked, None
        return asked, largest_batch(of, self.memory * 1e9, unit=batch_parts(mesh.shape))

    def _stored(self, found: Plan) -> Plan:
        """A plan of a float32 program as one of a base in its dtype."""
        if self.dtype == "float32":
            return found
        half = {name: getattr(found, name) // 2 for name in ("base", "activations", "temporaries")}
        return replace(found, **half)

    def _show(
        self, plans: dict[str, tuple[Plan, Plan | None]], mesh: Mesh, output: Console
    ) -> None:
        devices = f"{mesh.size} device{'s' * (mesh.size > 1)}"
        what = f"{self.model}, {self.batch_size} x {self.length} tokens a step, {self.dtype}"
        output.say(f"{what}, AdamW, {self.mesh}: bytes on each of {devices}")
        rows = [[row, *(bytes_text(getattr(p, row)) for p, _ in plans.values())] for row in ROWS]
        rows.append(
            ["trainable parameters", *(f"{p.trainable_parameters:,}" for p, _ in plans.values())]
        )
        if self.memory is not None:
            fits = [f"{big.batch:,}" if big else "none" for _, big in plans.values()]
            rows.append([f"largest batch in {self.memory:g} GB", *fits])
        output.table(["", *plans], rows)
        output.result(
            {
                "model": self.model,
                "mesh": dict(mesh.shape),
                "length": self.length,
                "dtype": self.dtype,
                "plans": {name: asked.to_dict() for name, (asked, _) in plans.items()},
                "largest": {
                    name: None if big is None else big.to_dict()
                    for name, (_, big) in plans.items()
                    if self.memory is not None
                },
            }
        )


def _pretended(text: str, batch_size: int) -> Mesh:
    """A mesh of CPU devices, as many as it says, which a batch splits over; they hold nothing."""
    sizes = mesh_sizes(text)
    if min(sizes.values()) < 1:
        raise ShardingError(f"--mesh {text}: a plan wants every number, and none below 1")
    parts = batch_parts(sizes)
    if batch_size % parts:
        raise ShardingError(
            f"--batch-size {batch_size} does not split over --mesh {text}: write a multiple of "
            f"{parts}"
        )
    count = math.prod(sizes.values())
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # jax has its devices already
        if len(jax.devices()) < count:
            raise ShardingError(f"--mesh {text}: {error}") from error
    return make_mesh(sizes, jax.devices()[:count])


def _loss_of(model: Any, kind: str) -> Callable[[Any, Any, Any], Any]:
    """Next tokens of a decoder; of an encoder, whose heads are small, its hidden states."""

    def loss(subject: Any, ids: Any, key: Any) -> Any:
        if isinstance(model, nnx.Module):
            logits = subject(ids)
        else:
            logits = model.apply({"params": subject}, ids)
        if kind == "encoder":
            return jnp.mean(jnp.square(logits.astype(jnp.float32)))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), ids[:, 1:]
        ).mean()

    return loss
