"""Writes the results into the README and the documentation: `python -m benchmarks readme`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import baselines, sweep
from benchmarks.harness import ROOT, Spread
from benchmarks.report import CLAIMS, COSTS, FIGURES, LARGEST, WHOLE, Row, cell, table

README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGE, DEVICES, TASKS = DOCS / "results.md", DOCS / "accelerators.md", DOCS / "tasks.md"
PEFT = DOCS / "coming-from" / "peft.md"
LINK = "../benchmarks/results"  # from the pages
COMPARED = {  # the README's rows, by the file of results that has to be there
    "peers": (
        "time of a step, LoRA, BERT-base, adapters_jax / PEFT",
        "time of a step, LoRA, SmolLM2-135M, adapters_jax / qwix",
        "time of a step, Houlsby, BERT-base, adapters_jax / AdapterHub",
        "peak memory of the whole process, LoRA, BERT-base, adapters_jax / PEFT",
        "latency of one example, LoRA / its base",
    ),
    "peers-linear": (
        "time of a step, all linear / q and v, Qwen 3 of 8 layers, 32 x 128",
        "time of a step, all linear, adapters_jax / PEFT, Qwen 3 of 8 layers, 32 x 128",
        "time of a step, all linear, adapters_jax / PEFT, SmolLM2-135M, 4 x 256",
        "time of a step, all linear, adapters_jax / qwix, SmolLM2-135M, 4 x 256",
    ),
    "peers-generation": (
        "time of 64 tokens after 32, batch 1, SmolLM2-135M, base, adapters_jax / transformers",
        "time of 64 tokens after 32, batch 16, SmolLM2-135M, base, adapters_jax / transformers",
    ),
    "peers-tenants": (
        "time of a step of tenants, 8 x 4 x 128 / 1 x 32 x 128, adapters_jax",
        "time of a step of tenants, 8 x 4 x 128, adapters_jax / SkyRL",
    ),
}
LATER = "EPYC family 26 (Zen 5)"
PEERS = {  # the README's columns, by file
    "peers": "EPYC family 25 (Zen 4)",
    "peers-zen5": "Zen 5, an earlier version",
    **dict.fromkeys(("peers-linear", "peers-generation", "peers-tenants"), LATER),
}
PICTURES = {
    "tradeoff-movies": "Movie reviews: test accuracy against trainable parameters",
    "tradeoff-cola": "CoLA: test correlation against trainable parameters",
    "tradeoff-stsb": "STS-B: test correlation against trainable parameters",
    "tradeoff-wnut17": "WNUT-17: F1 of entities on test against trainable parameters",
    "peers": "Step time, memory and latency beside other libraries",
    "peers-linear": "A step with LoRA on all linear layers beside other libraries",
    "peers-generation": "Generation beside transformers",
    "peers-tenants": "A step of one tenant and of eight, beside SkyRL",
    "latency": "What unmerged adapters add to a forward pass of GPT-2 medium",
}
BEGIN, END = "<!-- results: written by python -m benchmarks readme -->", "<!-- end of results -->"


def section(results: Path = RESULTS) -> str:
    """Builds the text of the page of results.

    Every row names the command that reproduces it, and the section lists the figures that miss
    their limits. A second file of a benchmark, for example from another machine, is shown under
    its own name.

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
        *(["## Published claims", table(claims)] if claims else []),
        *(f"![{alt}]({LINK}/{name}.png)" for name, alt in _pictures(results)),
        "## Figures with a limit",
        f"{len(figures) - len(missed)} of {len(figures)} figures are within their limits.",
        *(["Not within their limits:", table(missed)] if missed else []),
        "## All figures",
        table(figures),
        f"Measured on {'; '.join(machines)}. Medians, quartiles in brackets.",
    ]
    return "\n\n".join(parts)


def _pictures(results: Path) -> list[tuple[str, str]]:
    """The names of the existing pictures, with their descriptions."""
    return [(name, alt) for name, alt in PICTURES.items() if (results / f"{name}.png").exists()]


def _sources(file: Row, name: str) -> Row:
    """The link to all results of a row's benchmark, and the command that reproduces them."""
    link = f"[{name}]({LINK}/{name}.md)"
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


def accelerators(results: Path = RESULTS) -> str:
    """The tables of the page of accelerators: the largest models, whole ones, and steps."""
    file = json.loads((results / "accelerators.json").read_text())
    titles = {
        LARGEST: "The largest compiled model that fits one device",
        WHOLE: "Memory of whole models, and what their devices exchange in a step",
        COSTS: "A step of each side",
    }
    parts = [f"### {title}\n\n{table(list(_rows(file, kind)))}" for kind, title in titles.items()]
    return "\n\n".join(parts)


def tasks(results: Path = RESULTS) -> str:
    """The table of the page of tasks: each on its data, beside its baselines."""
    file = json.loads((results / "baselines.json").read_text())
    rows = list(_rows(file, baselines.TABLE))
    return f"{table(rows)}\n\n`{file['command']}`, on {_machine(file)}."


def peft(results: Path = RESULTS) -> str:
    """The tables of the page of PEFT: what became of its configurations on every family."""
    file = json.loads((results / "sweep.json").read_text())
    broken = list(_rows(file, sweep.BROKEN))
    rows = list(_rows(file, sweep.REFUSED))
    parts = [
        table(list(_rows(file, sweep.TABLE))),
        f"Wrong or crashed: {len(broken)}." + (f"\n\n{table(broken)}" if broken else ""),
        "Refused, with the reason:",
        table(rows),
        f"`{file['command']}`, on {_machine(file)}.",
    ]
    return "\n\n".join(parts)


def compared(results: Path = RESULTS) -> str:
    """The README's table: a few figures beside other libraries, by processor."""
    columns: dict[str, Row] = {}
    there = {name: path for name in PEERS if (path := results / f"{name}.json").exists()}
    for name, path in there.items():
        rows = _rows(json.loads(path.read_text()), FIGURES)
        column = columns.setdefault(PEERS[name], {})
        column |= {row["claim"]: _shown(row["measured"]) for row in rows}
    claims = [claim for name in COMPARED if name in there for claim in COMPARED[name]]
    shown = [{title: column.get(claim) for title, column in columns.items()} for claim in claims]
    return table([{"figure": claim, **row} for claim, row in zip(claims, shown, strict=True)])


def write(
    readme: Path = README,
    page: Path = PAGE,
    results: Path = RESULTS,
    devices: Path = DEVICES,
    trained: Path = TASKS,
    swept: Path = PEFT,
) -> None:
    """Writes the tables between the marks in the README and in pages of the documentation.

    Args:
        readme: the file with the comparison.
        page: the page of results.
        results: the directory with the results.
        devices: the page of accelerators.
        trained: the page of tasks.
        swept: the page of PEFT.

    Raises:
        ValueError: a file does not have its mark exactly once.
    """
    between_marks(page, section(results))
    if (results / "peers.json").exists():
        between_marks(readme, compared(results))
    if (results / "accelerators.json").exists():
        between_marks(devices, accelerators(results))
    if (results / "baselines.json").exists():
        between_marks(trained, tasks(results))
    if (results / "sweep.json").exists():
        between_marks(swept, peft(results))


def between_marks(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replaces the text between two marks of a page.

    Raises:
        ValueError: the page does not have each mark exactly once.
    """
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{page}: expected one line {begin!r} and one {end!r} after it")
    before, rest = old.split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
