"""Files that are too large to hold: an index of their records, which are read as they are needed.

The index is made in one pass, which checks each record as the readers of whole files do.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from adapters_jax.finetune.data.columnar import read_batches
from adapters_jax.finetune.data.delimited import reading_csv, separator_of
from adapters_jax.finetune.data.files import (
    MOST_ROW,
    DataError,
    Found,
    Line,
    Record,
    check_columns,
    refuse,
)
from adapters_jax.finetune.data.json_rows import parse_object

# Bytes from which a file is read row by row. Below, its rows are in memory, where each is there at
# once; above, they would need some 5 to 10 times these bytes.
STREAMED = 2**28
_BOM = b"\xef\xbb\xbf"
_TENTHS = 10
_in_memory = ContextVar("in_memory", default=False)

_log = logging.getLogger(__name__)


class FileRecords(Sequence[Record]):
    """The records of a file, each read and parsed when it is asked for.

    Only where each begins is in memory.

    Args:
        file: a descriptor of the open file, which is closed with the sequence.
        starts: where each record begins, in bytes, and where the last one ends.
        parse: makes the values of a record of its bytes.
        place: makes the place of a record of its number, from 0.
    """

    def __init__(
        self,
        path: Path,
        file: int,
        starts: array[int],
        parse: Callable[[bytes], list[Any]],
        place: Callable[[int], Line],
    ) -> None:
        self.path, self.starts, self.parse, self.place = path, starts, parse, place
        self._file, self._state = file, _state_of(file)
        weakref.finalize(self, os.close, file)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self.starts[index], self.starts[index + 1]
        raw = os.pread(self._file, end - start, start)
        if _state_of(self._file) != self._state:
            raise DataError(
                f"{self.path.as_posix()}: it changed while its rows were read; start again with "
                "a file that stays as it is"
            )
        return self.place(index), self.parse(raw)


def _state_of(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def in_memory(asked: bool = True) -> Iterator[None]:
    """Within, large files are read into memory, if that is asked for."""
    before = _in_memory.set(asked)
    try:
        yield
    finally:
        _in_memory.reset(before)


def streams(path: Path) -> bool:
    """Whether a file is read row by row: one of a format that can be, and large."""
    if _in_memory.get() or path.suffix.lower() not in _INDEXES:
        return False
    return path.is_file() and path.stat().st_size > STREAMED


def index(path: Path) -> Found:
    """The columns of a file, and its records, which are read when they are asked for.

    Raises:
        DataError: a record is not one of its format; the message names its line.
    """
    state = path.stat()
    header, records = _indexed(path.absolute(), state.st_size, state.st_mtime_ns)
    return list(header), records


@lru_cache(4)  # the layout is looked at before the rows are read
def _indexed(path: Path, size: int, changed: int) -> tuple[tuple[str, ...], Any]:
    _log.info(
        "%s has %d MB, so its rows stay in the file until they are needed; they are checked once",
        path.name,
        size >> 20,
    )
    header, records = _INDEXES[path.suffix.lower()](path)
    if not len(records):
        raise DataError(f"{path.as_posix()}: it has no rows")
    check_columns(path, len(header))
    return tuple(header), records


def _of_jsonl(path: Path) -> tuple[list[str], FileRecords]:
    """JSON lines: a record is a line."""
    header: dict[str, None] = {}
    starts = array("Q")
    with path.open("rb") as file:
        for number, start, text in _lines(path, file):
            row = parse_object(path, number, text)
            if not row.keys() <= header.keys():
                header |= dict.fromkeys(row)
                check_columns(path, len(header))
            starts.append(start)
        starts.append(file.tell())
        own = os.dup(file.fileno())
    names = [*header]

    def parse(raw: bytes) -> list[Any]:
        row = json.loads(raw) if raw.strip() else {}
        return [row.get(name) for name in names]

    return names, FileRecords(path, own, starts, parse, lambda number: number + 1)


def _of_tsv(path: Path) -> tuple[list[str], FileRecords]:
    """TSV: a record is a line, and quotes are plain text."""
    starts, header, uneven = array("Q"), list[str](), list[str]()

    def fields(text: str) -> list[str]:
        found = text.rstrip("\n").removesuffix("\r").split("\t")
        return found if any(found) else [""] * len(header)

    with path.open("rb") as file:
        for number, start, text in _lines(path, file):
            if number == 1:
                header = fields(text)
                continue
            starts.append(start)
            end = start + len(text.encode())  # blank lines at the end are none
            _check_even(uneven, number, fields(text), header)
        starts.append(end if starts else file.tell())
        own = os.dup(file.fileno())
    _refuse_uneven(path, uneven, header)
    parse = lambda raw: fields(raw.decode())  # noqa: E731
    return header, FileRecords(path, own, starts, parse, lambda number: number + 2)


def _of_csv(path: Path) -> tuple[list[str], FileRecords]:
    """CSV: a record may have several lines, between quotes."""
    starts, numbers, uneven = array("Q"), array("Q"), list[str]()
    blank = list[tuple[int, int]]()
    line = 1
    with reading_csv(path, lambda: line), path.open("rb") as file:
        separator = separator_of(path, file.readline(MOST_ROW))
        file.seek(0)
        at = 0

        def lines() -> Iterator[str]:
            nonlocal at
            for _, start, text in _lines(path, file, blanks=True):
                at = start + len(text.encode())
                yield text

        reader = csv.reader(lines(), strict=True, delimiter=separator)
        header = next(reader)
        line, start = reader.line_num + 1, at
        for found in reader:
            blank.append((start, line))
            if found:  # blank lines at the end are none
                for place, number in blank:
                    starts.append(place)
                    numbers.append(number)
                blank.clear()
                _check_even(uneven, line, found, header)
                end = at
            line, start = reader.line_num + 1, at
        starts.append(end if starts else at)
        own = os.dup(file.fileno())
    _refuse_uneven(path, uneven, header)

    def parse(raw: bytes) -> list[Any]:
        with reading_csv(path, lambda: 0):  # each record was read once, so none is wrong
            text = io.StringIO(raw.decode(), newline="")
            found = next(csv.reader(text, strict=True, delimiter=separator), [])
        return found or [""] * len(header)

    return header, FileRecords(path, own, starts, parse, numbers.__getitem__)


def _of_parquet(path: Path) -> tuple[list[str], FileRecords]:
    """Parquet: the rows are copied to a temporary file, as groups of them are packed together."""
    starts, header = array("Q"), list[str]()
    with path.open("rb") as file, tempfile.TemporaryFile() as copy:
        whole: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            for header, rows in read_batches(path, whole, "parquet"):  # noqa: B007
                for row in rows:
                    starts.append(copy.tell())
                    copy.write(json.dumps(row, default=_plain).encode())
            starts.append(copy.tell())
            copy.flush()
        except OSError as error:
            raise DataError(
                f"{path.as_posix()}: its rows cannot be copied to {tempfile.gettempdir()}, which "
                f"packed rows need: {error}; make room, or set TMPDIR to a folder that has some"
            ) from None
        own = os.dup(copy.fileno())
    return header, FileRecords(path, own, starts, json.loads, lambda number: f"row {number + 1}")


_INDEXES = {".jsonl": _of_jsonl, ".csv": _of_csv, ".tsv": _of_tsv, ".parquet": _of_parquet}


def _plain(value: Any) -> str | None:
    """Times and decimal numbers as the texts that `tables.cell` makes of them; bytes have none."""
    return str(value) if isinstance(value, date | time | Decimal) else None


def _lines(path: Path, file: BinaryIO, blanks: bool = False) -> Iterator[tuple[int, int, str]]:
    """The lines of a file with their numbers and where they begin; none of the last is blank.

    Args:
        file: the file, at its start.
        blanks: whether the blank lines at the end are there, too.
    """
    size, told = os.fstat(file.fileno()).st_size, 1
    start, number, blank = 0, 0, list[tuple[int, int, str]]()
    while raw := file.readline(MOST_ROW + 2):
        number += 1
        if number == 1 and raw.startswith(_BOM):
            start, raw = len(_BOM), raw[len(_BOM) :]
        if len(raw) > MOST_ROW + 1:
            raise DataError(
                f"{path.as_posix()}, line {number}: expected at most {MOST_ROW} bytes of a line; "
                "split it into rows"
            )
        found = (number, start, _text(path, number, raw))
        start += len(raw)
        if raw.strip(b"\r\n") or blanks:
            yield from blank
            blank.clear()
            yield found
        else:
            blank.append(found)
        if start * _TENTHS >= told * size:
            _log.info("%s: %d %% of it checked", path.name, 100 * start // size)
            told = start * _TENTHS // size + 1


def _text(path: Path, number: int, raw: bytes) -> str:
    if b"\0" in raw:
        raise DataError(
            f"{path.as_posix()}, line {number}: a byte is 0, which no text has; if the file is "
            "UTF-16, save it as UTF-8"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.as_posix()}, line {number}: byte 0x{raw[error.start]:02x} is not UTF-8; save "
            "the file as UTF-8"
        ) from None


def _check_even(uneven: list[str], line: int, fields: list[str], header: list[str]) -> None:
    if len(fields) != len(header) and len(uneven) < _TENTHS:
        uneven.append(f"line {line} has {len(fields)}")


def _refuse_uneven(path: Path, uneven: list[str], header: list[str]) -> None:
    refuse(
        path.as_posix(),
        uneven,
        f"expected {len(header)} fields, but rows have another number: ",
        "; a CSV field with a comma in it needs quotes",
    )
