"""The site builds without a warning, its links lead somewhere, and it is readable in Chromium.

It needs the extra docs. With SCREENSHOTS=DIRECTORY, pictures of pages and the list of foreign
addresses, which are not asked for, are put there. NOTEBOOKS=off leaves the notebooks unrun.
"""

import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers.browser import BrowserPage
from helpers.pictures import check_picture
from helpers.public import public_modules

pytest.importorskip("sphinx", reason="the extra docs is not installed")
pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs"
LOOKED_AT = (
    *("index", "methods/lora", "guides/plan", "results/accelerators", "api/adapting"),
    *("commands/finetune", "measured/peers", "notebooks/papers", "search"),
)
PICTURED = ("index", "methods/lora")
CODE = ("code", "pre", "script", "style")
HIDDEN = """[...document.querySelectorAll(".table-wrapper")]
  .map(part => part.scrollWidth - part.clientWidth).filter(n => n > 1)"""
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    mode = os.environ.get("NOTEBOOKS", "force")
    options = ["-W", "-q", "-b", "html", "-D", f"nb_execution_mode={mode}"]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The places of a page, what it links to, what it loads, and its text outside of code."""

    def __init__(self, path):
        super().__init__()
        self.places, self.links, self.loads = set(), set(), set()
        self.code, self.text = 0, ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        if values.get(LOADED.get(tag)):
            self.loads.add(values[LOADED[tag]])
        self.code += tag in CODE

    def handle_endtag(self, tag):
        self.code -= tag in CODE

    def handle_data(self, data):
        self.text += "" if self.code else data


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_links_and_anchors_lead_somewhere(pages):
    broken, foreign = [], set()
    for path, page in pages.items():
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                foreign.add(link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target.exists()
            if there and parts.fragment and target in pages:
                there = unquote(parts.fragment) in pages[target].places
            broken += [] if there else [f"{path.name}: {link}"]
    assert not broken
    assert not [link for link in foreign if not link.startswith("https://")]
    if "SCREENSHOTS" in os.environ:
        listed = Path(os.environ["SCREENSHOTS"], "foreign.txt")
        listed.write_text("\n".join(sorted(foreign)) + "\n")


def test_llms_txt_leads_to_every_page(site, pages):
    listed = re.findall(r"^ *- \[.+\]\((.+?)\): .{10,}$", (site / "llms.txt").read_text(), re.M)
    made = {"index.html", "search.html", "genindex.html", "py-modindex.html"}
    there = {str(path.relative_to(site)) for path in pages}
    assert sorted(listed) == sorted(there - made)


def test_no_marks_of_markdown_are_left(pages):
    """A bar in the code of a table needs a backslash, or it ends the cell."""
    assert {path.name: page.text for path, page in pages.items() if "`" in page.text} == {}
    assert {page.code for page in pages.values()} == {0}  # all code has ended


def test_nothing_is_loaded_from_another_host(pages):
    loads = {link for page in pages.values() for link in page.loads}
    assert loads
    assert not [link for link in loads if urlsplit(link).scheme or urlsplit(link).netloc]


def public_parts(package):
    """The public names of a package, each with what it names."""
    module = importlib.import_module(package)
    return [(name, getattr(module, name)) for name in module.__all__]


def test_every_public_name_has_its_place(pages):
    places = set().union(
        *(page.places for path, page in pages.items() if path.parent.name == "api")
    )
    packages, _ = public_modules()
    wanted: dict[int, set[str]] = {}  # what two packages have needs one place
    for package in packages:
        for name, thing in public_parts(package):
            if inspect.ismodule(thing):
                wanted.setdefault(id(thing), set()).add(f"module-{thing.__name__}")
            elif callable(thing):  # a constant need not have one
                wanted.setdefault(id(thing), set()).add(f"{package}.{name}")
    assert [paths for paths in wanted.values() if not paths & places] == []


def problems(page, width, scheme):
    """What is wrong with a page that is open: width, colours, tables, accessibility and errors."""
    found = [*page.violations(), *page.errors()]
    needed = page.run("document.documentElement.scrollWidth")
    found += [f"it is {needed} wide"] if needed > width else []
    found += [f"a table hides {n} pixels" for n in page.run(HIDDEN)]
    colours = page.run("['color', 'backgroundColor'].map(x => getComputedStyle(document.body)[x])")
    text, ground = (sum(map(float, c[c.index("(") + 1 : -1].split(",")[:3])) for c in colours)
    dark = ground < text
    found += [] if dark == (scheme == "dark") else [f"its colours are not {scheme}"]
    return found + ([] if abs(ground - text) > 380 else [f"{colours} are too alike"])  # of 765


def written():
    """The names of the pages that are not made by the build."""
    paths = [path for kind in ("md", "ipynb") for path in DOCS.rglob(f"*.{kind}")]
    paths = [path for path in paths if path.parent.name not in ("measured", "commands")]
    return {path.relative_to(DOCS).with_suffix("").as_posix() for path in paths}


def check_readable(browser, site, names, width, scheme):
    found = {}
    for name in names:
        address, shown = f"file://{site}/{name}.html", f"site-{name.replace('/', '-')}-"
        page = BrowserPage(browser, address, width, scheme, shown)
        page.save_picture()
        found |= {name: wrong} if (wrong := problems(page, width, scheme)) else {}
        if name in PICTURED:
            check_picture(page)
    assert not found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_some_pages_are_readable(browser, site, width, scheme):
    """One page of each kind, since pages that the build makes of one kind are alike."""
    check_readable(browser, site, LOOKED_AT, width, scheme)


@pytest.mark.witness("light-390")
@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
def test_every_written_page_is_readable(browser, site, scheme, width):
    check_readable(browser, site, written() - {*LOOKED_AT}, width, scheme)
