"""The blocks of the README and of the documentation run as they stand, each by itself.

A block that is not run says why in its first line, `# Not run...`; the flags of its commands are
still read. `# Takes...` makes a block weekly; where that line ends with "the tests take a small
model and add FLAGS.", the pinned models are small ones, and trainings get those flags. A `print` or
a command that two spaces and a comment follow prints the comment. The blocks that ask a server are
run by test_docs_servers.py.
"""

import ast
import contextlib
import inspect
import io
import operator
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from xml.etree import ElementTree

import pytest
from helpers import pages
from helpers.pages import FENCE, PAGES, ROOT, blocks_of, check_printed, commands, params

import adapters_jax as aj
from adapters_jax.finetune.cli import main as command_line
from adapters_jax.finetune.options.flags import flag
from adapters_jax.finetune.options.parsing import schema
from adapters_jax.finetune.pretrained.assets import cached
from adapters_jax.methods import METHODS
from docs import facts, flags

pytestmark = pytest.mark.pages

INLINE = re.compile(r"(?<!`)`(aj\.[^`]+)`(?!`)")
EXPRESSION = re.compile(r"aj\.[\w.]+(\(.*\))?$", re.S)
RECIPES = ("adapters_jax.presets", "adapters_jax.methods")
OTHERS = {"{literalinclude}", "json", "text", "{toctree}", "{include}", "{facts}", "{eval-rst}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pages.write_files(folder)
    return folder


@pytest.fixture
def registered():
    """Methods that a block registers are gone after it, and those of other tests while it runs."""
    before = dict(METHODS)
    for kind, method in before.items():
        if not method.__module__.startswith("adapters_jax."):
            del METHODS[kind]
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("block", params("python"))
def test_python_runs_as_pasted(block, files, tmp_path, monkeypatch):
    for asset in re.findall(r'fetch\("(.*?)"\)', block.text):
        if cached(asset) is None:
            pytest.skip(f"{asset} is not in the cache")
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "aj.join_hosts()" in block.text:  # before anything that touches a device
        command = [sys.executable, "-W", "error", "-c", block.text]
        check_printed(block, subprocess.check_output(command, text=True))
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), {})
    check_printed(block, printed.getvalue())


