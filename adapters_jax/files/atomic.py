"""Writes directories and files that appear whole or not at all, even if writing fails."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from adapters_jax.errors import file_errors
from adapters_jax.files.stores import address_of, replace_all

_ATTEMPTS = 100
_BESIDE = re.compile(r"\.(.+)\.(new|old)\.[0-9a-f]{8}")  # see `new_directory`
_OF_OTHERS = (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)  # another process was faster

Content = bytes | Callable[[Path], None]


def write_directory(target: Path, files: Mapping[str, Content]) -> None:
    """Writes a directory under a temporary name, syncs it to disk and renames it to `target`.

    At an address in an object store it is written here first, and then copied: one that replaces
    another is not there meanwhile.

    Args:
        target: the path of the directory, or its address; an old one is replaced.
        files: contents by name, `x` or `a/x`: bytes, or a function that writes a file to a
            path.

    Raises:
        FileSystemError: the disk is full or cannot be written. An old directory is unchanged, and
            no temporary one is left.
        MissingPackageError: the package for an address is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_directory(Path(parent, "a"), {"x": b"1"})
        ...     Path(parent, "a", "x").read_bytes()
        b'1'
    """
    if address := address_of(target):
        with tempfile.TemporaryDirectory(prefix="adapters-jax-") as parent:
            here = Path(parent, "written")
            write_directory(here, files)
            replace_all(here, address)
        return
    target = target.resolve()  # a link is kept: its target is replaced
    with file_errors(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = new_directory(target)
        try:
            for name, data in files.items():
                _write(beside / name, data)
            _sync(beside)
            _replace(beside, target)
            _sync(target.parent)  # the renaming itself is lost in a crash before this
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def restore(parent: Path) -> None:
    """Puts in order what a kill within `write_directory` left beside directories of this parent.

    An old directory whose new one is not there yet gets its name back; everything else is removed.
    Nobody else may write directories there meanwhile.

    Raises:
        FileSystemError: the directory cannot be read, or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     Path(parent, ".a.old.01234567", "x").mkdir(parents=True)
        ...     restore(Path(parent))
        ...     os.listdir(parent)
        ['a']
    """
    with file_errors(parent, "put in order"):
        for path in sorted(parent.iterdir()):
            found = _BESIDE.fullmatch(path.name)
            if found and path.is_dir() and not path.is_symlink():
                if found[2] == "old":
                    _put_back(path, parent / found[1])
                else:
                    shutil.rmtree(path)


def write_file(target: Path, content: Content) -> None:
    """Writes a file under a temporary name, syncs it to disk and renames it to `target`.

    Several that write one path at once leave the file of one of them, whole.

    Args:
        target: the path of the file; an old one is replaced.
        content: its bytes, or a function that writes it to a path.

    Raises:
        FileSystemError: the disk is full or cannot be written; an old file is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_file(Path(parent, "a"), b"1")
        ...     os.listdir(parent)
        ['a']
    """
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with file_errors(target, "written"):
        try:
            _write(beside, content)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def new_directory(target: Path, what: str = "new") -> Path:
    """Makes an empty directory beside a path, under a name that nobody can know before.

    The user's umask says who may open it, as for what is renamed to `target` later.
    """
    directory = target.with_name(f".{target.name}.{what}.{secrets.token_hex(4)}")
    directory.mkdir()
    return directory


def remove(path: Path) -> None:
    """Removes whatever is at a path, as far as the system lets it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace(beside: Path, directory: Path) -> None:
    """Renames a finished directory to its final name; if that fails, the old one is put back.

    Where another process does the same meanwhile, the directory is the one of the last of them.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        old = new_directory(directory, "old")
        try:
            if directory.exists():
                os.replace(directory, old)
            os.replace(beside, directory)
            return
        except OSError as error:
            if error.errno not in _OF_OTHERS or attempt == _ATTEMPTS:
                raise
        finally:
            _put_back(old, directory)


def _put_back(old: Path, directory: Path) -> None:
    """Renames an old directory back to its name, or removes it if there is a new one."""
    if any(old.iterdir()) and not directory.exists():
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(old, directory)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: Content) -> None:
    """Writes a file and syncs it to disk."""
    path.parent.mkdir(exist_ok=True)
    # A function closes its file, which is opened once more, to append nothing, to be synced.
    if callable(content):
        content(path)
    with open(path, "ab" if callable(content) else "xb") as file:
        if not callable(content):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Syncs the names in a directory to disk, if the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
