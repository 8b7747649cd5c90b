"""Metrics against figures worked out by hand, and their edges."""

import sys

import numpy as np
import pytest
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.tasks.classification import Classes
from adapters_jax.finetune.tasks.metrics import (
    METRICS,
    better,
    compute,
    load_metrics,
    perplexity,
    rouge,
)

PREDICTIONS = np.array([1, 1, 1, 0, 0, 0, 0, 0])
LABELS = np.array([1, 1, 0, 1, 0, 0, 0, 0])


def test_binary_values_by_hand():
    # Two hits, one false alarm, one miss, four right rejections.
    expected = {
        "accuracy": 6 / 8,
        "f1": 2 * 2 / (2 * 2 + 1 + 1),
        "matthews": (2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5),
    }
    assert compute(list(expected), PREDICTIONS, LABELS) == pytest.approx(expected, abs=1e-12)


def test_f1_is_of_the_last_of_two_labels_and_not_symmetric():
    flipped = compute(["f1"], 1 - PREDICTIONS, 1 - LABELS)
    assert flipped["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))


def test_f1_of_more_classes_is_the_mean_over_classes():
    # Class 0: precision 1/2, recall 1. Class 1: never predicted. Class 2: right.
    got = compute(["f1"], np.array([0, 0, 2]), np.array([0, 1, 2]))["f1"]
    assert got == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_f1_counts_the_classes_of_training_not_those_that_occur():
    # Three classes, of which only 0 and 1 occur: 2/3 each. As two classes it is that of 1 alone.
    predictions, labels = np.array([0, 1, 1]), np.array([0, 0, 1])
    by_classes = {n: compute(["f1"], predictions, labels, classes=n)["f1"] for n in (2, 3, None)}
    assert by_classes == pytest.approx({2: 2 / 3, 3: 2 / 3, None: 2 / 3})
    labels = np.array([0, 0, 0])
    by_classes = {n: compute(["f1"], predictions, labels, classes=n)["f1"] for n in (2, 3)}
    assert by_classes == pytest.approx({2: 0.0, 3: (1 / 2 + 0) / 2})
    assert Classes(("a", "b", "c")).score(["f1"], labels, labels) == {"f1": 1.0}
    assert Classes(("a", "b")).score(["f1"], labels, labels) == {"f1": 0.0}


def test_correlations():
    labels = np.array([0.0, 1.0, 2.0, 5.0], np.float32)
    predictions = np.exp(labels)
    got = compute(["pearson", "spearman"], predictions, labels)
    centred = [predictions - predictions.mean(), labels - labels.mean()]
    by_hand = centred[0] @ centred[1] / np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert got["pearson"] == pytest.approx(by_hand, rel=1e-6)
    assert got["spearman"] == pytest.approx(1.0)
    assert list(compute(["spearman", "pearson"], predictions, labels)) == ["spearman", "pearson"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_have_values(constant):
    got = compute(list(METRICS), np.full(8, constant), LABELS)
    assert got == pytest.approx(
        {
            "accuracy": 3 / 8 if constant else 5 / 8,
            "f1": 6 / 11 if constant else 0.0,
            "matthews": 0.0,
            "pearson": 0.0,
            "spearman": 0.0,
        }
    )


@pytest.mark.filterwarnings("error")
def test_constant_up_to_rounding_and_a_single_row():
    nearly = 2.5 + np.array([0.0, 1e-15, 0.0, 1e-15])
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    assert compute(["pearson", "spearman"], nearly, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert compute(list(METRICS), np.array([1]), np.array([1]))["pearson"] == 0.0


def test_perplexity_is_a_number_if_the_loss_is_one():
    assert perplexity(1400.0, 2) == pytest.approx(np.exp(700.0))
    assert np.isfinite(perplexity(1e9, 1))
    assert [perplexity(nll, 1) for nll in (float("inf"), float("nan"))] == [float("inf")] * 2


def test_rouge_counts_words_pairs_and_the_longest_common_sequence():
    pytest.importorskip("rouge_score", reason="needs rouge-score: [rouge]")
    # Of 6 and 5 words 4 are shared (the cat sat mat), of 5 and 4 pairs 2 (the cat, cat sat).
    got = rouge(["the cat sat on a mat"], [["no such words", "the cat sat near mat"]])
    assert got == pytest.approx({"rouge1": 8 / 11, "rouge2": 4 / 9, "rougeL": 8 / 11})
    assert rouge(["mat cat"], [["cat mat"]]) == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5}
    assert rouge(["a cat", "x"], [["cats a"], ["y"]])["rouge1"] == 0.5  # stems are compared


def test_rouge_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with raises(aj.errors.MissingPackageError, "rouge-score", "[rouge]"):
        rouge(["a"], [["a"]])


def test_equal_values_are_not_better():
    for name, worse, good in (("f1", 0.1, 0.2), ("perplexity", 9.0, 8.0)):
        assert better(name, good, worse)
        assert not better(name, worse, good) and not better(name, good, good)


@pytest.mark.parametrize(
    ("names", "predictions", "labels", "data"),
    [
        (["accuracy", "mcc", "rouge"], [1], [1], ("mcc, rouge", ", ".join(METRICS))),
        (["accuracy"], [[0.1, 0.9]], [1], ((1, 2), (1,), "argmax")),
        (["accuracy"], [[1]], [[1]], ((1, 1), "argmax")),
        (["accuracy"], [], [], ((0,),)),
        (["pearson"], [np.nan, 1], [0, 1], ("finite",)),
        (["pearson"], [0, 1], [np.inf, 1], ("finite",)),
    ],
)
def test_bad_input(names, predictions, labels, data):
    with raises(aj.UserError, *data):
        compute(names, predictions, labels)


@pytest.mark.parametrize(
    ("names", "libraries"),
    [
        (["accuracy", "perplexity"], []),
        (["f1_micro"], ["sklearn.metrics"]),
        (["accuracy", "matthews", "spearman"], ["scipy.stats", "sklearn.metrics"]),
    ],
)
def test_the_libraries_of_metrics_are_imported_before_the_first_scoring(
    monkeypatch, names, libraries
):
    imported = []
    monkeypatch.setattr("importlib.import_module", imported.append)
    load_metrics(names)
    assert imported == libraries
