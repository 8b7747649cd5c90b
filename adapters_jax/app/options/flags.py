"""Flags are the fields of frozen dataclasses; what all of those share."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """Flags that a command does not have, or cannot read."""


def given(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    values = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options)}
    return {name: value for name, (value, default) in values.items() if value != default}


def flag(field: str) -> str:
    """A field's name as a flag, `learning_rate` as `--learning-rate`."""
    return "--" + field.replace("_", "-")


def plain(options: Any) -> dict[str, Any]:
    """A dataclass as JSON would have it, its paths whole."""
    values = dataclasses.asdict(options)
    return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in values.items()}


def words(options: Any) -> list[str]:
    """A command's flags as words of a command line, which `parse` reads again.

    Only what is not at its default is among them; paths are whole, so that they hold in whatever
    directory the process is.

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
    return [f"{name}={value.resolve() if isinstance(value, Path) else value}"]


def parse(
    command: Any, flags: Sequence[str], prog: str | None = None, description: str | None = None
) -> Any:
    """A command of its flags, as the command line reads them; tyro's errors exit the process."""
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    return tyro.cli(command, args=flags, config=config, prog=prog, description=description)


def parse_or_refuse(command: Any, flags: Sequence[str], **about: str) -> Any:
    """As `parse`; where the flags cannot be read, the box that tyro prints becomes one line.

    Raises:
        UsageError: with that line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(command, flags, **about)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_unboxed(said.getvalue())) from None


def _unboxed(text: str) -> str:
    """What a box of tyro's says, without its frame, its title and its advice."""
    _, *lines = [line.strip("│ ") for line in text.splitlines()] or [""]
    words = " ".join(" ".join(line for line in lines if line.strip("╰╯─-")).split())
    words = re.split(r" ?(?:For full helptext|Argument helptext|Got errors)", words)[0]
    return re.sub(r"^Error parsing (?!-)\S+: ", "", words).rstrip(".")
