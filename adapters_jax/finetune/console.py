"""Prints the output of a command: text for people to a console, JSON for machines to stdout.

Progress is shown with the seconds that are left. They follow from the pace of the steps, without
the time that JAX compiles.
"""

import contextlib
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Literal, Protocol

import rich.console
from rich import progress as bars
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adapters_jax.errors import UserError, visible

TOGETHER = 0.01  # seconds; updates within this time count as one
CLOSE = 1e-3  # seconds by which an event may seem to begin before one that it is part of
COMPILING = "/jax/core/compile/"  # the start of the names of JAX's events for it
QUIET_SECONDS = 10.0  # between two lines of progress without a terminal
NEWS_SECONDS = 2.0  # the same, if there is news
WAIT_SECONDS = 2.0  # of a wait before it is a line without a terminal


class Compiling:
    """Sums the seconds of events; some of them lie within others.

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
        # jax tells of an event when it ends, so an outer one comes after those within it.
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
        # The events of tracing, lowering and XLA nest; `note` counts the seconds once.
        if event.startswith(COMPILING):
            compiling.note(duration_secs, time.monotonic())

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiling


def clock() -> float:
    """Seconds like those of `time.monotonic`, that stand still while JAX traces and compiles."""
    return time.monotonic() - _compiling().seconds


def compiled() -> float:
    """The seconds that JAX has traced and compiled since this was asked first."""
    return _compiling().seconds


class Pace:
    """Measures the mean seconds of a step.

    Updates that come at once, as those of steps that are read late, count as one.

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


class Progress(Protocol):
    """Shows the progress of some steps."""

    def update(self, step: int, note: str, news: bool = False) -> None:
        """Shows that `step` steps are done, with a note; `news` says that the note is new."""


