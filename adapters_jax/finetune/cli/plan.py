"""`adapters-jax audit` and `plan`: parameters and memory of models, without their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.finetune.console import Console, duration
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.method import MethodOptions

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from adapters_jax.finetune.planning import Job, Planned


FULL = MethodOptions("full")
OFF = (
    "an estimate by XLA for the CPU, 0.83 to 1.29 times what a TPU's compiler said of six steps; "
    "--device compiles for an accelerator instead"
)


@dataclass(frozen=True)
class PlanTraining(Command):
    """Computes the memory of each device in training a recipe and in full fine-tuning.

    No weights are needed. With --device, the step is compiled by the compiler of a TPU or GPU,
    which need not be there, and the plan is what that compiler says. Without, it is compiled for
    CPU devices, and XLA's memory analysis of it is an estimate: XLA has no half precision on a CPU,
    so with bfloat16 the working memory is half that of the float32 program. Trained parameters,
    their gradients and AdamW's moments are float32. Layers are scanned unless they differ or the
    recipe numbers them, and recomputed in the backward pass.

    Args:
        model: a known shape such as llama-7b, a directory with config.json, a GGUF file, or an id
            on the Hugging Face Hub.
        method: the recipe.
        device: devices to compile for, such as v5e:2x4 or h100:8; see aj.devices. Needs the extra
            tpu or cuda.
        mesh: devices, as fsdp=8,model=8; by default fsdp over those of --device, else one.
        batch_size: sequences in a step, over all devices; by default 8, or one a device.
        length: tokens in a sequence.
        dtype: dtype of the base model and its arithmetic.
        quantize: keep the frozen weights in 8 or 4 bits; needs --device.
        remat: recompute each layer in the backward pass instead of storing it.
        attention: dense, by a kernel of the device (flash), or whichever is better (auto).
        memory: memory of a device in GB, by default that of --device; also finds the largest batch
            that fits.
        largest: find the largest batch that fits; it compiles several steps.
        full: also plan full fine-tuning.
    """

    examples = """\
  adapters-jax plan --model bert-large --method houlsby --batch-size 32 \\
    --length 128
  adapters-jax plan --model llama-7b --method lora --memory 80
  adapters-jax plan --model llama-7b --method lora --device v5p:2x2x1 \\
    --no-full --no-largest
  adapters-jax plan --model gpt3-175b --method lora --rank 4 \\
    --mesh fsdp=8,model=8"""

    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Model": ("model", "dtype", "quantize", "attention"),
        "Step": ("batch_size", "length", "remat"),
        "Devices": ("device", "mesh", "memory"),
        "Plans": ("largest", "full"),
    }
    model: str
    method: MethodOptions = field(default_factory=lambda: MethodOptions("lora"))
    device: str | None = None
    mesh: str | None = None
    batch_size: int | None = None
    length: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Literal["int8", "int4", "nf4"] | None = None
    remat: bool = True
    attention: Literal["auto", "dense", "flash"] = "auto"
    memory: float | None = None
    largest: bool = True
    full: bool = True

    def prepare(self, console: Console) -> Callable[[], None]:
        """Checks the flags, and makes the mesh."""
        check_size("the plan", "--length", self.length)
        if self.batch_size is not None:
            check_size("the plan", "--batch-size", self.batch_size)
        if self.memory is not None:
            check_number("the plan", "--memory", self.memory)
        if self.attention == "flash" and self.device is None:
            raise UserError(
                "--attention flash: the plan for CPU devices has no kernels; add a device, such as "
                "--device v5e:1x1"
            )
        if self.quantize and self.device is None:
            raise UserError(
                f"--quantize {self.quantize}: the plan for CPU devices is one of floats; add a "
                "device, such as --device v5e:1x1"
            )
        from adapters_jax.finetune.shapes import on_shape

        mesh = self._mesh()
        method = on_shape(self.model, self.method)
        methods = [method, *([FULL] if self.full and method != FULL else [])]
        jobs = [self._job(method, mesh, console) for method in methods]
        for job in jobs:
            _ = job.state  # raises where model and recipe do not fit

        def work() -> None:
            self._show({job.method.title: job.run() for job in jobs}, mesh, console)

        return work

    @property
    def limit(self) -> float | None:
        """The bytes of a device; None if they are not known."""
        from adapters_jax.distributed.devices import devices, memory_of

        if self.memory is not None:
            return self.memory * 1e9
        return memory_of(devices(self.device)[0]) if self.device else None

    def rows(self, sizes: Mapping[str, int]) -> int:
        """The sequences of a step, on a mesh of these sizes."""
        from adapters_jax.distributed.mesh import batch_parts

        by_default = max(8, batch_parts(sizes)) if self.device else 8
        return self.batch_size or by_default

    def _mesh(self) -> Mesh:
        """The mesh of the device, or of simulated CPU devices; the batch splits over it."""
        import jax

        from adapters_jax.distributed.devices import devices
        from adapters_jax.distributed.mesh import make_mesh, mesh_sizes

        # A plan needs no accelerator, also where there is one: its memory may be in use.
        jax.config.update("jax_platforms", "cpu")
        if self.device is None:
            return _simulated(self._checked(mesh_sizes(self.mesh or "data=1")))
        mesh = make_mesh(self.mesh or "fsdp=-1", devices(self.device))
        self._checked(mesh.shape)
        return mesh

    def _checked(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes of a mesh; raises ShardingError where they are not valid for the batch."""
        from adapters_jax.distributed.mesh import ShardingError, batch_parts, check_axes

        check_axes(sizes)
        if min(sizes.values()) < 1:
            raise ShardingError(
                f"--mesh {_text(sizes)}: expected a number of at least 1 for each axis"
            )
        parts, rows = batch_parts(sizes), self.rows(sizes)
        if rows % parts:
            raise ShardingError(
                f"--batch-size {rows} does not split over --mesh {_text(sizes)}: write a multiple "
                f"of {parts}"
            )
        return sizes

    def _job(self, method: MethodOptions, mesh: Mesh, console: Console) -> Job:
        from adapters_jax.finetune.planning import Job

        names = ("model", "length", "dtype", "quantize", "remat", "attention")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        shared |= {"accelerator": self.device is not None, "say": console.say}
        limit = self.limit if self.largest else None
        return Job(method=method, mesh=mesh, rows=self.rows(mesh.shape), limit=limit, **shared)

    def _show(self, results: dict[str, Planned], mesh: Mesh, console: Console) -> None:
        from adapters_jax.distributed.plan import PARTS
        from adapters_jax.texts import bytes_text

        number = f"{mesh.size} device{'s' * (mesh.size > 1)}"
        what = f"{self.model}, {self.rows(mesh.shape)} x {self.length} tokens a step"
        base = f"{self.dtype}, base in {self.quantize}" if self.quantize else self.dtype
        where = f"{self.device}, {_text(mesh.shape)}" if self.device else _text(mesh.shape)
        console.say(f"{what}, {base}, AdamW, {where}: bytes on each of {number}")
        plans = [result.asked for result in results.values()]
        table = [[name, *(bytes_text(getattr(p, name)) for p in plans)] for name in PARTS]
        table.append(["trainable parameters", *(f"{p.trainable_parameters:,}" for p in plans)])
        limit = self.limit
        if limit is not None:
            fits = ["yes" if p.total <= limit else "no" for p in plans]
            table.append([f"fits {bytes_text(limit)}", *fits])
        if limit is not None and self.largest:
            found = [result.largest for result in results.values()]
            table.append(["largest batch", *(f"{p.batch:,}" if p else "none" for p in found)])
        if self.device:
            columns = [_costs(result) for result in results.values()]
            names = list(dict.fromkeys(name for column in columns for name in column))
            table += [[name, *(column.get(name, "") for column in columns)] for name in names]
        console.table(["", *results], table)
        if self.device is None:
            console.say(OFF)
        own = ("model", "device", "length", "dtype", "quantize", "attention")
        console.result(
            {
                **{name: getattr(self, name) for name in own},
                "mesh": dict(mesh.shape),
                "memory": limit,
                "plans": {name: result.asked.to_dict() for name, result in results.items()},
                "costs": {name: result.costs for name, result in results.items()},
                "largest": {
                    name: result.largest.to_dict() if result.largest else None
                    for name, result in results.items()
                    if limit is not None and self.largest
                },
            }
        )


