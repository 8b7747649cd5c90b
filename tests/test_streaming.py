"""Files that are too large to hold: rows are read when they are needed, and checked once."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.errors import raises
from helpers.tiny import write_llama, write_meanings

from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data import streaming
from adapters_jax.finetune.data.conversations import read_conversations
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.lazy_rows import Lazy
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.splits import split_rows, split_streamed
from adapters_jax.finetune.data.tables import read_rows
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.runs.config import _sha256
from adapters_jax.finetune.runs.prepare import resume_run
from adapters_jax.finetune.tasks import TASKS


@pytest.fixture
def large(monkeypatch):
    """Every file is large."""

    def chosen(bytes=0):
        monkeypatch.setattr(streaming, "STREAMED", bytes)
        streaming._indexed.cache_clear()

    yield chosen
    streaming._indexed.cache_clear()


FILES = {
    "a.jsonl": '\ufeff{"a": "x", "b": 1}\n\n{"b": [2], "c": "\u2028"}\r\n{"a": "\\u0041"}\n\n',
    "b.jsonl": '{"a": 1.5}\n{"a": "last line without an end"}',
    "a.csv": '\ufefftext,label\n"two\nlines, one ""row""",no\n\nplain,yes\n"\u2028",\r\n\n\n',
    "b.csv": "text;label\nx,y;1\nz;2",
    "a.tsv": 'text\tlabel\n"a\t1\n\t\nb"\t2\r\nc\t3\n\n',
    "b.tsv": "text\tlabel\r\na\t1\r\nb\tno\r\n\r\n\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_streamed_file_has_the_rows_of_a_held_one(name, tmp_path, large):
    path = tmp_path / name
    path.write_bytes(FILES[name].encode())
    held = read_file(path)
    large()
    streamed = read_file(path)
    assert isinstance(held.records, list) and not isinstance(streamed.records, list)
    assert streamed.header == held.header and list(streamed.records) == held.records
    assert list(streamed.lines) == held.lines and streamed.records[-1] == held.records[-1]


def test_parquet_is_copied_row_by_row(tmp_path, large):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"text": [f"t{i}" for i in range(50)], "tags": [["a"] * (i % 3) for i in range(50)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet", row_group_size=7)
    held = read_file(tmp_path / "a.parquet")
    large()
    streamed = read_file(tmp_path / "a.parquet")
    assert not isinstance(streamed.records, list) and list(streamed.records) == held.records


BAD = {
    "a.jsonl": [
        '{"a": 1}\n{"a": }\n',
        '{"a": 1}\n[1]\n',
        '{"a": 1}\n{"a": "\\u0000"}\n',
        '{"a": 1}\n{"a": 1, "a": 2}\n',
        '{"a": 1}\n{"a": "\0"}\n',
        b'{"a": 1}\n{"a": "\xff"}\n',
    ],
    "a.csv": ["text,label\nx\n", 'text,label\nx,"y\n', b"text,label\n\xff,1\n"],
    "a.tsv": ["text\tlabel\nx\n"],
}


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, found in BAD.items() for c in found])
def test_a_bad_row_is_named_by_its_line_before_anything_trains(name, content, tmp_path, large):
    large()
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with raises(DataError, name, "line 2"):
        read_file(tmp_path / name)


