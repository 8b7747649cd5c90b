"""What is in rows: their layout, columns, lengths, labels and duplicates."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple, Self

from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.images import IMAGE, home_of
from adapters_jax.finetune.data.layouts import Layout, layout_of
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.data.tables import Texts, cell

MOST_LABELS = 50  # distinct values of a column that are counted one by one
_BINS = 10


class Lengths(NamedTuple):
    """The lengths of rows.

    Attributes:
        histogram: the first and the last length of each bin, and the number of rows in it.
    """

    least: int
    median: int
    most: int
    total: int
    histogram: list[tuple[int, int, int]]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        """The summary of some lengths, at least one.

        Example:
            >>> Lengths.of([1, 2, 2, 25])
            Lengths(least=1, median=2, most=25, total=30, histogram=[(1, 3, 3), ..., (25, 27, 1)])
        """
        least, most = min(lengths), max(lengths)
        width = -(-(most - least + 1) // _BINS)
        counts = Counter((length - least) // width for length in lengths)
        firsts = range(least, most + 1, width)
        bins = [(first, first + width - 1, counts[i]) for i, first in enumerate(firsts)]
        return cls(least, median_low(lengths), most, sum(lengths), bins)


class Column(NamedTuple):
    """One column.

    Attributes:
        kinds: the types of its values, the most frequent first.
        blank: the number of rows without a value.
        distinct: the number of different values.
        lengths: the lengths of its texts in characters, of its lists in items; None for numbers.
    """

    name: str
    kinds: list[str]
    blank: int
    distinct: int
    lengths: Lengths | None


@dataclass(frozen=True)
class Summary:
    """What is in rows; `summarize` makes it.

    Attributes:
        layout: their layout; None if it is not known.
        lengths: the number of characters in each row, of what a model reads.
        labels: for each column of a few values, how often each one comes, the most frequent first.
        duplicates: the number of rows that are equal to an earlier one, but for case and spacing.
    """

    rows: int
    layout: Layout | None
    columns: list[Column]
    lengths: Lengths
    labels: dict[str, dict[str, int]]
    duplicates: int

    def to_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        layout = self.layout._asdict() if self.layout else None
        columns = [
            {**c._asdict(), "lengths": c.lengths and c.lengths._asdict()} for c in self.columns
        ]
        own = {"layout": layout, "columns": columns, "lengths": self.lengths._asdict()}
        return {**vars(self), **own}


def summarize(rows: Rows, label: str | None = None) -> Summary:
    """Counts what is in rows.

    Args:
        rows: the rows, as `readers.read_file` returns them.
        label: a column whose values count as labels, however many there are.

    Example:
        >>> values = [["Good", 1], ["Bad", 0], ["Good", 1], ["Fine", 1]]
        >>> found = summarize(Rows(["text", "label"], list(enumerate(values, 2))))
        >>> found.layout.name, found.duplicates, found.labels
        ('text/label', 1, {'label': {'1': 3, '0': 1}})
    """
    header, records, _ = rows
    columns = {name: [values[i] for _, values in records] for i, name in enumerate(header)}
    keys = Counter(_key(values) for _, values in records)
    labels = {name: _labels(values, name == label) for name, values in columns.items()}
    return Summary(
        len(records),
        layout_of(header),
        [_column(name, values) for name, values in columns.items()],
        Lengths.of([sum(map(len, texts)) for texts in _inputs(rows)]),
        {name: counts for name, counts in labels.items() if counts},
        len(records) - len(keys),
    )


def inputs_of(rows: Rows) -> Texts:
    """What a model reads in each row, to find equal rows: of an unknown layout the whole row.

    Images are named from where the rows are: directories have the same names for other images.

    Example:
        >>> inputs_of(Rows(["label", "text"], [(1, ["no", "A film"])]))
        [('A film', None)]
    """
    layout, texts = layout_of(rows.header), ["\t".join(each) for each in _inputs(rows)]
    if layout is not None and IMAGE in layout.inputs:
        home = home_of(Path(rows.path).absolute())
        texts = [(home / path).as_posix() for path in texts]
    return [(text, None) for text in texts]


def _inputs(rows: Rows) -> list[list[str]]:
    header, records, _ = rows
    layout = layout_of(header)
    chosen = [i for i, name in enumerate(header) if layout is None or name in layout.inputs]
    return [list(_texts([values[i] for i in chosen])) for _, values in records]


def _key(values: Sequence[Any]) -> str:
    return key_of(json.dumps(values, default=str, ensure_ascii=False))


def _column(name: str, values: Sequence[Any]) -> Column:
    types = [type(value) for value in values if not _blank(value)]
    kinds = Counter(_KINDS.get(each, each.__name__) for each in types)
    sized = [len(value) for value in values if isinstance(value, str | list | Mapping)]
    return Column(
        name,
        [kind for kind, _ in kinds.most_common()],
        sum(map(_blank, values)),
        len({_key([value]) for value in values}),
        Lengths.of(sized) if sized else None,
    )


_KINDS = {str: "text", bool: "truth value", int: "number", float: "number"}
_KINDS |= {list: "list", dict: "object"}


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _labels(values: Sequence[Any], named: bool) -> dict[str, int]:
    """How often each value of a column of labels or lists of labels comes; else nothing."""
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    counts = Counter(text for text in map(cell, items) if text.strip())
    few = len(counts) <= min(MOST_LABELS, len(items) // 2)
    likely = few and all(isinstance(item, str | int | None) for item in items)
    return dict(counts.most_common()) if named or likely else {}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, however deep, but for the roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from () if key in ("role", "from") else _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif value is not None:
        yield str(value)
