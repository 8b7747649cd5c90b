"""Datasets: a table's texts with class ids or numbers, and their split into train, dev and test."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_jax.data.tables import (
    DataError,
    Table,
    Texts,
    count_rows,
    first_few,
)
from adapters_jax.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """Texts with their targets.

    Args:
        texts: `(text, second text or None)` of each row.
        labels: int32 class ids or float32 numbers, `(rows,)`.
        label_names: of the classes, in the order of their ids; empty for regression.
    """

    texts: Texts
    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to predict, not classes."""
        return not self.label_names

    def take(self, rows: Sequence[int] | np.ndarray) -> Dataset:
        """The rows of these numbers, in their order."""
        rows = np.asarray(rows, np.int64)
        return Dataset([self.texts[i] for i in rows], self.labels[rows], self.label_names)


def make_dataset(
    table: Table, task: str = "classification", label_names: Sequence[str] | None = None
) -> Dataset:
    """A table's labels as class ids or numbers.

    Args:
        table: with labels.
        task: "classification" or "regression"; never guessed.
        label_names: the classes of the training table, for its dev and test tables; None takes
            the table's own labels, sorted, as numbers when all of them are numbers.

    Returns:
        The dataset.

    Raises:
        DataError: a label outside `label_names`, only one class, a regression label that is not a
            finite number, or so many distinct decimal numbers that they cannot be classes.
        ValueError: another `task`, or a table without labels.

    Example:
        >>> table = Table("stars.csv", [("a", None), ("b", None)], ["10", "9"], [2, 3])
        >>> make_dataset(table).label_names, make_dataset(table).labels.tolist()
        (('9', '10'), [1, 0])
        >>> make_dataset(table, task="regression").labels.tolist()
        [10.0, 9.0]
    """
    if task not in ("classification", "regression"):
        raise UserError(f"task is {task!r}; it must be 'classification' or 'regression'")
    if table.labels is None:
        raise UserError(f"{table.path} was read without labels; name its label column")
    if task == "regression":
        return Dataset(table.texts, np.array(numbers_of(table), np.float32), ())
    names = class_names(table) if label_names is None else tuple(label_names)
    ids = {name: i for i, name in enumerate(names)}
    _reject(
        table,
        [label not in ids for label in table.labels],
        f"that train lacks ({first_few(names)})",
    )
    return Dataset(table.texts, np.array([ids[name] for name in table.labels], np.int32), names)


def class_names(table: Table) -> tuple[str, ...]:
    """A table's labels as the names of classes, sorted, as numbers when all of them are numbers."""
    names = sorted(set(table.labels or ()))
    values = {name: _number(name) for name in names}
    if all(map(math.isfinite, values.values())):
        names.sort(key=values.__getitem__)
        if len(names) > 50 and not all(value.is_integer() for value in values.values()):
            raise DataError(
                f"{table.path}: {len(names)} distinct decimal numbers as labels are no classes; "
                "ask for task='regression'"
            )
    if len(names) < 2:
        raise DataError(
            f"{table.path}: every label is {names[0]!r}; classification needs at least two classes"
        )
    return tuple(names)


def numbers_of(table: Table) -> list[float]:
    """A table's labels as finite numbers."""
    values = [_number(label) for label in table.labels or ()]
    _reject(table, [not math.isfinite(n) for n in values], "that is not a finite number")
    return values


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return math.nan


def _reject(table: Table, bad: list[bool], what: str) -> None:
    rows = list(zip(table.labels or (), table.lines, bad, strict=True))
    named = [f"{label!r} (line {line})" for label, line, is_bad in rows if is_bad]
    if named:
        raise DataError(f"{table.path}: {count_rows(named)} a label {what}: {first_few(named)}")


