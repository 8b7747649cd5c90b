"""What hostile files of rows may try: few bytes that become much, refused before they do."""

import gzip
import json
import os
import struct
from pathlib import Path

import pytest
from helpers.errors import raises

from adapters_jax.finetune.data import columnar, files, unfolding
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.unfolding import Budget

arrow = pytest.importorskip("pyarrow", "18")  # older ones do not write views
parquet = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.hostile
LONG = "a" * 2_000_000
IN_FULL = {"dictionary_pagesize_limit": 2**30, "store_schema": False}  # as texts for the reader


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name, values, **options):
    """Saves columns as Parquet or Arrow, by the name's suffix; an Arrow file is a stream or not."""
    table = arrow.table(values if isinstance(values, dict) else {"text": values})
    if name.endswith(".parquet"):
        parquet.write_table(table, name, **{"compression": "zstd", **options})
        return name
    new = arrow.ipc.new_stream if options.pop("stream", False) else arrow.ipc.new_file
    with new(name, table.schema, options=arrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return name


def coded(ids, values):
    return arrow.DictionaryArray.from_arrays(arrow.array(ids, arrow.int32()), values)


def one_list(values):
    return arrow.ListArray.from_arrays(arrow.array([0, len(values)], arrow.int32()), values)


def replaced(name, old, new):
    data = Path(name).read_bytes()
    assert old in data
    Path(name).write_bytes(data.replace(old, new))
    return name


@pytest.fixture
def unread(monkeypatch):
    """No rows are read: all that follows is known from headers."""
    fail = lambda *_, **__: pytest.fail("rows are read")  # noqa: E731
    monkeypatch.setattr(columnar, "_count", fail)


REPEATED = {  # known as soon as the dictionary's texts are, which are not repeated
    "a dictionary": lambda: save("a.parquet", coded([0] * 100, [LONG]), **IN_FULL),
    "a list of a dictionary": lambda: save(
        "a.parquet", one_list(coded([0] * 100, [LONG])), **IN_FULL
    ),
    "texts that begin as the last one": lambda: save(
        "a.parquet",
        [LONG] * 60,
        use_dictionary=False,
        column_encoding="DELTA_BYTE_ARRAY",
    ),
    "a dictionary of Arrow": lambda: save("a.arrow", coded([0] * 2000, [LONG]), compression="zstd"),
    "views": lambda: save(
        "a.arrow",
        arrow.Array.from_buffers(
            arrow.string_view(),
            2000,
            [
                None,
                arrow.py_buffer(struct.pack("<i4sii", len(LONG), b"aaaa", 0, 0) * 2000),
                arrow.py_buffer(LONG.encode()),
            ],
        ),
        compression="zstd",
    ),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_a_text_that_is_repeated_is_counted_each_time(monkeypatch, kind):
    name = REPEATED[kind]()
    size, count, found = os.path.getsize(name), columnar._count, []

    def counted(array, budget):
        found.append(array.nbytes)
        count(array, budget)

    monkeypatch.setattr(columnar, "_count", counted)
    assert size < 1000
    with raises(DataError, name, f" {size} bytes", 3 * 2**24 + 64 * size):
        read_file(name)
    assert max(found) < 2**25


CLAIMED = {
    "compressed texts": lambda: save("a.parquet", [LONG] * 200, use_dictionary=False),
    "missing values": lambda: save("a.parquet", arrow.nulls(2 * 10**6, arrow.int8())),
    "values of no type": lambda: save("a.parquet", arrow.nulls(10**6)),
    "truths": lambda: save("a.parquet", [False] * 10**6),
    "rows of a label": lambda: save("a.parquet", ["yes"] * 10**6),
    "a list of missing values": lambda: save(
        "a.parquet", one_list(arrow.nulls(2 * 10**6, arrow.int8()))
    ),
    "compressed texts of Arrow": lambda: save("a.arrow", [LONG] * 200, compression="zstd"),
    "compressed texts of a stream": lambda: save(
        "a.arrow", [LONG] * 200, compression="zstd", stream=True
    ),
    "values of no type in Arrow": lambda: save("a.arrow", arrow.nulls(2**31 - 2)),
    "a list of values of no type": lambda: save("a.arrow", one_list(arrow.nulls(2**31 - 2))),
}


@pytest.mark.parametrize("kind", CLAIMED)
def test_what_headers_claim_is_counted_before_a_row_is_read(kind, unread):
    name = CLAIMED[kind]()
    size = os.path.getsize(name)
    assert size < 50_000
    with raises(DataError, name, f" {size} bytes", 3 * 2**24 + 64 * size):
        read_file(name)


def test_columns_of_the_same_bytes_are_counted_each():
    """Arrow's buffers may be the same ones."""
    names = [f"c{i}" for i in range(200)]
    save("a.arrow", {name: ["a" * 500_000] for name in names})
    assert len(read_file("a.arrow").records) == 1
    pairs = struct.pack("<qq", 0, 0), Path("a.arrow").read_bytes()
    found = unfolding.claims_of(*_message(pairs[1]))
    assert found == (1, 200, 200 * (500_000 + 8))


def _message(data):
    """The description and the body of the last message of an Arrow file."""
    reader = arrow.ipc.MessageReader.open_stream(arrow.py_buffer(data)[8:])
    message = [*reader][-1]
    return memoryview(message.metadata), memoryview(message.body)


def views_of_views():
    found = arrow.array([1] * 100, arrow.int8())
    for _ in range(5):
        found = arrow.ListViewArray.from_arrays(
            arrow.array([0] * 100, arrow.int32()), arrow.array([100] * 100, arrow.int32()), found
        )
    return found


TYPES = {
    "runs": lambda: arrow.RunEndEncodedArray.from_arrays([2 * 10**9], ["x"]),
    "views of lists": views_of_views,
    "a union": lambda: arrow.UnionArray.from_dense(
        arrow.array([0] * 1000, arrow.int8()),
        arrow.array([0] * 1000, arrow.int32()),
        [arrow.array(["x"])],
    ),
    "a structure of nothing": lambda: arrow.Array.from_buffers(
        arrow.struct([]), 2**31 - 1, [None], children=[]
    ),
    "a structure of one name twice": lambda: arrow.StructArray.from_arrays([[1], [2]], ["a", "a"]),
    "runs in a list": lambda: one_list(arrow.RunEndEncodedArray.from_arrays([9], ["x"])),
}


@pytest.mark.parametrize("kind", TYPES)
def test_types_without_bounds_are_named(kind, unread):
    column = TYPES[kind]()
    with raises(DataError, "a.arrow", f"text has {column.type}"):
        read_file(save("a.arrow", column))


def test_types_of_parquet_are_checked_too(unread):
    column = TYPES["a structure of one name twice"]()
    with raises(DataError, "a.parquet", f"text has {column.type}"):
        read_file(save("a.parquet", column))


def test_lists_of_the_size_0_are_named():
    """pyarrow divides by it: the process would end."""
    save("a.arrow", arrow.array([[7] * 1001] * 3, arrow.list_(arrow.int8(), 1001)))
    with raises(DataError, "text has fixed_size_list", "[0]"):
        read_file(replaced("a.arrow", struct.pack("<i", 1001), struct.pack("<i", 0)))


def test_types_that_data_sets_have_are_read():
    """The values that pyarrow itself makes of them."""
    said = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], [], None]
    table = {
        "messages": said,
        "image": [{"bytes": b"\x89PNG", "path": None}, None, {"bytes": None, "path": "b"}],
        "label": arrow.array([0, 1, None], arrow.int64()),
        "kind": coded([0, 1, None], ["x", "y"]),
        "kinds": arrow.ListArray.from_arrays([0, 1, 1, 3], coded([1, 0, 1], ["x", "y"])),
        "large": arrow.array(["é", None, "b"], arrow.large_string()),
        "view": arrow.array(["é" * 20, None, "b"], arrow.string_view()),
        "vector": arrow.array([[1.5, 2], None, [3, 4]], arrow.list_(arrow.float32(), 2)),
        "map": arrow.array([[("a", "b")], None, []], arrow.map_(arrow.string(), arrow.string())),
        "none": arrow.nulls(3),
        "time": arrow.array([0, 1, None], arrow.timestamp("us")),
        "price": arrow.array([None, 1, 2], arrow.decimal128(9, 2)),
    }
    rows = [[*row.values()] for row in arrow.table(table).to_pylist()]
    for name, options in (
        ("a.parquet", {}),
        ("b.parquet", {"row_group_size": 1}),
        ("a.arrow", {}),
        ("b.arrow", {"stream": True, "compression": "zstd"}),
    ):
        found = read_file(save(name, table, **options))
        assert [values for _, values in found.records] == rows
        assert found.header == [*table]


