"""What the page of a run shows of its predictions: plain data, which the report draws.

`Judged` holds the predictions that a run keeps; a task makes views of them. A view has a `kind`,
and for each kind the report has one way to draw it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from adapters_jax.errors import first_few
from adapters_jax.finetune.data.packing import Sequences

WORST = 20  # rows with the highest loss on dev that are kept with their texts
CUT = 300  # characters of a text that are kept
OVERFLOWED = 1e30  # in place of numbers that are not finite, which JSON does not have
NAMES, CLASSES, TABLE = 40, 20, 50  # characters of a class's name, classes of a matrix, of a table
OTHERS = "all others"
NONE = "\N{EN DASH}"  # of a share of nothing


@dataclass(frozen=True)
class Judged:
    """The rows of a run as the trained model judges them, as far as the run keeps them.

    Attributes:
        rows: the rows of "dev" and "test", all or evenly spread ones: plain values by name, as the
            `loss`, and what the task's views read.
        lengths: how many rows of each part have a number of tokens.
        worst: the rows of dev with the highest losses, the highest first; each has `words`, its
            texts and labels by name.
        counts: the number of all rows of "dev" and "test".
    """

    rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    lengths: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    worst: Sequence[Mapping[str, Any]] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Mapping[str, Counter[int]], **rows: Sequence[dict[str, Any]]) -> Self:
        """Takes the worst rows of dev out of all rows, whose `words` are then left out.

        A number that overflowed becomes 1e30, and one that is undefined as well.

        Args:
            lengths: see above.
            **rows: the rows of "dev" and "test", each with `loss` and `words`.

        Example:
            >>> dev = [{"loss": x, "words": {"text": f"loss {x}"}} for x in (0.1, 2.0)]
            >>> judged = Judged.of({}, dev=dev, test=[])
            >>> judged.worst[0]["words"], judged.rows["dev"][1], judged.counts
            ({'text': 'loss 2.0'}, {'loss': 2.0}, {'dev': 2, 'test': 0})
        """
        worst = sorted(rows["dev"], key=lambda row: -_finite(row["loss"]))[:WORST]
        return cls(
            {
                part: [{k: _finite(v) for k, v in row.items() if k != "words"} for row in found]
                for part, found in rows.items()
            },
            lengths,
            [
                {
                    "loss": _finite(row["loss"]),
                    "words": {k: cut(v) for k, v in row["words"].items()},
                }
                for row in worst
            ],
            {part: len(found) for part, found in rows.items()},
        )

    def column(self, part: str, name: str) -> list[Any]:
        """A value of each row of a part."""
        return [row[name] for row in self.rows.get(part, ())]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return -OVERFLOWED if value == -math.inf else OVERFLOWED
    return value


@dataclass(frozen=True)
class Note:
    """A sentence about the results."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: the heading.
        rows: the cells.
        about: a sentence below the heading; empty for none.
        words: the number of columns, from the left, that are words; the others are numbers.
        texts: whether the cells are texts of any length.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""
    words: int = 1
    texts: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix.

    Attributes:
        counts: rows with each right class, by the predicted class.
    """

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[int]]
    about: str
    kind: ClassVar[str] = "matrix"

    def share(self, right: int, predicted: int) -> float:
        """The share of the rows of a right class, from 0 to 1, that have a predicted class."""
        return self.counts[right][predicted] / max(sum(self.counts[right]), 1)


@dataclass(frozen=True)
class Histogram:
    """A histogram of one or several series.

    Attributes:
        label: what is counted, with its unit.
        series: how often each value occurs, by the name of its series.
    """

    title: str
    label: str
    series: Mapping[str, Mapping[Any, int]]
    about: str = ""
    kind: ClassVar[str] = "histogram"


@dataclass(frozen=True)
class Scatter:
    """Points of predicted against right numbers, with the line on which both are equal."""

    title: str
    right: Sequence[float]
    predicted: Sequence[float]
    about: str = ""
    kind: ClassVar[str] = "scatter"


View = Note | Table | Matrix | Histogram | Scatter


def cut(text: str, length: int = CUT) -> str:
    """The text, or its beginning with an ellipsis where it is longer.

    Example:
        >>> cut("a long text", 6), cut("short", 6)
        ('a lon…', 'short')
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def percent(share: float) -> str:
    """A share in percent; a dash where it is a share of nothing, NaN.

    Example:
        >>> percent(0.8541), percent(float("nan"))
        ('85.4 %', '–')
    """
    return NONE if math.isnan(share) else f"{100 * share:.1f} %"


