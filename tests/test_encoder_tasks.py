"""Tasks on encoders: each trains, predicts, and goes to files and back, from the command line."""

import json
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.annotated import asked, chosen, labelled, paired, tagged
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.reports import Page
from helpers.tiny import write_model
from tokenizers import Tokenizer, models, pre_tokenizers

import adapters_jax as aj
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.batches import NOTHING, tokenize
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import Table
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.pretrained.encoder import load_encoder
from adapters_jax.finetune.report.findings import read_findings
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.tasks import TASKS
from adapters_jax.finetune.tasks.metrics import retrieval, set_scores, squad_scores
from adapters_jax.finetune.tasks.multilabel import LabelSets
from adapters_jax.finetune.tasks.multiple_choice import Choices
from adapters_jax.finetune.tasks.question_answering import Answer, Spans
from adapters_jax.finetune.tasks.readout import Inputs
from adapters_jax.finetune.tasks.sentence_embedding import Embeddings
from adapters_jax.finetune.tasks.token_classification import Tags, TokenClassification, first_pieces
from adapters_jax.trees import flatten

NER, QA, CHOICE = "token-classification", "question-answering", "multiple-choice"
ASKED = {"question": "q", "context": "c", "answers": "answers"}
# Of each task: its rows, flags, a text to predict, its prediction, and AdapterHub's kind of head.
CASES = {
    "token-classification": (
        tagged,
        "",
        ["a good plot was dull"],
        {"tags": ["O", "B-plus", "O", "O", "B-minus"]},
        "tagging",
    ),
    "question-answering": (
        asked,
        "--max-length 16",
        ["the plot", "a film and the actors was music very music a film and lovely a plot"],
        {"answer": "lovely", "start": 54},
        "question_answering",
    ),
    "multilabel": (
        labelled,
        "--pooling cls",
        ["the fine plot was bad"],
        {"labels": ["minus", "plus"]},
        "multilabel_classification",
    ),
    "multiple-choice": (
        chosen,
        "--pooling pooler --columns choices=choice0,choice1,choice2",
        ["the film was", "very dull", "very lovely", "very poor"],
        {"label": "very lovely", "choice": 1},
        "multiple_choice",
    ),
}
SHOWN = {  # on a run's page
    "token-classification": ("Entities", "Confusion matrix of words"),
    "question-answering": ("Questions",),
    "multilabel": ("Labels",),
    "multiple-choice": ("Confusion matrix",),
}
TRAIN = "--method houlsby --bottleneck-dim 16 --layer-norms= --epochs 10 --batch-size 16"
TRAIN += " --learning-rate 0.05 --checkpoint-every 1000 --evaluations 1"


