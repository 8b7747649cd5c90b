"""Trains one recipe on one problem, scores it on dev, and keeps the best adapters.

Losses are read from the device one window of steps late, so that no step waits for them. A step
that is not finite changes no parameter, so finding it late is harmless.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from flax.training.dynamic_scale import DynamicScale
from jaxtyping import PRNGKeyArray

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.distributed.sharding import shard
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.runs.stopping import InterruptedRunError, Interrupts
from adapters_jax.finetune.runs.widened import Widened
from adapters_jax.finetune.tasks.base import NotFiniteError, Problem
from adapters_jax.finetune.tasks.metrics import better
from adapters_jax.recipe import Recipe
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import make_train_step

# Steps in a row that overflow and stop a training in float16: the loss scale starts at 2**16 and is
# halved by each, down to 1, which 16 of them reach.
PATIENCE = 20
Record = dict[str, Any]


class Log:
    """Collects metrics of steps, and reads them one window late, as records of means.

    A mean is over the steps where a metric is a number; without such a step it is left out.

    A step that is not finite changes nothing. With a loss scale, which starts too high, such steps
    are skipped and counted, as "skipped" of a record, until there are `patience` in a row.

    Args:
        window: the number of steps in a record.
        schedule: the learning rate by step.
        patience: the number of steps in a row that are not finite and stop the training.

    Attributes:
        waiting: windows of `(step, metrics)` that are still on the device.
        in_a_row: the number of steps that were not finite, since the last finite one.
    """

    _OWN = ("loss", "grad_norm", "finite", "loss_scale")

    def __init__(self, window: int, schedule: Callable[[int], Any], patience: int = 1):
        self.window, self.schedule, self.patience = window, schedule, patience
        self.waiting: list[list[tuple[int, Any]]] = [[]]
        self.in_a_row = 0

    def add(self, step: int, metrics: Any) -> list[Record]:
        """Adds the metrics of a step; returns the records that are due."""
        self.waiting[-1].append((step, {k: v for k, v in metrics.items() if k != "loss_scale"}))
        if step % self.window:
            return []
        self.waiting.append([])
        return self._read(self.waiting.pop(0)) if len(self.waiting) > 2 else []

    def flush(self) -> list[Record]:
        """Returns all remaining records."""
        waiting, self.waiting = self.waiting, [[]]
        return [record for window in waiting for record in self._read(window)]

    def _read(self, window: list[tuple[int, Any]]) -> list[Record]:
        if not window:
            return []
        # Python floats, which a checkpoint stores exactly.
        values = [
            {name: float(x) for name, x in metrics.items()}
            for metrics in jax.device_get([metrics for _, metrics in window])
        ]
        steps = [step for step, _ in window]
        for step, metrics in zip(steps, values, strict=True):
            self.in_a_row = 0 if metrics["finite"] else self.in_a_row + 1
            if self.in_a_row == self.patience:
                what, more = "the loss or its gradient", self.patience - 1
                if more:
                    what = (
                        f"in this and the next {more} steps, {what}, even with the smallest loss "
                    )
                    what += "scale,"
                raise NotFiniteError(step - more, what)
        good = [metrics for metrics in values if metrics["finite"]]
        record: Record = {"step": steps[-1]}
        if good:
            names = ("loss", "grad_norm", *(k for k in good[0] if k not in self._OWN))
            columns = {name: [m[name] for m in good if m[name] == m[name]] for name in names}
            record |= {name: float(np.mean(column)) for name, column in columns.items() if column}
            record["learning_rate"] = float(self.schedule(steps[-1] - 1))
        if len(good) < len(values):
            record["skipped"] = len(values) - len(good)
        return [record]


@dataclass
class Saving:
    """How to save a training, so that it can be interrupted at any time and resumed exactly.

    Attributes:
        checkpoints: the directory of the checkpoints.
        every: the number of steps between checkpoints.
        interrupts: the signals that stop the training, which is saved first.
        on_resume: called with the training after a checkpoint is restored.
        config: the run's configuration, kept in every checkpoint as a second copy.
    """

    checkpoints: Checkpoints
    every: int
    interrupts: Interrupts
    on_resume: Callable[[Training], None]
    config: dict[str, Any]


@dataclass
class Training:
    """The loop over steps, its state, and the best adapters so far.

    Attributes:
        problem: the problem to learn; if it is widened, in the larger shapes.
        options: the settings of the training, with a learning rate and epochs.
        state: the training state after `step` steps, in the shapes of the problem.
        log: the metrics of the steps.
        steps: the number of all steps.
        marks: the steps after which dev is scored.
        on_record: called with every record of the log.
        on_best: called with the first state, and with each state that is the best so far.
        on_first: called with the number of steps when the first step of this process is computed,
            which was compiled before; None once it was called.
        step: the number of steps so far.
        due: whether dev must be scored before the next step.
        saved: the step of the last checkpoint.
        began: the time at which this process began the training.
        beside: the number of trainings that share this process's time, with this one.
        best_step: the step of the best adapters.
        dev: the dev metrics of the best adapters.
        adapters: the best adapters, in host memory, since steps donate; None before dev is scored.
        records: the logged records: losses by step, and evaluations.
        seconds: the seconds that the training took in earlier processes.
        widened: the larger shapes that it trains in; None for its own.
    """

    problem: Problem
    options: OptimizerOptions
    state: TrainState
    log: Log
    steps: int
    marks: set[int]
    on_record: Callable[[Record], None] = lambda record: None
    on_best: Callable[[TrainState], None] = lambda state: None
    on_first: Callable[[int], None] | None = None
    step: int = 0
    due: bool = False
    saved: int = 0
    began: float = field(default_factory=time.monotonic)
    beside: int = 1
    best_step: int = 0
    dev: dict[str, float] = field(default_factory=dict)
    adapters: Any = None
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    widened: Widened | None = None

    @classmethod
    def begin(
        cls,
        problem: Problem,
        options: OptimizerOptions,
        key: PRNGKeyArray,
        half: bool = False,
        widest: Recipe | None = None,
        **callbacks: Any,
    ) -> Training:
        """A training before its first step.

        Args:
            problem, options: as in `Training`.
            key: the seed of dropout.
            half: whether the model computes in float16: then the loss is scaled, and steps that
                overflow are skipped, up to 20 in a row.
            widest: the recipe in whose shapes it trains; None is the problem's own.
            **callbacks: `on_record`, `on_best` and `on_first`.
        """
        steps = options.steps(len(problem.train))
        tx = options.make(steps, problem.recipe)
        scale = DynamicScale(minimum_scale=1.0) if half else None
        state = TrainState.create(problem.model, problem.params, tx=tx, key=key, loss_scale=scale)
        if problem.mesh is not None:
            state = shard(state, problem.mesh)
        widened = None if widest is None else Widened.of(problem, state, widest)
        if widened is not None:
            problem, state = widened.problem, widened.widen(state)
        rate = options.rates(steps, options.learning_rate or 0.0)
        # Some 200 records a run, and in a long one at least one in 50 steps.
        log = Log(max(1, min(50, steps // 200)), rate, PATIENCE if half else 1)
        marks = options.marks(len(problem.train), problem.recipe)
        return cls(problem, options, state, log, steps, marks, widened=widened, **callbacks)

    @property
    def left(self) -> bool:
        """Whether anything is left to do."""
        return self.due or (self.step < self.steps and not self.impatient)

    @property
    def impatient(self) -> bool:
        """Whether it ends before its last step: `--patience` evaluations in a row were not best."""
        since = sum("dev" in record and record["step"] > self.best_step for record in self.records)
        return self.step < self.steps and since >= (self.options.patience or math.inf)

    @property
    def skipped(self) -> int:
        """The number of steps that changed nothing, since they overflowed."""
        return sum(record.get("skipped", 0) for record in self.records)

    def best(self) -> TrainState:
        """The state with the best adapters, or as it is if dev was not scored yet."""
        if self.adapters is None or self.best_step == self.step:
            return self.state

        def placed(x: Any, like: Any) -> Any:
            # An array that is bound to its device would compile the scoring once more.
            return jax.device_put(x, like.sharding if like.committed else None)

        return replace(
            self.state, adapters=jax.tree.map(placed, self.adapters, self.state.adapters)
        )

    def cut(self, state: TrainState) -> TrainState:
        """A state of the training, without the padding of a wider recipe."""
        return state if self.widened is None else self.widened.cut(state)

    def train(self, saving: Saving | None = None) -> None:
        """Runs the remaining steps; afterwards, `best` has the adapters that are best on dev.

        Args:
            saving: how to save and resume the training; None does neither.

        Raises:
            NotFiniteError: a loss or gradient is not finite; in float16, those of 20 steps in a
                row. These steps changed no parameter. The adapters of the last step are scored,
                unless their outputs are not finite either.
            InterruptedRunError: a signal stopped the training, which is saved.
            CheckpointError: the training could not be saved, or a checkpoint cannot be read.
        """
        if saving is not None:
            self.resume(saving)
        self.on_best(self.cut(self.best()))
        step = make_train_step(
            self.options.loss_of(self.problem), accumulate=self.options.accumulate
        )
        try:
            self._run(step, saving)
        except NotFiniteError:
            with contextlib.suppress(NotFiniteError):
                self._consider(self.step, self.problem.score(self.state, "dev"))
            raise

    def _run(self, step: Callable[..., Any], saving: Saving | None) -> None:
        interrupts = Interrupts() if saving is None else saving.interrupts
        try:
            with interrupts.deferred():
                while self.left:
                    if self.due:
                        self.score(interrupts)
                    else:
                        self._advance(step)
                    if saving is not None and self.saves(saving.every):
                        self.save(saving)
                    interrupts.check()
        except InterruptedRunError:
            if saving is not None:
                self.save(saving)
                saving.checkpoints.wait()
            raise

    def _advance(self, step: Callable[..., Any]) -> None:
        batch, mesh = self.problem.batch(self.step), self.problem.mesh
        self.state, metrics = step(self.state, shard_batch(batch, mesh) if mesh else batch)
        if self.on_first is not None:
            self.on_first(int(self.state.step))  # which waits for it
            self.on_first = None
        self.made(metrics)

    def made(self, metrics: Any) -> None:
        """Notes that a step was made."""
        self.step += 1
        self.due = self.step in self.marks
        self._note(self.log.add(self.step, metrics))

    def _note(self, records: list[Record]) -> None:
        for record in records:
            self.records.append(record)
            self.on_record(record)

    def score(self, interrupts: Interrupts) -> None:
        """Scores dev, and keeps the adapters if they are the best so far."""
        self._note(self.log.flush())
        with interrupts.at_once():
            dev = self.problem.score(self.state, "dev")
        self._consider(self.step, dev)
        self.due = False

    def _consider(self, step: int, dev: dict[str, float]) -> None:
        """Logs dev metrics, and keeps the state's adapters if they are the best so far."""
        self._note([{"step": step, "dev": dev}])
        metric = self.problem.metrics[0]
        if not self.dev or better(metric, dev[metric], self.dev[metric]):
            self.best_step, self.dev = step, dev
            # The next step donates the state, so its arrays are copied to the host.
            self.adapters = jax.device_get(self.state.adapters)
            self.on_best(self.cut(self.state))

    def saves(self, every: int) -> bool:
        """Whether the state of this step is to be saved, which waits until dev is scored."""
        now = self.step in self.marks or self.step % every == 0
        return now and not self.due and self.step != self.saved

    def save(self, saving: Saving) -> None:
        """Saves the state of this step, once."""
        if self.step == self.saved:
            return
        self.saved = self.step
        progress = {
            "due": self.due,
            "step": self.best_step,
            "dev": self.dev,
            "records": list(self.records),
            "waiting": [list(window) for window in self.log.waiting],
            "in_a_row": self.log.in_a_row,
            "seconds": self.seconds + (time.monotonic() - self.began) / self.beside,
            "config": saving.config,
        }
        best = self.adapters
        if best is not None:
            best = self.cut(replace(self.state, adapters=best)).adapters
        saving.checkpoints.save(self.step, self.cut(self.state), best=best, progress=progress)

    def resume(self, saving: Saving) -> None:
        """Restores the newest checkpoint, if there is one."""
        if not saving.checkpoints.steps:
            return
        was = saving.checkpoints.restore(self.cut(self.state))
        self.state, best = was.state, was.best
        if self.widened is not None:
            self.state = self.widened.widen(was.state)
            best = best and self.widened.widen(replace(was.state, adapters=best)).adapters
        self.step = self.saved = was.step
        # Steps whose metrics were not read yet are in the checkpoint, so the log has no gap.
        self.due, self.log.waiting = was.progress["due"], was.progress["waiting"]
        self.log.in_a_row = was.progress.get("in_a_row", 0)  # absent in older checkpoints
        self.best_step, self.dev = was.progress["step"], was.progress["dev"]
        self.records, self.seconds = was.progress["records"], was.progress["seconds"]
        self.adapters = jax.device_get(best)
        saving.on_resume(self)
