"""Kills `finetune`, `compare` and `serve` at random instants, and looks whether anything is lost.

    python -m tests.kills --kills 200 --seed 1
    python -m tests.kills --kills 100 --seed 1 --targets serve

A run that was killed and resumed, several times, has to have the metrics, the adapter and the
summary of the run that was not, and each resumption goes on from the newest whole checkpoint. A
server that is started again has the adapters of its command line and those that it keeps, and
answers as the base and the runs do without a server, to requests and while adapters come and go.

The programs come from a compilation cache that the runs without a kill have filled. What is done is
in `.kills/`, and the same command goes on there.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from fuzz.stateful import TYPE, form  # noqa: E402
from fuzz.target import files_of  # noqa: E402
from helpers.finished import decoder_run  # noqa: E402
from helpers.kills import Commands, kill_and_resume  # noqa: E402
from helpers.tiny import write_model, write_reviews  # noqa: E402
from test_resume import finetune, result  # noqa: E402

RESULTS = ROOT / ".kills"  # ignored by git
EACH = 5  # kills of one run or server
PROMPT, TOKENS = "food food Thai", 8


def compare(place, name):
    """A comparison of two recipes, 8 steps each."""
    flags = ["--model", place / "tiny", "--train", place / "reviews.jsonl", "--text", "review"]
    flags += ["--max-length", 8, "--batch-size", 16, "--epochs", 2, "--limit", 64]
    recipes = ["houlsby --bottleneck-dim 2", "layer-norms"]
    return ["compare", *flags, "--recipes", *recipes, "--out", place / name]


def serve(place, name):
    """A server of a tiny Llama with one run, and room for others, which it keeps."""
    flags = ["--room", "lora --rank 3", "--context", 32, "--rows", 2, "--adapters", 3]
    flags += ["--keep", place / name]
    return ["serve", place / "llama", place / "runs/first", *flags, "--port", 0, "--json"]


def cells(directory):
    """All that must not differ in the runs of a comparison, by their paths."""
    runs = sorted(path.parent for path in directory.rglob("adapter") if path.is_dir())
    return {run.relative_to(directory).as_posix(): result(run) for run in runs}


def killed_later(commands, log, words, seconds):
    """Starts a command, and a timer that kills it; returns an event that the timer sets first."""
    pid, killed = commands.start(log, *words), threading.Event()

    def kill():
        killed.set()
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    return killed, timer


def kill_finetune(commands, place, name, number, seconds):
    """Kills a run and resumes it, several times; returns the kills."""
    found = kill_and_resume(commands, place / name, finetune(place, name), number, EACH, seconds)
    assert result(place / name) == result(place / "finetune"), f"{name} differs"
    lost = [k for k in found if k["from"] is not None and k["from"] != max(k["whole"])]
    assert not lost, f"{name} lost {lost}"
    return len(found)


def kill_compare(commands, place, name, number, seconds):
    """Kills a comparison and starts it again, several times; returns the kills."""
    chance, log, kills = random.Random(number), place / f"{name}.log", 0
    words = compare(place, name)
    for _ in range(EACH):
        _, timer = killed_later(commands, log, words, chance.uniform(0.0, seconds / 2))
        status = commands.wait()
        timer.cancel()
        if status == 0:
            break
        assert status == -signal.SIGKILL, log.read_text()
        kills += 1
    else:
        assert commands.run(log, *words) == 0, log.read_text()
    assert cells(place / name) == cells(place / "compare"), f"{name} differs"
    return kills


def kill_serve(commands, place, name, number, seconds):
    """Kills a server that is used, and starts it again, several times; returns the kills."""
    chance, log = random.Random(number), place / f"{name}.log"
    files = {kind: files_of(place / kind) for kind in ("llama", "runs")}
    for _ in range(EACH):
        log.unlink(missing_ok=True)
        words = serve(place, name)
        killed, timer = killed_later(commands, log, words, chance.uniform(0.2, 2.0) * seconds)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(use, place, log, killed) for use in (ask, change)]:
                done.result()
        timer.join()
        assert commands.wait() == -signal.SIGKILL, log.read_text()
    assert files == {kind: files_of(place / kind) for kind in files}, "the server wrote files"
    return EACH


def until_killed(use):
    """Has a client use a server until the server is killed, which ends a request in an error."""

    def used(place, log, killed):
        try:
            answers = json.loads((place / "answers.json").read_text())
            use(address(log, killed), answers, place, log.with_suffix("") / "noted.json")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error}: {error.read()}") from error
        except (OSError, http.client.HTTPException, ValueError):  # a part of an answer is no JSON
            assert killed.is_set(), f"it ended by itself: {log.read_text()}"

    return used


def address(log, killed):
    """Where a server listens, once it does."""
    while not killed.is_set():
        for line in log.read_text().splitlines() if log.exists() else ():
            if line.startswith("{") and line.endswith("}"):
                return json.loads(line)["address"]
        time.sleep(0.01)
    raise ConnectionError("it was killed before it listened")


def send(url, data=None, kind="application/json", method=None):
    """The answer of a server."""
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def text_of(url, model):
    """What a server writes."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    return send(f"{url}/v1/completions", json.dumps(body).encode())["choices"][0]["text"]


