"""Encodes preferences, and makes batches in which a row has the two completions to compare.

A row is one sequence of two segments, as rows are packed for completions: a prompt with the
preferred completion, and the prompt again with the other one. For KTO the second segment is the
prompt with the completion of another row, whose prompt differs. It is chosen once, so that the
reference's log-probabilities of it are computed once, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapters_jax.finetune.data.batches import Batches, choose_buckets
from adapters_jax.finetune.data.conversations import Conversation
from adapters_jax.finetune.data.files import DataError, Line, count_rows, first_few, place
from adapters_jax.finetune.data.packing import Example, Packed, sequence
from adapters_jax.finetune.data.preferences import Preference, Preferences
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.pretrained.decoder import DecoderTokenizer, rounded
from adapters_jax.finetune.tasks.conversation_rows import ChatEncoder
from adapters_jax.finetune.tasks.prompts import encode_pair
from adapters_jax.finetune.tasks.views import lengths_of

_ENDLESS = 2**31


@dataclass(frozen=True)
class PreferenceEncoder:
    """Encodes preferences.

    Args:
        decoder: the tokenizer and the chat template.
        prompts: the format of prompts that are texts.
        max_length: the largest number of tokens in a prompt with one completion. Where there are
            more, the beginning of the prompt is cut; both completions keep the same prompt.
    """

    decoder: DecoderTokenizer
    prompts: Prompts
    max_length: int

    def encode(self, rows: Preferences) -> tuple[list[tuple[Example, ...]], int]:
        """Encodes each completion of each row after its prompt.

        Returns:
            The encoded rows, and the number of those whose prompts were cut.

        Raises:
            DataError: the chat template rejects a row, or a completion leaves no room for a prompt.
        """
        whole = [
            self._encode(row, rows.path, line)
            for row, line in zip(rows.rows, rows.lines, strict=True)
        ]
        fitting = [fitted(row, self.max_length) for row in whole]
        long = [
            f"{place(line)} ({max(len(each.completion) for each in row)} tokens)"
            for line, row, fits in zip(rows.lines, whole, fitting, strict=True)
            if fits is None
        ]
        if long:
            raise DataError(
                f"{rows.path}: {count_rows(long)} a completion that leaves no room for its prompt "
                f"in --max-length {self.max_length}: {first_few(long)}; raise it or shorten them"
            )
        kept = [row for row in fitting if row is not None]
        return kept, sum(row != before for row, before in zip(kept, whole, strict=True))

    def _encode(self, row: Preference, path: str, line: Line) -> tuple[Example, ...]:
        if isinstance(row.prompt, str):
            return tuple(
                encode_pair(row.prompt, each, self.prompts, self.decoder)
                for each in row.completions
            )
        chat, found = ChatEncoder(self.decoder, _ENDLESS), []
        for each in row.completions:
            *_, answer = chat.answers_at(Conversation([*row.prompt, each], row.tools), path, line)
            ids, learnt = chat.mark(answer.text, answer.spans)
            if not any(learnt):
                raise DataError(f"{path}, {place(line)}: the chat template leaves its answer out")
            first, last = learnt.index(True), len(learnt) - learnt[::-1].index(True)
            found.append(Example(ids[:first], ids[first:last]))
        return tuple(found)


def fitted(row: Sequence[Example], max_length: int) -> tuple[Example, ...] | None:
    """Cuts the prompts of a row from the left, by as many tokens each; None if nothing is left.

    Example:
        >>> fitted([Example([1, 2, 3], [4]), Example([1, 2, 3], [5, 6])], 4)
        (Example(prompt=[2, 3], completion=[4]), Example(prompt=[2, 3], completion=[5, 6]))
    """
    cut = max(0, *(len(each.ids) - max_length for each in row))
    if cut >= min(len(each.prompt) for each in row):
        return None
    return tuple(Example(each.prompt[cut:], each.completion) for each in row)


def mismatched(
    rows: Sequence[tuple[Example, ...]], max_length: int, seed: int, path: str
) -> list[tuple[Example, Example]]:
    """Each single completion beside its prompt with the completion of another row.

    The other row is the next one, in a random order, whose prompt is another.

    Raises:
        DataError: all rows have one prompt.

    Example:
        >>> rows = [(Example([i], [10 + i]),) for i in range(3)]
        >>> found = mismatched(rows, 4, 0, "rows.csv")
        >>> [other.prompt for _, other in found], sorted(other.completion for _, other in found)
        ([[0], [1], [2]], [[10], [11], [12]])
    """
    own = [row[0] for row in rows]
    if all(each.prompt == own[0].prompt for each in own):
        raise DataError(
            f"{path}: all rows have one prompt, and KTO estimates a divergence from completions of "
            "other prompts; add rows of other prompts"
        )
    order = np.random.default_rng(seed).permutation(len(own)).tolist()
    found: dict[int, tuple[Example, Example]] = {}
    for position, i in enumerate(order):
        others = (own[order[(position + k) % len(own)]] for k in range(1, len(own)))
        (_, completion) = next(each for each in others if each.prompt != own[i].prompt)
        room = max_length - len(completion)  # one or more, as its own prompt has some
        found[i] = own[i], Example(own[i].prompt[-room:], completion)
    return [found[i] for i in range(len(own))]


@dataclass(frozen=True)
class Part:
    """The rows of "train", "dev" or "test".

    Attributes:
        batches: the batches of all rows, in order.
        tokens: the number of tokens in both completions of each row, `(rows, 2)`.
        desirable: whether each row's own completion is desirable, 1 or 0; None for pairs.
    """

    batches: Batches
    tokens: np.ndarray
    desirable: np.ndarray | None

    @property
    def lengths(self) -> Counter[int]:
        """How many completions, with their prompts, have a number of tokens."""
        if self.desirable is None:
            return lengths_of(self.batches.rows)
        return Counter(int((row.segments == 1).sum()) for row in self.batches.rows)

    def columns(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a loss needs of these rows beside their tokens."""
        found = {"tokens": self.tokens[rows]}
        return found if self.desirable is None else {**found, "desirable": self.desirable[rows]}


