"""Locks a directory for one process; the system releases the lock of a process that is killed."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from adapters_jax.errors import AdapterFileError, UserError, file_errors
from adapters_jax.files.atomic import write_file
from adapters_jax.files.untrusted import read_file


def lock_directory(directory: Path, error: type[UserError]) -> FileLock:
    """Locks a directory until the process ends, or calls `unlock_directory`.

    The file `lock.pid` in it has the number of the process, for the message to others.

    Raises:
        UserError: of the type `error`: another process, or this one, has locked it.
        FileSystemError: the directory cannot be written.
    """
    # On Windows nobody can read a locked file, so the number of the process is in another one.
    lock, holder = FileLock(directory / "lock", blocking=False), directory / "lock.pid"
    with file_errors(directory / "lock", "taken"):
        try:
            lock.acquire()
        except Timeout:
            raise error(
                f"{directory} is being worked on by {_process(holder)}; wait for it, or stop it"
            ) from None
    write_file(holder, str(os.getpid()).encode())
    return lock


def unlock_directory(directory: Path, lock: FileLock) -> None:
    """Releases the lock."""
    (directory / "lock.pid").unlink(missing_ok=True)
    (directory / "lock").unlink(missing_ok=True)  # while locked: nobody else can hold it
    lock.release()


def _process(holder: Path) -> str:
    """The process in a file `lock.pid`, for a message."""
    try:
        number = read_file(holder, 20, AdapterFileError, "a number").decode("ascii", "replace")
    except AdapterFileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return "a process that has just begun or just ended"
        return f"another process ({error})"
    if not number.isdecimal():
        return f"another process ({holder} holds no number)"
    return f"process {number}" + (", which is this one" if number == str(os.getpid()) else "")
