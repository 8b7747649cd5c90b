"""Reads files as rows of fields; a registry has the formats by suffix.

A format is one function and one line of `READERS`. The function gets the file's bytes, unpacked if
`.gz` follows the suffix, and returns `Rows`. Anything wrong with a file raises a `DataError` that
names the file, the line and the remedy.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters_jax.errors import UserError

FilePath = str | os.PathLike[str]
Record = tuple[int, list[str]]  # the line that it starts on, its fields
Rows = tuple[list[str], list[Record]]  # column names, records
Reader = Callable[[Path, bytes], Rows]


class DataError(UserError):
    """A file cannot be used as it is; the message says where and what to change."""


def read_file(path: FilePath) -> Rows:
    """Reads the rows of a file, in the format of its suffix.

    Args:
        path: the path of the file; `.gz` may follow the suffix.

    Returns:
        The names of the columns, and each record with the line that it starts on.

    Raises:
        DataError: there is no such file, `READERS` lacks its suffix, or it does not parse.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.tsv")
        >>> _ = path.write_text("text\\tstars\\nGood\\t5\\n")
        >>> read_file(path)
        (['text', 'stars'], [(2, ['Good', '5'])])
    """
    path = Path(path)
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in READERS:
        *others, last = READERS
        raise DataError(
            f"{path.as_posix()}: unknown suffix {suffix!r}; use {', '.join(others)} or {last}, or "
            "one of them with .gz"
        )
    return READERS[suffix](path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Reads a file, unpacked if it ends in `.gz`; raises DataError if it cannot be read."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"{path.as_posix()}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.as_posix()}: cannot be read: {error}") from None


def text_of(path: Path, raw: bytes) -> str:
    """Decodes UTF-8, without a byte order mark and final line ends; `path` is for messages."""
    name = path.as_posix()
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


def read_csv(path: Path, raw: bytes) -> Rows:
    """Reads the rows of a CSV file, in which quotes enclose fields."""
    reader = csv.reader(io.StringIO(text_of(path, raw), newline=""), strict=True)
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


def read_tsv(path: Path, raw: bytes, header: Sequence[str] | None = None) -> Rows:
    """Reads the rows of a TSV file; quotes are plain text. `header` is for files without one."""
    lines = text_of(path, raw).split("\n")
    records = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(lines, 1)]
    return _headed(path, records, header)


def read_jsonl(path: Path, raw: bytes) -> Rows:
    """Reads the rows of a file with one JSON object a line; each key of a line is a column."""
    rows = []
    for number, line in enumerate(text_of(path, raw).split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is valid JSON, not text
        except (ValueError, RecursionError) as error:  # the latter of deep nesting
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
    """A JSON value as text; null, lists and objects become an empty field."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int | float) else ""


def _headed(path: Path, records: list[Record], header: Sequence[str] | None = None) -> Rows:
    """Splits the header from the records; a blank line becomes a record of blank fields."""
    if header is None:
        header, records = records[0][1], records[1:]
    if not records:
        raise DataError(f"{path.as_posix()}: no rows below the header")
    blank = [""] * len(header)
    return list(header), [(n, fields if any(fields) else blank) for n, fields in records]


READERS: dict[str, Reader] = {".csv": read_csv, ".tsv": read_tsv, ".jsonl": read_jsonl}
