"""What the values of a Parquet or Arrow file unfold to, before a library unfolds them.

Such files name a value once and repeat it: by a dictionary, by runs, by offsets that overlap, by
compression. A file of 1 KB can hold gigabytes. `Budget` compares what Python would hold with the
file's bytes; `pages_of` and `batches_of` say what the headers of a file's parts claim. A library
that reads the file trusts the same headers.

References: https://parquet.apache.org/docs/file-format/data-pages/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md;
https://arrow.apache.org/docs/format/Columnar.html and https://flatbuffers.dev/internals/
"""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_jax.finetune.data.files import DataError

MOST_BYTES = 2**33  # of rows as Python holds them
LEAST_BYTES, BYTES_PER_BYTE = 3 * 2**24, 64  # and this many, and more for each byte of the file
OF_ROW, OF_VALUE = 256, 32  # bytes that Python holds about a row, and about a number or a text
DICTIONARY, DELTA = (2, 8), 7  # encodings whose texts are longer than their pages
_DATA, _TABLE, _DATA_2 = 0, 2, 3  # kinds of pages; those of a dictionary have `_TABLE`
_DEEPEST, _LONGEST = 8, 2**8  # structures in a page's header, and items of a list in one
_OF_MESSAGE = {2: "dictionary", 3: "rows"}


@dataclass
class Budget:
    """How much the rows of a file may hold; sizes in bytes."""

    path: Path
    size: int
    spent: int = 0

    def spend(self, rows: int = 0, values: int = 0, size: int = 0) -> None:
        """Counts rows, values in them, and the bytes of texts; raises DataError if too many."""
        if min(rows, values, size) < 0:  # a header of a file says so
            raise ValueError(f"{rows} rows, {values} values and {size} bytes")
        most = min(LEAST_BYTES + BYTES_PER_BYTE * self.size, MOST_BYTES)
        self.spent += OF_ROW * rows + OF_VALUE * values + size
        if self.spent > most:
            raise DataError(
                f"{self.path.as_posix()}: its {self.size} bytes unfold to more than the limit of "
                f"{most} bytes of rows; if it is no hostile file, split it or save it as JSON lines"
            )


@dataclass(frozen=True)
class Page:
    """A page of a column of Parquet, as its header describes it.

    Attributes:
        values: the number of its values, those of lists and missing ones too.
        size: its bytes once unpacked.
        encoding: the number of its encoding.
        table: whether it has a dictionary, and no values of rows.
    """

    values: int
    size: int
    encoding: int
    table: bool


def pages_of(data: memoryview, begin: int, end: int) -> Iterator[Page]:
    """The pages of a column between two offsets.

    Raises:
        ValueError, IndexError, KeyError: the bytes are no pages.
    """
    while begin < end:
        reader = _Thrift(data, begin)
        header = reader.structure()
        kind, unpacked, packed = (header[i] for i in (1, 2, 3))
        at = {_DATA: 5, _TABLE: 7, _DATA_2: 8}.get(kind)
        if unpacked < 0 or packed < 0:
            raise ValueError(f"a page of {packed} bytes, {unpacked} unpacked")
        if at is not None:
            about = header[at]
            encoding = about[4 if kind == _DATA_2 else 2]
            if about[1] < 0:
                raise ValueError(f"a page of {about[1]} values")
            yield Page(about[1], unpacked, encoding, kind == _TABLE)
        begin = reader.at + packed


def check_kinds(data: memoryview, most: int) -> None:
    """Checks that the columns of a Parquet file have the types and the levels of its schema.

    Where they do not, pyarrow ends the process when it is asked about a column.

    Args:
        most: how many items a list in its metadata may have.

    Raises:
        ValueError, IndexError, KeyError: they have others, or the bytes are no metadata.
    """
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = _Thrift(data, begin, most).structure()
    kinds = [element[1] for element in footer[2] if not element.get(5)]
    levels = list(_levels(iter(footer[2][1:]), footer[2][0].get(5, 0)))
    for group in footer[4]:
        found = [column[3][1] for column in group[1]]
        if found != kinds:
            raise ValueError(f"columns of the types {found}, and the schema says {kinds}")
        for column, most_of in zip(group[1], levels, strict=True):
            counted = column[3].get(16, {})  # of repetitions and of definitions, one a level
            for field, level in zip((2, 3), most_of, strict=True):
                if len(counted.get(field, ())) not in (0, level + 1):
                    raise ValueError(
                        f"counts of {len(counted[field])} levels, expected {level + 1}"
                    )


