"""Rows of prompt and completion as token ids: what is read, and what is to be learnt."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from adapters_jax.data.packing import Example
from adapters_jax.data.readers import DataError
from adapters_jax.data.tables import Table, count_rows, first_few
from adapters_jax.errors import UserError
from adapters_jax.pretrained.decoder import Decoder

PROMPT = "{prompt}"


@dataclass(frozen=True)
class Prompts:
    r"""How a prompt is put before a decoder; saved with a run, so that it generates alike.

    Args:
        template: text with the field `{prompt}`; a `\n` in it is a new line.
        chat: whether that text is a user's message in the model's chat template.

    Raises:
        ValueError: the template has another field, or not this one.

    Example:
        >>> Prompts("Say it: {prompt}\\n", chat=False).text("hello", decoder=None)
        'Say it: hello\n'
    """

    template: str = PROMPT
    chat: bool = True

    def __post_init__(self) -> None:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.template)]
        except ValueError as error:
            raise UserError(f"--template {self.template!r}: {error}; write {{{{ for {{") from error
        unknown = [f"{{{name}}}" for name in fields if name not in (None, "prompt")]
        if unknown:
            raise UserError(
                f"--template {self.template!r}: no field {', '.join(unknown)}; it has {PROMPT}, "
                "which --prompt COLUMN fills"
            )
        if "prompt" not in fields:
            raise UserError(f"--template {self.template!r}: it lacks the field {PROMPT}")

    def text(self, prompt: str, decoder: Decoder) -> str:
        """The text that a completion follows."""
        filled = self.template.replace(r"\n", "\n").format(prompt=prompt)
        return decoder.chat(filled) if self.chat else filled

    def encode(self, prompt: str, decoder: Decoder) -> list[int]:
        """Its token ids; a chat template spells its special tokens out."""
        text = self.text(prompt, decoder)
        return decoder.tokenizer.encode(text, add_special_tokens=not self.chat).ids


def encode_table(
    table: Table, prompts: Prompts, decoder: Decoder, max_length: int
) -> tuple[list[Example], int]:
    """A table's rows as token ids, cut at `max_length`.

    A text alone is a completion of its first token, which nothing predicts.

    Args:
        table: of prompts and completions, or of texts alone.
        prompts: how a prompt is put.
        decoder: whose tokenizer.
        max_length: in tokens.

    Returns:
        One example a row, and how many of them were cut.

    Raises:
        DataError: a prompt leaves no room for a completion.
    """
    examples = [_example(*pair, prompts, decoder) for pair in table.texts]
    long = [
        f"line {line} ({len(prompt)} tokens)"
        for line, (prompt, _) in zip(table.lines, examples, strict=True)
        if len(prompt) >= max_length
    ]
    if long:
        raise DataError(
            f"{table.path}: {count_rows(long)} a prompt that leaves no room for a completion in "
            f"--max-length {max_length}: {first_few(long)}; raise it or shorten them"
        )
    cut = sum(len(prompt) + len(completion) > max_length for prompt, completion in examples)
    return [Example(p, c[: max_length - len(p)]) for p, c in examples], cut


def _example(prompt: str, completion: str | None, prompts: Prompts, decoder: Decoder) -> Example:
    if completion is None:
        first, *rest = decoder.tokenizer.encode(prompt).ids
        return Example([first], [*rest, decoder.end])
    # By itself, so that a completion's tokens are the same behind whatever prompt.
    ids = decoder.tokenizer.encode(completion, add_special_tokens=False).ids
    return Example(prompts.encode(prompt, decoder), [*ids, decoder.end])


def count_tokens(examples: Sequence[Example]) -> tuple[int, int]:
    """All tokens, and those of completions."""
    learnt = sum(len(completion) for _, completion in examples)
    return learnt + sum(len(prompt) for prompt, _ in examples), learnt
