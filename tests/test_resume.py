"""`adapters-jax finetune --resume`: a kill, a signal or a full disk changes no result."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.errors import raises
from helpers.kills import Commands, kill_and_resume, whole
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews

from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.options.flags import absolute, from_plain, plain, words
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.config import _anywhere
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.runs.stopping import InterruptedRunError, Interrupts


@pytest.fixture(scope="module")
def commands():
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("resume")
    write_model(place / "tiny")
    write_reviews(place / "reviews.jsonl")
    return place


def finetune(place, name):
    """A command of 16 steps, scored 4 times and saved every second step."""
    flags = ["--model", place / "tiny", "--train", place / "reviews.jsonl", "--text", "review"]
    flags += ["--max-length", 8, "--batch-size", 16, "--learning-rate", 0.01, "--epochs", 2]
    flags += ["--bottleneck-dim", 8, "--limit", 128, "--no-baselines", "--dropout", 0.1]
    return ["finetune", *flags, "--checkpoint-every", 2, "--runs", place, "--name", name]


def result(run):
    """All that must not differ: the metrics, the adapter's bytes, and the summary."""
    summary = json.loads((run / "config.json").read_text())["summary"]
    found = {key: summary[key] for key in ("dev", "best_step", "results")}
    return (run / "metrics.jsonl").read_bytes(), tensors(run), found


def tensors(run):
    return (run / "adapter" / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(commands, place):
    """The uninterrupted run, and about how long it takes once all is compiled."""
    began, log = time.monotonic(), place / "log"
    assert commands.run(log, *finetune(place, "straight")) == 0, log.read_text()
    return place / "straight", 0.7 * (time.monotonic() - began)


@pytest.mark.slow
def test_killed_at_random_instants_nothing_is_lost_and_no_bit_differs(straight, commands, place):
    run, seconds = straight
    expected, left = 4, []  # `python -m tests.kills` does hundreds
    for seed in range(1000):
        name = f"killed{seed}"
        kills = expected - len(left)
        left += kill_and_resume(commands, place / name, finetune(place, name), seed, kills, seconds)
        assert result(place / name) == result(run), f"seed {seed}"
        if len(left) >= expected:
            break
    print(f"{len(left)} kills, {sum(kill['cut'] for kill in left)} of them during a save")
    lost = [k for k in left if k["from"] is not None and k["from"] != max(k["whole"])]
    assert not lost, lost


def wait_for(condition, log):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.005)


def error_of(capsys, *flags):
    assert main(["finetune", *map(str, flags)]) == 2
    return capsys.readouterr().err


@pytest.mark.weekly
def test_sigterm_saves_first_and_meanwhile_the_run_is_locked(straight, commands, place, capsys):
    run, log = place / "asked", place / "log"
    pid = commands.start(log, *finetune(place, run.name))
    wait_for(lambda: whole(run), log)
    os.kill(pid, signal.SIGSTOP)  # it would be done too soon
    assert "summary" not in json.loads((run / "config.json").read_text()), "it is done already"
    error = error_of(capsys, "--resume", run)
    assert str(run) in error and f"process {pid}" in error
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert commands.wait() == 143
    assert f"adapters-jax finetune --resume {run}" in log.read_text()
    step = max(whole(run))
    assert commands.run(log, "finetune", "--resume", run) == 0, log.read_text()
    assert f"going on after step {step} of 16" in log.read_text()
    assert result(run) == result(straight[0])
    names = ["adapter", "config.json", "curves.png", "findings.json", "metrics.jsonl"]
    names.append("report.html")
    assert sorted(path.name for path in run.iterdir()) == names


@pytest.mark.weekly
def test_a_lock_has_one_holder_however_often_it_is_taken_and_given_back(tmp_path):
    run, inside, taken = Run(tmp_path / "run"), tmp_path / "inside", []
    run.path.mkdir()

    def work(number):
        while taken.count(number) < 50:
            try:
                lock = run.lock()
            except RunError:
                continue
            inside.touch(exist_ok=False)  # fails where another one is in here
            taken.append(number)
            inside.unlink()
            run.unlock(lock)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not os.listdir(run.path)


@pytest.mark.weekly
def test_a_lock_is_free_at_once_when_its_holder_is_killed(tmp_path):
    run = Run(tmp_path)
    code = "import sys, time, pathlib; from adapters_jax.finetune.run_directory import Run;"
    code += "lock = Run(pathlib.Path(sys.argv[1])).lock(); print(flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"\n"
    with raises(RunError, tmp_path, f"process {holder.pid};"):
        run.lock()
    holder.kill()
    holder.communicate()
    lock = run.lock()
    with raises(RunError, tmp_path, f"process {os.getpid()}, which is this one;"):
        run.lock()
    run.unlock(lock)
    assert not os.listdir(tmp_path)


