"""`adapters-jax models`: lists the families of models, and what they support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters_jax.finetune.cli.listing import Found, Listing, Table
from adapters_jax.finetune.options.method import PRESETS

if TYPE_CHECKING:
    from adapters_jax.finetune.catalog import Entry


HEADER = ["family", "kind", "parameters", "commands", "files", "scan"]
PAGE = """\
# Families of models

`adapters-jax models --markdown > docs/models.md` writes this page from the records of the families.

Every family has `audit`, `plan` and `convert`, and `remat=True`, which recomputes the layers in the
backward pass. `scan` says whether `scan=True` compiles one layer for all of them. Files are read
and written where it does not say "read". A family has a method if its models have what the method
targets by default; `--targets` names other modules. All methods are
{methods}.

{families}

The published shapes, with their numbers of parameters. `audit` and `plan` take these names, their
last parts and the names of tuned variants; other commands load weights from directories and from
the Hugging Face Hub.

{shapes}
"""


@dataclass(frozen=True)
class ListModels(Listing):
    """Lists the families of models, their published shapes, and what each family supports.

    With a name, only what has it in its name, with the methods whose own targets the family has.
    Commands that load weights take directories and ids of the Hub of any of these families.

    Args:
        name: a part of the name of a family or of a published shape.
    """

    examples = """\
  adapters-jax models
  adapters-jax models llama
  adapters-jax models Qwen3-8B --json"""
    positional = ("name",)

    name: str = ""

    def find(self) -> Found:
        """Finds the families."""
        from adapters_jax.finetune.catalog import catalog

        entries = catalog(self.name)
        shapes = [
            [name, entry.family.name, f"{number:,}"]
            for entry in entries
            for name, number in entry.known.items()
        ]
        tables = [
            Table(["published shape", "family", "parameters"], shapes, words=2),
            Table(HEADER, list(map(_row, entries)), words=len(HEADER)),
        ]

        def values() -> list[dict[str, Any]]:
            more = [{"methods": entry.methods} if self.name else {} for entry in entries]
            return [e.to_dict() | each for e, each in zip(entries, more, strict=True)]

        def notes() -> list[str]:
            if not self.name:
                return ["adapters-jax models NAME shows the methods of a family, too"]
            return [f"{entry.family.name}: {', '.join(entry.methods)}" for entry in entries]

        return Found(tables, values, lambda: page(entries), notes)


def _row(entry: Entry) -> list[str]:
    """What is in a row of the table of families."""
    family = entry.family
    lists = [", ".join(entry.commands) or "none", ", ".join(entry.files)]
    return [family.name, family.kind, entry.sizes, *lists, "yes" if family.scans else "no"]


def page(entries: Sequence[Entry]) -> str:
    """The page of the documentation, `docs/models.md`."""
    rows = [[*_row(entry), _methods(entry)] for entry in entries]
    shapes = [
        [entry.family.name, ", ".join(f"{name} ({n:,})" for name, n in entry.known.items())]
        for entry in entries
    ]
    return PAGE.format(
        methods=", ".join(PRESETS),
        families=Table([*HEADER, "methods"], rows).markdown(),
        shapes=Table(["family", "published shapes"], shapes).markdown(),
    )


def _methods(entry: Entry) -> str:
    """The methods of a family, those that are missing if these are fewer."""
    own = entry.methods
    missing = [name for name in PRESETS if name not in own]
    return f"all but {', '.join(missing)}" if missing else "all"
