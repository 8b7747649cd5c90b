"""Object stores by fsspec: `gs://bucket/x`, `s3://bucket/x` and its other addresses.

An object store has no directories, no locks and no renaming, only whole objects. So files are
written on this machine, where they appear whole or not at all, and copied: what says that a
directory is whole is removed first and copied last.
"""

import atexit
import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from adapters_jax.errors import FileSystemError, UserError, needed, shortened

MARKS = ("adapter_config.json", "sha256.json")  # written last: without them nothing is whole
_LAST = "config.json"  # of a run, which says that it is finished
# Locks, and what `atomic` and orbax write under other names first.
_OWN = re.compile(
    r"(.*/)?(lock|lock\.pid|\.[^/]+\.(new|old)\.[^/]*|\.[^/]+\.part|[^/]*orbax-checkpoint-tmp[^/]*)(/.*)?"
)
_ADDRESS = re.compile(r"([a-z][a-z0-9+]+):/{1,3}(.+)")
_LOCAL = ("file", "local")
_FETCHED: dict[Path, str] = {}  # the copies of `fetch`, and whence
_NO_STORES = ("http", "https", "ftp", "sftp", "ssh")
# What clients of stores raise beside OSError.
_RAISED = (
    *(("botocore.exceptions", name) for name in ("BotoCoreError", "ClientError")),
    *(("google.auth.exceptions", "GoogleAuthError"), ("gcsfs.retry", "HttpError")),
    *(("aiohttp", "ClientError"), ("requests", "RequestException")),
    *(("azure.core.exceptions", "AzureError"), ("huggingface_hub.errors", "HTTPError")),
)


def address_of(path: Any) -> str | None:
    """The address in an object store that a path is; None for one of this machine.

    A `Path` of an address has lost a slash, which it gets back.

    Example:
        >>> address_of("gs://bucket/a"), address_of(Path("s3://bucket/a")), address_of("runs/a")
        ('gs://bucket/a', 's3://bucket/a', None)
        >>> address_of("file:///tmp/a")
        'file:///tmp/a'
    """
    found = isinstance(path, str | os.PathLike) and _ADDRESS.fullmatch(str(path))
    if not found or found[1] in _NO_STORES:
        return None
    root = "/" if found[1] in _LOCAL else ""
    return f"{found[1]}://{root}{found[2].strip('/')}"


def names(address: str) -> list[str]:
    """The names directly below an address, sorted, with a / behind those of folders.

    Raises:
        FileSystemError: the store does not answer, or refuses.
        MissingPackageError: its package is not installed.
    """
    store, root = _open(address)
    with _errors(address, "read"):
        store.invalidate_cache()
        try:
            found = store.ls(root, detail=True)
        except FileNotFoundError:
            return []
    kinds = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] for entry in found}
    own = root.rstrip("/").rpartition("/")[2]
    if [*kinds] == [own] and kinds[own] == "file":  # the address of a file
        return []
    return sorted(f"{n}/" if kind == "directory" else n for n, kind in kinds.items() if n)


