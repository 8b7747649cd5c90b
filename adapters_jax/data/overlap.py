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
    keys = [key_of(*texts) for texts in held_out]
    found = {key_of(*texts) for texts in train}.intersection(keys)
    return [i for i, key in enumerate(keys) if key in found]


def overlaps(data: TaskData) -> list[str]:
    """A sentence for each held-out part of a task that shares rows with train.

    Example:
        >>> from adapters_jax.data.tables import Table
        >>> tables = {p: Table(p, [(x, None) for x in p], None, [1, 2]) for p in ("ab", "bc", "cd")}
        >>> overlaps(TaskData("letters", tables["ab"], tables["cd"], tables["bc"], ()))
        ['1 of 2 rows of test are in train as well, so the score on test is too good']
    """
    train, found = data.train.texts, []
    for part, rows in (("dev", data.dev), ("test", data.test)):
        if count := len(shared_rows(train, rows.texts)):
            found.append(
                f"{count} of {len(rows)} rows of {part} are in train as well, so the score on "
                f"{part} is too good"
            )
    return found
