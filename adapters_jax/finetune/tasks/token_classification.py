"""Token classification: each word of a text has a tag, such as those of named entities.

A word is read in pieces. The head reads the state of its first piece, whose tag is the word's.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from adapters_jax.finetune.data.batches import NOTHING, row_of, tokenize
from adapters_jax.finetune.data.files import Line, Rows, place, refuse
from adapters_jax.finetune.data.readers import DataError, read_file
from adapters_jax.finetune.data.tables import Table, choose_values, items_of
from adapters_jax.finetune.models.encoder.heads import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks import views
from adapters_jax.finetune.tasks.base import Columns
from adapters_jax.finetune.tasks.labelled import EncoderTask
from adapters_jax.finetune.tasks.metrics import span_counts, span_scores, spans_of
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, NamedReadout, TokenReadout
from adapters_jax.finetune.tasks.views import Judged, View

if TYPE_CHECKING:
    from tokenizers import Encoding

OUTSIDE = "O"
_BIO = re.compile(r"O|[BI]-.+")


class TaggedRow(NamedTuple):
    """An encoded text with the tag of each token; `NOTHING` but for first pieces of words."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class TagPrediction(Prediction):
    """The words of a text, and their tags."""

    words: list[str]
    tags: list[str]

    def cells(self) -> dict[str, str]:
        """The spans that the tags mark, or else the tags."""
        spans = [f"{' '.join(self.words[a:b])} ({kind})" for kind, a, b in spans_of(self.tags)]
        marked = any(tag.startswith("B-") for tag in self.tags) or OUTSIDE in self.tags
        return {"tags": ", ".join(spans) if marked else " ".join(self.tags)}


@dataclass(frozen=True)
class Tags(TokenReadout, NamedReadout):
    """A `NamedReadout` of tags: the head's outputs are logits for each token.

    Example:
        >>> tags = Tags(("B-a", "O"))
        >>> outputs = np.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 0.0]]])
        >>> tags.decode(outputs, [np.array([1, 2, -1])])
        [['B-a', 'O', 'O']]
    """

    constant_title = "most frequent tag of each word"
    pooling = TOKENS

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Tags:
        """The tags of a training set."""
        names = sorted({tag for tags in train.labels for tag in tags})
        if len(names) < 2:
            raise DataError(f"every tag of the training rows is {names[0]}; nothing to learn")
        return cls(tuple(names))

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes texts; `where` is the token of each word's first piece, -1 if it has none."""
        encoder.check_length(max_length)
        words = [text.split() for text, _ in texts]
        spaced: list[tuple[str, str | None]] = [(" ".join(row), None) for row in words]
        found = tokenize(encoder.tokenizer, spaced, max_length)
        where = [first_pieces(*each) for each in zip(found, words, strict=True)]
        return Inputs([row_of(e) for e in found], sum(bool(e.overflowing) for e in found), where)

    def _ids(self, first: np.ndarray, tags: Sequence[str], length: int) -> np.ndarray:
        """The ids of the tags, at the first pieces of their words; `NOTHING` for unknown tags."""
        ids, read = {name: i for i, name in enumerate(self.names)}, first >= 0
        found = np.full(length, NOTHING, np.int32)
        found[first[read]] = np.array([ids.get(tag, NOTHING) for tag in tags], np.int32)[read]
        return found

    def targets(
        self, inputs: Inputs, labels: Sequence[Sequence[str]]
    ) -> tuple[list[TaggedRow], None]:
        """The rows with the ids of their tags."""
        found = zip(inputs.rows, inputs.where, labels, strict=True)
        return [TaggedRow(a, b, self._ids(at, tags, len(a))) for (a, b), at, tags in found], None

    def decode(self, outputs: np.ndarray, where: Any = None) -> list[list[str]]:
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
        length = outputs.shape[1]
        found = zip(where, labels, strict=True)
        known = np.stack([self._ids(first, tags, length) for first, tags in found])
        batch = {"labels": known}
        sums = np.asarray(self.losses(jnp.asarray(outputs), batch), np.float64)
        return (sums / np.maximum(self.counts(batch), 1)).tolist()

    def verdict(self, right: Sequence[str], found: TagPrediction) -> dict[str, Any]:
        """The right and the predicted tags of a row; in words, as spans."""
        gold = replace(found, tags=[*right])
        words = {"tags": gold.cells()["tags"], "predicted": found.cells()["tags"]}
        return {"gold": gold.tags, "predicted": found.tags, "words": words}

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The figures of each kind of span, and which kinds words are taken for; of test."""
        right, found, about = views.sides(judged)
        if not right:
            return []
        gold, guess = [*chain(*right)], [*chain(*found)]
        if any(tag.startswith("B-") for tag in self.names):
            kinds = sorted({_kind(tag) for tag in {*self.names, *gold}} - {OUTSIDE})
            n, predicted, both = span_counts(found, right)
            each = ((kind, n[kind], predicted[kind], both[kind]) for kind in kinds)
            rows = [
                (kind, _share(b, p), _share(b, k), _share(2 * b, k + p), k, p)
                for kind, k, p, b in each
            ]
            table = views.class_table("Entities", rows, f"{about} An entity counts as a whole.")
            gold, guess = [*map(_kind, gold)], [*map(_kind, guess)]
            names = [*kinds, OUTSIDE]
        else:
            names = [*self.names, *sorted({*gold} - {*self.names})]
            table = views.per_class("Tags", names, gold, guess, about)
        return [table, views.confusion("Confusion matrix of words", names, gold, guess, about)]

    def constant(self, train: Table, part: Table) -> list[list[str]]:
        """The most frequent tag of each word in training; other words are outside."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for (text, _), tags in zip(train.texts, train.labels, strict=True):
            for word, tag in zip(text.split(), tags, strict=True):
                counts[word][tag] += 1
        best = {word: count.most_common(1)[0][0] for word, count in counts.items()}
        return [[best.get(w, OUTSIDE) for w in text.split()] for text, _ in part.texts]

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The tags of each text."""
        found = zip(texts, self.decode(outputs, where), strict=True)
        return [TagPrediction(text, None, text.split(), tags) for (text, _), tags in found]


def _kind(tag: str) -> str:
    """The kind of entity of a tag; `OUTSIDE` for none."""
    return tag.partition("-")[2] or tag


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def first_pieces(encoding: Encoding, words: Sequence[str]) -> Int[np.ndarray, " words"]:
    """The token of each word's first piece, by the places of the tokens in the text.

    A piece belongs to the word where it ends, as it may begin with the space before the word.

    Args:
        encoding: the encoding of the words with spaces between.

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


