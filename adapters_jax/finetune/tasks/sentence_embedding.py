"""Sentence embeddings: texts as vectors, whose cosine says how alike they are.

With scores of pairs, the cosine learns the score. Without, each text learns to be nearer to its
partner than to the partners of the other rows of its batch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import together
from adapters_jax.finetune.data.datasets import TaskData, numbers_of
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import Table as Pairs
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks import views
from adapters_jax.finetune.tasks.base import Batch, Columns, Files
from adapters_jax.finetune.tasks.labelled import EncoderTask
from adapters_jax.finetune.tasks.metrics import compute, places, retrieval
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, Readout
from adapters_jax.finetune.tasks.views import Judged, View

SCALE = 20.0  # of cosines in the contrastive loss
PLACES = (1, 3, 10, 30, 100)  # that the report counts
SCORED, PAIRED = ("spearman", "pearson"), ("recall_at_1", "mrr")


@dataclass(frozen=True)
class EmbeddingPrediction(Prediction):
    """The embeddings of a text, or of a pair.

    Attributes:
        similarity: the cosine of a pair's embeddings; None for a single text.
        embedding: the embedding of a single text, of length 1; None for a pair.
    """

    similarity: float | None
    embedding: list[float] | None

    def cells(self) -> dict[str, str]:
        """The similarity, or the first numbers of the embedding."""
        if self.embedding is None:
            return {"similarity": f"{self.similarity:.4f}"}
        return {"embedding": " ".join(f"{x:.3f}" for x in self.embedding[:4]) + " ..."}

    def columns(self) -> dict[str, str]:
        """The similarity, or the embedding as a list of JSON."""
        return self.cells() if self.embedding is None else {"embedding": json.dumps(self.embedding)}


@dataclass(frozen=True)
class Embeddings(Readout):
    """A `Readout` of embeddings: the outputs are pooled states, two for a pair.

    Args:
        scored: whether pairs have scores.
        low: the score of a cosine of 0: the smallest of training, or 0 without scores.
        high: the score of a cosine of 1: the largest of training, or 1 without scores.

    Reference:
        Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084; van den Oord et al. 2018,
        arXiv:1807.03748, for the contrastive loss.

    Example:
        >>> outputs = np.array([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]]])
        >>> Embeddings(True, 0.0, 5.0).decode(outputs).round(6).tolist()
        [0.0, 1.0]
    """

    scored: bool
    low: float = 0.0
    high: float = 1.0
    constant_title = "share of common words"
    has_head = False
    width = 0

    @classmethod
    def of(cls, train: Pairs, setup: Any = None) -> Self:
        """The scale of a training set's scores, if it has scores."""
        if isinstance(train.labels[0], tuple):
            return cls(False)
        low, high = min(train.labels), max(train.labels)
        if low == high:
            raise DataError(f"every training score is {low:g}; there is nothing to learn")
        return cls(True, low, high)

    def expected(self) -> str:
        """Says that there is a scale."""
        able = isinstance(self.scored, bool) and self.low < self.high
        return "" if able else "expected scored as true or false, and low below high"

    def check(self, texts: Sequence[Any], pairs: bool) -> None:
        """Raises DataError unless all texts are single ones, or all are pairs."""
        super().check(texts, bool(texts) and texts[0][-1] is not None)

    def check_batch(self, rows: int) -> None:
        """Raises UserError unless a text has others in its batch to tell its partner from."""
        if not self.scored and rows < 2:
            raise UserError(
                f"pairs without scores on {rows} row at a time: a text learns to tell its partner "
                "from those of the other rows, and there are none; write a --batch-size of at "
                "least 2, and twice --accumulate"
            )

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes each text by itself."""
        each = 1 if texts[0][1] is None else 2
        found, cut = encoder.encode(
            [(text, None) for row in texts for text in row[:each]], max_length
        )
        groups = [found[i : i + each] for i in range(0, len(found), each)]
        return Inputs([together(group, encoder.config.pad_token_id) for group in groups], cut)

    def targets(self, inputs: Inputs, labels: Any) -> tuple[Sequence[Any], Any]:
        """The scores as cosines; without scores, a number of each text, `(rows, 2)`."""
        if not self.scored:
            return inputs.rows, _numbers(labels)
        scores = (np.asarray(labels) - self.low) / (self.high - self.low)
        return inputs.rows, scores.astype(np.float32)

    def losses(self, outputs: Float[Array, "rows 2 d"], batch: Batch) -> Float[Array, " rows"]:
        """The squared error of the cosine; or how badly a text knows its partner in the batch."""
        # clip: a text whose states are all 0 has no direction.
        unit = outputs / jnp.linalg.norm(outputs, axis=-1, keepdims=True).clip(1e-9)
        if self.scored:
            return jnp.square((unit[:, 0] * unit[:, 1]).sum(axis=-1) - batch["labels"])
        cosines = SCALE * unit[:, 0] @ unit[:, 1].T
        real = jnp.asarray(batch["weight"]) > 0  # filler rows repeat others
        rivals = real[None] & ~_alike(jnp.asarray(batch["labels"]))
        cosines = jnp.where(rivals | jnp.eye(len(cosines), dtype=bool), cosines, -1e9)
        return optax.softmax_cross_entropy_with_integer_labels(cosines, jnp.arange(len(cosines)))

    def decode(self, outputs: Float[np.ndarray, "rows 2 d"], where: Any = None) -> np.ndarray:
        """The cosine of each pair; without scores, of all first texts with all second ones."""
        first, second = np.swapaxes(_unit(outputs), 0, 1)
        return (first * second).sum(axis=-1) if self.scored else first @ second.T

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The correlations of cosines and scores; or how well second texts are found."""
        if self.scored:
            return compute(metrics, predictions, labels)
        found = retrieval(predictions, _alike(_numbers(labels)))
        return {name: found[name] for name in metrics}

    def verdicts(self, part: Pairs, outputs: np.ndarray, where: Any) -> list[dict[str, Any]]:
        """The right score and the cosine on its scale; without scores, the place of the partner."""
        found = self.decode(outputs)
        if self.scored:
            scaled = (self.low + found * (self.high - self.low)).tolist()
            return [views.number_judged(*each) for each in zip(part.labels, scaled, strict=True)]
        place = places(found, _alike(_numbers(part.labels))).tolist()
        first = [part.texts[i][1] for i in found.argmax(axis=1)]
        return [
            {"place": n, "words": {"most similar": text, "place of its own": str(n)}}
            for n, text in zip(place, first, strict=True)
        ]

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """Cosines against scores; without scores, the places of the partners; of test."""
        if self.scored:
            return views.predicted_against_right(judged)
        found = np.array(judged.column("test", "place"))
        ends = [end for end in PLACES if end <= len(found)]
        if not ends:
            return []
        within = [(n, found <= n) for n in ends]
        rows = [[f"{n}", f"{each.sum():,}", views.percent(each.mean())] for n, each in within]
        title, header = "Places of the right texts", ["among the first", "rows", "share"]
        return [views.Table(title, header, rows, views.of_part(judged, "test"), words=0)]

    def constant(self, train: Pairs, part: Pairs) -> np.ndarray:
        """The words that two texts have in common, as a share of all words that they have."""
        from sklearn.feature_extraction.text import CountVectorizer

        texts = [text for side in zip(*part.texts, strict=True) for text in side]
        counter = CountVectorizer(analyzer=lambda text: text.casefold().split(), binary=True)
        words = counter.fit_transform(texts).astype(int)  # sparse: all words would fill the memory
        first, second = words[: len(part)], words[len(part) :]
        sizes = [np.asarray(side.sum(axis=1)).ravel() for side in (first, second)]
        if self.scored:
            both = np.asarray(first.multiply(second).sum(axis=1)).ravel()
            return both / np.maximum(sum(sizes) - both, 1)
        both = (first @ second.T).toarray()
        return both / np.maximum(np.add.outer(*sizes) - both, 1)

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The similarity of each pair, or the embedding of each single text."""
        unit = _unit(outputs)
        if unit.shape[1] == 1:
            found = zip(texts, unit[:, 0].tolist(), strict=True)
            return [EmbeddingPrediction(text, None, None, vector) for (text, _), vector in found]
        cosines = (unit[:, 0] * unit[:, 1]).sum(axis=-1).tolist()
        return [
            EmbeddingPrediction(text, pair, cosine, None)
            for (text, pair), cosine in zip(texts, cosines, strict=True)
        ]


def _numbers(pairs: Sequence[tuple[str, str]]) -> Int[np.ndarray, "rows 2"]:
    """A number of each text, the same for equal texts of a side."""
    sides = [np.unique(side, return_inverse=True)[1] for side in zip(*pairs, strict=True)]
    return np.stack(sides, axis=1).astype(np.int32)


def _alike(numbers: Any) -> Any:
    """Whether a row's partner is one of another row, too: either of their texts is equal."""
    return (numbers[:, None] == numbers[None]).any(axis=-1)


