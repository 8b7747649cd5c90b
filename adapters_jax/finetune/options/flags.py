"""Flags are the fields of frozen dataclasses; these functions convert one into the other."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from adapters_jax.finetune.options.stored import absolute

Format = Literal["native", "peft", "adapterhub", "gguf"]  # the names of `files.formats.FORMATS`


def given(options: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass that differ from their defaults."""
    values = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


def flag(field: str) -> str:
    """Returns a field's name as a flag: `learning_rate` as `--learning-rate`, `for_` as `--for`."""
    return "--" + field.rstrip("_").replace("_", "-")


def words(options: Any) -> list[str]:
    """Returns the flags of a command as words of a command line, which `parse` can read again.

    Fields at their default are left out. Paths are absolute, so that the line works in any
    directory.

    Example:
        >>> from adapters_jax.finetune.options.optimizer import OptimizerOptions
        >>> words(OptimizerOptions(epochs=2.0, clip=0.5))
        ['--epochs=2.0', '--clip=0.5']
    """
    found: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            found += words(value)
        elif field.name in given(options):
            found += _words(flag(field.name), value)
    return found


def portable(command: str, options: Any) -> str:
    """A command line with paths that do not name the directories of this machine.

    A path below the working directory becomes relative to it; of another, the last part remains.

    Args:
        command: the command line, with absolute paths.
        options: the class of its options, which says what is a path.

    Example:
        >>> from adapters_jax.finetune.options.data import DataOptions
        >>> portable("adapters-jax finetune --train=/home/me/rows.csv --text=/a", DataOptions)
        'adapters-jax finetune --train=rows.csv --text=/a'
    """
    paths = _path_flags(options)
    return shlex.join(
        f"{name}={portable_path(Path(value))}" if equals and name in paths else word
        for word in shlex.split(command)
        for name, equals, value in [word.partition("=")]
    )


def portable_path(path: Path) -> str:
    """A path relative to the working directory, or the last part of one that is elsewhere."""
    if not path.is_absolute():
        return path.as_posix()
    inside = path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()).as_posix() if inside else path.name


def _path_flags(options: Any) -> set[str]:
    """The flags whose values are paths; a model may be one."""
    found = {"--model"}
    for name, hint in get_type_hints(options).items():
        if dataclasses.is_dataclass(hint):
            found |= _path_flags(hint)
        elif Path in (hint, *get_args(hint)):
            found.add(flag(name))
    return found


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if isinstance(value, dict):
        value = tuple(word for pair in value.items() for word in pair)
    if isinstance(value, tuple):
        return [name, *map(str, value)]
    return [f"{name}={absolute(value) if isinstance(value, Path) else value}"]