@until_killed
def ask(url, answers, *_):
    """Asks the base and the run of the command line, for ever."""
    while True:
        for model in ("llama", "first"):
            assert text_of(url, model) == answers[model], model


@until_killed
def change(url, answers, place, noted):
    """Adds, replaces and drops an adapter, for ever; a server that was started has what the last
    one kept: what was answered, or what was asked when it was killed, which `noted` has."""
    path = f"{url}/v1/adapters/new"
    runs = json.loads(noted.read_text()) if noted.exists() else [None]
    models = [each["id"] for each in send(f"{url}/v1/models")["data"]]
    assert models in (["llama", "first"], ["llama", "first", "new"]), models
    now = text_of(url, "new") if "new" in models else None
    assert now in [run and answers[run] for run in runs], (now, runs)
    now = next(run for run in runs if now == (run and answers[run]))

    def to(run, work):
        nonlocal now
        noted.write_text(json.dumps([now, run]))
        work()
        now = run
        noted.write_text(json.dumps([now]))

    while True:
        for run in ("second", "third"):
            data = form(files_of(place / "runs" / run / "adapter"))
            to(run, lambda data=data: send(path, data, TYPE, "PUT"))
            assert text_of(url, "new") == answers[run], run
        to(None, lambda: send(path, method="DELETE"))


def answers_of(place):
    """What the base and the runs write without a server: the run as in its training, the adapters
    that are added later to the prompt as it is."""
    from adapters_jax.finetune.inference import load_generator
    from adapters_jax.finetune.pretrained.decoder import complete, load_pretrained_decoder

    decoder = load_pretrained_decoder(str(place / "llama"))
    ids = [decoder.tokenizer.encode(PROMPT).ids]
    found = {"llama": complete(decoder.model, decoder, ids, TOKENS)[0]}
    for name in ("first", "second", "third"):
        alone = load_generator(place / "runs" / name)
        (asked,) = alone.generate([PROMPT], TOKENS)
        found[name] = asked if name == "first" else complete(alone.model, decoder, ids, TOKENS)[0]
    assert len(set(found.values())) > 2, found
    return found


KINDS = {
    "finetune": (finetune, kill_finetune),
    "compare": (compare, kill_compare),
    "serve": (serve, kill_serve),
}


def prepare(place):
    """Makes models and rows, and runs each command without a kill, which fills the cache."""
    shutil.rmtree(place, ignore_errors=True)
    write_model(place / "tiny")
    write_reviews(place / "reviews.jsonl")
    with contextlib.chdir(place):
        decoder_run("--method lora --rank 2", "first")
        decoder_run("--method lora --rank 3 --targets **/value", "second")
        decoder_run("--method lora --rank 1", "third")
    (place / "answers.json").write_text(json.dumps(answers_of(place)))
    with Commands(place / "cache", fill=True) as commands:
        for name in KINDS:
            once(commands, place, name, name)
    with Commands(place / "cache") as commands:
        took = {name: once(commands, place, name, f"{name}-again") for name in KINDS}
    (place / "state.json").write_text(json.dumps({"round": 0, "kills": {}, "seconds": took}))


def once(commands, place, kind, name):
    """Runs a command to its end, or a server until it has answered; returns the seconds."""
    began, log, words = time.monotonic(), place / f"{name}.log", KINDS[kind][0](place, name)
    if kind != "serve":
        assert commands.run(log, *words) == 0, log.read_text()
        return time.monotonic() - began
    pid = commands.start(log, *words)
    text_of(address(log, threading.Event()), "llama")
    took = time.monotonic() - began
    os.kill(pid, signal.SIGTERM)
    assert commands.wait() in (0, -signal.SIGTERM), log.read_text()
    return took


def main(words):
    """Kills until there are as many kills of the commands as asked, about as many of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args(words)
    place = RESULTS / str(options.seed)
    if not (place / "state.json").exists():
        print("preparing", flush=True)
        prepare(place)
    state = json.loads((place / "state.json").read_text())
    with Commands(place / "cache") as commands:
        while sum(state["kills"].get(kind, 0) for kind in options.targets) < options.kills:
            kind = options.targets[state["round"] % len(options.targets)]
            number, name = options.seed * 10_000 + state["round"], f"{kind}-{state['round']}"
            shutil.rmtree(place / name, ignore_errors=True)  # of a round that was not finished
            began, seconds = time.monotonic(), 0.8 * state["seconds"][kind]
            kills = KINDS[kind][1](commands, place, name, number, seconds)
            shutil.rmtree(place / name, ignore_errors=True)
            state["kills"][kind] = state["kills"].get(kind, 0) + kills
            state["round"] += 1
            (place / "state.json.new").write_text(json.dumps(state))
            (place / "state.json.new").replace(place / "state.json")
            shown = f"{name}: {kills} kills in {time.monotonic() - began:.0f} s"
            print(f"{shown}; in all {json.dumps(state['kills'])}, nothing lost", flush=True)
    print(f"{sum(state['kills'].values())} kills, nothing lost: {json.dumps(state['kills'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
