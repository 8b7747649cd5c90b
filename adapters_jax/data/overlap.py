"""Finds rows that are in train and in what is held out of it, whose score is then too good."""

from __future__ import annotations

from adapters_jax.data.datasets import TaskData
from adapters_jax.data.splits import key_of
from adapters_jax.data.tables import Texts


def shared_rows(train: Texts, held_out: Texts) -> list[int]:
    """The positions of rows of `held_out` whose texts are in `train`, but for case and spacing.

    Example:
        >>> shared_rows([("A film", None), ("b", "c")], [("a  FILM", None), ("b", "d")])
        [0]
    """
    known = {key_of(*texts) for texts in train}
    return [i for i, texts in enumerate(held_out) if key_of(*texts) in known]


def overlaps(data: TaskData) -> list[str]:
    """A sentence for each held-out part of a task that shares rows with train.

    Example:
        >>> from adapters_jax.data.tables import Table
        >>> tables = {p: Table(p, [(x, None) for x in p], None, [1, 2]) for p in ("ab", "bc", "cd")}
        >>> overlaps(TaskData("letters", tables["ab"], tables["cd"], tables["bc"], ()))
        ['1 of 2 rows of test are in train as well, so the score on test is too good']
    """
    parts = {"dev": data.dev, "test": data.test}
    counts = {part: len(shared_rows(data.train.texts, rows.texts)) for part, rows in parts.items()}
    return [
        f"{count} of {len(parts[part])} rows of {part} are in train as well, so the score on "
        f"{part} is too good"
        for part, count in counts.items()
        if count
    ]