def named(texts: Sequence[str | None]) -> dict[str, str]:
    """One or several texts of a row by name.

    Example:
        >>> named(["A text.", None]), named(["One.", "Two."])
        ({'text': 'A text.'}, {'text 1': 'One.', 'text 2': 'Two.'})
    """
    found = [text for text in texts if text is not None]
    if len(found) == 1:
        return {"text": found[0]}
    return {f"text {i}": text for i, text in enumerate(found, 1)}


def shared(judged: Judged) -> list[View]:
    """The views of every task: the worst rows of dev, and the lengths of all rows."""
    found: list[View] = []
    if judged.worst:
        names = [*judged.worst[0]["words"]]
        found.append(
            Table(
                "Highest losses on dev",
                [*names, "loss"],
                [[*row["words"].values(), f"{row['loss']:.3f}"] for row in judged.worst],
                f"The {len(judged.worst)} of {judged.counts['dev']:,} rows that the model is most "
                f"wrong about. Texts are cut at {CUT} characters.",
                words=len(names),
                texts=True,
            )
        )
    if judged.lengths:
        found.append(Histogram("Lengths", "tokens of a row", judged.lengths))
    return found


def lengths_of(rows: Iterable[Any]) -> Counter[int]:
    """How many encoded rows have a number of tokens; those of packed sequences count one by one.

    Rows without tokens, such as images, do not count.

    Example:
        >>> from adapters_jax.finetune.data.batches import Row
        >>> lengths_of(Row(np.zeros(n, np.int32), np.zeros(n, np.int32)) for n in (3, 5, 3))
        Counter({3: 2, 5: 1})
    """
    if isinstance(rows, Sequences):
        return Counter(rows.sizes.tolist())
    found: Counter[int] = Counter()
    for row in rows:
        if hasattr(row, "segments"):
            found.update(n for n in np.bincount(row.segments)[1:].tolist() if n)
        elif hasattr(row, "input_ids"):
            found[row.input_ids.shape[-1]] += 1
    return found


def of_part(judged: Judged, part: str) -> str:
    """Says which rows of a part a view is of.

    Example:
        >>> of_part(Judged({"test": [{}] * 3}, counts={"test": 9000}), "test")
        'Of 3 of the 9,000 rows of test, evenly spread.'
    """
    kept, whole = len(judged.rows.get(part, ())), judged.counts.get(part, 0)
    if kept < whole:
        return f"Of {kept:,} of the {whole:,} rows of {part}, evenly spread."
    return f"Of the {whole:,} rows of {part}."


def sides(judged: Judged) -> tuple[list[Any], list[Any], str]:
    """What is right and what is predicted in the rows of test, and which rows they are."""
    right, predicted = (judged.column("test", name) for name in ("gold", "predicted"))
    return right, predicted, of_part(judged, "test")


def absent_classes(judged: Judged, names: Sequence[str]) -> list[View]:
    """Sentences on classes without a row in dev or test, whose scores mean little.

    Nothing is said of a part if some of its rows are not kept.
    """
    found: list[View] = []
    for part in ("dev", "test"):
        there = {*judged.column(part, "gold")}
        lacking = [cut(name, NAMES) for name in names if name not in there]
        whole = len(judged.rows.get(part, ())) == judged.counts.get(part)
        if there and lacking and whole:
            what, it = ("class", "it") if len(lacking) == 1 else ("classes", "them")
            found.append(
                Note(
                    f"No row of {part} is of the {what} {first_few(lacking)}, so the scores on "
                    f"{part} say nothing about {it}."
                )
            )
    return found