@pytest.mark.parametrize("few", [1, 2**6])
def test_groups_are_the_same_by_dictionaries_and_in_full(monkeypatch, few):
    texts = [f"{i % 7} " * (i % 50) for i in range(400)]
    tags = [[f"{j}" for j in range(i % 4)] for i in range(400)]
    save("a.parquet", {"text": texts, "tags": tags}, row_group_size=90)
    monkeypatch.setattr(columnar, "_PIECE", 2**10)
    monkeypatch.setattr(columnar, "_REPEATED", 0)
    monkeypatch.setattr(columnar, "_FEW", few)
    assert [values for _, values in read_file("a.parquet").records] == [
        list(row) for row in zip(texts, tags, strict=True)
    ]


def test_texts_that_begin_as_the_last_one_are_read():
    texts = [f"a common beginning {i}" for i in range(300)]
    options = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
    save("a.parquet", texts, **options)
    assert [values for _, values in read_file("a.parquet").records] == [[text] for text in texts]
    with raises(DataError, "b.parquet", "text.list.element", "DELTA_BYTE_ARRAY"):
        read_file(save("b.parquet", [texts], **options))


def test_pages_that_deny_their_metadata_are_an_error():
    """The number of values in the page's header is one more."""
    save("a.parquet", list(range(50)), use_dictionary=False, compression="none")
    old = bytes([0x2C, 0x15, 100])  # the structure of a data page: 50 values, zigzag
    with raises(DataError, "a.parquet", 51, 50):
        read_file(replaced("a.parquet", old, bytes([0x2C, 0x15, 102])))


