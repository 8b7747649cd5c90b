"""Runs contenders in their own processes, each with an interpreter that has its packages.

A side is a module with a function `make(job)`, which gets the settings of a job and returns an
object. The parent calls the public methods of the object. Its attribute `about` is sent first, and
its method `run` does the work that is timed. The parent calls the sides in turn, so they never work
at the same time, and a side times itself, so messages cost no time. This module needs only Python,
since the environments of peers lack adapters_jax.
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
    """A peer cannot be installed, or failed at a job; the message is its last line of output."""


def interpreter(environment: str) -> str:
    """Returns the Python of an environment, which is created the first time.

    Args:
        environment: `HERE`, or the NAME of a list of packages, `benchmarks/peers/NAME.txt`.

    Returns:
        The path of the interpreter.

    Raises:
        PeerError: the packages could not be installed.
    """
    if environment == HERE:
        return sys.executable
    packages = PEERS / f"{environment}.txt"
    tag = hashlib.sha256(packages.read_bytes() + sys.version.encode()).hexdigest()[:8]
    home = ROOT / f".venv-peer-{environment}-{tag}"
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"creating the environment of {environment}, which takes minutes", file=sys.stderr)
        venv = [sys.executable, "-m", "venv", "--clear", str(home)]
        pip = [str(python), "-m", "pip", "install", "--quiet", "-r", str(packages)]
        for command in (venv, pip):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                message = _last(ran.stderr) or _last(ran.stdout)
                raise PeerError(f"{environment} could not be installed: {message}")
        done.touch()
    return str(python)


class Worker:
    """The process of a side.

    Args:
        environment: as for `interpreter`.
        side: the name of the side's module in `benchmarks`.
        job: the settings of the job, as JSON values.
        env: environment variables to set for the process.

    Attributes:
        about: the side's description of itself, such as its trainable parameters.

    Raises:
        PeerError: the side could not be started, or failed at the job.
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
        """Calls a method of the side; raises PeerError if it fails."""
        return self._send({"do": what, **arguments})

    def __call__(self) -> float:
        """Does the work once, and returns the seconds that the side measured."""
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
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def peak_bytes() -> int:
    """The peak memory of this process since it started, or since `forget_peak`, in bytes."""
    return 1024 * int(_status("VmHWM").split()[0])


def forget_peak() -> None:
    """Resets the peak to the memory that is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(key))


def serve(side: str) -> None:
    """Answers the parent until it closes the pipe; libraries print to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Otherwise what libraries print would come at the end of the process, behind its error.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
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
