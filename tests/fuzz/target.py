"""What a reader is for the fuzzer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        seeds: makes valid files by name, by the name of the seed; it may use a new directory.
        read: reads a directory of such files, as a user of the library would.
        words: words of the format.
        more: ways to spoil its files beside those of their suffixes.
        own: whether the user names each file, which may then be a pipe or a device.
    """

    seeds: Callable[[Path], Mapping[str, Files]]
    read: Callable[[Path], Any]
    words: tuple[str, ...] = ()
    more: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    own: bool = False


def files_of(directory: Path, *names: str) -> Files:
    """The files of a directory, or those of these names, by their paths in it."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    found = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if not names or name in names}