@pytest.mark.witness("multilabel", "question-answering")
@pytest.mark.weekly
@pytest.mark.parametrize("name", CASES)
def test_a_task_trains_predicts_and_comes_back_from_its_files(name, tmp_path, monkeypatch, capsys):
    write, flags, texts, expected, kind = CASES[name]
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"), pooler=True)
    write(Path("rows.jsonl"))
    given = "" if name in ("token-classification", "question-answering", "multilabel") else name
    named = f"--task {given}" if given else ""  # the columns tell the others
    words = f"finetune --model tiny --train rows.jsonl --name run {named} {TRAIN} {flags}"
    assert main(words.split()) == 0
    run = Run(Path("runs/run"))
    config = run.read_config()
    assert config["task_type"] == name
    constant, frozen, ours = config["summary"]["results"]
    scores = [row["test"][config["metrics"][0]] for row in (constant, frozen, ours)]
    assert scores[2] >= max(0.8, scores[1])  # the head alone may learn these rows, too
    # The tags are the words' own here, so the baseline of words knows all.
    assert scores[0] == 1.0 if name == NER else scores[2] > scores[0]

    sections = Page(run.report.read_text()).sections
    assert {*SHOWN[name], "Highest losses on dev", "Lengths"} <= sections.keys()
    judged = read_findings(run).judged
    assert judged.counts == {part: config["rows"][part] for part in ("dev", "test")}
    assert {part: len(rows) for part, rows in judged.rows.items()} == judged.counts
    assert sum(judged.lengths["train"].values()) >= config["rows"]["train"]
    if name == "multiple-choice":
        hits = np.equal(judged.column("test", "gold"), judged.column("test", "predicted"))
        assert hits.mean() == scores[2]
    if name == "question-answering":
        assert np.mean(judged.column("test", "f1")) == pytest.approx(scores[2], rel=1e-12)

    usage = TASKS[name].usage("runs/run", config)
    assert main(shlex.split(usage.shell)[1:]) == 0
    exec(usage.python, {})
    capsys.readouterr()
    assert main(["predict", "runs/run", *texts, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {key: row[key] for key in expected} == expected
    assert main(["predict", "runs/run", "--file", "rows.jsonl", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(Path("rows.jsonl").read_text().splitlines())
    assert main(["predict", "runs/run", *texts]) == 0

    assert main(["push", "runs/run", "me/native", "--dry-run"]) == 0
    again = load_predictor("native", model="tiny")
    (found,) = again.predict([_row(texts)])
    assert {key: getattr(found, key) for key in expected} == expected
    assert main(["push", "runs/run", "me/hub", "--dry-run", "--to", "adapterhub"]) == 0
    head = json.loads(Path("hub/head_config.json").read_text())["config"]
    assert head["head_type"] == kind
    assert main(["convert", "hub", "back", "--to", "native", "--model", "tiny"]) == 0
    _, before = aj.read_adapter(run.adapter)
    _, after = aj.read_adapter("back")
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        np.testing.assert_array_equal(after[path], tensor, err_msg=path)


def _row(texts):
    return tuple(texts) if len(texts) > 1 else (texts[0], None)


PAIRS = "finetune --task sentence-embedding --model tiny --train rows.jsonl --name run"


@pytest.mark.slow
def test_embeddings_learn_the_scores_of_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"))
    paired(Path("rows.jsonl"))
    assert main(f"{PAIRS} --label score {TRAIN}".split()) == 0
    run = Run(Path("runs/run"))
    words, frozen, ours = run.read_config()["summary"]["results"]
    assert (words["method"], frozen["method"]) == ("share of common words", "frozen base")
    assert ours["test"]["spearman"] > max(0.8, frozen["test"]["spearman"])
    _, tensors = aj.read_adapter(run.adapter)
    assert not any(path.startswith("head/") for path in tensors)
    capsys.readouterr()
    texts = ["film good", "plot fine", "film good", "plot dull"]
    assert main(["predict", "runs/run", *texts, "--json"]) == 0
    near, far = map(json.loads, capsys.readouterr().out.splitlines())
    assert near["similarity"] > 0.7 > 0.4 > far["similarity"]
    predictor = load_predictor(run.path)
    first, second = predictor.predict(texts[:2])
    (alone,) = predictor.predict([(texts[0], None)])
    np.testing.assert_allclose(alone.embedding, first.embedding, atol=1e-6)
    assert first.cells()["embedding"].endswith(" ...")
    assert json.loads(first.columns()["embedding"]) == first.embedding
    cosine = np.dot(first.embedding, second.embedding)
    assert cosine == pytest.approx(near["similarity"], abs=1e-5)
    assert np.linalg.norm(first.embedding) == pytest.approx(1, abs=1e-6)
    for to in ("native", "adapterhub"):
        assert main(f"push runs/run me/{to} --dry-run --to {to}".split()) == 0
    assert not Path("adapterhub", "head_config.json").exists()
    again = load_predictor("native", model="tiny").predict([tuple(texts[2:])])
    assert again[0].similarity == pytest.approx(far["similarity"], abs=1e-6)
    assert main(["convert", "adapterhub", "back", "--to", "native", "--model", "tiny"]) == 0
    _, after = aj.read_adapter("back")
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(after[path.removeprefix("bert/")], tensor, err_msg=path)
    with command_raises(aj.UserError, "--task sentence-embedding", "--method"):
        assert main(f"{PAIRS}2 --label score --method head-only".split()) == 2
    with command_raises(aj.UserError, "--metrics mrr", "spearman"):
        assert main(f"{PAIRS}2 --label score --metrics mrr".split()) == 2


def test_embeddings_train_no_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"))
    paired(Path("rows.jsonl"))
    for number, method in enumerate(("full", "bitfit", "lora --targets **/{query,head}")):
        words = f"{PAIRS}{number} --label score --method {method}".split()[1:]
        job = parse(Finetune, words).prepare(Console(json=True))
        trained = flatten(aj.partition(job.problem.params, job.problem.recipe)[0])
        assert trained and not [path for path in trained if path.startswith("head/")]


def test_a_column_of_scores_may_have_the_name_label(tmp_path):
    from adapters_jax.finetune.options.data import DataOptions
    from adapters_jax.finetune.options.parsing import parse
    from adapters_jax.finetune.runs.config import differences, read_options

    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 5} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TASKS["sentence-embedding"]
    words = ["--train", str(tmp_path / "rows.jsonl"), "--task", task.name]
    for more, metric in (([], "mrr"), (["--label", "label"], "pearson")):
        assert metric in parse(DataOptions, [*words, *more]).load(task).metrics
    assert parse(DataOptions, [*words, *more]).load(task).train.labels[0] == 0.0
    run, scored = Run(tmp_path), {"label": "label", "task": task.name}
    for stored, now in (({"label": "label"}, None), (scored, "label")):  # as older runs have it
        assert read_options(run, {"options": {"data": stored}}).data.label == now
    of = {"task_type": "classification"}
    assert differences({**of, "data": {"label": "label"}}, {**of, "data": {"label": None}}) == []


def test_the_losses_of_embeddings_are_their_formulas():
    outputs = np.random.default_rng(5).normal(size=(4, 2, 3))
    unit = outputs / np.linalg.norm(outputs, axis=-1, keepdims=True)
    labels = np.array([0.0, 5.0, 2.5, 1.0])
    scored = Embeddings.of(Table([("a", "b")] * 4, labels.tolist()))
    assert scored == Embeddings(True, 0.0, 5.0)
    _, targets = scored.targets(Inputs([None] * 4, 0), labels)
    got = scored.losses(jnp.asarray(outputs), {"labels": targets})
    expected = ((unit[:, 0] * unit[:, 1]).sum(1) - labels / 5) ** 2
    np.testing.assert_allclose(got, expected, rtol=1e-5)

    outputs[3], weight = outputs[0], np.array([1.0, 1.0, 1.0, 0.0])  # a row that fills the batch
    batch = {"weight": weight, "labels": np.array([[0, 0], [1, 1], [2, 2], [0, 0]])}
    got = Embeddings(False).losses(jnp.asarray(outputs), batch)
    cosines = 20 * unit[:3, 0] @ unit[:3, 1].T
    shares = cosines - np.log(np.exp(cosines).sum(1, keepdims=True))
    np.testing.assert_allclose(got[:3], -shares.diagonal(), rtol=1e-4)


def test_a_partner_of_several_texts_is_no_rival_of_itself():
    """Of questions with two answers among them, each finds the one that it has."""
    pairs = [(f"q{i}", f"a{i % 2}") for i in range(6)]
    outputs = np.stack([np.eye(2)[np.arange(6) % 2]] * 2, axis=1)
    embeddings = Embeddings.of(Table(pairs, pairs))
    _, labels = embeddings.targets(Inputs([None] * 6, 0), pairs)
    batch = {"weight": np.ones(6), "labels": labels}
    losses = embeddings.losses(jnp.asarray(outputs), batch)
    np.testing.assert_allclose(losses, np.log1p(3 * np.exp(-20)), atol=1e-6)
    scores = embeddings.score(["recall_at_1", "mrr"], embeddings.decode(outputs), pairs)
    assert scores == {"recall_at_1": 1.0, "mrr": 1.0}
    wrong = embeddings.score(["mrr"], embeddings.decode(outputs[:, ::-1] * [[[1], [-1]]]), pairs)
    assert wrong == {"mrr": 0.25}


def test_second_texts_are_found_by_their_similarity():
    draw = np.random.default_rng(6).normal(size=(20, 20))
    places = [1 + sum(row > row[i]) for i, row in enumerate(draw)]
    expected = {"recall_at_1": np.mean(np.equal(places, 1)), "mrr": np.mean(1 / np.array(places))}
    outputs = np.stack([np.eye(20), draw.T], axis=1)
    unit = draw / np.linalg.norm(draw, axis=0)
    cosines = Embeddings(False).decode(outputs)
    np.testing.assert_allclose(cosines, unit, atol=1e-9)
    pairs = [(f"{i}", f"{i}") for i in range(20)]
    assert Embeddings(False).score(["recall_at_1", "mrr"], draw, pairs) == pytest.approx(expected)
    assert retrieval(np.ones((4, 4))) == {"recall_at_1": 0.0, "mrr": 0.25}
    part = Table([("a b", "b"), ("c", "c d e")], [None, None])
    shared = Embeddings(False).constant(part, part)
    np.testing.assert_allclose(shared, [[1 / 2, 0], [0, 1 / 3]])


@pytest.fixture
def encoder(tmp_path):
    return load_encoder(str(write_model(tmp_path / "tiny")), "tokens")


def conlleval(lines):
    """The counts of the evaluation of CoNLL-2000, token by token, as its script keeps them."""
    right = found = both = 0
    inside, last_gold, last_guess = False, ("O", ""), ("O", "")

    def ends(last, now):
        return last[0] in "BI" and (now[0] in "BO" or last[1] != now[1])

    def starts(last, now):
        return now[0] == "B" or (now[0] == "I" and (last[0] == "O" or last[1] != now[1]))

    for gold, guess in [*lines, ("O", "O")]:
        gold, guess = (tuple(f"{tag}-".split("-")[:2]) for tag in (gold, guess))
        if inside:
            over = ends(last_gold, gold), ends(last_guess, guess)
            if all(over) and last_gold[1] == last_guess[1]:
                inside, both = False, both + 1
            elif over[0] != over[1] or gold[1] != guess[1]:
                inside = False
        begun = starts(last_gold, gold), starts(last_guess, guess)
        inside = inside or (all(begun) and gold[1] == guess[1])
        right, found = right + begun[0], found + begun[1]
        last_gold, last_guess = gold, guess
    return both, found, right


def test_f1_of_spans_is_that_of_conlleval():
    draw = np.random.default_rng(0)
    names = ["O", "O", "B-a", "I-a", "B-b", "I-b"]
    gold = [draw.choice(names, n).tolist() for n in draw.integers(1, 12, 400)]
    guess = [[draw.choice([tag, draw.choice(names)]) for tag in tags] for tags in gold]
    counts = [conlleval([*zip(a, b, strict=True)]) for a, b in zip(gold, guess, strict=True)]
    both, found, right = np.sum(counts, axis=0)
    tags = Tags(tuple(sorted(set(names))))
    scores = tags.score(["f1", "precision", "recall", "accuracy"], guess, gold)
    assert scores["precision"] == pytest.approx(both / found)
    assert scores["recall"] == pytest.approx(both / right)
    assert scores["f1"] == pytest.approx(2 * both / (found + right))
    same = [a == b for x, y in zip(gold, guess, strict=True) for a, b in zip(x, y, strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean(same))
    assert 0.2 < scores["f1"] < 0.8
    assert tags.score(["f1"], [["O"]], [["O"]]) == {"f1": 0.0}


def test_a_word_has_the_tag_of_its_first_piece():
    pieces = ["[UNK]", "un", "##happy", "##ly", "film", ",", "a"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = ["unhappyly", "a", "film,film", "a"]
    (found,) = tokenize(tokenizer, [(" ".join(words), None)], 8)
    assert found.tokens == ["un", "##happy", "##ly", "a", "film", ",", "film", "a"]
    assert first_pieces(found, words).tolist() == [0, 3, 4, 7]
    (cut,) = tokenize(tokenizer, [(" ".join(["film"] * 9), None)], 8)
    assert first_pieces(cut, ["film"] * 9).tolist() == [*range(8), -1]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # a piece has the space before its word
    spaced = {"\u2581a": 0, "\u2581film": 1, "[UNK]": 2}
    tokenizer.model = models.WordLevel(spaced, "[UNK]")
    (found,) = tokenize(tokenizer, [("a film a", None)], 8)
    assert first_pieces(found, ["a", "film", "a"]).tolist() == [0, 1, 2]


@pytest.mark.slow
def test_the_loss_of_tags_is_the_mean_over_words(encoder):
    tags, draw = Tags(("B-a", "I-a", "O")), np.random.default_rng(1)
    inputs = tags.inputs(encoder, [("good film", None), ("a very bad plot", None)], 8)
    labels = [["B-a", "O"], ["O", "O", "B-a", "I-a"]]
    rows, _ = tags.targets(inputs, labels)
    assert [row.labels.tolist() for row in rows] == [[-1, 0, 2, -1], [-1, 2, 2, 0, 1, -1]]
    padded = np.full((2, 6), NOTHING)
    padded[0, :4], padded[1] = rows[0].labels, rows[1].labels
    logits = draw.normal(size=(2, 6, 3))
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([shares[i, j, padded[i, j]] for i, j in np.argwhere(padded >= 0)])
    batch = {"labels": padded, "weight": np.ones(2)}
    counts = tags.counts(batch)
    assert counts.tolist() == [2, 4]
    losses = tags.losses(jnp.asarray(logits), batch)
    assert float(losses.sum() / counts.sum()) == pytest.approx(expected, rel=1e-5)


def official(prediction, answers):
    """SQuAD 2.0's exact match and F1 of one question, as its script computes them."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(gold, guess):
        gold, guess = words(gold), words(guess)
        common = sum(min(gold.count(word), guess.count(word)) for word in {*gold})
        if not gold or not guess:
            return int(gold == guess)
        if not common:
            return 0
        precision, recall = common / len(guess), common / len(gold)
        return 2 * precision * recall / (precision + recall)

    gold = [answer for answer in answers if words(answer)] or [""]
    exact = max(int(" ".join(words(g)) == " ".join(words(prediction))) for g in gold)
    return exact, max(f1(answer, prediction) for answer in gold)


def test_scores_of_answers_are_those_of_squad():
    pairs = [
        ("the Broncos", ["Denver Broncos", "The Broncos!"]),
        ("Denver Denver Broncos", ["Denver Broncos"]),
        ("", []),
        ("Denver", []),
        ("", ["Denver"]),
        ("a", ["an"]),
        ("a thermal-electric plant", ["thermal electric plants", "the plant"]),
        ("42", ["41"]),
    ]
    expected = np.mean([official(*pair) for pair in pairs], axis=0)
    got = squad_scores(*zip(*pairs, strict=True))
    assert list(got.values()) == pytest.approx(expected.tolist())
    assert 0.3 < got["exact_match"] < got["f1"] < 0.9


def test_answers_are_found_in_windows_of_a_long_context(encoder):
    spans = Spans(unanswerable=False)
    words = "the film was a very plot and with music the film and a plot with actors the film good"
    inputs = spans.inputs(encoder, [("the plot", words), ("a", "good film")], 16)
    where = inputs.where
    assert [window.row for window in where] == [0, 0, 0, 1]
    start = words.index("good")
    labels = [[(start, "good")], [(0, "good film")]]
    _, found = spans.targets(inputs, labels)
    both = zip(inputs.rows, found, strict=True)
    ids = [row.input_ids[a : b + 1].tolist() for row, (a, b) in both]
    word = {w: encoder.tokenizer.token_to_id(w) for w in ("good", "film", "[CLS]")}
    assert ids == [[word["[CLS]"]]] * 2 + [[word["good"]], [word["good"], word["film"]]]
    outputs = np.zeros((4, 16, 2))
    for scores, (a, b) in zip(outputs, found, strict=True):
        scores[a, 0] = scores[b, 1] = 5.0
    answers = spans.decode(outputs, where)
    assert [answer[:2] for answer in answers] == [("good", start), ("good film", 0)]


def test_no_answer_wins_if_its_score_is_best(encoder):
    spans = Spans(unanswerable=True)
    inputs = spans.inputs(encoder, [("a", "good film")], 16)
    inside = np.flatnonzero(inputs.where[0].inside)
    outputs = np.zeros((1, 16, 2))
    outputs[0, inside[0]] = 2.0
    outputs[0, 0] = 2.1
    assert spans.decode(outputs, inputs.where)[0][:2] == ("", -1)
    outputs[0, 0] = 1.9
    assert spans.decode(outputs, inputs.where)[0][:2] == ("good", 0)
    outputs[0, 0] = 2.1
    assert Spans(unanswerable=False).decode(outputs, inputs.where)[0][:2] == ("good", 0)


def test_an_answer_ends_where_it_starts_or_later_and_soon(encoder):
    spans = Spans(unanswerable=False)
    inputs = spans.inputs(encoder, [("a", "good film was bad")], 16)
    inside = np.flatnonzero(inputs.where[0].inside)
    outputs = np.zeros((1, 16, 2))
    outputs[0, inside[2], 0] = outputs[0, inside[1], 1] = 5.0
    outputs[0, inside[3], 1] = 1.0
    assert spans.decode(outputs, inputs.where)[0].text == "was bad"


def test_the_loss_of_answers_is_the_mean_of_first_and_last():
    logits = np.random.default_rng(2).normal(size=(2, 6, 2))
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    labels = np.array([[1, 3], [0, 0]])
    expected = []
    for row, keep, ends in zip(logits, mask, labels, strict=True):
        real = row[keep > 0]
        shares = real - np.log(np.exp(real).sum(0))
        expected.append(-(shares[ends[0], 0] + shares[ends[1], 1]) / 2)
    batch = {"attention_mask": mask, "labels": labels}
    got = Spans(True).losses(jnp.asarray(logits), batch)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_question_fills_at_most_half_of_a_window(encoder):
    inputs = Spans(False).inputs(encoder, [("the " * 20, "good film " * 8)], 16)
    assert inputs.cut == 1
    assert all(len(row.input_ids) <= 16 for row in inputs.rows)
    assert sum(window.inside.sum() for window in inputs.where) >= 16


def test_a_window_has_room_for_a_question_and_a_context(encoder):
    with raises(aj.UserError, "--max-length 15", 16):
        Spans(False).inputs(encoder, [("a", "good film")], 15)


def test_the_sentence_most_like_the_question_is_the_baseline():
    train = Table([("q", "c")] * 3, [[(0, "c")], [(0, "c")], []])
    part = Table([("Who won the race?", "It rained. Ann won. Bob did not.")], [[]])
    assert Spans.of(train).constant(train, part) == [Answer("Ann won.", 11, 0.0)]
    mostly = Table(train.texts, [[(0, "c")], [], []])
    assert Spans.of(mostly).constant(mostly, part)[0].text == ""


def test_sets_of_labels_agree_with_their_formulas():
    draw = np.random.default_rng(3)
    labels, guess = (draw.random((50, 4)) < 0.4 for _ in range(2))
    labels, guess = labels.astype(int), guess.astype(int)
    both, sums = (labels & guess).sum(0), labels.sum(0) + guess.sum(0)
    got = set_scores(guess, labels)
    assert got["f1_micro"] == pytest.approx(2 * both.sum() / sums.sum())
    assert got["f1_macro"] == pytest.approx((2 * both / sums).mean())
    assert got["accuracy"] == pytest.approx((labels == guess).all(1).mean())
    logits = draw.normal(size=(50, 4))
    shares = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(shares) + (1 - labels) * np.log(1 - shares)).mean(1)
    sets = LabelSets(("a", "b", "c", "d"))
    got = sets.losses(jnp.asarray(logits), {"labels": labels.astype(np.float32)})
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_threshold_is_the_best_on_dev_and_is_restored():
    sets = LabelSets(("a", "b"))
    logits = np.log(np.array([[0.3, 0.1], [0.32, 0.2], [0.1, 0.4]]) / 0.7)
    labels = [("a",), ("a",), ("b",)]
    best = sets.fitted("f1_micro", logits, labels)
    tried = {
        at: LabelSets(sets.names, at).score(
            ["f1_micro"], LabelSets(sets.names, at).decode(logits), labels
        )["f1_micro"]
        for at in np.arange(1, 20) / 20
    }
    assert tried[best.threshold] == max(tried.values()) == 1.0 > tried[0.5]
    assert sets.restored(best.found()) == best
    assert sets.restored({}) == sets


def test_labels_that_train_lacks_count_as_missed():
    sets = LabelSets(("a",))
    got = sets.score(["f1_micro", "f1_macro"], [("a",), ()], [("a",), ("new",)])
    assert got == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 1 / 2})
    train = Table([("x", None)] * 3, [("a",), ("a", "b"), ()])
    assert LabelSets.of(train).constant(train, train) == [("a",)] * 3


def test_the_loss_of_choices_is_over_the_choices():
    logits = np.random.default_rng(4).normal(size=(3, 4, 1))
    labels = np.array([0, 3, 1])
    shares = logits[..., 0] - np.log(np.exp(logits[..., 0]).sum(1, keepdims=True))
    got = Choices(tuple("0123")).losses(jnp.asarray(logits), {"labels": labels})
    np.testing.assert_allclose(got, -shares[np.arange(3), labels], rtol=1e-5)


def test_each_choice_is_read_with_its_text(encoder):
    row = ("the film", "was", "good", "very bad plot")
    inputs = Choices(("0", "1")).inputs(encoder, [row], 16)
    (found,) = inputs.rows
    alone, _ = encoder.encode([("the film was", "good"), ("the film was", "very bad plot")], 16)
    for i, one in enumerate(alone):
        length = len(one.input_ids)
        np.testing.assert_array_equal(found.input_ids[i, :length], one.input_ids)
        np.testing.assert_array_equal(found.token_type_ids[i, :length], one.token_type_ids)
        assert found.attention_mask[i].sum() == length


@pytest.mark.parametrize(
    ("task", "row", "data"),
    [
        (NER, {"tokens": ["a", "b"], "ner_tags": ["O"]}, ("line 1", "2 tokens", "1 tags")),
        (NER, {"tokens": ["a"], "ner_tags": ["DET"]}, ("'DET'", "line 1", "--metrics accuracy")),
        (NER, {"tokens": ["a"], "ner_tags": [3]}, ("'3'", "BIO")),
        (NER, {"tokens": [], "ner_tags": []}, ("line 1", "tokens")),
        (NER, {"tokens": ["a b"], "ner_tags": ["O"]}, ("line 1", "space")),
        (QA, {"context": "It was Ann.", "answers": {"text": ["Bob"]}}, ("'Bob'", "line 1")),
        (
            QA,
            {"context": "A b", "answers": {"text": ["A"], "answer_start": [1]}},
            ("answer_start",),
        ),
        (QA, {"context": "A b", "answers": {"text": ["A"], "answer_start": [0, 1]}}, ("'A'",)),
        ("multilabel", {"text": "x", "labels": "a|b"}, ("'a|b'", "--label-separator '|'")),
        ("multilabel", {"text": "x", "labels": [["a"]]}, ("'labels'", "line 1")),
        ("multilabel", {"text": "x", "labels": ["a", None]}, ("'labels'", "line 1")),
        ("multilabel", {"text": "x", "labels": {"a": 1}}, ("'labels'", "line 1")),
        (CHOICE, {"choice1": "a", "choice2": "b", "label": 2}, ("'2'", "choice1, choice2")),
    ],
)
def test_bad_rows_are_named(task, row, data, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "premise": "p", **row}))
    with raises(DataError, path, *data):
        TASKS[task].load({"train": path}, {}, ())


def test_a_number_for_each_label_is_no_list_of_names(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"t{i}", "labels": [i % 2, 1, 0]} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with raises(DataError, path, "'labels'", "3 labels", "line 1"):
        TASKS["multilabel"].load({"train": path}, {}, ())


def test_nothing_to_learn():
    texts = [("x", None)]
    for kind, labels in ((Tags, ["O", "O"]), (Spans, []), (LabelSets, ())):
        with raises(DataError, "nothing to learn"):
            kind.of(Table(texts, [labels]))
    with raises(aj.UserError, "choices=choice1,choice2"):
        TASKS[CHOICE].texts({"premise": "p", "choices": "choice1"})


def test_joined_labels_ask_for_the_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"))
    rows = "\n".join(f"text {i},{('a', 'b', 'a|b')[i % 3]}" for i in range(30))
    Path("rows.csv").write_text("text,label\n" + rows)
    assert main(["finetune", "--model", "tiny", "--train", "rows.csv"]) == 2
    err = capsys.readouterr().err
    assert all(d in err for d in ("'a|b'", "--task multilabel", "--label-separator '|'")), err


def test_a_column_that_is_there_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"))
    Path("rows.csv").write_text("text,label,label\n" + "a,b,c\n" * 30)
    assert main(["finetune", "--model", "tiny", "--train", "rows.csv"]) == 2
    err = capsys.readouterr().err
    assert "'label'" in err and "2 times" in err


def test_rows_to_predict_have_as_many_texts_as_those_of_training():
    with raises(DataError, "2 choices"):
        Choices(("0", "1")).check([("a", "b")], False)
    with raises(DataError, "at least one"):
        Choices(("0", "1")).check([], False)
    for choice in (None, " "):
        with raises(DataError, "row 2", repr(choice), "2 choices"):
            Choices(("0", "1")).check([("a", "b", "c"), ("a", "b", choice)], False)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Tags, {"names": ["O"]}),
        (Tags, {"names": [1, 2]}),
        (Spans, {"unanswerable": 1}),
        (LabelSets, {"names": []}),
        (Embeddings, {"scored": True, "low": 1.0, "high": 1.0}),
        (Choices, {"names": ["0"]}),
        (Choices, {"names": ["a", "b"]}),
    ],
)
def test_damaged_targets_are_errors(kind, values):
    with raises(aj.UserError, next(iter(values))):
        kind.from_config(values)


def test_tags_without_spans_have_accuracy_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"tokens": ["a", f"w{i}"], "ner_tags": ["DET", "NOUN"]} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = TokenClassification().load({"train": path}, {}, ("accuracy",))
    assert Tags.of(data.train).names == ("DET", "NOUN")
    with raises(DataError, "'DET'", "'NOUN'"):
        TokenClassification().load({"train": path}, {}, ("f1", "accuracy"))


def test_one_label_is_not_two_classes():
    sets = LabelSets(("joy",))
    names = ["f1_micro", "f1_macro", "accuracy"]
    never = sets.score(names, [()] * 10, [("joy",)] + [()] * 9)
    assert never == pytest.approx({"f1_micro": 0, "f1_macro": 0, "accuracy": 0.9})
    half = sets.score(names[:2], [("joy",), ("joy",), ()], [("joy",), (), ()])
    assert half == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 2 / 3})


@pytest.mark.parametrize("text", ["a good film", " a  good\n\nfilm "])
def test_words_are_found_whatever_space_is_between(text, encoder):
    (first,) = Tags(("B-a", "O")).inputs(encoder, [(text, None)], 16).where
    assert first.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        ({"text": "Ann", "answer_start": 7}, [(7, "Ann")]),
        ({"text": "Ann"}, [(7, "Ann")]),
        ({"text": ["Ann"], "answer_start": 7}, [(7, "Ann")]),
        ({"text": [], "answer_start": []}, []),
        ({"text": "", "answer_start": None}, []),
        ("Ann", [(7, "Ann")]),
        (0, [(12, "0")]),
        (None, []),
    ],
)
def test_an_answer_may_be_a_list_or_not(answers, labels, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Who?", "c": "It was Ann, 0.", "answers": answers}))
    assert TASKS[QA].read(path, ASKED, ()).labels == [labels]


def test_a_mapping_without_texts_is_no_question_without_an_answer(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "Who?", "c": "It was Ann.", "answers": {"answer": "Ann"}}))
    with raises(DataError, path, "line 1", "'answer'"):
        TASKS[QA].read(path, ASKED, ())


@pytest.mark.parametrize(
    ("labels", "expected"), [(["3", "1"], [1, 0]), (["0", "1"], [0, 1]), (["two", "one"], [1, 0])]
)
def test_all_labels_of_choices_are_read_alike(labels, expected, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"p": "A sum.", "one": "1", "two": "3", "label": label} for label in labels]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"premise": "p", "choices": "one,two", "label": "label"}
    assert TASKS[CHOICE].read(path, columns, ()).labels == expected


@pytest.mark.parametrize("sizes", ["--batch-size 1", "--batch-size 16 --accumulate 16"])
def test_pairs_without_scores_need_other_rows(sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"))
    paired(Path("rows.jsonl"))
    with command_raises(aj.UserError, "1 row", "--batch-size", "--accumulate"):
        assert main(f"{PAIRS} {sizes}".split()) == 2


def test_the_space_around_an_answer_is_none_of_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    answers = {"text": ["good ", " was"], "answer_start": [7, 2]}
    path.write_text(json.dumps({"q": "How?", "c": "it was good ", "answers": answers}))
    assert TASKS[QA].read(path, ASKED, ()).labels == [[(7, "good"), (3, "was")]]


def test_large_outputs_of_choices_have_shares():
    outputs = np.array([[[800.0], [0.0]]])
    (found,) = Choices(("0", "1")).predictions([("x", "a", "b")], outputs, Inputs([None], 0))
    assert found.probabilities == [1.0, 0.0]
