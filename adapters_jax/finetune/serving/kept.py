"""Adapters that outlive the server: those that requests added, in a directory of the operator."""

import os
import secrets
import shutil
from functools import partial
from pathlib import Path

from adapters_jax.errors import UserError, file_errors
from adapters_jax.files.atomic import restore, write_directory
from adapters_jax.files.lock import lock_directory, unlock_directory
from adapters_jax.finetune.serving.schemas import matches_name


class Kept:
    """The adapters in a directory, each in `adapters/NAME`, whole or not at all.

    Args:
        directory: the directory, which is made if it is not there; one server at a time has it.

    Raises:
        UserError: another server has it.
        FileSystemError: it cannot be made, read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self._adapters = directory, directory / "adapters"
        with file_errors(self._adapters, "made"):
            self._adapters.mkdir(parents=True, exist_ok=True)
        self._lock = lock_directory(directory, UserError)
        restore(self._adapters)

    def paths(self) -> dict[str, Path]:
        """The directories of the adapters, by name."""
        with file_errors(self._adapters):
            found = sorted(self._adapters.iterdir())
        return {path.name: path for path in found if matches_name(path.name) and path.is_dir()}

    def check(self, name: str) -> None:
        """Raises UserError if some file systems could not tell a name from that of another."""
        same = [n for n in self.paths() if n != name and n.lower() == name.lower()]
        if same:
            raise UserError(f"the adapter {same[0]!r} is kept, and {name!r} differs in case alone")

    def put(self, name: str, folder: Path) -> None:
        """Keeps the files of a folder as an adapter; an old one of that name is replaced.

        Raises:
            FileSystemError: they cannot be written; the old one is still there.
        """
        files = {path.name: partial(shutil.copyfile, path) for path in folder.iterdir()}
        write_directory(self._adapters / name, files)

    def drop(self, name: str) -> bool:
        """Removes an adapter; returns whether there was one.

        Raises:
            FileSystemError: it cannot be removed.
        """
        path = self.paths().get(name)
        if path is not None:
            # Gone at once, also for a server that is killed now; `restore` removes the rest.
            beside = path.with_name(f".{name}.new.{secrets.token_hex(4)}")
            with file_errors(path, "removed"):
                os.replace(path, beside)
                shutil.rmtree(beside)
        return path is not None

    def close(self) -> None:
        """Lets another server have the directory."""
        unlock_directory(self.directory, self._lock)
