"""Preferences: rows of a prompt with a preferred completion and another one, or with one judged.

A completion is a text after the text of its prompt, or the last message of a conversation, whose
other messages are its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from adapters_jax.finetune.data.conversations import (
    Message,
    as_json,
    conversation_of,
    parsed_messages,
)
from adapters_jax.finetune.data.files import DataError, FilePath, PlacedRows, RowError, Rows
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.tables import cell

ROLES = ("prompt", "chosen", "rejected", "completion", "label")
_JUDGED = {True: True, False: False, "true": True, "false": False}


class Preference(NamedTuple):
    """One row.

    Attributes:
        prompt: a text, or the messages before the completion.
        completions: the preferred one and the other one, or a single one; texts or messages.
        desirable: whether a single completion is desirable; None for a pair.
        tools: the JSON schemas of the functions that the assistant may call; None if it has none.
    """

    prompt: str | list[Message]
    completions: tuple[Any, ...]
    desirable: bool | None = None
    tools: list[Any] | None = None

    @property
    def talks(self) -> bool:
        """Whether it is of messages."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True)
class Preferences(PlacedRows[Preference]):
    """The rows of one file, all of them pairs, or all of them single."""

    @property
    def paired(self) -> bool:
        """Whether the rows are pairs."""
        return all(row.desirable is None for row in self.rows)

    @property
    def texts(self) -> list[tuple[str, str | None]]:
        """Each prompt and its completions, as JSON."""
        return [(as_json((row.prompt, row.tools)), as_json(row.completions)) for row in self.rows]

    @property
    def labels(self) -> list[bool | None]:
        """Whether the completion of each row is desirable; None for pairs."""
        return [row.desirable for row in self.rows]

    def singles(self) -> Preferences:
        """Rows of one completion each: of a pair, the preferred one is desirable.

        Example:
            >>> pairs = Preferences("a.csv", [Preference("Hi", ("Hello", "Go"))], [2])
            >>> [(row.completions, row.desirable) for row in pairs.singles().rows]
            [(('Hello',), True), (('Go',), False)]
        """
        found = [
            (row._replace(completions=(each,), desirable=good), i)
            for i, row in enumerate(self.rows)
            for each, good in zip(
                row.completions,
                (True, False) if row.desirable is None else (row.desirable,),
                strict=True,
            )
        ]
        return replace(self.take([i for _, i in found]), rows=[row for row, _ in found])


def read_preferences(
    path: FilePath | Rows, columns: Mapping[str, str] | None = None
) -> Preferences:
    """Reads the preferences of a file.

    The layouts are `prompt`, `chosen` and `rejected` as texts; `chosen` and `rejected` as lists of
    messages that differ in the last one; and `prompt`, `completion` and `label`, which is true or
    false. Lists may also begin with the answer, after a `prompt` that is a text or a list. The
    columns `system` and `tools` may stand beside lists.

    Args:
        path: the path, as `readers.read_file` takes it.
        columns: the columns with other names, by role.

    Raises:
        DataError: columns are missing, or rows cannot be compared; the message lists them.

    Example:
        >>> rows = Rows(["prompt", "chosen", "rejected"], [(2, ["1 + 1 =", "2", "3"])])
        >>> read_preferences(rows).rows[0].completions
        ('2', '3')
    """
    rows = read_file(path)
    names = {role: (columns or {}).get(role, role) for role in ROLES}
    there = {role for role, name in names.items() if name in rows.header}
    roles = ("chosen", "rejected") if {"chosen", "rejected"} & there else ("completion", "label")
    missing = [names[role] for role in roles if role not in there]
    if not missing and roles[0] == "completion" and "prompt" not in there:
        missing = [names["prompt"]]
    if missing:
        raise DataError(
            f"{rows.path}: no column {' or '.join(missing)}; preferences are in the columns "
            "prompt, chosen and rejected, or chosen and rejected as lists of messages, or prompt, "
            f"completion and label, and the columns here are {', '.join(rows.header)}"
        )
    make = _pair if roles[0] == "chosen" else _single

    def made(row: Mapping[str, Any]) -> Preference:
        return make({role: row.get(name) for role, name in names.items()}, row)

    return Preferences.of(rows, made, "preferences")


def _pair(given: Mapping[str, Any], row: Mapping[str, Any]) -> Preference:
    sides = []
    for role in ("chosen", "rejected"):
        try:
            sides.append(_completed(given["prompt"], given[role], row))
        except RowError as error:
            raise RowError(f"{role}: {error}") from error
    chosen, rejected = sides
    if chosen.talks != rejected.talks:
        raise RowError("one of chosen and rejected is a text and the other a list of messages")
    if chosen.prompt != rejected.prompt:
        raise RowError(
            "the prompts of chosen and rejected differ, expected two lists that differ in their "
            "last message alone"
        )
    if chosen.completions == rejected.completions:
        raise RowError("chosen and rejected are equal")
    return chosen._replace(completions=chosen.completions + rejected.completions)


def _single(given: Mapping[str, Any], row: Mapping[str, Any]) -> Preference:
    label = given["label"]
    label = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(label, bool | str) or label not in _JUDGED:
        raise RowError(f"the label is {given['label']!r}, expected true or false")
    found = _completed(given["prompt"], given["completion"], row)
    return found._replace(desirable=_JUDGED[label])


def _completed(prompt: Any, completion: Any, row: Mapping[str, Any]) -> Preference:
    prompt, completion = parsed_messages(prompt), parsed_messages(completion)
    if isinstance(completion, list):
        return _talked(prompt, completion, row)
    texts = cell(prompt), cell(completion)
    if not texts[1].strip():
        raise RowError("it is empty")
    if not texts[0].strip():
        raise RowError("there is no prompt beside this text")
    return Preference(texts[0], (texts[1],))


def _talked(prompt: Any, messages: list[Any], row: Mapping[str, Any]) -> Preference:
    """A list of messages, the last one as the completion of the others."""
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and first.get("role", first.get("from")) in ("assistant", "gpt"):
        said = prompt if isinstance(prompt, list) else [{"role": "user", "content": cell(prompt)}]
        messages = [*said, *messages]
    found = conversation_of(messages, row)
    *before, last = found.messages
    if last["role"] != "assistant":
        raise RowError(f"it ends with a message of {last['role']}, expected one of assistant")
    return Preference(before, (last,), tools=found.tools)
