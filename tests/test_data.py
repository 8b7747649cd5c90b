"""Reading files and splitting them, and errors that name the file, the line and the datum."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.errors import raises
from helpers.labelled import load_labelled

import adapters_jax as aj
from adapters_jax.finetune.data.datasets import hold_out, make_dataset
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.glue import GLUE, load_glue, read_glue
from adapters_jax.finetune.data.movie_reviews import load_movie_reviews, movie_reviews
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.splits import split_rows
from adapters_jax.finetune.data.tables import Table, choose_columns, read_rows
from adapters_jax.finetune.pretrained.assets import cached

SHARED = Path(__file__).parents[2] / "shared" / "data"
real_glue = pytest.mark.skipif(not SHARED.exists(), reason="no GLUE files beside the project")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        raw = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return name

    return write


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Reading


def test_csv_with_quotes_commas_newlines_and_a_byte_order_mark(write):
    write("a.csv", '\ufefftext,label\r\n"One, ""two""\nthree",x\r\nFour, y \r\n\r\n')
    table = read_rows("a.csv")
    assert table.texts == [('One, "two"\nthree', None), ("Four", None)]
    assert (table.labels, table.lines, table.path) == (["x", "y"], [2, 4], "a.csv")


def test_tsv_takes_quotes_and_other_separators_literally(write):
    write("a.tsv", 'q\ta\tlabel\n"Why?\tso\u2028 "what"\t1\r\n')
    table = read_rows("a.tsv", text="q", text_pair="a")
    assert table.texts == [('"Why?', 'so\u2028 "what"')]
    assert table.labels == ["1"]


def test_jsonl_gz_with_numbers_and_other_keys(write):
    write(
        "a.jsonl.gz", lines_of([{"text": "a", "label": 2, "id": 7}, {"label": True, "text": "b"}])
    )
    table = read_rows("a.jsonl.gz")
    assert (table.texts, table.labels) == ([("a", None), ("b", None)], ["2", "true"])


def test_texts_without_labels(write):
    write("a.csv", "text\nhello\n")
    assert read_rows("a.csv", label=None).labels is None
    with raises(aj.UserError, "a.csv"):
        make_dataset(read_rows("a.csv", label=None))


@pytest.mark.parametrize(
    ("name", "content", "data"),
    [
        ("a.csv", "", ()),
        ("a.tsv", "\n \n", ()),
        ("a.csv", "text,label\n", ()),
        ("a.doc", "text\n", ("'.doc'", ".csv, .tsv, .jsonl", ".gz")),
        (
            "a.csv",
            "txet,lable,id\na,b,1\n",
            ("'text' or 'label'", "txet, lable, id", "'txet' and 'lable'?"),
        ),
        ("a.csv", "text,y\na,b\n", ("'label'", "text, y")),
        ("a.jsonl", lines_of([{"body": "a", "label": 1}]), ("'text'", "body, label")),
        (
            "a.csv",
            "text,label\na,1\nb, \n  ,1\n\nc,2\n",
            ("3 rows", "text or label", "lines 3, 4, 5;"),
        ),
        ("a.csv", "text,label\n" + "a,\n" * 12, ("12 rows", "lines 2, 3, 4, 5, 6 and 7 more")),
        (
            "a.jsonl",
            lines_of([{"text": "a", "label": 1}, {"text": ["b"], "label": 1}, {"text": "c"}]),
            ("2 rows", "lines 2, 3;"),
        ),
        ("a.csv", b"text,label\nfine,1\ncaf\xe9,1\n", ("line 3", "0xe9", "offset 21", "UTF-8")),
        ("a.csv", "text,label\na,b,c\nd,1\ne\n", ("2 rows", 2, "line 2 has 3, line 4 has 1;")),
        ("a.csv", 'text,label\na,1\n"open,1\nb,2\n', ("line 3",)),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', ("line 2", "column 13")),
        ("a.jsonl", '{"text":' * 100_000, ("line 1", "nested more than 32 deep")),
        ("a.jsonl", '["a", 1]', ("line 1", "list", '{"text": "...", "label": "..."}')),
    ],
)
def test_bad_files(write, name, content, data):
    write(name, content)
    with raises(DataError, name, *data) as caught:
        read_rows(name)
    assert str(caught.value).startswith(name)


def test_near_names_are_not_suggested_for_columns_that_are_far(write):
    write("a.csv", "text,y\na,b\n")
    with raises(DataError, "'label'") as caught:
        read_rows("a.csv")
    assert "?" not in str(caught.value)


def test_files_that_cannot_be_read(write):
    with raises(DataError, "none.csv"):
        read_rows("none.csv")
    Path("b.csv.gz").write_bytes(b"not gzip")
    with raises(DataError, "b.csv.gz"):
        read_rows("b.csv.gz")
    write("d.csv.gz", "text,label\na,1\n")
    Path("d.csv.gz").write_bytes(Path("d.csv.gz").read_bytes()[:-9])
    with raises(DataError, "d.csv.gz"):
        read_rows("d.csv.gz")
    write("c.jsonl", '{"text": "\\ud800", "label": 1}')
    with raises(DataError, "c.jsonl, line 1", "'utf-8'"):
        read_rows("c.jsonl")


# Labels


def table(labels, path="t.csv"):
    texts = [(f"text {i}", None) for i in range(len(labels))]
    return Table(texts, labels, (), path, [*range(2, len(labels) + 2)])


def test_labels_are_sorted_as_numbers_only_when_all_are():
    assert make_dataset(table(["10", "9", "-1"])).label_names == ("-1", "9", "10")
    mixed = make_dataset(table(["10", "9", "b"]))
    assert mixed.label_names == ("10", "9", "b")
    assert mixed.labels.dtype == np.int32 and mixed.labels.tolist() == [0, 1, 2]
    assert mixed.label_names


def test_regression_labels_are_float32():
    data = make_dataset(table(["1", "2.5"]), task="regression")
    assert data.label_names == ()
    assert data.labels.dtype == np.float32 and data.labels.tolist() == [1.0, 2.5]


def test_bad_labels():
    train = make_dataset(table(["no", "yes"]))
    with raises(DataError, "dev.csv", "2 rows", "no, yes", "'maybe' (line 3), 'x' (line 4)"):
        make_dataset(table(["no", "maybe", "x"], "dev.csv"), label_names=train.label_names)
    with raises(DataError, "t.csv", "'7'"):
        make_dataset(table(["7", "7"]))
    with raises(DataError, "t.csv", "'nan' (line 3), 'one' (line 4), 'inf' (line 5)"):
        make_dataset(table(["1", "nan", "one", "inf"]), task="regression")
    decimals = [str(i / 10) for i in range(51)]
    with raises(DataError, "t.csv", 51, "task='regression'"):
        make_dataset(table(decimals))
    assert len(make_dataset(table(decimals[:50])).label_names) == 50
    assert len(make_dataset(table([str(i) for i in range(77)])).label_names) == 77
    with raises(aj.UserError, "'rank'", "'classification'", "'regression'"):
        make_dataset(table(["1", "2"]), task="rank")


# Splits


def dataset(rows=200, classes=2):
    names = tuple(map(str, range(classes)))
    return Table(
        [(f"text {i}", None) for i in range(rows)], np.arange(rows, dtype=np.int32) % classes, names
    )


def split(data, seed, dev=0.1, test=0.1):
    found = hold_out("rows", {"train": data}, (), seed=seed, dev=dev, test=test)
    return found.train, found.dev, found.test


def test_split_is_a_stratified_partition_fixed_by_the_seed():
    data = dataset(rows=200, classes=4)
    parts = split(data, seed=1)
    assert sorted(text for part in parts for text in part.texts) == sorted(data.texts)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[40] * 4, [5] * 4, [5] * 4]
    assert [p.texts for p in split(data, seed=1)] == [p.texts for p in parts]
    assert split(data, seed=2)[1].texts != parts[1].texts
    assert parts[1].texts[:3] == [("text 9", None), ("text 26", None), ("text 30", None)]


def test_split_does_not_depend_on_the_order_of_rows():
    data = dataset()
    turned = data.take(np.arange(200)[::-1])
    assert sorted(split(turned, seed=1)[2].texts) == sorted(split(data, seed=1)[2].texts)


def test_duplicates_stay_in_one_split_and_none_is_dropped():
    words = [f"film {i % 50}" if i % 3 else f"FILM  {i % 50} " for i in range(400)]
    data = Table([(word, None) for word in words], np.arange(400, dtype=np.int32) % 2, ("a", "b"))
    parts = split(data, seed=0)
    keys = [{" ".join(text.lower().split()) for text, _ in part.texts} for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 50
    assert sum(map(len, parts)) == 400
    assert 0 < len(parts[1]) <= 40 and 0 < len(parts[2]) <= 40


def test_a_rare_class_stays_in_train():
    data = Table(dataset(100).texts, np.array([0] * 97 + [1] * 3, np.int32), ("a", "b"))
    assert [np.bincount(part.labels).tolist() for part in split(data, 0)] == [[79, 3], [9], [9]]


def test_regression_is_split_as_one():
    data = Table(dataset(100).texts, np.linspace(0, 5, 100, dtype=np.float32), ())
    assert [len(part) for part in split(data, 0)] == [80, 10, 10]
    # 100 * 0.29 and 100 * 0.57 are a little below 29 and 57 as floats.
    assert [len(part) for part in split(data, 0, 0.29, 0.57)] == [14, 29, 57]


def test_bad_splits():
    with raises(DataError, 10, 0.1, "dev"):
        split(dataset(10), 0)
    with raises(DataError, "10 rows are", 0.1, "test file or more rows"):
        split(dataset(10), 0, dev=0)
    with raises(DataError, "40 rows with 2 distinct texts are", "more distinct texts"):
        split_rows(["a film", "a play"] * 20, [0] * 40, 0, dev=0.1, test=0)
    with raises(DataError, "40 rows in 40 classes", "each class", "--task regression"):
        split_rows([*map(str, range(40))], range(40), 0, dev=0.1, test=0)
    with raises(DataError, "1 rows are too few", "of them for dev") as caught:
        split_rows(["a film"], [0], 0, dev=0.1, test=0)
    assert "class" not in str(caught.value) and "regression" not in str(caught.value)
    for dev, test in ((0.5, 0.5), (-0.1, 0.1), (0.1, -0.1)):
        with raises(aj.UserError, f"dev={dev}", f"test={test}"):
            split(dataset(), 0, dev=dev, test=test)


# Tasks


def test_load_labelled_holds_out_only_what_is_missing(write):
    for name, start in (("train.csv", 0), ("dev.csv", 900)):
        rows = "".join(f"row {i},{i % 2}\n" for i in range(start, start + 100))
        write(name, "text,label\n" + rows)
    both, one = load_labelled("train.csv"), load_labelled("train.csv", "dev.csv")
    assert [len(both.train), len(both.dev), len(both.test)] == [80, 10, 10]
    assert [len(one.train), len(one.dev), len(one.test)] == [90, 100, 10]
    assert one.dev.texts[0] == ("row 900", None)
    full = load_labelled("train.csv", "dev.csv", "dev.csv", metrics=["f1"])
    assert [len(full.train), len(full.test), full.metrics, full.name] == [
        100,
        100,
        ("f1",),
        "train",
    ]
    assert load_labelled("train.csv", task="regression").metrics == ("pearson", "spearman")
    write("dev.csv", "text,label\nnew,2\n")
    with raises(DataError, "dev.csv", "0, 1", "'2' (line 2)"):
        load_labelled("train.csv", "dev.csv")


def test_a_part_without_the_positive_class_is_named(write, caplog):
    write("train.csv", "text,label\n" + "".join(f"row {i},{'ny'[i % 2]}\n" for i in range(40)))
    write("dev.csv", "text,label\nnew,n\n")
    load_labelled("train.csv", "dev.csv", metrics=["accuracy"])
    assert caplog.messages == []
    load_labelled("train.csv", "dev.csv")
    (message,) = caplog.messages
    assert "dev" in message and "'y'" in message and "--metrics accuracy" in message


@pytest.mark.parametrize("name", GLUE)
def test_the_columns_of_each_glue_task(write, name):
    headers = {
        "cola": "source\tlabel\tmark\tsentence",
        "sst2": "sentence\tlabel",
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "stsb": "index\tgenre\tfilename\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "mnli": "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label",
        "qnli": "index\tquestion\tsentence\tlabel",
        "rte": "index\tsentence1\tsentence2\tlabel",
        "wnli": "index\tsentence1\tsentence2\tlabel",
    }  # fmt: skip
    spec, columns = GLUE[name], headers[name].split("\t")
    cells = {spec.text: 'He said "yes', spec.text_pair: "No.", spec.label: "0"}
    rows = ["\t".join({**cells, spec.label: label}.get(c, "-") for c in columns) for label in "01"]
    content = "\n".join([headers[name]] * (name != "cola") + rows)
    write("train.tsv", content)
    write("dev_matched.tsv" if name == "mnli" else "dev.tsv", content)
    dev = read_glue(name.upper(), ".")["dev"]
    assert dev.texts == [('He said "yes', "No." if spec.text_pair else None)] * 2
    assert dev.labels.tolist() == [0, 1]
    assert (dev.label_names == ()) == (name == "stsb")


def test_the_metrics_of_glue():
    assert {name: spec.metrics for name, spec in GLUE.items() if spec.metrics != ("accuracy",)} == {
        "cola": ("matthews",),
        "stsb": ("pearson", "spearman"),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
    }


def test_broken_rows_of_qqp_are_left_out_with_a_warning(write):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good = "1\t2\t3\tWhy?\tHow?\t0\n1\t2\t3\tWhy?\tWhy so?\t1\n"
    write("train.tsv", header + good + "4\t5\t6\tcut off\n7\t8\t9\tWho?\t\t1\n")
    write("dev.tsv", header + good)
    with pytest.warns(UserWarning, match="^train.tsv: .* 2 of 4 rows"):
        assert len(read_glue("qqp", ".")["train"]) == 2


def test_unknown_glue_task():
    with raises(DataError, "'boolq'", ", ".join(GLUE)):
        read_glue("boolq", ".")


@real_glue
def test_cola():
    task = load_glue("CoLA", SHARED / "cola")
    assert len(task.train) + len(task.test) == 8551 and len(task.dev) == 1043
    assert np.bincount(task.dev.labels).tolist() == [322, 721]
    assert task.dev.label_names == ("0", "1")
    assert task.dev.texts[0] == ("The sailors rode the breeze clear of the rocks.", None)
    assert not set(task.train.texts) & set(task.test.texts)


@real_glue
def test_stsb():
    parts = read_glue("STS-B", SHARED / "stsb")
    assert [len(parts["train"]), len(parts["dev"])] == [5749, 1500]
    assert parts["dev"].texts[1] == (
        "A young child is riding a horse.",
        "A child is riding a horse.",
    )
    assert parts["dev"].labels[:2].tolist() == [5.0, 4.75]
    assert parts["dev"].labels.mean() == pytest.approx(2.364, abs=1e-3)


def test_movie_reviews_of_another_size(write):
    write(
        "movieReviewSnippets_GroundTruth.txt",
        "id\tsentiment\ttext\r\n1\t0.0\tMeh\r\n2\t-5\tBad\r\n",
    )
    with raises(DataError, "movieReviewSnippets_GroundTruth.txt", 2, -5.0, 0.0, 10605):
        movie_reviews(".")


def test_movie_reviews():
    directory = cached("movie-reviews")
    if directory is None:
        pytest.skip("the demo's sentences are not in the cache")
    data = movie_reviews(directory)
    assert np.bincount(data.labels).tolist() == [5363, 5242]
    assert data.texts[2] == ("Effective but too tepid biopic", None) and data.labels[2] == 0
    task = load_movie_reviews(directory)
    assert [len(task.train), len(task.dev), len(task.test)] == [8485, 1060, 1060]
    assert [part.labels.sum() for part in (task.train, task.dev, task.test)] == [4194, 524, 524]
    assert not {t for t, _ in task.train.texts} & {t for t, _ in task.dev.texts + task.test.texts}


def test_a_prompt_and_completion_of_messages_say_which_column_to_write():
    said = [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    with raises(DataError, "line 1 has a list", "one column called messages"):
        choose_columns(Rows(["prompt", "completion"], [(1, said)]), ["prompt", "completion"])
    with raises(DataError, "line 1 has a list") as caught:
        choose_columns(Rows(["prompt"], [(1, [["a"]])]), ["prompt"])
    assert "messages" not in str(caught.value)
