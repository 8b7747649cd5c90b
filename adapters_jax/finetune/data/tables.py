"""Tables: the chosen columns of a file of any format, as text."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from adapters_jax.finetune.data.files import DataError as DataError
from adapters_jax.finetune.data.files import FilePath as FilePath
from adapters_jax.finetune.data.files import (
    Line,
    Rows,
    check_even,
    count_rows,
    place,
    places,
    without_header,
)
from adapters_jax.finetune.data.layouts import hint
from adapters_jax.finetune.data.readers import read_file

Texts = list[tuple[str, str | None]]
_FLAGS = ("text", "label", "prompt", "completion")  # columns that a flag of this name renames


@dataclass(frozen=True)
class Table:
    """The chosen columns of one file, as text.

    Args:
        path: the path of the file, for messages.
        texts: `(text, second text or None)` for each row.
        labels: the label of each row; None if no label column was chosen.
        lines: the line that each row starts on, from 1, or another name of its place.
    """

    path: str
    texts: Texts
    labels: list[str] | None
    lines: list[Line]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Table:
        """The rows with these indices, in the given order."""
        texts, lines = [self.texts[i] for i in rows], [self.lines[i] for i in rows]
        labels = None if self.labels is None else [self.labels[i] for i in rows]
        return Table(self.path, texts, labels, lines)


def read_rows(
    path: FilePath, text: str = "text", text_pair: str | None = None, label: str | None = "label"
) -> Table:
    """Reads chosen columns of a file.

    Args:
        path: the path, as `readers.read_file` takes it.
        text: the text column.
        text_pair: the second text column, for pairs.
        label: the label column; None for texts without labels.

    Returns:
        The table; no text or label in it is empty.

    Raises:
        DataError: there is no such file, its suffix is unknown, it is not UTF-8, a row does not
            parse or has another number of fields, it has no rows, a column is missing, or a text or
            label is empty.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "reviews.csv")
        >>> _ = path.write_text('text,stars\\n"Good, long",5\\nBad,1\\n')
        >>> table = read_rows(path, label="stars")
        >>> table.texts, table.labels, table.lines
        ([('Good, long', None), ('Bad', None)], ['5', '1'], [2, 3])
    """
    path = Path(path)
    return make_table(path, read_file(path), text, text_pair, label)


def make_table(
    path: Path, rows: Rows, text: str, text_pair: str | None, label: str | None
) -> Table:
    """Makes a table of chosen columns; see `read_rows`. `path` is for messages."""
    names = [c for c in (text, text_pair, label) if c is not None]
    cells, lines = choose_columns(path, rows, names)
    texts = [(row[0], None if text_pair is None else row[1]) for row in cells]
    labels = None if label is None else [row[-1].strip() for row in cells]
    return Table(path.as_posix(), texts, labels, lines)


def choose_columns(
    path: Path, rows: Rows, names: Sequence[str]
) -> tuple[list[list[str]], list[Line]]:
    """Chooses columns by name, for a task whose rows are not a `Table`.

    Args:
        path: the path of the file, for messages.
        rows: the rows, as `readers.read_file` returns them.
        names: the names of the columns.

    Returns:
        The cells of each row as texts, one for each name and none blank; and the line of each row.

    Raises:
        DataError: a column is missing or there twice, a cell is blank, or a row has another number
            of fields.

    Example:
        >>> choose_columns(Path("a.csv"), (["q", "r", "s"], [(2, ["x", "y", "z"])]), ["s", "q"])
        ([['z', 'x']], [2])
    """
    values, lines = choose_values(path, rows, names)
    cells = [[cell(value) for value in row] for row in values]
    blank = [line for line, row in zip(lines, cells, strict=True) if not all(map(str.strip, row))]
    if blank:
        nested = next(
            (
                f"; {place(line)} has a {type(value).__name__}, expected a text or a number"
                for line, row in zip(lines, values, strict=True)
                for value in row
                if isinstance(value, list | Mapping)
            ),
            "",
        )
        raise DataError(
            f"{path.as_posix()}: {count_rows(blank)} no {' or '.join(names)}: {places(blank)}; "
            f"fill them in or remove them{nested}"
        )
    return cells, lines


def choose_values(
    path: Path, rows: Rows, names: Sequence[str]
) -> tuple[list[list[Any]], list[Line]]:
    """Chooses columns by name, whose values may be lists and mappings.

    Args:
        path: the path of the file, for messages.
        rows: the rows, as `readers.read_file` returns them.
        names: the names of the columns.

    Returns:
        The values of each row, one for each name; and the line of each row.

    Raises:
        DataError: a column is missing or there twice, or a row has another number of fields.

    Example:
        >>> choose_values(Path("a.jsonl"), (["q", "r"], [(2, [["x", "y"], None])]), ["q"])
        ([[['x', 'y']]], [2])
    """
    header, records = rows
    columns = _columns(path, header, names)
    check_even(path, rows)
    return [[fields[i] for i in columns] for _, fields in records], [line for line, _ in records]


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


def _columns(path: Path, header: list[str], names: Sequence[str]) -> list[int]:
    """The indices of columns by name; raises DataError if one is missing or there twice."""
    twice = [name for name in names if header.count(name) > 1]
    if twice:
        raise DataError(
            f"{path.as_posix()}: the column {twice[0]!r} is there {header.count(twice[0])} times; "
            "rename all of them but one"
        )
    missing = [name for name in names if name not in header]
    if not missing:
        return [header.index(name) for name in names]
    flags = [f"--{name} COLUMN" for name in missing if name in _FLAGS]
    near = [n for name in missing for n in difflib.get_close_matches(name, header, 1, 0.5)]
    raise DataError(
        f"{path.as_posix()}: no column {' or '.join(map(repr, missing))}; the columns are "
        f"{', '.join(header)}"
        + (f"; did you mean {' and '.join(map(repr, near))}?" * bool(near))
        + f"; say which of yours it is: {' '.join(flags)}" * bool(flags)
        + hint(header)
        + without_header(path)
    )


def complete_rows(path: Path, rows: Rows) -> Rows:
    """Leaves out rows that lack a field, with a warning that counts them."""
    header, records = rows
    kept = [r for r in records if len(r[1]) == len(header) and all(f.strip() for f in r[1])]
    if len(kept) < len(records):
        warnings.warn(
            f"{path.as_posix()}: left out {len(records) - len(kept)} of {len(records)} rows that "
            "lack a field",
            stacklevel=3,
        )
    return header, kept
