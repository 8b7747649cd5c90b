"""Object stores: adapters, checkpoints and runs there; nothing half-written, and who refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import write_model, write_reviews
from test_jobs import NODE, ROOT, free_port

import adapters_jax as aj
from adapters_jax.errors import FileSystemError, MissingPackageError
from adapters_jax.files import adapter, directories
from adapters_jax.files.adapterhub import save_adapterhub
from adapters_jax.files.checkpoint import CheckpointError, Checkpoints
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.stores import Mirror
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.options.parsing import UsageError
from adapters_jax.finetune.run_directory import RunConfigError, RunError

NAMES, PARAMS = {"model.q": "q"}, {"q": {"kernel": np.zeros((4, 6), np.float32)}}


@pytest.fixture
def store():
    """An empty store at memory://."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()


@pytest.fixture
def refusing(store, monkeypatch):
    """Makes the store refuse from its n-th change on; each number of changes is counted."""
    made = []

    def changing(change, most):
        def call(*arguments, **options):
            if len(made) >= most:
                raise PermissionError(13, "Access Denied")
            made.append(arguments)
            return change(*arguments, **options)

        return call

    def after(most):
        made.clear()
        for name in ("put_file", "rm_file"):
            monkeypatch.setattr(MemoryFileSystem, name, changing(real[name], most))
        return made

    real = {name: getattr(MemoryFileSystem, name) for name in ("put_file", "rm_file")}
    return after


def factors(rank, seed=0):
    draw = np.random.default_rng(seed).normal
    return {"a": np.float32(draw(size=(4, rank))), "b": np.float32(draw(size=(rank, 6)))}


def test_adapters_go_there_and_come_back(store):
    recipe, tree = aj.Recipe(aj.LoRA("q", 2, 4)), {"q": {"lora": factors(2)}}
    where = "memory://bucket/ours"
    for target in (where, Path(where)):
        saved = aj.save_adapter(target, tree, recipe)
        for name in (where, saved):
            found, arrays = aj.read_adapter(name)
            assert found == recipe
            np.testing.assert_array_equal(arrays["q/lora/a"], tree["q"]["lora"]["a"])
    save_peft("memory://bucket/peft", recipe, tree, NAMES, PARAMS)
    found, adapters = load_peft("memory://bucket/peft", NAMES, PARAMS)
    assert found.attached[0].rank == 2
    np.testing.assert_array_equal(adapters["q"]["lora"]["b"], tree["q"]["lora"]["b"])
    save_peft("memory://bucket/peft", recipe, tree, NAMES, PARAMS)  # which it replaces
    with raises(aj.UserError, "memory://bucket/peft", "adapter_model"):
        save_adapterhub("memory://bucket/peft", recipe, tree, NAMES, PARAMS)
    for names in ("ours", "peft"):
        assert not [path for path in store if f"/{names}/." in path], "temporary files"


def test_what_replaces_an_adapter_leaves_nothing_of_it(store):
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    where = "memory://bucket/mine"
    aj.save_adapter(where, aj.adapt(model, aj.LoRA("layers/0", 2), rngs=nnx.Rngs(1)))
    assert "/bucket/mine/state.safetensors" in store
    aj.save_adapter(where, {"q": {"lora": factors(2)}}, aj.LoRA("q", 2))
    files = ("adapter.safetensors", "adapter_config.json")
    assert sorted(store) == [f"/bucket/mine/{name}" for name in files]
    fsspec.filesystem("memory").pipe("/bucket/notes/mine.txt", b"1")
    with raises(aj.UserError, "bucket/notes", "not just an adapter"):
        aj.save_adapter("memory://bucket/notes", {"q": {"lora": factors(2)}}, aj.LoRA("q", 2))
    assert store["/bucket/notes/mine.txt"].getvalue() == b"1"


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize("there", [True, False])
def test_an_adapter_that_is_replaced_meanwhile_is_not_read_mixed(
    kind, there, store, tmp_path, monkeypatch
):
    """The one has the scale 2 and the other the scale 4, which the tensors do not tell."""
    where, tree = (
        "memory://bucket/mine" if there else tmp_path / "mine",
        {"q": {"lora": factors(2)}},
    )

    def write(alpha):
        recipe = aj.LoRA("q", 2, alpha)
        if kind == "peft":
            return save_peft(where, recipe, tree, NAMES, PARAMS)
        return aj.save_adapter(where, tree, recipe)

    def read():
        return load_peft(where, NAMES, PARAMS) if kind == "peft" else aj.read_adapter(where)

    def replacing(call):
        def first(*arguments):
            result = call(*arguments)
            monkeypatch.undo()
            write(8)
            return result

        return first

    write(4)
    if there:
        monkeypatch.setattr(MemoryFileSystem, "get_file", replacing(MemoryFileSystem.get_file))
    elif kind == "peft":
        own = directories.Pair.read_tensors
        monkeypatch.setattr(directories.Pair, "read_tensors", replacing(own))
    else:
        monkeypatch.setattr(adapter.Manifest, "read", replacing(adapter.Manifest.read))
    with raises(aj.UserError, "mine", "replaced while it was read"):
        read()
    assert read()[0].attached[0].alpha == 8


