"""`adapters-jax plan`: computes the memory of a training on each device, without the devices."""

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
BY_NUMBER = (
    "llama-adapter",
    "prefix-tuning",
    "last-layers",
)  # methods that address layers by number
ROWS = ("base", "adapters", "optimizer", "gradients", "activations", "temporaries", "total")


@dataclass(frozen=True)
class PlanTraining:
    """Computes the memory of each device in training a recipe and in full fine-tuning.

    No weights are needed. The step is compiled for the devices of the mesh, which are simulated on
    the CPU, and XLA's memory analysis of it is read. XLA has no half precision on a CPU, so with
    bfloat16 the working memory is half that of the float32 program. Trained parameters, their
    gradients and AdamW's moments are float32. Layers are scanned unless they differ or the recipe
    numbers them, and recomputed in the backward pass.

    Args:
        model: a known shape such as llama-7b, a directory with config.json, a GGUF file, or an id
            on the Hugging Face Hub.
        method: the recipe.
        mesh: devices, as fsdp=8,model=8; by default one.
        batch_size: sequences in a step, over all devices.
        length: tokens in a sequence.
        dtype: dtype of the base model and its arithmetic.
        remat: recompute each layer in the backward pass instead of storing it.
        memory: memory of a device in GB; also finds the largest batch that fits.
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

    def prepare(self, console: Console) -> Callable[[], None]:
        """Checks the flags, and makes the mesh.

        Raises:
            UserError: the model or the recipe cannot be used.
            ShardingError: the mesh is not valid, or the batch does not split over it.
        """
        check_size("the plan", "--length", self.length)
        check_size("the plan", "--batch-size", self.batch_size)
        if self.memory is not None:
            check_number("the plan", "--memory", self.memory)
        mesh = _simulated(self.mesh, self.batch_size)
        methods = [self.method, *([FULL] if self.full and self.method != FULL else [])]
        shapes = [self._state(method) for method in methods]

        def work() -> None:
            plans = {
                method.title: self._plans(method, shape, mesh, console)
                for method, shape in zip(methods, shapes, strict=True)
            }
            self._show(plans, mesh, console)

        return work

    def _state(self, method: MethodOptions) -> tuple[Any, Any, Any]:
        """The shapes of the model, of its parameters in linen, and of the training state."""
        alike = find_shape(self.model)[0].scans
        scan = alike and method.recipe is None and method.method not in BY_NUMBER
        options = {"scan": scan, "remat": self.remat}
        model, params = adapted_shape(self.model, method, **options)
        return model, params, abstract_state(model, params, tx=optax.adamw(1e-4))

    def _plans(
        self, method: MethodOptions, shape: Any, mesh: Mesh, console: Console
    ) -> tuple[Plan, Plan | None]:
        """The plan of the given batch, and of the largest batch that fits."""
        family, config = find_shape(self.model)
        loss = _loss_of(shape[0], family.kind)

        @functools.cache
        def of(batch: int) -> Plan:
            console.say(f"compiling {method.title} of {self.model} for {batch} x {self.length}")
            inputs = family.inputs(config, batch, self.length)
            return self._stored(plan(shape[2], loss, inputs, mesh))

        asked = of(self.batch_size)
        if self.memory is None:
            return asked, None
        return asked, largest_batch(of, self.memory * 1e9, unit=batch_parts(mesh.shape))

    def _stored(self, found: Plan) -> Plan:
        """Converts the plan of a float32 program to the dtype of the base model."""
        if self.dtype == "float32":
            return found
        half = {name: getattr(found, name) // 2 for name in ("base", "activations", "temporaries")}
        return replace(found, **half)

    def _show(
        self, plans: dict[str, tuple[Plan, Plan | None]], mesh: Mesh, console: Console
    ) -> None:
        devices = f"{mesh.size} device{'s' * (mesh.size > 1)}"
        what = f"{self.model}, {self.batch_size} x {self.length} tokens a step, {self.dtype}"
        console.say(f"{what}, AdamW, {self.mesh}: bytes on each of {devices}")
        rows = [[row, *(bytes_text(getattr(p, row)) for p, _ in plans.values())] for row in ROWS]
        rows.append(
            ["trainable parameters", *(f"{p.trainable_parameters:,}" for p, _ in plans.values())]
        )
        if self.memory is not None:
            fits = [f"{big.batch:,}" if big else "none" for _, big in plans.values()]
            rows.append([f"largest batch in {self.memory:g} GB", *fits])
        console.table(["", *plans], rows)
        console.result(
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


def _simulated(text: str, batch_size: int) -> Mesh:
    """Makes a mesh of simulated CPU devices; raises ShardingError if a batch does not fit it."""
    sizes = mesh_sizes(text)
    if min(sizes.values()) < 1:
        raise ShardingError(f"--mesh {text}: expected a number of at least 1 for each axis")
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
    """The loss of the next tokens, or a loss of an encoder's hidden states.

    An encoder-decoder writes what it reads, so its logits are of the tokens themselves.
    """
    first = {"decoder": 1, "encoder-decoder": 0}.get(kind)

    def loss(subject: Any, ids: Any, key: Any) -> Any:
        if isinstance(model, nnx.Module):
            logits = subject(ids)
        else:
            logits = model.apply({"params": subject}, ids)
        if first is None:
            return jnp.mean(jnp.square(logits.astype(jnp.float32)))
        labels = ids[:, first:]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, : labels.shape[1]].astype(jnp.float32), labels
        ).mean()

    return loss
