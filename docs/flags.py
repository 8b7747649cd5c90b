"""Pages of the commands and their flags, made of what `--help` reads whenever the site is built."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters_jax.finetune.cli.main import COMMANDS, about, command_of
from adapters_jax.finetune.options.flags import flag, misfit, plain
from adapters_jax.finetune.options.parsing import Leaf, flags_of
from docs.facts import table


def write(folder: Path) -> None:
    """Writes a page for each command, and removes those of commands that are gone."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.md"):
        path.unlink()
    for name in COMMANDS:
        (folder / f"{name}.md").write_text(page(name))


def commands() -> str:
    """One row for each command: its page, and the first sentence of its help."""
    rows = [("command", "what it does")]
    for name in COMMANDS:
        summary = about(command_of(name)).partition("\n\n")[0].partition(". ")[0].rstrip(".")
        rows.append((f"[{name}](commands/{name}.md)", _cell(summary)))
    return table(rows)


def page(name: str) -> str:
    """The page of a command: what it does, examples, and its flags under the headings of its help.

    Args:
        name: the name of the command.
    """
    command = command_of(name)
    text, _, examples = about(command).partition("\n\nexamples:\n")
    lines = inspect.cleandoc(examples)
    parts = [f"# {name}", _prose(text), f"```sh\n{lines}\n```", *_tables(command)]
    return "\n\n".join(parts) + "\n"


def _tables(command: Any) -> Iterator[str]:
    groups: dict[str, list[tuple[str, ...]]] = {}
    for leaf in flags_of(command):
        rows = groups.setdefault(leaf.group, [("flag", "type", "default", "meaning")])
        name = leaf.name.upper() if leaf.name in command.positional else flag(leaf.name)
        rows.append((f"`{name}`", _cell(_type(leaf)), _cell(_default(leaf)), _cell(leaf.help)))
    for title, rows in groups.items():
        yield f"## {title}"
        yield table(rows)


def _type(leaf: Leaf) -> str:
    """The type in the words of the error for a value that does not fit it."""
    words = misfit(object(), leaf.hint) or ""
    return "a switch" if bool in leaf.kinds else words.removesuffix(" or null")


def _default(leaf: Leaf) -> str:
    if leaf.default is inspect.Parameter.empty:
        return "required"
    value = plain(leaf.default)
    if value in (None, [], {}, ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _prose(text: str) -> str:
    """A help as Markdown: what is in backticks is code, and other marks mean themselves."""
    parts = text.split("`")
    for mark in "\\*_[]<>$":
        parts[::2] = [part.replace(mark, f"\\{mark}") for part in parts[::2]]
    return "`".join(parts)


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")
