"""Files as bytes and texts, and what every reader of rows returns.

A row is a list of values, one for each column: texts, numbers, None, lists and mappings, as in
JSON. `tables` makes texts of the columns that a task reads. `Rows.of` is where rows get their path
and are found to be uneven; `refuse` lists rows that cannot be used.
"""

import contextlib
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

from adapters_jax.errors import UserError, first_few
from adapters_jax.finetune.data.lazy_rows import Lazy, is_held, joined, mapped, taken, watched

FilePath = str | os.PathLike[str]
Line = int | str  # the line that a row starts on; a text for formats without lines, as "row 3"
Record = tuple[Line, list[Any]]  # the line, the values
Found = tuple[list[str], Sequence[Record]]  # column names, records
Row = TypeVar("Row")
Reader = Callable[[Path, bytes], Found]

NAMED = "#"  # behind the path of a file without a header, before the names of its columns
MOST_UNPACKED = 2**30  # bytes that a .gz file may hold
LEAST_UNPACKED, UNPACKED_PER_BYTE = 2**20, 64  # this many, and more for each packed byte
LEAST_LINES = 2**17  # lines that a .gz file may have, and one more for each packed byte
MOST_ROW = 2**24  # bytes of a line, and of a text in a row
MOST_COLUMNS = 2**14
_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)


class Rows(NamedTuple):
    """The rows of a file of any format.

    Attributes:
        records: the place of each row, and its values.
    """

    header: list[str]
    records: Sequence[Record]
    path: str = ""

    @classmethod
    def of(cls, path: FilePath, header: list[str], records: Sequence[Record]) -> Self:
        """Rows that have as many values as there are columns, or else raises DataError."""
        uneven = [
            f"{place(line)} has {len(fields)}"
            for line, fields in (records if is_held(records) else ())  # others were checked
            if len(fields) != len(header)
        ]
        check_columns(path, len(header))
        name = Path(path).as_posix()
        refuse(
            name,
            uneven,
            f"expected {len(header)} fields, but {count_rows(uneven)} another number: ",
            "; a CSV field with a comma in it needs quotes",
        )
        return cls(header, records, name)

    @property
    def lines(self) -> Sequence[Line]:
        """The place of each row."""
        if is_held(self.records):
            return [line for line, _ in self.records]
        streamed: Any = self.records  # `streaming.FileRecords`
        return Lazy(range(len(streamed)), streamed.place)


@dataclass(frozen=True)
class PlacedRows(Generic[Row]):
    """The rows of one file, which know their places.

    Attributes:
        path: the path of the file, for messages.
        lines: the line that each of them starts on, or another name of its place.
        sources: of rows of several files, the number of each row's file.
    """

    path: str
    rows: Sequence[Row]
    lines: Sequence[Line]
    sources: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Self:
        """The rows with these indices, in the given order."""
        lines, sources = taken(self.lines, rows), taken(self.sources, rows)
        return replace(self, rows=taken(self.rows, rows), lines=lines, sources=sources)

    @property
    def streamed(self) -> bool:
        """Whether the rows are read from their file as they are needed."""
        return not is_held(self.rows)

    def joined(self, others: Sequence[Self]) -> Self:
        """These rows and those of other files after them."""
        every = [self, *others]
        return replace(self, rows=joined([each.rows for each in every]), **together(every))

    @classmethod
    def of(cls, rows: Rows, make: Callable[[Mapping[str, Any]], Row], what: str) -> Self:
        """Makes each row of its values by column.

        Args:
            make: makes one, or raises RowError, or ValueError for a text that is not JSON.
            what: the name of such rows, for messages.

        Raises:
            DataError: rows cannot be made; the message lists them.
        """
        found, problems = list[Row](), []

        def made(record: Record) -> Row:
            return make(dict(zip(rows.header, record[1], strict=True)))

        for record in watched(rows.records, rows.path):
            line = record[0]
            try:
                row = made(record)
                if is_held(rows.records):
                    found.append(row)
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
        return cls(rows.path, found or mapped(rows.records, made), rows.lines)


