"""Directories and files that appear whole or not at all, whatever fails meanwhile."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from adapters_jax.errors import file_errors

Content = bytes | Callable[[Path], None]


def write_directory(place: Path, files: Mapping[str, Content]) -> None:
    """Writes a directory beside its place, through to the disk, and renames it there.

    Args:
        place: of the directory; what was there is replaced.
        files: contents by name; or what writes a file to a path.

    Raises:
        FileSystemError: the disk is full or cannot be written. What was there is as it was, and
            nothing else is left.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_directory(Path(parent, "a"), {"x": b"1"})
        ...     Path(parent, "a", "x").read_bytes()
        b'1'
    """
    with file_errors(place, "written"):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            beside.chmod(0o755)
            for name, data in files.items():
                _write(beside / name, data)
            _sync(beside)
            _put(beside, place)
            _sync(place.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def write_file(place: Path, content: Content) -> None:
    """Writes a file beside its place, through to the disk, and renames it there.

    Args:
        place: of the file; what was there is replaced.
        content: its bytes; or what writes it to a path.

    Raises:
        OSError: the disk is full or cannot be written; what was there is as it was.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_file(Path(parent, "a"), b"1")
        ...     os.listdir(parent)
        ['a']
    """
    beside = place.with_name(f".{place.name}.part")
    with file_errors(place, "written"):
        try:
            _write(beside, content)
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)


def _put(beside: Path, directory: Path) -> None:
    """Renames a finished directory into its place; what was there stays until then, or returns."""
    if not directory.exists():
        os.replace(beside, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    try:
        os.replace(directory, old)
        os.replace(beside, directory)
    finally:
        if directory.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, directory)


def _write(path: Path, content: Content) -> None:
    """Writes a file through to the disk."""
    if callable(content):
        content(path)
    with open(path, "ab" if callable(content) else "wb") as file:
        if not callable(content):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Writes the names in a directory through to the disk, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
