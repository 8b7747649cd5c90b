"""What the outputs of a head mean: the one thing that differs between labels of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from adapters_jax.data.datasets import Dataset
from adapters_jax.tasks.base import Prediction


class Readout(Protocol):
    """What a head's outputs mean, such as `classification.Classes`.

    Attributes:
        constant_title: what the best constant prediction is called.
    """

    constant_title: str

    @classmethod
    def of(cls, train: Dataset) -> Self:
        """Of the labels of a training set; raises DataError where there is nothing to learn."""

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """As `to_config` wrote it; raises KeyError, TypeError or ValueError for anything else."""

    def to_config(self) -> dict[str, Any]:
        """For a run's configuration."""

    @property
    def width(self) -> int:
        """Outputs of the head."""

    def encode(self, labels: Any) -> Any:
        """Labels `(rows,)` as the loss takes them."""

    def losses(self, outputs: Any, labels: Any) -> Any:
        """The loss of each row, `(rows,)`, of outputs `(rows, width)` and encoded labels."""

    def decode(self, outputs: Any) -> Any:
        """Outputs `(rows, width)` as metrics take them, `(rows,)`."""

    def constant(self, train: Dataset, rows: int) -> Any:
        """The best constant prediction for n rows."""

    def predict(self, text: str, text_pair: str | None, outputs: Any) -> Prediction:
        """The prediction that a row of outputs, `(width,)`, stands for."""
