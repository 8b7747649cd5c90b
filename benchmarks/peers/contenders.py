"""Starts and times the contenders; a contender that fails becomes a row of the report."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from benchmarks.harness import interleave
from benchmarks.report import Report
from benchmarks.sides.job import Job, Tenancy
from benchmarks.workers import HERE, PeerError, Worker, interpreter

TORCH, TX = "torch", "skyrl"
FAILED = "Not done"
# By default, glibc returns each step's temporaries to the system, and allocating them again costs
# page faults. With these variables it keeps them. The main comparison does not set them.
KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class Contender:
    """A side, the environment of its packages, and what is set for it.

    Attributes:
        side: the name of its module in `benchmarks.sides`.
        environment: as for `benchmarks.workers.interpreter`.
        env: environment variables of its process.
        settings: fields of the job that are others than the group's.
    """

    side: str
    environment: str = HERE
    env: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


OURS, HAND, PEFT, HUB, QWIX = "adapters_jax", "by hand, Flax", "PEFT", "AdapterHub", "qwix"
NNX_LORA, SKYRL = "flax nnx.LoRA", "SkyRL"
CONTENDERS = {
    OURS: Contender("ours"),
    HAND: Contender("hand"),
    NNX_LORA: Contender("nnx_lora"),
    QWIX: Contender("qwix_lora"),
    PEFT: Contender("torch_peft", TORCH),
    HUB: Contender("torch_adapters", TORCH),
}
MATMULS = {HERE: "matmul, jax", TORCH: "matmul, torch"}


def matmuls() -> dict[str, Contender]:
    """A matrix product in each environment, by its name in `MATMULS`."""
    sides = {HERE: "matmul_jax", TORCH: "matmul_torch"}
    return {MATMULS[name]: Contender(side, name) for name, side in sides.items()}


@cache
def unavailable(environment: str) -> str | None:
    """Why an environment cannot be installed, or None; it is tried once in a run."""
    try:
        interpreter(environment)
    except PeerError as error:
        return str(error)
    return None


def kept(name: str) -> str:
    return f"{name}, malloc kept"


def with_malloc_kept(*names: str) -> dict[str, Contender]:
    """The named contenders, with an allocator that keeps freed memory."""
    found = {kept(name): CONTENDERS[name] for name in names}
    return {name: Contender(c.side, c.environment, KEPT) for name, c in found.items()}


class Group:
    """The contenders of one job, each in its own process; to be used in a `with`.

    Attributes:
        workers: the workers that have not failed, by name.
        environments: the environments of all that were started, by name.
    """

    def __init__(self, report: Report, what: str):
        self.report, self.what = report, what
        self.workers: dict[str, Worker] = {}
        self.environments: dict[str, str] = {}

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def start(self, contenders: Mapping[str, Contender], job: Job | Tenancy) -> None:
        """Starts contenders, two at a time; a contender that fails becomes a row."""
        missing = {c.environment: unavailable(c.environment) for c in contenders.values()}

        def make(contender: Contender) -> Worker | PeerError:
            if why := missing[contender.environment]:
                return PeerError(why)
            side, settings = f"sides.{contender.side}", {**job.as_json(), **contender.settings}
            try:
                return Worker(contender.environment, side, settings, contender.env)
            except PeerError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(make, contenders.values()))
        for (name, contender), worker in zip(contenders.items(), made, strict=True):
            if isinstance(worker, PeerError):
                self.fail(name, worker)
            else:
                self.workers[name], self.environments[name] = worker, contender.environment
                self._versions(name)

    def _versions(self, name: str) -> None:
        """Adds a row with the versions of a contender, once in a report."""
        found = ", ".join(f"{k} {v}" for k, v in self.workers[name].about["versions"].items())
        row = {"table": "Versions", "side": name, "versions": found}
        if row not in self.report.rows:
            self.report.add(**row)

    def fail(self, name: str, error: PeerError) -> None:
        """Adds a row with the error, and ends the contender's worker if there is one."""
        self.report.add(FAILED, job=self.what, contender=name, why=str(error))
        if name in self.workers:
            self.workers.pop(name).close()

    def ask(
        self, what: str, names: Sequence[str] | None = None, /, **arguments: Any
    ) -> dict[str, Any]:
        """Asks all contenders, or the named ones; returns the answers by name, without failures."""
        answers = {}
        for name in list(self.workers) if names is None else names:
            if name not in self.workers:
                continue
            try:
                answers[name] = self.workers[name].ask(what, **arguments)
            except PeerError as error:
                self.fail(name, error)
        return answers

    def time(
        self, runs: Mapping[Any, tuple[str, dict[str, Any]]], rounds: int, warmup: int = 1
    ) -> dict[Any, list[float]]:
        """Times runs in turn; returns the seconds of each round, by key.

        Args:
            runs: by key, the name of a contender and the arguments of its `time`; `{}` for `run`.
            rounds, warmup: as in `interleave`.
        """

        def one(name: str, arguments: dict[str, Any]) -> Callable[[], float]:
            def run() -> float:
                if name not in self.workers:
                    return float("nan")
                what = "time" if arguments else "run"
                return self.ask(what, [name], **arguments).get(name, float("nan"))

            return run

        seconds = interleave({key: one(*run) for key, run in runs.items()}, rounds, warmup)
        seconds = {key: seconds[key] for key, (name, _) in runs.items() if name in self.workers}
        self.report.samples(self.what, {str(key): values for key, values in seconds.items()})
        return seconds
