"""What differs between tasks on an encoder with a head: what it reads, learns and predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from adapters_jax.finetune.data.batches import Batches, choose_buckets
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.pretrained.encoder import INPUTS, Encoder
from adapters_jax.finetune.tasks import views
from adapters_jax.finetune.tasks.base import Batch
from adapters_jax.finetune.tasks.metrics import compute
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.views import Judged, View


class Inputs(NamedTuple):
    """Encoded texts.

    Attributes:
        rows: the encoded rows; `data.batches.Batches` takes them.
        cut: the number of texts that lost tokens.
        where: what `Readout.decode` needs beside the outputs, such as the words of each token.
    """

    rows: Sequence[Any]
    cut: int
    where: Any = None


class Batching(NamedTuple):
    """How rows become batches; see `data.batches.Batches`.

    Attributes:
        size: the number of rows in a batch.
        seed: the seed of the order; None keeps the order.
        buckets: the widths of batches.
    """

    size: int
    seed: int | None
    buckets: Sequence[int] | None


class Readout(ABC):
    """Maps texts to the inputs of a model, and its outputs to what a task predicts.

    A task whose rows have labels derives from `LabelReadout`.

    Attributes:
        constant_title: the name of the best prediction without a model in tables.
        pooling: what the head reads; None leaves it to the user.
        max_length: the largest number of tokens if the user gives none.
        fits: whether `fitted` learns from the outputs on dev.
        has_head: whether there is a head; otherwise the outputs are what it would read.
        arrays: the arrays of a batch that the model reads, in the order of its arguments.
    """

    constant_title: ClassVar[str]
    pooling: ClassVar[str | None] = None
    max_length: ClassVar[int] = 128
    fits: ClassVar[bool] = False
    has_head: ClassVar[bool] = True
    arrays: ClassVar[tuple[str, ...]] = INPUTS

    @classmethod
    @abstractmethod
    def of(cls, train: Any) -> Self:
        """Makes it from a training set; raises DataError if there is nothing to learn."""

    @classmethod
    def made(cls, train: Any, setup: Any) -> Self:
        """Makes it from a training set and the settings of a run."""
        return cls.of(train)

    @classmethod
    @abstractmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_config` wrote; raises KeyError, TypeError or ValueError if it cannot."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of outputs of the head."""

    def check(self, texts: Sequence[Any], pairs: bool) -> None:
        """Raises DataError unless all texts to predict are single ones, or all are pairs."""
        if isinstance(texts, str) or not texts or any(len(row) != 2 for row in texts):
            raise DataError(
                "predict: expected at least one text, or pairs of texts: predict(['A text.']), or "
                "predict([('A text.', 'Another.')]) of a run on pairs"
            )
        if any((pair is not None) != pairs for _, pair in texts):
            expected = "pairs of texts" if pairs else "single texts"
            raise DataError(f"the run was trained on {expected}; give it {expected}")

    def check_batch(self, rows: int) -> None:
        """Raises UserError if a batch, or a part of it that is computed alone, is too small."""
        return None  # most losses are of each row by itself

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes texts."""
        return Inputs(*encoder.encode(list(texts), max_length))

    def encoded(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes the texts of train, dev or test, where these are not read as those to predict."""
        return self.inputs(encoder, texts, max_length)

    def checksums(self, inputs: Mapping[str, Inputs]) -> dict[str, str]:
        """What a run's configuration says of its rows, beside the checksum of texts and labels."""
        return {}

    def buckets(self, rows: Sequence[Any], length: int, size: int) -> tuple[int, ...]:
        """The widths of batches; see `data.batches.choose_buckets`."""
        return choose_buckets(rows, length, size)

    def tokens(self, rows: Sequence[Any]) -> int:
        """The number of tokens of all rows, to show the speed; 0 if it would mean nothing."""
        return sum(row.input_ids.size for row in rows)

    def augmented(self, batch: Batch, key: Any) -> Batch:
        """A training batch, varied at random."""
        return batch

    def batches(
        self, encoder: Encoder, rows: Sequence[Any], labels: Any, batching: Batching
    ) -> Any:
        """Batches of encoded rows."""
        return Batches(rows, labels, *batching, encoder.config.pad_token_id)

    def targets(self, inputs: Inputs, labels: Any) -> tuple[Sequence[Any], Any]:
        """The encoded rows to train on, and their labels for `Batches`."""
        return inputs.rows, self.encode(labels)

    def encode(self, labels: Any) -> Any:
        """The labels `(rows, ...)` for the loss."""
        return labels

    def counts(self, batch: Batch) -> np.ndarray:
        """The number of losses that each row's loss is the sum of, `(rows,)`."""
        return np.ones_like(batch["weight"])

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Any:
        """The loss of each row, `(rows,)`, from its outputs and the batch's `labels`."""

    def reduced(self, outputs: Any, batch: Batch) -> Any:
        """What `decode` reads of the outputs on a held-out batch, if that is less than all."""
        return outputs

    def shown(self, outputs: Any) -> Any:
        """What `predictions` reads of the outputs, if that is less than all."""
        return outputs

    @abstractmethod
    def decode(self, outputs: np.ndarray, where: Any = None) -> Any:
        """The predictions from outputs in the order of the rows, and `Inputs.where`."""

    def fitted(self, metric: str, outputs: np.ndarray, labels: Any) -> Self:
        """What the outputs on dev make of it, such as a threshold that is best for a metric."""
        return self

    def found(self) -> dict[str, float]:
        """What `fitted` learnt, by name; it stands beside the metrics."""
        return {}

    def restored(self, dev: Mapping[str, float]) -> Self:
        """The readout with what `fitted` learnt in training, from a run's results on dev."""
        return self

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics of predictions."""
        return compute(metrics, predictions, labels)

    @abstractmethod
    def judged(self, part: Any, outputs: np.ndarray, where: Any = None) -> list[dict[str, Any]]:
        """Each row of a part with its loss, for the report; see `views.Judged`."""

    def lengths(self, batches: Any) -> Counter[int]:
        """How many rows have a number of tokens; empty if it would mean nothing."""
        return views.lengths_of(batches.rows)

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """What the report shows of the predictions, beside what it shows for every task.

        Args:
            judged: the rows with their verdicts; there may be none.
            metrics: the metrics of the run.
        """
        return []

    @abstractmethod
    def untrained(self, problem: Any, data: TaskData, part: str) -> Any:
        """The predictions of the baseline without a model, on "dev" or "test" of a problem."""

    @abstractmethod
    def predictions(
        self, texts: Sequence[Any], outputs: np.ndarray, inputs: Inputs
    ) -> list[Prediction]:
        """The prediction of each text."""


class LabelReadout(Readout):
    """A `Readout` of labels: each row has one, and the head's outputs predict it."""

    def judged(self, part: Any, outputs: np.ndarray, where: Any = None) -> list[dict[str, Any]]:
        """Each row of a part with its loss and its verdict; see `Readout.judged`."""
        losses = self.row_losses(outputs, part.labels, where)
        verdicts = self.verdicts(part, outputs, where)
        return [
            {**verdict, "loss": loss, "words": {**self.named(texts), **verdict["words"]}}
            for texts, verdict, loss in zip(part.texts, verdicts, losses, strict=True)
        ]

    def named(self, texts: Sequence[Any]) -> dict[str, str]:
        """What the report shows of a row's inputs."""
        return views.named(texts)

    def row_losses(self, outputs: np.ndarray, labels: Any, where: Any = None) -> list[float]:
        """The loss of each row of a part."""
        _, encoded = self.targets(Inputs((), 0, where), labels)
        weight = np.ones(len(outputs), np.float32)
        batch = {"labels": encoded, "weight": weight}
        losses: Any = self.losses(np.asarray(outputs, np.float32), batch)
        return np.asarray(losses, np.float64).tolist()

    @abstractmethod
    def verdicts(self, part: Any, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """What is right and what is predicted, for each row of a part, as plain values.

        Each has `words`, what the report shows of it beside the texts; `views` reads the others.
        """

    @abstractmethod
    def constant(self, train: Any, part: Any) -> Any:
        """The best predictions without a model for a part: mostly the same for each row."""

    def untrained(self, problem: Any, data: TaskData, part: str) -> Any:
        """What `constant` predicts; see `Readout.untrained`."""
        return self.constant(data.train, getattr(data, part))