def test_what_is_not_there_or_not_installed_is_named(store, monkeypatch):
    for load in (aj.read_adapter, lambda name: load_peft(name, NAMES, PARAMS)):
        with raises(aj.AdapterFileError, "memory://bucket/none"):
            load("memory://bucket/none")
    with raises(aj.AdapterFileError, "memory://bucket/none", "'v1'"):
        aj.read_adapter("memory://bucket/none", revision="v1")
    with raises(aj.UserError, "nowhere://bucket/x", "gs://"):
        aj.read_adapter("nowhere://bucket/x")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with raises(MissingPackageError, "gs://bucket/x", "[cloud]"):
        aj.save_adapter("gs://bucket/x", {"q": {"lora": factors(2)}}, aj.LoRA("q", 2))
    with raises(MissingPackageError, "gs://bucket/x", "[cloud]"):
        Checkpoints("gs://bucket/x")


def test_a_bucket_without_rights_is_named_with_what_it_refused(refusing, monkeypatch):
    refusing(0)
    with raises(
        FileSystemError, "memory://bucket/x cannot be written", "Access Denied", "'bucket'"
    ):
        aj.save_adapter("memory://bucket/x", {"q": {"lora": factors(2)}}, aj.LoRA("q", 2))

    def refuse(*arguments, **options):
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    with raises(FileSystemError, "memory://bucket/x cannot be read", "Access Denied", "'bucket'"):
        aj.read_adapter("memory://bucket/x")
    monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    with raises(FileSystemError, "memory://bucket/x cannot be read", "Access Denied", "'bucket'"):
        Checkpoints("memory://bucket/x")


@pytest.mark.parametrize(
    "where", ["azure.core.exceptions.AzureError", "huggingface_hub.errors.HTTPError"]
)
def test_an_error_that_is_none_of_the_system_is_one_sentence(where, store, monkeypatch):
    module, _, name = where.rpartition(".")
    error = type(name, (Exception,), {})
    monkeypatch.setitem(sys.modules, module, None)

    def refuse(*arguments, **options):  # clients import them late
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: error}))
        raise error("no route to the host")

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    with raises(FileSystemError, "memory://bucket/x cannot be read", "no route to the host"):
        aj.read_adapter("memory://bucket/x")


def write(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


def test_wherever_copying_stops_no_directory_with_its_mark_is_mixed(refusing, tmp_path):
    """A mark here holds what the files of its directory have to be."""

    def version(n, steps):
        files = {"config.json": f"{n}", "adapter/a": f"{n}", "adapter/adapter_config.json": f"{n}"}
        for step in steps:
            files |= {f"{step}/x": f"{step}", f"{step}/y": f"{step}", f"{step}/sha256.json": "1"}
        return files

    old, new = version(1, (10, 20)), version(2, (20, 30))
    for most in range(100):
        MemoryFileSystem.store.clear()
        here, back = tmp_path / f"here{most}", tmp_path / f"back{most}"
        here.mkdir(), back.mkdir()
        write(here, old)
        mirror = Mirror(here, "memory://b/run")
        refusing(1000)
        mirror.push()
        for name in old.keys() - new.keys():
            (here / name).unlink()
        for name in old.keys() & new.keys() - {"20/x", "20/y", "20/sha256.json"}:
            (here / name).unlink()  # a file is replaced, not changed in place
        write(here, {name: new[name] for name in new if not name.startswith("20/")})
        refusing(most)
        try:
            mirror.push()
            stopped = False
        except FileSystemError:
            stopped = True
        Mirror(back, "memory://b/run").pull()
        found = {p.relative_to(back).as_posix(): p.read_text() for p in back.rglob("*.*")}
        plain = {p.relative_to(back).as_posix(): p.read_text() for p in back.rglob("[axy]")}
        plain = {name: text for name, text in plain.items() if (back / name).is_file()}
        assert found["config.json"] in "12"
        if "adapter/adapter_config.json" in found:
            assert plain["adapter/a"] == found["adapter/adapter_config.json"]
        whole = [s for s in (10, 20, 30) if f"{s}/sha256.json" in found]
        assert all(plain[f"{s}/{x}"] == f"{s}" for s in whole for x in "xy")
        assert {10, 20} <= {*whole} or {20, 30} <= {*whole}, "a checkpoint is lost"
        if found["config.json"] == "2":
            assert 30 in whole and found["adapter/adapter_config.json"] == "2"
        refusing(1000)
        mirror.push()  # the next time brings it in order
        assert {k.removeprefix("/b/run/") for k in MemoryFileSystem.store} == {*new}
        if not stopped:
            return
    raise AssertionError("copying never ended")


def new_state():
    model = aj.adapt(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), aj.LoRA("**", 2), rngs=nnx.Rngs(1))
    return aj.TrainState.create(model, tx=optax.adam(0.1), key=jax.random.key(2))


