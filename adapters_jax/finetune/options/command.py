"""What every command is: a frozen dataclass whose fields are its flags."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from adapters_jax.finetune.console import Console


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command of the command line; its docstring and `examples` are its help.

    What the work needs is imported in its methods, so that a help is there before jax is.

    Args:
        json: print JSON on stdout; everything else goes to stderr.

    Attributes:
        examples: command lines for the help.
        positional: the fields that are given without a flag.
        groups: the headings of flags in the help; others are named after their dataclass.
        addresses: the fields of paths that may be addresses in an object store.
        needs_jax: whether jax is imported, which takes seconds and is announced.
    """

    examples: ClassVar[str]
    positional: ClassVar[tuple[str, ...]] = ()
    addresses: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"Every command": ("json",)}
    needs_jax: ClassVar[Any] = True
    json: bool = False

    @abstractmethod
    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads and checks everything that the user gave; returns a function that does the work.

        Raises:
            UserError: flags, files, a run or an adapter cannot be used, which `main` prints in one
                line; the subclass says what is wrong, such as RunError, DataError or RecipeError.
            AssetError: a pinned model or data set could not be fetched.
            FileSystemError: a directory cannot be made.
        """
