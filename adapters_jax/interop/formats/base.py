"""What a format of adapters is: the protocol that each of them has a class for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters_jax.interop.base_model import BaseModel
from adapters_jax.io.tensors import open_tensors
from adapters_jax.recipe import Recipe

CONFIG = "adapter_config.json"  # the one name that all formats have
HEAD = "head/"  # what the paths of a head's leaves begin with


@dataclass(frozen=True)
class Head:
    """The head that an adapter has with it.

    Attributes:
        width: its outputs.
        pooling: what it reads; None where the files do not say.
    """

    width: int
    pooling: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read, to be written.

    Attributes:
        recipe: what trains.
        leaves: what was trained, by path.
        name: of the adapter, where a format has a place for it.
        labels: the names of its head's classes.
        beside: further texts by file name, such as the model card.
    """

    recipe: Recipe
    leaves: Mapping[str, Any]
    name: str = "adapter"
    labels: Sequence[str] = ()
    beside: Mapping[str, str] | None = None


class AdapterFormat(Protocol):
    """One library's files of adapters.

    Attributes:
        name: as commands have it.
        owner: the library, for people.
        library: the library, as the Hub names it in a card.
        files: every file that the format has.
        names_classes: whether its files name the classes of a head.
    """

    name: str
    owner: str
    library: str
    files: tuple[str, ...]
    names_classes: bool

    def detects(self, values: Mapping[str, Any]) -> bool:
        """Whether a directory is of this format, by what its `adapter_config.json` holds."""

    def base_name(self, directory: Path) -> str | None:
        """What an adapter's own files call its base; None where they do not say."""

    def head(self, directory: Path, inside: str) -> Head | None:
        """The head that is with an adapter; `inside` is the module that has a classifier's base."""

    def read(self, directory: Path, base: BaseModel) -> tuple[Recipe, dict[str, Any]]:
        """The recipe, and the trained leaves by path; raises AdapterFileError for bad files."""

    def write(self, directory: Path, adapter: Adapter, base: BaseModel) -> None:
        """Writes a directory, which appears whole or not at all.

        Raises:
            ValueError: the format has no such thing, or the directory holds something.
        """

    def head_problem(self, base: BaseModel) -> str:
        """Why a head would read something else in this library; empty where it would not."""

    def loading(self, base: BaseModel, leaves: Mapping[str, Any], shown: str, name: str) -> str:
        """Python that loads an adapter, in three lines.

        Args:
            base: its base.
            leaves: what was trained.
            shown: the base's name, for people who do not have this machine's directories.
            name: the adapter's directory or id.
        """


def has_head(leaves: Mapping[str, Any]) -> bool:
    """Whether an encoder's head is among trained leaves."""
    return any(path.startswith(HEAD) for path in leaves)


def shape_in(path: Path, pattern: Any) -> tuple[int, ...] | None:
    """The shape of the last tensor of a file whose name a regular expression means, if any."""
    if not path.exists():
        return None
    with open_tensors(path) as file:
        found = sorted(key for key in file.shapes if pattern.fullmatch(key))
        return tuple(file.shapes[found[-1]].shape) if found else None


def pooling_problem(base: BaseModel, owner: str, poolings: Sequence[str]) -> str:
    """Why a head that reads what this one reads is none of a library's; empty where it is."""
    if base.pooling is None:
        return "nothing says what its head reads: add --pooling pooler, cls or mean"
    if base.pooling not in poolings:
        return f"its head reads {base.pooling}, and {owner}'s {' or '.join(poolings)}"
    return ""
