"""Weights in MXFP4: four bits a number, and a power of two for each 32 of them.

A checkpoint has `NAME_blocks`, `(experts, out, in / 32, 16)`, two numbers a byte with the first one
in the lower four bits, and `NAME_scales`, `(experts, out, in / 32)`, the exponents plus 127. Their
products are numbers of bfloat16, so nothing is lost.

Reference: Open Compute Project, OCP Microscaling formats (MX) specification, version 1.0 (2023)
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import BaseFileError
from adapters_jax.finetune.tensors import Stored

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32  # numbers with one scale
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*_HALF, *(-x for x in _HALF)], np.float32)
_DTYPE: Any = jnp.dtype(jnp.bfloat16)


def is_method(settings: Any) -> bool:
    """Whether the `quantization_config` of a `config.json` says that weights are in MXFP4."""
    return isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4"


def whole(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint, those in MXFP4 as ones of bfloat16, `(experts, in, out)`.

    Raises:
        BaseFileError: blocks lack their scales, or these are of another shape. When a tensor is
            read, a number is too large for bfloat16.

    Example:
        >>> packed = {"w_blocks": np.full((1, 1, 1, 16), 0x21, np.uint8)}
        >>> packed["w_scales"] = np.full((1, 1, 1), 128, np.uint8)
        >>> np.asarray(whole(packed)["w"])[0, :3].tolist()
        [[1.0], [2.0], [1.0]]
    """
    found = dict(tensors)
    for name in [each.removesuffix(BLOCKS) for each in tensors if each.endswith(BLOCKS)]:
        blocks, scales = found.pop(name + BLOCKS), found.pop(name + SCALES, None)
        said = [(tuple(x.shape), np.dtype(x.dtype).name) for x in (blocks, scales) if x is not None]
        shape = said[0][0]
        fits = len(shape) == 4 and shape[-1] * 2 == BLOCK
        if said != [(shape, "uint8"), (shape[:-1], "uint8")] or not fits:
            got = " and ".join(f"{list(sizes)} {dtype}" for sizes, dtype in said)
            raise BaseFileError(
                f"{name}{BLOCKS} and {name}{SCALES} are {got}, expected bytes (experts, out, "
                f"in / {BLOCK}, {BLOCK // 2}) and (experts, out, in / {BLOCK})."
            )
        experts, outputs, inputs = shape[0], shape[1], shape[2] * BLOCK
        read = partial(_read, name, blocks, scales)
        found[name] = Stored((experts, inputs, outputs), _DTYPE, read)
    return found


def _read(name: str, blocks: Any, scales: Any) -> np.ndarray:
    packed, exponents = np.asarray(blocks), np.asarray(scales).astype(np.int32) - 127
    experts, outputs, count, _ = packed.shape
    found = np.empty((experts, count * BLOCK, outputs), _DTYPE)
    for expert in range(experts):  # one by one, since their indices take more bytes than they do
        pairs = np.stack([packed[expert] & 0xF, packed[expert] >> 4], axis=-1)
        with np.errstate(over="ignore"):
            numbers = np.ldexp(
                NUMBERS[pairs.reshape(outputs, count, BLOCK)], exponents[expert, ..., None]
            )
        if not np.isfinite(numbers).all():
            raise BaseFileError(f"{name}{SCALES} has powers of two that bfloat16 does not have.")
        found[expert] = numbers.reshape(outputs, -1).T
    return found
