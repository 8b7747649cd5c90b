"""Finds and opens files of unknown origin, and reads their JSON.

Anything wrong with a file raises an `AdapterFileError`, or the error that the caller asks for, and
the message names the file.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.errors import (
    AdapterFileError,
    BaseFileError,
    UserError,
    file_errors,
    shortened,
)
from adapters_jax.texts import parse_json

MOST_JSON = 2**20  # bytes; enough for 4000 patterns of 200 characters, and parsed within 0.3 s
# What code raises that reads a file of another form; RecursionError is of JSON of many brackets.
OF_DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
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
    """

    path: Path
    stream: BufferedReader
    size: int
    error: type[UserError]

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
def opened(path: Path, error: type[UserError] = AdapterFileError) -> Iterator[Untrusted]:
    """Opens an ordinary file for reading.

    A link may point into its own directory; a link in a snapshot of the Hugging Face Hub's cache
    may point to the blobs of that cache.

    Raises:
        AdapterFileError: (or `error`) it does not exist, is not an ordinary file, or is a link out
            of these.
    """
    with file_errors(path, error=error):
        real = os.path.realpath(path, strict=True)
        if not _belongs(real, os.path.realpath(path.parent)):
            raise error(
                f"{path} is a link to {real}, out of its directory; put the file itself there"
            )
        if not stat.S_ISREG(os.stat(real).st_mode):  # opening a pipe would block
            raise error(f"{path} is not an ordinary file; put the file itself there")
        stream = open(real, "rb")  # noqa: SIM115
    with stream:
        yield Untrusted(path, stream, os.fstat(stream.fileno()).st_size, error)


def _belongs(real: str, directory: str) -> bool:
    """Whether a file may be read as part of a directory; both paths are free of links."""
    if Path(real).is_relative_to(directory):
        return True
    found = _SNAPSHOT.fullmatch(directory.replace(os.sep, "/"))
    blob = _BLOB.format(*map(re.escape, found.groups())) if found else ""
    return re.fullmatch(blob, real.replace(os.sep, "/")) is not None


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


def find_gguf(path: str | Path) -> Path | None:
    """Finds the GGUF file of a path: the path itself, or the only one of a directory.

    A directory with a `config.json` is another kind of checkpoint, so the result is None.

    Raises:
        BaseFileError: the directory has several GGUF files.

    Example:
        >>> find_gguf("model.gguf").name, find_gguf("org/model")
        ('model.gguf', None)
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return path
    another = not os.path.isdir(path) or (path / "config.json").exists()
    files = [] if another else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise BaseFileError(f"{str(path)!r} holds {names}: give the path of one of them.")
    return files[0] if files else None
