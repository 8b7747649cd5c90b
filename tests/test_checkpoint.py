"""Checkpoints: exact, complete, checked, and never lost to the next one."""

import errno
import hashlib
import itertools
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.checkpoint import CheckpointError, Checkpoints
from adapters_jax.files.checksums import CHECKSUMS, write_checksums
from adapters_jax.files.identity import tree_sha256
from adapters_jax.placement.patterns import checked_before
from adapters_jax.trees import flatten

RECIPE = aj.Recipe(aj.LoRA("dense", 2), aj.Unfreeze("dense/bias"))


class Linen(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(self.width, name="dense")(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(x))


def optimizer(recipe):
    """One with all kinds of state: counts, moments, accumulated gradients, a mask and a group."""
    groups = {"**/lora/b": optax.sgd(0.1, momentum=0.9)}
    inner = aj.freeze_base(optax.adamw(0.1), recipe, groups)
    return optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), inner), 2)


def new_state(api, recipe=RECIPE, width=8):
    if api == "linen":
        base = Linen(width)
        model = aj.adapt(base, recipe)
        x = jnp.ones((1, 4))
        params = base.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)["params"]
        params = aj.init_adapters(model, params, jax.random.key(2), x, train=False)
        return aj.TrainState.create(model, params, tx=optimizer(recipe), key=jax.random.key(3))
    model = aj.adapt(Nnx(nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
    return aj.TrainState.create(model, tx=optimizer(recipe), key=jax.random.key(3))


def new_step(api):
    if api == "linen":
        model = aj.adapt(Linen(), RECIPE)

        def loss(params, batch, key):
            return jnp.mean(model.apply({"params": params}, batch, rngs={"dropout": key}) ** 2)

    else:

        def loss(model, batch, key):
            return jnp.mean(model(batch) ** 2)

    return aj.make_train_step(loss)


def batch(step):
    return jax.random.normal(jax.random.key(100 + step), (16, 4))


def bits(state):
    """Everything that changes in training, as bytes."""
    leaves = (state.step, state.adapters, state.opt_state, state.key, state.other)

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(leaves)]


def advance(api, state, first, last):
    step = new_step(api)
    for i in range(first, last):
        state, _ = step(state, batch(i))
    return state


@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_last_bit(api, tmp_path):
    straight = advance(api, new_state(api), 0, 7)
    with Checkpoints(tmp_path) as checkpoints:
        state = advance(api, new_state(api), 0, 3)
        checkpoints.save(3, state, progress={"loss": 0.1})
        state = advance(api, state, 3, 5)  # uses up what was saved
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(new_state(api))
    assert (found.step, found.best, found.progress) == (3, None, {"loss": 0.1})
    assert bits(found.state) != bits(straight)
    assert not any(x.committed for x in jax.tree.leaves(found.state.adapters))  # as before training
    assert bits(advance(api, found.state, 3, 7)) == bits(straight)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_frozen_factors_of_a_method_are_those_of_the_checkpoint(api, tmp_path):
    def new(seed, x=jnp.ones((1, 4))):  # VeRA's modules share frozen factors, which are drawn
        recipe, tx, key = aj.vera(2, targets="dense"), optax.sgd(0.1), jax.random.key(3)
        if api == "nnx":
            model = aj.adapt(nnx.Dict(dense=nnx.Linear(4, 8, rngs=nnx.Rngs(0))), recipe,
                             rngs=nnx.Rngs(seed))  # fmt: skip
            return aj.TrainState.create(model, tx=tx, key=key)
        base = Linen()
        params = base.init(jax.random.key(0), x, train=False)["params"]
        model = aj.adapt(base, recipe)
        params = aj.init_adapters(model, params, jax.random.key(seed), x, train=False)
        return aj.TrainState.create(model, params, tx=tx, key=key)

    def factors(state):
        return {p: x for p, x in flatten(state.kept).items() if p not in flatten(state.trained)}

    first, other = new(1), new(2)
    expected, before = factors(first), factors(other)
    assert expected and all(np.abs(x[...] - before[p][...]).max() > 0 for p, x in expected.items())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first)
        got = checkpoints.restore(other).state
    assert all((x[...] == expected[path][...]).all() for path, x in factors(got).items())
    kernel = flatten(got.base)["dense/kernel"][...]
    assert (kernel == flatten(first.base)["dense/kernel"][...]).all()


