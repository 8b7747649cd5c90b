"""Hostile runs, and names that no system takes: each is one sentence, of the command line too."""

import copy
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flax import nnx
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.reports import CONFIG, write_compared, write_page

import adapters_jax as aj
from adapters_jax.errors import FileSystemError, UserError
from adapters_jax.files import atomic, hub
from adapters_jax.files.atomic import write_file
from adapters_jax.files.checksums import CHECKSUMS, damage
from adapters_jax.files.destinations import empty_directory
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.compare.cells import Cells
from adapters_jax.finetune.compare.grid import Cell
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
from adapters_jax.finetune.report.run import results_table
from adapters_jax.finetune.run_directory import Run, RunConfigError, RunError
from adapters_jax.finetune.tasks import TASKS, read_run

pytestmark = pytest.mark.hostile

LONG = "x" * 5000
WHOLE = {**CONFIG, "base_sha256": "0", "dtype": "float32", "max_length": 8, "pooling": "mean"}
RESULT = WHOLE["summary"]["results"][0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its page."""
    place = tmp_path_factory.mktemp("run")
    write_page(place, WHOLE)
    run = Run(place / "a run")
    run.write_config(WHOLE)
    return run


def with_summary(**values):
    return {"summary": {**WHOLE["summary"], **values}}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"summary": 5}, "summary"),
        ({"summary": None}, "summary"),
        ({"summary": {}}, "summary"),
        (with_summary(results=[{}]), "summary"),
        (with_summary(results=[{**RESULT, "method": ["x"]}]), "summary"),
        (with_summary(results=[{**RESULT, "trainable_parameters": "many"}]), "summary"),
        (with_summary(results=[{**RESULT, "test": {"f1": "high"}}]), "summary"),
        (with_summary(results=[{**RESULT, "test": {"f1": True}}]), "summary"),
        (with_summary(dev=[0.5]), "summary"),
        ({"method": ["lora"]}, "method"),
        ({"task": 5}, "task"),
        ({"metrics": "f1"}, "metrics"),
        ({"metrics": [1]}, "metrics"),
        ({"rows": {"train": 1, "dev": 2}}, "rows"),
        ({"optimizer": None}, "optimizer"),
        ({"data_sha256": 0}, "data_sha256"),
    ],
)
def test_results_of_another_form_are_named(run, changes, name):
    run.write_config({**WHOLE, **changes})
    with raises(RunError, run.config, name):
        read_run(run)
    run.write_config(WHOLE)
    assert read_run(run)[1]["summary"] == WHOLE["summary"]


def test_a_run_that_others_were_combined_to_has_no_results(run):
    for summary in ({"summary": {"results": []}}, {}):
        combined = {k: v for k, v in WHOLE.items() if k not in ("summary", "metrics")}
        run.write_config(copy.deepcopy({**combined, **summary}))
        assert read_run(run)[1].get("summary", {"results": []}) == {"results": []}
    run.write_config(WHOLE)


def test_results_without_a_metric_of_the_run_are_one_sentence():
    with raises(RunError, "f1", "config.json"):
        results_table([{**RESULT, "test": {"accuracy": 1.0}}], ["f1"])


@pytest.mark.parametrize(
    "record",
    [
        *("5", "[" * 100_000),
        *('{"step": 1}', '{"method": "<lora>", "step": [], "loss": 1}'),
        f'{{"method": "<lora>", "step": 3, "loss": {10**400}}}',
    ],
    ids=["a number", "brackets", "no method", "a list", "no float"],
)
def test_metrics_of_another_form_are_one_sentence(run, record):
    before = run.metrics.read_text()
    run.metrics.write_text(f"{before}{record}\n")
    with command_raises(RunError, run.path):
        assert main(["report", str(run.path)]) == 2
    run.metrics.write_text(before)


@pytest.mark.parametrize("hostile", ["brackets", "no metric"])
def test_comparisons_of_another_form_are_one_sentence(tmp_path, hostile):
    summary = write_compared(tmp_path / "out")
    if hostile == "brackets":
        (tmp_path / "out" / "cells.jsonl").write_text("[" * 100_000)
    else:
        (tmp_path / "out" / "comparison.json").write_text(json.dumps({**summary, "metrics": []}))
    with command_raises(RunError, tmp_path / "out"):
        assert main(["report", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("summary", [{"results": []}, {"dev": {}, "results": []}])
def test_a_cell_without_its_results_is_named(tmp_path, summary):
    cells, cell = Cells(tmp_path, {}), Cell("lora", 1e-3, 0)
    cells.run(cell).create({**WHOLE, "summary": summary})
    with raises(RunError, cells.run(cell).config, "trainable_parameters"):
        cells.result(cell)


def test_a_name_that_is_too_long_is_one_sentence(capsys, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,2\n")
    finetune = ["finetune", "--model", "none", "--train", str(tmp_path / "rows.csv")]
    for words in (
        *(["audit", "--model", LONG], ["data", LONG], ["predict", LONG, "text"], ["report", LONG]),
        *([*finetune, "--name", LONG], [*finetune, "--runs", LONG]),
        *(
            ["finetune", "--resume", LONG],
            ["serve", LONG],
            ["convert", LONG, "out", "--to", "peft"],
        ),
    ):
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith(f"adapters-jax {words[0]}: ") and "xxx" in line


def test_names_of_the_python_api_that_are_too_long_are_our_errors():
    assert not hub.is_adapter_id(f"{LONG}/../x")
    with raises(RunConfigError, LONG[:100]):
        Run(Path(LONG)).read_config()
    with raises(UserError, LONG[:100]):
        load_pretrained_decoder(f"{LONG}/x/y")
    with raises(aj.AdapterFileError, LONG[:100]):
        aj.load_adapter(f"{LONG}/x/y", nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def test_checksums_name_no_file_outside(tmp_path):
    (tmp_path / "outside").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    seal = [1, hashlib.sha256(b"1").hexdigest()]
    (root / "link").symlink_to(tmp_path, target_is_directory=True)
    names = ("../outside", str(tmp_path / "outside"), "link/outside")
    for name in (*names, "/proc/kmsg"):  # whose reader waits
        (root / CHECKSUMS).write_text(json.dumps({name: seal}))
        assert f"{CHECKSUMS} names {name!r}" in (damage(root) or "")


def test_several_that_write_one_file_at_once_leave_one_whole_file(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            list(pool.map(lambda data: write_file(tmp_path / "a", data), contents))
            assert (tmp_path / "a").read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]


def test_no_two_writers_of_a_file_share_a_temporary_one(tmp_path, monkeypatch):
    seen, write = [], atomic._write
    monkeypatch.setattr(atomic, "_write", lambda path, data: (seen.append(path), write(path, data)))
    for _ in range(3):
        write_file(tmp_path / "a", b"1")
    assert len({*seen}) == 3


def test_a_directory_that_is_absent_empty_or_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "a").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("absent", "empty"):
        assert empty_directory(tmp_path / name) == tmp_path / name
    for name in ("full", "file"):
        with raises(UserError, tmp_path / name):
            empty_directory(tmp_path / name)
    with raises(FileSystemError, LONG):
        empty_directory(tmp_path / LONG)


def test_a_directory_that_another_process_moves_away_meanwhile_is_free(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    listed = os.listdir

    def moved(path):
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        return listed(path)

    monkeypatch.setattr(os, "listdir", moved)
    assert empty_directory(tmp_path / "out") == tmp_path / "out"


@pytest.mark.parametrize("name", ["..", ".", "", "a/b"])
def test_a_name_that_is_not_one_directory(tmp_path, name):
    with command_raises(RunError, repr(name), "--runs"):
        assert main(["finetune", "--runs", str(tmp_path / "runs"), "--name", name]) == 2
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("target", [{}, {"name": ["no"] * 400}, {"names": "no"}])
def test_a_damaged_target_is_one_sentence_with_the_file_and_the_target(target, tmp_path):
    run = Run(tmp_path)
    with raises(RunError, str(run.config), repr(target)[:100]) as caught:
        TASKS["classification"].readout_of(run, {"target": target})
    assert len(str(caught.value)) < 1000
