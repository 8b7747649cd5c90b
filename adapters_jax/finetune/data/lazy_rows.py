"""Sequences whose items are made each time that they are asked for, as those of a large file."""

from __future__ import annotations

import bisect
import itertools
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

FEW = 2**14  # items that are taken of a file stay in memory, if they are no more than these


_log = logging.getLogger(__name__)


class Lazy(Sequence[Any]):
    """Some items of a sequence, each made of the original when it is asked for.

    Args:
        source: the items that others are made of.
        rows: the positions of the items in `source`; None is all of them.

    Example:
        >>> doubled = Lazy(range(5), lambda n: 2 * n)
        >>> list(doubled), doubled[-1], doubled.take([3, 1])
        ([0, 2, 4, 6, 8], 8, [6, 2])
    """

    def __init__(
        self, source: Sequence[Any], make: Callable[[Any], Any], rows: Sequence[int] | None = None
    ) -> None:
        self.source, self.make, self.rows = source, make, rows

    def __len__(self) -> int:
        return len(self.source if self.rows is None else self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.make(self.source[index if self.rows is None else self.rows[index]])

    def take(self, rows: Sequence[int]) -> Sequence[Any]:
        """The items at these positions; a few of them as a list."""
        if len(rows) <= FEW:
            return [self[i] for i in rows]
        own = rows if self.rows is None else [self.rows[i] for i in rows]
        return Lazy(self.source, self.make, array("q", own))


def mapped(items: Sequence[Any], make: Callable[[Any], Any]) -> Sequence[Any]:
    """What is made of each item: a list, or `Lazy` for items that are read when they are needed."""
    return [make(item) for item in items] if is_held(items) else Lazy(items, make)


def is_held(items: Any) -> bool:
    """Whether all items are in memory."""
    return isinstance(items, list | tuple)


def watched(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items; of those that are not in memory, messages say how far one is."""
    told = 1
    for number, item in enumerate(items, 1):
        yield item
        if not is_held(items) and number * 10 >= told * len(items):
            _log.info("%s: %d of %d rows", what, number, len(items))
            told += 1


def joined(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The items of several sequences: a list if all of them are lists.

    Example:
        >>> list(joined([range(2), range(5, 7)]))
        [0, 1, 5, 6]
    """
    if all(map(is_held, parts)):
        return [item for part in parts for item in part]
    ends = [*itertools.accumulate(map(len, parts))]

    def item(index: int) -> Any:
        part = bisect.bisect_right(ends, index)
        return parts[part][index - ends[part] + len(parts[part])]

    return Lazy(range(ends[-1]), item)


def taken(values: Sequence[Any], rows: Sequence[int]) -> Sequence[Any]:
    """The values at these positions; none if there are none at any."""
    if isinstance(values, Lazy):
        return values.take(rows)
    return [values[i] for i in rows] if len(values) else []
