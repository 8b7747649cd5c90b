"""Writes the results into the README and the documentation: `python -m benchmarks readme`."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import baselines, sweep
from benchmarks.harness import ROOT, Spread
from benchmarks.report import CLAIMS, COSTS, FIGURES, LARGEST, WHOLE, Row, cell, table

README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGES, DEVICES, TASKS = DOCS / "results", DOCS / "accelerators.md", DOCS / "tasks.md"
PEFT = DOCS / "coming-from" / "peft.md"
LINK = "../../benchmarks/results"  # from the pages of results
SHOWN = {  # the files of results by the page that shows their claims and figures
    "peers": ("peers", "peers-zen5"),
    "peers-more": (
        *("peers-linear", "peers-linear-zen5", "peers-generation", "peers-tenants"),
        *("peers-service", "sweep"),
    ),
    "step": ("step", "step-tunix", "llama", "speedup"),
    "memory": ("memory", "methods", "plan", "parameters", "files"),
    "accuracy": (
        *("tradeoff-movies", "tradeoff-cola", "tradeoff-cola-whole", "tradeoff-stsb"),
        *("tradeoff-stsb-whole", "tradeoff-wnut17", "tradeoff-wnut17-whole", "ablations"),
    ),
    "training": ("defaults", "fusion", "tasks", "regret"),
    "latency": ("latency", "switch"),
    "many": (
        *("bank", "bank-places", "serve", "tenants-compiled", "tenants-cycles"),
        *("service", "service-churn", "reward"),
    ),
    "accelerators": ("accelerators",),
    "quantised": ("accelerators", "kernel"),
    "starting": ("tracing", "compiling"),
}
LAYERS = re.compile(r"int8|int4|nf4|of a layer")  # of `accelerators`, what `quantised` shows
VERDICTS = ("reproduced", "in part", "undecided", "not reproduced")
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
        "time of a step, all linear, adapters_jax / qwix, SmolLM2-135M, 4 x 256",
    ),
    "peers-generation": (
        "time of 64 tokens after 32, batch 1, SmolLM2-135M, base, adapters_jax / transformers",
    ),
    "peers-tenants": (
        "time of a step of tenants, 8 x 4 x 128 / 1 x 32 x 128, adapters_jax",
        "time of a step of tenants, 8 x 4 x 128, adapters_jax / SkyRL",
    ),
}
ZEN4, ZEN5 = "EPYC family 25 (Zen 4)", "Zen 5, an earlier version"
PEERS = {  # the README's columns, by file
    **dict.fromkeys(("peers", "peers-linear", "peers-generation", "peers-tenants"), ZEN4),
    **dict.fromkeys(("peers-zen5", "peers-linear-zen5"), ZEN5),
}
PICTURES = {
    "tradeoff-movies": "Movie reviews: test accuracy against trainable parameters",
    "tradeoff-cola": "CoLA: test correlation against trainable parameters",
    "tradeoff-stsb": "STS-B: test correlation against trainable parameters",
    "ablations": "Points that are lost without the adapters of a span of layers",
    "tradeoff-wnut17": "WNUT-17: F1 of entities on test against trainable parameters",
    "peers-linear": "A step with LoRA on all linear layers beside other libraries",
    "peers-generation": "Generation beside transformers",
    "peers-tenants": "A step of one tenant and of eight, beside SkyRL",
    "latency": "What unmerged adapters add to a forward pass of GPT-2 medium",
    "regret": "What LoRA needs on SmolLM2-135M: loss by learning rate, and by steps",
    "reward": "The reward of sums, step by step, by Tinker's cookbook on our server",
}
BEGIN, END = "<!-- results: written by python -m benchmarks readme -->", "<!-- end of results -->"


def section(page: str, results: Path = RESULTS) -> str:
    """Builds the generated part of a page of results.

    Each benchmark of the page has its claims, its figures and the command that repeats them. Two
    runs of it, for example on two machines, are columns of one table. The pictures come last,
    beside each other where there is room.

    Args:
        page: the name of the page, in `SHOWN`.
        results: the directory with the results.

    Returns:
        The section as Markdown.
    """
    files = {name: json.loads(path.read_text()) for name, path in _there(page, results)}
    parts = []
    for benchmark in dict.fromkeys(file["benchmark"] for file in files.values()):
        runs = {name: file for name, file in files.items() if file["benchmark"] == benchmark}
        file = runs[benchmark]
        about = [f"[{name}]({LINK}/{name}.md) on {_machine(run)}" for name, run in runs.items()]
        parts += [f"## {benchmark}", f"`{file['command']}`. All tables: {'; '.join(about)}."]
        claims, figures = _on(page, file, CLAIMS), _figures(page, runs)
        parts += [table(rows) for rows in (claims, figures) if rows]
    pictures = [
        f"![{PICTURES[name]}]({LINK}/{name}.png)"
        for name in files
        if name in PICTURES and (results / f"{name}.png").exists()
    ]
    parts += ["## Pictures", "\n".join(pictures)] if pictures else []
    return "\n\n".join(parts)


def _there(page: str, results: Path) -> list[tuple[str, Path]]:
    """The names and files of the results that a page shows, where they exist."""
    paths = [(name, results / f"{name}.json") for name in SHOWN[page]]
    return [(name, path) for name, path in paths if path.exists()]


def _figures(page: str, runs: dict[str, Row]) -> list[Row]:
    """A row for each figure and limit, with a column for each run."""
    rows: dict[tuple[str, float], Row] = {}
    for name, file in runs.items():
        column = name if len(runs) > 1 else "measured"
        for row in _on(page, file, FIGURES):
            start = {"figure": row["claim"], "at most": row["at most"]}
            found = rows.setdefault((row["claim"], row["at most"]), start)
            found[column] = _shown(row["measured"]) + ("" if row["met"] else " **(above)**")
    return list(rows.values())


def summary(results: Path = RESULTS) -> str:
    """Builds the table of the first page: what became of the figures and claims of each page.

    Raises:
        ValueError: no page shows a file of results that has claims or figures.
    """
    files = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    shown = {name for names in SHOWN.values() for name in names}
    lost = [n for n in files if n not in shown and any(_rows(files[n], CLAIMS, FIGURES))]
    if lost:
        raise ValueError(f"no page of results shows {', '.join(lost)}: add it to SHOWN")
    rows: list[Row] = []
    total: Counter[bool] = Counter()
    for page, names in SHOWN.items():
        there = [files[name] for name in names if name in files]
        if not there:
            continue
        met = Counter(row["met"] for file in there for row in _on(page, file, FIGURES))
        total += met
        found = Counter(row["verdict"] for file in there for row in _on(page, file, CLAIMS))
        within = f"{met[True]} of {met.total()}" if met else None
        claims: Row = {verdict: found[verdict] or None for verdict in VERDICTS}
        rows.append(
            {"page": f"[{_title(page)}]({page}.md)", "within their limits": within, **claims}
        )
    return f"{total[True]} of {total.total()} figures are within their limits.\n\n{table(rows)}"


def _title(page: str) -> str:
    return (PAGES / f"{page}.md").read_text().splitlines()[0].removeprefix("# ")


def _on(page: str, file: Row, kind: str) -> list[Row]:
    """The rows of a kind that a page shows; two pages share those of `accelerators`."""
    rows = list(_rows(file, kind))
    if file["benchmark"] != "accelerators":
        return rows
    return [row for row in rows if bool(LAYERS.search(row["claim"])) == (page == "quantised")]


def _rows(file: Row, *kinds: str) -> Iterator[Row]:
    return (
        {k: v for k, v in row.items() if k != "table"}
        for row in file["rows"]
        if row["table"] in kinds
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
    pages: Path = PAGES,
    results: Path = RESULTS,
    devices: Path = DEVICES,
    trained: Path = TASKS,
    swept: Path = PEFT,
) -> None:
    """Writes the tables between the marks in the README and in pages of the documentation.

    Args:
        readme: the file with the comparison.
        pages: the directory with the pages of results.
        results: the directory with the results.
        devices: the page of accelerators.
        trained: the page of tasks.
        swept: the page of PEFT.

    Raises:
        ValueError: a file does not have its mark exactly once.
    """
    between_marks(pages / "index.md", summary(results))
    for page in SHOWN:
        between_marks(pages / f"{page}.md", section(page, results))
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
