"""GGUF files (llama.cpp's): `header`, `tensors` by their `architectures`, and `adapters`."""

import os
from pathlib import Path

from adapters_jax.errors import BaseFileError


def find_gguf(path: str | Path) -> Path | None:
    """Finds the GGUF file of a path: the path itself, or the only one of a directory.

    A directory with a `config.json` is another kind of checkpoint, so the result is None.

    Raises:
        BaseFileError: the directory has several GGUF files.

    Example:
        >>> find_gguf("model.gguf").name, find_gguf("org/model")
        ('model.gguf', None)
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return path
    another = not os.path.isdir(path) or (path / "config.json").exists()
    files = [] if another else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise BaseFileError(f"{str(path)!r} holds {names}: give the path of one of them.")
    return files[0] if files else None
