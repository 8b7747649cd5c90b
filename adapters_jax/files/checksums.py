"""SHA-256 checksums of the files of a directory, written last: without them it is not whole."""

import hashlib
import json
import os
from pathlib import Path

from adapters_jax.errors import AdapterFileError, file_errors
from adapters_jax.files.atomic import write_file
from adapters_jax.files.untrusted import opened, read_json

CHECKSUMS = "sha256.json"
MOST = 2**26  # bytes of checksums: those of half a million files


def write_checksums(root: Path) -> None:
    """Writes the checksums of all files of a finished directory into it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = Path(folder)
        ...     _ = (root / "a").write_text("1")
        ...     write_checksums(root)
        ...     whole = damage(root)
        ...     _ = (root / "a").write_text("12")
        ...     whole, damage(root)
        (None, 'a has 2 bytes, expected 1')
    """
    files = (p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file())
    checksums = {path: [*_checksum(root / path)] for path in files}
    write_file(root / CHECKSUMS, json.dumps(checksums).encode())


def damage(root: Path) -> str | None:
    """What is damaged in a directory, for a message; None if its files have their checksums.

    A file that cannot be read, or is no ordinary file, is damage as well.
    """
    odd = [p for p in sorted(root.rglob("*")) if not p.is_file() and not p.is_dir()]
    if odd:  # opening a pipe would wait for ever
        return f"{odd[0].relative_to(root).as_posix()} is no ordinary file"
    try:
        for path, (size, digest) in read_json(root / CHECKSUMS, MOST).items():
            if not Path(os.path.realpath(root / path)).is_relative_to(os.path.realpath(root)):
                return f"{CHECKSUMS} names {path!r}, which is not in the directory"
            found = _checksum(root / path)
            if found[0] != size:
                return f"{path} has {found[0]} bytes, expected {size}"
            if found[1] != digest:
                return f"{path} has another checksum than when it was written"
    except AdapterFileError as error:
        return str(error).removeprefix(f"{root}{os.sep}")
    except (ValueError, TypeError):
        return f"{CHECKSUMS} does not hold checksums"
    return None


def _checksum(path: Path) -> tuple[int, str]:
    """A file's size and SHA-256."""
    with file_errors(path, error=AdapterFileError), opened(path) as file:
        digest = hashlib.file_digest(file.stream, "sha256").hexdigest()
        return file.stream.tell(), digest
