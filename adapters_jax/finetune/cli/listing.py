"""`adapters-jax methods`, `tasks` and `models`: list what there is."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.flags import flag
from adapters_jax.finetune.options.method import PRESETS
from adapters_jax.finetune.options.parsing import UsageError

if TYPE_CHECKING:
    from adapters_jax.finetune.shapes import Entry


@dataclass(frozen=True)
class Table:
    """A table of a listing; the cells of its first `words` columns are words, others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> str:
        """The table in Markdown.

        Example:
            >>> print(Table(["a", "b"], [["1", "2"]]).markdown())
            | a | b |
            | --- | --- |
            | 1 | 2 |
        """
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Found:
    """What a listing found: tables and sentences for people, values for JSON, and the page."""

    tables: Sequence[Table]
    values: Callable[[], Any]
    page: Callable[[], str]
    notes: Callable[[], Sequence[str]] = field(default=list)


@dataclass(frozen=True)
class Listing(Command):
    """A command that lists what there is: as tables, as JSON, or as a page in Markdown.

    Args:
        markdown: print a page of the documentation.

    Raises:
        UsageError: both are asked for.
    """

    markdown: bool = False

    def __post_init__(self) -> None:
        if self.markdown and self.json:
            raise UsageError("--markdown and --json are two forms of one listing; leave one out")

    @abstractmethod
    def find(self) -> Found:
        """Finds what is listed."""

    def prepare(self, console: Console) -> Callable[[], None]:
        """Finds what is listed, and returns a function that prints it."""
        found = self.find()

        def report() -> None:
            if self.markdown:
                print(found.page(), end="")
                return
            if not self.json:
                for table in found.tables:
                    console.listing(list(table.header), list(map(list, table.rows)), table.words)
                for note in found.notes():
                    console.say(note)
            console.result(found.values() if self.json else None)

        return report


@dataclass(frozen=True)
class ListMethods(Listing):
    """Lists the methods: the values of --method, their papers, flags and learning rates.

    The second table has the classes that recipes consist of, with those of installed packages.
    """

    examples = """\
  adapters-jax methods
  adapters-jax methods --json"""

    def find(self) -> Found:
        """Finds the published recipes, and the classes of the registry."""
        from adapters_jax import presets
        from adapters_jax.methods.registry import every_method

        values: list[dict[str, Any]] = [
            {
                "method": name,
                "about": _first(getattr(presets, name.replace("-", "_"))),
                "learning_rate": preset.learning_rate,
                "epochs": preset.epochs,
                "flags": [*map(flag, preset.flags)],
            }
            for name, preset in PRESETS.items()
        ]
        rows = [
            [x["method"], x["about"], f"{x['learning_rate']:g}", ", ".join(x["flags"])]
            for x in values
        ]
        classes = [[name, cls.__name__, _first(cls)] for name, cls in every_method().items()]
        tables = [
            Table(["method", "what it trains", "learning rate", "flags"], rows, words=4),
            Table(["in recipes", "class", "what it is"], classes, words=3),
        ]
        return Found(tables, lambda: values, lambda: _page("Methods", "methods", tables))


@dataclass(frozen=True)
class ListTasks(Listing):
    """Lists the tasks: what each learns, on which kind of model, its columns and metrics."""

    examples = """\
  adapters-jax tasks
  adapters-jax tasks --json"""

    def find(self) -> Found:
        """Finds the tasks of the registry."""
        from adapters_jax.finetune.tasks import TASKS

        values: list[dict[str, Any]] = [
            {
                "task": name,
                "about": _first(type(task)),
                "model": task.kind,
                "columns": dict(task.columns),
                "metrics": list(task.metrics),
                "command": task.command,
                "example": task.example,
            }
            for name, task in TASKS.items()
        ]
        header = ["task", "what it learns", "model", "columns", "metrics", "command"]
        shown = ("task", "about", "model", "columns", "metrics", "command")
        rows = [
            [x if isinstance(x, str) else ", ".join(x) for x in map(each.__getitem__, shown)]
            for each in values
        ]
        table = Table(header, rows, words=len(header))
        return Found([table], lambda: values, lambda: _page("Tasks", "tasks", [table]))


def _first(thing: Any) -> str:
    """The first sentence of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _page(title: str, command: str, tables: Sequence[Table]) -> str:
    parts = [
        f"# {title}",
        f"`adapters-jax {command} --markdown` writes this page from the registries.",
        *(table.markdown() for table in tables),
    ]
    return "\n\n".join(parts) + "\n"


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

Of a multimodal checkpoint ({towers}), the language model alone is read, adapted and counted. It is
of that model's family, where its name stands. A merged checkpoint keeps what belongs to images.

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
        from adapters_jax.finetune.shapes import catalog

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
    from adapters_jax.finetune.models.decoder import TOWERS

    rows = []
    for entry in entries:
        missing = [name for name in PRESETS if name not in entry.methods]
        rows.append([*_row(entry), f"all but {', '.join(missing)}" if missing else "all"])
    shapes = [
        [entry.family.name, ", ".join(f"{name} ({n:,})" for name, n in entry.known.items())]
        for entry in entries
    ]
    return PAGE.format(
        methods=", ".join(PRESETS),
        towers=", ".join(TOWERS),
        families=Table([*HEADER, "methods"], rows).markdown(),
        shapes=Table(["family", "published shapes"], shapes).markdown(),
    )
