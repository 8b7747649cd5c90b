"""Converts the weights of a Llama in GGUF to the names and layout of Hugging Face."""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.interop.names import Stored

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_tensors(tensors: Iterable[Any], heads: int, kv_heads: int) -> dict[str, Stored]:
    """Lists the tensors of a `gguf.GGUFReader`; dequantises each only when it is used.

    Args:
        tensors: the reader's tensors.
        heads: the number of query heads.
        kv_heads: the number of key and value heads.

    Returns:
        The tensors in float32, laid out `(out, in)`, by their Hugging Face names. Reading one
        raises a `UserError` if it does not divide into heads or its quantisation is unknown.
    """
    found = {}
    for tensor in tensors:
        name = tensor_name(tensor.name)
        rotated = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2:][0], 0)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        found[name] = Stored(shape, np.float32, partial(_read, tensor, rotated, name))
    return found


def _read(tensor: Any, heads: int, name: str) -> np.ndarray:
    weight = _dequantised(tensor)
    return half_split(weight, heads, name) if heads else weight


def _dequantised(tensor: Any) -> np.ndarray:
    import gguf

    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(f"{tensor.name} cannot be read as float32: {error}.") from error


def tensor_name(theirs: str) -> str:
    """A tensor's Hugging Face name; an unknown name is kept, so that an error reports it.

    Example:
        >>> tensor_name("blk.3.attn_q.weight"), tensor_name("rope_freqs.weight")
        ('model.layers.3.self_attn.q_proj.weight', 'rope_freqs.weight')
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", theirs)
    if not match or match[2] not in _MODULES:
        return theirs
    block = f"model.layers.{match[1]}." if match[1] else ""
    return f"{block}{_MODULES[match[2]]}.{match[3]}"


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
