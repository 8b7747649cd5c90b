"""Tables: the chosen columns of a file of any format, as text."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from adapters_jax.finetune.data.files import DataError as DataError
from adapters_jax.finetune.data.files import FilePath as FilePath
from adapters_jax.finetune.data.files import (
    Line,
    Rows,
    count_rows,
    place,
    places,
    together,
    without_header,
)
from adapters_jax.finetune.data.layouts import hint
from adapters_jax.finetune.data.lazy_rows import Lazy, joined, mapped, taken, watched
from adapters_jax.finetune.data.readers import read_file

Texts = list[tuple[str, str | None]]
_FLAGS = ("text", "label", "prompt", "completion")  # columns that a flag of this name renames


@dataclass(frozen=True)
class Table:
    """The texts of rows, and what is learnt from them.

    Args:
        texts: the texts of each row, all that is needed to predict it: `(text, second text or
            None)`, or as many as a task reads.
        labels: the label of each row: texts, or what a task makes of them, such as int32 class ids
            or float32 numbers, `(rows,)`; None if no label column was chosen.
        label_names: the names of the classes, in the order of their ids; empty for other labels.
        lines: the line that each row starts on, from 1, or another name of its place.
        sources: of rows of several files, the number of each row's file.
    """

    texts: Any
    labels: Any = None
    label_names: tuple[str, ...] = ()
    path: str = ""
    lines: Sequence[Line] = ()
    sources: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Self:
        """The rows with these indices, in the given order."""
        texts = taken(self.texts, rows)
        lines, sources = taken(self.lines, rows), taken(self.sources, rows)
        # An array by its attribute: importing numpy would slow down commands that need none.
        ids = hasattr(self.labels, "dtype")
        labels = self.labels[[*rows]] if ids else self.labels and [self.labels[i] for i in rows]
        return replace(self, texts=texts, labels=labels, lines=lines, sources=sources)

    @property
    def streamed(self) -> bool:
        """Whether the texts are read from their file as they are needed."""
        return isinstance(self.texts, Lazy)

    def joined(self, others: Sequence[Self]) -> Self:
        """These rows and those of other files after them, whose labels are lists, too."""
        every = [self, *others]
        texts = joined([each.texts for each in every])
        labels = self.labels and [label for each in every for label in each.labels]
        return replace(self, texts=texts, labels=labels, **together(every))


def read_rows(
    path: FilePath | Rows,
    text: str = "text",
    text_pair: str | None = None,
    label: str | None = "label",
) -> Table:
    """Reads chosen columns of a file.

    Args:
        path: the path, as `readers.read_file` takes it.
        text_pair: the second text column, for pairs.
        label: the label column; None for texts without labels.

    Returns:
        The table; no text or label in it is empty.

    Raises:
        DataError: as for `readers.read_file`, or a column is missing, or a text or label is empty.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "reviews.csv")
        >>> _ = path.write_text('text,stars\\n"Good, long",5\\nBad,1\\n')
        >>> table = read_rows(path, label="stars")
        >>> table.texts, table.labels, table.lines
        ([('Good, long', None), ('Bad', None)], ['5', '1'], [2, 3])
    """
    rows = read_file(path)
    names = [c for c in (text, text_pair, label) if c is not None]
    cells, lines = choose_columns(rows, names)
    texts = mapped(cells, lambda row: (row[0], None if text_pair is None else row[1]))
    known: dict[str, str] = {}  # of a large file, an equal label is one text
    last = (row[-1].strip() for row in cells)
    labels = None if label is None else [known.setdefault(x, x) for x in last]
    return Table(texts, labels, (), rows.path, lines)


def choose_columns(rows: Rows, names: Sequence[str]) -> tuple[Sequence[list[str]], Sequence[Line]]:
    """Chooses columns by name, whose values become texts; see `choose_values`.

    Returns:
        The cells of each row as texts, one for each name and none blank; and the line of each row.

    Raises:
        DataError: a column is missing or there twice, or a cell is blank.

    Example:
        >>> choose_columns(Rows(["q", "r", "s"], [(2, ["x", "y", "z"])]), ["s", "q"])
        ([['z', 'x']], [2])
    """
    values, lines = choose_values(rows, names)
    cells = mapped(values, lambda row: [cell(value) for value in row])
    every = zip(lines, watched(cells, rows.path), strict=True)
    blank = [line for line, row in every if not all(map(str.strip, row))]
    if blank:
        nested = next(
            (
                f"; {place(line)} has a {type(value).__name__}, expected a text or a number"
                f"{_MESSAGES * _is_messages(value)}"
                for line, row in zip(lines, values, strict=True)
                for value in row
                if isinstance(value, list | Mapping)
            ),
            "",
        )
        raise DataError(
            f"{rows.path}: {count_rows(blank)} no {' or '.join(names)}: {places(blank)}; "
            f"fill them in or remove them{nested}"
        )
    return cells, lines


_MESSAGES = "; put the messages of both, in this order, into one column called messages"


def _is_messages(value: Any) -> bool:
    """Whether it is a list of a conversation's messages, which TRL has as prompt and completion."""
    return isinstance(value, list) and all(isinstance(x, Mapping) and "role" in x for x in value)


def choose_values(rows: Rows, names: Sequence[str]) -> tuple[Sequence[list[Any]], Sequence[Line]]:
    """Chooses columns by name, whose values may be lists and mappings.

    Returns:
        The values of each row, one for each name; and the line of each row.

    Raises:
        DataError: a column is missing or there twice.

    Example:
        >>> choose_values(Rows(["q", "r"], [(2, [["x", "y"], None])]), ["q"])
        ([[['x', 'y']]], [2])
    """
    columns = _columns(rows, names)
    return mapped(rows.records, lambda record: [record[1][i] for i in columns]), rows.lines


def cell(value: Any) -> str:
    """A value as text; None, lists and mappings have none.

    Example:
        >>> cell("a"), cell(1.5), cell(True), cell(None), cell(["a"])
        ('a', '1.5', 'true', '', '')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, date | time | Decimal):
        return str(value)
    return json.dumps(value) if isinstance(value, int | float) else ""


def items_of(value: Any, separator: str | None = None) -> list[str]:
    """The items of a list, or of a text that is split; None has none.

    Example:
        >>> items_of(["a", 1]), items_of("a b"), items_of("a|", "|"), items_of(None)
        (['a', '1'], ['a', 'b'], ['a'], [])
    """
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else cell(value).split(separator)
    return [text for text in (cell(item).strip(" ") for item in items) if text or separator is None]


def _columns(rows: Rows, names: Sequence[str]) -> list[int]:
    """The indices of columns by name; raises DataError if one is missing or there twice."""
    header = rows.header
    twice = [name for name in names if header.count(name) > 1]
    if twice:
        raise DataError(
            f"{rows.path}: the column {twice[0]!r} is there {header.count(twice[0])} times; "
            "rename all of them but one"
        )
    missing = [name for name in names if name not in header]
    if not missing:
        return [header.index(name) for name in names]
    flags = [f"--{name} COLUMN" for name in missing if name in _FLAGS]
    near = [n for name in missing for n in difflib.get_close_matches(name, header, 1, 0.5)]
    raise DataError(
        f"{rows.path}: no column {' or '.join(map(repr, missing))}; the columns are "
        f"{', '.join(header)}"
        + (f"; did you mean {' and '.join(map(repr, near))}?" * bool(near))
        + f"; say which of yours it is: {' '.join(flags)}" * bool(flags)
        + hint(header)
        + without_header(Path(rows.path))
    )