def test_pages_are_what_pyarrow_wrote():
    save("a.parquet", ["x", "y", "x"], compression="none")
    data = Path("a.parquet").read_bytes()
    column = parquet.read_metadata("a.parquet").row_group(0).column(0)
    begin = column.dictionary_page_offset
    pages = [*unfolding.pages_of(memoryview(data), begin, begin + column.total_compressed_size)]
    assert [(page.values, page.table) for page in pages] == [(2, True), (3, False)]
    assert pages[0].size == 2 * (4 + 1)
    for cut in range(begin + 1, begin + 9):
        with pytest.raises((IndexError, ValueError, KeyError)):
            [*unfolding.pages_of(memoryview(data)[:cut], begin, cut + 1)]


def test_the_budget_is_that_of_the_bytes():
    most = 3 * 2**24 + 64 * 1000
    budget = Budget(Path("a"), 1000)
    budget.spend(rows=1000, values=1000, size=most - 1000 * (256 + 32))
    with raises(DataError, "a: its 1000 bytes", most):
        budget.spend(size=1)
    with raises(DataError, 2**33):
        Budget(Path("a"), 2**40).spend(size=2**33 + 1)
    with pytest.raises(ValueError, match="-1 rows"):  # which would make room for others
        budget.spend(rows=-1)


def test_a_negative_number_of_rows_is_an_error():
    save("a.parquet", [1] * 50, compression="none")
    old = b"\x16\x64"  # 50 rows by zigzag, and -50
    with raises(DataError, "a.parquet"):
        read_file(replaced("a.parquet", old, b"\x16\x63"))


def test_a_file_in_a_gz_file_has_the_budget_of_the_gz_file():
    save("a.parquet", ["no"] * 200_000, compression="none", use_dictionary=False)
    assert len(read_file("a.parquet").records) == 200_000
    size = Path("a.parquet.gz").write_bytes(gzip.compress(Path("a.parquet").read_bytes()))
    with raises(DataError, "a.parquet.gz", f" {size} bytes"):
        read_file("a.parquet.gz")


# Columns, and texts of a row


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "arrow"])
def test_columns_have_a_limit(monkeypatch, suffix):
    monkeypatch.setattr(files, "MOST_COLUMNS", 20)
    for count in (20, 21):
        name, row = f"{count}.{suffix}", {f"c{i}": ["a"] for i in range(count)}
        if suffix in ("csv", "tsv"):
            separator = "," if suffix == "csv" else "\t"
            Path(name).write_text(f"{separator.join(row)}\n{separator.join('a' * count)}\n")
        elif suffix.startswith("json"):
            line = json.dumps(dict.fromkeys(row, "a"))
            Path(name).write_text(f"[{line}]" if suffix == "json" else line)
        else:
            save(name, row)
    assert read_file(f"20.{suffix}").records[0][1] == ["a"] * 20
    with raises(DataError, f"21.{suffix}", 21, 20):
        read_file(f"21.{suffix}")


