"""Kills `finetune` and `compare` at random instants, resumes them, and compares every bit.

    python -m tests.kills --kills 200 --seed 1

A run that was killed and resumed, several times, has to have the metrics, the adapter and the
summary of the run that was not; and each resumption goes on from the newest whole checkpoint.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from helpers.kills import Commands, kill_and_resume  # noqa: E402
from helpers.tiny import write_model, write_reviews  # noqa: E402
from test_resume import finetune, result  # noqa: E402

EACH = 5  # kills of one run


def compare(place, name):
    """A comparison of two recipes and two seeds, 8 steps each."""
    flags = ["--model", place / "tiny", "--train", place / "reviews.jsonl", "--text", "review"]
    flags += ["--max-length", 8, "--batch-size", 16, "--epochs", 2, "--limit", 64]
    recipes = ["houlsby --bottleneck-dim 2", "layer-norms"]
    return ["compare", *flags, "--recipes", *recipes, "--seeds", 0, 1, "--out", place / name]


def cells(directory):
    """All that must not differ in the runs of a comparison, by their paths."""
    runs = sorted(path.parent for path in directory.rglob("adapter") if path.is_dir())
    return {run.relative_to(directory).as_posix(): result(run) for run in runs}


def kill_compare(commands, place, name, seed, kills, seconds):
    """Starts a comparison, kills it, starts it again, and lets it finish; counts the kills."""
    chance, log, killed = random.Random(seed), place / f"{name}.log", 0
    for _ in range(kills):
        pid = commands.start(log, *compare(place, name))
        time.sleep(chance.uniform(0.0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.kill(pid, signal.SIGKILL)
        status = commands.wait()
        if status == 0:
            return killed
        assert status == -signal.SIGKILL, log.read_text()
        killed += 1
    assert commands.run(log, *compare(place, name)) == 0, log.read_text()
    return killed


def straight(commands, place, words):
    """Runs a command to its end; about how long it takes once all is compiled."""
    began, log = time.monotonic(), place / "log"
    assert commands.run(log, *words) == 0, log.read_text()
    return 0.7 * (time.monotonic() - began)


def main(words):
    """Kills until there are as many kills as asked, half of them of each command."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    counts = {"finetune": 0, "compare": 0}
    with tempfile.TemporaryDirectory() as folder, Commands() as commands:
        place = Path(folder)
        write_model(place / "tiny")
        write_reviews(place / "reviews.jsonl")
        seconds = straight(commands, place, finetune(place, "straight"))
        expected = result(place / "straight")
        together = straight(commands, place, compare(place, "together"))
        every, during = cells(place / "together"), 0
        number = options.seed * 10_000
        while min(counts.values()) * 2 < options.kills:
            number += 1
            name = f"finetune-{number}"
            found = kill_and_resume(
                commands, place / name, finetune(place, name), number, EACH, seconds
            )
            assert result(place / name) == expected, f"{name} differs"
            lost = [k for k in found if k["from"] is not None and k["from"] != max(k["whole"])]
            assert not lost, f"{name} lost {lost}"
            counts["finetune"] += len(found)
            during += sum(kill["cut"] for kill in found)
            name = f"compare-{number}"
            counts["compare"] += kill_compare(commands, place, name, number, EACH, together)
            assert cells(place / name) == every, f"{name} differs"
            print(f"{json.dumps(counts)}, {during} during a save, nothing lost", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