def _costs(result: Planned) -> dict[str, str]:
    """Names and texts of what a compiler says beside the memory."""
    from adapters_jax.texts import bytes_text

    program = result.asked.program
    if program is None:
        return {}
    costs, formats = result.costs, {"flops": "{:.3g}", "seconds": "{:.3g} s"}
    rows = {name: formats[name].format(costs[name]) for name in formats if costs.get(name)}
    if costs.get("bytes_accessed"):
        rows["bytes accessed"] = bytes_text(costs["bytes_accessed"] or 0)
    rows["attention"] = "a kernel's" if program.kernels else "dense"
    rows |= {kind: bytes_text(size) for kind, size in sorted(program.collectives.items())}
    return rows | {"compiled in": duration(program.compile_seconds)}


def _text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _simulated(sizes: Mapping[str, int]) -> Mesh:
    import jax

    from adapters_jax.distributed.mesh import ShardingError, make_mesh

    count = math.prod(sizes.values())
    # jax makes its devices once, so this works only before anything has asked for them.
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # jax has its devices already
        if len(jax.devices()) < count:
            raise ShardingError(f"--mesh {_text(sizes)}: {error}") from error
    return make_mesh(sizes, jax.devices()[:count])


@dataclass(frozen=True)
class CountParameters(Command):
    """Counts what a recipe adds to a model and trains in it, adapter by adapter; needs no weights.

    Args:
        model: a known shape such as bert-base, a pinned model, a directory with config.json, a GGUF
            file, or an id on the Hugging Face Hub.
        method: the recipe.
    """

    examples = """\
  adapters-jax audit --model bert-base --method houlsby --bottleneck-dim 64
  adapters-jax audit --model gpt3-175b --method lora --rank 4 --json
  adapters-jax audit --model bert-base --recipe recipe.json"""

    model: str
    method: MethodOptions = field(default_factory=MethodOptions)

    def prepare(self, console: Console) -> Callable[[], None]:
        """Counts, and returns a function that reports the counts."""
        from adapters_jax.finetune.shapes import count_parameters, on_shape

        method = on_shape(self.model, self.method)
        counts = count_parameters(self.model, method)

        def report() -> None:
            if not self.json:
                console.show(counts)
            console.result({"model": self.model, "method": method.title, **counts.to_dict()})

        return report
