"""Reads the header of a GGUF file of unknown origin: its metadata and the list of its tensors.

Every length in it is compared with the bytes that the file has left before anything is made, so a
small file takes little time and memory whatever it claims.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.errors import BaseFileError, needed, shown
from adapters_jax.files.untrusted import Untrusted, name_problem, opened

VERSIONS = (2, 3)
MOST_HEADER = 2**26  # bytes; the longest vocabularies take some 20 million
MOST_ITEMS = 2**22  # of all arrays
MOST_ELEMENTS = 2**48  # of a tensor
MOST_ALIGNMENT = 2**20
ALIGNMENT = "general.alignment"
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a file.

    Attributes:
        version: which file that was when it was listed.
        shape: its shape, the last axis contiguous.
        kind: its type, a `gguf.GGMLQuantizationType`.
        begin: the place of its first byte.
        size: the number of its bytes.
    """

    path: Path
    version: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    kind: Any
    begin: int
    size: int

    def bytes(self) -> np.ndarray:
        """Reads its bytes, a row for each of its rows."""
        data = np.empty(self.size, np.uint8)
        with opened(self.path, BaseFileError, self.version) as file:
            file.fill(data, self.begin)
        return data.reshape(*self.shape[:-1], -1)

    def rows(self, name: str) -> list[GGUFTensor]:
        """Its rows along the first axis, each a tensor of this name with the row's number."""
        count, *shape = self.shape
        size = self.size // count
        return [
            replace(
                self,
                name=name.format(i),
                shape=tuple(shape),
                begin=self.begin + i * size,
                size=size,
            )
            for i in range(count)
        ]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads the metadata and the tensors of a file by name.

    Returns:
        The fields: numbers, texts, and lists of either; and the tensors, none of them read.

    Raises:
        BaseFileError: it is not an ordinary file or breaks a rule of the format.
        MissingPackageError: the package `gguf`, which knows the types of tensors, is not installed.
    """
    with opened(path, BaseFileError) as file:
        header = _Header(file)
        if header.take(4) != b"GGUF":
            raise header.error("it has no GGUF magic number")
        version, tensors, count = header.numbers("<IQQ")
        if version not in VERSIONS:
            raise header.error(f"it is of version {version}, expected one of {VERSIONS}")
        header.check(count * 13 + tensors * 25)  # the shortest that they can be
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = header.text("the name of a field")
            if name in fields:
                raise header.error(f"the field {shown(name, 80)} is there twice")
            fields[name] = header.value(name)
        found = fields.get(ALIGNMENT, 32)
        if type(found) is not int or not 0 < found <= MOST_ALIGNMENT or found & (found - 1):
            raise header.error(f"{ALIGNMENT}={shown(found, 80)}, expected a power of two")
        return fields, header.tensors(tensors, found)


@dataclass
class _Header:
    """The part of an open file that is not read yet."""

    file: Untrusted
    position: int = 0
    items: int = 0

    def error(self, problem: str) -> BaseFileError:
        """The error for a damaged file."""
        return BaseFileError(f"{str(self.file.path)!r} is not a whole GGUF file: {problem}.")

    def check(self, count: int) -> None:
        """Raises BaseFileError unless the header has this many bytes more."""
        size = self.file.size
        if count > min(size, MOST_HEADER) - self.position:
            raise self.error(
                f"it has {size} bytes, at most {MOST_HEADER} of them for the header, but at byte "
                f"{self.position} it is to have {count} more"
            )

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.check(count)
        self.position += count
        return self.file.take(count)

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """The next numbers, of a layout for `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self, what: str) -> str:
        """The next text, which begins with its length."""
        data = self.take(*self.numbers("<Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is no text in utf-8") from error

    def value(self, name: str) -> Any:
        """The value of a field."""
        (kind,) = self.numbers("<I")
        if kind != _ARRAY:
            return self._values(kind, 1, name)[0]
        kind, count = self.numbers("<IQ")
        if kind == _ARRAY:
            raise self.error(f"{shown(name, 80)} holds arrays of arrays")
        # A list of Python takes many times the bytes of the file, so its length has a limit.
        self.items += count
        if self.items > MOST_ITEMS:
            raise self.error(
                f"{shown(name, 80)} has {count} items, over {MOST_ITEMS} with the others"
            )
        return self._values(kind, count, name)

    def _values(self, kind: int, count: int, name: str) -> list[Any]:
        if kind == _STRING:
            self.check(8 * count)
            return [self.text(f"a text of {shown(name, 80)}") for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.error(f"{shown(name, 80)} has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if kind != _BOOL:
            return values
        if not set(values) <= {0, 1}:
            raise self.error(f"{shown(name, 80)} has a truth value that is neither 0 nor 1")
        return list(map(bool, values))

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        """The tensors by name, which must lie one after the other up to the end of the file."""
        entries = [self._entry() for _ in range(count)]
        start = position = _aligned(self.position, alignment)
        found: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset, size in sorted(entries, key=lambda entry: entry[3]):
            if name in found:
                raise self.error(f"the tensor {shown(name, 80)} is there twice")
            if start + offset != position or position + size > self.file.size:
                raise self.error(
                    f"{name} has {size} bytes from {start + offset} on, expected from {position} "
                    f"on, in the {self.file.size} of the file"
                )
            file = (self.file.path, self.file.version)
            found[name] = GGUFTensor(*file, name, shape, kind, position, size)
            position = _aligned(position + size, alignment)
        return found

    def _entry(self) -> tuple[str, tuple[int, ...], Any, int, int]:
        """The name, shape, type, offset and size of a tensor."""
        name = self.text("the name of a tensor")
        problem = name_problem(name)
        if problem:
            raise self.error(problem)
        (axes,) = self.numbers("<I")
        if not 1 <= axes <= 4:
            raise self.error(f"{name} has {axes} axes, expected 1 to 4")
        shape = tuple(reversed(self.numbers(f"<{axes}Q")))
        number, offset = self.numbers("<IQ")
        kind, (block, width) = self._kind(name, number)
        elements = math.prod(shape)
        if not 0 < elements <= MOST_ELEMENTS or shape[-1] % block:
            raise self.error(f"{name} has the shape {list(shape)}, which its type cannot hold")
        return name, shape, kind, offset, elements // block * width

    def _kind(self, name: str, number: int) -> tuple[Any, tuple[int, int]]:
        """A type of tensors, with the number of elements and of bytes of its blocks."""
        with needed(f"reading {self.file.path.name!r}", "gguf"):
            import gguf
        known = {kind.value: kind for kind in gguf.GGML_QUANT_SIZES}
        if number not in known:
            raise self.error(f"{name} has the unknown type {number}")
        return known[number], gguf.GGML_QUANT_SIZES[known[number]]


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