@dataclass(frozen=True)
class BuiltPreferences:
    """The batches of a task.

    Attributes:
        train: training batches.
        parts: the rows of "train", "dev" and "test", in order.
        most: the largest number of tokens in a completion, rounded up.
        tokens: the number of tokens in the training rows.
    """

    train: Batches
    parts: dict[str, Part]
    most: int
    tokens: int


def build_preferences(
    tables: Mapping[str, Preferences],
    encoder: PreferenceEncoder,
    batch_size: int,
    seed: int,
    say: Callable[[str], None],
) -> BuiltPreferences:
    """Makes the batches of the parts of a task; a message counts the rows that are cut.

    Args:
        tables: the rows of "train", "dev" and "test".
        encoder: encodes them.
        batch_size: the number of rows in a batch.
        seed: the seed of the order, and of the choice of mismatched completions.
        say: called with the messages.

    Raises:
        DataError: as for `PreferenceEncoder.encode` and `mismatched`.
    """
    rows: dict[str, list[Packed]] = {}
    tokens: dict[str, np.ndarray] = {}
    for part, table in tables.items():
        encoded, cut = encoder.encode(table)
        if cut:
            say(
                f"{cut} of {len(table)} {part} rows lost the beginning of their prompt, as they "
                f"have over {encoder.max_length} tokens"
            )
        if not table.paired:
            encoded = [*mismatched(encoded, encoder.max_length, seed, table.path)]
        rows[part] = [sequence(pair) for pair in encoded]
        lengths = [[len(each.completion) for each in pair] for pair in encoded]
        tokens[part] = np.array(lengths, np.float32)
    longest = rounded(max(len(row.input_ids) for part in rows.values() for row in part))
    buckets = choose_buckets(rows["train"], longest, batch_size)
    parts = {
        part: Part(
            Batches.in_order(rows[part], None, batch_size, buckets),
            tokens[part],
            None if table.paired else np.array(table.labels, np.float32),
        )
        for part, table in tables.items()
    }
    return BuiltPreferences(
        Batches(rows["train"], None, batch_size, seed, buckets),
        parts,
        rounded(int(max(each.max() for each in tokens.values()))),
        sum(len(row.input_ids) for row in rows["train"]),
    )
