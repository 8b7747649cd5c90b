"""Flags are the fields of frozen dataclasses; these functions convert one into the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from adapters_jax.app.options.stored import absolute

Format = Literal["native", "peft", "adapterhub", "gguf"]  # the names of `interop.formats.FORMATS`


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
        >>> from adapters_jax.app.options.optimizer import OptimizerOptions
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


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if isinstance(value, dict):
        value = tuple(word for pair in value.items() for word in pair)
    if isinstance(value, tuple):
        return [name, *map(str, value)]
    return [f"{name}={absolute(value) if isinstance(value, Path) else value}"]
