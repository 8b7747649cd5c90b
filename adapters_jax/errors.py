"""The library's own errors, and the comparison of two trees that says every difference at once."""

from collections.abc import Mapping, Sequence
from typing import Any


class RecipeError(ValueError):
    """A recipe that does not fit the model it is used on."""


class TargetError(RecipeError):
    """A pattern that matches nothing, or nothing that its method can attach to."""


class MismatchError(ValueError):
    """Two trees of arrays do not fit; the message lists every difference, both ways."""


class AdapterFileError(ValueError):
    """The files of an adapter cannot be read, or are not for this model.

    Whatever reading and loading say about the files is an error of this family.
    """


class OtherBaseError(AdapterFileError):
    """The adapter was trained on another base than the one it is to be loaded onto."""


class AdapterMismatchError(AdapterFileError, MismatchError):
    """The tensors of an adapter do not fit the model; the message lists every difference."""


class AdapterRecipeError(AdapterFileError, TargetError):
    """The recipe of an adapter does not fit the model."""


def compare_trees(
    subject: str,
    got: Mapping[str, Any],
    wanted: Mapping[str, Any],
    fix: str,
    dtypes: bool = False,
    error: type[MismatchError] = MismatchError,
) -> None:
    """Checks that two flat trees have the same paths and shapes.

    Args:
        subject: what `got` is, for the message.
        got: arrays, or anything with a shape and dtype, by path.
        wanted: the same of what was wanted.
        fix: what to do about a mismatch.
        dtypes: compare dtypes as well.
        error: what to raise.

    Raises:
        MismatchError: names all missing, unexpected, mis-shaped and mis-typed leaves.
    """

    def kind(leaf: Any) -> str:
        return f"{leaf.dtype}{list(leaf.shape)}" if dtypes else str(list(leaf.shape))

    both = [path for path in wanted if path in got]
    differing = [
        f"{path} is {kind(got[path])}, wanted {kind(wanted[path])}"
        for path in both
        if kind(got[path]) != kind(wanted[path])
    ]
    problems = [
        _listed("missing", [path for path in wanted if path not in got]),
        _listed("unexpected", [path for path in got if path not in wanted]),
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
