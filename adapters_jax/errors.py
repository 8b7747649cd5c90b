"""The library's own errors, and the comparison of two trees that says every difference at once."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something that the caller can put right; the message says how.

    Every error that the library raises on purpose is one, but for a `TypeError` where a function
    is called in a way that it does not have. Whatever else is raised is a bug: of the library, of a
    package below it, or of the model.
    """


class FileSystemError(UserError, OSError):
    """The system refuses to read or write a file: there is none, no permission or no room."""


class MissingPackageError(UserError, ImportError):
    """A package that the library needs for this, and only for this, is not installed."""

    def __init__(self, subject: str, package: str, extra: str = "finetune", instead: str = ""):
        super().__init__(
            f"{subject} needs {package}: pip install 'adapters-jax[{extra}]'"
            + (f", or {instead}" if instead else "")
        )
        self.name = package


class RecipeError(UserError):
    """A recipe that does not fit the model it is used on."""


class TargetError(RecipeError):
    """A pattern that matches nothing, or nothing that its method can attach to."""


class MismatchError(UserError):
    """Two trees of arrays do not fit; the message lists every difference, both ways."""


class AdapterFileError(UserError):
    """The files of an adapter cannot be read, or are not for this model.

    Whatever reading and loading say about the files is an error of this family.
    """


class OtherBaseError(AdapterFileError):
    """The adapter was trained on another base than the one it is to be loaded onto."""


class AdapterMismatchError(AdapterFileError, MismatchError):
    """The tensors of an adapter do not fit the model; the message lists every difference."""


class AdapterRecipeError(AdapterFileError, TargetError):
    """The recipe of an adapter does not fit the model."""


@contextlib.contextmanager
def file_errors(
    path: Path, verb: str = "read", error: type[UserError] = FileSystemError
) -> Iterator[None]:
    """Turns what the system says against a file into an error that names the file.

    Args:
        path: of the file.
        verb: what is done to it, for the message.
        error: what to raise.

    Raises:
        UserError: of the type `error`; a `FileSystemError` has the system's `errno`.

    Example:
        >>> with file_errors(Path("none")):
        ...     open("none")
        Traceback (most recent call last):
        adapters_jax.errors.FileSystemError: none cannot be read: No such file or directory
    """
    try:
        yield
    except OSError as problem:
        if isinstance(problem, UserError):
            raise
        raised = error(f"{path} cannot be {verb}: {problem.strerror or problem}")
        if isinstance(raised, OSError):
            raised.errno = problem.errno
        raise raised from problem


def compare_trees(
    subject: str,
    got: Mapping[str, Any],
    expected: Mapping[str, Any],
    fix: str,
    dtypes: bool = False,
    error: type[MismatchError] = MismatchError,
) -> None:
    """Checks that two flat trees have the same paths and shapes.

    Args:
        subject: what `got` is, for the message.
        got: arrays, or anything with a shape and dtype, by path.
        expected: the same of what was expected.
        fix: what to do about a mismatch.
        dtypes: compare dtypes as well.
        error: what to raise.

    Raises:
        MismatchError: names all missing, unexpected, mis-shaped and mis-typed leaves.
    """

    def kind(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if dtypes else str(list(leaf.shape))

    both = [path for path in expected if path in got]
    differing = [
        f"{path} is {kind(got[path])}, expected {kind(expected[path])}"
        for path in both
        if kind(got[path]) != kind(expected[path])
    ]
    problems = [
        _listed("missing", [path for path in expected if path not in got]),
        _listed("unexpected", [path for path in got if path not in expected]),
        _listed("different", differing),
    ]
    if any(problems):
        raise error(f"{subject} does not fit: {'; '.join(filter(None, problems))}. {fix}")


def _listed(what: str, items: Sequence[str], count: int = 12) -> str:
    """A count and the first items, or nothing."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return f"{len(items)} {what}: {', '.join(items[:count])}{more}" if items else ""


def shortened(text: str, most: int = 300) -> str:
    """A text for a message: its beginning, where it is long.

    Example:
        >>> shortened("a" * 9, 6)
        'aaaaaa... (9 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
