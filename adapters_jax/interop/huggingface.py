"""Hugging Face checkpoints: find the files, read the tensors, put them under our parameter paths.

Only `config.json` and safetensors are read. A pickled `pytorch_model.bin` is never opened, because
unpickling runs whatever code the file holds. The names of each model's tensors stand beside that
model, as a `NameTable`; what every model shares is here.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from adapters_jax.errors import compare_trees

# Top level only: some repositories keep exports for other runtimes in folders.
WANTED_FILES = ("*.json", "*.jinja", "*.safetensors", "vocab.txt", "merges.txt")
UNWANTED_FILES = ("*/*",)
INDEX = "model.safetensors.index.json"
PICKLE_ADVICE = (
    "a pickled pytorch_model.bin is never opened, since unpickling runs code: convert it where you "
    "trust it, with transformers' AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Finds a checkpoint: a directory as it is, anything else as an id on the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id such as
            `"google-bert/bert-base-uncased"`.
        revision: a branch, tag or commit of the Hub's repository.

    Returns:
        The directory that holds the files.

    Raises:
        ValueError: if the directory lacks a file, or the Hub cannot be reached or has no such id.
        ImportError: if an id is given and `huggingface_hub` is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     resolve(directory)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: '...' lacks config.json and model.safetensors (or ...
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        directory = _download(str(name_or_path), revision)
    _check_files(directory)
    return directory


def _download(name: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a directory here, and reading it from the Hugging Face Hub needs "
            "huggingface_hub: pip install 'adapters-jax[finetune]', or give a directory."
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no such id, no network
        raise ValueError(
            f"{name!r} is neither a directory here nor a model that the Hugging Face Hub gives "
            f"(revision {revision or 'main'}): {error}"
        ) from error


def _check_files(directory: Path) -> None:
    lacking = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in ("model.safetensors", INDEX)):
        lacking.append(f"model.safetensors (or {INDEX})")
    if lacking:
        # A download never fetches the pickle, so its absence here says nothing about the Hub.
        raise ValueError(
            f"{str(directory)!r} lacks {' and '.join(lacking)}, which a checkpoint needs; it holds "
            f"{_shortened(sorted(path.name for path in directory.iterdir()))}; note that "
            f"{PICKLE_ADVICE}."
        )


def read_tensors(directory: str | Path) -> dict[str, np.ndarray]:
    """Reads every tensor of `model.safetensors`, or of the shards its index names.

    Args:
        directory: where the files are.

    Returns:
        The tensors by their names in the files, each of the dtype stored (bfloat16 included).

    Raises:
        ValueError: if a shard is absent or a file is damaged; all of them are named.
    """
    directory = Path(directory)
    shards = ["model.safetensors"]
    if (directory / INDEX).is_file():
        shards = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    absent = [name for name in shards if not (directory / name).is_file()]
    if absent:
        raise ValueError(f"{str(directory)!r} lacks {_shortened(absent)}, which hold the weights.")
    tensors: dict[str, np.ndarray] = {}
    for name in shards:
        tensors |= _read_file(directory / name)
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()  # a file is no mapping: it cannot be iterated over itself
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file: {error}.") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object, or raises a `ValueError` that names the file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON in UTF-8: {error}.") from error
    if isinstance(values, dict):
        return values
    raise ValueError(f"{str(path)!r} holds a {type(values).__name__}, not a JSON object.")


class CheckpointConfig:
    """A frozen dataclass whose fields have the names that `config.json` uses.

    A subclass lists in `supported` the settings that change the arithmetic, with the values it
    implements; any other value raises. The remaining keys of a `config.json` (bookkeeping of the
    library that wrote it) have no bearing on the model and are passed over.
    """

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        self._check(vars(self))

    @classmethod
    def _check(cls, values: Mapping[str, Any]) -> None:
        unsupported = [
            f"{key}={values[key]!r} (supported: {', '.join(map(repr, allowed))})"
            for key, allowed in cls.supported.items()
            if key in values and values[key] not in allowed
        ]
        if unsupported:
            raise ValueError(f"{cls.__name__} does not implement {'; '.join(unsupported)}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`, refusing settings not implemented."""
        cls._check(values)
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads the file at `path`, usually a `config.json`; see `from_dict`."""
        return cls.from_dict(read_json(path))


class Rule(NamedTuple):
    """One line of a `NameTable`: a pattern over our module paths, their module name, a part.

    `part` is `(index, count)` where their module fuses `count` of ours along its output axis.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None


class Source(NamedTuple):
    """Where one of our arrays comes from: a tensor's name and how its axes differ from ours."""

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape their tensor has when ours has `shape`."""
        if self.part:
            shape = (*shape[:-1], shape[-1] * self.part[1])
        return shape[::-1] if self.transposed else shape

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Our array, out of their tensor."""
        tensor = tensor.T if self.transposed else tensor
        if self.part:
            index, count = self.part
            tensor = np.split(tensor, count, axis=-1)[index]
        return tensor


