"""The messages, tools and calls of conversations, in OpenAI's form."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters_jax.texts import parse_json

_BEGIN, _END = "<tool_call>", "</tool_call>"


class Body(BaseModel):
    """A part of a request's body, which has no fields but its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """A null asks for nothing, as a field that is left out."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Called(Body):
    """A function that the assistant called."""

    name: str = Field(max_length=200)
    arguments: str = Field(description="an object in JSON")


class Call(Body):
    """A call of the assistant."""

    id: str = Field(max_length=200)
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """The call as chat templates take it, with its arguments as an object."""
        arguments = parse_json(self.function.arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {self.function.name} are no object in JSON")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] = Field(
        "", description="may be left out where calls are"
    )
    name: str | None = Field(None, max_length=200)
    tool_calls: list[Call] = Field([], max_length=128)
    tool_call_id: str | None = Field(None, max_length=200)
    annotations: list[Any] = Field([], max_length=0)  # as clients write answers back

    @model_validator(mode="after")
    def _check(self) -> Message:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: Field required")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: of the role {self.role}, expected assistant")
        for call in self.tool_calls:
            call.plain()
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it, with its content as one text."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        made: dict[str, Any] = {"role": self.role, "content": text}
        if self.role == "developer":
            made["role"] = "system"
        if self.tool_calls:
            made["tool_calls"] = [call.plain() for call in self.tool_calls]
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        return made | {key: value for key, value in more.items() if value is not None}


class Function(Body):
    """A function that the assistant may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field({}, description="a JSON schema")
    strict: Literal[False] = False


class Tool(Body):
    """A tool that the assistant may use."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


class Shape(Body):
    """A JSON schema that an answer follows."""

    name: str = Field("", max_length=64)
    description: str = ""
    strict: bool = Field(True, description="is followed in any case")
    of: dict[str, Any] = Field({}, alias="schema")


class ResponseFormat(Body):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Shape | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                f"json_schema: belongs to the type json_schema, and here is {self.type}"
            )
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer; None for a text."""
        if self.json_schema is not None:
            return self.json_schema.of
        return None if self.type == "text" else {"type": "object"}


def calls_of(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text before the calls that end an answer, and the calls.

    They are as templates of Hermes' kind, such as Qwen's, ask for them. If anything else follows
    the first, or a call is not whole or of another function, all of it is text.

    Args:
        names: the functions that there are.

    Example:
        >>> call = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
        >>> before, calls = calls_of("Well: " + call, ["add"])
        >>> before, calls[0]["function"]
        ('Well: ', {'name': 'add', 'arguments': '{"x": 1}'})
        >>> calls_of(call + " as I said", ["add"])[1]
        []
    """
    before, *parts = text.split(_BEGIN)
    calls = []
    for part in parts:
        inside, end, rest = part.partition(_END)
        try:
            call = parse_json(inside)
        except ValueError:
            return text, []
        match call:
            case {"name": str(name), "arguments": dict(arguments)} if name in names:
                written = json.dumps(arguments, ensure_ascii=False)
            case _:
                return text, []
        if not end or rest.strip():
            return text, []
        function = {"name": name, "arguments": written}
        calls.append({"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function})
    return before, calls


def writes_calls(template: str) -> bool:
    """Whether a chat template asks for calls in the form that `calls_of` reads."""
    return _BEGIN in template and _END in template
