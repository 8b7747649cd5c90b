"""Classification: each text, or pair of texts, has one of a few labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.special import softmax

from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.tasks import views
from adapters_jax.finetune.tasks.base import Batch
from adapters_jax.finetune.tasks.labelled import LabelledTexts
from adapters_jax.finetune.tasks.metrics import compute
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import NamedReadout
from adapters_jax.finetune.tasks.views import Judged, View


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
class Classes(NamedReadout):
    """A `NamedReadout` of classes: the head's outputs are logits.

    Example:
        >>> classes = Classes(("no", "yes"))
        >>> classes.decode(np.array([[0.1, 2.0], [0.3, 0.2]])).tolist()
        [1, 0]
        >>> classes.predictions([("A joy.", None)], np.zeros((1, 2)))[0].probabilities
        {'no': 0.5, 'yes': 0.5}
    """

    constant_title = "majority class"

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Self:
        """The classes of a training set."""
        return cls(train.label_names)

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration, with the same keys as regression."""
        return {"names": self.names, "mean": 0.0, "std": 1.0}

    def losses(self, outputs: Float[Array, "rows width"], batch: Batch) -> Float[Array, " rows"]:
        """The cross-entropy of each row."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])

    def decode(self, outputs: np.ndarray, where: Any = None) -> Int[np.ndarray, " rows"]:
        """The class ids of outputs."""
        return outputs.argmax(axis=1)

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics of predictions; F1 counts the classes of training."""
        return compute(metrics, predictions, labels, classes=self.width)

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The class of each text."""
        shares = softmax(outputs.astype(np.float64), axis=1).tolist()
        return [
            ClassPrediction(text, pair, self.names[i], dict(zip(self.names, share, strict=True)))
            for (text, pair), i, share in zip(
                texts, self.decode(outputs).tolist(), shares, strict=True
            )
        ]

    def verdict(self, right: int, found: ClassPrediction) -> dict[str, Any]:
        """The right and the predicted class of a row, and the probability of the latter."""
        gold, share = self.names[right], found.probabilities[found.label]
        words = {"class": gold, "predicted": f"{found.label} ({views.percent(share)})"}
        return {"gold": gold, "predicted": found.label, "probability": share, "words": words}

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The figures of each class and the confusion matrix, of test."""
        found: list[View] = []
        if len(self.names) == 2 and "f1" in metrics:
            positive = views.cut(self.names[1], views.NAMES)
            found.append(views.Note(f"F1 is that of the class {positive}, the positive one."))
        found += views.absent_classes(judged, self.names)
        right, guess, about = views.sides(judged)
        if right:
            found.append(views.per_class("Classes", self.names, right, guess, about))
            found.append(views.confusion("Confusion matrix", self.names, right, guess, about))
        return found

    def constant(self, train: Table, part: Table) -> Int[np.ndarray, " rows"]:
        """The most frequent class in training for each row of a part."""
        return np.full(len(part), np.bincount(train.labels).argmax())


class Classification(LabelledTexts):
    """Classes of texts."""

    name = "classification"
    metrics = ("accuracy", "f1", "matthews", "pearson", "spearman")  # of ordered classes, too
    defaults = ("accuracy", "f1")
    readout = Classes
