"""Conversations: rows of messages, in the layouts that data sets have.

Each layout becomes the messages of a chat template: `{"role": ..., "content": ...}`, where a role
is system, user, assistant or tool.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adapters_jax.finetune.data.files import DataError, FilePath, PlacedRows, RowError, Rows
from adapters_jax.finetune.data.layouts import (
    COMPLETIONS,
    INSTRUCTIONS,
    MESSAGES,
    SHAREGPT,
    layout_of,
)
from adapters_jax.finetune.data.lazy_rows import mapped
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.texts import parse_json

ROLES = ("system", "user", "assistant", "tool")
_ROLES_OF_SHAREGPT = {"human": "user", "gpt": "assistant"}
_OPENING = ("system", "user")  # roles that may come first
_MESSAGES = re.compile(r'\s*\[\s*\{.*?"(role|from)"\s*:', re.DOTALL)

Message = Mapping[str, Any]


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        messages: its messages, each with a role and a content.
        tools: the JSON schemas of the functions that the assistant may call; None if it has none.
    """

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def opening(self) -> str:
        """What is said before the first answer."""
        said = [m["content"] for m in self.messages[: self.answers[0]]]
        return "\n".join(said)

    @property
    def answers(self) -> list[int]:
        """The positions of the assistant's messages."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]


@dataclass(frozen=True)
class Conversations(PlacedRows[Conversation]):
    """The conversations of one file."""

    labels = None

    @property
    def texts(self) -> Sequence[tuple[str, str | None]]:
        """Each conversation as JSON, and its tools."""
        return mapped(
            self.rows,
            lambda row: (as_json(row.messages), None if row.tools is None else as_json(row.tools)),
        )


def as_json(value: Any) -> str:
    """A value as JSON, by which equal rows are found."""
    return json.dumps(value, ensure_ascii=False, default=str)


def read_conversations(path: FilePath | Rows, column: str | None = None) -> Conversations:
    """Reads the conversations of a file, in any of the layouts of conversations.

    The layouts are `messages`; ShareGPT's `conversations`; `instruction`, `input` and `output`; and
    `prompt` and `completion`. The columns `system` and `tools` may stand beside them.

    Args:
        path: the path, as `readers.read_file` takes it.
        column: the column of the messages, if it has another name.

    Returns:
        The conversations; each begins with the system or the user, and has an answer.

    Raises:
        DataError: the file has another layout, or conversations that are not whole; the message
            lists them.

    Example:
        >>> rows = Rows(["instruction", "input", "output"], [(1, ["Add.", "1, 2", "3"])])
        >>> for message in read_conversations(rows).rows[0].messages: print(message)
        {'role': 'user', 'content': 'Add.\\n\\n1, 2'}
        {'role': 'assistant', 'content': '3'}
    """
    rows = read_file(path)
    header = rows.header
    layout = MESSAGES if column else layout_of(header)
    if layout is None or layout not in _MAKERS or (column and column not in header):
        raise DataError(
            f"{rows.path}: no conversations; expected a column "
            f"{column or 'messages, or conversations, or instruction and output'}, and the columns "
            f"are {', '.join(header)}"
        )
    make, first = _MAKERS[layout], column or layout.columns[0]

    def made(row: Mapping[str, Any]) -> Conversation:
        return conversation_of(_parsed(make(row, first)), row)

    return Conversations.of(rows, made, "conversations")


def conversation_of(messages: Any, row: Mapping[str, Any]) -> Conversation:
    """The conversation of messages with its row's system prompt and tools.

    Raises:
        RowError: it cannot be learnt.
        ValueError: the tools are a text that is not JSON.

    Example:
        >>> said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> [message["role"] for message in conversation_of(said, {"system": "Be kind."}).messages]
        ['system', 'user', 'assistant']
    """
    tools = _parsed(row.get("tools") or None)
    if not isinstance(messages, list) or not messages:
        raise RowError("it has no messages")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"its tools are a {type(tools).__name__}, expected a list of JSON schemas")
    if not all(isinstance(message, Mapping) for message in messages):
        raise RowError("a message is not an object with a role and a content")
    messages = [_message(message) for message in messages]
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"] != system:
            raise RowError("its column system and its first message are two system prompts")
    _check(messages)
    return Conversation(messages, tools)


def _parsed(value: Any) -> Any:
    """A list that is stored as a text of JSON, as in CSV; any other value as it is."""
    return parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value


def parsed_messages(value: Any) -> Any:
    """A list of messages that is stored as a text of JSON; any other value as it is."""
    return parse_json(value) if isinstance(value, str) and _MESSAGES.match(value) else value


def _message(message: Message) -> dict[str, Any]:
    """A message with the keys of chat templates; a key without a value is left out."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = _ROLES_OF_SHAREGPT.get(role, role) if isinstance(role, str) else role
    others = {k: v for k, v in message.items() if k not in _KEYS and v is not None}
    return {"role": role, "content": "" if content is None else content, **others}


_KEYS = ("role", "from", "content", "value")


def _check(messages: Sequence[Message]) -> None:
    """Raises RowError if messages cannot be learnt."""
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            expected = f"expected one of {', '.join(ROLES)}"
            raise RowError(f"message {number} has the role {role!r}, {expected}")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise RowError(f"message {number} has a {kind} as content, expected a text")
        if not content.strip() and not message.get("tool_calls"):
            raise RowError(f"message {number} of {role} is empty")
        if "\0" in content:
            raise RowError(f"message {number} has the character 0")
    first = next((m["role"] for m in messages if m["role"] != "system"), "system")
    if messages[0]["role"] not in _OPENING or first == "assistant":
        raise RowError(f"it starts with {first}, expected system or user")
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no message is of assistant, so there is nothing to learn")


def _of_instruction(row: Mapping[str, Any], column: str) -> Any:
    asked = [row[column], row.get("input")]
    said = "\n\n".join(text for text in asked if isinstance(text, str) and text.strip())
    return [_said("user", said), _said("assistant", row["output"])]


def _of_completion(row: Mapping[str, Any], column: str) -> Any:
    parts = {"user": parsed_messages(row[column]), "assistant": parsed_messages(row["completion"])}
    found: list[Any] = []
    for role, part in parts.items():
        found += part if isinstance(part, list) else [_said(role, part)]
    return found


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_MAKERS: Mapping[Any, Callable[[Mapping[str, Any], str], Any]] = {
    MESSAGES: operator.getitem,
    SHAREGPT: operator.getitem,
    INSTRUCTIONS: _of_instruction,
    COMPLETIONS: _of_completion,
}