def test_checkpoints_there_resume_exactly_and_a_refusal_loses_none(refusing):
    step = aj.make_train_step(lambda model, batch, key: jnp.mean((model(batch) - 1.0) ** 2))
    where, state, x, sums = "memory://bucket/checkpoints", new_state(), jnp.ones((2, 4)), {}
    refusing(1000)
    with Checkpoints(where) as checkpoints:
        here = checkpoints.directory
        for i in range(1, 5):
            state, _ = step(state, x)
            sums[i] = jax.device_get(state.adapters)
            checkpoints.save(i, state, progress={"i": i})
    assert not here.exists()
    with Checkpoints(where) as checkpoints:
        assert checkpoints.steps == [3, 4]
        found = checkpoints.restore(new_state())
        assert found.progress == {"i": 4}
        jax.tree.map(np.testing.assert_array_equal, found.state.adapters, sums[4])
        refusing(3)
        checkpoints.save(5, step(found.state, x)[0])
        with raises(CheckpointError, "step 5", f"{where} cannot be written", "Access Denied"):
            checkpoints.wait()
    refusing(1000)
    with Checkpoints(where) as checkpoints:
        assert checkpoints.steps == [3, 4]
        jax.tree.map(
            np.testing.assert_array_equal,
            checkpoints.restore(new_state(), 3).state.adapters,
            sums[3],
        )
        with raises(CheckpointError, where):
            checkpoints.restore(new_state(), 7)


PROCESS = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
import adapters_jax as aj
from adapters_jax.files.checkpoint import Checkpoints
from flax import nnx
aj.join_hosts()
mesh = aj.make_mesh("fsdp=2")
def state():
    model = aj.adapt(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), aj.LoRA("**", 2), rngs=nnx.Rngs(1))
    made = aj.TrainState.create(model, tx=optax.adam(0.1), key=jax.random.key(2))
    return aj.shard(made, mesh, small=0)
step = aj.make_train_step(lambda model, batch, key: jnp.mean((model(batch) - 1.0) ** 2))
x = aj.shard_batch(np.ones((2, 4), np.float32), mesh)
with Checkpoints(sys.argv[1]) as checkpoints:
    now = state()
    begun = checkpoints.steps
    if begun:
        now = checkpoints.restore(now).state
    for i in range(int(now.step), int(sys.argv[2])):
        now, metrics = step(now, x)
        checkpoints.save(i + 1, now)
