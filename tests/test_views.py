"""What tasks show of their predictions: losses by their formulas, figures by counting."""

import warnings
from collections import Counter

import numpy as np
import pytest

from adapters_jax.finetune.data.preferences import Preference
from adapters_jax.finetune.data.tables import Table as Texts
from adapters_jax.finetune.report.pictures import figure_of, histogram, scatter
from adapters_jax.finetune.report.run import shown_view
from adapters_jax.finetune.tasks.classification import Classes
from adapters_jax.finetune.tasks.multilabel import LabelSets
from adapters_jax.finetune.tasks.multiple_choice import Choices
from adapters_jax.finetune.tasks.preference import PreferenceTask, words
from adapters_jax.finetune.tasks.question_answering import NO_ANSWER, Spans, Window
from adapters_jax.finetune.tasks.regression import Numbers
from adapters_jax.finetune.tasks.sentence_embedding import Embeddings
from adapters_jax.finetune.tasks.token_classification import Tags
from adapters_jax.finetune.tasks.views import (
    CLASSES,
    OTHERS,
    TABLE,
    Histogram,
    Judged,
    Matrix,
    Note,
    Scatter,
    Table,
    absent_classes,
    confusion,
    shared,
)

DASH = "\N{EN DASH}"


def drawn(*shape):
    return np.random.default_rng(0).normal(0, 2, shape).astype(np.float32)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def views_of(readout, part, outputs, where=None, metrics=("f1",)):
    """The rows and the views of a readout, by title; dev and test are the same rows."""
    rows = readout.judged(part, outputs, where)
    judged = Judged.of({}, dev=rows, test=rows)
    found = [*readout.views(judged, metrics), *shared(judged)]
    notes = [view.text for view in found if isinstance(view, Note)]
    return rows, {view.title: view for view in found if not isinstance(view, Note)}, notes


def test_classes():
    outputs, right = drawn(4, 3), np.array([0, 2, 2, 0])
    outputs[:, 1] = -9.0  # never predicted, and never right
    classes, part = (
        Classes(("a", "b", "c")),
        Texts([(f"t{i}", None) for i in range(4)], right, ()),
    )
    rows, views, notes = views_of(classes, part, outputs)
    expected = -log_softmax(outputs)[np.arange(4), right]
    np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-5)
    guess = outputs.argmax(axis=1)
    counts = [[int(((right == i) & (guess == k)).sum()) for k in range(3)] for i in range(3)]
    assert views["Confusion matrix"].counts == counts
    cells = {row[0]: row[1:] for row in views["Classes"].rows}
    assert cells["b"] == [DASH, DASH, DASH, "0", "0"]
    hits, found = counts[0][0], sum(row[0] for row in counts)
    share = 2 * hits / (found + 2)
    assert cells["a"][2:] == [f"{100 * share:.1f} %", "2", str(found)]
    assert {"dev", "test"} == {note.split()[3] for note in notes}  # "No row of dev is of ... b"
    assert all("the class b," in note for note in notes)
    worst = views["Highest losses on dev"]
    assert worst.header == ["text", "class", "predicted", "loss"]
    assert [row[0] for row in worst.rows] == [f"t{i}" for i in np.argsort(-expected)]


def test_the_positive_class_is_named_where_f1_is_of_it():
    two, none = Classes(("ham", "spam")), Judged()
    assert [note.text for note in two.views(none, ["accuracy", "f1"])] == [
        "F1 is that of the class spam, the positive one."
    ]
    assert two.views(none, ["accuracy"]) == []
    assert Classes(("a", "b", "c")).views(none, ["f1"]) == []


def test_of_kept_rows_alone_no_class_is_called_absent():
    rows = {"dev": [{"gold": "a"}] * 3, "test": [{"gold": "a"}] * 3}
    part = Judged(rows, counts={"dev": 3, "test": 4})
    (note,) = absent_classes(part, ("a", "b"))
    assert "dev" in note.text and "b" in note.text


