"""Layouts: what rows are, by the names of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """A layout of columns that many data sets have.

    Attributes:
        name: its name.
        columns: the columns that it has; others may stand beside them.
        inputs: those of them that a task's model reads; rows with equal ones are the same row.
        what: what a row is.
        task: the task that learns it; None if there is none yet.
    """

    name: str
    columns: tuple[str, ...]
    inputs: tuple[str, ...]
    what: str
    task: str


MESSAGES = Layout("messages", ("messages",), ("messages",), "a conversation", "conversation")
SHAREGPT = Layout(
    "ShareGPT", ("conversations",), ("conversations",), "a conversation", "conversation"
)
INSTRUCTIONS = Layout(
    "instruction/input/output",
    ("instruction", "output"),
    ("instruction", "input"),
    "an instruction with its output",
    "conversation",
)
PREFERENCES = Layout(
    "chosen/rejected",
    ("chosen", "rejected"),
    ("prompt", "chosen", "rejected"),
    "a preferred answer beside another one",
    "preference",
)
JUDGED = Layout(
    "prompt/completion/label",
    ("prompt", "completion", "label"),
    ("prompt", "completion"),
    "a completion that is desirable or not",
    "preference",
)
COMPLETIONS = Layout(
    "prompt/completion",
    ("prompt", "completion"),
    ("prompt", "completion"),
    "a prompt with its completion",
    "completion",
)
LAYOUTS = (
    MESSAGES,
    SHAREGPT,
    INSTRUCTIONS,
    PREFERENCES,
    JUDGED,
    COMPLETIONS,
    Layout(
        "tokens/ner_tags",
        ("tokens", "ner_tags"),
        ("tokens",),
        "tokens with their tags",
        "token-classification",
    ),
    Layout(
        "tokens/tags",
        ("tokens", "tags"),
        ("tokens",),
        "tokens with their tags",
        "token-classification",
    ),
    Layout(
        "context/question/answers",
        ("context", "question", "answers"),
        ("context", "question"),
        "a question with its answers in a context",
        "question-answering",
    ),
    Layout(
        "premise/choice1/choice2",
        ("premise", "choice1", "choice2"),
        ("premise", "choice1", "choice2"),
        "a premise with two choices",
        "multiple-choice",
    ),
    Layout("text/labels", ("text", "labels"), ("text",), "a text with its labels", "multilabel"),
    Layout(
        "image/label",
        ("image", "label"),
        ("image",),
        "an image with its class",
        "image-classification",
    ),
    Layout("text/label", ("text", "label"), ("text",), "a text with its label", "classification"),
)


OF_DECODERS = ("conversation", "preference", "completion")  # tasks; encoders learn all others


def layout_of(columns: Sequence[str]) -> Layout | None:
    """The layout of rows with these columns; None if it is none of `LAYOUTS`.

    Example:
        >>> layout_of(["id", "tokens", "ner_tags"]).what
        'tokens with their tags'
        >>> layout_of(["review", "stars"])
    """
    return next((layout for layout in LAYOUTS if {*layout.columns} <= {*columns}), None)


def hint(columns: Sequence[str]) -> str:
    """Which task learns rows of these columns, to end a message; empty if that is not known."""
    layout = layout_of(columns)
    if layout is None:
        return ""
    about = f"this is the layout {layout.name}, a row of which is {layout.what}"
    base = "a decoder" if layout.task in OF_DECODERS else "an encoder"
    return f"; {about}; --task {layout.task} learns it, with {base} as --model"
