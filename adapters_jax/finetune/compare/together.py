"""Trains cells of one shape in one program, up to the last checkpoint of each.

Each cell keeps its own checkpoints, as if it was trained alone: its run continues from the last one
to its score on test and its report, and an interrupted cell continues together or alone.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.finetune.runs.job import Job
from adapters_jax.finetune.runs.loop import Saving, Training
from adapters_jax.finetune.runs.stopping import InterruptedRunError, Interrupts
from adapters_jax.finetune.tasks.base import NotFiniteError
from adapters_jax.training.state import TrainState
from adapters_jax.training.step import make_train_step
from adapters_jax.training.together import stack_states, unstack_states

_TIMED = 3  # steps; the fastest one counts


def train_together(
    jobs: Sequence[Job], interrupts: Interrupts, say: Callable[[str], None]
) -> list[bool]:
    """Trains runs of one recipe in one program, if a step of that is faster than theirs in turn.

    Args:
        jobs: runs that are open, on one base and the same rows.
        interrupts: the signals that stop the training, which is saved first.
        say: called with what was chosen, and why.

    Returns:
        For each run whether it was trained; one that was not, or whose loss was not finite, has to
        be trained alone.

    Raises:
        InterruptedRunError: a signal stopped the training, which is saved.
        CheckpointError: the training could not be saved, or a checkpoint cannot be read.
    """
    first = jobs[0]
    for job in jobs:
        job.prepared.begin(job.run, job.console.progress)
    why = {i: _why_apart(first, job) for i, job in enumerate(jobs)}
    for i, reason in why.items():
        if reason:
            say(f"{jobs[i].run.path.name} is trained alone: {reason}")
    chosen = [i for i, reason in why.items() if not reason]
    if len(chosen) < 2:
        return [False] * len(jobs)
    with contextlib.ExitStack() as stack:
        members = [_opened(jobs[i], len(chosen), interrupts, stack) for i in chosen]
        if not _share_a_base(members):
            say(f"{first.title}: the cells have different frozen parameters, and are trained alone")
            return [False] * len(jobs)
        group = _Group.of(members)
        if not group.is_faster(first.title, say):
            return [False] * len(jobs)
        group.run(interrupts)
        finished = {i for i, member in zip(chosen, members, strict=True) if not member.stopped}
    return [i in finished for i in range(len(jobs))]


def _why_apart(first: Job, job: Job) -> str:
    """Why a run cannot share the program of the first; empty if it can."""
    if job.prepared.trained is not job.problem:
        return "its head trains on cached features"
    if job.problem.mesh is not None:
        return "its batches are split over devices"
    if job is first:
        return ""
    if job.problem.recipe != first.problem.recipe:
        return "its recipe is another"
    if _shapes(job) != _shapes(first):
        return "its batches have other shapes at the same steps"
    return ""


def _shapes(job: Job) -> list[Any]:
    """The shapes of the batches of all steps."""
    steps = job.optimizer.steps(len(job.problem.train))
    return [{k: np.shape(x) for k, x in job.problem.batch(i).items()} for i in range(steps)]


@dataclass
class _Member:
    """One of the trainings.

    Attributes:
        training: its loop; its state is as old as the last score or checkpoint.
        saving: how it is saved.
        stopped: whether its loss was not finite.
    """

    training: Training
    saving: Saving
    stopped: bool = False

    @property
    def left(self) -> bool:
        return self.training.left and not self.stopped


def _opened(job: Job, beside: int, interrupts: Interrupts, stack: contextlib.ExitStack) -> _Member:
    """A run's training, at its newest checkpoint."""
    checkpoints = stack.enter_context(Checkpoints(job.run.checkpoints))
    every = job.options.checkpoint_every
    saving = Saving(checkpoints, every, interrupts, lambda found: None, job.config)
    # The run itself writes its log and its best adapter, from the last checkpoint.
    training = Training.begin(job.problem, job.optimizer, job.key, job.half)
    training.beside = beside
    training.resume(saving)
    return _Member(training, saving)


