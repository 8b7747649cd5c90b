"""Trains one recipe on one problem, scores it on dev, and keeps the best adapters.

Losses are read from the device one window of steps late, so that no step waits for them. A step
that is not finite changes no parameter, so finding it late is harmless.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax.training.dynamic_scale import DynamicScale
from jaxtyping import PRNGKeyArray

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.distributed.sharding import shard
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.options.optimizer import OptimizerOptions
from adapters_jax.finetune.runs.log import Log, Record
from adapters_jax.finetune.runs.stopping import InterruptedRunError, Interrupts
from adapters_jax.finetune.tasks.base import NotFiniteError, Problem
from adapters_jax.finetune.tasks.metrics import better
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import make_train_step

# Steps in a row that overflow and stop a training in float16: the loss scale starts at 2**16 and is
# halved by each, down to 1, which 16 of them reach.
PATIENCE = 20


@dataclass
class Trained:
    """The result of a training so far.

    Attributes:
        metric: the metric that selects the best adapters.
        on_record: called with every record.
        on_best: called with a state that is the best so far.
        step: the step of the best adapters.
        dev: the dev metrics of the best adapters.
        records: the logged records: losses by step, and evaluations.
        seconds: the seconds that the training took in earlier processes.
        adapters: the best adapters, in host memory, since steps donate; None before dev is scored.
        best: the last state with the best adapters; None before the training is finished.
    """

    metric: str
    on_record: Callable[[Record], None]
    on_best: Callable[[TrainState], None]
    step: int = 0
    dev: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    adapters: Any = None
    best: Any = None

    @property
    def skipped(self) -> int:
        """The number of steps that changed nothing, since they overflowed."""
        return sum(record.get("skipped", 0) for record in self.records)

    def note(self, records: list[Record]) -> None:
        """Adds records to the log."""
        for record in records:
            self.records.append(record)
            self.on_record(record)

    def consider(self, state: TrainState, step: int, dev: dict[str, float]) -> None:
        """Logs dev metrics, and keeps the state's adapters if they are the best so far."""
        self.note([{"step": step, "dev": dev}])
        if not self.dev or better(self.metric, dev[self.metric], self.dev[self.metric]):
            self.step, self.dev = step, dev
            self.adapters = jax.device_get(state.adapters)
            self.on_best(state)

    def with_best(self, state: TrainState) -> TrainState:
        """Returns the state with the best adapters, or unchanged if dev was not scored yet."""
        if self.adapters is None:
            return state
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), self.adapters, state.adapters
        )
        return replace(state, adapters=placed)


@dataclass
class Saving:
    """How to save a training, so that it can be interrupted at any time and resumed exactly.

    Attributes:
        checkpoints: the directory of the checkpoints.
        every: the number of steps between checkpoints.
        interrupts: the signals that stop the training, which is saved first.
        on_resume: called with the training and its step after a checkpoint is restored.
        config: the run's configuration, kept in every checkpoint as a second copy.
    """

    checkpoints: Checkpoints
    every: int
    interrupts: Interrupts
    on_resume: Callable[[Trained, int], None]
    config: dict[str, Any]


def train(
    problem: Problem,
    options: OptimizerOptions,
    key: PRNGKeyArray,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
    on_best: Callable[[TrainState], None] = lambda state: None,
    on_first: Callable[[int], None] = lambda step: None,
    saving: Saving | None = None,
    half: bool = False,
) -> Trained:
    """Trains the parameters of a recipe, and keeps the adapters that are best on dev.

    Args:
        problem: the problem to learn.
        options: the settings of the training, with a learning rate and epochs.
        key: the seed of dropout.
        on_record: called with every record of the log.
        on_best: called with the first state, and after each evaluation that is the best so far.
        on_first: called with the number of steps when the first of this process is done, which was
            compiled before.
        saving: how to save and resume the training; None does neither.
        half: whether the model computes in float16: then the loss is scaled, and steps that
            overflow are skipped, up to 20 in a row.

    Returns:
        The finished training, with the best adapters in its state `best`.

    Raises:
        NotFiniteError: a loss or gradient is not finite; in float16, those of 20 steps in a row.
            These steps changed no parameter, and the adapters before them are scored, unless their
            outputs are not finite either.
        InterruptedRunError: a signal stopped the training, which is saved.
        CheckpointError: the training could not be saved, or a checkpoint cannot be read.
    """
    found = Trained(problem.metrics[0], on_record, on_best)
    training = Training.begin(problem, options, key, found, half)
    if saving is not None:
        training.resume(saving)
    on_best(found.with_best(training.state))
    step = _first_noted(make_train_step(problem.loss, accumulate=options.accumulate), on_first)
    try:
        training.run(step, saving)
    except NotFiniteError as error:
        with contextlib.suppress(NotFiniteError):
            state = training.state
            found.consider(state, error.step - 1, problem.score(state, "dev"))
        raise
    found.best = found.with_best(training.state)
    return found


