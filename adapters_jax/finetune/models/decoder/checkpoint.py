"""Loads decoders from Hugging Face checkpoints and GGUF files, and saves checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from adapters_jax.distributed.sharding import Rules
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.gguf import find_gguf
from adapters_jax.finetune.models.decoder.config import DecoderConfig
from adapters_jax.finetune.models.decoder.families import ARCHITECTURES
from adapters_jax.finetune.models.decoder.model import Decoder, abstract_decoder
from adapters_jax.finetune.models.parts.checkpoint import (
    SHARD,
    filled,
    save_tensors,
    tensors_of,
)
from adapters_jax.finetune.tensors import Tensor

if TYPE_CHECKING:
    from adapters_jax.finetune.base_files.gguf import GGUF


def load_decoder(
    name_or_path: str | Path | GGUF,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> tuple[DecoderConfig, Decoder]:
    """Loads a decoder of any family from a directory, a GGUF file or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, a GGUF file (its path, a
            directory with one, or the result of `read_gguf`), or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        mesh: the devices that get the parameters, each when it is read; see
            `adapters_jax.layout`. None means the default device.
        rules: partition specs by pattern of the parameter's path; see `adapters_jax.layout`.
        options: `dtype`, `param_dtype`, `attention`, `remat` and `scan` of `Decoder`.

    Returns:
        The configuration, and the model with the parameters of the checkpoint.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    config: DecoderConfig
    tensors: Mapping[str, Tensor]
    if isinstance(name_or_path, str | Path) and find_gguf(name_or_path):
        from adapters_jax.finetune.base_files.gguf import read_gguf  # for few bases

        name_or_path = read_gguf(name_or_path)
    if isinstance(name_or_path, str | Path):
        config, tensors = huggingface.read_checkpoint(DecoderConfig, name_or_path, revision)
    else:
        config = DecoderConfig.of_file(name_or_path.config, name_or_path.path)
        tensors = name_or_path.tensors()
        huggingface.check_tensors(config, tensors)
    names = ARCHITECTURES[config.model_type].names
    return config, filled(abstract_decoder(config, **options), tensors, names, mesh, rules)


def save_decoder(
    directory: str | Path,
    config: DecoderConfig,
    model: Decoder,
    *,
    max_shard_size: int = SHARD,
    **more: Any,
) -> None:
    """Writes a checkpoint in the layout of Hugging Face, which `load_decoder` reads as well.

    Args:
        directory: a directory, made if it is absent; a checkpoint in it is replaced,
            file by file.
        config: the model's configuration.
        model: a model without adapters; see `adapters_jax.transforms.merge`.
        max_shard_size: the largest number of bytes in a file; more are split over shards.
        **more: further values of `config.json`, such as `eos_token_id`. Values that follow from the
            model take precedence.

    Raises:
        UserError: the architecture of `config.model_type` is not that of the model.
    """
    settings, names = config.to_dict(), ARCHITECTURES[config.model_type].names
    more.pop("quantization_config", None)  # of the weights that were read, not of these
    save_tensors(directory, {**more, **settings}, tensors_of(model, names), max_shard_size)