def test_one_row_of_one_class_warns_of_nothing():
    part = Texts([("only", None)], np.array([0]), ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, views, notes = views_of(Classes(("a", "b")), part, np.array([[1.0, 0.0]]))
    assert views["Confusion matrix"].counts == [[1, 0], [0, 0]]
    assert views["Classes"].rows[1] == ["b", DASH, DASH, DASH, "0", "0"]
    assert len(notes) == 3 and views["Confusion matrix"].about == "Of the 1 rows of test."


def test_of_many_classes_the_most_frequent_are_shown_and_it_says_so():
    names = tuple(f"c{i}" for i in range(500))
    right = np.concatenate([np.arange(500), np.repeat(np.arange(480, 500), 3)])
    part = Texts([("t", None)] * len(right), right, ())
    _, views, _ = views_of(Classes(names), part, np.eye(500)[right])
    matrix, table = views["Confusion matrix"], views["Classes"]
    assert len(matrix.names) == CLASSES and matrix.names[-1] == OTHERS
    assert np.sum(matrix.counts) == np.trace(matrix.counts) == len(right)
    assert {*matrix.names[:-1]} < {f"c{i}" for i in range(480, 500)}
    assert f"The {CLASSES - 1} most frequent of 500 classes" in matrix.about
    assert len(table.rows) == TABLE and f"{TABLE} most frequent of 500" in table.about


def test_a_class_may_be_named_as_all_others_are():
    names = [OTHERS, *(f"c{i}" for i in range(CLASSES))]
    rows = [OTHERS] * 9 + names[1:]
    matrix = confusion("", names, rows, rows, "")
    assert (matrix.counts[0][0], matrix.counts[-1][-1]) == (9, 2)


def test_long_texts_and_names_are_cut_and_it_says_so():
    name = "n" * 10_000
    part = Texts([("x" * 10_000, "y" * 10_000)], np.array([1]), ())
    _, views, notes = views_of(Classes(("a", name)), part, np.array([[0.0, 1.0]]))
    worst = views["Highest losses on dev"]
    assert [len(cell) for cell in worst.rows[0][:4]] == [300, 300, 300, 300]
    assert worst.rows[0][1] == "y" * 299 + "…" and "300 characters" in worst.about
    assert len(views["Confusion matrix"].names[1]) == 40
    assert len(notes) == 3 and all(len(note) < 300 for note in notes)


def test_numbers():
    part = Texts([("a", "b"), ("c", "d")], np.array([2.0, 4.0], np.float32), ())
    numbers = Numbers(mean=3.0, std=2.0)
    rows, views, _ = views_of(numbers, part, np.array([[0.5], [0.25]]))
    assert [row["loss"] for row in rows] == pytest.approx([1.0, 0.0625])
    found = views["Predicted against right"]
    assert (found.right, found.predicted) == ([2.0, 4.0], [4.0, 3.5])
    header = ["text 1", "text 2", "right", "predicted", "loss"]
    assert views["Highest losses on dev"].header == header
    (axes,) = figure_of([scatter(found)]).axes
    assert axes.lines[1].get_xydata().tolist() == [[2.0, 4.0], [4.0, 3.5]]


def test_sets_of_labels():
    outputs, right = drawn(5, 2), [("joy",), (), ("joy", "fear"), ("fear",), ("new",)]
    sets, part = LabelSets(("joy", "fear")), Texts([("t", None)] * 5, right)
    rows, views, _ = views_of(sets, part, outputs)
    gold = np.array([["joy" in x, "fear" in x] for x in right])
    x = outputs.astype(np.float64)
    expected = np.where(gold, np.log1p(np.exp(-x)), np.log1p(np.exp(x))).mean(axis=1)
    np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-5)
    cells, guess = views["Labels"].rows, outputs > 0
    for i, name in enumerate(sets.names):
        hits = (gold & guess)[:, i].sum()
        n, found = gold[:, i].sum(), guess[:, i].sum()
        shares = [f"{100 * hits / found:.1f} %" if found else DASH, f"{100 * hits / n:.1f} %"]
        assert cells[i][:3] == [name, *shares]
        assert cells[i][4:] == [str(n), str(found)]


def test_one_label_alone():
    part = Texts([("t", None)] * 2, [("joy",), ()])
    _, views, _ = views_of(LabelSets(("joy",)), part, np.array([[1.0], [1.0]]))
    assert views["Labels"].rows == [["joy", "50.0 %", "100.0 %", "66.7 %", "1", "2"]]


