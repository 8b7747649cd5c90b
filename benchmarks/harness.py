"""What every benchmark shares: interleaved timing, medians with spread, and a report.

Contenders are timed in turn, A B A B, in one process, so that a slow minute of the machine falls on
all of them; their ratio is taken round by round, for the same reason.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("adapters-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
Row = dict[str, Any]


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
    """Runs each contender once a round, in order.

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
    for i in range(warmup + rounds):
        for name, run in contenders.items():
            start = clock()
            own = run()
            took = clock() - start if own is None else own
            if i >= warmup:
                seconds[name].append(took)
    return seconds


def ratio(seconds: Mapping[Any, Sequence[float]], name: Any, other: Any) -> Spread:
    """How many times as long as the other a contender takes, round by round."""
    return Spread.of(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def fresh(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, from the repository's root.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh interpreter failed on {code!r}:\n{done.stderr[-2000:]}")
    return done


def _read(path: str, key: str) -> str:
    """The value of the first line `key : value` of a file of the system; empty without one."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def machine() -> Row:
    """What the figures were measured on, and how busy it was."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _read("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores,
        "memory": _read("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """The interpreter's and packages' versions; a package that is not installed is left out."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **found}


class Report:
    """Rows of a benchmark: to a file of JSON lines as they come, then JSON and tables in Markdown.

    Args:
        name: of the benchmark, and of its files.
        command: that reruns it.
        directory: where its files go.
    """

    def __init__(self, name: str, command: str, directory: Path):
        self.name, self.directory = name, directory
        directory.mkdir(parents=True, exist_ok=True)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.about: Row = {"benchmark": name, "command": command, "date": date}
        self.about |= {"machine": machine(), "versions": versions()}
        self.rows: list[Row] = []
        self._lines = directory / f"{name}.jsonl"
        self._lines.write_text(json.dumps(self.about) + "\n")

    def add(self, table: str, **row: Any) -> None:
        """Adds one row to a table; `Spread`s become medians with quartiles."""
        self.rows.append({"table": table, **row})
        with self._lines.open("a") as file:
            file.write(json.dumps(_plain(self.rows[-1])) + "\n")

    def samples(self, what: str, seconds: Mapping[str, Sequence[float]]) -> None:
        """Keeps raw timings, in the JSON lines alone."""
        with self._lines.open("a") as file:
            file.write(json.dumps({"samples": what, "seconds": dict(seconds)}) + "\n")

    def claim(self, what: str, measured: Spread | float, at_most: float) -> None:
        """Adds a figure that was wanted, and whether it was reached."""
        value = measured.median if isinstance(measured, Spread) else measured
        row = {"claim": what, "measured": measured, "at most": at_most, "met": value <= at_most}
        self.add("Wanted", **row)

    def markdown(self) -> str:
        """The tables, under what they were measured on."""
        kinds = [str(kind) for kind in dict.fromkeys(row["table"] for row in self.rows)]
        parts = [f"# {self.name}", f"`{self.about['command']}`, {self.about['date']}"]
        parts.append(", ".join(f"{k} {v}" for k, v in self.about["versions"].items()))
        about = self.about["machine"]
        load = ", ".join(f"{x:.2f}" for x in about["load"] or ())
        parts.append(
            f"{about['cores']} cores, {about['processor']}, {', '.join(about['devices'])}; "
            f"load at the start {load}. Medians, quartiles in brackets."
        )
        for kind in kinds:
            parts += [f"## {kind}", table([row for row in self.rows if row["table"] == kind])]
        return "\n\n".join(parts) + "\n"

    def finish(self) -> str:
        """Writes the JSON and the Markdown; returns the latter."""
        text = self.markdown()
        whole = {**self.about, "rows": [_plain(row) for row in self.rows]}
        (self.directory / f"{self.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
        (self.directory / f"{self.name}.md").write_text(text)
        return text


def _plain(row: Row) -> Row:
    return {k: asdict(v) if isinstance(v, Spread) else v for k, v in row.items()}


def _cell(value: Any) -> str:
    """A value for people: thousands separated, floats to four figures, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; the columns are their keys.

    Example:
        >>> print(table([{"table": "t", "name": "a", "n": 1234}, {"name": "b", "ok": True}]))
        | name | n | ok |
        |---|---|---|
        | a | 1,234 |  |
        | b |  | yes |
    """
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c != "table"]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    joined = ["| " + " | ".join(line) + " |" for line in lines]
    joined[1] = "|" + "---|" * len(columns)
    return "\n".join(joined)
