"""Rows of text from files: CSV, TSV and JSON lines become a `Table`.

Whatever is wrong with a file is one `DataError` that names the file, the lines and the remedy.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_jax.errors import UserError

FilePath = str | os.PathLike[str]
Texts = list[tuple[str, str | None]]
Record = tuple[int, list[str]]  # the line it starts on, its fields
Rows = tuple[list[str], list[Record]]  # column names, records


class DataError(UserError):
    """A file cannot be used as it is; the message says where and what to change."""


@dataclass(frozen=True)
class Table:
    """The chosen columns of one file, as text.

    Args:
        path: of the file, for messages.
        texts: `(text, second text or None)` of each row.
        labels: of each row, or None if no label column was asked for.
        lines: the line each row starts on, from 1.
    """

    path: str
    texts: Texts
    labels: list[str] | None
    lines: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Table:
        """The rows of these numbers, in their order."""
        texts, lines = [self.texts[i] for i in rows], [self.lines[i] for i in rows]
        labels = None if self.labels is None else [self.labels[i] for i in rows]
        return Table(self.path, texts, labels, lines)


def read_rows(
    path: FilePath, text: str = "text", text_pair: str | None = None, label: str | None = "label"
) -> Table:
    """Named columns of a CSV, TSV or JSON lines file, by its suffix; `.gz` may follow.

    CSV is quoted as usual and TSV is not at all: a quote in a TSV file is a quote.

    Args:
        path: of the file, UTF-8.
        text: the text column.
        text_pair: the second text column, for pairs.
        label: the label column; None for texts without labels.

    Returns:
        The table, every text and label of which has something in it.

    Raises:
        DataError: no file, an unknown suffix, bytes that are not UTF-8, rows that do not parse or
            have another number of fields, no rows, a missing column, an empty text or label.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "reviews.csv")
        >>> _ = path.write_text('text,stars\\n"Good, long",5\\nBad,1\\n')
        >>> table = read_rows(path, label="stars")
        >>> table.texts, table.labels, table.lines
        ([('Good, long', None), ('Bad', None)], ['5', '1'], [2, 3])
    """
    path = Path(path)
    return make_table(path, _records(path), text, text_pair, label)


def make_table(
    path: Path, rows: Rows, text: str, text_pair: str | None, label: str | None
) -> Table:
    """Named columns of rows that were read; see `read_rows`."""
    header, records = rows
    names = [c for c in (text, text_pair, label) if c is not None]
    places = _places(path, header, names)
    uneven = [
        f"line {line} has {len(fields)}" for line, fields in records if len(fields) != len(header)
    ]
    if uneven:
        raise DataError(
            f"{path.as_posix()}: {count_rows(uneven)} another number of fields than the "
            f"{len(header)} columns: {first_few(uneven)}; "
            "a CSV field with a comma in it needs quotes"
        )
    blank = [str(line) for line, fields in records if not all(fields[i].strip() for i in places)]
    if blank:
        raise DataError(
            f"{path.as_posix()}: {count_rows(blank)} no {' or '.join(names)}: "
            f"line{'s' * (len(blank) > 1)} {first_few(blank)}; fill them in or remove them"
        )
    cells = [[fields[i] for i in places] for _, fields in records]
    texts = [(row[0], None if text_pair is None else row[1]) for row in cells]
    labels = None if label is None else [row[-1].strip() for row in cells]
    return Table(path.as_posix(), texts, labels, [line for line, _ in records])


def _places(path: Path, header: list[str], names: list[str]) -> list[int]:
    missing = [name for name in names if name not in header]
    if not missing:
        return [header.index(name) for name in names]
    near = [n for name in missing for n in difflib.get_close_matches(name, header, 1, 0.5)]
    raise DataError(
        f"{path.as_posix()}: no column {' or '.join(map(repr, missing))}; the columns are "
        f"{', '.join(header)}" + (f"; did you mean {' and '.join(map(repr, near))}?" * bool(near))
    )


def _records(path: Path) -> Rows:
    readers = {".csv": _csv, ".tsv": tsv_rows, ".jsonl": _jsonl}
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in readers:
        raise DataError(
            f"{path.as_posix()}: unknown suffix {suffix!r}; use .csv, .tsv or .jsonl, or one of "
            "them with .gz"
        )
    return readers[suffix](path)


def _csv(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_read(path), newline=""), strict=True)
    records, line = [], 1
    try:
        for fields in reader:
            records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.as_posix()}, line {line}: {error}; check the quotes of this row"
        ) from None
    return _headed(path, records)


def tsv_rows(path: Path, header: Sequence[str] | None = None) -> Rows:
    """A TSV file's rows, with a header given where the file has none."""
    lines = _read(path).split("\n")
    records = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(lines, 1)]
    return _headed(path, records, header)


def _jsonl(path: Path) -> Rows:
    rows = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is valid JSON, not text
        except ValueError as error:
            raise DataError(f"{path.as_posix()}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path.as_posix()}, line {number}: a JSON {type(row).__name__}; each line must be "
                'an object like {"text": "...", "label": "..."}'
            )
        rows.append(row)
    header = list(dict.fromkeys(key for row in rows for key in row))
    return _headed(
        path,
        [(n, [_cell(row.get(key)) for key in header]) for n, row in enumerate(rows, 1)],
        header,
    )


def _cell(value: object) -> str:
    """A JSON value as text; null, lists and objects are neither text nor label."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int | float) else ""


def _headed(path: Path, records: list[Record], header: Sequence[str] | None = None) -> Rows:
    """Column names and rows; a blank line becomes a row of blank fields."""
    if header is None:
        header, records = records[0][1], records[1:]
    if not records:
        raise DataError(f"{path.as_posix()}: no rows below the header")
    blank = [""] * len(header)
    return list(header), [(n, fields if any(fields) else blank) for n, fields in records]


def complete_rows(path: Path, rows: Rows) -> Rows:
    """The rows that have every field, with a warning that counts the others."""
    header, records = rows
    kept = [r for r in records if len(r[1]) == len(header) and all(f.strip() for f in r[1])]
    if len(kept) < len(records):
        warnings.warn(
            f"{path.as_posix()}: left out {len(records) - len(kept)} of {len(records)} rows that "
            "lack a field",
            stacklevel=3,
        )
    return header, kept


def _read(path: Path) -> str:
    """The file as text, without a byte order mark and blank lines at the end."""
    name = path.as_posix()
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}") from None
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} of the "
            "file is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{name}: the file is empty")
    return text.rstrip("\r\n")


def count_rows(items: Sequence[str]) -> str:
    """Their number with its verb, to begin a sentence."""
    return "1 row has" if len(items) == 1 else f"{len(items)} rows have"


def first_few(items: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(items[:5]) + f" and {len(items) - 5} more" * (len(items) > 5)