def test_tags():
    tags = Tags(("B-a", "I-a", "B-b", "O"))
    right = [["B-a", "I-a", "O"], ["B-b", "B-c"]]  # training has no c
    guess = [["B-a", "I-a", "B-b"], ["O", "O"]]
    where = [np.array([1, 2, 3]), np.array([1, -1])]  # the last word is cut off
    outputs = drawn(2, 5, 4)
    for row, first, names in zip(outputs, where, guess, strict=True):
        for token, name in zip(first, names, strict=True):
            if token >= 0:
                row[token, tags.names.index(name)] = 9.0
    part = Texts([("x y z", None), ("v w", None)], right)
    rows, views, _ = views_of(tags, part, outputs, where)
    scores = -log_softmax(outputs)
    means = [scores[0, [1, 2, 3], [0, 1, 3]].mean(), scores[1, 1, 2]]
    np.testing.assert_allclose([row["loss"] for row in rows], means, rtol=1e-5)
    assert views["Entities"].rows == [
        ["a", "100.0 %", "100.0 %", "100.0 %", "1", "1"],
        ["b", "0.0 %", "0.0 %", "0.0 %", "1", "1"],
        ["c", DASH, "0.0 %", "0.0 %", "1", "0"],
    ]
    matrix = views["Confusion matrix of words"]
    assert matrix.names == ["a", "b", "c", "O"]
    assert matrix.counts == [[2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert views["Highest losses on dev"].rows[-1][1:3] != ["", ""]


def test_tags_that_are_no_spans_have_figures_of_their_own():
    part, where = Texts([("x y", None)], [["N", "V"]]), [np.array([0, 1])]
    outputs = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    _, views, _ = views_of(Tags(("N", "V")), part, outputs, where)
    assert views["Tags"].rows[0] == ["N", "50.0 %", "100.0 %", "66.7 %", "1", "2"]
    assert views["Confusion matrix of words"].counts == [[1, 0], [1, 0]]


def test_answers():
    offsets = np.array([[0, 0], [0, 3], [4, 7], [8, 11]])
    inside = np.array([False, True, True, True])
    windows = [
        *(Window(0, "Ann saw Bob", offsets, inside), Window(0, "Ann saw Bob", offsets, inside)),
        Window(1, "Ann saw Bob", offsets, inside),
    ]
    outputs = drawn(3, 6, 2)
    spans = Spans(unanswerable=True)
    part = Texts([("who", "Ann saw Bob"), ("when", "Ann saw Bob")], [[(8, "Bob")], []])
    rows, views, _ = views_of(spans, part, outputs, windows, ("f1", "exact_match"))
    each = []
    for row, token in zip(outputs, (3, 3, 0), strict=True):  # padding has no share
        ends = -log_softmax(row[:4].T)[:, token]
        each.append(ends.mean())
    expected = [np.mean(each[:2]), each[2]]
    np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-5)
    answers = spans.decode(outputs, windows)
    table = views["Questions"].rows
    assert [row[:2] for row in table] == [["with an answer", "1"], ["without an answer", "1"]]
    exact = [answers[0].text == "Bob", answers[1].text == ""]
    assert [row[3] for row in table] == [f"{100 * right:.1f} %" for right in exact]
    assert rows[1]["words"]["answer"] == NO_ANSWER


def test_choices():
    outputs, right = drawn(3, 2, 1), [1, 0, 1]
    part = Texts([("why", f"a{i}", f"b{i}") for i in range(3)], right)
    rows, views, _ = views_of(Choices(("0", "1")), part, outputs)
    expected = -log_softmax(outputs[..., 0])[np.arange(3), right]
    np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-5)
    guess = outputs[..., 0].argmax(axis=1)
    assert [row["words"]["right"] for row in rows] == ["b0", "a1", "b2"]
    assert [row["words"]["predicted"] for row in rows] == [
        f"{'ab'[g]}{i}" for i, g in enumerate(guess)
    ]
    assert views["Confusion matrix"].names == ["1", "2"]
    assert np.sum(views["Confusion matrix"].counts) == 3


