"""The library's own errors, and the comparison of two trees that says every difference at once."""

from collections.abc import Mapping, Sequence
from typing import Any


class RecipeError(ValueError):
    """A recipe that does not fit the model it is used on."""


class TargetError(RecipeError):
    """A pattern that matches nothing, or nothing that its method can attach to."""


class MismatchError(ValueError):
    """Two trees of arrays do not fit; the message lists every difference, both ways."""


def compare_trees(
    subject: str, got: Mapping[str, Any], wanted: Mapping[str, Any], fix: str, dtypes: bool = False
) -> None:
    """Checks that two flat trees have the same paths and shapes.

    Args:
        subject: what `got` is, for the message.
        got: arrays, or anything with a shape and dtype, by path.
        wanted: the same of what was wanted.
        fix: what to do about a mismatch.
        dtypes: compare dtypes as well.

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
        raise MismatchError(f"{subject} does not fit: {'; '.join(filter(None, problems))}. {fix}")


def _listed(what: str, items: Sequence[str], count: int = 12) -> str:
    """A count and the first items, or nothing."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return f"{len(items)} {what}: {', '.join(items[:count])}{more}" if items else ""
