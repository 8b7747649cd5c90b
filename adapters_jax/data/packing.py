"""Short examples side by side in sequences of one length, so that few tokens are padding.

The examples of a sequence are segments: they do not see each other, and each counts its positions
from 0, so that a loss is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adapters_jax.data.batches import NOTHING

OPEN = 64  # sequences that are looked at for room, so that packing takes linear time


class Packed(NamedTuple):
    """One sequence: int32 arrays `(length,)`.

    Attributes:
        input_ids: of its examples, one after the other.
        segments: which example, from 1; padding is 0.
        positions: of a token in its example.
        labels: the next token where it is to be learnt, and elsewhere -1.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def pack(examples: Sequence[Example], length: int, seed: int | None) -> list[list[int]]:
    """Which examples share a sequence: each goes into the first one that has room.

    Args:
        examples: none longer than `length`.
        length: of a sequence.
        seed: of the order they are taken in; None keeps it.

    Returns:
        The numbers of the examples of each sequence.

    Example:
        >>> pack([Example([1], [2] * n) for n in (5, 3, 1)], length=8, seed=None)
        [[0, 2], [1]]
    """
    order = np.arange(len(examples))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    packed: list[list[int]] = []
    room: list[int] = []
    for i in order.tolist():
        size = sum(map(len, examples[i]))
        first = max(0, len(room) - OPEN)
        place = next((p for p in range(first, len(room)) if room[p] >= size), None)
        if place is None:
            place = len(room)
            packed.append([])
            room.append(length)
        packed[place].append(i)
        room[place] -= size
    return packed


def sequence(examples: Sequence[Example]) -> Packed:
    """Examples in one sequence.

    Example:
        >>> row = sequence([Example([7, 8], [9, 2]), Example([5], [2])])
        >>> for name, values in row._asdict().items(): print(name, values.tolist())
        input_ids [7, 8, 9, 2, 5, 2]
        segments [1, 1, 1, 1, 2, 2]
        positions [0, 1, 2, 3, 0, 1]
        labels [-1, 9, 2, -1, 2, -1]
    """
    parts = []
    for number, (prompt, completion) in enumerate(examples, 1):
        ids = [*prompt, *completion]
        labels = [*[NOTHING] * (len(prompt) - 1), *completion, NOTHING]
        columns = (ids, [number] * len(ids), range(len(ids)), labels)
        parts.append([np.array(column, np.int32) for column in columns])
    return Packed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Example(NamedTuple):
    """One row's token ids; the last one of the completion ends it, unless it was cut."""

    prompt: list[int]
    completion: list[int]
