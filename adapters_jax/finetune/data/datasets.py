"""Datasets: texts with class ids or numbers as labels, split into train, dev and test."""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.files import DataError, FilePath, count_rows, first_few, place
from adapters_jax.finetune.data.readers import title_of
from adapters_jax.finetune.data.splits import SPLIT_SEED, key_of, split_rows
from adapters_jax.finetune.data.tables import Table, Texts, read_rows

_LOG = logging.getLogger(__name__)
_MISSING = ("nan", "none", "null", "na", "n/a", "-", "?")


@dataclass(frozen=True)
class Dataset:
    """Texts with their labels.

    Args:
        texts: `(text, second text or None)` for each row.
        labels: int32 class ids or float32 numbers, `(rows,)`.
        label_names: the names of the classes, in the order of their ids; empty for regression.
    """

    texts: Texts
    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers, not classes."""
        return not self.label_names

    def take(self, rows: Sequence[int] | np.ndarray) -> Dataset:
        """The rows with these indices, in the given order."""
        rows = np.asarray(rows, np.int64)
        return Dataset([self.texts[i] for i in rows], self.labels[rows], self.label_names)


def make_dataset(
    table: Table, task: str = "classification", label_names: Sequence[str] | None = None
) -> Dataset:
    """Makes a dataset from a table: its labels become class ids or numbers.

    Args:
        table: a table with labels.
        task: "classification" or "regression"; it is never guessed.
        label_names: the classes of the training table, for its dev and test tables; None takes
            the table's own labels, sorted, as numbers if all of them are numbers.

    Returns:
        The dataset.

    Raises:
        DataError: a label outside `label_names`, only one class, a regression label that is not a
            finite number, or more than 50 distinct decimal numbers, which cannot be classes.
        UserError: another `task`, or a table without labels.

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
    """The classes of a table; see `sorted_names`."""
    names = sorted_names(table.path, table.labels or ())
    _check_joined(table, names)
    values = [_number(name) for name in names]
    whole = all(value.is_integer() for value in values)
    if len(names) > 50 and all(map(math.isfinite, values)) and not whole:
        raise DataError(
            f"{table.path}: {len(names)} distinct decimal numbers as labels are no classes; "
            "ask for task='regression'"
        )
    if len(names) < 2:
        raise DataError(
            f"{table.path}: every label is {names[0]!r}; classification needs at least two classes"
        )
    return tuple(names)


def sorted_names(where: str, labels: Sequence[str]) -> list[str]:
    """Distinct labels, sorted; as numbers if all of them are numbers.

    One warning lists those that look alike, such as 1 and 1.0, and those that say "missing";
    `where` begins it.
    """
    names = sorted(set(labels))
    doubtful = [*_alike(names), *(f"{n!r} may say missing" for n in names if n.lower() in _MISSING)]
    if doubtful:
        warnings.warn(
            f"{where}: each of these labels is a class of its own: {'; '.join(doubtful)}",
            stacklevel=2,
        )
    values = {name: _number(name) for name in names}
    if all(map(math.isfinite, values.values())):
        names.sort(key=values.__getitem__)
    return names


def _check_joined(table: Table, names: Sequence[str]) -> None:
    """Raises DataError if labels are others joined by "|", as in `a|b`."""
    known = {name for name in names if "|" not in name}
    joined = [name for name in names if "|" in name and known.issuperset(name.split("|"))]
    if joined:
        raise DataError(
            f"{table.path}: {first_few([repr(name) for name in joined])} are other labels with | "
            "between: for several labels a row write --task multilabel --columns labels=COLUMN "
            "--label-separator '|', or else rename these classes"
        )


