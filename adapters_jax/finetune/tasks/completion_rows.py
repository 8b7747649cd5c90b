"""Makes batches for a decoder from tables of prompts and completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adapters_jax.finetune.data.batches import NOTHING, Batches, choose_buckets
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.packing import Example, Marked, Packed, Pair, pack, pair, sequence
from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.pretrained.decoder import PretrainedDecoder, rounded
from adapters_jax.finetune.tasks.completion_problem import HeldOut
from adapters_jax.finetune.tasks.prompts import count_tokens, encode_table

HELD_OUT = ("dev", "test")


@dataclass(frozen=True)
class RowBuilder:
    """Makes batches from rows.

    Attributes:
        decoder: the decoder whose tokenizer encodes the rows.
        prompts: the format of prompts.
        max_length: the largest number of tokens in a sequence.
        packs: whether examples are packed into sequences, which an encoder does not read.
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
        """Makes the batches of a task; messages count the rows that are cut and packed.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        tables = {part: getattr(task, part) for part in ("train", *HELD_OUT)}
        examples = {part: self._encode(table, part, say) for part, table in tables.items()}
        built = build_batches(
            examples,
            self.max_length,
            self.batch_size,
            self.seed,
            self.packs,
            say,
            encodes=self.decoder.encodes,
        )
        held_out = {
            part: self._with_prompts(built.held_out[part], part, tables[part], examples[part], say)
            for part in HELD_OUT
        }
        return replace(built, held_out=held_out)

    def _encode(self, table: Table, part: str, say: Callable[[str], None]) -> list[Example]:
        examples, cut = encode_table(table, self.prompts, self.decoder, self.max_length)
        if cut:
            say(f"{cut} of {len(table)} {part} rows are cut at {self.max_length} tokens")
        return examples

    def _with_prompts(
        self,
        held_out: HeldOut,
        part: str,
        table: Table,
        examples: list[Example],
        say: Callable[[str], None],
    ) -> HeldOut:
        """Adds distinct prompts to generate for, each with all its right completions."""
        right: dict[str, list[str]] = defaultdict(list)
        for prompt, completion in table.texts if self.matched else ():
            if completion is not None:
                right[prompt].append(completion)
        prompts = [list(right)[i] for i in spread(len(right), self.matched)]
        encoded = [self.prompts.encode(prompt, self.decoder) for prompt in prompts]
        longest = max((len(completion) for _, completion in examples), default=1)
        room = self.decoder.config.longest - max(map(len, encoded), default=0)
        if longest > room:
            say(
                f"completions of {part} are generated up to {room} tokens of {longest}, as the "
                f"model reads at most {self.decoder.config.longest}"
            )
        return replace(
            held_out,
            prompts=prompts,
            prompt_ids=encoded,
            references=[right[prompt] for prompt in prompts],
            new_tokens=min(rounded(longest), room),
        )


@dataclass(frozen=True)
class BuiltRows:
    """The batches of examples.

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


def build_batches(
    examples: Mapping[str, Sequence[Example | Marked]],
    max_length: int,
    batch_size: int,
    seed: int,
    packs: bool,
    say: Callable[[str], None],
    *,
    encodes: bool = False,
) -> BuiltRows:
    """Makes the batches of examples; a message counts the rows that share a sequence.

    Args:
        examples: the examples of "train", "dev" and "test".
        max_length: the largest number of tokens in a sequence.
        batch_size: the number of sequences in a batch.
        seed: the seed of the order.
        packs: whether several examples share a sequence.
        say: prints one line.
        encodes: whether an encoder reads the prompts, which then stand beside the completions.
    """

    def rows_of(found: Sequence[Any]) -> list[Packed] | list[Pair]:
        if encodes:
            return [pair(example) for example in found]
        one_each = [[i] for i in range(len(found))]
        groups = pack(found, max_length, seed) if packs else one_each
        return [sequence([found[i] for i in group]) for group in groups]

    rows = {part: rows_of(found) for part, found in examples.items()}
    of, into = len(examples["train"]), len(rows["train"])
    if into < of:
        sequences = f"{into} sequence{'s' * (into != 1)} of {max_length} tokens"
        say(f"{of} train rows are packed into {sequences}")
    buckets: tuple[int, ...] = (max_length,)
    if not packs:
        buckets = choose_buckets(rows["train"], max_length, batch_size)
    held_out = {
        part: HeldOut(
            Batches.in_order(rows[part], None, batch_size, buckets),
            count_tokens(examples[part])[1],
        )
        for part in HELD_OUT
    }
    return BuiltRows(
        Batches(rows["train"], None, batch_size, seed, buckets),
        held_out,
        most_learnt(row for part in rows.values() for row in part),
        count_tokens(examples["train"])[0],
    )


def most_learnt(rows: Iterable[Packed | Pair]) -> int:
    """The largest number of tokens to learn in a sequence, rounded up."""
    return rounded(max(int(np.count_nonzero(row.labels != NOTHING)) for row in rows))
