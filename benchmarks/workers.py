"""Contenders in processes of their own, each in the interpreter that has what it needs.

A side is a module with a function `make(job)`: it gets a job's settings and returns an object whose
public methods are what can be asked of it; `about` is said at once, `run` does the work that is
timed and returns when it is done. The parent asks in turn, so that sides never work at the same
time, and a side times itself, so that asking costs nothing. Nothing here needs more than Python:
peers have environments without adapters_jax.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

PEERS = Path(__file__).parent / "peers"
HERE = "here"  # the interpreter that runs the benchmark
Message = dict[str, Any]


class PeerError(RuntimeError):
    """A peer that cannot be installed, or cannot do a job; the message is its last words."""


def interpreter(environment: str) -> str:
    """The Python of an environment, made where it is not there yet.

    Args:
        environment: `HERE`, or a name whose packages `benchmarks/peers/NAME.txt` lists.

    Raises:
        PeerError: its packages could not be installed.
    """
    if environment == HERE:
        return sys.executable
    wanted = PEERS / f"{environment}.txt"
    tag = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()[:8]
    home = ROOT / f".venv-peer-{environment}-{tag}"
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"making the environment of {environment}: some minutes, once", file=sys.stderr)
        venv = [sys.executable, "-m", "venv", "--clear", str(home)]
        pip = [str(python), "-m", "pip", "install", "--quiet", "-r", str(wanted)]
        for command in (venv, pip):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                said = _last(ran.stderr) or _last(ran.stdout)
                raise PeerError(f"{environment} could not be installed: {said}")
        done.touch()
    return str(python)


class Worker:
    """A side's process, asked from here.

    Args:
        environment: as for `interpreter`.
        side: the module's name, below `benchmarks`.
        job: its settings, as JSON has them.
        env: variables of its process beside those of ours.

    Attributes:
        about: what it says of itself, such as its trainable parameters.

    Raises:
        PeerError: it cannot be made, or cannot do the job.
    """

    def __init__(
        self, environment: str, side: str, job: Message, env: Mapping[str, str] | None = None
    ):
        python = interpreter(environment)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.workers", side],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.about: Message = self._send(job)
        except PeerError:
            self.close()
            raise

    def ask(self, what: str, /, **arguments: Any) -> Any:
        """Calls a method of the side; raises PeerError where it fails."""
        return self._send({"do": what, **arguments})

    def __call__(self) -> float:
        """Does the work once; its seconds, by the side's own clock."""
        return float(self.ask("run"))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _send(self, message: Message) -> Any:
        pipe: Any = self._process
        try:
            print(json.dumps(message), file=pipe.stdin, flush=True)
            answer = pipe.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        pipe.wait()
        self._errors.seek(0)
        raise PeerError(_last(self._errors.read()) or f"ended with status {pipe.returncode}")


def _last(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def peak_bytes() -> int:
    """The most memory that this process has held since it began, or since `forget_peak`."""
    return 1024 * int(_status("VmHWM").split()[0])


def forget_peak() -> None:
    """Counts the peak anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key))


def serve(side: str) -> None:
    """Answers the parent until it hangs up; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    made = importlib.import_module(f"benchmarks.{side}").make(json.loads(sys.stdin.readline()))
    answer = made.about
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        message = json.loads(line)
        what = message.pop("do")
        if what == "peak":
            answer = peak_bytes()
        elif what == "forget_peak":
            answer = forget_peak()
        elif what == "run":
            began = time.perf_counter()
            own = made.run()
            answer = time.perf_counter() - began if own is None else own
        else:
            answer = getattr(made, what)(**message)


if __name__ == "__main__":
    serve(sys.argv[1])
