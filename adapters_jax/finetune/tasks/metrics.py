"""Metrics of predicted classes, numbers, tags, answers and sets, and of generated text.

Every metric is defined for constant predictions; correlations are then 0.0.
"""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike

from adapters_jax.errors import UserError, needed

_SHARES = ("precision", "recall", "exact_match", "recall_at_1")
PERCENT = ("accuracy", "f1", "f1_micro", "f1_macro", *_SHARES)


def show_metric(name: str, value: float) -> str:
    """Formats a metric for people: accuracy and F1 in percent, other metrics as they are.

    Example:
        >>> show_metric("accuracy", 0.8541), show_metric("pearson", 0.8541)
        ('85.4 %', '0.854')
    """
    return f"{100 * value:.1f} %" if name in PERCENT else f"{value:.3f}"


def perplexity(nll: float, tokens: int) -> float:
    """The exponential of the mean negative log-likelihood of a token.

    Args:
        nll: the negative log-likelihood, summed over the tokens, in nats.

    Returns:
        The perplexity, at least 1; infinity if `nll` is not finite.

    Example:
        >>> round(perplexity(nll=2 * np.log(5.0), tokens=2), 3)
        5.0
    """
    return float(np.exp(min(nll / tokens, 709.0))) if np.isfinite(nll) else float("inf")


def exact_match(generated: Sequence[str], references: Sequence[Collection[str]]) -> float:
    """The fraction of texts that equal one of their references, apart from spacing.

    Args:
        generated: the generated text of each row.
        references: the right texts of each row.

    Returns:
        A number in [0, 1].

    Example:
        >>> exact_match(["a  b", "c"], [["a b", "b a"], ["d"]])
        0.5
    """

    def words(text: str) -> str:
        return " ".join(text.split())

    hits = [words(g) in map(words, r) for g, r in zip(generated, references, strict=True)]
    return float(np.mean(hits))


