"""`finetune --track`, and `tracked` around a loop of one's own: what trackers get of a run."""

import contextlib
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import jax.numpy as jnp
import pytest
from helpers.errors import raises
from helpers.tiny import write_model, write_reviews

from adapters_jax.errors import MissingPackageError, UserError
from adapters_jax.finetune import tracking
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.options.parsing import UsageError, parse
from adapters_jax.finetune.options.settings import TrackerName
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.tracking import TRACKERS, TrackingError, tracked


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model, rows and a working directory; no settings of trackers of this machine."""
    write_model(tmp_path / "tiny")
    write_reviews(tmp_path / "reviews.jsonl")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # W&B's key may be in a file there
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def written(monkeypatch):
    """What a tracker named "wandb" gets: its places and its records."""
    found = SimpleNamespace(places=[], records=[], broken=False)

    @contextlib.contextmanager
    def opened(where):
        def write(step, metrics):
            if found.broken:
                raise ConnectionError("no route")
            found.records.append((step, metrics))

        found.places.append(where)
        try:
            yield write
        finally:
            if found.broken:
                raise OSError("no end")

    monkeypatch.setitem(TRACKERS, "wandb", tracking._Tracker("json", opened))
    monkeypatch.setattr(tracking, "_check_login", lambda: None)
    return found


def finetune(place, *flags, status=0):
    """Runs a small training; returns its run and its stderr."""
    rows = ["--model", place / "tiny", "--train", place / "reviews.jsonl", "--text", "review"]
    small = ["--max-length", 8, "--batch-size", 16, "--limit", 64, "--epochs", 1]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        line = ["finetune", *rows, *small, "--name", "one", "--json", *flags]
        assert main([*map(str, line)]) == status, err.getvalue()
    if status == 0:
        json.loads(out.getvalue())  # nothing of a tracker's own is on stdout
    return place / "runs" / "one", err.getvalue()


def records_of(run):
    """What trackers have to get of a run: steps and metrics by name."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        method, step = record.pop("method"), record.pop("step", 0)
        flat = tracking._numbers(record if method == "houlsby" else {method: record})
        found.append((step, flat))
    return found