class TokenClassification(EncoderTask):
    """Tags of words."""

    name = "token-classification"
    pipeline = "token-classification"
    head = "tagging"
    metrics = ("f1", "precision", "recall", "accuracy")
    columns: ClassVar[Columns] = {"tokens": "tokens", "tags": "ner_tags"}
    inputs = ("tokens",)
    readout = Tags
    example = "--train rows.conll, or --train rows.jsonl --columns tokens=COLUMN tags=COLUMN"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Table:
        """Reads tokens with their tags, each a list or a text that is split at spaces.

        The tags mark spans, and so are in BIO, unless accuracy is the only metric. A row has the
        text `(tokens with spaces between, None)`, and the list of tags as label.
        """
        rows, tokens, tags = read_file(path), columns["tokens"], columns["tags"]
        words, lines = _words(rows, tokens)
        labels = [items_of(value) for (value,) in choose_values(rows, [tags])[0]]
        uneven = [
            f"{place(line)} has {len(row)} tokens and {len(found)} tags"
            for line, row, found in zip(lines, words, labels, strict=True)
            if len(row) != len(found)
        ]
        expected = f"; expected a tag in {tags!r} for each token in {tokens!r}"
        refuse(rows.path, uneven, "", expected)
        wrong = {
            tag: line
            for line, row in reversed([*zip(lines, labels, strict=True)])
            for tag in row
            if tuple(metrics) != ("accuracy",) and not _BIO.fullmatch(tag)
        }
        refuse(
            rows.path,
            [f"{tag!r} ({place(line)})" for tag, line in sorted(wrong.items())],
            "not in BIO: ",
            "; expected O, B-kind for the first token of a span and I-kind for its others; for "
            "tags that mark no spans write --metrics accuracy",
        )
        return Table([(" ".join(row), None) for row in words], labels, (), rows.path, lines)

    def read_texts(self, rows: Rows, columns: Sequence[str]) -> list[tuple[str, None]]:
        """The tokens of each row, or texts that are split at spaces."""
        return [(" ".join(words), None) for words in _words(rows, columns[0])[0]]


def _words(rows: Rows, tokens: str) -> tuple[list[list[str]], Sequence[Line]]:
    """The tokens of each row; raises DataError if there are none, or a blank or spaced one."""
    values, lines = choose_values(rows, [tokens])
    words = [items_of(value) for (value,) in values]
    wrong = [
        place(line)
        for line, row in zip(lines, words, strict=True)
        if not row or any(word.split() != [word] for word in row)
    ]
    expected = "or a blank one or one with a space; expected the tokens of a text"
    refuse(rows.path, wrong, "", f": no {tokens}, {expected}")
    return words, lines
