"""Writes the README's section of results from their files: `python -m benchmarks readme`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Spread
from benchmarks.report import CLAIMS, FIGURES, LARGEST, Row, cell, table

README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
DEVICES = ROOT / "docs" / "accelerators.md"
PICTURES = {
    "tradeoff-movies": "Movie reviews: test accuracy against trainable parameters",
    "tradeoff-cola": "CoLA: test correlation against trainable parameters",
    "tradeoff-stsb": "STS-B: test correlation against trainable parameters",
    "peers": "Step time, memory and latency beside other libraries",
    "latency": "What unmerged adapters add to a forward pass of GPT-2 medium",
}
BEGIN, END = "<!-- results: written by python -m benchmarks readme -->", "<!-- end of results -->"


def section(results: Path = RESULTS) -> str:
    """Builds the text of the section.

    Every row names the command that reproduces it, and the section lists the figures that were not
    reached. A second file of a benchmark, for example from another machine, is shown under its own
    name.

    Args:
        results: the directory with the results.

    Returns:
        The section as Markdown.
    """
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    claims = [row for name, file in files.items() for row in _claims(file, name)]
    figures = [row for name, file in files.items() for row in _figures(file, name)]
    missed = [row for row in figures if row["met"] == "no"]
    machines = dict.fromkeys(map(_machine, files.values()))
    parts = [
        *(["Published claims, and what was found here:", table(claims)] if claims else []),
        *(f"![{alt}](benchmarks/results/{name}.png)" for name, alt in _pictures(results)),
        f"Of {len(figures)} figures that were asked for, {len(figures) - len(missed)} are reached.",
        *(["Not reached:", table(missed)] if missed else []),
        "<details><summary>All of them</summary>",
        table(figures),
        "</details>",
        f"Measured on {'; '.join(machines)}. Medians, quartiles in brackets.",
    ]
    return "\n\n".join(parts)


def _pictures(results: Path) -> list[tuple[str, str]]:
    """The names of the existing pictures, with their descriptions."""
    return [(name, alt) for name, alt in PICTURES.items() if (results / f"{name}.png").exists()]


def _sources(file: Row, name: str) -> Row:
    """The link to all results of a row's benchmark, and the command that reproduces them."""
    link = f"[{name}](benchmarks/results/{name}.md)"
    return {"results": link, "command": f"`{file['command']}`"}


def _claims(file: Row, name: str) -> Iterator[Row]:
    for row in _rows(file, CLAIMS):
        yield {**row, **_sources(file, name)}


def _figures(file: Row, name: str) -> Iterator[Row]:
    for row in _rows(file, FIGURES):
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


def largest(results: Path = RESULTS) -> str:
    """The table of the largest models for each card, of the page of accelerators."""
    file = json.loads((results / "accelerators.json").read_text())
    return table(list(_rows(file, LARGEST)))


def write(readme: Path = README, results: Path = RESULTS, devices: Path = DEVICES) -> None:
    """Writes the sections between the marks in the README and in the page of accelerators.

    Args:
        readme: the file with the results.
        results: the directory with the results.
        devices: the page of accelerators.

    Raises:
        ValueError: a file does not have its mark exactly once.
    """
    _between_marks(readme, section(results))
    if (results / "accelerators.json").exists():
        _between_marks(devices, largest(results))


def _between_marks(page: Path, text: str) -> None:
    old = page.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise ValueError(f"{page}: expected one line {BEGIN!r} and one {END!r} after it")
    before, rest = old.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
