"""Files as rows of fields: a registry of formats by suffix.

A format is one function and one line of `READERS`. The function gets the file's bytes, unpacked
where `.gz` follows the suffix, and returns `Rows`. Whatever is wrong with a file is one `DataError`
that names the file, the line and the remedy.
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
Record = tuple[int, list[str]]  # the line it starts on, its fields
Rows = tuple[list[str], list[Record]]  # column names, records
Reader = Callable[[Path, bytes], Rows]


class DataError(UserError):
    """A file cannot be used as it is; the message says where and what to change."""


def read_file(path: FilePath) -> Rows:
    """The rows of a file, read as its suffix says.

    Args:
        path: of the file; `.gz` may follow the suffix.

    Returns:
        The names of the columns, and each record with the line that it starts on.

    Raises:
        DataError: no file, a suffix that `READERS` lacks, or a file that does not parse.

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
    """A file's bytes, unpacked where it ends in `.gz`; raises DataError where there are none."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"{path.as_posix()}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.as_posix()}: cannot be read: {error}") from None


def text_of(path: Path, raw: bytes) -> str:
    """A file's bytes as text, without a byte order mark and blank lines at the end."""
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
    """A CSV file's rows, quoted as usual."""
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
    """A TSV file's rows, in which a quote is a quote; with a header where the file has none."""
    lines = text_of(path, raw).split("\n")
    records = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(lines, 1)]
    return _headed(path, records, header)


def read_jsonl(path: Path, raw: bytes) -> Rows:
    """The rows of a file of one JSON object a line; a key of any line is a column."""
    rows = []
    for number, line in enumerate(text_of(path, raw).split("\n"), 1):
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


READERS: dict[str, Reader] = {".csv": read_csv, ".tsv": read_tsv, ".jsonl": read_jsonl}
