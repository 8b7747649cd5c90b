"""The formats of rows, each against the values that were written, and what is wrong with files."""

import csv
import gzip
import json
import logging
import struct
from pathlib import Path

import pytest
from helpers.errors import raises
from helpers.labelled import load_labelled

from adapters_jax.errors import MissingPackageError
from adapters_jax.finetune.data import files
from adapters_jax.finetune.data.datasets import make_dataset
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.layouts import LAYOUTS, OF_DECODERS, layout_of
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.tables import Table, read_rows
from adapters_jax.finetune.tasks import TASKS

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="no data sets beside the project")
ROWS = [
    {"text": "a", "label": 1, "tags": ["x", "y"], "said": {"by": None}},
    {"text": "b\nc", "label": 0, "tags": [], "said": {"by": "me"}},
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    raw = content if isinstance(content, bytes) else content.encode()
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return name


def values_of(name):
    header, records, _ = read_file(name)
    return [dict(zip(header, values, strict=True)) for _, values in records]


# Formats


def test_rows_of_json_keep_their_values():
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("a.jsonl", "a.jsonl.gz", "lines.json"):
        assert values_of(write(name, lines)) == ROWS
        assert [line for line, _ in read_file(name)[1]] == [1, 2]
    for name, values in (("a.json", ROWS), ("a.json.gz", ROWS), ("b.json", {"data": ROWS})):
        assert values_of(write(name, json.dumps(values, indent=1))) == ROWS
        assert [line for line, _ in read_file(name)[1]] == ["row 1", "row 2"]


def test_parquet_and_arrow():
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    many = [{**ROWS[i % 2], "label": i} for i in range(600)]
    table = arrow.Table.from_pylist(many)
    parquet.write_table(table, "a.parquet")
    with arrow.OSFile("file.arrow", "wb") as sink, arrow.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=100)
    with arrow.OSFile("a.arrow", "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=100)
    for name in ("a.parquet", "file.arrow", "a.arrow"):
        assert values_of(name) == many
        assert read_file(name)[1][599][0] == "row 600"
    assert read_rows("a.parquet").labels[:2] == ["0", "1"]


def test_class_ids_get_the_names_that_the_hub_stores():
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
        "ner_tags": {"feature": {"names": ["O", "B"], "_type": "ClassLabel"}, "_type": "List"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    table = arrow.table(
        {"text": ["a", "b", "c"], "label": [1, 0, -1], "ner_tags": [[0, 1], [], None]}
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, "a.parquet")
    assert [(row["label"], row["ner_tags"]) for row in values_of("a.parquet")] == [
        ("yes", ["O", "B"]),
        ("no", []),
        (None, None),
    ]
    with raises(DataError, "a.parquet", "row 3", "no text or label"):
        read_rows("a.parquet")
    parquet.write_table(table.replace_schema_metadata({"huggingface": "{"}), "b.parquet")
    assert [row["label"] for row in values_of("b.parquet")] == [1, 0, -1]


def test_parquet_that_is_none_or_has_no_rows():
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with raises(DataError, "a.parquet", "parquet"):
        read_file(write("a.parquet", "none"))
    with raises(DataError, "a.arrow", "arrow"):
        read_file(write("a.arrow", "none"))
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), "empty.parquet")
    with raises(DataError, "empty.parquet", "no rows"):
        read_file("empty.parquet")


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with raises(MissingPackageError, "a.parquet", "pyarrow", "[parquet]"):
        read_file(write("a.parquet", "PAR1"))


def test_conll_columns():
    write("a.conll", "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n\n")
    assert read_file("a.conll")[:2] == (
        ["tokens", "column 2", "ner_tags"],
        [
            (3, [["EU", "rejects"], ["NNP", "VBZ"], ["B-ORG", "O"]]),
            (7, [["Peter"], ["NNP"], ["B-PER"]]),
        ],
    )
    write("tabs.conll", "a b\tO\n#\tO\n \t \nc\tB\n")
    assert values_of("tabs.conll") == [
        {"tokens": ["a b", "#"], "ner_tags": ["O", "O"]},
        {"tokens": ["c"], "ner_tags": ["B"]},
    ]
    with raises(DataError, "b.conll", "line 2 has 3"):
        read_file(write("b.conll", "a O\nb B x\n"))
    with raises(DataError, "c.conll", "line 1 has 1"):
        read_file(write("c.conll", "only\ntokens\n"))


