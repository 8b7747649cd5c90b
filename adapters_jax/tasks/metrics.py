"""Metrics of predicted classes and numbers, and of generated text.

Every metric is defined for constant predictions; correlations are then 0.0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from adapters_jax.errors import UserError


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The fraction of predictions that equal their label.

    Args:
        predictions: class ids, `(rows,)`.
        labels: class ids, `(rows,)`.

    Returns:
        A number in [0, 1].

    Example:
        >>> accuracy([0, 1, 1, 1], [0, 1, 0, 1])
        0.75
    """
    return float(np.mean(np.equal(predictions, labels)))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1: of the positive class for two classes, the mean over classes for more.

    With ids 0 and 1 only, the positive class is 1, the last label. Otherwise each class that
    occurs in `predictions` or `labels` weighs the same (macro). A class that is never right has 0.

    Args:
        predictions: class ids, `(rows,)`.
        labels: class ids, `(rows,)`.

    Returns:
        A number in [0, 1].

    Example:
        >>> round(f1([0, 1, 1, 1], [0, 1, 0, 1]), 3)
        0.8
        >>> round(f1([0, 1, 2, 2], [0, 1, 1, 2]), 3)
        0.778
    """
    from sklearn.metrics import f1_score

    binary = max(np.asarray(predictions).max(), np.asarray(labels).max()) <= 1
    classes = [1] if binary else None
    return float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews' correlation coefficient of two or more classes; 0.0 when either side is constant.

    Args:
        predictions: class ids, `(rows,)`.
        labels: class ids, `(rows,)`.

    Returns:
        A number in [-1, 1].

    Example:
        >>> round(matthews([0, 1, 1, 1], [0, 1, 0, 1]), 3)
        0.577
    """
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation; 0.0 when either side is constant.

    Args:
        predictions: numbers, `(rows,)`.
        labels: numbers, `(rows,)`.

    Returns:
        A number in [-1, 1].

    Example:
        >>> round(pearson([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]), 3)
        0.982
    """
    from scipy.stats import pearsonr

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(pearsonr(np.asarray(predictions, float), np.asarray(labels, float)).statistic)


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0.0 when either side is constant.

    Args:
        predictions: numbers, `(rows,)`.
        labels: numbers, `(rows,)`.

    Returns:
        A number in [-1, 1].

    Example:
        >>> round(spearman([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]), 3)
        1.0
    """
    from scipy.stats import spearmanr

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(spearmanr(predictions, labels).statistic)


def perplexity(nll: float, tokens: int) -> float:
    """The exponential of the mean negative log-likelihood of a token.

    Args:
        nll: the negative log-likelihood, summed over the tokens, in nats.
        tokens: the number of tokens.

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


LOWER_IS_BETTER = ("perplexity",)


def better(name: str, new: float, old: float) -> bool:
    """Whether a new value of a metric is better than an old one.

    Example:
        >>> better("accuracy", 0.9, 0.8), better("perplexity", 9.0, 8.0)
        (True, False)
    """
    return new < old if name in LOWER_IS_BETTER else new > old


METRICS = {function.__name__: function for function in (accuracy, f1, matthews, pearson, spearman)}


def compute(names: Sequence[str], predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Computes several metrics of the same predictions.

    Args:
        names: keys of `METRICS`.
        predictions: class ids or numbers, `(rows,)`.
        labels: the same kind, `(rows,)`.

    Returns:
        Each name with its value, in the order of `names`.

    Raises:
        UserError: a name is unknown, a shape is not `(rows,)` or differs, there are no rows, or a
            number is not finite.

    Example:
        >>> compute(["accuracy", "matthews"], [1, 1], [0, 1])
        {'accuracy': 0.5, 'matthews': 0.0}
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
    return {name: METRICS[name](predictions, labels) for name in names}


def _constant(values: ArrayLike) -> bool:
    # Values equal up to rounding count as constant: a correlation of rounding errors is noise.
    found = np.asarray(values)
    return bool(np.ptp(found) <= 1e-12 * np.abs(found).max())
