"""Finds rows that are in train and in what is held out of it, whose score is then too good."""

from __future__ import annotations

from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.splits import key_of
from adapters_jax.finetune.data.tables import Texts


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
    """A sentence for each part that is scored on rows that are also trained or selected on.

    Example:
        >>> from adapters_jax.finetune.data.tables import Table
        >>> tables = {p: Table(p, [(x, None) for x in p], None, [1, 2]) for p in ("ab", "bc", "cd")}
        >>> overlaps(TaskData("letters", tables["ab"], tables["cd"], tables["bc"], ()))
        ['1 of 2 test rows are also in train, so the test scores are too good',
         '1 of 2 test rows are also in dev, so the test scores are too good']
    """
    parts = {"train": data.train.texts, "dev": data.dev.texts, "test": data.test.texts}
    pairs = ("dev", "train"), ("test", "train"), ("test", "dev")
    counts = {(part, other): len(shared_rows(parts[other], parts[part])) for part, other in pairs}
    return [
        f"{count} of {len(parts[part])} {part} rows are also in {other}, so the {part} scores are "
        "too good"
        for (part, other), count in counts.items()
        if count
    ]
