"""What every benchmark shares: interleaved timing, and medians with spread.

Contenders are timed in turn, A B B A, in one run, so that a slow minute of the machine falls on
all of them; their ratio is taken round by round, for the same reason.
"""

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


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, and how many values it is of."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of some values.

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
    """Runs each contender once a round, each round in an order of its own.

    Who runs right behind another may find its caches and threads, so nobody always does.

    Args:
        contenders: what to run by name; each returns when its work is done. One that returns a
            number is believed, others are timed (a subprocess may know better than its parent).
        rounds: how many rounds are kept.
        warmup: how many rounds before them are not.
        clock: gives the time in seconds.

    Returns:
        Seconds by name, one a round.
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
    """How many times as long as the other a contender takes, round by round."""
    return Spread.of(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def fresh(code: str, *flags: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, from the repository's root; by default one like this.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    command = [python, *flags, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh interpreter failed on {code!r}:\n{done.stderr[-2000:]}")
    return done
