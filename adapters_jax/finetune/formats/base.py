"""What an adapter format is, and what the implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.files.untrusted import open_tensors
from adapters_jax.finetune.base_model import BaseModel
from adapters_jax.recipe import Recipe

HEAD = "head/"  # the paths of a head's leaves begin with it


@dataclass(frozen=True)
class Head:
    """The classification head in an adapter's files.

    Attributes:
        width: the number of its outputs.
        pooling: what it reads: "pooler", "cls", "mean" or "tokens"; None if the files do not tell.
    """

    width: int
    pooling: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter to be written.

    Attributes:
        recipe: its recipe.
        leaves: the trained leaves by path.
        name: the adapter's name, for formats that store one.
        labels: the names of its head's classes.
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
            base: the adapter's base.
            leaves: the trained leaves by path.
            shown: the base's name without directories of this machine.
            name: the adapter's directory or id.
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


def has_head(leaves: Mapping[str, Any]) -> bool:
    """Whether the trained leaves have an encoder's head."""
    return any(path.startswith(HEAD) for path in leaves)


def shape_in(path: Path, pattern: Any) -> tuple[int, ...] | None:
    """The shape of the last tensor whose name matches a regular expression, if the file has one."""
    if not path.exists():
        return None
    with open_tensors(path) as file:
        found = sorted(key for key in file.shapes if pattern.fullmatch(key))
        return tuple(file.shapes[found[-1]].shape) if found else None


def pooling_problem(base: BaseModel, owner: str, poolings: Sequence[str]) -> str:
    """Why a library has no head with the base's pooling; empty if it has one."""
    if base.pooling is None:
        return "the pooling of its head is unknown: add --pooling pooler, cls or mean"
    if base.pooling not in poolings:
        problem = f"its head reads {base.pooling}, but {owner}'s heads read {' or '.join(poolings)}"
        pooled = base.pooling in ("mean", "cls")  # others are those of a task, not chosen
        return f"{problem}: train with --pooling pooler to keep it" if pooled else problem
    return ""
