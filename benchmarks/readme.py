"""The README's section of results, of what the benchmarks wrote: `python -m benchmarks readme`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Spread
from benchmarks.report import CLAIMS, WANTED, Row, cell, table

README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
PICTURES = {
    "tradeoff-movies": "Movie reviews: test accuracy against trainable parameters",
    "tradeoff-cola": "CoLA: test correlation against trainable parameters",
    "tradeoff-stsb": "STS-B: test correlation against trainable parameters",
    "peers": "Step time, memory and latency beside other libraries",
    "latency": "What unmerged adapters add to a forward pass of GPT-2 medium",
}
BEGIN, END = "<!-- results: written by python -m benchmarks readme -->", "<!-- end of results -->"


def section(results: Path = RESULTS) -> str:
    """The section's text, of a directory of results.

    Every row names the command that makes it again; what was not reached is there as well. A file
    beside a benchmark's own, as of another machine, is shown under its own name.
    """
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    claims = [row for name, file in files.items() for row in _claims(file, name)]
    wanted = [row for name, file in files.items() for row in _wanted(file, name)]
    missed = [row for row in wanted if row["met"] == "no"]
    machines = dict.fromkeys(map(_machine, files.values()))
    parts = [
        *(["Published claims, and what was found here:", table(claims)] if claims else []),
        *(f"![{alt}](benchmarks/results/{name}.png)" for name, alt in _pictures(results)),
        f"Of {len(wanted)} figures that were asked for, {len(wanted) - len(missed)} are reached.",
        *(["Not reached:", table(missed)] if missed else []),
        "<details><summary>All of them</summary>",
        table(wanted),
        "</details>",
        f"Measured on {'; '.join(machines)}. Medians, quartiles in brackets.",
    ]
    return "\n\n".join(parts)


def _pictures(results: Path) -> list[tuple[str, str]]:
    """The pictures that are there, with what they show."""
    return [(name, alt) for name, alt in PICTURES.items() if (results / f"{name}.png").exists()]


def _sources(file: Row, name: str) -> Row:
    """Where a row has all of its figures, and what makes it again."""
    link = f"[{name}](benchmarks/results/{name}.md)"
    return {"results": link, "command": f"`{file['command']}`"}


def _claims(file: Row, name: str) -> Iterator[Row]:
    for row in _rows(file, CLAIMS):
        yield {**row, **_sources(file, name)}


def _wanted(file: Row, name: str) -> Iterator[Row]:
    for row in _rows(file, WANTED):
        yield {
            "figure": row["claim"],
            "measured": _shown(row["measured"]),
            "at most": row["at most"],
            "met": cell(row["met"]),
            **_sources(file, name),
        }


def _rows(file: Row, kind: str) -> Iterator[Row]:
    return (
        {k: v for k, v in row.items() if k != "table"}
        for row in file["rows"]
        if row["table"] == kind
    )


def _shown(value: Any) -> str:
    return str(Spread(**value)) if isinstance(value, dict) else cell(value)


def _machine(file: Row) -> str:
    machine, versions = file["machine"], file["versions"]
    memory = round(int(machine["memory"].split()[0]) / 2**20)
    return (
        f"{machine['cores']} cores ({machine['processor']}), {memory} GiB, Python "
        f"{versions['python']}, jax {versions['jax']}"
    )


def write(readme: Path = README, results: Path = RESULTS) -> None:
    """Puts the section where the README has its two marks.

    Raises:
        ValueError: it has not.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: wanted one line {BEGIN!r} and one {END!r} after it")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}")
