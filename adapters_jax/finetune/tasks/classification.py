"""Classification: each text, or pair of texts, has one of a few labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.special import softmax

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.datasets import Dataset
from adapters_jax.finetune.tasks.base import Batch
from adapters_jax.finetune.tasks.labelled import LabelledTexts
from adapters_jax.finetune.tasks.metrics import compute
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, LabelReadout
from adapters_jax.finetune.tasks.views import (
    NAMES,
    Judged,
    Note,
    View,
    absent_classes,
    confusion,
    cut,
    of_part,
    per_class,
    percent,
)


@dataclass(frozen=True)
class ClassPrediction(Prediction):
    """The class of a text.

    Attributes:
        label: the most probable class.
        probabilities: the probability of every class.
    """

    label: str
    probabilities: dict[str, float]

    def cells(self) -> dict[str, str]:
        """The label and each probability."""
        shares = {name: f"{share:.4f}" for name, share in self.probabilities.items()}
        return {"label": self.label, **shares}


@dataclass(frozen=True)
class Classes(LabelReadout):
    """A `LabelReadout` of classes: the head's outputs are logits.

    Args:
        names: the names of the classes, in the order of their ids.

    Example:
        >>> classes = Classes(("no", "yes"))
        >>> classes.decode(np.array([[0.1, 2.0], [0.3, 0.2]])).tolist()
        [1, 0]
        >>> classes.predictions([("A joy.", None)], np.zeros((1, 2)), None)[0].probabilities
        {'no': 0.5, 'yes': 0.5}
    """

    names: tuple[str, ...]
    constant_title = "majority class"

    @classmethod
    def of(cls, train: Dataset) -> Classes:
        """The classes of a training set."""
        return cls(train.label_names)

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Classes:
        """Reads what `to_config` wrote; raises KeyError, TypeError or UserError if it cannot."""
        names = tuple(values["names"])
        if len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise UserError(f"names={names}, expected the names of at least two classes")
        return cls(names)

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration, with the same keys as regression."""
        return {"names": self.names, "mean": 0.0, "std": 1.0}

    @property
    def width(self) -> int:
        """The number of outputs of the head."""
        return len(self.names)

    def losses(self, outputs: Float[Array, "rows width"], batch: Batch) -> Float[Array, " rows"]:
        """The cross-entropy of each row."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])

    def decode(
        self, outputs: Float[np.ndarray, "rows width"], where: Any = None
    ) -> Int[np.ndarray, " rows"]:
        """The class ids of outputs."""
        return outputs.argmax(axis=1)

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics of predictions; F1 counts the classes of training."""
        return compute(metrics, predictions, labels, classes=self.width)

    def verdicts(self, part: Dataset, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """The right and the predicted class of each row, and the probability of the latter."""
        found, shares = self.decode(outputs).tolist(), softmax(outputs.astype(np.float64), axis=1)
        names = self.names
        return [
            {
                "gold": names[right],
                "predicted": names[i],
                "probability": float(share[i]),
                "words": {"class": names[right], "predicted": f"{names[i]} ({percent(share[i])})"},
            }
            for right, i, share in zip(part.labels.tolist(), found, shares, strict=True)
        ]

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The figures of each class and the confusion matrix, of test."""
        found: list[View] = []
        if len(self.names) == 2 and "f1" in metrics:
            positive = cut(self.names[1], NAMES)
            found.append(Note(f"F1 is that of the class {positive}, the positive one."))
        found += absent_classes(judged, self.names)
        right, guess = judged.column("test", "gold"), judged.column("test", "predicted")
        if right:
            about = of_part(judged, "test")
            found.append(per_class("Classes", self.names, right, guess, about))
            found.append(confusion("Confusion matrix", self.names, right, guess, about))
        return found

    def constant(self, train: Dataset, part: Dataset) -> Int[np.ndarray, " rows"]:
        """The most frequent class in training for each row of a part."""
        return np.full(len(part), np.bincount(train.labels).argmax())

    def predictions(
        self, texts: Sequence[Any], outputs: np.ndarray, inputs: Inputs
    ) -> list[Prediction]:
        """The class of each text."""
        rows = zip(texts, outputs, strict=True)
        return [self._predict(text, pair, row) for (text, pair), row in rows]

    def _predict(
        self, text: str, text_pair: str | None, outputs: Float[np.ndarray, " width"]
    ) -> ClassPrediction:
        odds = np.exp((outputs - outputs.max()).astype(np.float64))
        shares = (odds / odds.sum()).tolist()
        label = self.names[int(outputs.argmax())]
        probabilities = dict(zip(self.names, shares, strict=True))
        return ClassPrediction(text, text_pair, label, probabilities)


class Classification(LabelledTexts):
    """Classes of texts."""

    name = "classification"
    metrics = ("accuracy", "f1", "matthews", "pearson", "spearman")  # of ordered classes, too
    defaults = ("accuracy", "f1")
    readout = Classes
