"""Files as bytes and texts, and what every reader of rows returns.

A row is a list of values, one for each column: texts, numbers, None, lists and mappings, as in
JSON. `tables` makes texts of the columns that a task reads. `Rows.of` is where rows get their path
and are found to be uneven; `refuse` lists rows that cannot be used.
"""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

from adapters_jax.errors import UserError, first_few

FilePath = str | os.PathLike[str]
Line = int | str  # the line that a row starts on; a text for formats without lines, as "row 3"
Record = tuple[Line, list[Any]]  # the line, the values
Found = tuple[list[str], list[Record]]  # column names, records
Row = TypeVar("Row")
Reader = Callable[[Path, bytes], Found]

NAMED = "#"  # behind the path of a file without a header, before the names of its columns
MOST_UNPACKED = 2**30  # bytes that a .gz file may hold; a bomb of 1 MB holds as many
_CHUNK = 2**20
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


class Rows(NamedTuple):
    """The rows of a file of any format.

    Attributes:
        header: the names of the columns.
        records: the place of each row, and its values.
        path: the path of the file, for messages.
    """

    header: list[str]
    records: list[Record]
    path: str = ""

    @classmethod
    def of(cls, path: FilePath, header: list[str], records: list[Record]) -> Self:
        """Rows that have as many values as there are columns, or else raises DataError."""
        uneven = [
            f"{place(line)} has {len(fields)}"
            for line, fields in records
            if len(fields) != len(header)
        ]
        name = Path(path).as_posix()
        refuse(
            name,
            uneven,
            f"expected {len(header)} fields, but {count_rows(uneven)} another number: ",
            "; a CSV field with a comma in it needs quotes",
        )
        return cls(header, records, name)


@dataclass(frozen=True)
class PlacedRows(Generic[Row]):
    """The rows of one file, which know their places.

    Attributes:
        path: the path of the file, for messages.
        rows: the rows.
        lines: the line that each of them starts on, or another name of its place.
    """

    path: str
    rows: list[Row]
    lines: list[Line]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Self:
        """The rows with these indices, in the given order."""
        return replace(self, rows=[self.rows[i] for i in rows], lines=[self.lines[i] for i in rows])

    @classmethod
    def of(cls, rows: Rows, make: Callable[[Mapping[str, Any]], Row], what: str) -> Self:
        """Makes each row of its values by column.

        Args:
            rows: the rows of a file.
            make: makes one, or raises RowError, or ValueError for a text that is not JSON.
            what: the name of such rows, for messages.

        Raises:
            DataError: rows cannot be made; the message lists them.
        """
        found, lines, problems = list[Row](), list[Line](), []
        for line, values in rows.records:
            try:
                found.append(make(dict(zip(rows.header, values, strict=True))))
                lines.append(line)
            except RowError as error:
                problems.append(f"{place(line)}: {error}")
            except ValueError as error:
                problems.append(f"{place(line)}: not JSON: {error}")
        refuse(
            rows.path,
            problems,
            f"{len(problems)} of {len(rows.records)} {what} cannot be learnt; ",
            "; correct or remove them",
        )
        return cls(rows.path, found, lines)


class RowError(Exception):
    """A row cannot be used; the message says what is wrong with it, and not where it is."""


class DataError(UserError):
    """A file cannot be used as it is; the message says where and what to change."""


def read_whole(path: Path) -> bytes:
    """Reads an ordinary file; raises DataError if it is none, or cannot be read."""
    try:
        # Without waiting for a pipe's writer; what is open is what is checked.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path.as_posix()}: not an ordinary file; save its rows in one")
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{path.as_posix()}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError of a character that no path has
        raise DataError(f"{path.as_posix()}: cannot be read: {error}") from None


def read_bytes(path: Path) -> bytes:
    """Reads a file, unpacked if it ends in `.gz`; raises DataError if it cannot be read."""
    raw = read_whole(path)
    try:
        return _unpack(path, raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.as_posix()}: cannot be read: {error}") from None


def _unpack(path: Path, raw: bytes) -> bytes:
    """Unpacks piece by piece, so that a gzip bomb fills no more memory than the limit."""
    parts, size = [], 0
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        while part := file.read(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > MOST_UNPACKED:
                raise DataError(
                    f"{path.as_posix()}: its {len(raw)} bytes unpack to more than the limit of "
                    f"{MOST_UNPACKED}; split it into several files"
                )
    return b"".join(parts)


def text_of(path: Path, raw: bytes) -> str:
    """Decodes UTF-8, without a byte order mark and final line ends; `path` is for messages."""
    name = path.as_posix()
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise DataError(
            f"{name}, line {line}: a byte is 0, which no text has; if the file is UTF-16, save it "
            "as UTF-8"
        )
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


def place(line: Line) -> str:
    """Where a row is, for a message.

    Example:
        >>> place(3), place("row 3")
        ('line 3', 'row 3')
    """
    return f"line {line}" if isinstance(line, int) else line


def places(lines: Sequence[Line]) -> str:
    """Where several rows are, for a message.

    Example:
        >>> places([3]), places([3, 4]), places(["row 3", "row 4"])
        ('line 3', 'lines 3, 4', 'row 3, row 4')
    """
    if any(isinstance(line, str) for line in lines):
        return first_few([place(line) for line in lines])
    return f"line{'s' * (len(lines) > 1)} {first_few(list(map(str, lines)))}"


def count_rows(items: Sequence[Any]) -> str:
    """The number of rows with its verb, to begin a message."""
    return "1 row has" if len(items) == 1 else f"{len(items)} rows have"


def without_header(path: Path) -> str:
    """What to write if a CSV or TSV file has no header, to end a message; empty for other files.

    Example:
        >>> without_header(Path("rows.tsv"))
        "; if its first line is a row, name the columns: 'rows.tsv#text,label'"
    """
    if Path(path.name.lower().removesuffix(".gz")).suffix not in (".csv", ".tsv"):
        return ""
    return f"; if its first line is a row, name the columns: '{path.as_posix()}{NAMED}text,label'"


def refuse(path: str, wrong: Sequence[str], before: str, after: str) -> None:
    """Raises DataError if there is something wrong, with the first few between two texts."""
    if wrong:
        raise DataError(f"{path}: {before}{first_few(wrong)}{after}")