@pytest.mark.slow
def test_a_tracker_gets_every_record_under_its_names(place, written):
    run, _ = finetune(place, "--track", "wandb")
    assert written.records == records_of(run)
    names = set().union(*(metrics for _, metrics in written.records))
    assert {"loss", "learning_rate", "dev/accuracy", "test/f1", "head-only/loss"} <= names
    assert "majority class/dev/accuracy" in names
    (where,) = written.places
    assert where.name == "one"
    config = json.loads((run / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("summary", "format")}
    assert config == json.loads(json.dumps(where.config))
    assert config["options"]["track"] == ["wandb"]


@pytest.mark.slow
def test_a_run_that_a_tracker_stops_goes_on_with_it(place, written, monkeypatch):
    written.broken = True
    run, err = finetune(place, "--track", "wandb", "--no-baselines", status=2)
    assert "the tracker wandb: ConnectionError: no route; go on with" in err
    _, err = finetune_resumed(run, "--track", "mlflow", status=2)
    assert "--track: --resume takes the flags" in err
    written.broken = False
    monkeypatch.setattr(Training, "saves", lambda self, every: True)
    finetune_resumed(run)
    assert written.records == records_of(run)


def test_an_error_as_a_tracker_closes_hides_no_other(tmp_path, written, caplog):
    written.broken = True
    with raises(TrackingError, "the tracker wandb: OSError: no end"), tracked("wandb", tmp_path):
        pass
    assert not caplog.messages
    with raises(KeyboardInterrupt, "by hand"), tracked("wandb", tmp_path):
        raise KeyboardInterrupt("by hand")
    assert caplog.messages == ["warning: the tracker wandb: OSError: no end"]


def finetune_resumed(run, *flags, status=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["finetune", "--resume", str(run), *flags, "--json"]) == status, err.getvalue()
    return run, err.getvalue()


def test_what_cannot_be_tracked_is_refused_before_training(place, monkeypatch):
    assert get_args(TrackerName) == tuple(TRACKERS)
    with raises(UserError, "'clearml'", "tensorboard, wandb, mlflow, trackio"):
        tracked("clearml", place).__enter__()
    with raises(UsageError, "--track", "clearml", "wandb"):
        parse(Finetune, ["--track", "clearml"])
    for name, tracker in TRACKERS.items():
        monkeypatch.setitem(sys.modules, tracker.package, None)
        with raises(MissingPackageError, name, tracker.package, f"[{name}]"):
            tracked([name], place).__enter__()
    _, err = finetune(place, "--track", "wandb", status=2)
    assert "needs wandb" in err
    assert not (place / "runs").exists()


def test_a_metric_that_is_no_number_is_refused(tmp_path, written):
    with tracked("wandb", tmp_path) as log:
        log({"step": jnp.int32(3), "loss": jnp.float32(0.5)})
        with raises(UserError, "dev/f1", "(2,)"):
            log({"dev": {"f1": jnp.zeros(2)}})
        with raises(UserError, "loss", "'low'"):
            log({"loss": "low"})
    assert written.records == [(3, {"loss": 0.5})]


@pytest.mark.slow  # where the trackers are installed
@pytest.mark.filterwarnings("default")  # of these libraries
def test_nobody_is_logged_in(place):
    pytest.importorskip("wandb")
    with raises(UserError, "wandb login", "WANDB_MODE=offline"):
        tracked("wandb", place).__enter__()


LOOP = """
import sys
from adapters_jax.finetune.tracking import tracked

with tracked(sys.argv[1], "logs/one", config={"lora": {"rank": 8}}) as log:
    for step in map(int, sys.argv[2:]):
        log({"step": step, "loss": 1 / step, "dev": {"f1": step / 8}})
    print("the loop's own")
"""


def of_tensorboard(place):
    """The points and the configuration in the files of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(place.glob("logs/one/tensorboard/events*")):
        data = path.read_bytes()
        while data:  # the length in 8 bytes, its checksum in 4, the event, its checksum in 4
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    texts = [v.tensor.string_val[0].decode() for _, v in values if v.tag.startswith("config")]
    points = [(v.tag, step, v.simple_value) for step, v in values if v.HasField("simple_value")]
    return points, json.loads("".join(texts))


def of_wandb(place):
    """Those in W&B's files of runs that were offline, which belong to one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    points, config, names = [], {}, set()
    for path in sorted(place.glob("logs/one/wandb/offline-run-*/run-*.wandb")):
        names.add(path.name)
        for data in _chunks(path.read_bytes()):
            record = Record.FromString(data)
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            row = {k: json.loads(v) for k, v in items.items() if not k.startswith("_")}
            step = row.pop("step", None)
            points += [(name, step, value) for name, value in row.items()]
    assert len(names) == 1, names
    return points, {"lora": config["lora"]}


def _chunks(data):
    """The records of a log of LevelDB: blocks of 32 KiB, in them parts after 7 bytes each."""
    at, whole = 7, b""  # 7 bytes begin the file
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def of_mlflow(place):
    """Those in MLflow's database, which has one run."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.get_experiment_by_name("adapters-jax").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    history = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
    points = [(metric.key, metric.step, metric.value) for each in history for metric in each]
    return points, {"lora": {"rank": int(run.data.params["lora/rank"])}}


def of_trackio(place):
    """Those in trackio's database, which has one run."""
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("adapters-jax") == ["one"]
    rows = SQLiteStorage.get_logs("adapters-jax", "one")
    points = [(name, row["step"], row[name]) for row in rows for name in ("loss", "dev/f1")]
    return points, {"lora": SQLiteStorage.get_run_config("adapters-jax", "one")["lora"]}


@pytest.mark.weekly
@pytest.mark.witness("mlflow", "wandb")
@pytest.mark.slow  # where the trackers are installed
@pytest.mark.filterwarnings("default")  # of these libraries
@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_has_what_was_tracked_and_goes_on_with_the_run(place, monkeypatch, name):
    package = pytest.importorskip(TRACKERS[name].package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in ("12", "48"):
        line = [sys.executable, "-c", LOOP, name, *steps]
        done = subprocess.run(line, capture_output=True, text=True, cwd=place)
        assert (done.returncode, done.stdout) == (0, "the loop's own\n"), done.stderr
    if name == "trackio":  # it reads the variable when it is imported
        monkeypatch.setattr(package.sqlite_storage, "TRACKIO_DIR", place / "trackio")
    points, config = globals()[f"of_{name}"](place)
    rows = [("loss", s, 1 / s) for s in (1, 2, 4, 8)] + [("dev/f1", s, s / 8) for s in (1, 2, 4, 8)]
    assert sorted(points) == sorted(rows)
    assert config == {"lora": {"rank": 8}}


@pytest.mark.weekly  # where the trackers are installed
def test_a_command_with_every_tracker_prints_its_result_alone(place):
    for tracker in TRACKERS.values():
        pytest.importorskip(tracker.package)
    flags = ["--train", "reviews.jsonl", "--text", "review", "--epochs", "0.1", "--max-length", "8"]
    flags += ["--model", "tiny", "--no-baselines", "--json", "--name", "one"]
    line = [sys.executable, "-m", "adapters_jax", "finetune", *flags, "--track", *TRACKERS]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "runs/one"
    kept = json.loads((place / "runs" / "one" / "tracking.json").read_text())
    assert kept.keys() == TRACKERS.keys()
