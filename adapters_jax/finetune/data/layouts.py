"""Layouts: what rows are, by the names of their columns."""

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """A layout of columns that many data sets have.

    Attributes:
        columns: the columns that it has; others may stand beside them.
        inputs: the columns that a task's model reads; rows with equal ones are the same row.
        what: what a row is.
        task: the task that learns it.
    """

    name: str
    columns: tuple[str, ...]
    inputs: tuple[str, ...]
    what: str
    task: str


def _layout(columns: str, inputs: str, what: str, task: str, name: str = "") -> Layout:
    names = tuple(columns.split())
    return Layout(name or "/".join(names), names, tuple(inputs.split()), what, task)


CONVERSATION, PREFERENCE, COMPLETION = OF_DECODERS = ("conversation", "preference", "completion")
TAGGING = "token-classification"  # encoders learn all that is not in OF_DECODERS

MESSAGES = _layout("messages", "messages", "a conversation", CONVERSATION)
SHAREGPT = _layout("conversations", "conversations", "a conversation", CONVERSATION, "ShareGPT")
INSTRUCTIONS = _layout(
    "instruction output",
    "instruction input",
    "an instruction with its output",
    CONVERSATION,
    "instruction/input/output",
)
COMPLETIONS = _layout(
    "prompt completion", "prompt completion", "a prompt with its completion", COMPLETION
)
ANSWERS, JUDGED = "a preferred answer beside another one", "a completion that is desirable or not"
CHOICES = "premise choice1 choice2"
# The first one whose columns are there is the layout, so one with more columns stands before
# those that have some of them.
LAYOUTS = (
    MESSAGES,
    SHAREGPT,
    INSTRUCTIONS,
    _layout("chosen rejected", "prompt chosen rejected", ANSWERS, PREFERENCE),
    _layout("prompt completion label", "prompt completion", JUDGED, PREFERENCE),
    COMPLETIONS,
    _layout("tokens ner_tags", "tokens", "tokens with their tags", TAGGING),
    _layout("tokens tags", "tokens", "tokens with their tags", TAGGING),
    _layout(
        "context question answers",
        "context question",
        "a question with its answers in a context",
        "question-answering",
    ),
    _layout(CHOICES, CHOICES, "a premise with two choices", "multiple-choice"),
    _layout("text labels", "text", "a text with its labels", "multilabel"),
    _layout("image label", "image", "an image with its class", "image-classification"),
    _layout("text label", "text", "a text with its label", "classification"),
)


def layout_of(columns: Sequence[str]) -> Layout | None:
    """The layout of rows with these columns; None if no one of `LAYOUTS` fits.

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
    about = f"this is the layout {layout.name}, whose rows are each {layout.what}"
    base = "a decoder" if layout.task in OF_DECODERS else "an encoder"
    return f"; {about}; --task {layout.task} learns it, with {base} as --model"
