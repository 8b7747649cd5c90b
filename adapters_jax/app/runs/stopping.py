"""Ctrl-C and SIGTERM: training stops after the step it is in, so that what it has can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from adapters_jax.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(BaseException):
    """The process was asked to stop; like KeyboardInterrupt it is nothing to recover from.

    Attributes:
        status: the exit status that belongs to it: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


class Interrupts:
    """Takes note of signals to stop, within a `with`; only a process's main thread can.

    Every signal is noted in `pending`. Outside of `deferred` it also raises InterruptedRunError
    wherever the process is; should that be in a callback, which Python lets raise nothing, the next
    `check` raises it. Within, the first one waits, and a second one raises.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferring = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal waits for `check`."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within a `deferred`, something long that a signal may break off."""
        self.check()
        before, self._deferring = self._deferring, False
        try:
            yield
        finally:
            self._deferring = before

    def check(self) -> None:
        """Raises InterruptedRunError if a signal is waiting."""
        if self.pending is not None:
            raise InterruptedRunError(self.pending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.pending = self.pending is None, number
        if not (self._deferring and first):
            raise InterruptedRunError(number)


class StoppedError(UserError, RuntimeError):
    """Training broke off; the message says where, and what was kept.

    Attributes:
        status: the exit status that belongs to it.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
