"""Hostile adapter files: nothing but our own errors, in little time and memory, and no effect.

The same 2,000 each time; with `--slow` 50,000, drawn anew.
"""

import json
import math
import os
import time
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors
from flax import nnx
from helpers.hostile import NODES, RECIPES, X, linen_base, nnx_base, save, spoilt, taken_apart
from hypothesis import HealthCheck, Phase, given, settings

import adapters_jax as aj
from adapters_jax.io.adapter import TENSORS, read_adapter
from adapters_jax.io.manifest import CONFIG
from adapters_jax.trees import flatten

USUAL, MANY = 2000, 50_000
SHARE = 10  # for so many files one is loaded onto a model as well


def fuzzed(slow, share=1):
    return settings(
        max_examples=(MANY if slow else USUAL) // share,
        deadline=None,
        database=None,
        derandomize=not slow,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def adapters(place):
    """The files of valid adapters, by door and method."""
    return {
        f"{door}-{name}": {file: (directory / file).read_bytes() for file in (TENSORS, CONFIG)}
        for door in ("linen", "nnx")
        for name in RECIPES
        for directory in [save(place, door, name)]
    }


def written(place, files, whole):
    """A directory with these files, or what stands in their place, where a link may lead out."""
    directory = place / "hostile"
    for old in directory.iterdir() if directory.exists() else ():
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            (place / "elsewhere").write_bytes(whole[name])
            NODES[content](directory, directory / name)
    return directory


def state_of(directory):
    """What is there, down to sizes and times."""
    seen = []
    for parent in (directory.parent, directory):
        with os.scandir(parent) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                seen.append((entry.name, status.st_mode, status.st_size, status.st_mtime_ns))
    return sorted(seen)


def said_elsewhere(files):
    """The recipe and the tensors, read by others' code; fails for what no reader may accept."""
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
    """What a function returns, and what it says in an error of ours; it has a second for that."""
    for _ in range(3):  # a collection of garbage may have fallen into it
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


def test_a_spoilt_file_is_refused_or_says_what_is_in_it(place, adapters, slow):
    outcomes = {True: 0, False: 0}

    @fuzzed(slow)
    @given(spoilt(adapters))
    def run(case):
        whole, files = adapters[case.adapter], case.files
        directory = written(place, files, whole)
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
            assert (recipe, raw(tensors)) == said_elsewhere(files)
        if case.says_the_same:
            assert got, message
            assert said_elsewhere(whole) == said_elsewhere(files)
        outcomes[got is not None] += 1

    run()
    assert min(outcomes.values()) > USUAL // 50, outcomes


@pytest.mark.parametrize("door", ["linen", "nnx"])
def test_a_spoilt_file_is_not_loaded_and_leaves_the_model_as_it_is(place, adapters, door, slow):
    base = linen_base() if door == "linen" else (nnx_base(), None)
    tree = (lambda: base[1]) if door == "linen" else (lambda: nnx.state(base[0]))
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(tree())]
    of_door = {key: files for key, files in adapters.items() if key.startswith(door)}
    loaded = 0

    @fuzzed(slow, 2 * SHARE)
    @given(spoilt(of_door))
    def run(case):
        nonlocal loaded
        files = case.files
        directory = written(place, files, adapters[case.adapter])
        seen = state_of(directory)
        model, message = outcome(aj.load_adapter, directory, *base, X)
        assert model or (str(directory) in message and len(message) < 9000)
        assert model or not case.says_the_same, message
        if model:
            loaded += 1
            whole = flatten(model[1]) if door == "linen" else flatten(nnx.state(model, nnx.Param))
            for name, (shape, data) in said_elsewhere(files)[1].items():
                assert (whole[name].shape, np.asarray(whole[name]).tobytes()) == (shape, data)
        assert state_of(directory) == seen
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves(tree())] == before

    run()
    assert loaded
