"""Packs short examples into sequences of one length, so that little padding is left.

The examples of a sequence are its segments. A segment attends only to itself and counts its
positions from 0, so its loss is the one that it has alone in a sequence.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np

from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.data.lazy_rows import Lazy

OPEN = 64  # only the last sequences are searched for room, so packing takes linear time


class Packed(NamedTuple):
    """One packed sequence: int32 arrays `(length,)`.

    Attributes:
        input_ids: the token ids of its examples, one after the other.
        segments: the number of each token's example, from 1; padding has 0.
        positions: the position of each token in its example, from 0.
        labels: the next token if the loss counts it, otherwise -1.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class Example(NamedTuple):
    """The token ids of one row.

    Attributes:
        completion: the completion; it ends with an end token, unless it was cut.
    """

    prompt: list[int]
    completion: list[int]

    @property
    def ids(self) -> list[int]:
        """All token ids."""
        return [*self.prompt, *self.completion]

    @property
    def labels(self) -> list[int]:
        """For each token the next one if the loss counts it, otherwise -1."""
        return [*[NOTHING] * (len(self.prompt) - 1), *self.completion, NOTHING]


class Marked(NamedTuple):
    """The token ids of one row; any of them may count in the loss.

    Attributes:
        learnt: whether the loss counts each of them; the first one is never predicted.

    Example:
        >>> Marked([5, 6, 7, 8], [True, True, False, True]).labels
        [6, -1, 8, -1]
    """

    ids: list[int]
    learnt: list[bool]

    @property
    def labels(self) -> list[int]:
        """For each token the next one if the loss counts it, otherwise -1."""
        marks = list(zip(self.ids, self.learnt, strict=True))
        return [*(token if learnt else NOTHING for _, (token, learnt) in pairwise(marks)), NOTHING]


class Examples(NamedTuple):
    """Encoded rows, with what is counted of them.

    Attributes:
        rows: the rows; those of a large file are encoded whenever one is asked for.
        lengths: the tokens of each, `(rows,)`.
        learnt: the tokens of each that count in the loss, `(rows,)`.
    """

    rows: Sequence[Any]
    lengths: np.ndarray
    learnt: np.ndarray

    @classmethod
    def of(cls, found: Iterable[Example | Marked], keep: bool = True) -> Self:
        """Counts rows, and keeps them in memory if asked to."""
        rows, lengths, learnt = [], array("i"), array("i")
        for row in found:
            labels = row.labels
            lengths.append(len(labels))
            learnt.append(len(labels) - labels.count(NOTHING))
            if keep:
                rows.append(row)
        return cls(rows, np.array(lengths), np.array(learnt))


class Sequences(Lazy):
    """The sequences of groups of examples, each made when it is asked for.

    Attributes:
        lengths: the tokens of each sequence, `(sequences,)`.
        sizes: the tokens of each example, `(examples,)`.
    """

    def __init__(
        self, groups: Sequence[Any], make: Callable[[Any], Any], sizes: np.ndarray
    ) -> None:
        super().__init__(groups, make)
        self.sizes = sizes
        self.lengths = np.array([sizes[group].sum() for group in groups])


def pack(
    lengths: Sequence[int] | np.ndarray,
    length: int,
    seed: int | None,
    sources: np.ndarray | None = None,
) -> list[list[int]]:
    """Chooses the examples of each sequence: an example goes into the first one that has room.

    Args:
        lengths: the number of tokens of each example; none is above `length`.
        length: the number of tokens of a sequence.
        seed: the seed of the order of packing; None keeps their order.
        sources: a number for each example, `(examples,)`; examples of a sequence have the same one.
            None is the same for all.

    Returns:
        The numbers of the examples of each sequence.

    Example:
        >>> pack([6, 4, 2], length=8, seed=None)
        [[0, 2], [1]]
    """
    order = np.arange(len(lengths))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    if sources is None:
        return _packed(lengths, length, order)
    own = sources[order]
    parts = [order[own == each] for each in np.unique(own)]
    return [group for part in parts for group in _packed(lengths, length, part)]


def _packed(lengths: Sequence[int] | np.ndarray, length: int, order: np.ndarray) -> list[list[int]]:
    """The examples of each sequence, taken in an order."""
    packed: list[list[int]] = []
    room: list[int] = []
    for i in order.tolist():
        size = int(lengths[i])
        first = max(0, len(room) - OPEN)
        chosen = next((n for n in range(first, len(room)) if room[n] >= size), None)
        if chosen is None:
            chosen = len(room)
            packed.append([])
            room.append(length)
        packed[chosen].append(i)
        room[chosen] -= size
    return packed


def sequence(examples: Sequence[Example | Marked]) -> Packed:
    """Joins examples into one sequence.

    Example:
        >>> row = sequence([Example([7, 8], [9, 2]), Example([5], [2])])
        >>> for name, values in row._asdict().items(): print(name, values.tolist())
        input_ids [7, 8, 9, 2, 5, 2]
        segments [1, 1, 1, 1, 2, 2]
        positions [0, 1, 2, 3, 0, 1]
        labels [-1, 9, 2, -1, 2, -1]
    """
    parts = []
    for number, example in enumerate(examples, 1):
        ids = example.ids
        columns = (ids, [number] * len(ids), range(len(ids)), example.labels)
        parts.append([np.array(column, np.int32) for column in columns])
    return Packed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Pair(NamedTuple):
    """A prompt for an encoder and the completion of its decoder: int32 arrays `(length,)`.

    The shorter one is padded to the length of the other.

    Attributes:
        input_ids: the token ids of the prompt.
        segments: 1 for its tokens; padding has 0.
        labels: the token ids of the completion; padding has -1.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    labels: np.ndarray


def pair(example: Example) -> Pair:
    """Puts prompt and completion side by side.

    Example:
        >>> row = pair(Example([7, 8, 1], [9, 1]))
        >>> row.segments.tolist(), row.labels.tolist()
        ([1, 1, 1], [9, 1, -1])
    """
    prompt, completion = example
    length = max(map(len, example))
    filled = (
        [*prompt, *[0] * (length - len(prompt))],
        [*[1] * len(prompt), *[0] * (length - len(prompt))],
        [*completion, *[NOTHING] * (length - len(completion))],
    )
    return Pair(*(np.array(column, np.int32) for column in filled))
