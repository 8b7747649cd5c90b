"""The SHA-256 sums of a directory's files, written last: what has none, or others, is not whole."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

SUMS = "sha256.json"


def write_sums(root: Path) -> None:
    """Writes down what the files of a directory are, once they are all there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     root = Path(place)
        ...     _ = (root / "a").write_text("1")
        ...     write_sums(root)
        ...     whole = damage(root)
        ...     _ = (root / "a").write_text("12")
        ...     whole, damage(root)
        (None, 'a has 2 bytes and had 1')
    """
    sums = {path: [*_sum(root / path)] for path in _files(root)}
    beside = root / f"{SUMS}.part"
    beside.write_text(json.dumps(sums), encoding="utf-8")
    os.replace(beside, root / SUMS)


def damage(root: Path) -> str | None:
    """What is wrong with a directory; None if it is what was written."""
    try:
        sums = json.loads((root / SUMS).read_text(encoding="utf-8"))
        for path, (size, digest) in sums.items():
            found = _sum(root / path)
            if found[0] != size:
                return f"{path} has {found[0]} bytes and had {size}"
            if found[1] != digest:
                return f"{path} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(root)} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{SUMS} is not what was written"
    return None


def _files(root: Path) -> Iterator[str]:
    """The files below a directory, in order."""
    return (p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file())


def _sum(path: Path) -> tuple[int, str]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
