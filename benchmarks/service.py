"""Training as a service: what HTTP and the queue add to a step, and a server that tenants come and
go on.

The overhead is that of Tinker's own client and of our server, which share a process here, against
the same requests to the engine. The churn runs against `adapters-jax serve --train` in another
process, whose memory is read as tenants are created, trained, saved and dropped.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from adapters_jax.finetune.serving.adapters import DecoderBase
from adapters_jax.finetune.tenants.engine import Tenants
from adapters_jax.finetune.tenants.requests import Adam, Row
from adapters_jax.finetune.tinker.recipes import Recipes
from benchmarks.harness import Spread, interleave
from benchmarks.report import Report

HTTP, ENGINE = "client and server", "engine"
LIMIT, CREATE, FLAT = 1.05, 0.05, 1.05  # of a step, in seconds, of memory
KEY = "tml-benchmark"
RATE = 1e-4


def run(report: Report, quick: bool, part: str = "") -> None:
    """Runs the overhead, or only the part `churn`; toy sizes if quick."""
    if part:
        with tempfile.TemporaryDirectory() as folder:
            churn(report, Path(folder), 40 if quick else 10_000)
        return
    base = DecoderBase("smollm2-135m")
    rows, length = 8, 16 if quick else 512
    small = replace(base.decoder.config, vocab_size=64, hidden_size=36, num_hidden_layers=1)
    whole = base.decoder
    base.decoder = replace(whole, model=Decoder(small, rngs=nnx.Rngs(0)), config=small)
    more = overhead(report, base, rows, length, 3 if quick else 25)
    if not quick:
        base.decoder = whole
    step = alone(report, base, rows, length, 1 if quick else 2)
    for clock, seconds in more.items():
        case = (
            f"{clock} time of a step of SmolLM2-135M, {rows} x {length}, through client and server"
        )
        report.claim(f"{case} / engine", round(1 + seconds / step[clock], 4), LIMIT)


def _rows(vocabulary: int, rows: int, length: int) -> tuple[list[Row], np.ndarray]:
    """Rows for the engine, and their tokens with the one behind the last."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1))
    ones = np.ones(length, np.float32)
    return [Row(each[:-1], each[1:], {"weights": ones}) for each in ids], ids


def _timed(
    runs: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """The seconds of each round by clock and contender; the processor's are of all threads."""
    found: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in runs} for clock in ("wall", "processor")
    }

    def timed(name: str, go: Callable[[], None]) -> float:
        used, start = time.process_time(), time.perf_counter()
        go()
        wall, used = time.perf_counter() - start, time.process_time() - used
        found["wall"][name].append(wall)
        found["processor"][name].append(used)
        return wall

    interleave({name: partial(timed, name, go) for name, go in runs.items()}, rounds)
    return {
        clock: {name: values[1:] for name, values in every.items()}  # the first warms up
        for clock, every in found.items()
    }


def _through(tenants: Tenants, own: list[Row]) -> None:
    """A step through the engine."""
    passed = tenants.forward_backward("0", own, "cross_entropy")
    stepped = tenants.optim_step("0", Adam(RATE))
    passed.result()
    stepped.result()


def overhead(
    report: Report, base: DecoderBase, rows: int, length: int, rounds: int
) -> dict[str, float]:
    """What Tinker's client and the server add to a step, in seconds by clock.

    The model computes next to nothing, so that it does not hide them; what they read and write
    depends on the rows alone.
    """
    import tinker
    from tinker import types

    own, ids = _rows(base.decoder.config.vocab_size, rows, length)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(each[:-1].tolist()),
            loss_fn_inputs={"target_tokens": each[1:], "weights": np.ones(length, np.float32)},
        )
        for each in ids
    ]
    with tempfile.TemporaryDirectory() as folder, _service(base, rows, length, Path(folder)) as it:
        address, tenants, largest = it
        tenants.create("0", largest, 0)
        client = tinker.ServiceClient(base_url=address, api_key=KEY)
        model: Any = client.create_lora_training_client("base", rank=8, seed=0)
        model = model.result() if hasattr(model, "result") else model

        def through_client() -> None:
            passed = model.forward_backward(data, "cross_entropy")
            stepped = model.optim_step(types.AdamParams(learning_rate=RATE))
            passed.result()
            stepped.result()

        runs = {HTTP: through_client, ENGINE: partial(_through, tenants, own)}
        found, more = _timed(runs, rounds), {}
        for clock, seconds in found.items():
            report.samples(f"one layer, {clock}", seconds)
            pairs = zip(seconds[HTTP], seconds[ENGINE], strict=True)
            added = Spread.of(1e3 * (a - b) for a, b in pairs)
            row: dict[str, Any] = {name: Spread.of(values) for name, values in seconds.items()}
            what = f"Seconds of a step of one layer of 36, {rows} x {length}"
            report.add(what, clock=clock, **row, **{"ms more": added})
            more[clock] = added.median / 1e3
        client.close("success").result()
    return more


