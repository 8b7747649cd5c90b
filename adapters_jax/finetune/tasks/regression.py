"""Regression: each text, or pair of texts, has a number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.tasks.base import Batch
from adapters_jax.finetune.tasks.labelled import LabelledTexts
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Readout
from adapters_jax.finetune.tasks.views import Judged, View, number_judged, predicted_against_right


@dataclass(frozen=True)
class NumberPrediction(Prediction):
    """The number of a text.

    Attributes:
        value: the number, on the scale of the labels.
    """

    value: float

    def cells(self) -> dict[str, str]:
        """The number."""
        return {"value": f"{self.value:.4f}"}


@dataclass(frozen=True)
class Numbers(Readout):
    """A `Readout` of numbers: the head's output is a standardised number.

    The labels are standardised by their mean and standard deviation in training, so that one
    learning rate suits every scale; predictions are on the scale of the labels.

    Args:
        mean: the mean of the training labels.
        std: their standard deviation.

    Example:
        >>> numbers = Numbers(mean=2.0, std=0.5)
        >>> numbers.encode(np.array([2.5])).tolist(), numbers.decode(np.array([[1.0]])).tolist()
        ([1.0], [2.5])
    """

    mean: float
    std: float
    constant_title = "mean"
    width = 1

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Self:
        """The scale of a training set; raises DataError if all its labels are equal."""
        labels = train.labels.astype(np.float64)
        if not labels.std():
            raise DataError(f"every training label is {labels[0]:g}; there is nothing to learn")
        return cls(float(labels.mean()), float(labels.std()))

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_config` wrote; raises KeyError, TypeError or ValueError if it cannot."""
        found = cls(float(values["mean"]), float(values["std"]))
        if values["names"] or not (math.isfinite(found.mean) and 0 < found.std < math.inf):
            raise UserError("expected a finite mean, a positive finite std and no names")
        return found

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration, with the same keys as classification."""
        return {"names": (), "mean": self.mean, "std": self.std}

    def encode(self, labels: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """The labels for the loss: standardised."""
        return ((labels - self.mean) / self.std).astype(np.float32)

    def losses(self, outputs: Float[Array, "rows width"], batch: Batch) -> Float[Array, " rows"]:
        """The squared error of each row."""
        return jnp.square(outputs[:, 0] - batch["labels"])

    def decode(self, outputs: np.ndarray, where: Any = None) -> Float[np.ndarray, " rows"]:
        """The numbers of outputs, on the scale of the labels."""
        return outputs[:, 0] * self.std + self.mean

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The number of each text."""
        found = zip(texts, self.decode(outputs).tolist(), strict=True)
        return [NumberPrediction(text, pair, value) for (text, pair), value in found]

    def verdict(self, right: float, found: NumberPrediction) -> dict[str, Any]:
        """The right and the predicted number of a row."""
        return number_judged(float(right), found.value)

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """Predicted against right numbers, of test."""
        return predicted_against_right(judged)

    def constant(self, train: Table, part: Table) -> Float[np.ndarray, " rows"]:
        """The mean of the training rows for each row of a part."""
        return np.full(len(part), self.mean)


class Regression(LabelledTexts):
    """Numbers of texts."""

    name = "regression"
    learns = "regression"
    metrics = ("pearson", "spearman")
    readout = Numbers
