"""Classification: each text, or pair of texts, has one of a few labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax
from jaxtyping import Array, Float, Int

from adapters_jax.data.datasets import Dataset
from adapters_jax.errors import UserError
from adapters_jax.tasks.base import Batch, Prediction
from adapters_jax.tasks.labelled import LabelledTexts
from adapters_jax.tasks.metrics import compute
from adapters_jax.tasks.readout import Inputs, Readout


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
class Classes(Readout):
    """A `Readout` of classes: the head's outputs are logits.

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
