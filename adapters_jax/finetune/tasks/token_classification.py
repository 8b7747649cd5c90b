"""Token classification: each word of a text has a tag, such as those of named entities.

A word is read in pieces. The head reads the state of its first piece, whose tag is the word's.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.annotated import Annotated, read_tagged, words_of
from adapters_jax.finetune.data.batches import NOTHING, row_of, tokenize
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.models.encoder import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks.base import Batch
from adapters_jax.finetune.tasks.labelled import AnnotatedTask
from adapters_jax.finetune.tasks.metrics import span_scores, spans_of
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, LabelReadout
from adapters_jax.finetune.tasks.views import (
    Judged,
    View,
    class_table,
    confusion,
    of_part,
    per_class,
)

if TYPE_CHECKING:
    from tokenizers import Encoding

OUTSIDE = "O"


class TaggedRow(NamedTuple):
    """An encoded text with the tag of each token; `NOTHING` but for first pieces of words."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class TagPrediction(Prediction):
    """The tags of a text.

    Attributes:
        words: the words of the text.
        tags: the tag of each word.
    """

    words: list[str]
    tags: list[str]

    def cells(self) -> dict[str, str]:
        """The spans that the tags mark, or else the tags."""
        spans = [f"{' '.join(self.words[a:b])} ({kind})" for kind, a, b in spans_of(self.tags)]
        marked = any(tag.startswith("B-") for tag in self.tags) or OUTSIDE in self.tags
        return {"tags": ", ".join(spans) if marked else " ".join(self.tags)}