def test_rows_that_a_task_cannot_learn_are_named_too(tmp_path, large):
    large()
    (tmp_path / "a.csv").write_text("text,label\nx,1\n,2\n")
    with raises(DataError, "a.csv", "line 3"):
        read_rows(tmp_path / "a.csv")
    said = [{"role": "user", "content": "x"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": said}))
    with raises(DataError, "b.jsonl", "line 1", "assistant"):
        read_conversations(tmp_path / "b.jsonl")


def test_a_row_is_read_only_when_it_is_asked_for(tmp_path, large, monkeypatch):
    lines = [json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    large()
    table = read_rows(tmp_path / "a.jsonl")
    read, pread = [], os.pread

    def counted(file, size, at):
        read.append(size)
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", counted)
    assert table.texts[700] == ("t700", None) and len(read) == 1
    monkeypatch.setattr("adapters_jax.finetune.data.lazy_rows.FEW", 10)
    some = table.take(range(500, 1000))
    assert isinstance(some.texts, Lazy) and len(read) == 1
    assert some.take([3]).texts == [("t503", None)] and len(read) == 2
    assert some.lines[3] == 504 and some.labels[3] == "1"
    (tmp_path / "a.jsonl").write_text("\n".join(lines[::-1]) + " ")
    with raises(DataError, "a.jsonl", "changed"):
        table.texts[1]


def test_groups_of_a_large_file_stay_together_and_few_rows_are_held_out():
    keys = [f"key {i // 2}" for i in range(100_000)]
    train, dev, test = split_streamed(keys, len(keys), 0, 0.1, 0.1)
    assert sorted([*train, *dev, *test]) == list(range(100_000))
    owners = [{keys[i] for i in part} for part in (train, dev, test)]
    assert not (owners[0] & owners[1] or owners[1] & owners[2] or owners[0] & owners[2])
    assert len(dev) == pytest.approx(4096, rel=0.1) and len(test) == pytest.approx(4096, rel=0.1)


@pytest.mark.slow
def test_a_large_group_of_a_large_file_trains():
    keys = ["the"] * 90_000 + [f"key {i}" for i in range(40_000)]
    _, *held = split_streamed(keys, len(keys), 0, 0.1, 0.1)
    assert [len(part) for part in held] == [4096, 4096]
    for seed in range(50):
        keys = [f"prompt {i}" for i in range(20) for _ in range(100)]
        parts = split_streamed(keys, len(keys), seed, 0.1, 0.1)
        assert [len(part) for part in parts] == [1600, 200, 200]
        assert [*map(list, parts)] == [*split_rows(keys, [0] * 2000, seed, 0.1, 0.1)]
    with raises(DataError, "60 rows with 1 distinct texts", "for dev", "dev file"):
        split_streamed(["the"] * 60, 60, 0, 0.1, 0.1)


def test_the_checksum_of_rows_is_that_of_their_json(tmp_path):
    write_meanings(tmp_path / "rows.csv")
    data = DataOptions((tmp_path / "rows.csv",), text="mr").load(TASKS["completion"])
    parts = [(p.texts, p.labels) for p in (data.train, data.dev, data.test)]
    import hashlib

    assert _sha256(data) == hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    streamed = replace(data.train, texts=Lazy(data.train.texts, lambda row: row))
    assert _sha256(replace(data, train=streamed)) == _sha256(data)


def chats(path, rows):
    asked = ["food " * (1 + i % 6) + ("Thai", "Greek")[i // 6 % 2] for i in range(rows)]
    turns = [
        [("user", a), ("assistant", "It serves"), ("user", "food"), ("assistant", "is Thai")]
        for a in asked
    ]
    said = [{"messages": [{"role": r, "content": t} for r, t in turn]} for turn in turns]
    path.write_text("\n".join(map(json.dumps, said)))


@pytest.mark.slow
@pytest.mark.witness("completion---pack", "conversation---no-pack")
@pytest.mark.parametrize("pack", ["--pack", "--no-pack"])
@pytest.mark.parametrize("kind", ["completion", "conversation"])
def test_a_streamed_run_is_that_of_the_rows_in_memory(
    kind, pack, tmp_path, large, monkeypatch, capsys
):
    write_llama(tmp_path / "llama", num_hidden_layers=1)
    chats(tmp_path / "chats.jsonl", 60)
    chats(tmp_path / "more.jsonl", 12)
    write_meanings(tmp_path / "rows.csv", 60)
    write_meanings(tmp_path / "few.csv", 12)
    files = {"conversation": ("chats.jsonl", "more.jsonl"), "completion": ("rows.csv", "few.csv")}
    train, held = (tmp_path / name for name in files[kind])
    flags = ["--model", tmp_path / "llama", "--train", train, "--dev", held, "--max-length", 32]
    flags += ["--method", "lora", "--rank", 2, "--epochs", 1, "--no-baselines", pack]
    flags += ["--test", tmp_path / f"test{held.suffix}"]
    (tmp_path / f"test{held.suffix}").write_bytes(held.read_bytes())
    if kind == "completion":
        flags += ["--prompt", "mr", "--completion", "ref", "--exact-match", 0]
    found = []
    for name, size in (("held", 2**28), ("streamed", held.stat().st_size)):
        large(size)
        monkeypatch.setattr(
            "adapters_jax.finetune.data.lazy_rows.FEW", 20 if size < 2**28 else 2**14
        )
        command = ["finetune", *flags, "--runs", tmp_path, "--name", name]
        assert main([*map(str, command)]) == 0
        assert ("stay in the file" in "".join(capsys.readouterr())) == (name == "streamed")
        run = tmp_path / name
        found.append((run / "metrics.jsonl").read_bytes())
        found.append((run / "adapter" / "adapter.safetensors").read_bytes())
    assert found[:2] == found[2:]
    hashes = [
        json.loads((tmp_path / name / "config.json").read_text())["data_sha256"]
        for name in ("held", "streamed")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_a_run_that_was_split_in_memory_is_resumed_with_these_rows(tmp_path, large, monkeypatch):
    monkeypatch.setattr("adapters_jax.finetune.data.splits.MOST_HELD", 3)
    write_llama(tmp_path / "llama", num_hidden_layers=1)
    write_meanings(tmp_path / "rows.csv", 60)
    flags = ["--model", tmp_path / "llama", "--train", tmp_path / "rows.csv", "--prompt", "mr"]
    flags += ["--completion", "ref", "--max-length", 32, "--runs", tmp_path, "--limit", 20]
    hashes = []
    for name, size in (("held", 2**28), ("streamed", 0)):
        large(size)
        command = parse(Finetune, [*map(str, flags), "--name", name])
        job = command.prepare(Console(json=False))
        job.run.unlock(job.lock)
        large()
        again = resume_run(job.run, Console(json=False), 0.0)
        again.run.unlock(again.lock)
        assert again.config == job.config and job.config.get("streamed", False) == (not size)
        hashes.append(job.config["data_sha256"])
    assert hashes[0] != hashes[1]


_PEAK = """
import resource, sys
from pathlib import Path
from adapters_jax.finetune.data.datasets import overlaps
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.runs.config import _sha256
from adapters_jax.finetune.runs.prepare import resume_run
from adapters_jax.finetune.tasks import TASKS

data = DataOptions((Path(sys.argv[1]),), text="text").load(TASKS["completion"])
_sha256(data), overlaps(data)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.weekly
def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(megabytes):
        path, text = tmp_path / "rows.jsonl", "It serves Thai dishes " * 180
        with path.open("w") as file:
            for i in range(megabytes * 2**20 // len(text)):
                file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, path], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    assert peak(256) < peak(1) + 100
