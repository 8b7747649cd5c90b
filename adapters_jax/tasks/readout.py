"""The interface that maps the outputs of a head to labels, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from adapters_jax.data.datasets import Dataset
from adapters_jax.tasks.base import Prediction


class Readout(Protocol):
    """Maps a head's outputs to labels, such as `classification.Classes`.

    Attributes:
        constant_title: the name of the best constant prediction in tables.
    """

    constant_title: str

    @classmethod
    def of(cls, train: Dataset) -> Self:
        """Makes it from a training set; raises DataError if there is nothing to learn."""

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_config` wrote; raises KeyError, TypeError or ValueError if it cannot."""

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration."""

    @property
    def width(self) -> int:
        """The number of outputs of the head."""

    def encode(self, labels: Any) -> Any:
        """The labels `(rows,)` for the loss."""

    def losses(self, outputs: Any, labels: Any) -> Any:
        """The loss of each row, `(rows,)`, from outputs `(rows, width)` and encoded labels."""

    def decode(self, outputs: Any) -> Any:
        """The predictions `(rows,)` for metrics, from outputs `(rows, width)`."""

    def constant(self, train: Dataset, rows: int) -> Any:
        """The best constant prediction for `rows` rows."""

    def predict(self, text: str, text_pair: str | None, outputs: Any) -> Prediction:
        """The prediction of one row of outputs, `(width,)`."""