@dataclass(frozen=True)
class Tags(LabelReadout):
    """A `LabelReadout` of tags: the head's outputs are logits for each token.

    Args:
        names: the tags, in the order of their ids.

    Example:
        >>> tags = Tags(("B-a", "O"))
        >>> outputs = np.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 0.0]]])
        >>> tags.decode(outputs, [np.array([1, 2, -1])])
        [['B-a', 'O', 'O']]
    """

    names: tuple[str, ...]
    constant_title = "most frequent tag of each word"
    pooling = TOKENS

    @classmethod
    def of(cls, train: Annotated) -> Tags:
        """The tags of a training set."""
        names = sorted({tag for tags in train.labels for tag in tags})
        if len(names) < 2:
            raise DataError(f"every tag of the training rows is {names[0]}; nothing to learn")
        return cls(tuple(names))

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> Tags:
        """Reads what `to_config` wrote; raises KeyError, TypeError or UserError if it cannot."""
        names = tuple(values["names"])
        if len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise UserError(f"names={names}, expected at least two tags")
        return cls(names)

    def to_config(self) -> dict[str, Any]:
        """The values for a run's configuration."""
        return {"names": self.names}

    @property
    def width(self) -> int:
        """The number of outputs of the head for a token."""
        return len(self.names)

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes texts; `where` is the token of each word's first piece, -1 if it has none."""
        encoder.check_length(max_length)
        words = [text.split() for text, _ in texts]
        spaced: list[tuple[str, str | None]] = [(" ".join(row), None) for row in words]
        found = tokenize(encoder.tokenizer, spaced, max_length)
        where = [first_pieces(*each) for each in zip(found, words, strict=True)]
        return Inputs([row_of(e) for e in found], sum(bool(e.overflowing) for e in found), where)

    def targets(
        self, inputs: Inputs, labels: Sequence[Sequence[str]]
    ) -> tuple[list[TaggedRow], None]:
        """The rows with the ids of their tags."""
        ids = {name: i for i, name in enumerate(self.names)}
        rows = []
        for row, first, tags in zip(inputs.rows, inputs.where, labels, strict=True):
            found = np.full(len(row.input_ids), NOTHING, np.int32)
            read = first >= 0
            found[first[read]] = np.array([ids[tag] for tag in tags], np.int32)[read]
            rows.append(TaggedRow(row.input_ids, row.token_type_ids, found))
        return rows, None

    def counts(self, batch: Batch) -> Int[np.ndarray, " rows"]:
        """The number of words of each row."""
        return (batch["labels"] != NOTHING).sum(axis=1)

    def losses(
        self, outputs: Float[Array, "rows length width"], batch: Batch
    ) -> Float[Array, " rows"]:
        """The cross-entropy of each row, summed over its words."""
        labels = jnp.asarray(batch["labels"])
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.maximum(labels, 0))
        return jnp.where(labels == NOTHING, 0.0, losses).sum(axis=1)

    def decode(
        self, outputs: Float[np.ndarray, "rows length width"], where: Any = None
    ) -> list[list[str]]:
        """The tags of the words; words without a token are outside."""
        ids = outputs.argmax(axis=-1)
        return [
            [self.names[row[i]] if i >= 0 else OUTSIDE for i in first.tolist()]
            for row, first in zip(ids, where, strict=True)
        ]

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The metrics of spans, and the accuracy of words."""
        right = np.concatenate([*map(np.equal, predictions, labels)])
        found = {"accuracy": float(right.mean()), **span_scores(predictions, labels)}
        return {name: found[name] for name in metrics}

    def row_losses(self, outputs: np.ndarray, labels: Any, where: Any = None) -> list[float]:
        """The mean loss of a word of each row; words whose tags training lacks do not count."""
        ids = {name: i for i, name in enumerate(self.names)}
        known = np.full(outputs.shape[:2], NOTHING, np.int32)
        for row, first, tags in zip(known, where, labels, strict=True):
            read = first >= 0
            row[first[read]] = np.array([ids.get(tag, NOTHING) for tag in tags], np.int32)[read]
        batch = {"labels": known}
        sums = np.asarray(self.losses(jnp.asarray(outputs), batch), np.float64)
        return (sums / np.maximum(self.counts(batch), 1)).tolist()

    def verdicts(self, part: Annotated, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """The right and the predicted tags of each row; in words, as spans."""
        found = []
        for (text, *_), gold, tags in zip(
            part.texts, part.labels, self.decode(outputs, where), strict=True
        ):
            sides = [
                TagPrediction("", None, (text or "").split(), [*each]).cells()["tags"]
                for each in (gold, tags)
            ]
            words = dict(zip(("tags", "predicted"), sides, strict=True))
            found.append({"gold": [*gold], "predicted": [*tags], "words": words})
        return found

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The figures of each kind of span, and which kinds words are taken for; of test."""
        right, found = (judged.column("test", name) for name in ("gold", "predicted"))
        if not right:
            return []
        about = of_part(judged, "test")
        gold, guess = [*chain(*right)], [*chain(*found)]
        if any(tag.startswith("B-") for tag in self.names):
            kinds = sorted({_kind(tag) for tag in {*self.names, *gold}} - {OUTSIDE})
            rows = ((kind, *_span_figures(kind, right, found)) for kind in kinds)
            table = class_table("Entities", rows, f"{about} An entity counts as a whole.")
            gold, guess = [*map(_kind, gold)], [*map(_kind, guess)]
            names = [*kinds, OUTSIDE]
        else:
            names = [*self.names, *sorted({*gold} - {*self.names})]
            table = per_class("Tags", names, gold, guess, about)
        return [table, confusion("Confusion matrix of words", names, gold, guess, about)]

    def constant(self, train: Annotated, part: Annotated) -> list[list[str]]:
        """The most frequent tag of each word in training; other words are outside."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for (text, _), tags in zip(train.texts, train.labels, strict=True):
            for word, tag in zip((text or "").split(), tags, strict=True):
                counts[word][tag] += 1
        best = {word: count.most_common(1)[0][0] for word, count in counts.items()}
        return [[best.get(w, OUTSIDE) for w in (text or "").split()] for text, _ in part.texts]

    def predictions(
        self, texts: Sequence[Any], outputs: np.ndarray, inputs: Inputs
    ) -> list[Prediction]:
        """The tags of each text."""
        return [
            TagPrediction(text, None, text.split(), tags)
            for (text, _), tags in zip(texts, self.decode(outputs, inputs.where), strict=True)
        ]


def _kind(tag: str) -> str:
    """The kind of entity of a tag; `OUTSIDE` for none."""
    return tag.partition("-")[2] or tag


def _span_figures(
    kind: str, right: Sequence[Sequence[str]], found: Sequence[Sequence[str]]
) -> tuple[float, float, float, int, int]:
    """Precision, recall and F1 of the spans of a kind, their number, and that of predicted ones."""
    sides = [
        [[tag if _kind(tag) == kind else OUTSIDE for tag in tags] for tags in side]
        for side in (right, found)
    ]
    n, predicted = (sum(len(spans_of(tags)) for tags in side) for side in sides)
    scores = span_scores(sides[1], sides[0])
    shares = (scores["precision"], predicted), (scores["recall"], n), (scores["f1"], n + predicted)
    precision, recall, both = (share if of else math.nan for share, of in shares)
    return precision, recall, both, n, predicted


def first_pieces(encoding: Encoding, words: Sequence[str]) -> Int[np.ndarray, " words"]:
    """The token of each word's first piece, by the places of the tokens in the text.

    A piece belongs to the word in which it ends, as it may begin with the space before it.

    Args:
        encoding: the encoding of the words with spaces between.
        words: the words.

    Returns:
        Indices of tokens; -1 for a word that is cut off, or that the tokenizer leaves out.
    """
    ends = list(accumulate((len(word) + 1 for word in words), initial=-1))[1:]
    first = np.full(len(words), -1)
    marks = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    for token, ((_, end), special) in enumerate(marks):
        word = bisect.bisect_left(ends, end)
        inside = word < len(words) and end > ends[word] - len(words[word])
        if inside and not special and first[word] < 0:
            first[word] = token
    return first


class TokenClassification(AnnotatedTask):
    """Tags of words."""

    name = "token-classification"
    pipeline = "token-classification"
    head = "tagging"
    metrics = ("f1", "precision", "recall", "accuracy")
    defaults = ("f1", "precision", "recall", "accuracy")
    columns: ClassVar[Mapping[str, str | None]] = {"tokens": "tokens", "tags": "ner_tags"}
    readout = Tags
    example = "--train rows.conll, or --train rows.jsonl --columns tokens=COLUMN tags=COLUMN"

    def texts(self, columns: Mapping[str, Any]) -> list[str]:
        """The column of the tokens."""
        return [columns["tokens"]]

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Annotated:
        """Reads tokens with their tags, which mark spans unless accuracy is the only metric."""
        spans = tuple(metrics) != ("accuracy",)
        return read_tagged(path, columns["tokens"], columns["tags"], spans)

    def read_texts(self, path: Path, rows: Rows, columns: Sequence[str]) -> list[tuple[str, None]]:
        """The tokens of each row, or texts that are split at spaces."""
        return [(" ".join(words), None) for words in words_of(path, rows, columns[0])[0]]
