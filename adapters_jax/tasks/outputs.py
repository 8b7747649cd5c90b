"""What the head predicts, a class or a number: labels, loss and predictions in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Num

from adapters_jax.data.datasets import Dataset
from adapters_jax.data.tables import DataError
from adapters_jax.io.run_directory import Run, RunError


@dataclass(frozen=True)
class Target:
    """The head's target.

    A number is learnt standardised by the training labels' mean and deviation, so that one learning
    rate suits every scale; predictions are on the labels' own scale.

    Args:
        names: of the classes; empty for regression.
        mean: of the training labels, for regression.
        std: their standard deviation.

    Example:
        >>> target = Target((), mean=2.0, std=0.5)
        >>> target.encode(np.array([2.5])).tolist(), target.decode(np.array([[1.0]])).tolist()
        ([1.0], [2.5])
    """

    names: tuple[str, ...]
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, train: Dataset) -> Target:
        """The target of a training set; raises DataError where its labels are all one number."""
        if not train.is_regression:
            return cls(train.label_names)
        labels = train.labels.astype(np.float64)
        if not labels.std():
            raise DataError(f"every training label is {labels[0]:g}; there is nothing to learn")
        return cls((), float(labels.mean()), float(labels.std()))

    @property
    def width(self) -> int:
        """Outputs of the head."""
        return len(self.names) or 1

    def encode(self, labels: Num[np.ndarray, " rows"]) -> Num[np.ndarray, " rows"]:
        """Labels as the loss wants them."""
        return labels if self.names else ((labels - self.mean) / self.std).astype(np.float32)

    def losses(
        self, outputs: Float[Array, "rows width"], labels: Num[Array, " rows"]
    ) -> Float[Array, " rows"]:
        """Cross-entropy, or squared error, of each row."""
        if self.names:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return jnp.square(outputs[:, 0] - labels)

    def decode(self, outputs: Float[np.ndarray, "rows width"]) -> Num[np.ndarray, " rows"]:
        """Outputs as class ids, or as numbers on the labels' scale."""
        return outputs.argmax(axis=1) if self.names else outputs[:, 0] * self.std + self.mean

    def constant(self, train: Dataset, rows: int) -> Num[np.ndarray, " rows"]:
        """The best constant prediction for so many rows: the majority class, or the mean."""
        value = np.bincount(train.labels).argmax() if self.names else self.mean
        return np.full(rows, value)


def target_of(run: Run, config: dict[str, Any]) -> Target:
    """The target that a run's configuration describes."""
    try:
        target = config["target"]
        return Target(tuple(target["names"]), float(target["mean"]), float(target["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run.config} is damaged: its target is {config['target']!r}") from error
