"""The phases of a run, and what is left of each: announced at the start, refined as it is measured.

The first steps tell what a step takes. Until dev is scored, a forward pass is a known part of that;
the first scoring tells it exactly.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from adapters_jax.finetune.console import clock, compiled, duration

# On 2 cores, MiniLM with Houlsby's adapters and 32 rows of 24 tokens: 0.20 of 0.45 s of a step, and
# 2.2 of 6.5 s to compile it.
FORWARD, COMPILED = 0.45, 0.35
REPORT = 3.0  # seconds of its tables and pictures, which are about as many in every run


@dataclass
class Phases:
    """What is left of a run, in seconds, phase by phase.

    Args:
        steps: the steps of the training.
        batch: the rows of a step.
        shapes: the shapes of batches; each one is compiled.
        marks: the steps after which dev is scored.
        rows: the rows of "train", "dev" and "test".
        passes: how often the baselines compute all rows.
        clock: seconds that stand still while JAX compiles.
        compiled: the seconds that JAX has compiled.

    Attributes:
        pace: the seconds of a step; None before some are measured.
        row: the seconds of a forward pass of one row; None before dev is scored.

    Example:
        >>> rows = {"train": 1000, "dev": 100, "test": 100}
        >>> clocks = iter([10.0, 14.0, 16.0]).__next__, iter([0.0, 5.0, 9.0, 9.0]).__next__
        >>> phases = Phases(50, 20, 2, {25, 50}, rows, 1.0, *clocks)
        >>> phases.first(1)
        >>> phases.stepped(5)
        >>> print(phases)
        1 min 29 s: compiling 8.0 s, training 49.5 s, test 2.2 s, baselines 27.0 s, report 3.0 s
        >>> phases.scored()
        >>> phases.left()["baselines"]
        24.0
    """

    steps: int
    batch: int
    shapes: int
    marks: Collection[int]
    rows: Mapping[str, int]
    passes: float
    clock: Callable[[], float] = clock
    compiled: Callable[[], float] = compiled
    pace: float | None = None
    row: float | None = None
    step: int = 0
    scoring: float = 0.0
    done: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._before, self._start = self.compiled(), self.steps + 1

    def first(self, step: int) -> None:
        """Notes that the first step of this process is computed."""
        self.step = self._start = step
        self._began = self._last = self.clock()
        self._program = self.compiled() - self._before

    def stepped(self, step: int) -> None:
        """Notes that a step is computed."""
        self._last, self.step = self.clock(), step
        if step > self._start:
            self.pace = (self._last - self._began - self.scoring) / (step - self._start)

    def scored(self) -> None:
        """Notes that dev is scored, since the step that was noted last."""
        if self._start > self.steps:
            return  # a run that goes on may score dev before its first step
        now = self.clock()
        took, self._last = now - self._last, now
        self.scoring += took
        self.row = took / self.rows["dev"]

    def left(self) -> dict[str, float]:
        """The seconds that are left of each phase; none where they are not known yet."""
        if self.pace is None:
            return {}
        row = FORWARD * self.pace / self.batch if self.row is None else self.row
        scorings = sum(mark > self.step for mark in self.marks)
        # The step, the scoring and the baselines compile each shape.
        of_baselines = self.shapes * COMPILED * self._program * (self.passes > 0)
        others = self.shapes * (1 + COMPILED) * self._program + self._before - self.compiled()
        left = others + of_baselines if "training" not in self.done else of_baselines
        found = {
            "compiling": max(0.0, left),
            "training": self.pace * (self.steps - self.step) + scorings * row * self.rows["dev"],
            "test": row * self.rows["test"],
            "baselines": self.passes * row * sum(self.rows.values()),
            "report": REPORT,
        }
        return {name: x for name, x in found.items() if x and name not in self.done}

    def __str__(self) -> str:
        left = self.left()
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in left.items())
        return f"{duration(sum(left.values()))}: {parts}"