print(begun, f"{float(metrics['loss']):.7f}")
"""


@pytest.mark.slow
def test_two_processes_share_checkpoints_there_and_no_disk(tmp_path):
    """Each of them works in a directory of its own, and both resume from the store."""

    def run(steps, processes, place):
        port, started = free_port(), []
        for i in range(processes):
            own = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_PROCESS_ID": str(i)}
            own = {**own, "JAX_NUM_PROCESSES": "2"} if processes == 2 else {}
            own["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // processes}"
            (tmp_path / f"tmp{i}").mkdir(exist_ok=True)
            own["TMPDIR"] = str(tmp_path / f"tmp{i}")
            command = [sys.executable, "-c", PROCESS, (tmp_path / place).as_uri(), str(steps)]
            started.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **NODE, **own},
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended = [process.communicate(timeout=300) for process in started]
        assert not any(process.returncode for process in started), ended[0][1][-3000:]
        return {out.strip().splitlines()[-1] for out, _ in ended}  # below those of gloo

    (alone,) = run(4, 1, "alone")
    assert run(2, 2, "both").pop().startswith("[]")
    (resumed,) = run(4, 2, "both")
    assert resumed.startswith("[1, 2]")
    assert float(resumed.split()[-1]) == pytest.approx(float(alone.split()[-1]), rel=1e-5)
    there = (tmp_path / "both").glob("*/sha256.json")
    assert sorted(path.parent.name for path in there) == ["3", "4"]


def train(place, runs, *more):
    flags = ["--model", place / "tiny", "--train", place / "reviews.jsonl", "--text", "review"]
    flags += ["--max-length", 8, "--batch-size", 16, "--learning-rate", 0.01, "--epochs", 1]
    flags += ["--bottleneck-dim", 8, "--limit", 64, "--no-baselines", "--checkpoint-every", 1]
    return ["finetune", *map(str, flags), "--runs", str(runs), "--name", "mine", *more]


@pytest.mark.weekly
def test_a_run_there_that_the_store_refused_goes_on_and_loses_nothing(refusing, tmp_path, capsys):
    write_model(tmp_path / "tiny")
    write_reviews(tmp_path / "reviews.jsonl")
    assert main(train(tmp_path, tmp_path / "runs")) == 0
    straight = tmp_path / "runs" / "mine"
    capsys.readouterr()
    refusing(60)
    assert main(train(tmp_path, "memory://bucket/runs")) == 2
    error = capsys.readouterr().err
    assert "memory://bucket/runs/mine cannot be written" in error and "Access Denied" in error
    made = refusing(10_000)
    resume = ["finetune", "--resume", "memory://bucket/runs/mine"]
    assert main(resume) == 0
    shown = capsys.readouterr()
    assert "going on after step" in shown.err + shown.out
    assert "memory://bucket/runs/mine/report.html" in shown.err + shown.out
    assert made
    store = MemoryFileSystem.store
    names = {path.removeprefix("/bucket/runs/mine/") for path in store}
    local = {p.relative_to(straight).as_posix() for p in straight.rglob("*") if p.is_file()}
    assert names == local
    for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert store[f"/bucket/runs/mine/{name}"].getvalue() == (straight / name).read_bytes()
    summary = json.loads(store["/bucket/runs/mine/config.json"].getvalue())["summary"]
    assert summary["run"] == "memory://bucket/runs/mine"
    with command_raises(RunError, "memory://bucket/runs/mine", "finished"):
        main(resume)
    with command_raises(RunError, "memory://bucket/runs/mine", "--name"):
        main(train(tmp_path, "memory://bucket/runs"))
    with command_raises(RunConfigError, "memory://bucket/runs/none"):
        main(["finetune", "--resume", "memory://bucket/runs/none"])
    assert main(["predict", "memory://bucket/runs/mine", "a fine film"]) == 0
    there = capsys.readouterr().out
    assert main(["predict", str(straight), "a fine film"]) == 0
    assert capsys.readouterr().out == there
    more = train(tmp_path, tmp_path / "runs", "--init-from", "memory://bucket/runs/mine")
    assert main([*more[:-4], "--name", "more", *more[-2:]]) == 0


def test_commands_that_take_paths_of_this_machine_say_so(tmp_path):
    with command_raises(UsageError, "--train", "gs://bucket/rows.csv"):
        main(["finetune", "--train", "gs://bucket/rows.csv"])
    with command_raises(UsageError, "s3://bucket/page"):
        main(["convert", "runs/mine", "s3://bucket/page", "--to", "peft"])


def s3(monkeypatch):
    """A server of S3's protocol, with a bucket; afterwards it asks for credentials."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("localhost", 0, verbose=False)
    from moto import settings

    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").mkdir("bucket")
    yield
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    yield
    server.stop()


def gs(monkeypatch):
    """A server of Google's protocol, with a bucket; it asks for nothing."""
    servers = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    port = free_port()
    server = servers.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    yield
    server.stop()


@pytest.mark.weekly
@pytest.mark.filterwarnings("default")  # of the servers and clients
@pytest.mark.parametrize("kind", [s3, gs])
def test_the_stores_own_protocols(kind, monkeypatch):
    serving, protocol = kind(monkeypatch), kind.__name__
    next(serving)
    tree, recipe = {"q": {"lora": factors(2)}}, aj.Recipe(aj.LoRA("q", 2))
    for rank in (3, 2):  # the second one replaces the first
        tree, recipe = {"q": {"lora": factors(rank)}}, aj.Recipe(aj.LoRA("q", rank))
        aj.save_adapter(f"{protocol}://bucket/mine", tree, recipe)
    found, arrays = aj.read_adapter(f"{protocol}://bucket/mine")
    assert found == recipe
    np.testing.assert_array_equal(arrays["q/lora/b"], tree["q"]["lora"]["b"])
    with Checkpoints(f"{protocol}://bucket/checkpoints") as checkpoints:
        for i in (1, 2, 3):
            checkpoints.save(i, new_state())
    with Checkpoints(f"{protocol}://bucket/checkpoints") as checkpoints:
        assert checkpoints.steps == [2, 3]
        state = checkpoints.restore(new_state()).state
        jax.tree.map(np.testing.assert_array_equal, state.adapters, new_state().adapters)
    with raises(FileSystemError, f"{protocol}://none/x", "does not exist"):
        aj.save_adapter(f"{protocol}://none/x", tree, recipe)
    assert [path.rstrip("/") for path in fsspec.filesystem(protocol).ls("")] == ["bucket"]
    if next(serving, True) is None:
        for refused in (aj.read_adapter, lambda name: aj.save_adapter(name, tree, recipe)):
            with raises(FileSystemError, "s3://bucket/mine", "credentials", "'bucket'"):
                refused("s3://bucket/mine")
        next(serving, None)