def alone(
    report: Report, base: DecoderBase, rows: int, length: int, rounds: int
) -> dict[str, float]:
    """The seconds of a step of the engine, by clock; and of new tenants of a known recipe."""
    largest = Recipes(base, 8).largest
    tenants = Tenants(
        base.decoder.model, largest, places=2, rows=rows, group=rows, lengths=(length,)
    )
    tenants.start()
    took = []
    for i in range(9):
        start, used = time.perf_counter(), time.process_time()
        tenants.create(f"{i}", largest, i)
        took.append((time.perf_counter() - start, time.process_time() - used))
    own, _ = _rows(base.decoder.config.vocab_size, rows, length)
    found = _timed({ENGINE: partial(_through, tenants, own)}, rounds)
    tenants.close()
    for clock, seconds in found.items():
        what = f"Seconds of a step of SmolLM2-135M, {rows} x {length}"
        report.add(what, clock=clock, **{ENGINE: Spread.of(seconds[ENGINE])})
    for clock, values in zip(found, zip(*took, strict=True), strict=True):
        case = f"{clock} seconds for a new tenant of SmolLM2-135M, LoRA of rank 8 on all layers"
        report.claim(case, Spread.of(values), CREATE)
    return {clock: Spread.of(seconds[ENGINE]).median for clock, seconds in found.items()}


@contextlib.contextmanager
def _service(
    base: DecoderBase, rows: int, length: int, folder: Path
) -> Iterator[tuple[str, Tenants, Any]]:
    """A server in a thread: its address, its engine, and the largest recipe."""
    import uvicorn

    from adapters_jax.finetune.serving import Engine, Sizes
    from adapters_jax.finetune.serving.api import application
    from adapters_jax.finetune.serving.completions import TextApi
    from adapters_jax.finetune.serving.guard import Limits
    from adapters_jax.finetune.tinker.api import TrainingApi
    from adapters_jax.finetune.tinker.checkpoints import Checkpoints
    from adapters_jax.finetune.tinker.futures import Bounds
    from adapters_jax.finetune.tinker.service import Service

    recipes, limits = Recipes(base, 8), Limits()
    bank = aj.Bank(base.adapted(recipes.largest), capacity=1)
    engine = Engine(bank, Sizes(rows=1, context=length))  # which samples, and is not started
    sizes: dict[str, Any] = {"places": 2, "rows": rows, "group": rows, "lengths": (length,)}
    tenants = Tenants(base.decoder.model, recipes.largest, **sizes)
    tenants.start()
    saved = Checkpoints(folder / "kept")
    service = Service(base, engine, tenants, saved, recipes, Bounds(), 600.0)
    api = TextApi(base, engine, "base", limits)
    api.training = TrainingApi(service, ("base",), length, limits)
    config = uvicorn.Config(application(api, "", limits, (KEY,)), port=0, log_level="error")
    config.lifespan, config.ws = "off", "none"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", tenants, recipes.largest
    finally:
        server.should_exit = True
        thread.join()
        tenants.close()