def _unit(outputs: Float[np.ndarray, "rows texts d"]) -> Float[np.ndarray, "rows texts d"]:
    return outputs / np.linalg.norm(outputs, axis=-1, keepdims=True).clip(1e-9)


class SentenceEmbedding(EncoderTask):
    """Vectors of texts, from pairs of similar texts or from scores of pairs."""

    name = "sentence-embedding"
    pipeline = "sentence-similarity"
    metrics = (*SCORED, *PAIRED)
    least_steps = 0  # it has no new head
    columns: ClassVar[Columns] = {"text": "sentence1", "text_pair": "sentence2", "label": None}
    grouped = slice(1)  # the first text
    flags = ("metrics", "dropout", "pooling")
    readout = Embeddings
    example = "--train rows.tsv --text COLUMN --text-pair COLUMN, with or without --label COLUMN"

    def load(
        self, files: Mapping[str, Files], columns: Mapping[str, str], metrics: Sequence[str]
    ) -> TaskData:
        """Loads pairs of texts, with their scores if a label is named; see `Task.load`."""
        named: Any = self.of_columns(columns)
        allowed = SCORED if named["label"] else PAIRED
        wrong = [name for name in metrics if name not in allowed]
        if wrong:
            scores = "with" if named["label"] else "without"
            raise UserError(
                f"--metrics {' '.join(wrong)}: pairs {scores} scores have {', '.join(allowed)}"
            )
        return super().load(files, columns, tuple(metrics) or allowed)

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Pairs:
        """Reads pairs of texts with their scores; without scores, with the texts as labels."""
        table = read_rows(path, columns["text"], columns["text_pair"], columns["label"])
        return replace(table, labels=numbers_of(table) if columns["label"] else [*table.texts])
