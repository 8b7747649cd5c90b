"""`adapters-jax methods` and `adapters-jax tasks`: list what there is, as `models` does."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.flags import flag
from adapters_jax.finetune.options.method import PRESETS
from adapters_jax.finetune.options.parsing import UsageError


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
