"""Flags are the fields of frozen dataclasses; what all of those share."""

import dataclasses
from pathlib import Path
from typing import Any


def given(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    values = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


def flag(field: str) -> str:
    """A field's name as a flag, `learning_rate` as `--learning-rate`."""
    return "--" + field.replace("_", "-")


def plain(options: Any) -> dict[str, Any]:
    """A dataclass as JSON would have it."""
    values = dataclasses.asdict(options)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
