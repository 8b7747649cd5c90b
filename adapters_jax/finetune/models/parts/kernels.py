"""Kernels of attention: splash attention on TPUs and cuDNN's on NVIDIA GPUs.

Both compute a block of the scores at a time, and in the backward pass compute it again. Key and
value heads are not repeated. On a mesh each device has its own rows and, over an axis `model`, its
own heads, so the kernels run within `shard_map` and exchange nothing.

Reference:
    Dao, FlashAttention-2 (2023), https://arxiv.org/abs/2307.08691
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from adapters_jax.methods.mixed import mapped
from adapters_jax.trace.masks import PADDING, Mask
from adapters_jax.weights.meshes import BATCH, current_mesh

Rows = Float[Array, "batch length heads width"]
LANES = 128  # of a TPU's registers; blocks are multiples of it
BLOCKS = (512, 256, LANES)


class Problem(NamedTuple):
    """What an attention computes, as far as kernels may not be able to.

    Attributes:
        query, key: shaped `(batch, length, heads, width)`.
        mask: the mask; an array is one that no rule says.
        biased: whether a bias is added to the scores.
        drops: whether weights are dropped at random.
        softcap: the bound of the scores.
        sunk: whether sinks take a share of the softmax.
        wider: whether values are wider than keys.
    """

    query: Array
    key: Array
    mask: Any
    biased: bool = False
    drops: bool = False
    softcap: float | None = None
    sunk: bool = False
    wider: bool = False


class Kernel(Protocol):
    """An attention that a device has a kernel for."""

    def runs_on(self, device: Any) -> bool:
        """Whether it runs on this device."""

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot compute this, as the start of a sentence; None if it can."""

    def __call__(self, query: Rows, key: Rows, value: Rows, mask: Mask, cap: float | None) -> Rows:
        """The attention of inputs of one dtype, whose scores are divided by the root of a width."""


class Splash:
    """Splash attention, a Pallas kernel for TPUs.

    Causal masks, windows and prefixes are rules in the kernel, which skips blocks that no query
    sees. Padding and texts that share a row are numbers that query and key have in common.
    """

    def __init__(self, interpret: bool = False):
        self.interpret = interpret

    def runs_on(self, device: Any) -> bool:
        """Whether it is a TPU."""
        return device.platform == "tpu"

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot compute this; None if it can."""
        if problem.query.dtype not in (jnp.float32, jnp.bfloat16):
            return f"the kernel takes float32 or bfloat16, got {problem.query.dtype}"
        why, mask = _why_not(problem), problem.mask
        if why is None and mask.prefix and mask.segments is not None:
            return "the kernel has no prefix in front of rows of several texts (segments)"
        return why

    def __call__(self, query: Rows, key: Rows, value: Rows, mask: Mask, cap: float | None) -> Rows:
        """Pads lengths to blocks, and runs the kernel."""
        return _split(partial(self._local, cap), query, key, value, mask)

    def _local(self, cap: float | None, query: Rows, key: Rows, value: Rows, mask: Mask) -> Rows:
        # Here, since Pallas for TPUs takes a fifth as long to import as jax.
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        batch, length, heads, width = query.shape
        keys, by_query, by_key = key.shape[1], _block(length), _block(key.shape[1])
        query = query / jnp.sqrt(width).astype(query.dtype)
        query, *pair = (
            _longer(x, 1, by).swapaxes(1, 2)
            for x, by in ((query, by_query), (key, by_key), (value, by_key))
        )
        # The kernels of the forward and the backward pass each take block sizes; all get the same.
        sizes: dict[str, Any] = {f"block_{name}": by_query for name in ("q", "q_dkv", "q_dq")}
        sizes |= {f"block_{name}": by_key for name in ("kv", "kv_dkv", "kv_dq")}
        rules = _rules(mask, query.shape[2], pair[0].shape[2])
        run = splash.make_splash_mha(
            splash.MultiHeadMask([rules] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=cap,
            interpret=self.interpret,
        )
        ids = mask.ids(batch, length, keys)
        # Keys that only fill a block have to be hidden; a causal mask does that by itself.
        if ids is None and pair[0].shape[2] > keys and not mask.causal:
            ids = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
        if ids is None:
            mixed = jax.vmap(run)(query, *pair)
        else:
            of_keys = _longer(ids[1], 1, by_key, PADDING)
            numbers = splash.SegmentIds(_longer(ids[0], 1, by_query), of_keys)
            mixed = jax.vmap(run)(query, *pair, numbers)
        return mixed[:, :, :length].swapaxes(1, 2)


class Cudnn:
    """cuDNN's attention for NVIDIA GPUs.

    It knows causal masks and windows of the past. Other masks are an array that all heads share, a
    number in 16 bits for each pair.
    """

    def __init__(self, implementation: Literal["cudnn", "xla"] = "cudnn"):
        self.implementation = implementation

    def runs_on(self, device: Any) -> bool:
        """Whether it is a GPU of NVIDIA."""
        return device.platform in ("gpu", "cuda") and "NVIDIA" in device.device_kind

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot compute this; None if it can."""
        width, widest = problem.query.shape[-1], _widest()
        if problem.query.dtype not in (jnp.float16, jnp.bfloat16):
            return f"cuDNN takes bfloat16 or float16, got {problem.query.dtype}"
        if problem.softcap is not None:
            return f"cuDNN has no soft cap of the scores, which this model has ({problem.softcap})"
        if width % 8 or width > widest:
            return f"cuDNN takes heads of a multiple of 8 up to {widest}, got {width}"
        why, mask = _why_not(problem), problem.mask
        sizes = problem.query.shape[1], problem.key.shape[1]
        if why is None and isinstance(mask, Mask) and mapped() and _as_array(mask, *sizes):
            return "JAX cannot map cuDNN's padded, packed and prefixed masks over adapters' rows"
        return why

    def __call__(self, query: Rows, key: Rows, value: Rows, mask: Mask, cap: float | None) -> Rows:
        """Runs the kernel; there is no `cap`."""
        return _split(self._local, query, key, value, mask)

    def _local(self, query: Rows, key: Rows, value: Rows, mask: Mask) -> Rows:
        length, keys = query.shape[1], key.shape[1]
        aligned = _is_aligned(mask, length, keys)
        options: dict[str, Any] = {"is_causal": aligned, "implementation": self.implementation}
        if aligned and mask.window is not None:
            options["local_window_size"] = (mask.window - 1, 0)
        if _as_array(mask, length, keys):
            seen = mask.dense(length, keys)
            seen = jnp.broadcast_to(seen, (len(seen), 1, length, keys))
            options["mask"] = _longer(_longer(seen, 2, 2, True), 3, 2, False)
        query, key, value = (_longer(x, 1, 2) for x in (query, key, value))
        return jax.nn.dot_product_attention(query, key, value, **options)[:, :length]