def churn(report: Report, folder: Path, n: int) -> None:
    """Tenants that come, train, save and go: eight clients at a time, and places for four."""
    _write_base(folder / "base")
    command = [sys.executable, "-m", "adapters_jax", "serve", "base", "--train", "--rank", "8"]
    command += ["--context", "32", "--rows", "4", "--places", "4", "--adapters", "16"]
    command += ["--keep", "kept", "--port", "0", "--json"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen, took, numbers, lock = list[int](), list[float](), iter(range(n)), threading.Lock()

    def work(address: str) -> None:
        with _Plain(address) as client:
            while (i := next(numbers, None)) is not None:
                start = time.perf_counter()
                model = client.create(i)
                took.append(time.perf_counter() - start)
                client.train(model[0])
                client.drop(*model)
                with lock:
                    if len(took) >= (len(seen) + 1) * n // 10:
                        seen.append(_memory(process.pid))
                        report.add("Memory of the server", tenants=len(took), MB=seen[-1] / 1e6)

    try:
        address = json.loads(process.stdout.readline())["address"]
        start, used = time.perf_counter(), _processor_seconds(process.pid)
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, address) for _ in range(8)]:
                done.result()
        seconds = time.perf_counter() - start
        used = _processor_seconds(process.pid) - used
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    report.add(
        "Tenants, created, trained, saved and dropped, 8 at a time",
        tenants=n,
        seconds=seconds,
        **{"processor seconds of the server": used, "seconds to create": Spread.of(took)},
    )
    grown = round(seen[-1] / seen[0], 3)
    report.claim(f"memory after {n:,} tenants / after {n // 10:,}", grown, FLAT)


class _Plain:
    """The protocol's requests without the client, which would hold every tenant that it made."""

    def __init__(self, address: str) -> None:
        import httpx

        self._http = httpx.Client(base_url=f"{address}/api/v1/", timeout=60)

    def __enter__(self) -> "_Plain":
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.close()

    def _ask(self, path: str, body: Any, **headers: str) -> Any:
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        answer = self._http.post(path, headers={"X-API-Key": KEY, **headers}, **given)
        answer.raise_for_status()
        return answer.json()

    def _done(self, begun: Any) -> Any:
        """The answer to a request, once it is there."""
        body = {"request_id": begun["request_id"]}
        while True:
            answer = self._http.post("retrieve_future", json=body, headers={"X-API-Key": KEY})
            answer.raise_for_status()
            if "json" not in answer.headers["content-type"]:
                return None
            found = answer.json()
            assert "error" not in found, found
            if found.get("type") != "try_again":
                return found

    def create(self, i: int) -> tuple[str, str]:
        """A session with a model: their names."""
        session = self._ask(
            "create_session", {"tags": [], "user_metadata": None, "sdk_version": "0"}
        )["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
        made = self._done(
            self._ask("create_model", {**body, "lora_config": {"rank": 1 + i % 8, "seed": i}})
        )
        return made["model_id"], session

    def train(self, model: str) -> None:
        """A step and a save, whose requests are all sent before the first answer is asked for."""
        from tinker.proto import tinker_public_pb2 as pb

        message = pb.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="cross_entropy")
        datum, ids = message.data.add(), np.arange(2, 12)
        datum.model_input.add().encoded_text.tokens = ids[:-1].astype("<i4").tobytes()
        targets = pb.Tensor(dense=ids[1:].astype("<i8").tobytes(), dtype=pb.DTYPE_INT64, shape=[9])
        datum.loss_fn_inputs["target_tokens"].CopyFrom(targets)
        begun = [
            self._ask(
                "forward_backward",
                message.SerializeToString(),
                **{"Content-Type": "application/x-protobuf"},
            ),
            self._ask(
                "optim_step",
                {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 0.01}},
            ),
            self._ask("save_weights", {"model_id": model, "seq_id": 3, "path": "last"}),
        ]
        for each in begun:
            self._done(each)

    def drop(self, model: str, session: str) -> None:
        """Takes a model away, with its checkpoint and its session."""
        path = f"training_runs/{model}/checkpoints/weights/last"
        self._http.delete(path, headers={"X-API-Key": KEY}).raise_for_status()
        self._done(self._ask("unload_model", {"model_id": model}))
        self._ask(f"sessions/{session}/finish", {})


def _memory(process: int) -> int:
    """The bytes of a process in memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _processor_seconds(process: int) -> float:
    """The seconds that a process and its threads have computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _write_base(folder: Path) -> None:
    """A tiny decoder with a tokenizer."""
    config = DecoderConfig(64, 32, 48, 2, 4, 2)
    folder.mkdir()
    save_decoder(folder, config, Decoder(config, rngs=nnx.Rngs(0)))
    words = {f"<{i}>": i for i in range(64)}
    Tokenizer(models.WordLevel(words, "<0>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<1>"}))