def together(files: Sequence[Any]) -> dict[str, Any]:
    """The path, the lines and the sources of the rows of several files."""
    path = f"{files[0].path} and {len(files) - 1} more"
    lines = joined([mapped(each.lines, partial(_line_of, each.path)) for each in files])
    sources = [number for number, each in enumerate(files) for _ in each.lines]
    return {"path": path, "lines": lines, "sources": sources}


def _line_of(path: str, line: Line) -> str:
    return f"{place(line)} of {path}"


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
        raise DataError(f"{path.as_posix()}: this file does not exist") from None
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
    most = min(LEAST_UNPACKED + UNPACKED_PER_BYTE * len(raw), MOST_UNPACKED)
    parts, size, lines = [], 0, 0
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        while part := file.read(_CHUNK):
            parts.append(part)
            size += len(part)
            lines += part.count(b"\n")
            for count, limit, what in (
                (size, most, "bytes"),
                (lines, LEAST_LINES + len(raw), "lines"),
            ):
                if count > limit:
                    raise DataError(
                        f"{path.as_posix()}: its {len(raw)} bytes unpack to more than the limit of "
                        f"{limit} {what}; split it into several files, or unpack it"
                    )
    return b"".join(parts)


def text_of(path: Path, raw: bytes) -> str:
    """Decodes UTF-8, without a byte order mark and final line ends; `path` is for messages."""
    _check_text(path, raw)
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise _not_utf8(path, raw) from None


def lines_of(path: Path, raw: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, decoded one by one; none of the last is blank.

    They end at line feeds alone: not, as `splitlines()` has it, at characters such as U+2028, which
    texts have inside.
    """
    blank = 0
    with text_stream(path, raw, "\n") as stream:
        for number, line in enumerate(stream, 1):
            if line in ("\n", "\r\n"):
                blank += 1
                continue
            yield from ((n, "") for n in range(number - blank, number))
            blank = 0
            yield number, line.removesuffix("\n")


@contextlib.contextmanager
def text_stream(path: Path, raw: bytes, newline: str) -> Iterator[io.TextIOWrapper]:
    """A text as a stream, decoded piece by piece; raises DataError for what is no text."""
    _check_text(path, raw)
    at = 0
    # As bytes: a line of a gigabyte is not decoded.
    while len(raw) - at > MOST_ROW:  # the last line's end within the limit
        end = raw.rfind(b"\n", at, at + MOST_ROW + 1)
        if end < 0:
            end, line = raw.find(b"\n", at) % (len(raw) + 1), raw.count(b"\n", 0, at) + 1
            raise DataError(
                f"{path.as_posix()}, line {line}: {end - at} bytes, expected at most {MOST_ROW} of "
                "a line; split it into rows"
            )
        at = end + 1
    try:
        with io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError:
        raise _not_utf8(path, raw) from None


def _check_text(path: Path, raw: bytes) -> None:
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise DataError(
            f"{path.as_posix()}, line {line}: a byte is 0, which no text has; if the file is "
            "UTF-16, save it as UTF-8"
        )
    body = raw.removeprefix(_BOM)
    if not body or body.isspace():
        raise DataError(f"{path.as_posix()}: the file is empty")


def _not_utf8(path: Path, raw: bytes) -> DataError:
    """The error of the first byte that is not UTF-8; there is one."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        at = error.start
    line = raw.count(b"\n", 0, at) + 1
    return DataError(
        f"{path.as_posix()}, line {line}: byte 0x{raw[at]:02x} at offset {at} of the file is not "
        "UTF-8; save the file as UTF-8"
    )


def check_columns(path: FilePath, count: int) -> None:
    """Raises DataError if a file has too many columns."""
    if count > MOST_COLUMNS:
        raise DataError(
            f"{Path(path).as_posix()}: {count} columns, expected at most {MOST_COLUMNS}; leave out "
            "those that nothing learns"
        )


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