def _share_a_base(members: Sequence[_Member]) -> bool:
    """Whether all that is frozen is the same."""
    first, *others = (member.training.state.base for member in members)
    return all(
        jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), first, other))
        for other in others
    )


@dataclass
class _Group:
    """Trainings in one program.

    Attributes:
        state: their states, stacked.
    """

    members: Sequence[_Member]
    state: TrainState
    step: Callable[..., Any]

    @classmethod
    def of(cls, members: Sequence[_Member]) -> Self:
        """Stacks the states of trainings over the base of the first."""
        trainings = [member.training for member in members]
        base = trainings[0].state.base
        for training in trainings:
            training.state = replace(training.state, base=base)
        # A loss reads `most` tokens of a sequence, and seeds pack rows differently.
        first = max(trainings, key=lambda training: getattr(training.problem, "most", 0))
        loss = first.options.loss_of(first.problem)
        step = make_train_step(loss, accumulate=first.options.accumulate)
        return cls(members, stack_states([training.state for training in trainings]), step)

    def is_faster(self, title: str, say: Callable[[str], None]) -> bool:
        """Whether a step of all is faster than a step of each in turn; says both."""
        n, one = len(self.members), self.members[0].training
        alone = fastest(self.step, one.state, one.problem.batch(0))
        batches = [member.training.problem.batch(0) for member in self.members]
        together = fastest(self.step, self.state, _stacked(batches))
        won = together < n * alone
        say(
            f"{title}: a step of {n} cells in one program takes {together:.3g} s, and {n} steps in "
            f"turn {n * alone:.3g} s; they are trained {'together' if won else 'one by one'}"
        )
        return won

    def run(self, interrupts: Interrupts) -> None:
        """Trains until every training is done or stopped; those behind the others catch up."""
        try:
            with interrupts.deferred():
                while any(member.left for member in self.members):
                    self._score(interrupts)
                    self._advance()
                    self._save([m for m in self.members if m.training.saves(m.saving.every)])
                    interrupts.check()
        except InterruptedRunError:
            self._save(self.members)
            raise
        finally:
            for member in self.members:
                member.saving.checkpoints.wait()

    def _score(self, interrupts: Interrupts) -> None:
        due = [m for m in self.members if m.left and m.training.due]
        for member in self._current(due):
            try:
                member.training.score(interrupts)
            except NotFiniteError:
                member.stopped = True
        self._save([m for m in due if m.training.saves(m.saving.every)])

    def _advance(self) -> None:
        left = [member for member in self.members if member.left]
        if not left:
            return
        behind = min(member.training.step for member in left)
        active = [m.left and m.training.step == behind for m in self.members]
        batches = [m.training.problem.batch(behind) for m in self.members]
        self.state, metrics = self.step(self.state, _stacked(batches), np.array(active))
        for i, member in enumerate(self.members):
            if not active[i]:
                continue
            try:
                member.training.made({name: values[i] for name, values in metrics.items()})
            except NotFiniteError:
                member.stopped = True

    def _save(self, members: Sequence[_Member]) -> None:
        for member in self._current([m for m in members if not m.stopped]):
            member.training.save(member.saving)

    def _current(self, members: Sequence[_Member]) -> Sequence[_Member]:
        """Trainings, with the states that they have now."""
        if members:
            states = dict(zip(map(id, self.members), unstack_states(self.state), strict=True))
            for member in members:
                member.training.state = states[id(member)]
        return members


def _stacked(batches: Sequence[Any]) -> Any:
    """Batches on a first axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def fastest(step: Callable[..., Any], state: TrainState, batch: Any) -> float:
    """The seconds of the fastest of a few steps, whose results are dropped."""
    # A step donates what it gets; the base is not donated, and is not copied.
    kept, took = jax.tree.map(jnp.copy, replace(state, base=None)), []
    for _ in range(1 + _TIMED):
        began = time.perf_counter()
        after, _ = step(replace(kept, base=state.base), batch)
        kept = jax.block_until_ready(replace(after, base=None))
        took.append(time.perf_counter() - began)
    return min(took[1:])
