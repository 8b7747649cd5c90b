"""Fills NNX models from a checkpoint's tensors, and writes them as checkpoints of Hugging Face."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.errors import check_number, file_errors
from adapters_jax.files.names import NameTable
from adapters_jax.finetune.base_files.huggingface import INDEX
from adapters_jax.finetune.tensors import Tensor, from_tensors, to_tensors

Model = TypeVar("Model", bound=nnx.Module)
SHARD = 5 * 10**9  # bytes, as in transformers 4
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def filled(
    model: Model,
    tensors: Mapping[str, Tensor],
    names: NameTable,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Model:
    """Fills a model without arrays, and returns it.

    Args:
        model: the model, whose Variables are abstract.
        mesh, rules: where the parameters are; see `adapters_jax.layout`.

    Raises:
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    like = laid_out(nnx.state(model), mesh, rules)
    nnx.update(model, from_tensors(tensors, names, like))
    return model


def tensors_of(model: nnx.Module, names: NameTable) -> dict[str, np.ndarray]:
    """The tensors of a model without adapters, by the names of its checkpoint."""
    return to_tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)), names)


def save_tensors(
    directory: str | Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: int = SHARD,
) -> None:
    """Writes `config.json`, and `model.safetensors` or shards with their index.

    Args:
        directory: a directory, made if it is absent; a checkpoint in it is replaced,
            file by file.
        settings: the values of `config.json`, but for the dtype.
        tensors: the tensors by their names there; those in files are read one shard at a time.
        max_shard_size: the largest number of bytes of tensors in a file; a larger tensor is
            alone in its file.

    Raises:
        UserError: `max_shard_size` is not a number of at least 1, or the directory cannot be made.
    """
    check_number("the checkpoint", "max_shard_size", max_shard_size, low=1, closed=True)
    dtype = str(next(iter(tensors.values())).dtype)
    values = {**settings, **dict.fromkeys(("dtype", "torch_dtype"), dtype)}  # new and old readers
    with file_errors(Path(directory), "written"):
        Path(directory).mkdir(parents=True, exist_ok=True)
        _write_json(Path(directory, "config.json"), values)
    shards = _shards({name: x.nbytes for name, x in tensors.items()}, max_shard_size)
    files = {_file(i, len(shards)): shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        path = Path(directory, file)
        save_file({name: np.asarray(tensors[name]) for name in shard}, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable for its owner alone
    if len(files) > 1:
        where = {name: file for file, shard in files.items() for name in shard}
        total = {"total_size": sum(x.nbytes for x in tensors.values())}
        _write_json(Path(directory, INDEX), {"metadata": total, "weight_map": where})
    new = {*files, *((INDEX,) if len(files) > 1 else ())}
    with file_errors(Path(directory), "written"):
        for old in Path(directory).iterdir():  # readers might take an earlier checkpoint's weights
            if old.name not in new and (old.name == INDEX or _WEIGHTS.fullmatch(old.name)):
                old.unlink()


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Splits tensors, in their order, into files of at most `most` bytes.

    Example:
        >>> _shards({"a": 2, "b": 3, "c": 9, "d": 1}, 5)
        [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _file(number: int, count: int) -> str:
    part = f"-{number:05}-of-{count:05}" if count > 1 else ""
    return f"model{part}.safetensors"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