def _alike(names: Sequence[str]) -> list[str]:
    """The labels that are equal as numbers, or but for case, in groups."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        value = _number(name)
        groups[value if math.isfinite(value) else name.casefold()].append(name)
    return [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]


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
    named = [f"{label!r} ({place(line)})" for label, line, is_bad in rows if is_bad]
    if named:
        raise DataError(f"{table.path}: {count_rows(named)} a label {what}: {first_few(named)}")


def split(
    dataset: Dataset, seed: int, dev: float = 0.1, test: float = 0.1
) -> tuple[Dataset, Dataset, Dataset]:
    """Holds rows out of a dataset for dev and test.

    The split depends on the seed and the texts alone. Rows of the same text (but for case and
    spacing) stay together in one split, and none is dropped. Each class is split in the same
    proportions, rounded down; a class too small to share stays in train.

    Args:
        dataset: the dataset to split.
        seed: the seed of the choice.
        dev: the fraction of rows for dev.
        test: the fraction of rows for test.

    Returns:
        Train, dev and test, each in the dataset's order.

    Raises:
        DataError: dev or test would be empty, but its fraction is above 0.
        UserError: the fractions are negative, or leave nothing to train on.

    Example:
        >>> data = Dataset([(str(i), None) for i in range(40)], np.arange(40) % 2, ("no", "yes"))
        >>> [len(part) for part in split(data, seed=0)]
        [32, 4, 4]
    """
    keys = [key_of(*pair) for pair in dataset.texts]
    strata = [0] * len(dataset) if dataset.is_regression else dataset.labels.tolist()
    train_rows, dev_rows, test_rows = split_rows(keys, strata, seed, dev, test)
    return dataset.take(train_rows), dataset.take(dev_rows), dataset.take(test_rows)


@dataclass(frozen=True)
class TaskData:
    """The rows that a run trains on, selects on and reports.

    Args:
        name: the name of the data, for reports.
        train: the rows to train on: a `Dataset`, or for a decoder a `Table`.
        dev: the rows to select on.
        test: the rows to report on.
        metrics: names for `metrics.compute`; the first is the one selected on.
    """

    name: str
    train: Any
    dev: Any
    test: Any
    metrics: tuple[str, ...]


def load_labelled(
    train: FilePath,
    dev: FilePath | None = None,
    test: FilePath | None = None,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    task: str = "classification",
    metrics: Sequence[str] | None = None,
    split_seed: int = SPLIT_SEED,
) -> TaskData:
    """Loads texts and labels from one to three files with the same columns.

    Args:
        train: the file to train on.
        dev: the file to select on; None holds out a tenth of `train`.
        test: the file to report on; None holds out a tenth of `train`.
        text: the text column.
        text_pair: the second text column, for pairs.
        label: the label column.
        task: as for `make_dataset`.
        metrics: their names, the one to select on first; None is accuracy and F1, or for regression
            Pearson and Spearman.
        split_seed: the seed that chooses the rows held out.

    Returns:
        The rows, named after the training file.

    Raises:
        DataError: as for `read_rows`, `make_dataset` and `split`.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
        >>> lines = [json.dumps({"text": f"row {i}", "label": i % 2}) for i in range(40)]
        >>> _ = path.write_text("\\n".join(lines))
        >>> data = load_labelled(path)
        >>> data.name, len(data.train), len(data.dev), len(data.test), data.metrics
        ('rows', 32, 4, 4, ('accuracy', 'f1'))
    """
    paths = {"train": train, "dev": dev, "test": test}
    tables = {
        part: read_rows(path, text, text_pair, label)
        for part, path in paths.items()
        if path is not None
    }
    if metrics is None:
        metrics = ("pearson", "spearman") if task == "regression" else ("accuracy", "f1")
    return hold_out(title_of(train), make_datasets(tables, task), metrics, split_seed)


def make_datasets(tables: Mapping[str, Table], task: str) -> dict[str, Dataset]:
    """Makes each table a dataset; all of them have the classes of "train"."""
    names = class_names(tables["train"]) if task == "classification" else None
    return {part: make_dataset(table, task, names) for part, table in tables.items()}


def hold_out(
    name: str, parts: Mapping[str, Dataset], metrics: Sequence[str], seed: int
) -> TaskData:
    """Completes the parts of a task: an absent "dev" or "test" is held out of "train"."""
    train, dev, test = split(parts["train"], seed, **_fractions(parts))
    data = TaskData(name, train, parts.get("dev", dev), parts.get("test", test), tuple(metrics))
    for part in ("dev", "test"):
        _say_lacking(part, getattr(data, part), data.metrics)
    return data


def _say_lacking(part: str, rows: Dataset, metrics: Sequence[str]) -> None:
    """Logs that the F1 of two classes is 0 where no row has the positive one."""
    if "f1" in metrics and len(rows.label_names) == 2 and not (rows.labels == 1).any():
        _LOG.warning(
            "%s has no row of the class %r, so its F1 is 0 whatever is predicted; give it such "
            "rows, or write --metrics accuracy",
            part,
            rows.label_names[1],
        )


def hold_out_rows(
    name: str,
    parts: Mapping[str, Any],
    keys: Sequence[str],
    metrics: Sequence[str],
    strata: Sequence[int] | None = None,
) -> TaskData:
    """Completes the parts of a task as `hold_out` does, for rows of any type.

    Args:
        name: the name of the data.
        parts: the rows of "train", and maybe of "dev" and "test", with a method `take`.
        keys: the key of each row of "train"; rows with the same key are held out together.
        metrics: the names of the metrics.
        strata: the stratum of each row of "train", which keeps its proportion; None has one.
    """
    rows = split_rows(keys, strata or [0] * len(keys), SPLIT_SEED, **_fractions(parts))
    train, dev, test = (parts["train"].take(taken) for taken in rows)
    return TaskData(name, train, parts.get("dev", dev), parts.get("test", test), tuple(metrics))


def _fractions(parts: Mapping[str, Any]) -> dict[str, float]:
    """The fraction of "train" to hold out for each part: a tenth if the part is absent."""
    return {part: 0.0 if part in parts else 0.1 for part in ("dev", "test")}
