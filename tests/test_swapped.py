"""Files that someone swaps between a check and the use: what was checked is what is read."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from helpers.errors import raises
from safetensors.numpy import save_file

from adapters_jax.errors import AdapterFileError, BaseFileError, FileSystemError, UserError
from adapters_jax.files.adapter import TENSORS, _writer
from adapters_jax.files.atomic import write_directory, write_file
from adapters_jax.files.lock import lock_directory, unlock_directory
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune import merging
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.cli import predict
from adapters_jax.finetune.gguf.header import read_header
from adapters_jax.finetune.run_directory import Run

pytestmark = pytest.mark.hostile

INSIDE, SECRET = {"is": "inside"}, {"is": "secret"}


@pytest.fixture
def place(tmp_path):
    """A directory whose file is a link to one in a folder; the same names are outside of it."""
    for name, values in (("inside/folder", INSIDE), ("outside", SECRET)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.json").write_text(json.dumps(values))
    (tmp_path / "inside" / "a.json").symlink_to("folder/a.json")
    return tmp_path / "inside"


def _file_by(make):
    def swap(place):
        (place / "folder" / "a.json").unlink()
        make(place / "folder" / "a.json")

    return swap


def _folder(place):
    (place / "folder").rename(place / "before")
    (place / "folder").symlink_to("../outside")


SWAPS = {
    "a link out": _file_by(lambda path: path.symlink_to("../../outside/a.json")),
    "a pipe": _file_by(os.mkfifo),
    "a directory": _file_by(os.mkdir),
    "a link to a device": _file_by(lambda path: path.symlink_to("/dev/zero")),
    "a folder by a link out": _folder,
}


WHEN = {"resolved": None, "before the root": 0, "before the folder": 1, "before the file": 2}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", SWAPS)
def test_a_swap_at_any_instant_is_an_error_or_too_late(place, monkeypatch, kind, when):
    resolve, opens, calls = os.path.realpath, os.open, []

    def resolved(path, **options):
        found = resolve(path, **options)
        if path == place / "a.json":
            SWAPS[kind](place)
        return found

    def hooked(*args, **options):
        calls.append(args[0])
        if len(calls) - 1 == WHEN[when]:
            SWAPS[kind](place)
        return opens(*args, **options)

    monkeypatch.setattr(os, "open", hooked)
    if WHEN[when] is None:
        monkeypatch.setattr(os.path, "realpath", resolved)
    if (kind, when) == ("a folder by a link out", "before the file"):  # it was entered by then
        assert read_json(place / "a.json") == INSIDE
    else:
        with raises(AdapterFileError, place / "a.json"):
            read_json(place / "a.json")
    assert calls[:3] == [str(place), "folder", "a.json"][: len(calls)]


SWAPPER = """
import os, sys
os.chdir(sys.argv[1])
print(flush=True)
while True:
    for name in ("link", "pipe", "folder/b.json"):
        os.link(name, "next", follow_symlinks=False)
        os.replace("next", "folder/a.json")
    os.rename("folder", "aside"), os.rename("out", "folder")
    os.rename("folder", "out"), os.rename("aside", "folder")