def test_conll_without_a_token_is_one_sentence():
    write("rows.conll", "-DOCSTART- -X- O\n\n-DOCSTART-\n")
    with raises(DataError, "rows.conll", "no tokens"):
        read_file("rows.conll")


def test_arrow_with_an_offset_behind_its_end_is_one_sentence():
    import pyarrow

    table = pyarrow.Table.from_pylist([{"text": "abc"}, {"text": "de"}])
    with pyarrow.ipc.new_file("a.arrow", table.schema) as writer:
        writer.write_table(table)
    good, bad = (struct.pack("<3i", 0, 3, end) for end in (5, -5))
    data = Path("a.arrow").read_bytes()
    assert data.count(good) == 1
    write("a.arrow", data.replace(good, bad))
    with raises(DataError, "a.arrow", -5):
        read_file("a.arrow")


def test_squad():
    answers = [{"text": "Rome", "answer_start": 3}, {"text": "in Rome", "answer_start": 0}]
    asked = [{"id": "q", "question": "Where?", "answers": answers}]
    asked.append({"id": "r", "question": "When?", "is_impossible": True})
    paragraphs = [{"context": "in Rome", "qas": asked}]
    write("a.json", json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    first, second = values_of("a.json")
    assert first == {
        "id": "q",
        "title": "T",
        "context": "in Rome",
        "question": "Where?",
        "answers": {"text": ["Rome", "in Rome"], "answer_start": [3, 0]},
    }
    assert second["answers"] == {"text": [], "answer_start": []}
    write("b.json", json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1}]}]}]}))
    with raises(DataError, "b.json", "'question'"):
        read_file("b.json")


def test_images_by_folder_and_by_table():
    for name in ("d/cat/1.png", "d/cat/2.JPG", "d/dog/1.png", "d/dog/notes.txt"):
        write(name, b"x")
    assert values_of("d") == [
        {"image": "cat/1.png", "label": "cat"},
        {"image": "cat/2.JPG", "label": "cat"},
        {"image": "dog/1.png", "label": "dog"},
    ]
    write("d/metadata.csv", "file_name,label\ndog/1.png,a dog\n")
    assert values_of("d") == [{"image": "dog/1.png", "label": "a dog"}]
    write("secret.png", b"x")
    write("d/metadata.csv", "file_name,label\n../secret.png,a\ncat/1.png,b\ncat/9.png,c\n")
    with raises(DataError, "d/metadata.csv", "'../secret.png' (line 2)", "'cat/9.png' (line 4)"):
        read_file("d")
    write("d/metadata.csv", "name,label\ncat/1.png,b\n")
    with raises(DataError, "d/metadata.csv", "'file_name'", "name, label"):
        read_file("d")
    Path("none").mkdir()
    with raises(DataError, "none", "metadata.csv", "none/*.jsonl"):
        read_file("none")


def test_what_is_no_image_of_a_class_is_hidden_or_logged(caplog):
    for name in ("cat/1.png", "dog/1.jfif", "dog/._1.png", ".ipynb_checkpoints/1.png"):
        write(f"d/{name}", b"x")
    expected = [{"image": "cat/1.png", "label": "cat"}, {"image": "dog/1.jfif", "label": "dog"}]
    assert values_of("d") == expected and not caplog.records
    for name in ("dog/2.heic", "cat/more/2.png"):
        write(f"d/{name}", b"x")
    assert values_of("d") == values_of(Path("d").absolute()) == expected
    (logged,) = caplog.messages  # once
    assert "d: not read: cat/more/2.png, dog/2.heic; " in logged


def test_tables_of_images_with_a_long_name_or_a_short_row():
    write("images/a.png", b"")
    write("images/metadata.csv", "file_name,label\n" + "a" * 5000 + ",cat\n")
    with raises(DataError, "images/metadata.csv", "line 2"):
        read_file("images")
    write("images/metadata.csv", "label,file_name\ncat\n")
    with raises(DataError, "images/metadata.csv", "line 2 has 1"):
        read_file("images")


def test_several_files_are_read_as_one():
    write("part-1.csv", "text,label\na,0\nb,1\n")
    write("part-2.jsonl", '{"label": 1, "text": "c", "id": 7}\n')
    header, records, _ = read_file("part-*")
    assert header == ["text", "label", "id"]
    assert records[1:] == [
        ("line 3 of part-1.csv", ["b", "1", None]),
        ("line 1 of part-2.jsonl", ["c", 1, 7]),
    ]
    assert read_rows("part-*").labels == ["0", "1", "1"]
    write("part-3.csv", "text,label\n,0\n")
    with raises(DataError, "part-*", "text or label", "line 2 of part-3.csv"):
        read_rows("part-*")
    with raises(DataError, "none-*.csv"):
        read_file("none-*.csv")
    write("odd[1].csv", "text,label\na,0\n")
    assert len(read_rows("odd[1].csv")) == 1
    write("part-4.csv", "text,label\na\n")
    with raises(DataError, "part-4.csv"):
        read_rows("part-*")


