"""The results of the zoo as Markdown: `docs/zoo.md`, one part for each library."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cells import MODELS
from .methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
NONE = "no attention"
PACKAGES = {
    "transformers": ("transformers",),
    "tunix": ("google-tunix",),
    "others": (
        "diffusers",
        "flaxdiff",
        "gemma",
        "google-tunix",
        "recurrentgemma",
        "mamba2-jax",
        "nano-moe-jax",
    ),
}
Cells = Mapping[tuple[str, str], Mapping[str, Any]]


def part(library: str, cells: Cells) -> str:
    """The models of a library, by the results of their cells."""
    names = [name for name, model in MODELS.items() if model.library == library]
    rows = [["model", *METHODS, "its own generation"], ["---"] * (len(METHODS) + 2)]
    for name in names:
        counts = [cells[name, method]["parameters"] for method in METHODS]
        row = [NONE if count is None else f"{count:,}" for count in counts]
        generates = {cells[name, method]["tokens"] for method in METHODS} == {True}
        rows.append([name, *row, "the same tokens" if generates else "has none"])
    merged = max(cell["merged"] or 0.0 for (name, _), cell in cells.items() if name in names)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    away = f"Merged and adapted outputs differ by at most {merged:.1e} of the largest output."
    return f"{_versions(library)}. {away}\n\n{table}"


def _versions(library: str) -> str:
    packages = (*PACKAGES[library], "flax", "jax")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def write(library: str, cells: Cells, page: Path = PAGE) -> None:
    """Puts the part of a library between its marks on the page."""
    begin, end = marks(library)
    old = page.read_text()
    new = f"{begin}\n{part(library, cells)}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    page.write_text(found.sub(lambda _: new, old))


def marks(library: str) -> tuple[str, str]:
    """What stands before and after the part of a library."""
    return f"<!-- {library}: written by python -m tests.zoo -->", f"<!-- end of {library} -->"