@pytest.mark.weekly
def test_an_old_run_with_options_as_words_resumes_under_another_jax(straight, place, capsys):
    config = json.loads((straight[0] / "config.json").read_text())
    old = place / "old"
    old.mkdir()
    command = [f"--model={place}/tiny", "--max-length=8", "--checkpoint-every=2"]
    command += [f"--train={place}/reviews.jsonl", "--text=review", "--limit=128", "--epochs=2.0"]
    command += ["--learning-rate=0.01", "--dropout=0.1", "--batch-size=16", "--bottleneck-dim=8"]
    command += ["--no-baselines", "--runs=elsewhere", "--name=x"]
    bottlenecks, norms, _ = (row["targets"] for row in config["recipe"]["methods"])
    bottlenecks[:] = ["**/{attention,cross,mlp}/output"]  # a part matches nothing
    command += [f"--targets={bottlenecks[0]}"]
    assert norms == ["**/*{norm|Norm|ln}*/{scale|bias}"]  # the default today
    norms[:] = ["**/*{norm,Norm,ln}*/{scale,bias}"]
    kept = {key: value for key, value in config.items() if key not in ("summary", "options")}
    kept["versions"] = {**config["versions"], "jax": "0.1"}
    (old / "config.json").write_text(json.dumps({**kept, "command": command}))
    assert main(["finetune", "--resume", str(old), "--json"]) == 0
    out, err = capsys.readouterr()
    assert "jax 0.1 -> " in err
    assert json.loads(out)["run"] == str(old)
    assert result(old) == result(straight[0])  # there was no checkpoint: from the start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({"sede": 1}, ("sede",)),
        ({"seed": "1"}, ("seed='1'",)),
        ({"optimizer": {"epochs": []}}, ("optimizer.epochs=[]",)),
        ({"method": {"rank_pattern": {"a": "b"}}}, ("method.rank_pattern={'a': 'b'}",)),
        ({"optimizer": 3}, ("optimizer=3",)),
        ({"model": "a\0b"}, ("model='a\\x00b'", "NUL")),
        ({"data": {"train": "a\0b"}}, ("data.train='a\\x00b'", "NUL")),
        ({"method": {"targets": ["a\0b"]}}, ("method.targets=['a\\x00b']", "NUL")),
        ({"seed": True, "data": {"trian": ""}}, ("seed=True", "data.trian")),
        ({"optimizer": {"clip": -1}}, ("--clip=-1",)),
    ],
)
def test_options_that_cannot_be_read_are_named(straight, place, capsys, options, data):
    config = json.loads((straight[0] / "config.json").read_text())
    del config["summary"]
    damaged = place / "damaged"
    damaged.mkdir(exist_ok=True)
    (damaged / "config.json").write_text(json.dumps({**config, "options": options}))
    error = error_of(capsys, "--resume", damaged)
    assert all(str(datum) in error for datum in (damaged / "config.json", *data)), error