# Limits and mistakes


def test_csv_has_fields_of_any_length():
    limit, text = csv.field_size_limit(), "word " * 100_000
    write("a.csv", f'text,label\n"{text}",1\nb,0\n')
    assert read_rows("a.csv").texts[0][0] == text
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_of_csv_is_logged(caplog, separator, name):
    caplog.set_level(logging.INFO, "adapters_jax")
    write("a.csv", f'text{separator}label\n"a{separator}, b"{separator}1\n')
    assert read_rows("a.csv").texts == [(f"a{separator}, b", None)]
    assert [record.getMessage() for record in caplog.records] == [
        f"a.csv: {name} separate its fields"
    ]


def test_a_gzip_bomb_is_one_sentence(monkeypatch):
    monkeypatch.setattr(files, "MOST_UNPACKED", 3 * 2**20)
    write("a.jsonl.gz", b"0" * 10**8)
    with raises(DataError, "a.jsonl.gz", Path("a.jsonl.gz").stat().st_size, 3 * 2**20):
        read_file("a.jsonl.gz")
    write("b.jsonl.gz", json.dumps({"text": "x" * 10**6}))
    assert len(values_of("b.jsonl.gz")) == 1
    two = gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n')
    Path("two.jsonl.gz").write_bytes(two)
    assert values_of("two.jsonl.gz") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("line", "data"),
    [
        ('{"a": 1, "a": 2}', ["duplicate key 'a'"]),
        ('{"a": NaN}', ["NaN"]),
        ('{"a": 1e999}', ["1e999"]),
        ('{"a": %s}' % ("1" * 41), ["digits"]),
        ('{"a": %s}' % ("[" * 40 + "]" * 40), ["32 deep"]),
        ('{"a": "x\\u0000"}', ["character 0"]),
        ('{"a": "x\0"}', ["a byte is 0"]),
        ('{"a": "%s"}' % ("x" * 200), [209, 100]),
        ("[1]", ["list"]),
    ],
)
def test_rows_of_json_are_strict(monkeypatch, line, data):
    monkeypatch.setattr(files, "MOST_ROW", 100)
    with raises(DataError, "a.jsonl, line 2", *data) as caught:
        read_file(write("a.jsonl", '{"a": "\\\\u0000"}\n' + line))
    assert len(str(caught.value)) < 300
    if line != "[1]" and len(line) < 200:
        with raises(DataError, "a.json", *data):
            read_file(write("a.json", f"[{line}]"))


@pytest.mark.parametrize("values", [{}, {"data": 1}, [], [1], "text", {"data": []}])
def test_json_without_rows(values):
    with raises(DataError, "a.json", "SQuAD"):
        read_file(write("a.json", json.dumps(values)))
    with raises(DataError, "a.json", "question"):
        read_file(write("a.json", json.dumps({"data": [{"paragraphs": {}}]})))


def test_rows_with_keys_of_their_own_make_no_large_table():
    lines = [json.dumps({f"k{n}": n}) for n in range(1100)]
    with raises(DataError, "a.jsonl", "1057 different keys"):
        read_file(write("a.jsonl", "\n".join(lines)))
    header, rows, _ = read_file(write("a.jsonl", "\n".join(lines[:1000])))
    assert (len(header), len(rows), rows[7][1][:9]) == (1000, 1000, [*[None] * 7, 7, None])


def test_utf16_is_told_apart():
    with raises(DataError, "a.csv, line 1", "UTF-16"):
        read_file(write("a.csv", "text,label\na,1\n".encode("utf-16")))


def test_a_second_column_of_one_name():
    write("a.csv", "text,label,label,id,id\na,1,2,3,4\n")
    with raises(DataError, "a.csv", "'label'", "2 times"):
        read_rows("a.csv")
    assert read_rows("a.csv", label=None).texts == [("a", None)]


def test_a_nested_value_is_no_text():
    write("a.jsonl", '{"text": "a", "label": 1}\n{"text": {"de": "b"}, "label": 1}')
    with raises(DataError, "a.jsonl", "no text or label: line 2;", "line 2 has a dict"):
        read_rows("a.jsonl")


