"""Question answering: the answer is a part of a context, or there is none.

A long context is read in windows that overlap. The head scores each token as the first and as the
last of the answer; the best of all windows is the answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import row_of, tokenize
from adapters_jax.finetune.data.files import place, refuse
from adapters_jax.finetune.data.readers import DataError, read_file
from adapters_jax.finetune.data.tables import Table as Questions
from adapters_jax.finetune.data.tables import choose_columns, choose_values
from adapters_jax.finetune.models.encoder.heads import TOKENS
from adapters_jax.finetune.pretrained.encoder import Encoder
from adapters_jax.finetune.tasks.base import Batch, Columns
from adapters_jax.finetune.tasks.labelled import EncoderTask
from adapters_jax.finetune.tasks.metrics import squad_scores, squad_words
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, Readout
from adapters_jax.finetune.tasks.views import Judged, Table, View, of_part, percent

LONGEST_ANSWER = 30  # tokens
STRIDE = 128  # tokens that two windows share
SHORTEST = 16  # tokens of a window
NO_ANSWER = "(no answer)"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


class Window(NamedTuple):
    """A part of a context.

    Attributes:
        row: the row that the window is of.
        offsets: where each token starts and ends in the context.
        inside: whether each token is of the context.
    """

    row: int
    context: str
    offsets: Int[np.ndarray, "tokens 2"]
    inside: Bool[np.ndarray, " tokens"]


class Answer(NamedTuple):
    """An answer: its text, its start in the context, and its score; "" and -1 if there is none."""

    text: str
    start: int
    score: float


@dataclass(frozen=True)
class AnswerPrediction(Prediction):
    """The answer to a question.

    Attributes:
        answer: the answer; "" says that there is none.
        start: where it starts in the context, in characters; -1 if there is none.
    """

    answer: str
    start: int


@dataclass(frozen=True)
class Spans(Readout):
    """A `Readout` of answers: the head's two outputs score a token as first and as last.

    A window without the answer, and a question without one, have the first token as label.

    Args:
        unanswerable: whether training has questions without an answer, so that the first token
            may win.

    Reference:
        Devlin et al. 2018, arXiv:1810.04805, section 4.3.
    """

    unanswerable: bool
    constant_title = "sentence most like the question"
    pooling = TOKENS
    max_length = 384
    width = 2

    @classmethod
    def of(cls, train: Questions, setup: Any = None) -> Self:
        """Finds whether every question of a training set has an answer."""
        if not any(train.labels):
            raise DataError("no training question has an answer; there is nothing to learn")
        return cls(not all(train.labels))

    def expected(self) -> str:
        """Says that it is true or false."""
        return "" if isinstance(self.unanswerable, bool) else "expected true or false"

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes the windows of each context with its question; `where` has a `Window` a row.

        A question may fill half of a window; longer ones are cut.
        """
        encoder.check_length(max_length)
        if max_length < SHORTEST:
            raise UserError(
                f"--max-length {max_length}: expected at least {SHORTEST} for a question with a "
                "part of its context"
            )
        # "only_second" cuts contexts alone, and fails where the question fills the window.
        asked = tokenize(encoder.tokenizer, [(q, None) for q, _ in texts], max_length // 2)
        short = [
            (question[: found.offsets[-2][1]] if found.overflowing else question, context)
            for (question, context), found in zip(texts, asked, strict=True)
        ]
        stride = min(STRIDE, max_length // 4)
        options = {"stride": stride, "strategy": "only_second"}
        rows, windows = [], []
        for i, first in enumerate(tokenize(encoder.tokenizer, short, max_length, **options)):
            for each in (first, *first.overflowing):
                inside = np.array([part == 1 for part in each.sequence_ids])
                rows.append(row_of(each))
                windows.append(Window(i, short[i][1], np.array(each.offsets), inside))
        return Inputs(rows, sum(bool(e.overflowing) for e in asked), windows)

    def owners(self, inputs: Inputs) -> np.ndarray:
        """The question of each window."""
        return np.array([window.row for window in inputs.where])

    def targets(self, inputs: Inputs, labels: Sequence[Any]) -> tuple[Sequence[Any], np.ndarray]:
        """The windows, and the first and last token of the first answer of each."""
        found = np.zeros((len(inputs.rows), 2), np.int32)
        for ends, window in zip(found, inputs.where, strict=True):
            if labels[window.row]:
                start, text = labels[window.row][0]
                ends[:] = _tokens_of(window, start, start + len(text))
        return inputs.rows, found

    def losses(self, outputs: Float[Array, "rows length 2"], batch: Batch) -> Float[Array, " rows"]:
        """The mean cross-entropy of the first and the last token of each row."""
        masked = jnp.where(batch["attention_mask"][:, :, None] != 0, outputs, -1e9)
        ends = jnp.swapaxes(masked, 1, 2)
        losses = optax.softmax_cross_entropy_with_integer_labels(ends, batch["labels"])
        return losses.mean(axis=1)

    def decode(self, outputs: np.ndarray, where: Any = None) -> list[Answer]:
        """The best answer of each row in all its windows."""
        rows = max(window.row for window in where) + 1
        best = [Answer("", -1, -np.inf)] * rows
        none = np.full(rows, np.inf)
        for scores, window in zip(outputs, where, strict=True):
            none[window.row] = min(none[window.row], scores[0].sum())
            found = _best(scores[: len(window.inside)], window)
            if found.score > best[window.row].score:
                best[window.row] = found
        return [
            Answer("", -1, float(null)) if self.unanswerable and null > answer.score else answer
            for answer, null in zip(best, none, strict=True)
        ]

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """SQuAD's exact match and F1."""
        right = [[text for _, text in answers] for answers in labels]
        found = squad_scores([answer.text for answer in predictions], right)
        return {name: found[name] for name in metrics}

    def row_losses(self, outputs: np.ndarray, labels: Any, where: Any = None) -> list[float]:
        """The mean loss of the windows of each row."""
        rows, targets = self.targets(Inputs(where, 0, where), labels)
        mask = np.zeros(outputs.shape[:2], np.int32)
        for each, window in zip(mask, rows, strict=True):
            each[: len(window.inside)] = 1
        batch = {"labels": targets, "attention_mask": mask}
        losses: Any = self.losses(jnp.asarray(outputs), batch)
        of = [window.row for window in where]
        return (np.bincount(of, np.asarray(losses, np.float64)) / np.bincount(of)).tolist()

    def verdict(self, right: Sequence[tuple[int, str]], found: AnswerPrediction) -> dict[str, Any]:
        """The right answers and the predicted one of a row, with SQuAD's scores."""
        answers = [text for _, text in right]
        words = {"answer": [*answers, NO_ANSWER][0], "predicted": found.answer or NO_ANSWER}
        scores = squad_scores([found.answer], [answers])
        return {"answers": len(right), **scores, "words": words}

    def views(self, judged: Judged, metrics: Sequence[str]) -> list[View]:
        """The scores of questions with and without an answer, of test."""
        rows = []
        for title, answered in (("with an answer", True), ("without an answer", False)):
            some = [row for row in judged.rows.get("test", ()) if (row["answers"] > 0) == answered]
            means = [percent(float(np.mean([row[n] for row in some]))) for n in metrics if some]
            rows += [[title, f"{len(some):,}", *means]] if some else []
        header = ["questions", "rows", *metrics]
        return [Table("Questions", header, rows, of_part(judged, "test"))] if rows else []

    def constant(self, train: Questions, part: Questions) -> list[Answer]:
        """The sentence that shares most words with the question; none, if most have no answer."""
        if 2 * sum(map(bool, train.labels)) < len(train):
            return [Answer("", -1, 0.0)] * len(part)
        return [_sentence(*row) for row in part.texts]

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The answer to each question."""
        found = zip(texts, self.decode(outputs, where), strict=True)
        return [
            AnswerPrediction(asked, text, each.text, each.start) for (asked, text), each in found
        ]


def _tokens_of(window: Window, start: int, end: int) -> tuple[int, int]:
    """The first and last token of a part of the context; (0, 0) if the window lacks some of it."""
    (inside,) = np.nonzero(window.inside)
    starts, ends = window.offsets[inside].T
    if not len(inside) or start < starts[0] or end > ends[-1]:
        return 0, 0
    first = inside[np.searchsorted(ends, start, side="right")]
    last = inside[np.searchsorted(starts, end, side="left") - 1]
    return (first, last) if first <= last else (0, 0)


def _best(scores: Float[np.ndarray, "tokens 2"], window: Window) -> Answer:
    first, last = np.where(window.inside[:, None], scores, -np.inf).T
    length = np.arange(len(first))[None] - np.arange(len(first))[:, None]
    allowed = (length >= 0) & (length < LONGEST_ANSWER)
    total = np.where(allowed, first[:, None] + last[None], -np.inf)
    a, b = np.unravel_index(total.argmax(), total.shape)
    if not np.isfinite(total[a, b]):
        return Answer("", -1, -np.inf)
    start, end = window.offsets[a][0], window.offsets[b][1]
    text = window.context[start:end]
    spaces = len(text) - len(text.lstrip())  # some tokenizers count the space before a word
    return Answer(text.strip(), int(start) + spaces, float(total[a, b]))


def _sentence(question: str, context: str) -> Answer:
    asked = {*squad_words(question)}
    best = max(_SENTENCE.split(context), key=lambda each: len(asked & {*squad_words(each)}))
    return Answer(best, context.find(best), 0.0)


class QuestionAnswering(EncoderTask):
    """Answers that are parts of contexts."""

    name = "question-answering"
    pipeline = "question-answering"
    head = "question_answering"
    metrics = ("f1", "exact_match")
    columns: ClassVar[Columns] = {
        "question": "question",
        "context": "context",
        "answers": "answers",
    }
    epochs, batch_size = 4.0, 8  # it takes hundreds of steps before a head finds any answers
    inputs = ("question", "context")
    grouped = slice(1, None)  # the context, whose questions stay together
    readout = Spans
    example = "--train squad.json, or rows with the columns question, context and answers"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Questions:
        """Reads questions with their contexts and answers.

        Answers are a mapping of lists `text` and `answer_start`, as SQuAD's, a list of texts, or a
        text; they may be empty, for a question without an answer. A row has the texts `(question,
        context)`, and the list of `(start, text)` as label.
        """
        rows = read_file(path)
        texts, lines = choose_columns(rows, [columns["question"], columns["context"]])
        values, _ = choose_values(rows, [columns["answers"]])
        labels, wrong = [], []
        for line, (_, inside), (value,) in zip(lines, texts, values, strict=True):
            found = [_placed(inside, text, start) for text, start in _starts(value)]
            labels.append([(start, text) for start, text in found if start >= 0])
            wrong += [f"{text!r} ({place(line)})" for start, text in found if start < 0]
        refuse(
            rows.path,
            wrong,
            "not in their context where answer_start says: ",
            "; expected a part of the context, letter by letter; leave answer_start out to search "
            "it",
        )
        return Questions([(q, c) for q, c in texts], labels, (), rows.path, lines)


def _starts(answers: Any) -> list[tuple[str, int | None]]:
    """The answers of a row with where they start in the context, None if that is not given."""
    starts: list[Any] = []
    if isinstance(answers, Mapping) and "text" in answers:
        texts, starts = _listed(answers["text"]), _listed(answers.get("answer_start"))
    else:
        texts = _listed(answers)
    starts = starts or [None] * len(texts)
    whole = len(starts) == len(texts)
    return list(zip(map(str, texts), starts if whole else [-1] * len(texts), strict=True))


def _listed(value: Any) -> list[Any]:
    """A list as it is, and a single value as a list; None and "" have none."""
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value == "" else [value]


def _placed(context: str, text: str, start: Any) -> tuple[int, str]:
    """Where an answer starts, without the space around it; -1 if it is not there, or is empty."""
    bare = text.strip()
    if start is None:
        return (context.find(bare) if bare else -1), bare
    whole = isinstance(start, int) and start >= 0
    there = whole and bare and context[start : start + len(text)] == text
    return (start + text.index(bare) if there else -1), bare