@dataclass(frozen=True)
class NameTable:
    r"""How one model's parameter paths correspond to a checkpoint's tensor names.

    Args:
        rules: the modules, as regular expressions over our paths and templates of their names.
        prefixes: leading words that a checkpoint may have or lack (`"bert."`).
        ignored: patterns of tensors that may be left over: buffers, and heads not asked for.
        fan_in_fan_out: whether linear weights are stored `(in, out)` as ours, not `(out, in)`.

    Example:
        >>> table = NameTable((Rule(r"layer_(\d+)/query", r"layer.\1.self.q"),))
        >>> table.source("layer_3/query/kernel")
        Source(name='layer.3.self.q.weight', transposed=True, part=None)
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fan_in_fan_out: bool = False

    def module(self, path: str) -> Source:
        """Their module for ours at `path`, without the leaf (`weight`, `bias`)."""
        for rule in self.rules:
            match = re.fullmatch(rule.ours, path)
            if match:
                return Source(match.expand(rule.theirs), part=rule.part)
        raise ValueError(f"no rule gives {path!r} a name in a checkpoint; add one to the table.")

    def source(self, path: str) -> Source:
        """Their tensor for our parameter at `path`."""
        module, _, leaf = path.rpartition("/")
        name, _, part = self.module(module)
        transposed = leaf == "kernel" and not self.fan_in_fan_out
        return Source(f"{name}.{'bias' if leaf == 'bias' else 'weight'}", transposed, part)

    def canonical(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors by names without prefix, with the oldest files' gamma and beta renamed."""
        theirs: dict[str, str] = {}
        for name in tensors:
            clash = theirs.setdefault(self._canonical_name(name), name)
            if clash != name:
                raise ValueError(f"{clash} and {name} name one tensor; keep one of them.")
        return {name: tensors[original] for name, original in theirs.items()}

    def _canonical_name(self, name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may be left over."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def from_tensors(tensors: Mapping[str, np.ndarray], names: NameTable, like: Any) -> Any:
    """Puts a checkpoint's tensors where a model's parameters are.

    Args:
        tensors: the checkpoint's, by name; see `read_tensors`.
        names: the model's table.
        like: the model's parameters, arrays or abstract; their dtypes are what comes back.

    Returns:
        A tree of `like`'s structure, shapes and dtypes.

    Raises:
        MismatchError: naming every tensor that is missing, unexpected or of another shape (as the
            checkpoint stores it), ours by path and theirs by name.

    Example:
        >>> like = {"query": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
        >>> table = NameTable((Rule("query", "q_proj"),))
        >>> from_tensors({"q_proj.weight": np.ones((3, 2))}, table, like)["query"]["kernel"].shape
        (2, 3)
    """
    found = names.canonical(tensors)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    # An array of ours goes by both names in an error; what is left over has only theirs.
    places = {}
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        source = names.source(path)
        places[f"{path} ({source.name})"] = source, leaf
    wanted = {
        label: jax.ShapeDtypeStruct(source.shape(leaf.shape), leaf.dtype)
        for label, (source, leaf) in places.items()
    }
    used = {source.name for source, _ in places.values()}
    got = {
        label: found[source.name] for label, (source, _) in places.items() if source.name in found
    }
    got |= {name: t for name, t in found.items() if name not in used and not names.ignores(name)}
    compare_trees("the checkpoint", got, wanted, "Is it of this architecture and size?")
    return jax.tree_util.tree_unflatten(
        structure,
        [
            jnp.asarray(source.take(found[source.name]), leaf.dtype)
            for source, leaf in places.values()
        ],
    )


def to_tensors(tree: Any, names: NameTable) -> dict[str, np.ndarray]:
    """A model's parameters as a checkpoint's tensors; the inverse of `from_tensors`.

    Args:
        tree: parameters; each is a tensor of its own there, none is fused with others.
        names: the model's table; its first prefix is put before every name but the head's.

    Raises:
        ValueError: one of their tensors fuses several of ours.

    Example:
        >>> table = NameTable((Rule("query", "q_proj"),), prefixes=("model.",))
        >>> tensors = to_tensors({"query": {"kernel": np.ones((2, 3))}}, table)
        >>> tensors["model.q_proj.weight"].shape
        (3, 2)
    """
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, transposed, part = names.source(
            jax.tree_util.keystr(keys, simple=True, separator="/")
        )
        if part:
            raise ValueError(f"{name} fuses parts, which cannot be written one by one.")
        array = np.asarray(leaf)
        prefix = "" if name.startswith("lm_head") else "".join(names.prefixes[:1])
        tensors[prefix + name] = np.ascontiguousarray(array.T if transposed else array)
    return tensors


def _shortened(names: Iterable[str], limit: int = 8) -> str:
    """The names in a row, the rest of a long list as a count."""
    names = list(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