@pytest.mark.parametrize("block", params("sh"))
def test_shell_runs_as_pasted(block, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if block.added is not None:
        pages.write_stand_ins(tmp_path, monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("What does food serve ?\n"))
    for line in commands(block):
        if line.startswith("python3 -m venv "):  # .ci/run runs both of the README
            assert block.page.name == "README.md"
        else:
            pages.run_command(line, block)
    check_printed(block, capsys.readouterr().out)


@pytest.mark.parametrize("block", params("sh", runs=False))
def test_the_flags_exist_in_blocks_that_are_not_run(block, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_start", lambda *command: None)
    for line in commands(block):
        if line.startswith("adapters-jax "):
            status = command_line.main(shlex.split(line, comments=True)[1:])
            assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("block", params("python", runs=False))
def test_blocks_that_are_not_run_are_python(block):
    compile(block.text, str(block.page), "exec")


def test_ci_runs_the_installations_that_say_so():
    script = (ROOT / ".ci" / "run").read_text()
    for page in PAGES:
        said = page.read_text().count("# Not run by the tests, but by .ci/run")
        assert script.count(f"installs {page.relative_to(ROOT)} ") == said <= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_in_a_language_that_nobody_runs(page):
    languages = {block.language for block in blocks_of(page)}
    assert languages <= {"python", "sh", *OTHERS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_calls_in_the_text_are_ours(page):
    for code in INLINE.findall(FENCE.sub("", page.read_text()).replace("\\|", "|")):
        tree = ast.parse(code, mode="eval") if EXPRESSION.match(code) else ast.Tuple([])
        for call in ast.walk(tree):
            if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "aj":
                assert hasattr(aj, call.attr), code
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("aj."):
                function = operator.attrgetter(ast.unparse(call.func)[3:])(aj)
                given = [a for a in call.args if ast.unparse(a) != "..." and not is_star(a)]
                named = dict.fromkeys([keyword.arg for keyword in call.keywords])
                inspect.signature(function).bind_partial(*given, **named)
                if function.__module__.startswith(RECIPES) and complete(call):
                    eval(ast.unparse(call), {"aj": aj})


def complete(call):
    names = {each.id for each in ast.walk(call) if isinstance(each, ast.Name)}
    return names == {"aj"} and "..." not in ast.unparse(call)


def is_star(argument):
    return isinstance(argument, ast.Starred)


def test_the_page_of_errors_has_each_class_once():
    sources = (ROOT / "adapters_jax").rglob("*.py")
    trees = [ast.parse(source.read_text()) for source in sources]
    bases = {
        each.name: {ast.unparse(base) for base in each.bases}
        for tree in trees
        for each in tree.body
        if isinstance(each, ast.ClassDef)
    }
    kinds, more = set(), {"UserError"}
    while more:
        kinds |= more
        more = {name for name, above in bases.items() if above & kinds} - kinds
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.M)
    assert sorted(rows) == sorted({*kinds, "AdapterWarning"})


def test_a_traceback_names_the_page_of_errors():
    with pytest.raises(aj.AdapterFileError) as caught:
        aj.read_adapter("absent")
    last = "".join(traceback.format_exception_only(caught.value)).splitlines()[-1]
    assert last == f"docs/errors.md of adapters_jax explains {type(caught.value).__name__}"
    with pytest.raises(aj.UserError) as caught:
        aj.LoRA("**", rank=0)
    assert "docs/" not in "".join(traceback.format_exception_only(caught.value))


def test_every_method_has_a_figure_in_the_one_style():
    pages = [page for page in (ROOT / "docs" / "methods").glob("*.md") if page.stem != "index"]
    assert len(pages) >= 7
    styles = set()
    for page in pages:
        (figure,) = re.findall(r"^!\[.{40,}\]\((figures/.*\.svg)\)$", page.read_text(), re.M)
        drawn = ElementTree.parse(page.parent / figure).getroot()
        said = {each.tag.rpartition("}")[2]: each.text for each in drawn}
        assert drawn.get("class") == "drawn" and said["title"] and len(said["desc"]) > 100
        styles.add(said["style"])
    assert len(styles) == 1


def test_each_command_has_a_page_with_all_its_flags_and_examples(tmp_path, capsys):
    (tmp_path / "gone.md").write_text("of a command that is no more")
    flags.write(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == command_line.COMMANDS.keys()
    for name in command_line.COMMANDS:
        text = (tmp_path / f"{name}.md").read_text()
        command = command_line.command_of(name)
        rows = re.findall(r"^\| `(\S+)` \| (.+?) \| .*? \| (.+) \|$", text, re.M)
        assert all(kind and meaning for _, kind, meaning in rows), name
        named = [flag(field) for field in schema(command, name)["properties"]]
        named += [field.upper() for field in command.positional]
        assert sorted(row[0] for row in rows) == sorted([*named, "--config", "--debug"])
        assert f"```sh\nadapters-jax {name}" in text or "| adapters-jax" in text
        assert command_line.main([name, "--help"]) == 0
        headings = re.findall("─ (.+?) ─", capsys.readouterr().out)
        assert re.findall("^## (.+)$", text, re.M) == headings  # in the order of the help
        assert f"[{name}](commands/{name}.md)" in flags.commands()


def test_the_two_commands_are_there():
    readme = ROOT / "README.md"
    lines = [line for block in blocks_of(readme) for line in commands(block)]
    found = [line for line in lines if line.startswith("python3 -m venv ")]
    assert len(found) == 2
    assert "adapters-jax finetune" in found[0]
    assert "pytest" in found[1]


@pytest.mark.parametrize("name", ["AGENTS.md", "README.md", "CONTRIBUTING.md"])
def test_what_a_page_of_the_repository_names_is_there(name):
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    folders = re.findall(r"`((?:adapters_jax|benchmarks|docs|tests)/[^` ]*)`", text)
    there = [each for each in folders if "NAME" not in each]
    assert links
    assert [each for each in links + there if not (ROOT / each).exists()] == []


def test_notebooks_install_the_wheel_of_this_version():
    wheel = f"v{aj.__version__}/adapters_jax-{aj.__version__}-py3-none-any.whl"
    for page in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        assert re.findall(r"releases/download/([^\"\\]+)", page.read_text()) == [wheel], page


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1500


@pytest.mark.weekly
def test_the_readme_has_the_table_of_methods():
    text = (ROOT / "README.md").read_text()
    assert text.split(facts.BEGIN)[1].split(facts.END)[0].strip() == facts.methods()
