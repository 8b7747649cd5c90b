"""What every side is told, and the two kinds of what it makes; numpy is all that this needs."""

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
    """What to do, on what.

    Attributes:
        task: "step", "forward", "uses" (adapt, save, load, switch) or "matmul".
        place: the directory that `benchmarks.peers.files` filled.
        model: "bert" or "llama".
        method: "lora" or "houlsby".
        batch, length: of the tokens.
        vocab: how many tokens there are.
        rank: of LoRA, its alpha as well.
        bottleneck: the width of Houlsby's adapters.
        matmul: n of the n^3 product.
    """

    task: str
    place: str
    model: str = "bert"
    method: str = "lora"
    batch: int = 8
    length: int = 128
    vocab: int = 30522
    rank: int = 8
    bottleneck: int = 64
    matmul: int = 2048

    @property
    def base(self) -> Path:
        """A checkpoint in Hugging Face's layout."""
        return Path(self.place, self.model)

    def adapter(self, layout: str, which: str = "first", method: str = "") -> Path:
        """An adapter in the layout of "ours", "peft" or "adapterhub"."""
        return Path(self.place, f"{self.model}-{method or self.method}", layout, which)

    def data(self) -> dict[str, np.ndarray]:
        """Random tokens and labels; of several rows, a quarter of the last is padding."""
        rng = np.random.default_rng(0)
        mask = np.ones((self.batch, self.length), np.int32)
        if self.batch > 1:
            mask[-1, -self.length // 4 :] = 0
        ids = rng.integers(0, self.vocab, mask.shape).astype(np.int32)
        return {"ids": ids, "mask": mask, "labels": rng.integers(0, LABELS, self.batch, np.int32)}

    def square(self) -> np.ndarray:
        """A matrix to multiply by itself."""
        return np.random.default_rng(0).standard_normal((self.matmul,) * 2, np.float32)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def versions(*packages: str) -> dict[str, str]:
    """Of the packages that are installed here."""
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Step:
    """A training step; `run` makes one and keeps its loss."""

    loss: Any = None

    def run(self) -> None:
        raise NotImplementedError

    def losses(self, steps: int) -> list[float]:
        """The losses of further steps."""
        found = []
        for _ in range(steps):
            self.run()
            found.append(float(self.loss))
        return found


class Works:
    """Pieces of work by name; one that returns a float has timed itself."""

    def __init__(self, library: str, works: Mapping[str, Callable[[], Any]], about: dict[str, Any]):
        self.library, self.works, self.about = library, works, about

    def time(self, what: str, warm: bool = False) -> float:
        """The seconds of one piece; a warm one has just been done, so caches are its own."""
        work = self._find(what)
        if warm:
            work()
        start = time.perf_counter()
        own = work()
        return own if isinstance(own, float) else time.perf_counter() - start

    def result(self, what: str) -> Any:
        """What a piece returns, as JSON has it."""
        return np.asarray(self._find(what)()).tolist()

    def _find(self, what: str) -> Callable[[], Any]:
        if what not in self.works:
            raise ValueError(f"{self.library} has no function for this: {what}")
        return self.works[what]