def rouge(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, by Google's rouge-score: the mean of each text's F1.

    Words are stemmed; a text with several references has its best score.

    Args:
        generated, references: as in `exact_match`.

    Returns:
        Numbers in [0, 1].

    Raises:
        MissingPackageError: rouge-score is not installed.

    Reference:
        Lin 2004, "ROUGE: A package for automatic evaluation of summaries".
    """
    scorer = rouge_scorer().RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = zip(references, generated, strict=True)
    scores = [scorer.score_multi(list(right), text) for right, text in pairs]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


def rouge_scorer() -> ModuleType:
    """The module of rouge-score; raises MissingPackageError if it is not installed."""
    with needed("ROUGE", "rouge-score", extra="rouge"):
        from rouge_score import rouge_scorer
    return rouge_scorer


ROUGE = ("rouge1", "rouge2", "rougeL")


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans that BIO tags mark, by the rules of CoNLL's conlleval.

    A span begins at B, and at I after O or after a tag of another kind. No maintained library has
    these rules: seqeval's last release is of 2020, and nervaluate counts partial matches.

    Args:
        tags: the tags of a text: O, B-kind and I-kind.

    Returns:
        The kind of each span, its first token, and the token after its last.

    Example:
        >>> spans_of(["B-per", "I-per", "O", "I-loc", "B-loc"])
        [('per', 0, 2), ('loc', 3, 4), ('loc', 4, 5)]
    """
    spans: list[tuple[str, int, int]] = []
    inside = None
    for i, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and kind == inside:
            spans[-1] = (kind, spans[-1][1], i + 1)
        elif mark != "O":
            spans.append((kind, i, i + 1))
        inside = None if mark == "O" else kind
    return spans


def span_scores(
    predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Precision, recall and F1 of the spans that BIO tags mark, over all texts together.

    Args:
        predictions: the predicted tags of each text.
        labels: the right tags of each text.

    Returns:
        Numbers in [0, 1]; 0.0 where nothing is right.

    Example:
        >>> scores = span_scores([["B-a", "O", "B-b"]], [["B-a", "I-a", "B-b"]])
        >>> scores["precision"], scores["recall"], scores["f1"]
        (0.5, 0.5, 0.5)
    """
    right, found, both = (counts.total() for counts in span_counts(predictions, labels))
    return {
        "precision": both / max(found, 1),
        "recall": both / max(right, 1),
        "f1": 2 * both / max(found + right, 1),
    }


def span_counts(
    predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """How many spans of each kind are in the labels, are predicted, and are both."""
    right, found, both = Counter[str](), Counter[str](), Counter[str]()
    for predicted, gold in zip(predictions, labels, strict=True):
        spans, expected = {*spans_of(predicted)}, {*spans_of(gold)}
        sets = (right, expected), (found, spans), (both, spans & expected)
        for counts, each in sets:
            counts.update(kind for kind, _, _ in each)
    return right, found, both


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_words(text: str) -> list[str]:
    """The words of an answer without case, punctuation and articles, as SQuAD compares them.

    Example:
        >>> squad_words("The  Panthers' defense.")
        ['panthers', 'defense']
    """
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def squad_scores(predictions: Sequence[str], labels: Sequence[Collection[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1 of words, each with the best of a question's answers.

    The libraries that have them, `evaluate` and torchmetrics, fetch a script or need torch.

    Args:
        predictions: the answer to each question; "" says that there is none.
        labels: the right answers of each question; none where it has no answer.

    Returns:
        Numbers in [0, 1].

    Reference:
        Rajpurkar et al. 2018, arXiv:1806.03822, and its evaluation script.

    Example:
        >>> squad_scores(["the Ann Lee", ""], [["Ann", "Bob"], []])
        {'exact_match': 0.5, 'f1': 0.833...}
    """
    exact, overlap = [], []
    for prediction, answers in zip(predictions, labels, strict=True):
        right = [each for each in answers if squad_words(each)] or [""]
        exact.append(max(squad_words(prediction) == squad_words(each) for each in right))
        overlap.append(max(_word_f1(squad_words(prediction), squad_words(each)) for each in right))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _word_f1(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    return 2 * (Counter(found) & Counter(right)).total() / (len(found) + len(right))


def set_scores(predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """F1 of sets of labels: over all decisions (micro) and as the mean over labels (macro).

    Args:
        predictions: 1 for each predicted label, `(rows, labels)`.
        labels: 1 for each right label, `(rows, labels)`.

    Returns:
        Numbers in [0, 1], and the fraction of rows whose sets are equal (accuracy).

    Example:
        >>> set_scores([[1, 0], [1, 1]], [[1, 0], [0, 1]])
        {'f1_micro': 0.8, 'f1_macro': 0.833..., 'accuracy': 0.5}
    """
    from sklearn.metrics import accuracy_score, f1_score

    # scikit-learn takes a single column for two classes, so each side has an empty one more.
    found, right = (np.pad(np.asarray(sets), ((0, 0), (0, 1))) for sets in (predictions, labels))
    f1 = partial(f1_score, right, found, labels=range(right.shape[1] - 1), zero_division=0)
    return {
        "f1_micro": float(f1(average="micro")),
        "f1_macro": float(f1(average="macro")),
        "accuracy": float(accuracy_score(right, found)),
    }


def retrieval(similarities: ArrayLike, alike: ArrayLike = False) -> dict[str, float]:
    """How well each row finds its own column, the one with its number, by similarity.

    Equal similarities share the worse place.

    Args:
        similarities: `(rows, rows)`.
        alike: whether a column is as right for a row as the row's own, and so no rival of it,
            `(rows, rows)`.

    Returns:
        The fraction of rows that find theirs first (recall_at_1), and the mean of 1 / place (mrr).

    Example:
        >>> retrieval([[0.9, 0.1], [0.8, 0.7]])
        {'recall_at_1': 0.5, 'mrr': 0.75}
    """
    found = places(similarities, alike)
    return {"recall_at_1": float(np.mean(found == 1)), "mrr": float(np.mean(1 / found))}


def places(similarities: ArrayLike, alike: ArrayLike = False) -> np.ndarray:
    """The place of each row's own column among all columns, from 1 on; see `retrieval`.

    Example:
        >>> places([[0.9, 0.1], [0.8, 0.7]]).tolist()
        [1, 2]
    """
    found = np.asarray(similarities)
    rivals = ~(np.asarray(alike) | np.eye(len(found), dtype=bool))
    return 1 + (rivals & (found >= found.diagonal()[:, None])).sum(axis=1)


LOWER_IS_BETTER = ("perplexity", "loss")


def better(name: str, new: float, old: float) -> bool:
    """Whether a new value of a metric is better than an old one.

    Example:
        >>> better("accuracy", 0.9, 0.8), better("perplexity", 9.0, 8.0)
        (True, False)
    """
    return new < old if name in LOWER_IS_BETTER else new > old


def _f1(predictions: np.ndarray, labels: np.ndarray, classes: int | None) -> float:
    from sklearn.metrics import f1_score

    if classes is None:
        classes = max(predictions.max(), labels.max(), 1) + 1
    counted = [1] if classes == 2 else None
    return f1_score(labels, predictions, labels=counted, average="macro", zero_division=0)


def _correlation(module: str, name: str) -> Callable[[np.ndarray, np.ndarray, int | None], float]:
    """A correlation of a library, 0.0 where either side is constant, for which it is undefined."""

    def correlation(predictions: np.ndarray, labels: np.ndarray, classes: int | None) -> float:
        # Values equal up to rounding count as constant: a correlation of rounding errors is noise.
        if any(np.ptp(x) <= 1e-12 * np.abs(x).max() for x in (predictions, labels)):
            return 0.0
        correlate = getattr(importlib.import_module(module), name)
        found = correlate(predictions.astype(float), labels.astype(float))
        return getattr(found, "statistic", found)

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int | None], float]] = {
    "accuracy": lambda predictions, labels, classes: np.mean(predictions == labels),
    "f1": _f1,
    "matthews": _correlation("sklearn.metrics", "matthews_corrcoef"),
    "pearson": _correlation("scipy.stats", "pearsonr"),
    "spearman": _correlation("scipy.stats", "spearmanr"),
}
_OF_CLASSES = {"f1", "f1_micro", "f1_macro", "matthews"}
_LIBRARIES = {"scipy.stats": {"pearson", "spearman"}, "sklearn.metrics": _OF_CLASSES}


def load_metrics(names: Sequence[str]) -> None:
    """Imports the libraries that metrics are computed with, which takes seconds."""
    for library, those in _LIBRARIES.items():
        if not those.isdisjoint(names):
            importlib.import_module(library)


def compute(
    names: Sequence[str], predictions: ArrayLike, labels: ArrayLike, classes: int | None = None
) -> dict[str, float]:
    """Computes several metrics of the same predictions, by scikit-learn and scipy.

    `accuracy` is the fraction of predictions that equal their label. `f1` is that of the positive
    class of two, which is 1, the last label; of more, the mean over the classes that occur in
    predictions or labels (macro), where a class that is never right has 0. `matthews`, `pearson`
    and `spearman` are correlations in [-1, 1], the first of classes; each is 0.0 where either side
    is constant.

    Args:
        names: keys of `METRICS`.
        predictions: class ids or numbers, `(rows,)`.
        labels: the same kind, `(rows,)`.
        classes: the number of classes, for `f1`; None counts two where all ids are 0 or 1.

    Returns:
        Each name with its value, in the order of `names`.

    Raises:
        UserError: a name is unknown, a shape is not `(rows,)` or differs, there are no rows, or a
            number is not finite.

    Example:
        >>> compute(["accuracy", "f1", "matthews"], [0, 1, 1, 1], [0, 1, 0, 1])
        {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.577...}
        >>> compute(["f1"], [0, 0], [0, 0]), compute(["f1"], [0, 0], [0, 0], classes=3)
        ({'f1': 0.0}, {'f1': 1.0})
        >>> compute(["pearson", "spearman"], [1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
        {'pearson': 0.981..., 'spearman': 1.0}
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(
            f"unknown metrics: {', '.join(unknown)}; the known ones are {', '.join(METRICS)}"
        )
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not predictions.size:
        raise UserError(
            f"predictions {predictions.shape} and labels {labels.shape} must both be (rows,) with "
            "at least one row; take the argmax of logits first"
        )
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise UserError("predictions and labels must be finite numbers, and some are not")
    return {name: float(METRICS[name](predictions, labels, classes)) for name in names}