def saved(directory, scores, api="linen"):
    """Checkpoints of a few steps with these scores; the state after each, as bits."""
    state, found = new_state(api), []
    with Checkpoints(directory) as checkpoints:
        for i, score in enumerate(scores):
            state = advance(api, state, i, i + 1)
            checkpoints.save(i + 1, state, score=score, best=jax.device_get(state.adapters))
            found.append(bits(state))
    return found


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    after = saved(tmp_path, [1.0, 3.0, 2.0, None, None])
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([2, 4, 5], 2)
        assert bits(checkpoints.restore(new_state("linen"), step=2).state) == after[1]
        newest = checkpoints.restore(new_state("linen"))
        assert bits(newest.state) == after[4]
        best, own = flatten(newest.best), flatten(newest.state.adapters)
        assert all((best[path] == own[path]).all() for path in own)
        with raises(CheckpointError, tmp_path, "step 3", [2, 4, 5]):
            checkpoints.restore(new_state("linen"), step=3)
        checkpoints.save(4, new_state("linen"))
        with raises(CheckpointError, tmp_path, "step 4", "step 5"):
            checkpoints.wait()


def test_a_score_that_is_nan_is_none_and_the_best_stays(tmp_path):
    after = saved(tmp_path, [3.0, float("nan"), 2.0, 1.0])
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps, checkpoints.best) == ([1, 3, 4], 1)
        assert bits(checkpoints.restore(new_state("linen"), step=1).state) == after[0]


def test_the_base_is_in_no_checkpoint(tmp_path):
    saved(tmp_path, [None])
    names = (tmp_path / "1" / "arrays" / "_METADATA").read_text()
    assert "adapters/dense/lora/a" in names
    assert "dense/kernel" not in names
    assert "base" not in names


def files_of(tmp_path, step):
    """What a checkpoint consists of, the largest first."""
    root = tmp_path / str(step)
    found = [p for p in root.rglob("*") if p.is_file() and p.stat().st_size and p.name != CHECKSUMS]
    return sorted(found, key=lambda p: -p.stat().st_size)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    first, *rest = path.read_bytes()
    path.write_bytes(bytes([first ^ 1, *rest]))


def a_directory(path):
    path.unlink()
    path.mkdir()


def a_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_link_elsewhere(path):
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading it is an error of the device


@pytest.mark.witness("None-unlink", "-a_pipe")
@pytest.mark.parametrize("harm", [a_directory, a_loop, a_pipe, a_link_elsewhere, Path.unlink])
@pytest.mark.parametrize("name", [CHECKSUMS, "", None])
def test_what_cannot_be_read_is_damage(harm, name, tmp_path, caplog):
    saved(tmp_path, [None, None])
    path = files_of(tmp_path, 2)[0] if name is None else tmp_path / "2" / name
    if name == "":
        shutil.rmtree(path)
        path.touch()
    harm(path)
    (tmp_path / "damaged-2").touch()  # one more of it is in the way
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
    gone = name == "" and harm is Path.unlink
    messages = [r.message for r in caplog.records if r.name.startswith("adapters_jax")]
    assert [m.split(":")[0] for m in messages] == ["the checkpoint of step 2 is damaged"][gone:]


@pytest.mark.witness("about/metadata-{", "metrics/metrics-{")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("about/metadata", b"{"),
        ("about/metadata", b'{"progress": {}}'),
        ("about/metadata", b'{"progress": [1], "recipe": 1, "base": 1, "best": 1}'),
        ("metrics/metrics", b"{"),
    ],
)
def test_content_that_orbax_cannot_read_is_one_sentence(name, content, tmp_path):
    saved(tmp_path, [None, None])
    (tmp_path / "2" / name).write_bytes(content)
    (tmp_path / "2" / CHECKSUMS).unlink()
    write_checksums(tmp_path / "2")
    with raises(CheckpointError, tmp_path), Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(new_state("linen"))
    assert not list(tmp_path.glob("lock*"))  # another may open it


def test_a_pipe_that_no_checksum_covers_is_damage(tmp_path, caplog):
    saved(tmp_path, [None, None])
    os.mkfifo(tmp_path / "2" / "arrays" / "more")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
    assert "arrays/more is no ordinary file" in caplog.text


def test_an_error_of_the_device_is_damage(tmp_path, monkeypatch, caplog):
    saved(tmp_path, [None, None])

    def fail(file, digest):
        if "/2/" in file.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hashlib.new(digest)

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with Checkpoints(tmp_path):
        messages = [r.message for r in caplog.records if r.name.startswith("adapters_jax")]
    assert any("step 2" in m and os.strerror(errno.EIO) in m for m in messages)


def test_a_file_in_place_of_the_directory_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with raises(aj.errors.FileSystemError, tmp_path / "file"):
        Checkpoints(tmp_path / "file")


