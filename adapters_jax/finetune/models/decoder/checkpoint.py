"""Loads decoders from Hugging Face checkpoints and GGUF files, and saves checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from adapters_jax.distributed.sharding import Rules
from adapters_jax.errors import UserError
from adapters_jax.files.names import NameTable
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.gguf import find_gguf
from adapters_jax.finetune.models.decoder import towers
from adapters_jax.finetune.models.decoder.config import DecoderConfig
from adapters_jax.finetune.models.decoder.families import ARCHITECTURES
from adapters_jax.finetune.models.decoder.model import Decoder, DecoderClassifier, abstract_decoder
from adapters_jax.finetune.models.parts.checkpoint import SHARD, filled, save_tensors, tensors_of
from adapters_jax.finetune.tensors import Stored, Tensor

if TYPE_CHECKING:
    from adapters_jax.finetune.base_files.gguf import GGUF

_SCORE = "score.weight"


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
        config, tensors, names = _read(huggingface.resolve(name_or_path, revision))
    else:
        config = DecoderConfig.of_file(name_or_path.config, name_or_path.path)
        tensors, names = name_or_path.tensors(), ARCHITECTURES[config.model_type].names
        huggingface.check_tensors(config, tensors)
    return config, filled(abstract_decoder(config, **options), tensors, names, mesh, rules)


def _read(directory: Path) -> tuple[DecoderConfig, dict[str, Stored], NameTable]:
    """The configuration, the tensors and their names of a checkpoint, multimodal or not."""
    path = directory / "config.json"
    values = huggingface.read_json(path)
    config = DecoderConfig.of_file(values, path)
    tensors = huggingface.read_tensors(directory)
    huggingface.check_tensors(config, tensors)
    own = ARCHITECTURES[config.model_type].names
    names = towers.table(own, values.get("model_type"))
    if names is not own and config.tie_word_embeddings and names.tied:
        # Mistral 3 is tied by default in transformers 5, which believes an output layer of other
        # numbers more than the configuration.
        found = names.canonical(tensors)
        head, words = (found.get(f"{name}.weight") for name in names.tied)
        if head and words and not np.array_equal(np.asarray(head), np.asarray(words)):
            config = replace(config, tie_word_embeddings=False)
    return config, tensors, names


def load_decoder_classifier(
    directory: str | Path,
    num_labels: int | None = None,
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> tuple[DecoderConfig, DecoderClassifier]:
    """Loads a decoder that classifies, such as transformers' `LlamaForSequenceClassification`.

    Args:
        directory: a directory with `config.json` and safetensors, or an id on the Hub.
        num_labels: the width of the `score`, which is zeros where the checkpoint has none, as that
            of a language model; an adapter of PEFT brings its own. None takes the checkpoint's.
        revision, mesh, rules, **options: as for `load_decoder`.

    Raises:
        UserError: files are absent, a setting is unsupported, or neither the checkpoint nor
            `num_labels` says how many labels there are.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    config, stored, names = _read(huggingface.resolve(directory, revision))
    tensors: dict[str, Any] = dict(stored)
    score = tensors.get(_SCORE)
    if score is None and num_labels is None:
        raise UserError(f"{directory} has no {_SCORE}; give num_labels for a score of zeros")
    if score is None:
        tensors[_SCORE] = np.zeros((num_labels, config.hidden_size), np.float32)
    width = int(tensors[_SCORE].shape[0]) if num_labels is None else num_labels
    model = abstract_decoder(config, num_labels=width, **options)
    return config, filled(model, tensors, names, mesh, rules)  # type: ignore[return-value]


def save_decoder(
    directory: str | Path,
    config: DecoderConfig,
    model: Decoder,
    *,
    max_shard_size: int = SHARD,
    base: str | Path | None = None,
    **more: Any,
) -> None:
    """Writes a checkpoint in the layout of Hugging Face, which `load_decoder` reads as well.

    Args:
        directory: a directory, made if it is absent; a checkpoint in it is replaced,
            file by file.
        config: the model's configuration.
        model: a model without adapters, which may be a classifier; see
            `adapters_jax.transforms.merge`.
        max_shard_size: the largest number of bytes in a file; more are split over shards.
        base: the directory of the multimodal checkpoint that the model was read from. The new one
            is multimodal as well: it has the `config.json` of the base, its names of tensors, and
            what belongs to its images, copied shard by shard. None writes the language model alone.
        **more: further values of `config.json`, such as `eos_token_id`. Values that follow from the
            model take precedence.

    Raises:
        UserError: the architecture of `config.model_type` is not that of the model; or `base` is
            not multimodal, or has another language model.
    """
    if base is not None:
        if Path(directory).exists() and Path(directory).samefile(base):
            raise UserError(f"{str(base)!r} is the base itself; write another directory")
        save_tensors(directory, *_beside_images(Path(base), config, model), max_shard_size)
        return
    architecture = ARCHITECTURES[config.model_type]
    settings, names = config.to_dict(), architecture.names
    beyond = (name for name, token in architecture.tokens.items() if token >= config.vocab_size)
    more = {**dict.fromkeys(beyond), **more}
    more.pop("quantization_config", None)  # of the weights that were read, not of these
    if isinstance(model, DecoderClassifier):
        called = settings["architectures"][0]
        kind = re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", called)
        labels = {f"LABEL_{i}": i for i in range(model.num_labels)}  # transformers counts these
        more = {"id2label": {i: label for label, i in labels.items()}, "label2id": labels, **more}
        settings = {**settings, "architectures": [kind]}
    save_tensors(directory, {**more, **settings}, tensors_of(model, names), max_shard_size)


def _beside_images(
    base: Path, config: DecoderConfig, model: Decoder
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config.json` and all tensors of a multimodal checkpoint with another language model."""
    found, stored, names = _read(base)
    values = huggingface.read_json(base / "config.json")
    if values["model_type"] not in towers.TOWERS:
        raise UserError(
            f"base={str(base)!r} has model_type={values['model_type']!r}, and no images; leave "
            f"base out, or give one of {', '.join(towers.TOWERS)}"
        )
    theirs = names.canonical({name: name for name in stored})
    text = names.canonical(tensors_of(model, names))
    if found != config or not text.keys() <= theirs.keys():
        raise UserError(
            f"base={str(base)!r} has another language model than the one to write; give the "
            "checkpoint that it was read from"
        )
    # As they are, even if not finite: bounds of Gemma 4's sounds are infinite.
    stored = huggingface.read_tensors(base, finite=False)
    rest = {name: stored[name] for bare, name in theirs.items() if towers.is_beside(bare)}
    return values, {**{theirs[bare]: x for bare, x in text.items()}, **rest}
