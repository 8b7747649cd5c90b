"""Settings of the site: `sphinx-build -W docs site` builds it."""

import dataclasses
import importlib
import inspect
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, image, paragraph, raw, section
from latex2mathml.converter import convert
from sphinx.addnodes import toctree
from sphinx.util.inspect import stringify_signature

HERE = Path(__file__).parent
MEASURED = HERE.parent / "benchmarks" / "results"

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the pages look at shapes alone
project = "adapters_jax"
author = copyright = "The adapters_jax authors"
release = metadata.version("adapters-jax")
sys.path.insert(0, str(HERE.parent))

extensions = [
    "docs.facts",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_static"]
suppress_warnings = ["myst.header"]
myst_enable_extensions = ["dollarmath", "attrs_block"]
myst_heading_anchors = 3
napoleon_use_ivar = True
napoleon_custom_sections = [
    ("Required of the others", "params_style"),
    ("Required beside what `Method` requires", "params_style"),
    ("Optional", "params_style"),
]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
nb_execution_mode = "force"  # every notebook runs, and an error in one is an error of the build
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_execution_in_temp = True
smartquotes = False  # flags stay --flags
html_theme = "furo"
html_title = "adapters_jax"
html_static_path, templates_path = ["_static"], ["_templates"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_math_renderer = "mathml"
html_show_sourcelink = False

# The results of the benchmarks are pages of the site, where they are beside its other pages.
shutil.copytree(
    MEASURED,
    HERE / "measured",
    dirs_exist_ok=True,
    ignore=lambda folder, names: [name for name in names if not name.endswith((".md", ".png"))],
)
# So are the commands and their flags, as the command line has them.
importlib.import_module("docs.flags").write(HERE / "commands")


def _moved(app: Any, page: str, source: list[str]) -> None:
    """Links to the results lead to the copies of them."""
    source[0] = re.sub(r"\]\((\.\./)*benchmarks/results/", "](/measured/", source[0])


def _as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write code in single backticks, and stars are stars."""
    code = example = False
    for i, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        code = code and bool(line.strip())
        if example:
            continue
        parts = line.split("`")
        for n, part in enumerate(parts):
            parts[n] = part if code else re.sub(r"([*|])", r"\\\1", part)
            code ^= n + 1 < len(parts)
        lines[i] = "``".join(parts)


def _settings(app: Any, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """The signature of a dataclass is that of its fields, also where its base has a `__new__`."""
    if not dataclasses.is_dataclass(obj):
        return None
    return stringify_signature(inspect.signature(obj), show_annotation=False), None


def _drawn(app: Any, page: Any, name: str) -> None:
    """Figures are parts of the page, so that they have its colours."""
    for figure in [each for each in page.findall(image) if each["uri"].endswith(".svg")]:
        figure.replace_self(raw("", (HERE / figure["uri"]).read_text(), format="html"))


def _guide(app: Any, error: Exception | None) -> None:
    """Writes llms.txt: each page under the captions of the index, with its first sentence."""
    if error or app.builder.name != "html":
        return
    env, lines = app.env, [f"# {project}", "", f"> {_first_sentence(app.env, 'index')}"]

    def add(name: str, indent: str = "") -> None:
        title = env.titles[name].astext()
        lines.append(f"{indent}- [{title}]({name}.html): {_first_sentence(env, name)}")
        for below in env.toctree_includes.get(name, ()):
            add(below, indent + "  ")

    for part in env.get_doctree("index").findall(toctree):
        lines += ["", f"## {part['caption']}", ""]
        for _, name in part["entries"]:
            add(name)
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n")


def _first_sentence(env: Any, name: str) -> str:
    found = env.get_doctree(name).findall(paragraph)
    text = next((each.astext() for each in found if isinstance(each.parent, section)), "")
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(text.split()))[0]


def _inline_math(self: Any, node: Any) -> None:
    self.body.append(convert(node.astext()))
    raise SkipNode


def _block_math(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    """Formulas are MathML, which browsers draw themselves; nothing is loaded from elsewhere."""
    app.connect("source-read", _moved)
    app.connect("doctree-resolved", _drawn)
    app.connect("build-finished", _guide)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _settings)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
