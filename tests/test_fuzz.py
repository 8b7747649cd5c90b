"""Hostile files raise only our own errors, in little time and memory, and change nothing.

Each run reads the same spoilt files; with `--slow` it reads more. `python -m tests.fuzz` reads
as many as one likes.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from flax import nnx
from fuzz.cases import Fuzzer, load, replay, save
from fuzz.corpus import CORPUS
from fuzz.forked import Forked
from fuzz.mutators import NODES, Choices, spoilt, taken_apart
from fuzz.targets import TARGETS, files_of
from helpers import hostile
from helpers.hostile import X, linen_base, nnx_base

import adapters_jax as aj
from adapters_jax.files.adapter import TENSORS, read_adapter
from adapters_jax.files.manifest import CONFIG
from adapters_jax.trees import flatten

pytestmark = pytest.mark.hostile

USUAL, MANY = 1000, 2500
FEW = 60  # files of each reader
FEWER = {"base": 6, "checkpoint": 20, "upload": 12}  # of those that take long
ADAPTER = TARGETS["adapter"]


@pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")  # as in fuzz/cases.py
@pytest.mark.parametrize("target", TARGETS)
def test_spoilt_files_end_in_documented_errors(target, tmp_path):
    fuzzer, refused = Fuzzer(target, tmp_path), 0
    for number in range(FEWER.get(target, FEW)):
        case = fuzzer.numbered(0, number)
        error, wrong = fuzzer.outcome(case)
        assert not wrong, save(f".fuzz/failures/{target}-0-{number}.json", target, wrong, case)
        refused += error is not None
    assert refused


@pytest.fixture(scope="module")
def forked():
    with Forked() as found:
        yield found


@pytest.mark.parametrize("name", CORPUS)
def test_files_made_by_hand_end_in_documented_errors(name, forked):
    wrong = forked.wrong(name)
    assert not wrong, wrong


HARMS = {  # what a reader does, and what is said of it
    "raise ValueError('odd')": "ValueError at <string>:1: odd",
    "pass": "it was read",
    "os.abort()": "the process ended with -6",
    "os._exit(0)": "the process ended with 0",
    "subprocess.run(['gs'])": "subprocess.Popen 'gs'",
    "socket.create_connection(('127.0.0.1', 9))": "socket.connect",
    "while True: pass": "the process ended with -24",
    "while time.process_time() < began + 3: pass": "it took 3.",
    "held.append(bytearray(2**27))": "expected at most",
    "bytearray(2**35)": "MemoryError",
    "raise UserError": "",
}
ODD = """
import json, os, socket, subprocess, sys, time
from fuzz import corpus, forked, targets
from adapters_jax.errors import UserError

def read(directory):
    harm = (directory / "rows.csv").read_text()
    exec(harm, globals() | {"began": time.process_time(), "held": []})
    if harm != "good" and (harm.startswith("held") or harm.startswith("while")):
        raise UserError("late")

good, forked.MOST_SECONDS = "0", 5
targets.TARGETS["odd"] = targets.Target(lambda _: {"good": {"rows.csv": b"good"}}, read)
for harm in json.loads(sys.argv[1]):
    corpus.CORPUS[harm] = corpus.Entry("odd", "rows.csv", harm.encode())
    print(json.dumps(forked.answered(harm)), flush=True)
