"""Reads each hand-made file in a process of its own, within bounds, whatever becomes of it.

    with Forked() as forked:
        forked.wrong("pixels: EPS")  # empty: it ended in a documented error, within the bounds

One process has imported everything and forks a child for each file. The child has limits of the
system, so that a reader that does not end, takes all memory or aborts is reported and no more. It
may start no program, and connect to nothing.
"""

import contextlib
import gc
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS, MEMORY = 2.0, 2**26  # of processor time; bytes beside twice those of the files
MOST_SECONDS, MOST_MEMORY, WAITING = 10, 2**33, 60.0  # where the system ends it
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class Forked:
    """The process that forks; a context."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.fuzz.forked"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(60)

    def wrong(self, name):
        """What is wrong with how a file ends; empty if nothing is."""
        self.process.stdin.write(f"{json.dumps(name)}\n".encode())
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def outcome(name):
    """Reads a file in this process, which then ends; returns what is wrong."""
    from fuzz.cases import Fuzzer
    from fuzz.corpus import CORPUS
    from fuzz.mutators import Spoilt

    entry = CORPUS[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gs").write_text("#!/bin/sh\n")  # Pillow would start it for EPS
        (Path(folder) / "gs").chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        fuzzer = Fuzzer(entry.target, folder, entry.seed or "")
        (valid,) = fuzzer.seeds.values()
        content = entry.content(valid.get(entry.name)) if callable(entry.content) else entry.content
        files = {**(valid if entry.name in valid else {}), entry.name: content}
        size = sum(len(content) for content in files.values())
        sys.addaudithook(refuse)
        limit()
        gc.collect()
        before = peak(reset=True)
        began = spent()
        error, wrong, _ = fuzzer.timed(Spoilt(name, (), files))
        took, more = spent() - began, peak() - before
    if not wrong and error is None and not entry.readable:
        wrong = "it was read"
    if not wrong and took > SECONDS:
        wrong = f"it took {took:.1f} s, expected at most {SECONDS} s"
    if not wrong and more > 2 * size + MEMORY:
        wrong = f"it took {more} bytes for {size}, expected at most {2 * size + MEMORY}"
    return wrong


def refuse(event, arguments):
    """Refuses to start programs but Python itself, and to connect."""
    if event in FORBIDDEN and arguments[0] != sys.executable:
        raise AssertionError(f"{event} {arguments[0]!r}")


def limit():
    """Sets limits of the system, at which this process ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent()) + MOST_SECONDS, hard))
    mapped = Path("/proc/self/statm")
    if mapped.exists():
        most = int(mapped.read_text().split()[0]) * resource.getpagesize() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def spent():
    """Seconds of processor time of this process and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak(reset=False):
    """The most bytes of memory so far, or from now on."""
    if reset and Path("/proc/self/clear_refs").exists():
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5")
    scale = 1 if sys.platform == "darwin" else 1024
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def answered(name):
    """What the child that reads a file says, or how it ended."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        wrong = "the fuzzer failed"
        try:
            wrong = outcome(name)
        except BaseException as error:
            wrong = f"the fuzzer failed: {type(error).__name__}: {error}"
        finally:
            os.write(writing, wrong.encode("utf-8", "replace")[:4000] or b" ")
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        until = time.monotonic() + WAITING
        ready, _, _ = select.select([stream], [], [], until - time.monotonic())
        said = stream.read().decode() if ready else ""
    if not ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if said:
        return said.strip()
    return f"it did not end in {WAITING} s" if not ready else f"the process ended with {status}"


def main():
    logging.disable()
    import PIL.Image
    import pyarrow.parquet  # noqa: F401
    import tokenizers  # noqa: F401

    from fuzz import targets  # noqa: F401

    PIL.Image.init()
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line))), flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    main()
