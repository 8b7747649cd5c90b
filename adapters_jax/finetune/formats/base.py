"""What an adapter format is, and what the implementations share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from adapters_jax.files import hub
from adapters_jax.files.directories import Pair
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.files.names import NameTable
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten

MASKED = "masked tokens"  # what the head of a masked language model reads
_FREE = ("targets", "rank", "alpha", "rank_pattern", "alpha_pattern")
_SIZES = ("bottleneck_dim", "reduction_factor")
_BEFORE = ", which matters only before training"
Kind = Literal["encoder", "decoder", "encoder-decoder", "vision", "speech"]
HEAD = "head/"  # the paths of a head's leaves begin with it
SCORE = "score/"  # the same of a decoder that classifies


@dataclass(frozen=True)
class BaseModel:
    """A base model, described for adapter formats.

    Attributes:
        name: a directory or id, as the user, the run or the file names it.
        kind: "encoder", "decoder" for a model that continues texts, "encoder-decoder" for one that
            answers them, "vision", or "speech".
        names: maps its modules to PyTorch's names.
        prefix: begins PyTorch's module names in the class that has a head as well.
        bare: begins them in the class without a head.
        params: a tree of parameters, or an NNX model.
        identity: identifies the base in an adapter's files.
        classifies: whether a head for labels is on top of it.
        pooling: what that head reads; None if there is no head or its pooling is unknown.
        model_type: its type in `config.json`.
        one_layer: whether its architecture's classifier in transformers also has one layer.
        heads: a decoder's numbers of heads of queries and of keys.
    """

    name: str
    kind: Kind
    names: NameTable
    prefix: str
    params: Any
    identity: BaseIdentity
    classifies: bool = False
    pooling: str | None = None
    model_type: str = ""
    one_layer: bool = False
    heads: tuple[int, int] = (0, 0)
    bare: str = ""

    @property
    def public(self) -> str | None:
        """Its id on the Hub, without a revision; None for a base that is not of the Hub."""
        found = self.identity.id
        return found if found and "/" in found and hub.is_id(found) else None

    def accepting(self, any_base: bool) -> BaseModel:
        """The same base; with `any_base`, adapters that were trained on another one are read."""
        return dataclasses.replace(self, identity=BaseIdentity()) if any_base else self

    def flat(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters by path; an adapter's leaves are added or replace the base's."""
        state = self.params  # of NNX without other state, such as keys and statistics
        state = nnx.state(state, nnx.Param) if isinstance(state, nnx.Module) else state
        return {**flatten(state), **leaves}


@dataclass(frozen=True)
class Head:
    """The classification head in an adapter's files.

    Attributes:
        pooling: what it reads: "pooler", "cls", "mean" or "tokens"; None if the files do not tell.
    """

    width: int
    pooling: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter to be written.

    Attributes:
        leaves: the trained leaves by path.
        name: the adapter's name, for formats that store one.
        head_type: AdapterHub's kind of its head; None is the default of what the head reads.
        beside: further texts by file name, such as the model card.
    """

    recipe: Recipe
    leaves: Mapping[str, Any]
    name: str = "adapter"
    labels: Sequence[str] = ()
    head_type: str | None = None
    beside: Mapping[str, str] | None = None


class AdapterFormat(ABC):
    """The adapter files of one library.

    All formats are asked which of them a directory has, so a format imports the code of its library
    only within the methods that need it.

    Attributes:
        name: the format's name in commands.
        owner: the library's name in messages.
        library: the library's name on the Hub, for model cards.
        files: the names of all files that the format may have.
        keys: the keys by which its `adapter_config.json` is recognised; empty if it has none.
        names_classes: whether its files name the classes of a head.
    """

    name: str
    owner: str
    library: str
    files: tuple[str, ...]
    keys: tuple[str, ...] = ()
    names_classes: bool = False

    def detects(self, directory: Path, values: Mapping[str, Any]) -> bool:
        """Whether a directory has this format.

        Args:
            directory: the directory, or a file.
            values: those of its `adapter_config.json`; empty if it has none.
        """
        return bool(self.keys) and values.keys() >= {*self.keys}

    def base_name(self, directory: Path) -> str | None:
        """The base's name or id in an adapter's files; None if they have none."""
        return None

    def head(self, directory: Path, inside: str) -> Head | None:
        """The head in an adapter's files; `inside` is the module that a classifier's base is in."""
        return None

    def labels(self, directory: Path) -> int | None:
        """The number of labels of a decoder's `score` in an adapter's files; None without one."""
        return None

    @abstractmethod
    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """Returns the recipe and the trained leaves by path.

        Raises:
            AdapterFileError: the files are damaged, unsupported, or not for this base.
        """

    def problems(self, adapter: Adapter, base: BaseModel) -> list[str]:
        """Why the format does not support an adapter, one sentence each; `write` raises the same.

        Of the arrays, only shapes and dtypes matter: `stand_ins` will do for what is not trained.
        """
        return []

    @abstractmethod
    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """Writes a directory, which appears whole or not at all.

        Raises:
            UserError: the format does not support the adapter, or the directory holds
                something else.
        """

    def head_problem(self, base: BaseModel) -> str:
        """Why this library has no head like the base's; empty if it has one."""
        return ""

    @abstractmethod
    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Returns three lines of Python that load an adapter.

        Args:
            leaves: the trained leaves by path.
            shown: the base's name without directories of this machine.
        """


def stand_ins(shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of these shapes and dtypes that take no memory, to ask a format for its `problems`.

    Each holds another number, as no two trained leaves are equal.

    Example:
        >>> found = stand_ins({"a": np.ones((2, 3)), "b": np.ones(4)})
        >>> found["a"].shape, found["a"].strides, found["b"].tolist()
        ((2, 3), (0, 0), [2.0, 2.0, 2.0, 2.0])
    """
    return {
        path: np.broadcast_to(np.asarray(number, leaf.dtype), leaf.shape)
        for number, (path, leaf) in enumerate(shapes.items(), 1)
    }