def split(
    dataset: Dataset, seed: int, dev: float = 0.1, test: float = 0.1
) -> tuple[Dataset, Dataset, Dataset]:
    """Hold rows out of a dataset for dev and test.

    The split depends on the seed and the texts alone. Rows of the same text (but for case and
    spacing) stay together in one split, and none is dropped. Each class is split in the same
    proportions, rounded down; a class too small to share stays in train.

    Args:
        dataset: to split.
        seed: of the choice.
        dev: fraction of the rows.
        test: fraction of the rows.

    Returns:
        Train, dev and test, each in the dataset's order.

    Raises:
        DataError: a split that was asked for would be empty.
        ValueError: the fractions are negative, or leave nothing to train on.

    Example:
        >>> data = Dataset([(str(i), None) for i in range(40)], np.arange(40) % 2, ("no", "yes"))
        >>> [len(part) for part in split(data, seed=0)]
        [32, 4, 4]
    """
    keys = [key_of(*pair) for pair in dataset.texts]
    strata = [0] * len(dataset) if dataset.is_regression else dataset.labels.tolist()
    train_rows, dev_rows, test_rows = split_rows(keys, strata, seed, dev, test)
    return dataset.take(train_rows), dataset.take(dev_rows), dataset.take(test_rows)


def split_rows(
    keys: Sequence[str], strata: Sequence[int], seed: int, dev: float, test: float
) -> tuple[list[int], list[int], list[int]]:
    """The numbers of the rows of train, dev and test; see `split`.

    Args:
        keys: rows of one key stay together; see `key_of`.
        strata: rows of each are split in the same proportions; a group is of its first row's.
        seed: of the choice.
        dev: fraction of the rows.
        test: fraction of the rows.

    Returns:
        Three ascending lists.

    Raises:
        DataError: as for `split`.
        ValueError: likewise.

    Example:
        >>> train, dev, test = split_rows(["a", "b", "b", "a"], [0] * 4, seed=0, dev=0.5, test=0)
        >>> sorted([train, dev]), test
        ([[0, 3], [1, 2]], [])
    """
    if min(dev, test) < 0 or dev + test >= 1:
        raise UserError(f"fractions dev={dev} and test={test} must be >= 0 and sum to below 1")
    chosen: dict[str, list[int]] = {"test": [], "dev": [], "train": []}
    for groups in _groups(keys, strata, seed):
        rows = sum(map(len, groups))
        room = {"test": int(rows * test + 1e-9), "dev": int(rows * dev + 1e-9), "train": rows}
        for group in groups:
            part = next(part for part in room if len(group) <= room[part])
            room[part] -= len(group)
            chosen[part] += group
    for part, fraction in (("dev", dev), ("test", test)):
        if fraction and not chosen[part]:
            raise DataError(
                f"{len(keys)} rows are too few to hold out {fraction:g} of them for {part}; "
                f"give a {part} file or more rows"
            )
    return sorted(chosen["train"]), sorted(chosen["dev"]), sorted(chosen["test"])


def key_of(*texts: str | None) -> str:
    """What texts that differ in case and spacing alone have in common.

    Example:
        >>> key_of("A  film", None)
        'a film'
    """
    return "\t".join(" ".join(text.casefold().split()) for text in texts if text is not None)


def spread(count: int, most: int | None) -> list[int]:
    """The numbers of at most so many rows, evenly spread: files are often sorted.

    Example:
        >>> spread(10, 4), spread(3, 4), spread(2, None)
        ([0, 2, 5, 7], [0, 1, 2], [0, 1])
    """
    most = count if most is None else min(most, count)
    return [i * count // most for i in range(most)]


def _groups(keys: Sequence[str], strata: Sequence[int], seed: int) -> Iterable[list[list[int]]]:
    """For each stratum, its groups of rows of one text, in an order drawn by the seed."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    chosen: dict[int, list[list[int]]] = defaultdict(list)
    # A hash, not a random generator: the split outlives changes of numpy and of the rows' order.
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        chosen[strata[groups[key][0]]].append(groups[key])
    return chosen.values()


SPLIT_SEED = 0  # of held-out rows; not the training seed, so that runs with other seeds compare


@dataclass(frozen=True)
class TaskData:
    """What a run trains on, selects on and reports.

    Args:
        name: for reports.
        train: the rows to train on: a `Dataset`, of a decoder a `Table`.
        dev: the rows to select on.
        test: the rows to report on.
        metrics: names for `metrics.compute`; the first is the one selected on.
    """

    name: str
    train: Any
    dev: Any
    test: Any
    metrics: tuple[str, ...]
