"""Multi-label classification: each text has any number of labels, each decided by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.special import expit

from adapters_jax.finetune.data.datasets import sorted_names
from adapters_jax.finetune.data.files import place, refuse
from adapters_jax.finetune.data.readers import DataError, read_file
from adapters_jax.finetune.data.tables import Table, choose_columns, choose_values, items_of
from adapters_jax.finetune.tasks.base import Batch, Columns
from adapters_jax.finetune.tasks.labelled import EncoderTask
from adapters_jax.finetune.tasks.metrics import set_scores
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import NamedReadout
from adapters_jax.finetune.tasks.views import Judged, View, per_class, sides

THRESHOLDS = np.arange(1, 20) / 20
_MARKS = {"0", "1", "0.0", "1.0", "false", "true"}  # of a row with a mark for every label


@dataclass(frozen=True)
class LabelSetPrediction(Prediction):
    """The labels of a text.

    Attributes:
        labels: the labels whose probability reaches the threshold.
        probabilities: the probability of every label.
    """

    labels: list[str]
    probabilities: dict[str, float]

    def cells(self) -> dict[str, str]:
        """The labels with their probabilities."""
        found = (f"{name} {self.probabilities[name]:.4f}" for name in self.labels)
        return {"labels": ", ".join(found)}


@dataclass(frozen=True)
class LabelSets(NamedReadout):
    """A `NamedReadout` of sets of labels: the head's outputs are logits, one for each label.

    Args:
        names: the names of the labels, in the order of the outputs.
        threshold: the probability from which a label counts; `fitted` finds the best one on dev.

    Example:
        >>> sets = LabelSets(("joy", "fear"))
        >>> sets.encode([("fear",), ()]).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
        >>> sets.decode(np.array([[2.0, -2.0], [0.1, 0.1]]))
        [('joy',), ('joy', 'fear')]
    """

    threshold: float = 0.5
    constant_title = "most frequent labels"
    fits = ("threshold",)
    least = 1

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Self:
        """The labels of a training set."""
        names = sorted_names("the training rows", [n for labels in train.labels for n in labels])
        if not names:
            raise DataError("no training row has a label; there is nothing to learn")
        return cls(tuple(names))

    def encode(self, labels: Sequence[Sequence[str]]) -> Float[np.ndarray, "rows labels"]:
        """1.0 for each label of a row; labels that training lacks are left out."""
        found = [[name in row for name in self.names] for row in labels]
        return np.array(found, np.float32)

    def losses(self, outputs: Float[Array, "rows labels"], batch: Batch) -> Float[Array, " rows"]:
        """The mean binary cross-entropy of each row's labels."""
        return optax.sigmoid_binary_cross_entropy(outputs, batch["labels"]).mean(axis=1)

    def decode(self, outputs: np.ndarray, where: Any = None) -> list[tuple[str, ...]]:
        """The labels whose probability reaches the threshold."""
        chosen = expit(outputs.astype(np.float64)) >= self.threshold
        return [
            tuple(name for name, is_in in zip(self.names, row, strict=True) if is_in)
            for row in chosen
        ]

    def fitted(self, metric: str, outputs: np.ndarray, labels: Any) -> Self:
        """The readout with the threshold that is best on dev; of equal ones, nearest to 0.5."""
        tried = [replace(self, threshold=float(at)) for at in THRESHOLDS]
        return max(
            tried,
            key=lambda each: (
                each.score([metric], each.decode(outputs), labels)[metric],
                -abs(each.threshold - 0.5),
            ),
        )

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """F1 of sets of labels; a label that training lacks is never found."""
        names = [*self.names, *sorted({n for row in labels for n in row} - {*self.names})]
        every = LabelSets(tuple(names))
        found = set_scores(every.encode(predictions), every.encode(labels))
        return {name: found[name] for name in metrics}

    def verdict(self, right: Sequence[str], found: LabelSetPrediction) -> dict[str, Any]:
        """The right and the predicted labels of a row."""
        words = {"labels": ", ".join(right), "predicted": ", ".join(found.labels)}
        return {"gold": [*right], "predicted": found.labels, "words": words}

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The figures of each label, of test."""
        right, found, about = sides(judged)
        sets = self.encode(right), self.encode(found)
        return [per_class("Labels", self.names, *sets, about)] if right else []

    def constant(self, train: Table, part: Table) -> list[tuple[str, ...]]:
        """The most frequent labels, as many as have the best micro F1 in training."""
        counts = self.encode(train.labels).sum(axis=0)
        order = np.argsort(-counts, kind="stable")
        # With the k most frequent labels everywhere, micro F1 = 2 hits / (k rows + labels).
        hits, many = np.cumsum(counts[order]), np.arange(1, len(order) + 1)
        best = int(np.argmax(2 * hits / (many * len(train) + counts.sum())))
        return [tuple(self.names[i] for i in order[: best + 1])] * len(part)

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The labels of each text."""
        shares = expit(outputs.astype(np.float64)).tolist()
        return [
            LabelSetPrediction(text, pair, [*labels], dict(zip(self.names, share, strict=True)))
            for (text, pair), labels, share in zip(texts, self.decode(outputs), shares, strict=True)
        ]


class MultiLabel(EncoderTask):
    """Sets of labels of texts."""

    name = "multilabel"
    pipeline = "text-classification"
    head = "multilabel_classification"
    metrics = ("f1_micro", "f1_macro", "accuracy")
    defaults = ("f1_micro", "f1_macro")
    columns: ClassVar[Columns] = {"text": "text", "labels": "labels", "label_separator": None}
    flags = (*EncoderTask.flags, "pooling")
    readout = LabelSets
    example = "--train rows.jsonl with lists in a column labels, or --label-separator '|'"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Table:
        """Reads texts with sets of labels: lists, which may be empty, or texts with a separator.

        A row has the text `(text, None)`, and the tuple of labels as label.
        """
        rows, labels, separator = read_file(path), columns["labels"], columns["label_separator"]
        cells, _ = choose_columns(rows, [columns["text"]])
        values, lines = choose_values(rows, [labels])
        placed = [(value, place(line)) for (value,), line in zip(values, lines, strict=True)]
        if separator is None:
            texts = [(value, at) for value, at in placed if isinstance(value, str)]
            shown = f", such as {texts[0][0]!r}" if texts else ""
            after = f"{shown}; say what separates the labels of a row: --label-separator '|'"
            refuse(rows.path, [at for _, at in texts], f"{labels!r} is a text in ", after)
        found = [items_of(value, separator) for value, _ in placed]
        blank = [
            at
            for (value, at), row in zip(placed, found, strict=True)
            if isinstance(value, Mapping) or not all(row)
        ]
        expected = f": {labels!r} has a label without a name; expected a list of names"
        refuse(rows.path, blank, "", expected)
        even = len(found) > 1 and len({*map(len, found)}) == 1 < len(found[0])
        if even and {name for row in found for name in row} <= _MARKS:
            raise DataError(
                f"{rows.path}: {labels!r} has 0 or 1 for each of {len(found[0])} labels, as "
                f"{found[0]} ({place(lines[0])}); expected the names of the labels that a text has"
            )
        sets = [tuple(dict.fromkeys(row)) for row in found]
        return Table([(text, None) for (text,) in cells], sets, (), rows.path, lines)