def has_score(leaves: Iterable[str]) -> bool:
    """Whether the trained leaves have a decoder's score of labels."""
    return any(path.startswith(SCORE) for path in leaves)


def has_head(leaves: Mapping[str, Any]) -> bool:
    """Whether the trained leaves have an encoder's head."""
    return any(path.startswith(HEAD) for path in leaves)


def shape_in(files: Pair, directory: Path, pattern: Any) -> tuple[int, ...] | None:
    """The shape of the last tensor whose name matches a regular expression, if there is one."""
    tensors = files.read_tensors(directory) or {}
    found = sorted(key for key in tensors if pattern.fullmatch(key))
    return tuple(tensors[found[-1]].shape) if found else None


def pooling_problem(base: BaseModel, owner: str, poolings: Sequence[str]) -> str:
    """Why a library has no head with the base's pooling; empty if it has one."""
    if base.pooling is None:
        return "the pooling of its head is unknown: add --pooling pooler, cls or mean"
    if base.pooling not in poolings:
        problem = f"its head reads {base.pooling}, but {owner}'s heads read {' or '.join(poolings)}"
        pooled = base.pooling in ("mean", "cls")  # others are those of a task, not chosen
        return f"{problem}: train with --pooling pooler to keep it" if pooled else problem
    return ""


def changes(
    before: tuple[Recipe, Mapping[str, Any]], after: tuple[Recipe, Mapping[str, Any]]
) -> list[str]:
    """Describes each difference between an adapter and what was read back, one sentence each."""
    (old, ours), (new, theirs) = before, after
    both = ours.keys() & theirs.keys()
    unequal = sorted(path for path in both if not np.array_equal(ours[path], theirs[path]))
    found = [
        f"{len(paths)} tensors {word}, such as {paths[0]}"
        for word, paths in (
            ("are missing", sorted(ours.keys() - theirs.keys())),
            ("are new", sorted(theirs.keys() - ours.keys())),
            ("are different", unequal),
        )
        if paths
    ]
    fields: dict[str, None] = {}
    for path in both:
        pair = old.owner(path), new.owner(path)
        if pair[0] and pair[1]:
            fields |= dict.fromkeys(_fields(pair[0].method, pair[1].method))
    return found + sorted(fields)


def _fields(old: Any, new: Any) -> list[str]:
    """Describes the fields of a method that differ; the tensors already show its sizes."""
    kind = type(old).__name__
    if type(new) is not type(old):
        return [f"{kind} is read as {type(new).__name__}"]
    pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)]
    return [
        f"{kind}.{name} {was!r} is read as {now!r}" + _BEFORE * ("init" in name)
        for name, was, now in pairs
        if was != now and name not in (*_FREE, *_SIZES)
    ]