def test_embeddings_with_scores():
    part = Texts([("a", "b"), ("c", "d")], [5.0, 0.0])
    outputs = np.array([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [3.0, 3.0]]])
    rows, views, _ = views_of(Embeddings(True, 0.0, 5.0), part, outputs)
    assert [row["loss"] for row in rows] == pytest.approx([1.0, 1.0])
    found = views["Predicted against right"]
    assert found.right == [5.0, 0.0] and found.predicted == pytest.approx([0.0, 5.0])


def test_embeddings_of_pairs_alone():
    texts = [(f"a{i}", f"b{i}") for i in range(4)]
    part, outputs = Texts(texts, texts), drawn(4, 2, 3)
    rows, views, _ = views_of(Embeddings(False), part, outputs)
    unit = outputs.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    cosines = unit[:, 0] @ unit[:, 1].T
    expected = -log_softmax(20 * cosines)[np.arange(4), np.arange(4)]
    np.testing.assert_allclose([row["loss"] for row in rows], expected, rtol=1e-5, atol=1e-5)
    place = [1 + int((row > row[i]).sum()) for i, row in enumerate(cosines)]
    assert [row["place"] for row in rows] == place
    assert [row["words"]["most similar"] for row in rows] == [
        f"b{i}" for i in cosines.argmax(axis=1)
    ]
    shares = [sum(n <= k for n in place) for k in (1, 3)]
    assert views["Places of the right texts"].rows == [
        [k, str(n), f"{25 * n:.1f} %"] for k, n in zip(("1", "3"), shares, strict=True)
    ]


def test_rewards_of_pairs_and_of_single_completions():
    pairs = [
        {"loss": 0.1, "chosen": 1.0, "rejected": 0.5},
        {"loss": 0.9, "chosen": 0.0, "rejected": 2.0},
    ]
    margins, _ = PreferenceTask().views(
        {}, Judged({"test": pairs}, {"dev": {3: 1}}, (), {"test": 2})
    )
    assert margins.series == {"pairs": {0.5: 1, -2.0: 1}}
    singles = [
        {"loss": 0.1, "own": 1.0, "desirable": True},
        {"loss": 0.1, "own": -1.0, "desirable": False},
    ]
    (rewards,) = PreferenceTask().views({}, Judged({"test": singles}, counts={"test": 2}))
    assert rewards.series == {"desirable": {1.0: 1}, "others": {-1.0: 1}}
    message = {"role": "assistant", "content": "Yes."}
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Well?"}]
    assert words(Preference(asked, (message,), False)) == {"prompt": "Well?", "undesirable": "Yes."}


def test_a_histogram_has_shares_of_each_series():
    view = Histogram("Lengths", "tokens", {"train": {2: 3, 4: 1}, "dev": {3: 2}, "test": {}})
    picture = histogram(view)
    (axes,) = figure_of([picture]).axes
    values, edges, _ = axes.patches[0].get_data()
    assert edges.tolist() == [1.5, 2.5, 3.5, 4.5] and values.tolist() == [75.0, 0.0, 25.0]
    assert len(axes.patches) == 4  # lines and fills of two series; the empty one has none
    assert "train: 4 from 2 to 4, median 2; dev: 2 from 3 to 3, median 3" in picture.alt


def test_equal_values_and_one_value_can_be_drawn():
    for series in ({"a": {0.5: 3}}, {"a": {7: 1}}, {"a": Counter([-1.0, 1.0])}):
        figure_of([histogram(Histogram("t", "x", series))]).draw_without_rendering()
    figure_of([scatter(Scatter("t", [1.0], [1.0]))]).draw_without_rendering()


def test_every_view_of_nothing_is_nothing():
    for readout in (Numbers(0.0, 1.0), LabelSets(("a",)), Choices(("0", "1")), Tags(("B-a", "O"))):
        assert readout.views(Judged(), ["f1"]) == []
    assert Embeddings(False).views(Judged(), []) == Spans(True).views(Judged(), ["f1"]) == []
    assert shared(Judged()) == []


def test_tables_and_matrices_have_no_picture():
    assert shown_view(Table("t", [], []))[1] is None
    assert shown_view(confusion("t", ["a", "b"], ["a"], ["a"], ""))[1] is None
    assert Matrix("t", ["a", "b"], [[1, 3], [0, 0]], "").share(0, 1) == 0.75
    assert Matrix("t", ["a", "b"], [[1, 3], [0, 0]], "").share(1, 1) == 0.0
