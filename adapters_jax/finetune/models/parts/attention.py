"""The attention functions of the models: dense, by a kernel of the device, or the better of both.

A kernel never holds the scores of all pairs, whose bytes grow with the square of the length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float

from adapters_jax.errors import UserError, check_choice
from adapters_jax.finetune.models.parts.functions import dot_product_attention
from adapters_jax.finetune.models.parts.kernels import KERNELS, Kernel, Problem
from adapters_jax.trace.masks import Mask, as_array
from adapters_jax.weights.meshes import current_mesh

CHOICES = ("auto", "dense", "flash")
# Keys from which on "auto" takes a kernel. By the compiler of a v5e, a step of 4 x 256 tokens
# accesses 4 % more bytes with it, and one of 4 x 512 tokens 17 % fewer.
SHORTEST = 512

AttentionFn = Callable[..., Array]
Choice = Literal["auto", "dense", "flash"] | AttentionFn


@dataclass(frozen=True)
class Attend:
    """The attention function of a choice; see `attention_function`."""

    choice: str

    def __call__(
        self,
        query: Float[Array, "batch length heads width"],
        key: Float[Array, "batch keys kv_heads width"],
        value: Float[Array, "batch keys kv_heads out"],
        *,
        bias: Float[Array, "#batch #heads #length keys"] | None = None,
        mask: Mask | Bool[Array, "#batch #heads #length keys"] | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " heads"] | None = None,
        dtype: Dtype | None = None,
        **dropout: Any,
    ) -> Float[Array, "batch length heads out"]:
        """Computes what `functions.dot_product_attention` does, whose mask is `mask.dense`."""
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        drops = dropout.get("dropout_rate", 0.0) > 0.0 and not dropout.get("deterministic", True)
        rules = Mask() if mask is None else mask
        lacking = key.shape[-1] - value.shape[-1]
        more = softcap, sinks is not None, lacking < 0
        kernel, why = self._kernel(Problem(query, key, rules, bias is not None, drops, *more))
        if kernel is not None and isinstance(rules, Mask):
            if not lacking:
                return kernel(query, key, value, rules, softcap)
            value = jnp.pad(value, [(0, 0)] * 3 + [(0, lacking)])  # kernels take one width
            return kernel(query, key, value, rules, softcap)[..., :-lacking]
        if why is not None:
            query = _refused.bind(query, why=why)
        limits: dict[str, Any] = {"bias": bias, "mask": mask, "softcap": softcap, "sinks": sinks}
        return dot_product_attention(query, key, value, dtype=dtype, **limits, **dropout)

    def _kernel(self, problem: Problem) -> tuple[Kernel | None, str | None]:
        """The kernel to take, if any; and why a device cannot run what was asked for."""
        if self.choice == "dense":
            return None, None
        device, auto = _device(), self.choice == "auto"
        kernel = _kernel_of(device)
        if kernel is None:
            return None, None if auto else _none_on(device)
        why = kernel.why_not(problem)
        if why is not None and not auto:
            raise UserError(_sentence(why))
        taken = why is None and (not auto or _worthwhile(problem))
        return kernel if taken else None, None


@dataclass(frozen=True)
class Own:
    """A user's attention function, which gets masks as arrays."""

    function: AttentionFn

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        """Calls the function as flax's attention modules call theirs."""
        mask = as_array(options.pop("mask", None), query, key)
        return self.function(query, key, value, mask=mask, **options)


def attention_function(choice: Choice) -> AttentionFn:
    """The attention function that a model's option `attention` stands for.

    Args:
        choice: "dense" computes the scores of all pairs. "flash" takes the kernel of the device:
            splash attention on TPUs, cuDNN's on NVIDIA GPUs. "auto" takes it where it can and the
            text is long enough for it to be worthwhile, and is dense elsewhere: on CPUs, with
            dropout of the weights, with sinks or a bias of the scores, while generating. A function
            of your own is called as flax's attention modules call theirs; see `DecoderAttention`.

            The device is that of the mesh of the training state (see `adapters_jax.shard`), or
            JAX's default device. On several TPUs without such a mesh, "auto" is dense, since the
            kernel would not know how its rows are split. What a compiled program took is in
            `kernels` of `aj.plan(...).program`.

    Returns:
        A function of query, key and value, whose mask may be a `Mask`.

    Raises:
        UserError: `choice` is not one of these. When it is called, "flash" raises one where the
            kernel cannot compute what the model asks for; when it is compiled or run, where there
            is no kernel.
    """
    if callable(choice):
        return choice if isinstance(choice, Attend) else Own(choice)
    check_choice("attention", "attention", choice, CHOICES)
    return Attend(choice)


def check_kernel(choice: str) -> None:
    """Raises `UserError` for "flash" where the default device has no kernel."""
    if choice == "flash" and _kernel_of(_device()) is None:
        raise UserError(_sentence(_none_on(_device())))


def _kernel_of(device: Any) -> Kernel | None:
    return next((each for each in KERNELS if each.runs_on(device)), None)


def _none_on(device: Any) -> str:
    return f"no kernel runs on a {device.device_kind}"


def _device() -> Any:
    """A device that what is traced now will run on."""
    mesh = current_mesh()
    if mesh is not None:
        return mesh.devices.flat[0]
    config: Any = jax.config
    default = config.jax_default_device
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default


def _sentence(why: str) -> str:
    return f"attention='flash': {why}; write attention='auto', which is dense there"


def _refuse(*_: Any, why: str) -> Any:
    raise UserError(_sentence(why))


# Its argument, in a program that no device runs: shapes can be traced on a machine without the
# device. Compiling it, or running it, raises the error.
_refused = Primitive("attention_without_a_kernel")
_refused.def_abstract_eval(lambda x, why: x)
_refused.def_impl(_refuse)
mlir.register_lowering(_refused, _refuse)
ad.primitive_jvps[_refused] = lambda xs, tangents, why: (_refused.bind(*xs, why=why), tangents[0])
batching.primitive_batchers[_refused] = lambda xs, axes, why: (_refused.bind(*xs, why=why), axes[0])


def _worthwhile(problem: Problem) -> bool:
    """Whether "auto" takes a kernel that can be taken."""
    known = current_mesh() is not None or jax.device_count() == 1 or _device().platform != "tpu"
    return known and problem.key.shape[-3] >= SHORTEST
