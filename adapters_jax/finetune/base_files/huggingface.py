"""Finds Hugging Face checkpoints, and reads their configuration and tensors.

Only `config.json` and safetensors are read. A pickled `pytorch_model.bin` is never opened, because
unpickling runs whatever code the file holds.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import (
    BaseFileError,
    BaseMismatchError,
    UserError,
    check_size,
    first_few,
    shown,
    warn,
)
from adapters_jax.files import hub, untrusted
from adapters_jax.files.untrusted import TensorFile, open_tensors
from adapters_jax.finetune.base_files import mxfp4
from adapters_jax.finetune.base_files.typed_settings import check_settings
from adapters_jax.finetune.tensors import Stored

FILES = ("*.json", "*.jinja", "*.safetensors", "vocab.txt", "merges.txt")
INDEX = "model.safetensors.index.json"
MOST_JSON = 2**22  # bytes of a configuration; Gemma's for its tokenizer has 1.2 million
MOST_INDEX = 2**25  # bytes of an index; that of 90,000 tensors has 9 million
MOST_LAYERS = 1_000
NEWEST = 5  # the last major version of transformers whose files were read in tests
PICKLE_ADVICE = (
    "a pickled pytorch_model.bin is never opened, since unpickling runs code: convert it where you "
    "trust it, with transformers' AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Finds a checkpoint in a directory or, by its id, on the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id such as
            `"google-bert/bert-base-uncased"`, optionally followed by `@` and a revision.
        revision: a branch, tag or commit of the Hub's repository.

    Raises:
        BaseFileError: the directory lacks a file, or the Hub cannot be reached or lacks the id.
        MissingPackageError: an id is given and `huggingface_hub` is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     resolve(directory)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapters_jax.errors.BaseFileError: '...' lacks config.json and model.safetensors (or ...
    """
    directory = hub.find(name_or_path, revision, FILES, "a model", BaseFileError, hub.is_id)
    _check_files(directory)
    return directory


def _check_files(directory: Path) -> None:
    lacking = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in ("model.safetensors", INDEX)):
        lacking.append(f"model.safetensors (or {INDEX})")
    if lacking:
        # A download never fetches the pickle, so the Hub may have one that the directory lacks.
        raise BaseFileError(
            f"{str(directory)!r} lacks {' and '.join(lacking)}, which a checkpoint needs; it holds "
            f"{first_few(sorted(os.listdir(directory)), 8) or 'nothing'}; note that "
            f"{PICKLE_ADVICE}."
        )


def read_tensors(directory: str | Path, finite: bool = True) -> dict[str, Stored]:
    """Lists the tensors of `model.safetensors`, or of its shards; reads each only when it is used.

    Args:
        finite: whether every number must be finite.

    Returns:
        The tensors by their names in the files, in the dtype stored (bfloat16 included); pairs of
        MXFP4 as the tensors that they stand for.

    Raises:
        BaseFileError: shards are absent, and the message names them all; a file or the index is
            damaged, or two shards hold the same tensor. When a tensor is read, its numbers are not
            finite.
    """
    directory = Path(directory)
    index = _read_index(directory) if (directory / INDEX).is_file() else {}
    shards = sorted(set(index.values())) or ["model.safetensors"]
    absent = [name for name in shards if not os.path.isfile(directory / name)]
    if absent:
        raise BaseFileError(
            f"{str(directory)!r} lacks {first_few(absent, 8)}, which hold the weights."
        )
    shard_of: dict[str, str] = {}
    tensors: dict[str, Stored] = {}
    for shard in shards:
        for name, tensor in read_file(directory / shard, finite).items():
            if name in tensors:
                raise BaseFileError(
                    f"{shard_of[name]} and {shard} of {str(directory)!r} both hold {name}; remove "
                    "it from one of them."
                )
            shard_of[name], tensors[name] = shard, tensor
    wrong = [name for name, shard in index.items() if shard_of.get(name) != shard]
    if wrong:
        raise BaseFileError(
            f"{str(directory / INDEX)!r} names {index[wrong[0]]} for {first_few(wrong, 8)}, which "
            "it does not hold; write the index anew."
        )
    return mxfp4.whole(tensors)


