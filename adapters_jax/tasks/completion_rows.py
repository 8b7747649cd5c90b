"""Makes batches for a decoder from tables of prompts and completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from adapters_jax.data.batches import NOTHING, Batches, choose_buckets
from adapters_jax.data.datasets import TaskData
from adapters_jax.data.packing import Example, Packed, pack, sequence
from adapters_jax.data.splits import spread
from adapters_jax.data.tables import Table
from adapters_jax.pretrained.decoder import PretrainedDecoder, rounded
from adapters_jax.tasks.completion_problem import HeldOut
from adapters_jax.tasks.prompts import Prompts, count_tokens, encode_table

HELD_OUT = ("dev", "test")


@dataclass(frozen=True)
class RowBuilder:
    """Makes batches from rows.

    Attributes:
        decoder: the decoder whose tokenizer encodes the rows.
        prompts: the format of prompts.
        max_length: the largest number of tokens in a sequence.
        packs: whether examples are packed into sequences.
        batch_size: the number of sequences in a batch.
        seed: the seed of the order.
        matched: the number of prompts of a held-out part to generate completions for.
    """

    decoder: PretrainedDecoder
    prompts: Prompts
    max_length: int
    packs: bool
    batch_size: int
    seed: int
    matched: int

    def build(self, task: TaskData, say: Callable[[str], None]) -> BuiltRows:
        """Makes the batches of a task; a message counts the rows that are cut.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        tables = {part: getattr(task, part) for part in ("train", *HELD_OUT)}
        examples = {part: self._encode(table, part, say) for part, table in tables.items()}
        rows = {part: self._rows(found) for part, found in examples.items()}
        buckets: tuple[int, ...] = (self.max_length,)
        if not self.packs:
            buckets = choose_buckets(rows["train"], self.max_length, self.batch_size)
        held_out = {
            part: self._held_out(tables[part], examples[part], rows[part], buckets)
            for part in HELD_OUT
        }
        return BuiltRows(
            Batches(rows["train"], None, self.batch_size, self.seed, buckets),
            held_out,
            most_learnt(row for part in rows.values() for row in part),
            count_tokens(examples["train"])[0],
        )

    def _encode(self, table: Table, part: str, say: Callable[[str], None]) -> list[Example]:
        examples, cut = encode_table(table, self.prompts, self.decoder, self.max_length)
        if cut:
            say(f"{cut} of {len(table)} {part} rows are cut at {self.max_length} tokens")
        return examples

    def _rows(self, examples: Sequence[Example]) -> list[Packed]:
        groups = [[i] for i in range(len(examples))]
        if self.packs:
            groups = pack(examples, self.max_length, self.seed)
        return [sequence([examples[i] for i in group]) for group in groups]

    def _held_out(
        self, table: Table, examples: list[Example], rows: list[Packed], buckets: tuple[int, ...]
    ) -> HeldOut:
        """The rows to score on, and distinct prompts, each with all its right completions."""
        right: dict[str, list[str]] = defaultdict(list)
        for prompt, completion in table.texts if self.matched else ():
            if completion is not None:
                right[prompt].append(completion)
        prompts = [list(right)[i] for i in spread(len(right), self.matched)]
        prompt_ids = [self.prompts.encode(prompt, self.decoder) for prompt in prompts]
        new_tokens = rounded(max(len(completion) for _, completion in examples))
        if self.decoder.longest is not None and prompts:
            new_tokens = min(new_tokens, self.decoder.longest - max(map(len, prompt_ids)))
        return HeldOut(
            Batches.in_order(rows, None, self.batch_size, buckets),
            count_tokens(examples)[1],
            prompts,
            prompt_ids,
            [right[prompt] for prompt in prompts],
            new_tokens,
        )


@dataclass(frozen=True)
class BuiltRows:
    """The batches that `RowBuilder.build` makes.

    Attributes:
        train: training batches.
        held_out: the rows of "dev" and "test".
        most: the largest number of tokens to learn in a sequence, rounded up.
        tokens: the number of tokens in the training rows.
    """

    train: Batches
    held_out: dict[str, HeldOut]
    most: int
    tokens: int


def most_learnt(rows: Iterable[Packed]) -> int:
    """The largest number of tokens to learn in a sequence, rounded up."""
    return rounded(max(int(np.count_nonzero(row.labels != NOTHING)) for row in rows))