def fetch(address: str, files: Sequence[str]) -> Path | None:
    """Copies files to a new directory of this machine, which goes when the process ends.

    Args:
        address: of a directory.
        files: patterns of names directly below it, and below its folder `adapter`.

    Returns:
        The directory; None if no file matches.

    Raises:
        FileSystemError: the store does not answer, or refuses.
        MissingPackageError: its package is not installed.
    """
    there = names(address)
    found = [name for name in there if any(fnmatch(name, pattern) for pattern in files)]
    if "adapter/" in there:
        inner = [n for n in names(f"{address}/adapter") if any(fnmatch(n, p) for p in files)]
        found += [f"adapter/{name}" for name in inner]
    if not found:
        return None
    directory = Path(tempfile.mkdtemp(prefix="adapters-jax-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    # Whoever replaces an adapter removes its mark first, and writes the new one last.
    found.sort(key=_is_mark, reverse=True)
    _copy_here(address, found, directory)
    marks = filter(_is_mark, found)
    if any(_content(address, mark) != (directory / mark).read_bytes() for mark in marks):
        raise FileSystemError(f"{address} was replaced while it was read; read it again")
    _FETCHED[directory] = address
    return directory


def complete(directory: Path, files: Sequence[str]) -> None:
    """Copies further files into a directory that `fetch` made; no other directory changes."""
    if address := _FETCHED.get(directory):
        there = [n for n in names(address) if any(fnmatch(n, pattern) for pattern in files)]
        _copy_here(address, there, directory)


def replace_all(directory: Path, address: str) -> None:
    """Copies a directory of files to an address, in place of the files that are directly below it.

    Raises:
        FileSystemError: the store does not answer, or refuses.
        MissingPackageError: its package is not installed.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_text("1")
        ...     replace_all(Path(folder), "memory://doc/y")
        >>> names("memory://doc/y")
        ['a']
    """
    mirror = Mirror(directory, address)
    mirror.known = dict.fromkeys(name for name in names(address) if not name.endswith("/"))
    mirror.push()


class Mirror:
    """A directory of this machine and its copy in an object store, which is written as it grows.

    Args:
        directory: on this machine.
        address: of the copy. Whatever is below it belongs to the copy.

    Example:
        >>> with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        ...     _ = Path(one, "a").write_text("1")
        ...     Mirror(Path(one), "memory://doc/x").push()
        ...     Mirror(Path(other), "memory://doc/x").pull()
        ...     os.listdir(other)
        ['a']
    """

    def __init__(self, directory: Path, address: str) -> None:
        self.directory, self.address = directory, address
        self.writing = threading.Lock()  # whoever replaces a directory below holds it
        self.known: dict[str, Any] = {}

    def pull(self) -> None:
        """Copies everything to this machine.

        Raises:
            FileSystemError: the store does not answer, or refuses.
            MissingPackageError: its package is not installed.
        """
        store, root = _open(self.address)
        with _errors(self.address, "read"):
            store.invalidate_cache()
            found = store.find(root)
        start = len(root.rstrip("/")) + 1
        files = [name for path in found if not _OWN.fullmatch(name := path[start:]) and name]
        _copy_here(self.address, files, self.directory)
        self.known = self._stamps()

    def push(self) -> None:
        """Copies what changed since the last time, and removes what is gone.

        Raises:
            FileSystemError: the store does not answer, or refuses; what it had is as whole as it
                was, or has lost the mark that says so.
        """
        with self.writing:
            self._push()

    def _push(self) -> None:
        store, root = _open(self.address)
        now = self._stamps()
        gone = [name for name in self.known if name not in now]
        new = [name for name, stamp in now.items() if self.known.get(name) != stamp]
        folders = {name.rpartition("/")[0] for name in (*gone, *new)}
        marks = [m for m in self.known if _is_mark(m) and m in now and _touched(m, folders)]

        def remove(name: str) -> None:
            store.rm_file(f"{root}/{name}")
            del self.known[name]

        with _errors(self.address, "written"):
            for name in marks:
                remove(name)
            for name in sorted({*new, *marks}, key=_order):
                store.put_file(str(self.directory / name), f"{root}/{name}")
                self.known[name] = now[name]
            # Last, since a finished run has no checkpoints, and one without either is lost.
            for name in sorted(gone, key=lambda name: not _is_mark(name)):
                remove(name)

    def _stamps(self) -> dict[str, tuple[int, int, int]]:
        """By which the files of this machine are known to have changed, by name."""
        found = {}
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            if path.is_file() and not _OWN.fullmatch(name):
                status = path.stat()
                found[name] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return found


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] in MARKS


def _touched(mark: str, folders: set[str]) -> bool:
    """Whether something changed in the folder of a mark, or below it."""
    folder = mark.rpartition("/")[0]
    return any(each == folder or each.startswith(f"{folder}/") or not folder for each in folders)


def _order(name: str) -> tuple[bool, bool, str]:
    return name == _LAST, _is_mark(name), name


def _copy_here(address: str, files: Sequence[str], directory: Path) -> None:
    store, root = _open(address)
    with _errors(address, "read"):
        for name in files:
            place = directory / name
            if not place.resolve().is_relative_to(directory.resolve()):
                raise FileSystemError(
                    f"{address} has an object {name!r}, which is no path below it"
                )
            place.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{root}/{name}", str(place))


def _content(address: str, name: str) -> bytes | None:
    """The content of a file below an address; None where it is gone."""
    store, root = _open(address)
    with _errors(address, "read"):
        try:
            return bytes(store.cat_file(f"{root}/{name}"))
        except FileNotFoundError:
            return None


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address, and its path there."""
    protocol = address.partition(":")[0]
    with needed(address, f"fsspec, with its package for {protocol}://", "cloud"):
        import fsspec

        try:
            with _errors(address, "opened"):
                # Others have no directories, and s3fs would make a bucket of that name.
                makes = {"auto_mkdir": True} if protocol in _LOCAL else {}
                store, root = fsspec.core.url_to_fs(address, **makes)
        except ValueError as problem:
            if isinstance(problem, UserError):
                raise
            raise UserError(
                f"{address}: {protocol}:// is no object store that fsspec knows; write "
                "gs://bucket/path or s3://bucket/path"
            ) from problem
    return store, root


@contextlib.contextmanager
def _errors(address: str, verb: str) -> Iterator[None]:
    """Turns what the client of a store raises into a FileSystemError that names the address."""
    try:
        yield
    except Exception as problem:
        # Only now, since a client may import these with its first request.
        modules = [(sys.modules.get(module), name) for module, name in _RAISED]
        kinds = [getattr(module, name, OSError) for module, name in modules]
        if isinstance(problem, UserError) or not isinstance(problem, (OSError, *kinds)):
            raise
        why = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        if isinstance(problem, FileNotFoundError):
            why = "the bucket or the path does not exist"
        bucket = address.partition("://")[2].partition("/")[0]
        if isinstance(problem, PermissionError) or "orbidden" in why or "redentials" in why:
            why += f"; give this process credentials that may do so in the bucket {bucket!r}"
        raise FileSystemError(f"{address} cannot be {verb}: {shortened(why)}") from problem