def _levels(
    elements: Iterator[dict[int, Any]], count: int, level: tuple[int, int] = (0, 0)
) -> Iterator[tuple[int, int]]:
    """The highest levels of repetition and definition of each column below some nodes."""
    for element in itertools.islice(elements, count):
        repeated, optional = (element.get(3) == kind for kind in (2, 1))
        own = level[0] + repeated, level[1] + (repeated or optional)
        if element.get(5):
            yield from _levels(elements, element[5], own)
        else:
            yield own


class _Thrift:
    """Reads a structure of Thrift's compact protocol as a dictionary by the fields' numbers."""

    def __init__(self, data: memoryview, at: int, longest: int = _LONGEST) -> None:
        self.data, self.at, self._longest = data, at, longest

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _count(self) -> int:
        """A number without a sign, of 7 bits a byte."""
        found = shift = 0
        while shift < 70:
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
            shift += 7
        raise ValueError("a number of more than 10 bytes")

    def structure(self, depth: int = 0) -> dict[int, Any]:
        found: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            step = byte >> 4
            number = number + step if step else self._signed()
            found[number] = self._value(byte & 15, depth)
        return found

    def _signed(self) -> int:
        count = self._count()
        return (count >> 1) ^ -(count & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 8):  # a number with a point; bytes
            count = 8 if kind == 7 else self._count()
            self.at += count
            return None
        if kind in (9, 10) and depth < _DEEPEST:
            byte = self._byte()
            count = byte >> 4 if byte < 0xF0 else self._count()
            if count > self._longest:
                raise ValueError(f"a list of {count} in the metadata")
            # A logical value of a list has a byte, unlike one of a field.
            inner = 3 if byte & 15 in (1, 2) else byte & 15
            return [self._value(inner, depth + 1) for _ in range(count)]
        if kind == 12 and depth < _DEEPEST:
            return self.structure(depth + 1)
        raise ValueError(f"a field of the kind {kind} in the metadata")


def claims_of(message: memoryview, body: memoryview) -> tuple[int, int, int]:
    """The rows, the values and the unpacked bytes that a message of Arrow claims.

    Args:
        message: its description, a flatbuffer.
        body: its buffers.

    Raises:
        ValueError, struct.error: it is no message.
    """
    root = _Flat(message, _number("<I", message, 0))
    kind = _OF_MESSAGE.get(root.scalar(1, "<B"))
    if kind is None:
        return 0, 0, 0
    table = root.table(2)
    batch = table.table(1) if kind == "dictionary" else table
    rows = batch.scalar(0, "<q")
    values = sum(length for length, _ in batch.pairs(1))
    packed = batch.at_field(3) is not None
    size = 0
    for offset, length in batch.pairs(2):
        claimed = _number("<q", body, offset) if packed and length else -1
        size += length if claimed < 0 else claimed
    if min(rows, values, size) < 0:
        raise ValueError("a negative length")
    return (rows if kind == "rows" else 0), values, size


def _number(form: str, data: memoryview, at: int) -> int:
    if at < 0:  # which would count from the end
        raise ValueError(f"an offset of {at}")
    return struct.unpack_from(form, data, at)[0]


class _Flat:
    """A table of a flatbuffer."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at
        self.entries = at - _number("<i", data, at)

    def at_field(self, number: int) -> int | None:
        """Where a field is; None if it is left out."""
        entry = 4 + 2 * number
        if entry + 2 > _number("<H", self.data, self.entries):
            return None
        offset = _number("<H", self.data, self.entries + entry)
        return self.at + offset if offset else None

    def scalar(self, number: int, form: str) -> int:
        at = self.at_field(number)
        return 0 if at is None else _number(form, self.data, at)

    def _pointed(self, number: int) -> int:
        at = self.at_field(number)
        if at is None:
            raise ValueError(f"no field {number} in a message")
        return at + _number("<I", self.data, at)

    def table(self, number: int) -> "_Flat":
        return _Flat(self.data, self._pointed(number))

    def pairs(self, number: int) -> Iterator[tuple[Any, ...]]:
        """The structures of a list, each of two numbers of 64 bits; nothing if it is left out."""
        if self.at_field(number) is None:
            return iter(())
        at = self._pointed(number)
        count = _number("<I", self.data, at)
        found = self.data[at + 4 : at + 4 + 16 * count]
        if len(found) < 16 * count:
            raise ValueError(f"a list of {count} behind the end of a message")
        return struct.iter_unpack("<qq", found)