"""


def test_whatever_a_reader_does_is_reported():
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", ODD, json.dumps([*HARMS])]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(HARMS), done.stderr
    for said, (harm, expected) in zip(found, HARMS.items(), strict=True):
        assert expected in said if expected else not said, (harm, said)


def test_a_failure_is_a_file_that_repeats_it(tmp_path, monkeypatch):
    def read(directory):
        if b"{" not in (directory / "rows.csv").read_bytes():
            raise IndexError("no brace")

    good = {"rows": {"rows.csv": b"{}"}}
    monkeypatch.setitem(TARGETS, "odd", type(TARGETS["csv"])(lambda _: good, read, own=True))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fuzzer = Fuzzer("odd", tmp_path / "a")
    cases = [fuzzer.case(Choices(bytes([n, n, n]))) for n in range(40)]
    outcomes = [(case, fuzzer.outcome(case)[1]) for case in cases]
    case, wrong = next(each for each in outcomes if "IndexError" in each[1])
    command = save(tmp_path / "case.json", "odd", wrong, case)
    assert command.endswith(f"--replay {tmp_path / 'case.json'}")
    assert load(tmp_path / "case.json")[1].files == case.files
    assert replay(tmp_path / "case.json", tmp_path / "b") == wrong
    assert [each for each in outcomes if not each[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def adapters(folder):
    """The files of valid adapters, by API and method."""
    return {
        f"{api}-{name}": files_of(hostile.save(folder, api, name)) for api, name in hostile.EVERY
    }


def cases(count, adapters):
    """Spoilt files of adapters, the same in each run."""
    for number in range(count):
        yield spoilt(random.Random(number), adapters, more=ADAPTER.more, rounds=1)


def written(folder, files, whole):
    """A directory with these files; a text is a key of `NODES` and makes that node."""
    directory = folder / "hostile"
    for old in directory.iterdir() if directory.exists() else ():
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            (folder / "elsewhere").write_bytes(whole[name])
            NODES[content](directory, directory / name)
    return directory


def state_of(directory):
    """The entries of a directory and its parent, with sizes and times."""
    seen = []
    for parent in (directory.parent, directory):
        with os.scandir(parent) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                seen.append((entry.name, status.st_mode, status.st_size, status.st_mtime_ns))
    return sorted(seen)


def read_independently(files):
    """The recipe and the tensors, read by other code; fails for files that no reader may accept."""
    header, _ = taken_apart(files[TENSORS])
    names = [name for name, _ in header]
    assert len(set(names)) == len(names)
    assert not [n for n in names if not n.isprintable() or {"", ".", ".."} & set(n.split("/"))]
    tensors = {
        name: (tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(files[TENSORS])
    }
    config = json.loads(files[CONFIG])
    assert config["tensors"] == len(tensors)
    assert config["parameters"] == sum(math.prod(shape) for shape, _ in tensors.values())
    return aj.Recipe.from_json(config["recipe"]), tensors


def raw(tensors):
    assert all(np.isfinite(np.asarray(x)).all() for x in tensors.values())
    return {name: (x.shape, np.asarray(x).tobytes()) for name, x in tensors.items()}


def outcome(function, *args):
    """What a function returns within a second, and else the message of our error."""
    for _ in range(3):  # a garbage collection may have fallen into it
        began = time.thread_time()
        try:
            found = function(*args), ""
        except aj.AdapterFileError as error:
            found = None, str(error)
        if time.thread_time() - began < 1:
            return found
    raise AssertionError(f"it takes over a second: {found}")


def size_of(files):
    return sum(len(content) for content in files.values() if isinstance(content, bytes))


@pytest.mark.weekly
def test_a_spoilt_file_raises_our_error_or_reads_as_other_readers_read_it(folder, adapters, slow):
    outcomes = {True: 0, False: 0}
    for case in cases(MANY if slow else USUAL, adapters):
        whole, files = adapters[case.seed], case.files
        directory = written(folder, files, whole)
        before = state_of(directory)
        tracemalloc.start()
        got, message = outcome(read_adapter, directory)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        arrays = sum(x.nbytes for x in got[1].values()) if got else 0
        assert state_of(directory) == before
        assert got or (str(directory) in message and len(message) < 4000)
        assert used + arrays < 2 * size_of(files) + 2**20
        if got:
            recipe, tensors = got
            assert (recipe, raw(tensors)) == read_independently(files)
        if case.is_equal:
            assert got, message
            assert read_independently(whole) == read_independently(files)
        outcomes[got is not None] += 1
    assert min(outcomes.values()) > USUAL // 50, outcomes


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_spoilt_file_is_not_loaded_and_leaves_the_model_as_it_is(folder, adapters, api, slow):
    base = linen_base() if api == "linen" else (nnx_base(), None)
    tree = (lambda: base[1]) if api == "linen" else (lambda: nnx.state(base[0]))
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(tree())]
    of_api = {key: files for key, files in adapters.items() if key.startswith(api)}
    loaded = 0
    for case in cases((MANY if slow else USUAL) // 20, of_api):
        files = case.files
        directory = written(folder, files, adapters[case.seed])
        seen = state_of(directory)
        model, message = outcome(aj.load_adapter, directory, *base, X)
        assert model or (str(directory) in message and len(message) < 9000)
        assert model or not case.is_equal, message
        if model:
            loaded += 1
            whole = flatten(model[1]) if api == "linen" else flatten(nnx.state(model, nnx.Param))
            for name, (shape, data) in read_independently(files)[1].items():
                assert (whole[name].shape, np.asarray(whole[name]).tobytes()) == (shape, data)
        assert state_of(directory) == seen
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves(tree())] == before
    assert loaded
