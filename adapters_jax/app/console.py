"""Where a command's words go: people's to a console, machines' to stdout as JSON."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import rich.console
from rich import progress as bars
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal
NEWS_SECONDS = 2.0  # the same, where there is something new


class Progress(Protocol):
    """Shows how far something is."""

    def update(self, step: int, note: str, news: bool = False) -> None:
        """`step` steps are done; `note` is worth knowing, and new where `news`."""


class Console:
    """Prints for people, on stderr where stdout belongs to JSON.

    Args:
        json: whether stdout is for a machine.
    """

    def __init__(self, json: bool):
        self.json = json
        self.console = rich.console.Console(
            file=sys.stderr if json else sys.stdout, highlight=False
        )

    def say(self, text: str = "") -> None:
        """One line."""
        self.console.print(Text(text), soft_wrap=True)

    def show(self, thing: Any) -> None:
        """Something with a rich form, on a terminal; its plain form elsewhere."""
        if self.console.is_terminal:
            self.console.print(thing)
        else:
            self.say(repr(thing))

    def table(self, header: list[str], rows: list[list[str]], words: int = 1) -> None:
        """A table whose first columns are words and whose others are numbers."""
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < words else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)

    def result(self, value: Any) -> None:
        """What a machine gets: one JSON value on one line of stdout."""
        if self.json:
            print(json.dumps(value, ensure_ascii=False), flush=True)

    def finish(self, header: list[str], rows: list[list[str]], text: str, value: Any) -> None:
        """The end of a command: its table, a sentence, and what a machine gets."""
        self.table(header, rows)
        self.say(text)
        self.result(value)

    @contextlib.contextmanager
    def progress(
        self,
        title: str,
        steps: int,
        unit: str = "step",
        left: Callable[[], float | None] | None = None,
    ) -> Iterator[Progress]:
        """A live bar on a terminal, a line now and then elsewhere.

        Args:
            title: of what is being done.
            steps: how many there are.
            unit: what one of them is called.
            left: the seconds that are left, or None while nobody knows; by default an estimate
                from the pace of the steps.
        """
        if not self.console.is_terminal:
            yield _Lines(self, title, steps, unit, left)
            return
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[note]}"),
            bars.TextColumn("{task.fields[left]}") if left else bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=self.console) as bar:
            yield _Bar(bar, title, steps, left)


class Speed:
    """Tokens a second, from a step that is known to be done: compiling and scoring do not count.

    Args:
        tokens: of a step, without padding; 0 where there are none to count.
    """

    def __init__(self, tokens: float):
        self.tokens = tokens
        self.first: tuple[int, float] | None = None

    def at(self, step: int) -> str:
        """The mean speed up to a step, in words; empty before there is one."""
        now = time.monotonic()
        first, began = self.first = self.first or (step, now)
        if not self.tokens or step == first or now == began:
            return ""
        return f"{self.tokens * (step - first) / (now - began):,.0f} tokens/s"

    def pause(self) -> None:
        """Begins anew with the next step."""
        self.first = None


class _Bar:
    """Progress as a live bar."""

    def __init__(
        self, bar: bars.Progress, title: str, steps: int, left: Callable[[], float | None] | None
    ):
        self.bar, self.left = bar, left
        self.task = bar.add_task(title, total=steps, note="", left="")

    def update(self, step: int, note: str, news: bool = False) -> None:
        left = self.left() if self.left else None
        self.bar.update(self.task, completed=step, note=note, left=_left(left))


class _Lines:
    """Progress as plain lines."""

    def __init__(
        self,
        output: Console,
        title: str,
        steps: int,
        unit: str,
        left: Callable[[], float | None] | None,
    ):
        self.output, self.title, self.steps, self.unit = output, title, steps, unit
        self.left = left or self._by_pace
        self.began = self.last = self.now = time.monotonic()
        self.first: tuple[int, float] | None = None  # from there on nothing compiles
        self.step = 0

    def update(self, step: int, note: str, news: bool = False) -> None:
        self.step, self.now = step, time.monotonic()
        self.first = self.first or (step, self.now)
        pause = NEWS_SECONDS if news else QUIET_SECONDS
        if self.now - self.last < pause and not (news and step == self.steps):
            return
        self.last = self.now
        time_words = duration(self.now - self.began) if step == self.steps else _left(self.left())
        parts = (f"{self.title}  {self.unit} {step} of {self.steps}", note, time_words)
        self.output.say("  ".join(parts).rstrip())

    def _by_pace(self) -> float:
        """Seconds left, if the steps to come are like those since the first."""
        first, since = self.first or (0, self.began)
        if self.step > first:
            pace = (self.now - since) / (self.step - first)
        else:
            pace = (self.now - self.began) / self.step
        return pace * (self.steps - self.step)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> duration(7.44), duration(192.0)
        ('7.4 s', '3 min 12 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
