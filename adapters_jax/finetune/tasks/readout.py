"""What differs between tasks on an encoder with a head: what it reads, learns and predicts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import NOTHING, Batches, choose_buckets
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.mixing import Mixture, total
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.pretrained.encoder import INPUTS, Encoder
from adapters_jax.finetune.tasks import views
from adapters_jax.finetune.tasks.base import PARTS, Batch, rows_sha256
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


@dataclass(frozen=True)
class Readout(ABC):
    """Maps texts to the inputs of a model, and its outputs to what a task predicts.

    A frozen dataclass of what it takes from training rows; a run's configuration has its fields.

    Attributes:
        constant_title: the name of the best prediction without a model in tables.
        pooling: what the head reads; None leaves it to the user.
        max_length: the largest number of tokens if the user gives none.
        fits: the fields that `fitted` learns from the outputs on dev.
        unsaved: other fields that a run's configuration does not have.
        has_head: whether there is a head; otherwise the outputs are what it would read.
        arrays: the arrays of a batch that the model reads, in the order of its arguments.
    """

    constant_title: ClassVar[str]
    pooling: ClassVar[str | None] = None
    max_length: ClassVar[int] = 128
    fits: ClassVar[tuple[str, ...]] = ()
    unsaved: ClassVar[tuple[str, ...]] = ()
    has_head: ClassVar[bool] = True
    arrays: ClassVar[tuple[str, ...]] = INPUTS

    @classmethod
    @abstractmethod
    def of(cls, train: Any, setup: Any = None) -> Self:
        """Makes it from a training set and the settings of a run.

        Raises:
            DataError: there is nothing to learn.
        """

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_config` wrote; raises KeyError, TypeError or ValueError if it cannot."""
        stored = {field.name: values[field.name] for field in cls._stored()}
        found = cls(**{k: tuple(x) if isinstance(x, list) else x for k, x in stored.items()})
        expected = found.expected()
        if expected:
            raise UserError(f"{', '.join(f'{k}={x}' for k, x in stored.items())}: {expected}")
        return found

    def expected(self) -> str:
        """What its fields should be, if they cannot be so; otherwise empty."""
        return ""

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration."""
        return {field.name: getattr(self, field.name) for field in self._stored()}

    @classmethod
    def _stored(cls) -> list[Any]:
        return [field for field in fields(cls) if field.name not in (*cls.fits, *cls.unsaved)]

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
        return {"tokens_sha256": rows_sha256(row for part in PARTS for row in inputs[part].rows)}

    def buckets(self, rows: Sequence[Any], length: int, size: int) -> tuple[int, ...]:
        """The widths of batches; none where rows have no tokens, such as images."""
        return choose_buckets(rows, length, size) if "input_ids" in self.arrays else ()

    def tokens(self, rows: Sequence[Any], mix: Mixture | None = None) -> int:
        """The tokens of an epoch's rows, to show the speed; 0 where they have none."""
        reads = "input_ids" in self.arrays
        return total((row.input_ids.size for row in rows), mix) if reads else 0

    def augmented(self, batch: Batch, key: Any) -> Batch:
        """A training batch, varied at random."""
        return batch

    def owners(self, inputs: Inputs) -> np.ndarray:
        """The position of the text that each encoded row is of, `(rows,)`."""
        return np.arange(len(inputs.rows))

    def batches(
        self,
        encoder: Encoder,
        rows: Sequence[Any],
        labels: Any,
        *plan: Any,
        mix: Mixture | None = None,
    ) -> Any:
        """Batches of encoded rows.

        Args:
            labels: as `targets` makes them; None for rows without labels.
            *plan: the size, the seed and the buckets, as `data.batches.Batches` takes them.
        """
        size, seed, buckets = plan
        return Batches(rows, labels, size, seed, buckets, encoder.config.pad_token_id, mix)

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
        """What is predicted, from outputs in the order of the rows, and `Inputs.where`."""

    def fitted(self, metric: str, outputs: np.ndarray, labels: Any) -> Self:
        """What the outputs on dev make of it, such as a threshold that is best for a metric."""
        return self

    def found(self) -> dict[str, float]:
        """What `fitted` learnt, by name; it stands beside the metrics."""
        return {name: getattr(self, name) for name in self.fits}

    def restored(self, dev: Mapping[str, float]) -> Self:
        """The readout with what `fitted` learnt in training, from a run's results on dev."""
        return replace(self, **{name: float(dev[name]) for name in self.fits if name in dev})

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics of what is predicted."""
        return compute(metrics, predictions, labels)

    @abstractmethod
    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The `Prediction` of each text."""

    def judged(self, part: Any, outputs: np.ndarray, where: Any = None) -> list[dict[str, Any]]:
        """Each row of a part with its loss and its verdict, for the report; see `views.Judged`."""
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

    def verdicts(self, part: Any, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """The verdict on each row of a part."""
        found = self.predictions(part.texts, outputs, where)
        return [self.verdict(*each) for each in zip(part.labels, found, strict=True)]

    def verdict(self, right: Any, found: Any) -> dict[str, Any]:
        """What is right and what is predicted for a row, as plain values.

        It has `words`, what the report shows of it beside the texts; `views` reads the others.
        """
        raise TypeError(f"{type(self).__name__} defines neither `verdict` nor `verdicts`")

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """What the report shows of the predictions, beside what it shows for every task.

        Args:
            judged: the rows with their verdicts; there may be none.
        """
        return []

    def constant(self, train: Any, part: Any) -> Any:
        """What is best predicted without a model for a part: mostly the same for each row."""
        raise TypeError(f"{type(self).__name__} defines neither `constant` nor `untrained`")

    def untrained(self, problem: Any, data: TaskData, part: str) -> Any:
        """What the baseline without a model predicts on "dev" or "test" of a problem."""
        return self.constant(data.train, getattr(data, part))


@dataclass(frozen=True)
class NamedReadout(Readout):
    """A `Readout` of labels with names: each output of the head is that of one, in their order."""

    names: tuple[str, ...]
    least: ClassVar[int] = 2  # names

    def expected(self) -> str:
        """Says that there have to be names."""
        listed = isinstance(self.names, tuple) and all(isinstance(n, str) for n in self.names)
        able = listed and len(self.names) >= self.least
        return "" if able else f"expected a list of at least {self.least} names"

    @property
    def width(self) -> int:
        """The number of outputs of the head: one for each name."""
        return len(self.names)


class TokenReadout(Readout):
    """A `Readout` of tokens: the loss of a row is the sum over those that have a label."""

    def counts(self, batch: Batch) -> Int[np.ndarray, " rows"]:
        """The number of tokens with a label in each row."""
        return (batch["labels"] != NOTHING).sum(axis=1)

    def losses(
        self, outputs: Float[Array, "rows tokens width"], batch: Batch
    ) -> Float[Array, " rows"]:
        """The cross-entropy of each row, summed over its tokens with a label."""
        return learnt_losses(outputs, jnp.asarray(batch["labels"])).sum(axis=1)


def learnt_losses(
    outputs: Float[Array, "rows tokens width"], labels: Int[Array, "rows tokens"]
) -> Float[Array, "rows tokens"]:
    """The cross-entropy of each token, 0 where it has no label."""
    # The index of NOTHING is -1: it must not reach the gather, even where its loss is dropped.
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(labels, 0))
    return jnp.where(labels == NOTHING, 0.0, losses)
