"""Recognises, reads and writes adapter formats.

`base` has the contract `AdapterFormat`; `native`, `peft`, `adapterhub` and `gguf` implement it, and
`FORMATS` lists them. `servers` changes an adapter into what servers of language models load.
"""

from pathlib import Path

from adapters_jax.errors import AdapterFileError
from adapters_jax.files.manifest import CONFIG
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.formats.adapterhub import AdapterHub
from adapters_jax.finetune.formats.base import AdapterFormat
from adapters_jax.finetune.formats.gguf import Gguf
from adapters_jax.finetune.formats.native import Native
from adapters_jax.finetune.formats.peft import Peft

# A new format is a module beside the others, and its class here.
FORMATS: dict[str, AdapterFormat] = {
    each.name: each for each in (Native(), Peft(), AdapterHub(), Gguf())
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
    if found:
        raise AdapterFileError(
            f"{directory / CONFIG} has the keys of {' and '.join(each.owner for each in found)}; "
            "expected those of one of them; remove the others"
        )
    *owners, last = [each.owner for each in FORMATS.values() if each.keys]
    raise AdapterFileError(
        f"{directory} is not an adapter: it has no {CONFIG} of {', '.join(owners)} or {last}, and "
        "is no GGUF file"
    )