@pytest.mark.weekly
def test_a_damaged_configuration_is_restored_from_a_checkpoint(straight, place, capsys):
    run = place / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "train_all", interrupted_at_its_end(Job.train_all))
        assert main([*map(str, finetune(place, run.name))]) == 143
    whole_one = (run / "config.json").read_bytes()
    (run / "config.json").write_bytes(whole_one[: len(whole_one) // 2])
    assert main(["predict", "--run", str(run), "--text", "good"]) == 2
    assert f"finetune --resume {run}" in capsys.readouterr().err
    assert main(["finetune", "--resume", str(run)]) == 0
    assert str(run / "config.json") in capsys.readouterr().out
    assert result(run) == result(straight[0])
    assert (
        json.loads((run / "config.json").read_text())["options"] == json.loads(whole_one)["options"]
    )


def interrupted_at_its_end(train_all):
    """`train_all`, but a signal arrives before the result is written."""

    def train(self, saving):
        train_all(self, saving)
        saving.interrupts.pending = signal.SIGTERM
        saving.interrupts.check()

    return train


def test_a_damaged_configuration_without_a_checkpoint_is_one_sentence(place, capsys):
    run = place / "nothing-saved"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"format": 1, "mod')
    error = error_of(capsys, "--resume", run)
    assert f"{run / 'config.json'} is damaged" in error and f"remove {run} and train again" in error
    (run / "checkpoints").rmdir()
    assert f"remove {run} and train again" in error_of(capsys, "--resume", run)


def test_options_are_the_same_after_json():
    flags = ["--train=a.csv", "--no-pack", "--metrics", "f1", "accuracy", "--epochs=2"]
    flags += ["--method", "lora", "--rank-pattern", "a", "1", "b", "2", "--targets", "x", "y"]
    options = parse(RunOptions, flags)
    again = from_plain(RunOptions, json.loads(json.dumps(plain(options))))
    assert again == replace(options, data=replace(options.data, train=(Path("a.csv").resolve(),)))
    assert again.method.rank_pattern == {"a": 1, "b": 2} and again.optimizer.epochs == 2.0


def test_a_link_to_rows_keeps_the_name_that_says_their_format(tmp_path, monkeypatch):
    """The Hub's cache links `rows.csv` to a file whose name is a hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_text("text,label\n")
    (tmp_path / "rows.csv").symlink_to("blobs/0a1b")
    (tmp_path / "linked").symlink_to("blobs")
    monkeypatch.chdir(tmp_path / "blobs")
    for path, expected in (
        ("../rows.csv", tmp_path / "rows.csv"),
        ("../linked/0a1b", tmp_path / "blobs" / "0a1b"),
        ("0a1b", tmp_path / "blobs" / "0a1b"),
        ("..", tmp_path),
        (".", tmp_path / "blobs"),
    ):
        assert absolute(Path(path)) == expected.parent.resolve() / expected.name
        assert _anywhere(path) == str(absolute(Path(path)))
    assert _anywhere("user/name") == "user/name"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_during_a_destructor_is_not_lost():
    class Deaf:
        def __del__(self):  # Python ignores what is raised here
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                pass

    with Interrupts() as interrupts, interrupts.deferred():
        with interrupts.at_once():
            Deaf()
        with raises(InterruptedRunError, "SIGTERM") as caught:
            interrupts.check()
    assert caught.value.status == 143


def meals(place, name):
    flags = ["--model", place / "llama", "--train", place / "meals.csv", "--prompt", "mr"]
    flags += ["--completion", "ref", "--max-length", 32, "--method", "lora", "--rank", 2]
    flags += ["--epochs", 2, "--exact-match", 0, "--no-baselines", "--checkpoint-every", 1]
    return ["finetune", *flags, "--runs", place, "--name", name]


@pytest.mark.weekly
def test_a_decoder_goes_on_from_the_one_before_a_damaged_checkpoint(commands, place):
    write_llama(place / "llama")
    write_meanings(place / "meals.csv")
    log, run = place / "log", place / "meals"
    assert commands.run(log, *meals(place, "straight-meals")) == 0, log.read_text()
    pid = commands.start(log, *meals(place, run.name))
    wait_for(lambda: len(whole(run)) > 1, log)
    os.kill(pid, signal.SIGINT)
    assert commands.wait() == 130
    before, newest = whole(run)[-2:]
    root = run / "checkpoints" / str(newest)
    largest = max((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    assert commands.run(log, "finetune", "--resume", run) == 0, log.read_text()
    name = largest.relative_to(root)
    assert f"step {newest} is damaged: {name}" in log.read_text()
    assert f"going on after step {before} of" in log.read_text()
    assert result(run) == result(place / "straight-meals")


@pytest.mark.slow
def test_runs_that_cannot_be_resumed_are_errors(straight, place, capsys):
    run = straight[0]
    assert f"{run}/report.html" in error_of(capsys, "--resume", run)
    error = error_of(capsys, "--resume", run, "--epochs", 3, "--method", "lora")
    assert "--epochs" in error and "--method" in error
    error = error_of(capsys, "--resume", place / "nothing")
    assert str(place / "nothing") in error and "config.json" in error
    assert f"finetune --resume {run}" in error_of(capsys, *finetune(place, run.name)[1:])
    config = json.loads((run / "config.json").read_text())
    del config["summary"]
    other = place / "other"
    other.mkdir()
    for key, value, datum in (
        ("stopped", "step 3: the loss is not finite", "step 3: the loss is not finite"),
        ("options", None, "adapters-jax finetune"),
        ("task_type", None, "task_type=None"),
        ("task_type", [], "task_type=[]"),
        ("data_sha256", "0" * 64, "data_sha256"),
        ("base_sha256", "0" * 64, "base_sha256"),
    ):
        (other / "config.json").write_text(json.dumps({**config, key: value}))
        error = error_of(capsys, "--resume", other)
        assert str(other) in error and datum in error, key


@pytest.mark.weekly
def test_a_mesh_is_part_of_a_run(straight, place):
    run = place / "meshed"
    assert main([*map(str, finetune(place, run.name)), "--mesh", "data=1,model=1"]) == 0
    (losses, _, found), (expected, _, best) = result(run), result(straight[0])
    assert found["best_step"] == best["best_step"]
    for ours, theirs in zip(losses.splitlines(), expected.splitlines(), strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours.keys() == theirs.keys()
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)


@pytest.mark.weekly
def test_a_full_disk_ends_a_run_that_resumes_later(straight, place, capsys, monkeypatch):
    run = place / "full"

    def full(self, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", full)
        assert main([*map(str, finetune(place, run.name))]) == 2
        err = capsys.readouterr().err
        assert os.strerror(errno.ENOSPC) in err and f"finetune --resume {run}" in err
    assert main(["finetune", "--resume", str(run)]) == 0
    assert result(run) == result(straight[0])


@pytest.mark.slow
def test_words_are_read_again_as_the_same_flags():
    flags = ["--train=a.csv", "--no-pack", "--metrics", "f1", "accuracy", "--text-pair=-x y"]
    flags += ["--method", "lora", "--rank-pattern", "a", "1", "b", "2", "--template={prompt} ="]
    options = parse(Finetune, [*flags, "--json"])
    again = parse(Finetune, words(options))
    assert again == replace(options, data=replace(options.data, train=(Path("a.csv").resolve(),)))
    assert words(again) == words(options)
    assert words(Finetune()) == []
