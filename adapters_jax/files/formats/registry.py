"""The registry of formats: a new format is a module beside the others, and a line here."""

from __future__ import annotations

from pathlib import Path

from adapters_jax.errors import AdapterFileError
from adapters_jax.files.formats.adapterhub import AdapterHub
from adapters_jax.files.formats.base import CONFIG, AdapterFormat
from adapters_jax.files.formats.gguf import Gguf
from adapters_jax.files.formats.native import Native
from adapters_jax.files.formats.peft import Peft
from adapters_jax.files.untrusted import read_json

FORMATS: dict[str, AdapterFormat] = {
    each.name: each
    for each in (
        Native(),
        Peft(),
        AdapterHub(),
        Gguf(),
    )
}


def every_file() -> set[str]:
    """The names of all formats' files."""
    return {name for each in FORMATS.values() for name in each.files}


def format_of(directory: Path) -> AdapterFormat:
    """Returns the format of an adapter's directory.

    Raises:
        AdapterFileError: the directory has no format or several, which the message names.
    """
    values = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    found = [each for each in FORMATS.values() if each.detects(directory, values)]
    if len(found) == 1:
        return found[0]
    with_config = [each for each in FORMATS.values() if CONFIG in each.files]
    owners = [each.owner for each in found or with_config]
    if found:
        raise AdapterFileError(
            f"{directory / CONFIG} has the keys of {' and '.join(owners)}; expected those of one "
            "of them; remove the others"
        )
    raise AdapterFileError(
        f"{directory} is not an adapter: it has no {CONFIG} of {', '.join(owners[:-1])} or "
        f"{owners[-1]}, and is no GGUF file"
    )
