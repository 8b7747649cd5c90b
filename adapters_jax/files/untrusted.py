"""Finds and opens files of unknown origin, and reads their JSON and their safetensors.

Anything wrong with a file raises an `AdapterFileError`, or the error that the caller asks for, and
the message names the file. A file of tensors has its whole header checked before a tensor is read,
and nothing is allocated before its size is known to fit the file.

The package safetensors checks dtypes, offsets and sizes as well, but accepts duplicate names,
further keys, a header of up to 100 MB and any name. It has no float8 for numpy, and it maps the
file, so a signal ends the process if the file becomes shorter. This module therefore reads files
itself.

Reference: https://github.com/huggingface/safetensors#format
"""

import contextlib
import errno
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.errors import (
    AdapterFileError,
    UserError,
    file_errors,
    first_few,
    shortened,
    shown,
)
from adapters_jax.texts import parse_json

MOST_JSON = 2**20  # bytes; enough for 4000 patterns of 200 characters, and parsed within 0.3 s
LONGEST_NAME = 512
LONGEST_HEADER = 2**23  # bytes; enough for 60,000 tensors of usual names
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "C64": np.dtype(np.complex64),
    **{f"{kind.upper()}{n}": np.dtype(f"{kind}{n // 8}") for kind in "iu" for n in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
_BY_STEPS = os.open in os.supports_dir_fd  # not on Windows
# On Linux it takes no right to list the directories that one passes through.
_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
_EXPONENTS = {np.dtype(np.float16): 0x7C00, jnp.dtype(jnp.bfloat16): 0x7F80}
_CHUNK = 2**16  # numbers checked at a time, so that the check needs little memory
_SNAPSHOT = re.compile(r"(.*)/(models--[^/]+)/snapshots/[^/]+(?:/.*)?")
_BLOB = r"{}/({}/)?blobs/([0-9a-f]{{2}}/)?[0-9a-f]{{40}}([0-9a-f]{{24}})?"


@dataclass(frozen=True)
class Untrusted:
    """An open file of unknown origin; `opened` makes it.

    Attributes:
        path: its path.
        stream: the file.
        size: the number of its bytes when it was opened.
        error: what is raised for anything wrong with it.
        version: tells this file from one that takes its place, and from itself when it is changed.
    """

    path: Path
    stream: BufferedReader
    size: int
    error: type[UserError]
    version: tuple[int, ...]

    def take(self, count: int) -> bytes:
        """Reads `count` bytes, which the caller has compared with the size."""
        with file_errors(self.path, error=self.error):
            data = self.stream.read(count)
        self._check_count(len(data), count)
        return data

    def fill(self, array: np.ndarray, begin: int) -> None:
        """Fills an array with the bytes from `begin` on, without a second copy of them."""
        with file_errors(self.path, error=self.error):
            self.stream.seek(begin)
            count = self.stream.readinto(array.reshape(-1).view(np.uint8).data) if array.size else 0
        self._check_count(count, array.nbytes)

    def _check_count(self, count: int, expected: int) -> None:
        if count != expected:
            raise self.error(f"{self.path} became shorter while it was read; read it again")


@contextlib.contextmanager
def opened(
    path: Path,
    error: type[UserError] = AdapterFileError,
    version: tuple[int, ...] | None = None,
) -> Iterator[Untrusted]:
    """Opens an ordinary file for reading.

    A link may point into its own directory; a link in a snapshot of the Hugging Face Hub's cache
    may point to the blobs of that cache. This holds for the file that is read, even if someone
    replaces files and directories by links or pipes meanwhile.

    Args:
        path: the file.
        error: what to raise.
        version: that of an earlier `Untrusted`, which the file must still have; None accepts any.

    Raises:
        AdapterFileError: (or `error`) it does not exist, is not an ordinary file, is a link out
            of these, or has another version.
    """
    with file_errors(path, error=error):
        real = os.path.realpath(path, strict=True)
        root = _root(real, os.path.realpath(path.parent))
        if root is None:
            raise error(
                f"{path} is a link to {real}, out of its directory; put the file itself there"
            )
        stream = open(real, "rb", opener=partial(_beneath, root))  # noqa: SIM115
    with stream:
        found = os.fstat(stream.fileno())
        now = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if version not in (None, now):
            raise error(f"{path} was replaced or changed while it was read; read it again")
        yield Untrusted(path, stream, found.st_size, error, now)


def _beneath(root: str, real: str, flags: int) -> int:
    """Opens an ordinary file by steps from a directory; no step follows a link, or waits."""
    if _BY_STEPS:
        *folders, name = Path(real).relative_to(root).parts or (".",)
        steps = [(folder, _SEARCH) for folder in folders] + [(name, flags | os.O_NONBLOCK)]
        at = os.open(root, _SEARCH)
        for part, how in steps:
            try:
                found = os.open(part, how | os.O_NOFOLLOW, dir_fd=at)
            finally:
                os.close(at)
            at = found
    else:
        at = os.open(real, flags)
    if not stat.S_ISREG(os.fstat(at).st_mode):
        os.close(at)
        raise OSError(errno.EINVAL, "it is not an ordinary file; put the file itself there")
    return at


def _root(real: str, directory: str) -> str | None:
    """What a file may be read as a part of: a directory, or the cache that it is a snapshot in.

    Both paths are free of links; None if the file is elsewhere.
    """
    if Path(real).is_relative_to(directory):
        return directory
    found = _SNAPSHOT.fullmatch(directory.replace(os.sep, "/"))
    blob = _BLOB.format(*map(re.escape, found.groups())) if found else ""
    return found[1] if found and re.fullmatch(blob, real.replace(os.sep, "/")) else None


def read_json(
    path: Path, most: int = MOST_JSON, error: type[UserError] = AdapterFileError
) -> dict[str, Any]:
    """Reads a JSON object of at most `most` bytes.

    Raises:
        AdapterFileError: (or `error`) it is not a file, too long, not UTF-8, not a JSON object,
            nested more than 32 deep, or has a duplicate key, a number that is not finite or an
            integer of over 40 digits.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "config.json")
        ...     _ = path.write_text('{"r": 4, "r": 8}')
        ...     read_json(path)
        Traceback (most recent call last):
        adapters_jax.errors.AdapterFileError: .../config.json is damaged: duplicate key 'r' ...
    """
    return parse(read_file(path, most, error, "JSON"), path, error)


def read_file(path: Path, most: int, error: type[UserError], what: str) -> bytes:
    """Reads a whole file, `what` for a message; raises `error` if it has more than `most` bytes."""
    with opened(path, error) as file:
        check_size(file.size, path, most, error, what)
        return file.take(file.size)


def check_size(
    size: int,
    path: Path,
    most: int = MOST_JSON,
    error: type[UserError] = AdapterFileError,
    what: str = "JSON",
) -> None:
    """Raises AdapterFileError (or `error`) if a file of `size` bytes is too large."""
    if size > most:
        raise error(f"{path} has {size} bytes, expected at most {most} of {what}")


def parse(data: bytes, path: Path, error: type[UserError] = AdapterFileError) -> dict[str, Any]:
    """Parses a JSON object; raises AdapterFileError (or `error`), naming `path`, for the rest."""
    try:
        values = parse_json(data.decode("utf-8"))
    except ValueError as problem:  # of the checks here and of the decoders
        raise error(f"{path} is damaged: {shortened(str(problem))}") from problem
    if not isinstance(values, dict):
        raise error(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


@dataclass(frozen=True)
class _Entry:
    """The dtype, the shape and the byte range of a tensor in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file with a checked header; `open_tensors` makes it.

    Attributes:
        metadata: its texts by name.
    """

    file: Untrusted
    entries: Mapping[str, _Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and dtype of each tensor by name."""
        return {n: jax.ShapeDtypeStruct(e.shape, e.dtype) for n, e in self.entries.items()}

    def read(self, finite: bool = True) -> dict[str, np.ndarray]:
        """Reads all tensors by name.

        Args:
            finite: whether every number must be finite.

        Raises:
            AdapterFileError: (or `error`) the file became shorter, or a number is not finite; the
                message names the tensors that have such numbers.
        """
        arrays = {name: np.empty(e.shape, e.dtype) for name, e in self.entries.items()}
        for name, entry in self.entries.items():
            self.file.fill(arrays[name], entry.begin)
        wrong = not_finite(arrays) if finite else ""
        if wrong:
            raise self.file.error(f"{self.file.path} has numbers that are not finite in {wrong}")
        return arrays


def not_finite(arrays: Mapping[str, np.ndarray]) -> str:
    """The names of the arrays that hold NaN or infinity, for a message; empty if there are none.

    Example:
        >>> not_finite({"a": np.ones(2), "b": np.array([0.0, np.nan])})
        'b'
    """
    wrong = [name for name, array in arrays.items() if not _finite(array)]
    return first_few(wrong, 12)


def _finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    flat = array.reshape(-1)
    chunks = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    mask = _EXPONENTS.get(array.dtype)
    if mask is not None:  # numpy's own test of 16 bits is up to ten times slower than this
        return all(((chunk.view(np.uint16) & mask) != mask).all() for chunk in chunks)
    with np.errstate(invalid="ignore"):  # a signalling NaN would warn
        return all(np.isfinite(chunk).all() for chunk in chunks)


def check_header(
    length: int, size: int, path: Path, error: type[UserError] = AdapterFileError
) -> None:
    """Raises AdapterFileError (or `error`) if a header is too long for a file of this size."""
    if not 0 < length <= size - 8:
        raise error(
            f"{path} is damaged: it has {size} bytes, but its header is to have {length} of them"
        )
    most = min(max(MOST_JSON, size // 32), LONGEST_HEADER)
    if length > most:
        raise error(f"{path} has a header of {length} bytes, expected at most {most}")


@contextlib.contextmanager
def open_tensors(path: Path, error: type[UserError] = AdapterFileError) -> Iterator[TensorFile]:
    """Opens a safetensors file and checks its whole header before any tensor is read.

    The header must be JSON of at most 1 MiB (or a 32nd of the file, up to 8 MiB), each name a
    plain path and each dtype known, and the tensors must fill the file to its end, without overlap
    or hole.

    Raises:
        AdapterFileError: (or `error`) it is not an ordinary file, or breaks one of these rules.
    """
    with opened(path, error) as file:
        length = int.from_bytes(file.take(min(file.size, 8)), "little")
        check_header(length, file.size, path, error)
        header = file.take(length)
        if not header.startswith(b"{"):
            raise error(f"{path} is damaged: its header is not a JSON object")
        values = parse(header, path, error)
        try:
            entries = _entries(values, 8 + length, file.size)
        except UserError as problem:
            raise error(f"{path} is damaged: {problem}") from problem
        yield TensorFile(file, entries, values.get("__metadata__", {}))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a safetensors file by name.

    Raises:
        AdapterFileError: as for `open_tensors` and `TensorFile.read`.

    Example:
        >>> import pathlib, tempfile
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.safetensors")
        ...     save_file({"x": np.ones(2, np.float32)}, path)
        ...     read_tensors(path)
        {'x': array([1., 1.], dtype=float32)}
    """
    with open_tensors(path) as file:
        return file.read()


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, _Entry]:
    """The entries of a header by name; raises UserError if it breaks a rule of the format."""
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise UserError("its __metadata__ is not a mapping from text to text")
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    entries = {name: _entry(name, value, start) for name, value in tensors.items()}
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = (
                "overlaps another tensor" if entry.begin < position else "leaves a hole before it"
            )
            raise UserError(f"{name} {what}: it begins at {entry.begin}, expected {position}")
        position = entry.end
    if position != size:
        raise UserError(f"its tensors end at byte {position}, and the file has {size}")
    return entries


def _entry(name: str, value: Any, start: int) -> _Entry:
    """One tensor's entry, from its value in the header."""
    problem = name_problem(name)
    if problem:
        raise UserError(problem)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{name} must have exactly the keys dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(
            f"{name} has the dtype {shown(kind, 80)}, expected one of {', '.join(DTYPES)}"
        )
    # A size of 0 counts as 1, so that it does not hide others that are too large.
    if not _sizes(shape, 2**31) or len(shape) > 16 or math.prod(n or 1 for n in shape) > 2**48:
        raise UserError(f"{name} has the shape {shown(shape, 80)}, expected a list of sizes")
    if not _sizes(offsets, 2**63) or len(offsets) != 2:
        raise UserError(f"{name} has the data_offsets {shown(offsets, 80)}, expected two numbers")
    dtype, (begin, end) = DTYPES[kind], offsets
    extent = math.prod(shape) * dtype.itemsize
    if end - begin != extent:
        raise UserError(
            f"{name} is {kind}{shown(shape, 80)}, {extent} bytes, but its data_offsets span "
            f"{end - begin}"
        )
    return _Entry(dtype, tuple(shape), start + begin, start + end)


def _sizes(value: Any, most: int) -> bool:
    """Whether a value is a list of whole numbers, each at least 0 and below `most`."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < most for n in value)


def name_problem(name: str) -> str:
    """What is wrong with a tensor's name, for a message; empty if it is a plain path.

    Example:
        >>> name_problem("layer_0/query/lora/a"), name_problem("../a")
        ('', "the name '../a' is not a plain path")
    """
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
    if len(name) > LONGEST_NAME or not plain:
        return f"the name {shown(name, 80)} is not a plain path"
    return ""


def is_path(value: Any) -> bool:
    """Whether a value is a plain path, or an empty text."""
    return isinstance(value, str) and (not value or not name_problem(value))