def _read_index(directory: Path) -> dict[str, str]:
    """The shard of each tensor; a shard is a safetensors file of the same directory."""
    path = directory / INDEX
    index = untrusted.read_json(path, MOST_INDEX, BaseFileError).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise BaseFileError(
            f"{str(path)!r} has weight_map={shown(index)}, expected the file of each tensor."
        )
    for name, shard in index.items():
        plain = isinstance(shard, str) and not set(shard) & set("/\\:\0")
        if not plain or not shard.endswith(".safetensors"):
            raise BaseFileError(
                f"{str(path)!r} names {shown(shard)} for {shown(name)}, expected a safetensors "
                "file beside it."
            )
    return index


def read_file(path: Path, finite: bool = True) -> dict[str, Stored]:
    """Lists the tensors of one safetensors file.

    Raises:
        BaseFileError: it is damaged, or a link out of its directory; see `open_tensors`. When a
            tensor is read, its numbers are not finite, or the file is another one by then.
    """
    with open_tensors(path, BaseFileError) as file:
        read = partial(_read, path, file.file.version, finite)
        return {
            name: Stored(entry.shape, entry.dtype, partial(read, {name: entry}))
            for name, entry in file.entries.items()
        }


def _read(
    path: Path, version: tuple[int, ...], finite: bool, entries: Mapping[str, Any]
) -> np.ndarray:
    with untrusted.opened(path, BaseFileError, version) as file:
        (array,) = TensorFile(file, entries).read(finite).values()
    return array


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object of a base; raises `BaseFileError` as `untrusted.read_json` does."""
    return untrusted.read_json(Path(path), MOST_JSON, BaseFileError)


class CheckpointConfig:
    """The base class of configurations: frozen dataclasses, which are read from a `config.json`.

    Other keys of a `config.json` are bookkeeping of the library that wrote it, and are ignored.

    Attributes:
        supported: the settings that change the arithmetic, with the values that are implemented;
            any other value raises a `UserError`.
        defaults: the values of settings that a `config.json` lacks, where these differ from the
            fields' own.
        renamed: fields by the name that a `config.json` has for them.
    """

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    renamed: ClassVar[Mapping[str, str]] = {}
    num_hidden_layers: int

    @property
    def num_layers(self) -> int:
        """The number of layers; a subclass overrides it if its `config.json` has another name."""
        return self.num_hidden_layers

    @property
    def num_parameters(self) -> int | None:
        """The number of parameters of the model without a head; None if there is no formula."""
        return None

    def with_layers(self, number: int) -> Self:
        """The configuration of a model of the first layers alone."""
        lists = {name: getattr(self, name, None) for name in _OF_LAYERS}
        cut = {name: values[:number] for name, values in lists.items() if values}
        return replace(self, num_hidden_layers=number, **cut)  # type: ignore[type-var]

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self)
        self._check(vars(self))
        for name in filter(vars(self).__contains__, _SIZES):
            check_size(type(self).__name__, name, getattr(self, name))
        layers = "num_layers" if "num_layers" in vars(self) else "num_hidden_layers"
        check_layers(type(self).__name__, self.num_layers, layers)

    def inputs(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """The shape of a batch of token ids, or of what else a model reads."""
        return jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def identity(self) -> dict[str, Any]:
        """What tells a base from others in an adapter's manifest; JSON can hold it."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def _check(
        cls, values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]] | None = None
    ) -> None:
        """Raises `UserError` for values that are not supported, by default those of the class."""
        supported = cls.supported if supported is None else supported
        if mxfp4.is_method(values.get("quantization_config")):
            values = {**values, "quantization_config": None}  # which `read_tensors` reads
        unsupported = [
            f"{key}={shown(values[key])} ({_nearest(values[key], allowed)})"
            for key, allowed in {**_OF_ALL, **supported}.items()
            if key in values and values[key] not in allowed
        ]
        if unsupported:
            raise UserError(f"{cls.__name__} does not implement {'; '.join(unsupported)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`; raises `UserError` for unsupported ones."""
        # Checked twice: under their names for the message, and what `read` has taken from within.
        values = {**cls.defaults, **values}
        cls._check(values)
        values = cls.read({cls.renamed.get(key, key): value for key, value in values.items()})
        cls._check(values)
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of fields, from those of a `config.json`; a subclass adds what they imply."""
        return values

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads the file at `path`, usually a `config.json`; see `from_dict`.

        Raises:
            BaseFileError: it is not JSON, or a setting is wrong or not supported.
        """
        return cls.of_file(read_json(path), Path(path))

    @classmethod
    def of_file(cls, values: Mapping[str, Any], path: Path) -> Self:
        """Takes the fields from the values of a file; raises `BaseFileError` that names it.

        Warns of a version of transformers whose files are not known.
        """
        try:
            _check_version(values, path)
            return cls.from_dict(values)
        except UserError as error:
            raise BaseFileError(f"{path}: {error}") from error


_OF_LAYERS = ("layer_types", "no_rope_layers", "expert_layers")
Config = TypeVar("Config", bound=CheckpointConfig)
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("max_position_embeddings", "image_size", "patch_size", "num_channels"),
    *("d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
)
# Settings that change what the tensors mean, in all architectures.
_OF_ALL: Mapping[str, tuple[Any, ...]] = {"quantization_config": (None,)}


def check_layers(owner: str, layers: int, name: str = "num_hidden_layers") -> None:
    """Raises UserError for more layers than a model can have, before anything is made of them."""
    if layers > MOST_LAYERS:
        raise UserError(f"{owner}: {name}={layers}, expected at most {MOST_LAYERS}")


def read_checkpoint(
    config_class: type[Config], name_or_path: str | Path, revision: str | None = None
) -> tuple[Config, dict[str, Stored]]:
    """Finds a checkpoint, and reads its configuration and its list of tensors; see `resolve`.

    The configuration is checked before any weight is used.
    """
    directory = resolve(name_or_path, revision)
    config = config_class.from_json(directory / "config.json")
    tensors = read_tensors(directory)
    check_tensors(config, tensors)
    return config, tensors


def check_tensors(config: CheckpointConfig, tensors: Mapping[str, Any]) -> None:
    """Raises BaseMismatchError if there are fewer tensors than layers, before a model is built."""
    if config.num_layers > len(tensors):
        raise BaseMismatchError(
            f"the configuration has {config.num_layers} layers, but the checkpoint has "
            f"{len(tensors)} tensors; correct config.json."
        )


def _check_version(values: Mapping[str, Any], path: Path) -> None:
    """Warns of a `config.json` of a later transformers, or raises UserError if it is laid out anew.

    A setting that is not found would have its default, in silence.
    """
    version = values.get("transformers_version")
    major = version.partition(".")[0][:9] if isinstance(version, str) else ""
    if not major.isdecimal() or int(major) <= NEWEST:
        return
    written = f"of transformers {shown(version, 40)}"
    inner = values.get("text_config", values.get("vision_config"))
    named = {*values, *(inner if isinstance(inner, dict) else ())}
    if not named & {"vocab_size", "hidden_size"}:
        raise UserError(
            f"it is {written} and has neither vocab_size nor hidden_size, which versions up to "
            f"{NEWEST} write; save the model again with one of these"
        )
    warn(
        f"{path} is {written}; files of versions up to {NEWEST} are known, so a setting that is "
        "new or renamed since is not read: compare the outputs"
    )


def _nearest(value: Any, allowed: Iterable[Any]) -> str:
    """The supported values, and the one that is spelt most like this one."""
    texts = [each for each in allowed if isinstance(each, str)]
    near = difflib.get_close_matches(value, texts, 1) if isinstance(value, str) else []
    nearest = f"nearest: {near[0]!r}; " if near else ""
    return f"{nearest}supported: {', '.join(map(repr, allowed))}"
