"""What is public: the modules of CONTRIBUTING.md's policy, and what pages import."""

import ast
import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def public_modules():
    """The policy's packages, whose `__all__` is public, and its modules, of which pages import."""
    policy = (ROOT / "CONTRIBUTING.md").read_text().partition("## What is public")[2]
    tables = policy.partition("\n## ")[0].partition("Public as well")
    rows = [re.findall(r"^\| (`adapters_jax.*?) \|", table, re.M) for table in tables[::2]]
    return [[name for row in each for name in re.findall(r"`(.*?)`", row)] for each in rows]


def code_of_pages():
    """The Python of the README, of the pages and of the notebooks, piece by piece."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in (page for page in pages if "measured" not in page.parts):
        blocks = re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(), re.M | re.S)
        yield from map(textwrap.dedent, blocks)
    for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield re.sub(r"^[%!].*", "", "".join(cell["source"]), flags=re.M)


def imported_by_pages():
    """The `(module, name)` that pages import of the library; of a plain import the name is None."""
    found = set()
    for node in (node for text in code_of_pages() for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module, each.name) for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {(each.name, None) for each in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == "adapters_jax"}