def test_only_what_may_be_of_the_hub_is_proposed():
    for name in ("imdb", "stanfordnlp/imdb"):
        with raises(DataError, f"{name}: ", f"write hub:{name}"):
            read_file(name)
    for name in ("../imdb", "/data/none", "my data", "a/b/c"):
        with raises(DataError, f"{name}: ") as caught:
            read_file(name)
        assert "hub:" not in str(caught.value)


# Layouts


def test_tasks_of_decoders_are_those_of_the_registry():
    kinds = {layout.task: TASKS[layout.task].kind for layout in LAYOUTS}
    assert {*OF_DECODERS} == {task for task, kind in kinds.items() if kind == "decoder"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_are_known_by_their_columns(layout):
    assert layout_of(["id", *reversed(layout.columns)]) is layout
    assert layout_of(layout.columns[1:]) is not layout


def test_the_layout_is_named_where_a_column_is_missing():
    write("a.conll", "EU B-ORG\n")
    with raises(DataError, "'text' or 'label'", "tokens/ner_tags", "token-classification"):
        read_rows("a.conll")
    write("a.jsonl", '{"messages": []}')
    with raises(DataError, "layout messages", "--task conversation", "a decoder as --model"):
        read_rows("a.jsonl")


# Labels


def test_labels_that_look_alike_are_listed_once():
    labels = ["1", "1.0", "01", "2", "True", "true", "nan", "nan"]
    table = Table([("a", None)] * 8, labels, (), "t.csv", list(range(8)))
    with pytest.warns(UserWarning, match="t.csv") as caught:
        names = make_dataset(table).label_names
    assert len(names) == 7 and len(caught) == 1
    message = str(caught[0].message)
    for part in ("'01' and '1' and '1.0'", "'True' and 'true'", "'nan' may say missing"):
        assert part in message
    assert "'2'" not in message


# Real data


def test_a_file_without_a_header_gets_the_names_of_its_columns():
    write("rows.tsv", "A joy\t1,2\tx\nBad\t3\ty\n")
    found = values_of("rows.tsv#text, labels,id")
    assert found == [
        {"text": "A joy", "labels": "1,2", "id": "x"},
        {"text": "Bad", "labels": "3", "id": "y"},
    ]
    with raises(DataError, "'text'", "A joy", "rows.tsv#text,label"):
        read_rows("rows.tsv", "text", None, None)
    with raises(DataError, "rows.tsv", "line 1 has 3", "expected 2 fields"):
        read_file("rows.tsv#a,b")
    write("rows.jsonl", '{"text": "A joy"}')
    for wrong in ("rows.tsv#a,,b", "rows.tsv#a,b,a", "rows.jsonl#text"):
        with raises(DataError, wrong, "rows.tsv#text,labels"):
            read_file(wrong)


@real
def test_goemotions():
    rows = values_of(f"{SHARED}/goemotions/dev.tsv#text,labels,id")
    assert len(rows) == 5426
    assert [row["labels"] for row in rows[:3]] == ["27", "4,27", "25"]


@real
def test_wnut17():
    rows = values_of(SHARED / "wnut17" / "wnut17train.conll")
    assert len(rows) == 3394
    assert sum(tag.startswith("B-") for row in rows for tag in row["ner_tags"]) == 1975
    assert len(values_of(SHARED / "wnut17" / "emerging.dev.conll")) == 1009


@real
def test_xquad():
    rows = values_of(SHARED / "xquad" / "xquad.en.json")
    assert len(rows) == 1190 and len({row["title"] for row in rows}) == 48
    for row in rows:
        starts = row["answers"]["answer_start"]
        for start, text in zip(starts, row["answers"]["text"], strict=True):
            assert row["context"][start : start + len(text)] == text


@real
def test_real_layouts():
    found = {
        "conversations/dummy_conversation.json": "ShareGPT",
        "xcopa/val.jsonl": "premise/choice1/choice2",
        "wnut17/emerging.dev.conll": "tokens/ner_tags",
        "xquad/xquad.en.json": "context/question/answers",
    }
    for name, layout in found.items():
        assert layout_of(read_file(SHARED / name)[0]).name == layout
    gsm8k = load_completions(SHARED / "gsm8k" / "test.jsonl")
    assert len(gsm8k) == 1319


def load_completions(path):
    return read_rows(path, "question", "answer", None)


def test_the_name_of_data_is_that_of_its_file():
    write("part-1.csv", "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40)))
    assert load_labelled("part-*.csv").name == "part"