"""


def test_nothing_outside_is_read_while_another_process_swaps_for_ever(place):
    (place / "folder" / "b.json").write_text(json.dumps(INSIDE))
    (place / "out").symlink_to("../outside")
    (place / "link").symlink_to("../../outside/a.json")
    os.mkfifo(place / "pipe")
    command = [sys.executable, "-I", "-S", "-c", SWAPPER, str(place)]
    outcomes = {"inside": 0, "error": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as swapper:
        try:
            swapper.stdout.readline()
            for _ in range(4000):
                try:
                    outcomes[read_json(place / "a.json")["is"]] += 1
                except AdapterFileError:
                    outcomes["error"] += 1
        finally:
            swapper.kill()
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize("kind", [None, *SWAPS])
def test_no_descriptor_is_left_whatever_is_wrong(place, kind):
    before = sorted(os.listdir("/dev/fd"))
    if kind is None:
        assert read_json(place / "a.json") == INSIDE
    else:
        SWAPS[kind](place)
        with raises(AdapterFileError, place / "a.json"):
            read_json(place / "a.json")
    assert sorted(os.listdir("/dev/fd")) == before


def test_a_base_that_is_replaced_after_it_was_listed_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(3, np.float32)}, path)
    (listed,) = huggingface.read_file(path).values()
    np.testing.assert_array_equal(listed, np.ones(3))
    save_file({"a": np.full(3, 2.0, np.float32)}, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    with raises(BaseFileError, path, "replaced"):
        np.asarray(listed)
    (listed,) = huggingface.read_file(path).values()
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(1, 1))
    with raises(BaseFileError, path, "replaced"):
        np.asarray(listed)


def test_a_gguf_file_that_is_replaced_after_it_was_listed_is_an_error(tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import CONFIG, build, tensors_of, write

    path = write(tmp_path / "a.gguf", tensors_of(build(CONFIG)))
    tensor = next(iter(read_header(path)[1].values()))
    tensor.bytes(), [row.bytes() for row in tensor.rows("{}")]
    os.replace(write(tmp_path / "b.gguf", tensors_of(build(CONFIG))), path)
    for part in (tensor, *tensor.rows("{}")):
        with raises(BaseFileError, path, "replaced"):
            part.bytes()


# Locks.


def test_a_lock_that_is_a_link_leaves_its_target_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "diary").write_text("kept")
    (tmp_path / "run" / "lock").symlink_to("../diary")
    with raises(FileSystemError, tmp_path / "run" / "lock"):
        lock_directory(tmp_path / "run", UserError)
    assert (tmp_path / "diary").read_text() == "kept"


@pytest.mark.parametrize("content", ["\x1b[2J", "1" * 50, "", None], ids=repr)
def test_whatever_names_the_holder_of_a_lock_is_shown_plainly(tmp_path, content):
    lock = lock_directory(tmp_path, UserError)
    holder = tmp_path / "lock.pid"
    with raises(UserError, str(os.getpid()), "this one"):
        lock_directory(tmp_path, UserError)
    holder.unlink()
    os.mkfifo(holder) if content is None else holder.write_text(content)
    with raises(UserError, tmp_path, "another process") as caught:
        lock_directory(tmp_path, UserError)
    assert str(caught.value).isprintable()
    unlock_directory(tmp_path, lock)


# What is written.


def test_a_merged_checkpoint_takes_no_file_from_outside_along(place):
    (place / "vocab.txt").symlink_to("../outside/a.json")
    (place / "merged").mkdir()
    with raises(BaseFileError, place / "vocab.txt", "outside"):
        merging._copy(place, ("a.json", "absent", "vocab.txt"), place / "merged")
    assert json.loads((place / "merged" / "a.json").read_text()) == INSIDE
    assert os.listdir(place / "merged") == ["a.json"]


def test_predictions_do_not_overwrite_a_file_that_appears_meanwhile(tmp_path):
    (tmp_path / "out.jsonl").write_text("kept")
    with raises(FileSystemError, tmp_path / "out.jsonl"):
        predict._save(tmp_path / "out.jsonl", [], [])
    assert (tmp_path / "out.jsonl").read_text() == "kept"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read_what_is_written(tmp_path, mask):
    old = os.umask(mask)
    try:
        tensors = {"a": np.ones(2, np.float32)}
        write = _writer(tensors, tmp_path / "adapter" / TENSORS)
        write_directory(tmp_path / "adapter", {TENSORS: write, "config.json": b"{}"})
        write_file(tmp_path / "alone.safetensors", write)
        Run(tmp_path / "run").create({})
        with merging._whole(tmp_path / "merged"):
            pass
    finally:
        os.umask(old)
    for path in sorted(tmp_path.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