class Console:
    """Prints text for people, to stderr if stdout is for JSON.

    Args:
        json: whether stdout is for JSON.
    """

    def __init__(self, json: bool):
        self.json = json
        self.printer = rich.console.Console(
            file=sys.stderr if json else sys.stdout, highlight=False
        )

    def say(self, text: str = "") -> None:
        """Prints one line."""
        self.printer.print(Text(visible(text)), soft_wrap=True)

    def announce(self, text: str) -> None:
        """Prints one line on the phases of a run."""
        self.say(text)

    def show(self, thing: Any) -> None:
        """Prints an object: with colours on a terminal, as its `repr` elsewhere."""
        if self.printer.is_terminal:
            self.printer.print(thing)
        else:
            self.say(repr(thing))

    def table(
        self,
        header: list[str],
        rows: list[list[str]],
        words: int = 1,
        widths: Sequence[int | None] = (),
    ) -> None:
        """Prints a table; the first `words` columns are words, and the others are numbers."""
        table = Table()
        for i, (name, width) in enumerate(zip_longest(header, widths)):
            side: Literal["left", "right"] = "left" if i < words else "right"
            table.add_column(_cell(name), justify=side, overflow="fold", width=width)
        for row in rows:
            table.add_row(*map(_cell, row))
        self.printer.print(table)

    def listing(self, header: list[str], rows: list[list[str]], words: int) -> None:
        """Prints a table that breaks no word, or where none fits, a paragraph for each row."""
        columns = [*zip(header, *rows, strict=True)]
        words_of = [max(map(len, " ".join(cells).split()), default=0) for cells in columns]
        room = self.printer.width - 3 * len(columns) - 1
        if sum(words_of) <= room:
            whole = [max(map(len, cells)) for cells in columns]
            self.table(header, rows, words, _widths(words_of, whole, room))
            return
        for name, *cells in rows:
            self.say(name)
            for title, cell in zip(header[1:], cells, strict=True):
                indented = Padding(_cell(f"{title}: {cell}"), (0, 0, 0, 2), expand=False)
                self.printer.print(indented)

    def result(self, value: Any) -> None:
        """Prints one JSON value on one line of stdout, if stdout is for JSON."""
        if self.json:
            print(visible(json.dumps(value, ensure_ascii=False)), flush=True)

    def finish(self, header: list[str], rows: list[list[str]], text: str, value: Any) -> None:
        """Prints the end of a command: a table, a sentence, and the JSON value."""
        self.table(header, rows)
        self.say(text)
        self.result(value)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Within, a terminal shows a spinner with a text; elsewhere, a long wait prints the text.

        It is on stderr, so that what a command prints stays as it is.
        """
        text = visible(text, lines=False)
        with contextlib.ExitStack() as stack:
            if sys.stderr.isatty():
                shown = rich.console.Console(stderr=True)
                stack.enter_context(shown.status(Text(text)))
            else:
                said = {"file": sys.stderr, "flush": True}
                line = threading.Timer(WAIT_SECONDS, print, [text], said)
                line.daemon = True
                line.start()
                stack.callback(line.cancel)
            yield

    @contextlib.contextmanager
    def progress(
        self,
        title: str,
        steps: int,
        unit: str = "step",
        left: Callable[[], float | None] | None = None,
        first: str = "",
    ) -> Iterator[Progress]:
        """Shows progress: as a live bar on a terminal, as occasional lines elsewhere.

        Args:
            unit: the name of a step.
            left: returns the seconds that are left, or None if they are not known yet; by default
                they are estimated from the steps that are done.
            first: what is done before the first update, such as "compiling"; the estimate is then
                without the time that JAX compiles.
        """
        estimate = _Estimate(steps, left, first)
        if not self.printer.is_terminal:
            yield _Lines(self, title, unit, estimate)
            return
        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
            bars.TextColumn("{task.fields[left]}"),
        )
        with bars.Progress(*columns, console=self.printer) as bar:
            yield _Bar(bar, title, estimate)


class _Estimate:
    """Estimates the seconds that are left of some steps; see `Console.progress`."""

    def __init__(self, steps: int, left: Callable[[], float | None] | None, first: str):
        self.steps, self.first, self._left = steps, first, left
        self.pace = Pace(clock if first else time.monotonic)

    def left(self, step: int, shown: bool = True) -> str:
        """The seconds that are left after a step, in words; empty if they are not known yet.

        Every step has to be noted, but what is not shown need not be computed.
        """
        pace = self.pace.at(step)
        if not shown:
            return ""
        seconds = self._left() if self._left else pace and pace * (self.steps - step)
        return "" if seconds is None else f"{duration(seconds)} left"


class _Bar:
    """Progress as a live bar."""

    def __init__(self, bar: bars.Progress, title: str, estimate: _Estimate):
        self.bar, self.estimate = bar, estimate
        title, steps = visible(title, lines=False), estimate.steps
        self.task = bar.add_task(title, total=steps, note=estimate.first, left="")

    def update(self, step: int, note: str, news: bool = False) -> None:
        left = self.estimate.left(step)
        self.bar.update(self.task, completed=step, note=note, left=left)


class _Lines:
    """Progress as plain lines."""

    def __init__(self, console: Console, title: str, unit: str, estimate: _Estimate):
        self.console, self.title, self.unit, self.estimate = console, title, unit, estimate
        self.began = self.last = time.monotonic()
        if estimate.first:
            console.say(f"{title}  {estimate.first}")

    def update(self, step: int, note: str, news: bool = False) -> None:
        now, steps = time.monotonic(), self.estimate.steps
        pause = NEWS_SECONDS if news else QUIET_SECONDS
        shown = now - self.last >= pause or (news and step == steps)
        left = self.estimate.left(step, shown)
        if not shown:
            return
        self.last = now
        time_words = duration(now - self.began) if step == steps else left
        parts = (f"{self.title}  {self.unit} {step} of {steps}", note, time_words)
        self.console.say("  ".join(filter(None, parts)))


def _widths(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths of columns, as alike as they can be.

    rich shrinks the widest ones, whatever their words need, and cuts a table that is too wide.
    """
    widths = [*least]
    while sum(widths) < min(room, sum(most)):
        growing = [i for i, width in enumerate(widths) if width < most[i]]
        widths[min(growing, key=lambda i: widths[i])] += 1
    return widths


def _cell(text: str) -> Text:
    return Text(visible(text))


def stdin_lines(mark: str = "") -> Iterator[str]:
    """The lines of stdin as they come; raises UserError where one is not UTF-8.

    Args:
        mark: what a terminal shows where a line is expected.
    """
    try:
        while True:
            if mark and sys.stdin.isatty():
                print(mark, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError("stdin is not UTF-8; give texts in UTF-8") from error


def duration(seconds: float) -> str:
    """Formats seconds for people.

    Example:
        >>> duration(7.44), duration(192.0)
        ('7.4 s', '3 min 12 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