@pytest.mark.weekly
@pytest.mark.parametrize("harm", [truncated, flipped, Path.unlink])
def test_a_damaged_newest_checkpoint_is_logged_and_the_one_before_is_used(harm, tmp_path, caplog):
    after = saved(tmp_path / "all", [None, None, None])
    for i, path in enumerate(files_of(tmp_path / "all", 3)):
        copy = tmp_path / str(i)
        shutil.copytree(tmp_path / "all", copy)
        harm(copy / path.relative_to(tmp_path / "all"))
        caplog.clear()
        with Checkpoints(copy) as checkpoints:
            assert checkpoints.steps == [2]
            name = path.relative_to(tmp_path / "all" / "3").as_posix()
            (message,) = (r.message for r in caplog.records if r.name.startswith("adapters_jax"))
            assert message.startswith(f"the checkpoint of step 3 is damaged: {name} ")
            assert str(copy / "damaged-3") in message and message.endswith("step 2")
            if i == 0:
                found = checkpoints.restore(new_state("linen"))
                assert bits(found.state) == after[1]
                checkpoints.save(3, advance("linen", found.state, 2, 3))  # its step again
                checkpoints.wait()
                assert bits(checkpoints.restore(new_state("linen")).state) == after[2]


def test_if_every_checkpoint_is_damaged_there_is_none(tmp_path, caplog):
    saved(tmp_path, [None])
    (tmp_path / "1" / CHECKSUMS).unlink()  # a save that was cut off at the very end
    checkpoints = Checkpoints(tmp_path)
    (message,) = (r.message for r in caplog.records if r.name.startswith("adapters_jax"))
    assert message.startswith(f"the checkpoint of step 1 is damaged: {CHECKSUMS} ")
    assert checkpoints.steps == [] and checkpoints.best is None
    with raises(CheckpointError, tmp_path):
        checkpoints.restore(new_state("linen"))
    assert (tmp_path / "damaged-1" / "arrays").is_dir()


@pytest.mark.slow
def test_another_shape_or_recipe_is_an_error_and_the_checkpoint_stays(tmp_path):
    saved(tmp_path, [None])
    with Checkpoints(tmp_path) as checkpoints:
        other = aj.Recipe(aj.LoRA("dense", 2, alpha=4.0), aj.Unfreeze("dense/bias"))
        with raises(CheckpointError, "step 1", "recipe", '"alpha": 4.0'):
            checkpoints.restore(new_state("linen", other))
        wider = new_state("linen", width=9)
        hashes = [tree_sha256((x.adapters, x.base), RECIPE) for x in (new_state("linen"), wider)]
        with raises(CheckpointError, "step 1", "base", *hashes):
            checkpoints.restore(wider)
        state = new_state("linen")
        wide = {"dense": {**state.adapters["dense"], "lora": {"a": jnp.ones((5, 2))}}}
        with raises(aj.MismatchError, "adapters/dense/lora/a", "float32[4, 2]", "float32[5, 2]"):
            checkpoints.restore(state.replace(adapters=wide))
        sgd = state.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(state.adapters))
        with raises(aj.MismatchError, "opt_state/inner_opt_state/"):
            checkpoints.restore(sgd)
        assert checkpoints.steps == [1]


def test_a_recipe_with_commas_in_its_braces_goes_on_with_bars(tmp_path):
    before, now, other = (
        aj.Recipe(aj.LoRA("dense", 2), aj.Unfreeze(f"dense/{{{parts}}}"))
        for parts in ("bias,scale", "bias|scale", "bias|kernel")
    )
    with checked_before():  # an earlier version did not ask for a scale
        state = new_state("linen", before)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(new_state("linen", now))
        assert bits(restored.state) == bits(state) and restored.state.recipe == now
        with raises(CheckpointError, "step 1", "recipe", "bias,scale", "bias|kernel"):
            checkpoints.restore(new_state("linen", other))


# orbax leaves tasks of a failed save behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_without_room_on_the_disk_fails_and_the_others_are_intact(tmp_path):
    after = saved(tmp_path, [None, None])
    big = {"a": np.random.default_rng(0).standard_normal((500, 1000)).astype(np.float32)}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing more is an error
        try:
            checkpoints.save(3, new_state("linen"), best=big)
            with raises(CheckpointError, "step 3", tmp_path, "1, 2"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "lock", "lock.pid"]
        assert bits(checkpoints.restore(new_state("linen")).state) == after[1]
        checkpoints.save(3, new_state("linen"))
        checkpoints.wait()
        assert checkpoints.steps == [2, 3]


