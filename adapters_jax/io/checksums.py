"""SHA-256 checksums of the files of a directory, written last: without them it is not whole."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

CHECKSUMS = "sha256.json"


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
    checksums = {path: [*_checksum(root / path)] for path in _files(root)}
    beside = root / f"{CHECKSUMS}.part"
    beside.write_text(json.dumps(checksums), encoding="utf-8")
    os.replace(beside, root / CHECKSUMS)


def damage(root: Path) -> str | None:
    """What is damaged in a directory, for a message; None if its files have their checksums."""
    try:
        checksums = json.loads((root / CHECKSUMS).read_text(encoding="utf-8"))
        for path, (size, digest) in checksums.items():
            found = _checksum(root / path)
            if found[0] != size:
                return f"{path} has {found[0]} bytes, expected {size}"
            if found[1] != digest:
                return f"{path} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(root)} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS} does not hold checksums"
    return None


def _files(root: Path) -> Iterator[str]:
    """The files below a directory, in order."""
    return (p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file())


def _checksum(path: Path) -> tuple[int, str]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