def test_parquet_of_many_columns_is_refused_by_its_metadata(monkeypatch):
    save("a.parquet", {f"c{i}": [1] for i in range(50)})
    monkeypatch.setattr(columnar, "_MOST_THRIFT", 40)
    with raises(DataError, "a.parquet", "parquet"):
        read_file("a.parquet")


def test_texts_of_a_row_have_a_limit(monkeypatch):
    monkeypatch.setattr(files, "MOST_ROW", 1000)
    monkeypatch.setattr("adapters_jax.finetune.data.delimited.MOST_ROW", 1000)
    monkeypatch.setattr(columnar, "MOST_ROW", 1000)
    long = "a" * 1001
    lines = {
        "csv": ("text,label\nb,0\n", f"{long}"),
        "tsv": ("text\tlabel\nb\t0\n", long),
        "txt": ("b\nc\n", long),
        "conll": ("b O\nb O\n", f"{long} O"),
        "jsonl": ('{"text": "b"}\n{"text": "c"}\n', json.dumps({"text": long})),
    }
    for suffix, (begin, end) in lines.items():
        Path(f"a.{suffix}").write_text(begin * 100 + end + "\n")
        where = begin.count("\n") * 100 + 1
        with raises(DataError, f"a.{suffix}, line {where}", 1000):
            read_file(f"a.{suffix}")
        Path(f"a.{suffix}").write_text(begin * 100)
        read_file(f"a.{suffix}")
    Path("lines.csv").write_text('text\n"' + "a\n" * 600 + '"\n')
    with raises(DataError, "lines.csv, line 2", 1000):
        read_file("lines.csv")
    for name in ("a.parquet", "a.arrow"):
        with raises(DataError, name, 1001, 1000):
            read_file(save(name, ["b", long]))
        assert len(read_file(save(name, [b"b", long.encode()])).records) == 2  # may be an image


def test_gz_files_unpack_to_what_fits_their_bytes():
    for name, data, what in (
        ("a.jsonl.gz", b'{"text": "a"}\n' + b"\n" * 3 * 10**6 + b'{"text": "a"}\n', "lines"),
        ("a.csv.gz", b"text\n" + b"a\n" * 2**18, "lines"),
        ("a.json.gz", b"[" + b"{}," * 10**6 + b"{}]", "bytes"),
        ("a.csv.gz", b"text" + b"," * 3 * 10**6 + b"\n", "bytes"),
    ):
        size = Path(name).write_bytes(gzip.compress(data))
        limit = 2**17 + size if what == "lines" else 2**20 + 64 * size
        with raises(DataError, name, f" {size} bytes", f"{limit} {what}"):
            read_file(name)
    rows = "".join(json.dumps({"text": f"{i * i:x} {i}"}) + "\n" for i in range(2**18))
    Path("a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert len(read_file("a.jsonl.gz").records) == 2**18


def test_a_pipe_and_a_folder_are_no_files_of_rows():
    os.mkfifo("a.csv")
    Path("b.csv.gz").mkdir()
    os.mkfifo("c.parquet")
    for name in ("a.csv", "c.parquet"):
        with raises(DataError, name, "ordinary"):
            read_file(name)


def test_lines_are_those_of_the_whole_text():
    for text in ("a\n\nb", "a\r\n\r\n\r\nb\r\n\r\n", "\n\n a\u2028b \n\x85\n", "\ufeffa\nb", "a"):
        raw = text.encode()
        whole = text.removeprefix("\ufeff").rstrip("\r\n").split("\n")
        found = [*files.lines_of(Path("a"), raw)]
        assert [n for n, _ in found] == [*range(1, len(whole) + 1)]
        assert [line.rstrip("\r") for _, line in found] == [line.rstrip("\r") for line in whole]
    for raw in (b"", b" \n\r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"):
        with raises(DataError, "a: the file is empty"):
            [*files.lines_of(Path("a"), raw)]
    with raises(DataError, "a, line 3", "0xff", "offset 4"):
        [*files.lines_of(Path("a"), b"a\nb\n\xff\n")]


def test_rows_are_read_without_looking_for_cycles():
    import gc

    seen, usual = [], gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    gc.callbacks.append(lambda phase, _: seen.append(phase))
    try:
        Path("b.csv").write_text("text,more\n" + "a,b\n" * 50_000)
        seen.clear()
        read_file("b.csv")
    finally:
        gc.callbacks.pop()
        gc.set_threshold(*usual)
    assert gc.isenabled() and len(seen) <= 2
