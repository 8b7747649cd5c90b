"""Training: the steps of one recipe on one problem, scored on dev, the best adapter kept.

Nothing waits for the device without need: losses are read one window of steps late, when they are
long finished, and a step that was not finite moved nothing, so that finding out late is harmless.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from adapters_jax.finetune.metrics import better
from adapters_jax.finetune.optimizers import OptimizerOptions
from adapters_jax.recipe import Recipe
from adapters_jax.state import TrainState
from adapters_jax.train import make_train_step

Batch = Mapping[str, np.ndarray]
Record = dict[str, Any]


class Batches(Protocol):
    """Batches by step, an epoch of which has a length; see `batches.Batches`."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Batch: ...
    def __iter__(self) -> Iterator[Batch]: ...


class StoppedError(RuntimeError):
    """Training broke off; the message says where, and what was kept."""


class NotFiniteError(ArithmeticError):
    """A loss, gradient or prediction was not finite.

    Attributes:
        step: where, counted from 1.
    """

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step


class Problem(Protocol):
    """What is learnt: a model, its rows, a loss and a score."""

    @property
    def model(self) -> Any:
        """Adapted."""

    @property
    def params(self) -> Any:
        """linen: its whole tree; None in NNX."""

    @property
    def recipe(self) -> Recipe:
        """Says what trains."""

    @property
    def train(self) -> Batches:
        """Training batches."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names, the one selected on first."""

    def loss(self, subject: Any, batch: Batch, key: PRNGKeyArray) -> Any:
        """The mean loss of a batch under parameters (linen) or a model (NNX)."""

    def batch(self, step: int) -> Batch:
        """The training batch of a step, its weights of mean 1, also where parts accumulate."""

    def score(self, state: TrainState, part: str) -> dict[str, float]:
        """Metrics on "dev" or "test"; raises NotFiniteError where an output is not finite."""


def in_row_order(run: Callable[[Batch], Any], batches: Batches) -> Float[np.ndarray, "rows width"]:
    """What a function gives for batches in order, each row's at the row's place."""
    index, pending = [], []
    for batch in batches:
        index.append(batch["index"])
        pending.append(run(batch))
    rows, outputs = np.concatenate(index), np.concatenate(jax.device_get(pending))
    ordered = np.zeros((rows.max() + 1, outputs.shape[1]), outputs.dtype)
    ordered[rows[rows >= 0]] = outputs[rows >= 0]
    return ordered


@dataclass
class Trained:
    """What a training finds.

    Attributes:
        metric: the best is judged by it.
        on_record: called with every record.
        on_best: called with the state when it is the best so far.
        step: when that was.
        dev: its metrics on dev.
        records: what was logged: losses by step, and evaluations.
        best: the last state with the best adapters, once training is over.
    """

    metric: str
    on_record: Callable[[Record], None]
    on_best: Callable[[TrainState], None]
    step: int = 0
    dev: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    best: Any = None

    def note(self, records: list[Record]) -> None:
        """Takes records down."""
        for record in records:
            self.records.append(record)
            self.on_record(record)

    def consider(self, state: TrainState, step: int, dev: dict[str, float]) -> None:
        """Keeps a state's adapters if they are the best so far; on the host, since steps donate."""
        self.note([{"step": step, "dev": dev}])
        if not self.dev or better(self.metric, dev[self.metric], self.dev[self.metric]):
            self.step, self.dev = step, dev
            self._adapters = jax.device_get(state.adapters)
            self.on_best(state)

    def finish(self, state: TrainState) -> Trained:
        """Gives the last state its best adapters back."""
        self.best = replace(state, adapters=jax.tree.map(jnp.asarray, self._adapters))
        return self


class Log:
    """Step metrics of one training, read from the device a window late, as records of means."""

    def __init__(self, window: int, schedule: Callable[[int], Any]):
        self.window, self.schedule = window, schedule
        self._waiting: list[list[tuple[int, Any]]] = [[]]

    def add(self, step: int, metrics: Any) -> list[Record]:
        """Takes a step's metrics; returns the records that are due."""
        self._waiting[-1].append((step, metrics))
        if step % self.window:
            return []
        self._waiting.append([])
        return self._read(self._waiting.pop(0)) if len(self._waiting) > 2 else []

    def flush(self) -> list[Record]:
        """Every record that is left."""
        waiting, self._waiting = self._waiting, [[]]
        return [record for window in waiting for record in self._read(window)]

    def _read(self, window: list[tuple[int, Any]]) -> list[Record]:
        if not window:
            return []
        steps, values = [step for step, _ in window], jax.device_get([m for _, m in window])
        for step, metrics in zip(steps, values, strict=True):
            if not metrics["finite"]:
                raise NotFiniteError(step, "the loss or its gradient")
        means = {
            name: float(np.mean([metrics[name] for metrics in values]))
            for name in ("loss", "grad_norm")
        }
        rate = float(self.schedule(steps[-1] - 1))
        return [{"step": steps[-1], **means, "learning_rate": rate}]


def train(
    problem: Problem,
    options: OptimizerOptions,
    key: PRNGKeyArray,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
    on_best: Callable[[TrainState], None] = lambda state: None,
) -> Trained:
    """Trains what the recipe says, and keeps the adapters that are the best on dev.

    Args:
        problem: what to learn.
        options: how, with a learning rate and epochs.
        key: seeds dropout.
        on_record: called with every record of the log.
        on_best: called with the first state, and after every evaluation that is the best so far.

    Returns:
        What was found; its state has the best adapters.

    Raises:
        NotFiniteError: training broke off; nothing has moved at that step, and the adapters before
            it were scored, unless their outputs are not finite either.
    """
    steps = options.steps(len(problem.train))
    tx = options.make(steps, problem.recipe)
    state = TrainState.create(problem.model, problem.params, tx=tx, key=key)
    step = make_train_step(problem.loss, accumulate=options.accumulate)
    log = Log(max(1, min(50, steps // 200)), options.schedule(steps, options.learning_rate or 0.0))
    found = Trained(problem.metrics[0], on_record, on_best)
    marks = options.marks(len(problem.train))
    on_best(state)
    try:
        for i in range(1, steps + 1):
            state, metrics = step(state, problem.batch(i - 1))
            found.note(log.add(i, metrics))
            if i in marks:
                found.note(log.flush())
                found.consider(state, i, problem.score(state, "dev"))
    except NotFiniteError as error:
        with contextlib.suppress(NotFiniteError):
            found.consider(state, error.step - 1, problem.score(state, "dev"))
        raise
    return found.finish(state)
