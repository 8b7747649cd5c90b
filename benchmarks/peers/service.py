"""Measures two servers of Tinker's protocol: tenants that train and sample, through the client.

Both servers hold the same base, and each has its own process. Each is asked by the newest client
that it understands. Both must have the base's losses at the first step before they are timed.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, Spread, interleave, ratio
from benchmarks.peers import files
from benchmarks.peers.contenders import OURS, SKYRL, Contender, Group
from benchmarks.peers.linear import NAMES
from benchmarks.report import Report
from benchmarks.sides.job import Tenancy
from benchmarks.workers import HERE, PeerError, interpreter

SERVER, END = "skyrl-server", "</s>"
WORDS = {**files.WORDS, "vocab": {"x": 0, END: 1}}
TENANTS, ROWS = 8, 4
CLOSE = 1e-4  # of the first losses, by which a wrong base or mask would show
WAIT = 900.0


def run(report: Report, quick: bool) -> None:
    """Times steps and samples of eight tenants; at toy sizes if quick."""
    sizes, rounds = (files.TOY, 2) if quick else (files.Sizes(), 7)
    length = sizes.qwen_tokens[1]
    prompt, tokens = length // 2, length // 2
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as servers,
        Group(report, f"eight tenants through Tinker's client, {NAMES['qwen']}") as group,
    ):
        files.write_decoder(Path(folder), sizes, "qwen")
        base, processes = Path(folder, "qwen"), {}
        # Both servers decode what they sample, and end it at this word.
        (base / "tokenizer.json").write_text(json.dumps(files.TOKENIZER | {"model": WORDS}))
        (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
        for name, start, environment in ((OURS, ours, HERE), (SKYRL, skyrl, SERVER)):
            address, known, process = servers.enter_context(start(base, sizes.rank, length))
            processes[name] = process
            job = Tenancy(
                *(address, known, TENANTS, ROWS, length, sizes.qwen.vocab_size, sizes.rank),
                *(prompt, tokens),
            )
            group.start({name: Contender("tinker_client", environment)}, job)
        _time(report, group, processes, rounds, length)


def _time(
    report: Report, group: Group, processes: dict[str, int], rounds: int, tokens: int
) -> None:
    """Times both sides in turn, and reads what their servers held at most."""
    losses = {name: found[0] for name, found in group.ask("losses", steps=1).items()}
    first = np.array(list(losses.values()))
    if not np.all(np.ptp(first, axis=0) <= CLOSE * np.abs(first).max()):
        raise ValueError(f"the servers do not have the same losses: {losses}")
    trained = group.time({name: (name, {}) for name in group.workers}, rounds, warmup=2)
    group.ask("save")
    made: dict[str, list[float]] = {name: [] for name in group.workers}

    def sampled(name: str) -> float:
        start = time.perf_counter()
        new = group.ask("sample", [name], seed=len(made[name]))[name]
        took = time.perf_counter() - start
        made[name].append(new / took)
        return took / new  # since a side may end a sample early

    seconds = interleave({name: lambda name=name: sampled(name) for name in made}, rounds, 2)
    report.samples("seconds a sampled token", seconds)
    rows = TENANTS * ROWS * tokens
    for name in group.workers:
        report.add(
            "Eight tenants through Tinker's client",
            side=name,
            **{
                "tokens trained a second": Spread.of(rows / each for each in trained[name]),
                "tokens sampled a second": Spread.of(1 / each for each in seconds[name]),
                "peak MiB of the server": _peak(processes[name]) / 2**20,
            },
        )
    if {OURS, SKYRL} <= set(group.workers):
        case = f"{TENANTS} x {ROWS} x {tokens}, through Tinker's client, {OURS} / {SKYRL}"
        peaks = _peak(processes[OURS]) / _peak(processes[SKYRL])
        for what, found in (
            ("time of a step of tenants", ratio(trained, OURS, SKYRL)),
            ("time of a sampled token", ratio(seconds, OURS, SKYRL)),
            ("peak memory of the server", round(peaks, 4)),
        ):
            report.claim(f"{what}, {case}", found, 1.0)


@contextlib.contextmanager
def ours(base: Path, rank: int, length: int) -> Iterator[tuple[str, str, int]]:
    """Our server: its address, its name of the base, and its process."""
    command = [sys.executable, "-m", "adapters_jax", "serve", str(base), "--train", "--json"]
    command += ["--name", "base", "--rank", str(rank), "--rows", str(TENANTS * ROWS), "--port", "0"]
    command += ["--places", str(TENANTS + 1), "--adapters", str(4 * TENANTS)]
    command += ["--context", str(length)]
    with _process(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"], "base", process.pid


@contextlib.contextmanager
def skyrl(base: Path, rank: int, length: int) -> Iterator[tuple[str, str, int]]:
    """SkyRL's server, as `ours`. It starts its engine with `uv run`, which is a script here."""
    python = interpreter(SERVER)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        runner = Path(folder, "uv")  # not exec: the server reads its parent's arguments
        runner.write_text(
            f'#!/bin/sh\nwhile [ "$1" != -m ]; do shift; done\n{python} "$@"\nexit $?\n'
        )
        runner.chmod(0o755)
        config = {"max_lora_adapters": TENANTS + 1, "max_lora_rank": rank}
        command = [str(runner), "run", "-m", "tx.tinker.api", "--port", str(port)]
        command += ["--base-model", str(base), "--backend-config", json.dumps(config)]
        command += ["--database-url", f"sqlite:///{folder}/tinker.db"]
        command += ["--checkpoints-base", folder, "--host", "127.0.0.1"]
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        with _process(command, env=environment) as process:
            address = f"http://127.0.0.1:{port}"
            _answers(f"{address}/api/v1/healthz", process)
            yield address, str(base), process.pid


@contextlib.contextmanager
def _process(command: list[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a new session; at the end it is killed with all that it started."""
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **how)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(address: str, process: subprocess.Popen[str]) -> None:
    """Waits until an address answers."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.5)
    raise PeerError(f"{address} did not answer")


def _peak(process: int) -> int:
    """The peak memory of the processes in a session, added up, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == process:
                lines = (folder / "status").read_text().splitlines()
                held = [line for line in lines if line.startswith("VmHWM")]
                total += sum(1024 * int(line.split()[1]) for line in held)
    return total