def _first_noted(step: Callable[..., Any], on_first: Callable[[int], None]) -> Callable[..., Any]:
    """A step that calls a function once its first call is computed."""
    first = True

    def noted(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        nonlocal first
        after, metrics = step(state, batch)
        if first:
            first = False
            on_first(int(after.step))  # which waits for it
        return after, metrics

    return noted


@dataclass
class Training:
    """The loop over steps, and its state.

    Attributes:
        problem: the problem to learn.
        state: the training state after `step` steps.
        log: the metrics of the steps.
        found: the result so far.
        steps: the number of all steps.
        marks: the steps after which dev is scored.
        step: the number of steps so far.
        due: whether dev must be scored before the next step.
        saved: the step of the last checkpoint.
        began: the time at which this process began the training.
        beside: the number of trainings that share this process's time, with this one.
    """

    problem: Problem
    state: TrainState
    log: Log
    found: Trained
    steps: int
    marks: set[int]
    step: int = 0
    due: bool = False
    saved: int = 0
    began: float = field(default_factory=time.monotonic)
    beside: int = 1

    @classmethod
    def begin(
        cls,
        problem: Problem,
        options: OptimizerOptions,
        key: PRNGKeyArray,
        found: Trained,
        half: bool,
    ) -> Training:
        """A training before its first step; see `train`."""
        steps = options.steps(len(problem.train))
        tx = options.make(steps, problem.recipe)
        scale = DynamicScale(minimum_scale=1.0) if half else None
        state = TrainState.create(problem.model, problem.params, tx=tx, key=key, loss_scale=scale)
        if problem.mesh is not None:
            state = shard(state, problem.mesh)
        rate = options.schedule(steps, options.learning_rate or 0.0)
        log = Log(max(1, min(50, steps // 200)), rate, PATIENCE if half else 1)
        return cls(problem, state, log, found, steps, options.marks(len(problem.train)))

    @property
    def left(self) -> bool:
        """Whether anything is left to do."""
        return self.due or self.step < self.steps

    def run(self, step: Callable[..., Any], saving: Saving | None) -> None:
        """Runs the remaining steps."""
        if saving is None:
            interrupts, every = Interrupts(), self.steps + 1
        else:
            interrupts, every = saving.interrupts, saving.every
        try:
            with interrupts.deferred():
                while self.left:
                    if self.due:
                        self.score(interrupts)
                    else:
                        self._advance(step)
                    if self.saves(every):
                        self.save(saving)
                    interrupts.check()
        except InterruptedRunError:
            self.save(saving)
            if saving is not None:
                saving.checkpoints.wait()
            raise

    def _advance(self, step: Callable[..., Any]) -> None:
        batch, mesh = self.problem.batch(self.step), self.problem.mesh
        self.state, metrics = step(self.state, shard_batch(batch, mesh) if mesh else batch)
        self.made(metrics)

    def made(self, metrics: Any) -> None:
        """Notes that a step was made."""
        self.step += 1
        self.due = self.step in self.marks
        self.found.note(self.log.add(self.step, metrics))

    def saves(self, every: int) -> bool:
        """Whether the state of this step is to be saved, which waits until dev is scored."""
        now = self.step in self.marks or self.step % every == 0
        return now and not self.due and self.step != self.saved

    def score(self, interrupts: Interrupts) -> None:
        """Scores dev, and keeps the adapters if they are the best so far."""
        self.found.note(self.log.flush())
        with interrupts.at_once():
            dev = self.problem.score(self.state, "dev")
        self.found.consider(self.state, self.step, dev)
        self.due = False

    def save(self, saving: Saving | None) -> None:
        """Saves the state of this step, once."""
        if saving is None or self.step == self.saved:
            return
        found, self.saved = self.found, self.step
        progress = {
            "due": self.due,
            "step": found.step,
            "dev": found.dev,
            "records": list(found.records),
            "waiting": [list(window) for window in self.log.waiting],
            "in_a_row": self.log.in_a_row,
            "seconds": found.seconds + (time.monotonic() - self.began) / self.beside,
            "config": saving.config,
        }
        saving.checkpoints.save(self.step, self.state, best=found.adapters, progress=progress)

    def resume(self, saving: Saving) -> None:
        """Restores the newest checkpoint, if there is one."""
        if not saving.checkpoints.steps:
            return
        was = saving.checkpoints.restore(self.state)
        self.state, self.step, self.saved = was.state, was.step, was.step
        self.due, self.log.waiting = was.progress["due"], was.progress["waiting"]
        self.log.in_a_row = was.progress.get("in_a_row", 0)
        for name in ("step", "dev", "records", "seconds"):
            setattr(self.found, name, was.progress[name])
        self.found.adapters = jax.device_get(was.best)
        saving.on_resume(self.found, self.step)
