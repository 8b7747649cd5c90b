"""Encodes prompts and completions as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.data.files import DataError, count_rows, first_few, place
from adapters_jax.finetune.data.packing import Example, Marked
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.pretrained.decoder import DecoderTokenizer


def encode_table(
    table: Table, prompts: Prompts, decoder: DecoderTokenizer, max_length: int
) -> tuple[list[Example], int]:
    """Encodes the rows of a table as token ids, cut at `max_length`.

    A plain text is encoded as the completion of its first token, which nothing predicts. Where an
    encoder reads the prompt, it and the completion have this length each.

    Args:
        table: a table of prompts and completions, or of plain texts.
        prompts: the format of prompts.
        decoder: the decoder whose tokenizer encodes the rows.
        max_length: the largest number of tokens that the model reads at once.

    Returns:
        One example for each row, and the number of rows that were cut.

    Raises:
        DataError: a prompt leaves no room for a completion.
    """
    examples = [encode_pair(*pair, prompts, decoder) for pair in table.texts]
    rooms = [max_length - (0 if decoder.encodes else len(prompt)) for prompt, _ in examples]
    long = [
        f"{place(line)} ({len(prompt)} tokens)"
        for line, (prompt, _), room in zip(table.lines, examples, rooms, strict=True)
        if len(prompt) > max_length or room < 1
    ]
    if long:
        raise DataError(
            f"{table.path}: {count_rows(long)} a prompt that "
            f"{'is too long for' if decoder.encodes else 'leaves no room for a completion in'} "
            f"--max-length {max_length}: {first_few(long)}; raise it or shorten them"
        )
    cut = sum(len(c) > room for (_, c), room in zip(examples, rooms, strict=True))
    return [Example(p, c[:room]) for (p, c), room in zip(examples, rooms, strict=True)], cut


def encode_pair(
    prompt: str, completion: str | None, prompts: Prompts, decoder: DecoderTokenizer
) -> Example:
    """Encodes a prompt and its completion, which the end token follows; or a plain text."""
    if completion is None:
        first, *rest = decoder.tokenizer.encode(prompt).ids
        return Example([first], [*rest, decoder.end])
    # Encoded by itself, so that a completion has the same tokens after any prompt.
    ids = decoder.tokenizer.encode(completion, add_special_tokens=False).ids
    return Example(prompts.encode(prompt, decoder), [*ids, decoder.end])


def count_tokens(examples: Sequence[Example | Marked]) -> tuple[int, int]:
    """The number of all tokens, and of those that the loss counts."""
    learnt = sum(label != NOTHING for example in examples for label in example.labels)
    return sum(len(example.ids) for example in examples), learnt
