"""The settings of a side, and the two kinds of objects that it makes; needs only numpy."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RATE, DECAY, LABELS = 1e-3, 0.01, 2


@dataclass(frozen=True)
class Job:
    """The settings of a side.

    Attributes:
        task: "step", "forward", "generate", "uses" (adapt, save, load, switch) or "matmul".
        directory: the directory that `benchmarks.peers.files` filled.
        model: "bert", or a decoder: "llama" or "qwen".
        method: "lora" on queries and values, "lora-all" on all linear layers, or "houlsby".
        batch, length: the shape of the tokens.
        vocab: the size of the vocabulary.
        rank: the rank and alpha of LoRA.
        bottleneck: the width of Houlsby's adapters.
        matmul: n of the n^3 product.
        chunked: whether the logits of a decoder are held for some tokens at a time, in JAX.
        tenants: the number of adapters; each one trains on its own part of the rows.
        room: the number of adapters that a server of tenants has room for.
        tokens: how many to generate.
    """

    task: str
    directory: str
    model: str = "bert"
    method: str = "lora"
    batch: int = 8
    length: int = 128
    vocab: int = 30522
    rank: int = 8
    bottleneck: int = 64
    matmul: int = 2048
    chunked: bool = False
    tenants: int = 1
    room: int = 1
    tokens: int = 64

    @property
    def base(self) -> Path:
        """A checkpoint in Hugging Face's layout."""
        return Path(self.directory, self.model)

    def adapter(self, layout: str, which: str = "first", method: str = "") -> Path:
        """An adapter in the layout of "ours", "peft" or "adapterhub"."""
        return Path(self.directory, f"{self.model}-{method or self.method}", layout, which)

    def data(self) -> dict[str, np.ndarray]:
        """Random tokens and labels; with several rows, a quarter of the last is padding."""
        rng = np.random.default_rng(0)
        mask = np.ones((self.batch, self.length), np.int32)
        if self.batch > 1:
            mask[-1, -self.length // 4 :] = 0
        ids = rng.integers(0, self.vocab, mask.shape).astype(np.int32)
        return {"ids": ids, "mask": mask, "labels": rng.integers(0, LABELS, self.batch, np.int32)}

    def factor(self, tenant: int) -> float:
        """What the arrays of the adapter are multiplied by for a tenant."""
        return 1 + 0.1 * tenant

    def square(self) -> np.ndarray:
        """A matrix to multiply by itself."""
        return np.random.default_rng(0).standard_normal((self.matmul,) * 2, np.float32)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Tenancy:
    """What the tenants of a server of Tinker's protocol do.

    Attributes:
        address: of the server.
        base: the server's name of its base.
        tenants: how many there are; each has its own adapter and rows.
        rows, length: the shape of each tenant's tokens.
        vocab: the size of the vocabulary.
        rank: of LoRA, which is on all linear layers.
        prompt, tokens: the length of a prompt, and of what is sampled behind it; once a row.
    """

    address: str
    base: str
    tenants: int
    rows: int
    length: int
    vocab: int
    rank: int
    prompt: int
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages that are installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def seconds(work: Callable[[], Any]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Step:
    """A training step; `run` runs it once and keeps its loss."""

    loss: Any = None

    def run(self) -> None:
        raise NotImplementedError

    def losses(self, steps: int) -> list[Any]:
        """The losses of further steps, of each tenant if there are several."""
        found = []
        for _ in range(steps):
            self.run()
            found.append(np.asarray(self.loss).tolist())
        return found


class Works:
    """Functions to time, by name; a returned float is taken as the seconds."""

    def __init__(self, library: str, works: Mapping[str, Callable[[], Any]], about: dict[str, Any]):
        self.library, self.works, self.about = library, works, about

    def time(self, what: str, warm: bool = False) -> float:
        """The seconds of a function; if warm, it first runs untimed, to fill the caches."""
        work = self._find(what)
        if warm:
            work()
        start = time.perf_counter()
        own = work()
        return own if isinstance(own, float) else time.perf_counter() - start

    def result(self, what: str) -> Any:
        """The result of a function, as JSON values."""
        return np.asarray(self._find(what)()).tolist()

    def _find(self, what: str) -> Callable[[], Any]:
        if what not in self.works:
            raise ValueError(
                f"{self.library} does not support {what}, only {', '.join(self.works)}"
            )
        return self.works[what]
