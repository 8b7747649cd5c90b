"""LoRA adapters in GGUF, as llama.cpp loads them beside a base in GGUF, both ways.

For each weight the file has A `(r, in)` and B `(out, r)`, named as in
`blk.0.attn_q.weight.lora_a` and `.lora_b`; of `token_embd.weight` A is `(vocabulary, r)`. A pair
changes its weight by alpha / r * B A, where `adapter.lora.alpha` is of the file, and r of the pair.
B's rows are in the order of the weight's, which differs from Hugging Face's for query and key of
some architectures. The fields `general.type`, `general.architecture` and `adapter.type` are
"adapter", the base's, and "lora".

Read in ggml-org/llama.cpp: `convert_lora_to_gguf.py` at 0b03adaa, `src/llama-adapter.cpp` at
0650ea8c.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.errors import AdapterFileError, UserError, needed
from adapters_jax.files.layouts import Array
from adapters_jax.files.peft.config import ROOT, factor_keys
from adapters_jax.finetune.gguf.architectures import ARCHITECTURES, LLAMA, MIXTRAL, Layout
from adapters_jax.finetune.gguf.header import GGUFTensor, read_header
from adapters_jax.finetune.gguf.tensors import (
    dequantised,
    half_split,
    neighbours,
    stored_name,
    tensor_name,
)

ADAPTER = "adapter.gguf"
# llama.cpp's name and layout of each type of base; it has some as Llamas.
_LAYOUTS = {layout.model_type: (name, layout) for name, layout in ARCHITECTURES.items()}
_LAYOUTS |= {"mistral": ("llama", LLAMA), "mixtral": ("llama", MIXTRAL)}
# Multimodal checkpoints, whose language model is a file of its own there.
_LAYOUTS |= {
    "gemma3": ("gemma3", ARCHITECTURES["gemma3"]),
    "qwen2_vl": ("qwen2vl", ARCHITECTURES["qwen2"]),
    "qwen2_5_vl": ("qwen2vl", ARCHITECTURES["qwen2"]),
    "qwen3_vl": ("qwen3vl", ARCHITECTURES["qwen3"]),
}
_EMBEDDING = "token_embd"
_ALPHA, _INVOCATION = "adapter.lora.alpha", "adapter.alora.invocation_tokens"

Heads = tuple[int, int]  # of queries, and of keys


def layout_of(model_type: str) -> tuple[str, Layout]:
    """llama.cpp's name of a type of base, and how it stores that.

    Raises:
        UserError: it is none that we know in GGUF.

    Example:
        >>> layout_of("qwen3_moe")[0]
        'qwen3moe'
    """
    if model_type not in _LAYOUTS:
        raise UserError(
            f"adapters in GGUF are for {', '.join(sorted(_LAYOUTS))}, and the base is a "
            f"{model_type}; write PEFT's instead (--to peft)"
        )
    return _LAYOUTS[model_type]


def to_gguf(
    config: Mapping[str, Any], tensors: Mapping[str, Array], model_type: str, heads: Heads
) -> bytes:
    """Converts PEFT's LoRA with one rank and one alpha, as `for_server` makes it, to a file.

    Raises:
        UserError: we do not know the base's type in GGUF, or GGUF files of this type lack a module.
        MissingPackageError: the package `gguf` is not installed.
    """
    architecture, layout = layout_of(model_type)
    made: dict[str, Array] = {}
    for key, tensor in tensors.items():
        module, _, end = key.removeprefix(ROOT).removesuffix(".weight").rpartition(".")
        name = stored_name(module, layout)
        if name is None:
            raise UserError(f"{module}: GGUF files of {architecture} do not have this weight")
        is_a = end.endswith("_A")
        if name == _EMBEDDING and is_a:
            tensor = tensor.T
        if not is_a and (own := _heads(name, layout, heads)):
            tensor = neighbours(tensor, own)
        made[f"{name}.weight.lora_{'a' if is_a else 'b'}"] = tensor
    return _written(architecture, config, made)


def _heads(name: str, layout: Layout, heads: Heads) -> int:
    """The number of heads, if GGUF has the rows of each head in another order; otherwise 0."""
    each = {"attn_q": heads[0], "attn_k": heads[1]}
    return each.get(name.split(".")[-1], 0) if layout.permuted else 0


def _written(architecture: str, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
    with needed("writing a GGUF file", "gguf"):
        import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ADAPTER)
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        if tokens := config.get("alora_invocation_tokens"):
            kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
            writer.add_key_value(_INVOCATION, list(tokens), *kinds)
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
        # gguf writes to paths only, and in this order.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def from_gguf(path: Path, model_type: str, heads: Heads) -> tuple[dict[str, Any], dict[str, Array]]:
    """Reads an adapter, of a base of this type and these heads, as PEFT's files have it.

    Raises:
        AdapterFileError: it is no LoRA in GGUF, or for another base.
        UserError: the base is of a type that we do not know in GGUF.
        BaseFileError: the file is damaged.
        MissingPackageError: the package `gguf` is not installed.
    """
    architecture, layout = layout_of(model_type)
    fields, stored = read_header(path)
    problems = [
        f"{name}={fields.get(name)!r}, expected {expected!r}"
        for name, expected in (
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
            ("general.architecture", architecture),
        )
        if fields.get(name) != expected
    ]
    alpha = fields.get(_ALPHA, 0.0)
    if not isinstance(alpha, float):
        problems.append(f"{_ALPHA}={alpha!r}, expected a number")
    if problems:
        raise AdapterFileError(f"{str(path)!r} has {'; '.join(problems)}")
    tensors: dict[str, Array] = {}
    for name, tensor in stored.items():
        base, _, which = name.rpartition(".lora_")
        module = tensor_name(base, layout).removesuffix(".weight")
        if which not in ("a", "b") or f"{module}.weight" == base or len(tensor.shape) != 2:
            problems.append(f"{name} {list(tensor.shape)}")
            continue
        key = factor_keys(module, of_embedding=base == f"{_EMBEDDING}.weight")["ab".index(which)]
        tensors[key] = _read(tensor, base, which, layout, heads)
    if problems or not tensors:
        raise AdapterFileError(
            f"{str(path)!r} has {', '.join(problems) or 'no tensors'}, expected pairs such as "
            "blk.0.attn_q.weight.lora_a and .lora_b"
        )
    config = _config(tensors, alpha)
    if tokens := fields.get(_INVOCATION):
        config |= {"alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"}
    return config, tensors


def _read(tensor: GGUFTensor, base: str, which: str, layout: Layout, heads: Heads) -> Array:
    """A tensor in PEFT's order."""
    array = dequantised(tensor)
    if which == "a":
        return array.T if base == f"{_EMBEDDING}.weight" else array
    own = _heads(base.removesuffix(".weight"), layout, heads)
    return half_split(array, own, tensor.name) if own else array


def _config(tensors: Mapping[str, Array], alpha: float) -> dict[str, Any]:
    """PEFT's configuration; llama.cpp takes an alpha of 0 for a scale of 1."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    ranks = {
        key.removeprefix(ROOT).rpartition(".lora_")[0]: len(tensor)
        for key, tensor in tensors.items()
        if key.endswith(ends)
    }
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha or usual,
        "rank_pattern": other,
        "alpha_pattern": {} if alpha else other,
        "target_modules": list(ranks),
    }
