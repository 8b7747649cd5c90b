"""Converts the weights of a decoder in GGUF to the names and layout of Hugging Face."""

import re
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from adapters_jax.errors import BaseFileError, UserError
from adapters_jax.files.names import ROW
from adapters_jax.files.untrusted import not_finite
from adapters_jax.finetune.gguf.architectures import LLAMA, Layout
from adapters_jax.finetune.gguf.header import GGUFTensor
from adapters_jax.finetune.tensors import Stored

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def read_tensors(
    tensors: Iterable[GGUFTensor], architecture: Layout, heads: Mapping[str, int]
) -> dict[str, Stored]:
    """Lists the tensors of a file; reads and dequantises each only when it is used.

    Args:
        architecture: how llama.cpp stores it.
        heads: the number of heads of "q_proj" and of "k_proj".

    Returns:
        The tensors in float32, laid out `(out, in)`, by their Hugging Face names; a stack of
        experts is one tensor for each. Reading one raises a `UserError` if it does not divide into
        heads, its quantisation is unknown, or a number is not finite.
    """
    found = {}
    for tensor in tensors:
        name = tensor_name(tensor.name, architecture)
        parts = tensor.rows(name) if ROW in name and len(tensor.shape) == 3 else [tensor]
        for i, part in enumerate(parts):
            own = name.replace(ROW, str(i))
            module = own.split(".")[-2:][0]
            rotated = heads.get(module, 0) if architecture.permuted else 0
            offset = architecture.norm_offset if module.endswith("norm") else 0.0
            read = partial(_read, part, rotated, offset, own)
            found[own] = Stored(part.shape, np.dtype(np.float32), read)
    return found


def _read(tensor: GGUFTensor, heads: int, offset: float, name: str) -> np.ndarray:
    weight = dequantised(tensor)
    weight = half_split(weight, heads, name) if heads else weight
    return weight - np.float32(offset) if offset else weight


def dequantised(tensor: GGUFTensor) -> np.ndarray:
    """Reads a tensor in float32."""
    import gguf

    try:
        with np.errstate(invalid="ignore", over="ignore"):  # numbers are checked below
            weight = gguf.dequantize(tensor.bytes(), tensor.kind)
    except NotImplementedError as error:
        raise BaseFileError(f"{tensor.name} cannot be read as float32: {error}.") from error
    if not_finite({tensor.name: weight}):
        raise BaseFileError(f"{tensor.path} has numbers that are not finite in {tensor.name}")
    return weight


def tensor_name(theirs: str, architecture: Layout = LLAMA) -> str:
    """A tensor's Hugging Face name; an unknown name is kept, so that an error reports it.

    Example:
        >>> tensor_name("blk.3.attn_q.weight"), tensor_name("rope_freqs.weight")
        ('model.layers.3.self_attn.q_proj.weight', 'rope_freqs.weight')
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", theirs)
    if not match or match[2] not in (architecture.modules if match[1] else _MODEL):
        return theirs
    if match[1] is None:
        return f"{_MODEL[match[2]]}.{match[3]}"
    return f"model.layers.{match[1]}.{architecture.modules[match[2]]}.{match[3]}"


def stored_name(module: str, architecture: Layout) -> str | None:
    """The name in GGUF of a module of Hugging Face's, if it has one; undoes `tensor_name`.

    Example:
        >>> stored_name("model.layers.3.self_attn.q_proj", LLAMA)
        'blk.3.attn_q'
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    among = architecture.modules if match else _MODEL
    own = match[2] if match else module
    found = next((name for name, theirs in among.items() if theirs == own), None)
    return f"blk.{match[1]}.{found}" if match and found else found


def half_split(weight: np.ndarray, heads: int, name: str = "the weight") -> np.ndarray:
    """Reorders the rows of a q or k weight for rotary positions, which rotate pairs of features.

    llama.cpp pairs neighbours, (0, 1), (2, 3), ... of each head; Hugging Face and we pair each
    feature of the first half with its counterpart in the second.

    Example:
        >>> half_split(np.array([["a0"], ["b0"], ["a1"], ["b1"]]), heads=1).ravel().tolist()
        ['a0', 'a1', 'b0', 'b1']
    """
    rows, *width = weight.shape
    if rows % (2 * heads):
        raise UserError(
            f"{name} has {rows} rows, expected an even number for each of {heads} heads."
        )
    return weight.reshape(heads, -1, 2, *width).swapaxes(1, 2).reshape(weight.shape)


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows as llama.cpp has them; undoes `half_split`.

    Example:
        >>> neighbours(np.array([["a0"], ["a1"], ["b0"], ["b1"]]), heads=1).ravel().tolist()
        ['a0', 'b0', 'a1', 'b1']
    """
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2)
    return rows.reshape(weight.shape)