def _is_aligned(mask: Mask, queries: int, keys: int) -> bool:
    """Whether a mask is causal as cuDNN takes it, from the first query and key on."""
    return mask.causal and not mask.prefix and queries == keys


def _as_array(mask: Mask, queries: int, keys: int) -> bool:
    """Whether cuDNN needs the mask as an array.

    The derivative takes even lengths. A causal mask hides the key that is added.
    """
    said = _is_aligned(mask, queries, keys) or (mask.sees_all and keys % 2 == 0)
    return not mask.by_position or not said


KERNELS: Sequence[Kernel] = (Splash(), Cudnn())


def _why_not(problem: Problem) -> str | None:
    """Why no kernel can compute this; None if one may."""
    if problem.query.ndim != 4:
        return f"kernels take (batch, length, heads, width), got {problem.query.shape}"
    if problem.biased:
        return "kernels have no bias of the scores, which this model's attention has"
    if problem.sunk:
        return "kernels have no attention sinks, which this model's attention has"
    if problem.wider:
        return "kernels have no values that are wider than the keys"
    if problem.drops:
        return "kernels drop no attention weights; set the rate of their dropout to 0"
    if not isinstance(problem.mask, Mask):
        return "this mask is an array, which the kernels cannot say by rules"
    return None


def _split(kernel: Callable[..., Rows], query: Rows, key: Rows, value: Rows, mask: Mask) -> Rows:
    """Runs a kernel on each device's rows and heads, where there is a mesh."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(query, key, value, mask)

    def over(names: Sequence[str], *sizes: int) -> tuple[str, ...] | None:
        """The axes of the mesh, if they divide the sizes."""
        axes = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
        parts = math.prod(mesh.shape[name] for name in axes)
        return axes if axes and not any(size % parts for size in sizes) else None

    rows = over(BATCH, query.shape[0])
    spec = P(rows, None, over(("model",), query.shape[2], key.shape[2]), None)
    batch = query.shape[0]
    mask = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, x.shape[1])), mask)
    # Without `check_vma`, since kernels do not say over which axes of the mesh their outputs vary.
    run = jax.shard_map(
        kernel, mesh=mesh, in_specs=(spec, spec, spec, P(rows)), out_specs=spec, check_vma=False
    )
    return run(query, key, value, mask)


def _block(length: int) -> int:
    """The largest block to whose multiple a length is padded by at most an eighth."""
    padded = ((block, -(-length // block) * block) for block in BLOCKS)
    return next((block for block, n in padded if n <= length * 1.125), LANES)


def _longer(x: Array, axis: int, step: int, fill: Any = 0) -> Array:
    """Pads the end of an axis to a multiple of `step`."""
    edge = [(0, 0)] * x.ndim
    edge[axis] = (0, -x.shape[axis] % step)
    return jnp.pad(x, edge, constant_values=fill) if edge[axis][1] else x


def _rules(mask: Mask, queries: int, keys: int) -> Any:
    """The part of a mask that positions decide, as splash attention takes it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = queries, keys
    if mask.window is not None:
        reach = mask.window - 1, 0 if mask.causal else mask.window - 1
        seen = masks.LocalMask(shape, reach, mask.prefix)
        if not mask.prefix:
            return seen
        front = np.broadcast_to(np.arange(keys) < mask.prefix, shape)
        return masks.LogicalOr(seen, masks.NumpyMask(front))
    if mask.causal:
        return masks.CausalMask(shape, mask.prefix)
    return masks.FullMask(shape)


def _widest() -> int:
    """The widest head that cuDNN takes: 256 on this machine's Hopper GPUs and later, else 128."""
    if jax.default_backend() != "gpu":
        return 128
    return 256 if float(jax.local_devices()[0].compute_capability) >= 9 else 128