def per_class(title: str, names: Sequence[str], right: Any, found: Any, about: str) -> Table:
    """Precision, recall and F1 of each class, by scikit-learn.

    Args:
        right: the right class of each row, or `(rows, classes)` of 0 and 1.
        found: the predicted ones in the same form.
        about: which rows it is of.
    """
    from sklearn.metrics import precision_recall_fscore_support

    labels: Sequence[Any] = names
    if isinstance(right, np.ndarray):
        labels, predicted = range(len(names)), found.sum(axis=0).astype(int).tolist()
        # A single column would be two classes, so each side has an empty one more.
        right, found = (np.pad(sets, ((0, 0), (0, 1))) for sets in (right, found))
    else:
        tally = Counter(found)
        predicted = [tally[name] for name in names]
    scores = precision_recall_fscore_support(
        right, found, labels=labels, average=None, zero_division=np.nan
    )
    rows = zip(names, *(each.tolist() for each in scores), predicted, strict=True)
    return class_table(title, rows, about)


def class_table(
    title: str, rows: Iterable[tuple[str, float, float, float, int, int]], about: str
) -> Table:
    """A table of classes, the most frequent ones if there are many.

    Args:
        rows: the name, precision, recall, F1, count and predicted count of each class.
    """
    rows = list(rows)
    kept = sorted(rows, key=lambda row: -row[4])[:TABLE] if len(rows) > TABLE else rows
    if len(rows) > TABLE:
        about += f" The {TABLE} most frequent of {len(rows):,} classes."
    cells = [
        [cut(name, NAMES), *map(percent, shares), f"{count:,}", f"{predicted:,}"]
        for name, *shares, count, predicted in kept
    ]
    header = ["class", "precision", "recall", "F1", "rows", "predicted"]
    return Table(title, header, cells, about)


def confusion(
    title: str, names: Sequence[str], right: Sequence[str], found: Sequence[str], about: str
) -> Matrix:
    """The confusion matrix, by scikit-learn; all but the most frequent classes become one.

    Example:
        >>> confusion("t", ["a", "b"], ["a", "b", "b"], ["a", "a", "b"], "").counts
        [[1, 0], [1, 1]]
    """
    from sklearn.metrics import confusion_matrix

    if len(names) > CLASSES:
        common = Counter([*right, *found]).most_common(CLASSES - 1)
        chosen = {name for name, _ in common}
        about += (
            f" The {len(chosen)} most frequent of {len(names):,} classes; the last row and column "
            "are all others."
        )
        # A class may be named as all others are, but none has the empty name.
        right, found = ([x if x in chosen else "" for x in side] for side in (right, found))
        names = [*(name for name in names if name in chosen), ""]
    counts = confusion_matrix(right, found, labels=names)
    shown = [cut(name, NAMES) or OTHERS for name in names]
    return Matrix(title, shown, counts.tolist(), about)


def number_judged(right: float, predicted: float) -> dict[str, Any]:
    """The verdict on a row with a number.

    Example:
        >>> number_judged(2.0, 2.5)
        {'gold': 2.0, 'predicted': 2.5, 'words': {'right': '2', 'predicted': '2.5'}}
    """
    words = {"right": f"{right:.4g}", "predicted": f"{predicted:.4g}"}
    return {"gold": right, "predicted": predicted, "words": words}


def predicted_against_right(judged: Judged) -> list[View]:
    """The picture of predicted against right numbers of test; nothing if there are none."""
    right, predicted, about = sides(judged)
    return [Scatter("Predicted against right", right, predicted, about)] if right else []
