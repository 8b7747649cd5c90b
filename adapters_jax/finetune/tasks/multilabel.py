"""Multi-label classification: each text has any number of labels, each decided by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.special import expit

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.annotated import Annotated, read_label_sets
from adapters_jax.finetune.data.datasets import sorted_names
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.tasks.base import Batch
from adapters_jax.finetune.tasks.labelled import AnnotatedTask
from adapters_jax.finetune.tasks.metrics import set_scores
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, LabelReadout
from adapters_jax.finetune.tasks.views import Judged, View, of_part, per_class

THRESHOLDS = np.arange(1, 20) / 20


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
class LabelSets(LabelReadout):
    """A `LabelReadout` of sets of labels: the head's outputs are logits, one for each label.

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

    names: tuple[str, ...]
    threshold: float = 0.5
    constant_title = "most frequent labels"
    fits = True

    @classmethod
    def of(cls, train: Annotated) -> LabelSets:
        """The labels of a training set."""
        names = sorted_names("the training rows", [n for labels in train.labels for n in labels])
        if not names:
            raise DataError("no training row has a label; there is nothing to learn")
        return cls(tuple(names))

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> LabelSets:
        """Reads what `to_config` wrote; raises KeyError, TypeError or UserError if it cannot."""
        names = tuple(values["names"])
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"names={names}, expected the names of labels")
        return cls(names)

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration."""
        return {"names": self.names}

    @property
    def width(self) -> int:
        """The number of outputs of the head."""
        return len(self.names)

    def encode(self, labels: Sequence[Sequence[str]]) -> Float[np.ndarray, "rows labels"]:
        """1.0 for each label of a row; labels that training lacks are left out."""
        found = [[name in row for name in self.names] for row in labels]
        return np.array(found, np.float32)

    def losses(self, outputs: Float[Array, "rows labels"], batch: Batch) -> Float[Array, " rows"]:
        """The mean binary cross-entropy of each row's labels."""
        return optax.sigmoid_binary_cross_entropy(outputs, batch["labels"]).mean(axis=1)

    def decode(
        self, outputs: Float[np.ndarray, "rows labels"], where: Any = None
    ) -> list[tuple[str, ...]]:
        """The labels whose probability reaches the threshold."""
        chosen = expit(outputs.astype(np.float64)) >= self.threshold
        return [
            tuple(name for name, is_in in zip(self.names, row, strict=True) if is_in)
            for row in chosen
        ]

    def fitted(self, metric: str, outputs: np.ndarray, labels: Any) -> LabelSets:
        """The readout with the threshold that is best on dev; of equal ones, nearest to 0.5."""
        tried = [replace(self, threshold=float(at)) for at in THRESHOLDS]
        return max(
            tried,
            key=lambda each: (
                each.score([metric], each.decode(outputs), labels)[metric],
                -abs(each.threshold - 0.5),
            ),
        )

    def found(self) -> dict[str, float]:
        """The threshold."""
        return {"threshold": self.threshold}

    def restored(self, dev: Mapping[str, float]) -> LabelSets:
        """The readout with the threshold that was best on dev in training."""
        return replace(self, threshold=float(dev.get("threshold", self.threshold)))

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """F1 of sets of labels; a label that training lacks is never found."""
        names = [*self.names, *sorted({n for row in labels for n in row} - {*self.names})]
        every = LabelSets(tuple(names))
        found = set_scores(every.encode(predictions), every.encode(labels))
        return {name: found[name] for name in metrics}

    def verdicts(self, part: Annotated, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """The right and the predicted labels of each row."""
        return [
            {
                "gold": [*right],
                "predicted": [*found],
                "words": {"labels": ", ".join(right), "predicted": ", ".join(found)},
            }
            for right, found in zip(part.labels, self.decode(outputs), strict=True)
        ]

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The figures of each label, of test."""
        right, found = (judged.column("test", name) for name in ("gold", "predicted"))
        if not right:
            return []
        sides = self.encode(right), self.encode(found)
        return [per_class("Labels", self.names, *sides, of_part(judged, "test"))]

    def constant(self, train: Annotated, part: Annotated) -> list[tuple[str, ...]]:
        """The most frequent labels, as many as have the best micro F1 in training."""
        counts = self.encode(train.labels).sum(axis=0)
        order = np.argsort(-counts, kind="stable")
        hits, many = np.cumsum(counts[order]), np.arange(1, len(order) + 1)
        best = int(np.argmax(2 * hits / (many * len(train) + counts.sum())))
        return [tuple(self.names[i] for i in order[: best + 1])] * len(part)

    def predictions(
        self, texts: Sequence[Any], outputs: np.ndarray, inputs: Inputs
    ) -> list[Prediction]:
        """The labels of each text."""
        shares = expit(outputs.astype(np.float64)).tolist()
        return [
            LabelSetPrediction(text, pair, list(labels), dict(zip(self.names, share, strict=True)))
            for (text, pair), labels, share in zip(texts, self.decode(outputs), shares, strict=True)
        ]


class MultiLabel(AnnotatedTask):
    """Sets of labels of texts."""

    name = "multilabel"
    pipeline = "text-classification"
    head = "multilabel_classification"
    metrics = ("f1_micro", "f1_macro", "accuracy")
    defaults = ("f1_micro", "f1_macro")
    columns: ClassVar[Mapping[str, str | None]] = {
        "text": "text",
        "labels": "labels",
        "label_separator": None,
    }
    flags = (*AnnotatedTask.flags, "pooling")
    readout = LabelSets
    example = "--train rows.jsonl with lists in a column labels, or --label-separator '|'"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Annotated:
        """Reads texts with their labels."""
        return read_label_sets(path, columns["text"], columns["labels"], columns["label_separator"])
