"""Regression: each text, or pair of texts, has a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adapters_jax.data.datasets import Dataset
from adapters_jax.data.readers import DataError
from adapters_jax.errors import UserError
from adapters_jax.tasks.base import Prediction
from adapters_jax.tasks.labelled import LabelledTexts


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
class Numbers:
    """A head's output as a standardised number; a `Readout`.

    A number is learnt standardised by the training labels' mean and deviation, so that one learning
    rate suits every scale; predictions are on the labels' own scale.

    Args:
        mean: of the training labels.
        std: their standard deviation.

    Example:
        >>> numbers = Numbers(mean=2.0, std=0.5)
        >>> numbers.encode(np.array([2.5])).tolist(), numbers.decode(np.array([[1.0]])).tolist()
        ([1.0], [2.5])
    """

    mean: float
    std: float
    constant_title = "mean"

    @classmethod
    def of(cls, train: Dataset) -> Numbers:
        """The scale of a training set; raises DataError where its labels are all one number."""
        labels = train.labels.astype(np.float64)
        if not labels.std():
            raise DataError(f"every training label is {labels[0]:g}; there is nothing to learn")
        return cls(float(labels.mean()), float(labels.std()))

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Numbers:
        """As `to_config` wrote it; raises ValueError for anything else."""
        found = cls(float(values["mean"]), float(values["std"]))
        if values["names"] or not (math.isfinite(found.mean) and 0 < found.std < math.inf):
            raise UserError("a mean, a positive deviation and no names are expected")
        return found

    def to_config(self) -> dict[str, Any]:
        """For a run's configuration; in the form that classification has, too."""
        return {"names": (), "mean": self.mean, "std": self.std}

    @property
    def width(self) -> int:
        """Outputs of the head."""
        return 1

    def encode(self, labels: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """Labels as the loss takes them: standardised."""
        return ((labels - self.mean) / self.std).astype(np.float32)

    def losses(
        self, outputs: Float[Array, "rows width"], labels: Float[Array, " rows"]
    ) -> Float[Array, " rows"]:
        """The squared error of each row."""
        return jnp.square(outputs[:, 0] - labels)

    def decode(self, outputs: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, " rows"]:
        """Outputs as numbers on the labels' scale."""
        return outputs[:, 0] * self.std + self.mean

    def constant(self, train: Dataset, rows: int) -> Float[np.ndarray, " rows"]:
        """The best constant prediction for n rows: the mean of the training rows."""
        return np.full(rows, self.mean)

    def predict(
        self, text: str, text_pair: str | None, outputs: Float[np.ndarray, " width"]
    ) -> NumberPrediction:
        """The prediction that a row of outputs stands for."""
        return NumberPrediction(text, text_pair, float(self.decode(outputs[None])[0]))


class Regression(LabelledTexts):
    """Labels of texts as numbers."""

    name = "regression"
    metrics = ("pearson", "spearman")
    defaults = ("pearson", "spearman")
    readout = Numbers
