"""Multiple choice: one of several choices continues a text.

The model reads the text with each choice; the head gives each a score, and the best is the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.special import softmax

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import together
from adapters_jax.finetune.data.files import Rows, place, refuse
from adapters_jax.finetune.data.readers import DataError, read_file
from adapters_jax.finetune.data.tables import Table, choose_columns
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks.base import Batch, Columns
from adapters_jax.finetune.tasks.labelled import EncoderTask
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, NamedReadout
from adapters_jax.finetune.tasks.views import Judged, View, confusion, sides


@dataclass(frozen=True)
class ChoicePrediction(Prediction):
    """The choice that continues a text.

    Attributes:
        choice: its number, from 0 on.
        label: the choice.
        probabilities: the probability of each choice, in their order.
    """

    choice: int
    label: str
    probabilities: list[float]

    def cells(self) -> dict[str, str]:
        """The choice and its probability."""
        return {"label": self.label, "probability": f"{self.probabilities[self.choice]:.4f}"}


@dataclass(frozen=True)
class Choices(NamedReadout):
    """A `NamedReadout` of choices: the head's one output scores a text with a choice.

    Its names are the numbers of the choices, as texts.

    Example:
        >>> Choices(("0", "1")).decode(np.array([[[0.1], [2.0]], [[3.0], [1.0]]])).tolist()
        [1, 0]
    """

    constant_title = "most frequent position"
    width = 1

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Self:
        """The numbers of the choices of a training set."""
        return cls(tuple(map(str, range(len(train.texts[0]) - 1))))

    def expected(self) -> str:
        """Says that the names are numbers from 0 on."""
        numbers = tuple(map(str, range(self.count)))
        able = self.names == numbers and self.count > 1
        return "" if able else "expected 0, 1, ... for two or more choices"

    @property
    def count(self) -> int:
        """The number of choices."""
        return len(self.names)

    def check(self, texts: Sequence[Any], pairs: bool) -> None:
        """Raises DataError unless each row has a text and all choices."""
        if not texts or any(isinstance(r, str) or len(r) <= self.count for r in texts):
            raise DataError(
                f"predict: expected at least one row, each of a text and {self.count} choices"
            )
        for number, row in enumerate(texts, 1):
            wrong = [part for part in row if not isinstance(part, str) or not part.strip()]
            if wrong:
                raise DataError(
                    f"predict: row {number} has {wrong[0]!r} among its texts; expected some words "
                    f"in the text and in each of its {self.count} choices"
                )

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes each text with each of its choices."""
        pairs = [
            (" ".join(row[: -self.count]), choice) for row in texts for choice in row[-self.count :]
        ]
        found, cut = encoder.encode(pairs, max_length)
        groups = [found[i : i + self.count] for i in range(0, len(found), self.count)]
        return Inputs([together(group, encoder.config.pad_token_id) for group in groups], cut)

    def encode(self, labels: Sequence[int]) -> Int[np.ndarray, " rows"]:
        """The numbers of the right choices."""
        return np.asarray(labels, np.int32)

    def losses(
        self, outputs: Float[Array, "rows choices 1"], batch: Batch
    ) -> Float[Array, " rows"]:
        """The cross-entropy of each row over its choices."""
        return optax.softmax_cross_entropy_with_integer_labels(outputs[..., 0], batch["labels"])

    def decode(self, outputs: np.ndarray, where: Any = None) -> Int[np.ndarray, " rows"]:
        """The numbers of the best choices."""
        return outputs[..., 0].argmax(axis=1)

    def verdicts(self, part: Table, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """The right and the predicted choice of each row."""
        found = zip(part.texts, part.labels, self.decode(outputs).tolist(), strict=True)
        return [
            {
                "gold": str(right + 1),
                "predicted": str(i + 1),
                "words": {"right": row[right - self.count], "predicted": row[i - self.count]},
            }
            for row, right, i in found
        ]

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The confusion matrix of positions, of test."""
        right, found, about = sides(judged)
        names = [str(i + 1) for i in range(self.count)]
        about += " The numbers are the positions of the choices."
        return [confusion("Confusion matrix", names, right, found, about)] if right else []

    def constant(self, train: Table, part: Table) -> Int[np.ndarray, " rows"]:
        """The number that is right most often in training."""
        return np.full(len(part), np.bincount(train.labels).argmax())

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The choice of each row."""
        shares = softmax(outputs[..., 0].astype(np.float64), axis=1).tolist()
        return [
            ChoicePrediction(" ".join(row[: -self.count]), None, i, row[i - self.count], share)
            for row, i, share in zip(texts, self.decode(outputs).tolist(), shares, strict=True)
        ]


class MultipleChoice(EncoderTask):
    """The right one of several choices."""

    name = "multiple-choice"
    pipeline = "multiple-choice"
    head = "multiple_choice"
    metrics = ("accuracy",)
    columns: ClassVar[Columns] = {
        "premise": "premise",
        "question": None,
        "choices": "choice1,choice2",
        "label": "label",
    }
    flags = (*EncoderTask.flags, "pooling")
    readout = Choices
    example = "--train rows.jsonl --columns premise=COLUMN choices=COLUMN,COLUMN,..."

    def texts(self, columns: Mapping[str, Any]) -> list[str]:
        """The columns of the premise, of the question if there is one, and of the choices."""
        asked = [columns[role] for role in ("premise", "question") if columns.get(role)]
        return [*asked, *_choices(columns)]

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Table:
        """Reads rows with several choices, one of them right.

        The label is the number of the right choice from 0 on, the name of its column, or its text,
        the same in all rows. A row has the texts, joined by spaces, and the choices.
        """
        rows, choices = read_file(path), _choices(columns)
        cells, lines = choose_columns(rows, [*self.texts(columns), columns["label"]])
        n = len(choices)
        asked = [(" ".join(row[: -n - 1]), *row[-n - 1 : -1]) for row in cells]
        # One reading for all rows: the text of a choice may be the number of another one.
        readings = [
            [
                own.index(right) if right in own else -1
                for (*_, right), row in zip(cells, asked, strict=True)
                for own in ([*row[1:]] if names is None else names,)
            ]
            for names in ([*map(str, range(n))], choices, None)
        ]
        found = min(readings, key=lambda each: each.count(-1))
        wrong = [
            f"{row[-1]!r} ({place(line)})"
            for line, row, i in zip(lines, cells, found, strict=True)
            if i < 0
        ]
        refuse(
            rows.path,
            wrong,
            "no choice: ",
            f"; expected in {columns['label']!r} a number from 0 to {n - 1}, one of "
            f"{', '.join(choices)}, or the right one's text",
        )
        return Table(asked, found, (), rows.path, lines)

    def samples(self, config: Mapping[str, Any]) -> list[tuple[str | None, ...]]:
        """One row, of a text and its choices."""
        choices = (f"Choice {i}." for i in range(1, len(config["texts"])))
        return [("A text of your own.", *choices)]

    def read_texts(self, rows: Rows, columns: Sequence[str]) -> list[tuple[str, ...]]:
        """The texts and choices of each row."""
        return [tuple(row) for row in choose_columns(rows, columns)[0]]


def _choices(columns: Mapping[str, Any]) -> list[str]:
    found = [name.strip() for name in columns["choices"].split(",")]
    if len(found) < 2 or not all(found):
        raise UserError(
            f"choices={columns['choices']}: expected two or more columns with commas between, as "
            "--columns choices=choice1,choice2"
        )
    return found
