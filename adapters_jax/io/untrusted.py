"""Files that others wrote, opened with distrust, and JSON of them.

Everything that is wrong with a file is an `AdapterFileError` that names it.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterFileError, UserError, file_errors, shortened

MOST_JSON = 2**20  # bytes: four thousand patterns of 200 characters, and a parse within 0.3 s
DEEPEST = 32  # lists and objects in one another
_TOKEN = re.compile(r'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SNAPSHOT = re.compile(r"(.*)/(models--[^/]+)/snapshots/[^/]+(?:/.*)?")
_BLOB = r"{}/({}/)?blobs/([0-9a-f]{{2}}/)?[0-9a-f]{{40}}([0-9a-f]{{24}})?"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """An ordinary file, open for reading, and its size.

    A link may lead to a file in the same directory, and from a snapshot in a cache of the Hugging
    Face Hub, whose files are links, to that cache's blobs.

    Raises:
        AdapterFileError: it is not there, is no ordinary file, or is a link to somewhere else.
    """
    with file_errors(path, error=AdapterFileError):
        real = os.path.realpath(path, strict=True)
        if not _belongs(real, os.path.realpath(path.parent)):
            raise AdapterFileError(
                f"{path} is a link to {real}, out of its directory; put the file itself there"
            )
        if not stat.S_ISREG(os.stat(real).st_mode):  # to open a pipe would be to wait for it
            raise AdapterFileError(f"{path} is no ordinary file; put the file itself there")
        file = open(real, "rb")  # noqa: SIM115
    with file:
        yield file, os.fstat(file.fileno()).st_size


def _belongs(real: str, directory: str) -> bool:
    """Whether a file may be read as one of a directory, both without links."""
    if Path(real).is_relative_to(directory):
        return True
    found = _SNAPSHOT.fullmatch(directory.replace(os.sep, "/"))
    blob = _BLOB.format(*map(re.escape, found.groups())) if found else ""
    return re.fullmatch(blob, real.replace(os.sep, "/")) is not None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        AdapterFileError: it is no file, longer than 1 MiB, not UTF-8, no JSON object, nested more
            than 32 deep, has a key twice, or a number that is not finite or of over 20 digits.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     path = pathlib.Path(place, "config.json")
        ...     _ = path.write_text('{"r": 4, "r": 8}')
        ...     read_json(path)
        Traceback (most recent call last):
        adapters_jax.errors.AdapterFileError: .../config.json is damaged: the key 'r' is there twice
    """
    with opened(path) as (file, size):
        check_size(size, path)
        return parse(read_bytes(file, size, path), path)


def check_size(size: int, path: Path) -> None:
    """Raises AdapterFileError where a JSON file of so many bytes is too large."""
    if size > MOST_JSON:
        raise AdapterFileError(f"{path} has {size} bytes, expected at most {MOST_JSON} of JSON")


def read_bytes(file: BufferedReader, size: int, path: Path) -> bytes:
    """So many bytes of a file, or an AdapterFileError."""
    with file_errors(path, error=AdapterFileError):
        data = file.read(size)
    if len(data) != size:
        raise AdapterFileError(f"{path} became shorter while it was read; read it again")
    return data


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object out of its bytes."""
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        values = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_no_number,
        )
        if "\\u" in text:  # a lone half of a surrogate pair is no text
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except ValueError as error:  # also of the decoders
        raise AdapterFileError(f"{path} is damaged: {shortened(str(error))}") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _check_depth(text: str) -> None:
    """Raises ValueError where lists and objects are too deep in one another, texts aside."""
    depth = 0
    for found in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEEPEST:
            raise UserError(f"its JSON is nested more than {DEEPEST} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return values


def _int(text: str) -> int:
    return int(text) if len(text) <= 20 else _no_number(text)


def _float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> Any:
    raise UserError(f"{shortened(text, 30)} is no number that such a file may hold")
