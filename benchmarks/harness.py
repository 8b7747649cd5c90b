"""Interleaved timing, and medians with their spread, for every benchmark.

Contenders are timed in turn in one run, so that a slow minute of the machine affects all of them.
For the same reason their ratio is taken round by round.
"""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DATA", ROOT.parent / "shared" / "data"))  # of the tasks


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, and the number `n` of values."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Computes the spread of values.

        Example:
            >>> Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
            Spread(median=3.0, q1=2.0, q3=4.0, n=5)
        """
        values = sorted(values)
        if not values:
            raise ValueError("Spread.of got no values; time at least one round")
        cuts = [values[0]] * 3
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=4, method="inclusive")
        return cls(cuts[1], cuts[0], cuts[2], len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.q1:.4g}, {self.q3:.4g}]"


def interleave(
    contenders: Mapping[Any, Callable[[], float | None]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Runs each contender once in a round, and draws a new order for each round.

    A contender may profit from the caches and threads of the one before it, so the order changes.

    Args:
        contenders: functions by name; each returns when its work is done. A returned number is
            taken as the seconds (a subprocess measures better than its parent), and other
            contenders are timed.
        rounds: the number of rounds to keep.
        warmup: the number of rounds before them, which are not kept.
        clock: returns the time in seconds.

    Returns:
        The seconds of each round, by the name of the contender.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in contenders}
    order, lots = list(contenders), random.Random(0)
    for i in range(warmup + rounds):
        lots.shuffle(order)
        for name in order:
            start = clock()
            own = contenders[name]()
            took = clock() - start if own is None else own
            if i >= warmup:
                seconds[name].append(took)
    return seconds


def ratio(seconds: Mapping[Any, Sequence[float]], name: Any, other: Any) -> Spread:
    """The time of a contender divided by that of another, round by round."""
    return Spread.of(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def fresh(code: str, *flags: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, in the root directory of the repository.

    Args:
        code: the code to run.
        *flags: flags of the interpreter.
        python: the interpreter; by default the one that runs the benchmark.

    Returns:
        The finished process, with its stdout and stderr as text.

    Raises:
        RuntimeError: the code failed; the message ends with its stderr.
    """
    command = [python, *flags, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh interpreter failed on {code!r}:\n{done.stderr[-2000:]}")
    return done
