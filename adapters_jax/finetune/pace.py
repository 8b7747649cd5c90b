"""Measures how long steps take, without the seconds in which JAX compiles."""

import functools
import time
from collections.abc import Callable

TOGETHER = 0.01  # seconds within which updates count as one
CLOSE = 1e-3  # seconds by which an event may seem to begin before one that it is part of
COMPILING = "/jax/core/compile/"  # the start of the names of JAX's events for it


class Compiling:
    """Sums the seconds of events, of which some lie within others.

    Example:
        >>> compiling = Compiling()
        >>> compiling.note(3.0, now=10.0)
        >>> compiling.note(5.0, now=11.0)  # from 6 to 11, which the one from 7 to 10 is part of
        >>> compiling.seconds
        5.0
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[tuple[float, float]] = []  # their beginnings and seconds

    def note(self, seconds: float, now: float) -> None:
        """Notes an event that took some seconds and ends now."""
        began = now - seconds
        while self.events and self.events[-1][0] > began - CLOSE:
            self.seconds -= self.events.pop()[1]
        self.events.append((began, seconds))
        self.seconds += seconds


@functools.cache
def _compiling() -> Compiling:
    """What JAX traces and compiles from now on, in seconds."""
    import jax.monitoring  # commands that print their help do not wait for it

    compiling = Compiling()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(COMPILING):
            compiling.note(duration_secs, time.monotonic())

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiling


def clock() -> float:
    """Seconds like those of `time.monotonic`, that stand still while JAX traces and compiles."""
    return time.monotonic() - _compiling().seconds


class Pace:
    """Measures the mean seconds of a step.

    Updates that come at once, as those of steps that are read late, count as one.

    Args:
        clock: returns the time in seconds.

    Example:
        >>> pace = Pace(iter((60.0, 90.0, 90.0, 98.0)).__next__)
        >>> [pace.at(step) for step in (1, 2, 4, 6)]
        [None, 30.0, 10.0, 7.6]
    """

    def __init__(self, clock: Callable[[], float] = clock) -> None:
        self.clock = clock
        self.first: tuple[float, float] | None = None  # a step, and its time

    def at(self, step: float) -> float | None:
        """The mean seconds of a step; None if they are not known yet.

        Args:
            step: the number of steps that are done, or the finished part of a work.
        """
        now = self.clock()
        began = now if self.first is None else self.first[1]
        if self.first is None or now - began < TOGETHER:
            self.first = step, began
        since = self.first[0]
        return (now - began) / (step - since) if step > since else None


class Speed:
    """Measures tokens per second, without compiling and scoring.

    Args:
        tokens: the tokens of a step, without padding; 0 if tokens are not counted.
    """

    def __init__(self, tokens: float):
        self.tokens = tokens
        self.pause()

    def at(self, step: int) -> str:
        """The speed since the last pause, as text; empty if it is not known yet."""
        pace = self.pace.at(step)
        return f"{self.tokens / pace:,.0f} tokens/s" if self.tokens and pace else ""

    def pause(self) -> None:
        """Restarts the measurement at the next step."""
        self.pace = Pace()