def test_a_disk_without_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path, [None, None])
    sizes = [x.nbytes for x in jax.tree.leaves(new_state("linen").checkpointed)]
    size = sum(sizes) + 2**20 + 2**13 * len(sizes)
    written = [p.stat().st_size for p in (tmp_path / "2").rglob("*")]  # directories take room, too
    assert sum(-(-n // 4096) * 4096 for n in written) < size
    with Checkpoints(tmp_path) as checkpoints:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
        with raises(CheckpointError, tmp_path, f"{size - 1:,}", f"{size:,}", "1, 2"):
            checkpoints.save(3, new_state("linen"))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
        checkpoints.save(3, new_state("linen"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.weekly
def test_a_directory_is_of_one_process_at_a_time(tmp_path):
    code = "import sys; from adapters_jax.files.checkpoint import Checkpoints;"
    code += "found = Checkpoints(sys.argv[1]); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], **pipes)
    assert holder.stdout.readline() == b"\n"
    with raises(CheckpointError, tmp_path, f"process {holder.pid};"):
        Checkpoints(tmp_path)
    holder.kill()
    holder.communicate()
    with Checkpoints(tmp_path), raises(CheckpointError, tmp_path, f"{os.getpid()}, which is this"):
        Checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_neither_the_order_nor_the_arrays(tmp_path, monkeypatch):
    now, hour = time.time_ns(), 3600 * 10**9
    with monkeypatch.context() as patch:  # each reading is an hour before the last one
        readings = itertools.count(now, -hour)
        patch.setattr(time, "time_ns", lambda: next(readings))
        patch.setattr(time, "time", lambda: next(readings) / 1e9)
        after = saved(tmp_path, [None, None, None])
        assert next(readings) < now - hour  # something has read it
    for age, step in enumerate((2, 3)):
        for path in [tmp_path / str(step), *(tmp_path / str(step)).rglob("*")]:
            os.utime(path, ns=(now - age * hour,) * 2)  # the newest is the oldest
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 3]
        assert bits(checkpoints.restore(new_state("linen")).state) == after[2]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("x" * 239, "x" * 239),
        ("y" + "x" * 238 + "z", f"y{'x' * 79} ... {'x' * 149}z;"),
        ("  first\nsecond", " first;"),
        ("", " ValueError;"),
    ],
)
def test_an_error_of_a_save_is_shown_by_its_first_line(tmp_path, monkeypatch, message, shown):
    def fail(root):
        raise ValueError(message)

    monkeypatch.setattr("adapters_jax.files.checkpoint.write_checksums", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, new_state("linen"))
    with raises(CheckpointError, "step 1", tmp_path, shown):
        checkpoints.close()


def test_the_remains_of_an_interrupted_save_are_removed(tmp_path):
    saved(tmp_path, [None])
    left = tmp_path / "2.orbax-checkpoint-tmp"
    left.mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1] and checkpoints.best is None  # it has no score
    assert not left.exists()


@pytest.mark.parametrize("keep", [0, 1, True, 2.0])
def test_keep_must_be_at_least_two(tmp_path, keep):
    with raises(aj.UserError, f"keep={keep}"):
        Checkpoints(tmp_path, keep=keep)


def test_progress_must_be_json(tmp_path):
    with raises(TypeError, "progress", "object"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state("linen"), progress={"x": object()})


LAYOUTS = """
import sys, jax, numpy as np, optax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_checkpoint import batch, new_state, new_step
from adapters_jax.files.checkpoint import Checkpoints

def laid(state, shape):
    mesh = Mesh(np.array(jax.devices()[:np.prod(shape)]).reshape(shape), ("data", "model"))
    def put(x):
        even = x.ndim == 2 and x.shape[0] % shape[1] == 0
        return jax.device_put(x, NamedSharding(mesh, P("model") if even else P()))
    return state.replace(adapters=jax.tree.map(put, state.adapters),
                         opt_state=jax.tree.map(put, state.opt_state))

state = laid(new_state("linen"), (2, 4))
count = lambda x: x + jnp.arange(x.size).reshape(x.shape)
moved = state.replace(adapters=jax.tree.map(count, state.adapters))
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, moved)
    checkpoints.wait()
    for shape in ((4, 2), (1, 1), (8, 1)):
        like = laid(new_state("linen"), shape)
        found = checkpoints.restore(like).state
        for x, y, z in zip(*map(jax.tree.leaves, (found.adapters, like.adapters, moved.adapters))):
            assert x.sharding == y.sharding, (x.sharding, y.sharding)
            assert (np.asarray(x) == np.asarray(z)).all()
    step = new_step("linen")  # of a base on a mesh, whose adapters lie nowhere yet
    mesh = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P())
    like = new_state("linen")
    found = checkpoints.restore(like.replace(base=jax.device_put(like.base, mesh))).state
    assert np.isfinite(step(found, batch(0))[1]["loss"])
np.savez(sys.argv[2], *jax.tree.leaves(moved.adapters))
print(len(jax.devices()))
"""


@pytest.mark.weekly
def test_it_restores_onto_another_device_layout(tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", LAYOUTS, str(tmp_path / "saved"), str(tmp_path / "expected.npz")],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "8\n", ran.stderr
    with Checkpoints(tmp_path / "saved") as checkpoints:  # and onto this process's one
        found = checkpoints.restore(new_state("linen"))
    expected = list(np.load(tmp_path / "expected.npz").values())
    leaves = jax.tree.leaves(found.state.adapters)
    assert all((x == y).all() for x, y in zip(leaves, expected, strict=True))
