"""Fills NNX models from a checkpoint's tensors, and writes them as checkpoints of Hugging Face."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from adapters_jax.distributed.sharding import Rules, laid_out
from adapters_jax.interop.names import NameTable, Tensor, from_tensors, to_tensors

Model = TypeVar("Model", bound=nnx.Module)


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
        tensors: the tensors of its checkpoint.
        names: their names.
        mesh, rules: where the parameters are; see `adapters_jax.layout`.

    Raises:
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    like = laid_out(nnx.state(model), mesh, rules)
    nnx.update(model, from_tensors(tensors, names, like))
    return model


def save_model(
    directory: str | Path, settings: Mapping[str, Any], model: nnx.Module, names: NameTable
) -> None:
    """Writes `config.json` and `model.safetensors`.

    Args:
        directory: an empty directory.
        settings: the values of `config.json`, but for the dtype.
        model: a model without adapters.
        names: the names of its tensors.
    """
    tensors = to_tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)), names)
    dtype = str(next(iter(tensors.values())).dtype)
    values = {**settings, **dict.fromkeys(("dtype", "torch_dtype"), dtype)}  # new and old readers
    text = json.dumps(values, indent=2) + "\n"
    Path(directory, "config.json").write_text(text, encoding="utf-8")
    path = Path(directory, "model.safetensors")
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable for its owner alone
