"""Data sets of the Hugging Face Hub: which files a name means, online, offline and absent."""

import io
import json
from pathlib import Path

import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.hub_server import serving
from helpers.tiny import write_model

from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.data.files import DataError
from adapters_jax.finetune.data.hub_rows import HubData, choose_files
from adapters_jax.finetune.data.readers import read_file, title_of
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.flags import from_plain, plain, words

pytest.importorskip("pyarrow.parquet")
constants = pytest.importorskip("huggingface_hub.constants")
CONVERTED = "refs/convert/parquet"


def parquet(start, count):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"film {i}", "label": i % 2} for i in range(start, start + count)]
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path / "cache") as server:
        server.add("them/films")
        parts = [(split, i) for split in ("train", "test") for i in (0, 1)]
        files = {f"default/{s}/{i}.parquet": parquet(10 * i, 10) for s, i in parts}
        server.commit("them/films", CONVERTED, {**files, "README.md": b"x"})
        own = {
            "data/train-00000-of-00001.parquet": parquet(50, 3),
            "fr/train.parquet": parquet(9, 1),
        }
        server.commit("them/films", "v1", own)
        yield server


def values(name):
    return [row for _, row in read_file(name)[1]]


def test_names():
    assert HubData.of("hub:a/b") == ("a/b", None, "train", CONVERTED)
    assert HubData.of("hub:a#c:d@refs/pr/1") == ("a", "c", "d", "refs/pr/1")
    assert title_of("hub:user/name#en:train@v1.0") == "name-en-train-v1"
    for name in ("hub:", "hub:a/b/c", "hub:../x", "hub:a:b:c@"):
        with raises(DataError, name, "hub:user/name#config:split@revision"):
            HubData.of(name)


def test_a_split_is_a_folder_or_begins_names():
    files = [
        "en/train/0.parquet",
        "en/train/1.parquet",
        "fr/train/0.parquet",
        "fr/trainer/0.parquet",
    ]
    chosen = choose_files("x", HubData.of("hub:a#en"), files)
    assert chosen == ["en/train/0.parquet", "en/train/1.parquet"]
    with raises(DataError, "x", "en, fr", "hub:a#en:train"):
        choose_files("x", HubData.of("hub:a"), files)
    with raises(DataError, "'dev'", "en/train/0.parquet"):
        choose_files("x", HubData.of("hub:a:dev"), files)
    with raises(DataError, "'de'", "'train'"):
        choose_files("x", HubData.of("hub:a#de"), files)
    partial = ["default/partial-train/0.parquet", "other/train/0.parquet"]
    assert choose_files("x", HubData.of("hub:a"), partial) == partial[:1]
    flat = ["train.parquet", "train-00000-of-00001.parquet", "train-old.parquet", "trains.parquet"]
    assert choose_files("x", HubData.of("hub:a"), flat) == sorted(flat[:2])


def test_online_then_offline(server, monkeypatch):
    online = values("hub:them/films:test")
    assert online == [[f"film {i}", i % 2] for i in range(20)]
    assert read_file("hub:them/films:test")[1][10][0] == "row 1 of 1.parquet"
    assert values("hub:them/films@v1") == [["film 50", 0], ["film 51", 1], ["film 52", 0]]
    assert values("hub:them/films#fr@v1") == [["film 9", 1]]
    fetched = {path for path in server.asked if "/resolve/" in path}
    assert len(fetched) == 4 and not any("README" in path for path in fetched)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert values("hub:them/films:test") == online
    with raises(DataError, "'train'", "default/test/0.parquet"):
        values("hub:them/films:train")
    with raises(DataError, "'them/other'", "HF_HUB_OFFLINE"):
        values("hub:them/other")


def test_what_the_hub_lacks(server):
    with raises(DataError, "'them/other'"):
        values("hub:them/other")
    with raises(DataError, "'them/films'", "'v9'"):
        values("hub:them/films@v9")


def test_the_options_keep_a_name_of_the_hub():
    options = DataOptions(train=(Path("hub:them/films:train"),), dev=Path("dev.csv"))
    stored = plain(options)
    assert stored["train"] == ["hub:them/films:train"] and Path(stored["dev"]).is_absolute()
    assert from_plain(DataOptions, stored).train == options.train
    assert words(options)[0] == "--train=hub:them/films:train"


@pytest.mark.slow
def test_commands_take_names_of_the_hub(server, capsys):
    assert main(["data", "hub:them/films", "hub:them/films:test", "--json"]) == 0
    train, test = map(json.loads, capsys.readouterr().out.splitlines())
    assert (train["rows"], test["shared"]) == (20, 20)
    write_model(Path("bert"))
    with command_raises(DataError, "them/films", "'dev'"):
        line = "finetune --model bert --train hub:them/films --dev hub:them/films:dev"
        assert main(line.split()) == 2
