"""`adapters-jax models`: lists the families of models, and what they support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from adapters_jax.app.catalog import Entry, catalog
from adapters_jax.app.console import Console
from adapters_jax.app.options.method import PRESETS

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
class ListModels:
    """Lists the families of models, their published shapes, and what each family supports.

    With a name, only what has it in its name, with the methods whose own targets the family has.
    Commands that load weights take directories and ids of the Hub of any of these families.

    Args:
        name: a part of the name of a family or of a published shape.
        markdown: print the page of the documentation.
        json: print JSON.
    """

    examples: ClassVar[str] = """\
  adapters-jax models
  adapters-jax models llama
  adapters-jax models Qwen3-8B --json"""
    positional: ClassVar[tuple[str, ...]] = ("name",)

    name: str = ""
    markdown: bool = False
    json: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Finds the families.

        Raises:
            UserError: nothing has this name.
        """
        entries = catalog(self.name)

        def report() -> None:
            if self.markdown:
                print(page(entries), end="")
                return
            if not self.json:
                self._show(entries, console)
            more = [{"methods": entry.methods} if self.name else {} for entry in entries]
            console.result([e.to_dict() | each for e, each in zip(entries, more, strict=True)])

        return report

    def _show(self, entries: Sequence[Entry], console: Console) -> None:
        shapes = [
            [name, entry.family.name, f"{number:,}"]
            for entry in entries
            for name, number in entry.known.items()
        ]
        console.table(["published shape", "family", "parameters"], shapes, words=2)
        console.table(HEADER, list(map(_row, entries)), words=len(HEADER))
        if not self.name:
            console.say("adapters-jax models NAME shows the methods of a family, too")
            return
        for entry in entries:
            console.say(f"{entry.family.name}: {', '.join(entry.methods)}")


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
        families=_table([*HEADER, "methods"], rows),
        shapes=_table(["family", "published shapes"], shapes),
    )


def _methods(entry: Entry) -> str:
    """The methods of a family, those that are missing if these are fewer."""
    own = entry.methods
    missing = [name for name in PRESETS if name not in own]
    return f"all but {', '.join(missing)}" if missing else "all"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
