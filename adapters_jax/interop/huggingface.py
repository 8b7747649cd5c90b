"""Finds Hugging Face checkpoints, and reads their configuration and tensors.

Only `config.json` and safetensors are read. A pickled `pytorch_model.bin` is never opened, because
unpickling runs whatever code the file holds.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from adapters_jax.checks import check_settings, shown
from adapters_jax.errors import UserError, file_errors
from adapters_jax.interop.names import Stored
from adapters_jax.io import hub

FILES = ("*.json", "*.jinja", "*.safetensors", "vocab.txt", "merges.txt")
INDEX = "model.safetensors.index.json"
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

    Returns:
        The directory that holds the files.

    Raises:
        UserError: the directory lacks a file, or the Hub cannot be reached or has no such id.
        MissingPackageError: an id is given and `huggingface_hub` is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     resolve(directory)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapters_jax.errors.UserError: '...' lacks config.json and model.safetensors (or ...
    """
    directory = hub.find(name_or_path, revision, FILES, "a model", UserError, hub.is_id)
    _check_files(directory)
    return directory


def _check_files(directory: Path) -> None:
    lacking = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in ("model.safetensors", INDEX)):
        lacking.append(f"model.safetensors (or {INDEX})")
    if lacking:
        # A download never fetches the pickle, so the Hub may have one that the directory lacks.
        raise UserError(
            f"{str(directory)!r} lacks {' and '.join(lacking)}, which a checkpoint needs; it holds "
            f"{_shortened(sorted(path.name for path in directory.iterdir()))}; note that "
            f"{PICKLE_ADVICE}."
        )


def read_tensors(directory: str | Path) -> dict[str, Stored]:
    """Lists the tensors of `model.safetensors`, or of its shards; reads each only when it is used.

    Args:
        directory: the checkpoint's directory.

    Returns:
        The tensors by their names in the files, in the dtype stored (bfloat16 included).

    Raises:
        UserError: shards are absent, all of which the message names, or a file is damaged.
    """
    directory = Path(directory)
    shards = ["model.safetensors"]
    if (directory / INDEX).is_file():
        shards = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    absent = [name for name in shards if not (directory / name).is_file()]
    if absent:
        raise UserError(f"{str(directory)!r} lacks {_shortened(absent)}, which hold the weights.")
    tensors: dict[str, Stored] = {}
    for name in shards:
        tensors |= read_file(directory / name)
    return tensors


def read_file(path: Path) -> dict[str, Stored]:
    """Lists the tensors of one safetensors file; raises a `UserError` that names a damaged one."""
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()  # a file is no mapping: it cannot be iterated over itself
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file: {error}.") from error
    return {name: Stored(shape, partial(_read, path, name)) for name, shape in shapes.items()}


def _read(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        return file.get_tensor(name)


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object; raises a `UserError` that names the file if it holds none."""
    try:
        with file_errors(Path(path)):
            text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{str(path)!r} is not JSON in UTF-8: {error}.") from error
    if isinstance(values, dict):
        return values
    raise UserError(f"{str(path)!r} holds a {type(values).__name__}, not a JSON object.")


class CheckpointConfig:
    """A frozen dataclass whose fields have the names that `config.json` uses.

    A subclass lists in `supported` the settings that change the arithmetic, with the values it
    implements; any other value raises a `UserError`. All other keys of a `config.json` are
    bookkeeping of the library that wrote it, and are ignored.
    """

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    num_hidden_layers: int

    @property
    def num_layers(self) -> int:
        """The number of layers; a subclass overrides it if its `config.json` has another name."""
        return self.num_hidden_layers

    @property
    def num_parameters(self) -> int | None:
        """The number of parameters of the model without a head; None if there is no formula."""
        return None

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self)
        self._check(vars(self))

    def identity(self) -> dict[str, Any]:
        """What tells a base from others in an adapter's manifest; JSON can hold it."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def _check(
        cls, values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]] | None = None
    ) -> None:
        """Raises `UserError` for values that are not supported, by default those of the class."""
        unsupported = [
            f"{key}={shown(values[key])} ({_nearest(values[key], allowed)})"
            for key, allowed in (cls.supported if supported is None else supported).items()
            if key in values and values[key] not in allowed
        ]
        if unsupported:
            raise UserError(f"{cls.__name__} does not implement {'; '.join(unsupported)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`; raises `UserError` for unsupported ones."""
        cls._check(values)
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads the file at `path`, usually a `config.json`; see `from_dict`."""
        return cls.from_dict(read_json(path))


def _nearest(value: Any, allowed: Iterable[Any]) -> str:
    """The supported values, and the one that is spelt most like this one."""
    texts = [each for each in allowed if isinstance(each, str)]
    near = difflib.get_close_matches(value, texts, 1) if isinstance(value, str) else []
    nearest = f"nearest: {near[0]!r}; " if near else ""
    return f"{nearest}supported: {', '.join(map(repr, allowed))}"


def _shortened(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
