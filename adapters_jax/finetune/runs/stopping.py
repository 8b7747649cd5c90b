"""Handles Ctrl-C and SIGTERM: a training stops after the current step, and can be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Self

from adapters_jax.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(BaseException):
    """A signal asked the process to stop; like KeyboardInterrupt, this is not an `Exception`.

    Attributes:
        status: the exit status of the process: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


class Interrupts:
    """Handles signals to stop within a `with`, in the main thread of the process.

    `pending` holds the last signal. Outside of `deferred`, a signal also raises InterruptedRunError
    at once; where Python ignores errors, as in callbacks, the next `check` raises it instead.
    Within `deferred`, the first signal waits for `check`, and a second one raises at once.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._deferring = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def deferred(self, deferring: bool = True) -> Iterator[None]:
        """Within, a signal waits for `check`."""
        before, self._deferring = self._deferring, deferring
        try:
            yield
        finally:
            self._deferring = before

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Within a `deferred`, signals raise at once again, for work that takes long."""
        self.check()
        return self.deferred(False)

    def check(self) -> None:
        """Raises InterruptedRunError if a signal is pending."""
        if self.pending is not None:
            raise InterruptedRunError(self.pending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.pending = self.pending is None, number
        if not (self._deferring and first):
            raise InterruptedRunError(number)


class StoppedError(UserError, RuntimeError):
    """The work stopped early; the message says why, and how to continue.

    Attributes:
        status: the exit status of the process.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
