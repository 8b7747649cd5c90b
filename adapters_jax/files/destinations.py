"""Where an adapter may be written: a directory that is new, empty, or has just such an adapter."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from adapters_jax.errors import AdapterFileError, UserError, file_errors, shortened
from adapters_jax.files.stores import address_of, fetch, names
from adapters_jax.files.untrusted import read_json


def own_directory(
    directory: str | Path, owner: str, files: Collection[str], config: str, key: str
) -> Path:
    """Returns the path of a directory that is new, empty, or just an adapter of a library.

    Args:
        directory: the directory, or its address in an object store.
        owner: the library.
        files: the names of all files that the adapter may have.
        config: the name of its settings; adapters of other libraries may have it as well.
        key: a key that the settings have, and those of other libraries do not.

    Raises:
        UserError: there is a file of another name, or an adapter of another library.
        AdapterFileError: its settings are damaged.
    """
    directory = Path(directory)
    before = _identity(directory)
    found = _names(directory)
    others = found - {*files}
    ours = config in found and not others and _has(directory, config, key)
    # What moves away while it is listed is an adapter that another process replaces.
    if found and not ours and _identity(directory) == before:
        where = address_of(directory) or directory
        raise UserError(
            f"{where} exists and is not just an adapter of {owner}: it has "
            f"{shortened(', '.join(sorted(others or found)))}; give another directory"
        )
    return directory


def empty_directory(directory: str | Path) -> Path:
    """Returns the path of a new or empty directory; raises `UserError` for any other."""
    directory = Path(directory)
    if _names(directory):
        where = address_of(directory) or directory
        raise UserError(f"{where} exists and is not empty; give another directory")
    return directory


def texts(beside: Mapping[str, str] | None) -> dict[str, bytes]:
    """Encodes texts by file name; raises UserError if a name has a directory in it."""
    for name in beside or {}:
        if Path(name).name != name:
            raise UserError(f"beside: {name!r} is not a file name; give one without a directory")
    return {name: text.encode("utf-8") for name, text in (beside or {}).items()}


@contextlib.contextmanager
def unmoved(directory: Path) -> Iterator[None]:
    """Raises AdapterFileError at the end if another process has replaced a directory within."""
    before = _identity(directory)
    yield
    if _identity(directory) != before:
        raise AdapterFileError(f"{directory} was replaced while it was read; read it again")


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        found = directory.stat()
    except OSError:  # absent, or an address
        return None
    return found.st_dev, found.st_ino


def _has(directory: Path, config: str, key: str) -> bool:
    """Whether a file has a key, or is gone since another process replaces its directory."""
    address = address_of(directory)
    here = (address and fetch(address, [config])) or directory
    try:
        return key in read_json(here / config)
    except AdapterFileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return True
        where = address or directory
        raise AdapterFileError(f"{error}; delete {where}, or give another directory") from None


def _names(directory: Path) -> set[str]:
    """The names in a directory, none if it is absent, with a / behind those of directories.

    Raises:
        UserError: it is a file.
    """
    if address := address_of(directory):
        return {*names(address)}
    with file_errors(directory):
        try:
            with os.scandir(directory) as entries:
                return {f"{each.name}/" if each.is_dir() else each.name for each in entries}
        except FileNotFoundError:  # so is one that another process moves away meanwhile
            return set()
        except NotADirectoryError:
            raise UserError(f"{directory} is not a directory; give another path") from None
