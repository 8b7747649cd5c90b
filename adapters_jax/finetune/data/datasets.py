"""Labels as class ids or numbers; and the rows of a task as train, dev and test."""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adapters_jax.errors import UserError, first_few
from adapters_jax.finetune.data.files import DataError, count_rows, place, refuse
from adapters_jax.finetune.data.splits import SPLIT_SEED, key_of, split_rows, split_streamed
from adapters_jax.finetune.data.tables import Table, Texts

_LOG = logging.getLogger(__name__)
_MISSING = ("nan", "none", "null", "na", "n/a", "-", "?")


def make_dataset(
    table: Table, task: str = "classification", label_names: Sequence[str] | None = None
) -> Table:
    """Makes the labels of a table class ids or numbers.

    Args:
        table: a table with labels.
        task: "classification" or "regression"; it is never guessed.
        label_names: the classes of the training table, for its dev and test tables; None takes
            the table's own labels, sorted, as numbers if all of them are numbers.

    Raises:
        DataError: a label outside `label_names`, only one class, a regression label that is not a
            finite number, or more than 50 distinct decimal numbers, which cannot be classes.
        UserError: another `task`, or a table without labels.

    Example:
        >>> table = Table([("a", None), ("b", None)], ["10", "9"], lines=[2, 3])
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
        return replace(table, labels=np.array(numbers_of(table), np.float32))
    names = class_names(table) if label_names is None else tuple(label_names)
    ids = {name: i for i, name in enumerate(names)}
    _reject(
        table,
        [label not in ids for label in table.labels],
        f"that train lacks ({first_few(names)})",
    )
    found = np.array([ids[name] for name in table.labels], np.int32)
    return replace(table, labels=found, label_names=names)


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
            f"{where}: each of these labels is a separate class: {'; '.join(doubtful)}",
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
    refuse(
        table.path,
        [*map(repr, joined)],
        "",
        " are other labels with | between: for several labels a row write --task multilabel "
        "--columns labels=COLUMN --label-separator '|', or else rename these classes",
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
    refuse(table.path, named, f"{count_rows(named)} a label {what}: ", "")


@dataclass(frozen=True)
class TaskData:
    """The rows that a run trains on, selects on and reports.

    Args:
        train: the rows to train on: mostly a `Table`.
        dev: the rows to select on.
        test: the rows to report on.
        metrics: names for `metrics.compute`; the first is the one selected on.
        streamed: whether they are of a file too large to hold, which is split in another way.
    """

    name: str
    train: Any
    dev: Any
    test: Any
    metrics: tuple[str, ...]
    streamed: bool = False


def make_datasets(tables: Mapping[str, Table], task: str) -> dict[str, Table]:
    """Makes the labels of each table ids or numbers; all of them have the classes of "train"."""
    names = class_names(tables["train"]) if task == "classification" else None
    return {part: make_dataset(table, task, names) for part, table in tables.items()}


def check_classes(tables: Sequence[Table]) -> None:
    """Raises DataError if files that are learnt together have not the same labels.

    Example:
        >>> a, b = Table([("x", None)], ["yes"], path="a.csv"), Table([("y", None)], ["1"])
        >>> check_classes([a, replace(b, path="b.csv")])
        Traceback (most recent call last):
        adapters_jax.finetune.data.files.DataError: b.csv lacks the label 'yes', which a.csv has...
    """
    first = tables[0]
    for table in tables[1:]:
        for one, other in ((first, table), (table, first)):
            lacking = sorted({*one.labels} - {*other.labels})
            if lacking:
                raise DataError(
                    f"{other.path} lacks the label{'s' * (len(lacking) > 1)} "
                    f"{first_few([*map(repr, lacking)])}, which {one.path} has; files that are "
                    "trained on together need the same labels: rename those of one, or train two "
                    "runs"
                )


def hold_out(
    name: str,
    parts: Mapping[str, Any],
    metrics: Sequence[str],
    keys: Sequence[str] | None = None,
    strata: Sequence[int] | None = None,
    seed: int = SPLIT_SEED,
    dev: float = 0.1,
    test: float = 0.1,
) -> TaskData:
    """Completes the parts of a task: an absent "dev" or "test" is held out of "train".

    The split depends on the seed and the keys alone. Rows with the same key stay together in one
    part, and none is dropped. Each stratum is split in the same proportions, rounded down; one too
    small to share stays in train. Of a large file, whose rows are not in memory, at most a few
    thousand rows are held out, whatever their classes.

    Args:
        parts: the rows of "train", and maybe of "dev" and "test", with a method `take`.
        keys: the key of each row of "train"; None is its texts, but for case and spacing.
        strata: the stratum of each row of "train"; None is its class, if it has one.
        seed, dev, test: as in `splits.split_rows`; the fraction of a part that is there has no use.

    Raises:
        DataError, UserError: as in `splits.split_rows`.

    Example:
        >>> rows = Table([(str(i), None) for i in range(40)], np.arange(40) % 2, ("no", "yes"))
        >>> data = hold_out("numbers", {"train": rows}, ("accuracy",))
        >>> len(data.train), len(data.dev), len(data.test)
        (32, 4, 4)
    """
    train = parts["train"]
    absent = (0.0 if part in parts else share for part, share in (("dev", dev), ("test", test)))
    if getattr(train, "streamed", False):
        rows = split_streamed(keys or (), len(train), seed, *absent)
        return TaskData(name, metrics=tuple(metrics), **_parts(parts, rows), streamed=True)
    names: tuple[str, ...] = getattr(train, "label_names", ())
    if keys is None:
        keys = [key_of(*texts) for texts in train.texts]
    if strata is None:
        strata = train.labels.tolist() if names else [0] * len(train)
    whole = _parts(parts, split_rows(keys, strata, seed, *absent))
    for part in ("dev", "test"):
        if "f1" in metrics and len(names) == 2 and not (whole[part].labels == 1).any():
            _LOG.warning(
                "%s has no row of the class %r, so its F1 is 0 whatever is predicted; give it such "
                "rows, or write --metrics accuracy",
                part,
                names[1],
            )
    return TaskData(name, **whole, metrics=tuple(metrics))


def _parts(parts: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The rows of "train", "dev" and "test": those of their files, or else these of "train"."""
    held = dict(zip(("train", "dev", "test"), map(parts["train"].take, rows), strict=True))
    return {**held, **{part: parts[part] for part in ("dev", "test") if part in parts}}


def shared_rows(train: Texts, held_out: Texts) -> list[int]:
    """The positions of rows of `held_out` whose texts are in `train`, but for case and spacing.

    Example:
        >>> shared_rows([("A film", None), ("b", "c")], [("a  FILM", None), ("b", "d")])
        [0]
    """
    keys = [key_of(*texts) for texts in held_out]
    known = {*keys}
    found = {key for texts in train if (key := key_of(*texts)) in known}
    return [i for i, key in enumerate(keys) if key in found]


def overlaps(data: TaskData) -> list[str]:
    """A sentence for each part that is scored on rows that are also trained or selected on.

    Example:
        >>> tables = {p: Table([(x, None) for x in p]) for p in ("ab", "bc", "cd")}
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
