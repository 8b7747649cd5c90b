"""Runs of the command line that are killed and resumed, each in a process of its own.

Starting Python and importing jax takes longer than a tiny training. So one process imports all of
it, without starting a backend, and forks a child for each command that it reads from stdin.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

CHECKSUMS = "sha256.json"  # written last


class Commands:
    """A process that runs commands in children.

    Args:
        cache: a directory with compiled programs; None compiles in each child.
        fill: whether programs are written there. Those that are killed could leave a part of one.
    """

    def __init__(self, cache=None, fill=False):
        options = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in conftest
        if cache is not None:
            options["JAX_COMPILATION_CACHE_DIR"] = str(cache)
            options["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
            options["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0" if fill else "1e9"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **options},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()

    def start(self, log, *arguments):
        """Starts a command; its output goes to a file."""
        line = json.dumps({"log": str(log), "arguments": [*map(str, arguments)]})
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit status of the command that was started; negative if a signal ended it."""
        return int(self.process.stdout.readline())

    def run(self, log, *arguments):
        """A command's exit status."""
        self.start(log, *arguments)
        return self.wait()


def whole(run):
    """The steps of a run's checkpoints that are finished."""
    return sorted(int(p.parent.name) for p in (run / "checkpoints").glob(f"*/{CHECKSUMS}"))


def kill_and_resume(commands, run, first, seed, kills, seconds):
    """Starts a run, kills it at random instants and resumes it each time, then lets it finish.

    Returns:
        For each kill the finished checkpoints, whether a save was cut off, and the step that the
        next process resumed from; None if it was killed before its message.
    """
    chance = random.Random(seed)
    log, found = run.with_suffix(".log"), []

    def resumed():
        return ("finetune", "--resume", run) if run.exists() else first

    def note():
        message = re.search(r"going on after step (\d+)", log.read_text())
        if found:
            found[-1]["from"] = int(message[1]) if message else None

    def finished():
        return run.exists() and "summary" in json.loads((run / "config.json").read_text())

    for _ in range(kills):
        if finished():  # it was killed after it wrote its result
            return found
        pid = commands.start(log, *resumed())
        time.sleep(chance.uniform(0.0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.kill(pid, signal.SIGKILL)
        status = commands.wait()
        note()
        if status == 0:
            return found
        assert status == -signal.SIGKILL, log.read_text()
        cut = [*(run / "checkpoints").glob("*.orbax-checkpoint-tmp*")]
        found.append({"whole": whole(run), "cut": bool(cut), "from": None})
    while not finished():
        assert commands.run(log, *resumed()) == 0, log.read_text()
        note()
    return found


def main():
    import grain  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import sklearn.metrics  # noqa: F401

    from adapters_jax.finetune.cli import compare, finetune, serve  # noqa: F401
    from adapters_jax.finetune.cli import main as cli
    from adapters_jax.finetune.runs import prepare  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(command["log"], "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                try:
                    status = cli.main(command["arguments"])
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    status = 1
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
