"""Every format that there is: a new one is a module beside the others, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.interop.base_model import BaseModel
from adapters_jax.interop.formats.adapterhub import AdapterHub
from adapters_jax.interop.formats.base import CONFIG, AdapterFormat, has_head
from adapters_jax.interop.formats.native import Native
from adapters_jax.interop.formats.peft import Peft
from adapters_jax.io.untrusted import read_json

FORMATS: dict[str, AdapterFormat] = {
    each.name: each
    for each in (
        Native(),
        Peft(),
        AdapterHub(),
    )
}

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(FORMATS)]  # what commands offer


def every_file() -> set[str]:
    """The files of all formats."""
    return {name for each in FORMATS.values() for name in each.files}


def format_of(directory: Path) -> AdapterFormat:
    """Which library wrote an adapter's directory.

    Raises:
        AdapterFileError: no format claims it, or several do; these are named.
    """
    values = read_json(directory / CONFIG) if (directory / CONFIG).exists() else {}
    found = [each for each in FORMATS.values() if each.detects(values)]
    if len(found) == 1:
        return found[0]
    owners = [each.owner for each in found or FORMATS.values()]
    if found:
        raise AdapterFileError(
            f"{directory / CONFIG} has the keys of {' and '.join(owners)}; expected those of one "
            "of them; take the others out"
        )
    raise AdapterFileError(
        f"{directory} is not an adapter: it has no {CONFIG} of {', '.join(owners[:-1])} or "
        f"{owners[-1]}"
    )


def check_head(form: AdapterFormat, base: BaseModel, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError where a head would read something else in the other library."""
    problem = form.head_problem(base) if has_head(leaves) else ""
    if problem:
        raise UserError(
            f"the head cannot go to {form.owner}: {problem}; --no-head leaves it out, and the "
            "adapter needs another one there"
        )
