"""What a finished run of a task that predicts gives for a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_TEXTS = ("text", "text_pair")


@dataclass(frozen=True)
class Prediction:
    """A prediction for one text; tasks add fields.

    Attributes:
        text: the text.
        text_pair: the second text of a pair; None for a single text.

    Example:
        >>> Prediction("A great film.", None).to_dict()
        {'text': 'A great film.'}
    """

    text: str
    text_pair: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without those that are None."""
        return {**self.texts(), **self.results()}

    def texts(self) -> dict[str, str]:
        """The texts by name."""
        return {name: value for name, value in self._fields() if name in _TEXTS}

    def results(self) -> dict[str, Any]:
        """The other fields by name, without those that are None."""
        return {name: value for name, value in self._fields() if name not in _TEXTS}

    def _fields(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self).items() if value is not None]

    def cells(self) -> dict[str, str]:
        """The fields as cells of a table by name, without the texts."""
        return {name: str(value) for name, value in vars(self).items() if name not in _TEXTS}

    def columns(self) -> dict[str, str]:
        """The same for a file, which may be longer than a table."""
        return self.cells()


class Predictor(Protocol):
    """What `Task.open` returns if the task's command is "predict".

    Example:
        >>> from adapters_jax.finetune.inference import load_predictor
        >>> predictor = load_predictor("runs/reviews")  # doctest: +SKIP
        >>> [each.label for each in predictor.predict(["A great film."])]  # doctest: +SKIP
        ['1']
    """

    @property
    def max_length(self) -> int:
        """The largest number of tokens; longer texts are cut."""

    def count_cut(self, texts: Sequence[Any]) -> int:
        """The number of texts, as `predict` takes them, that are longer than `max_length`."""

    def predict(self, texts: Sequence[Any]) -> Sequence[Prediction]:
        """A prediction for each row: a text, or a tuple of them where the run has pairs or more."""
