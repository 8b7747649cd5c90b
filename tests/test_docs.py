"""The blocks of the README and of the documentation run as they stand, each by itself.

A block that is not run says why in its first line, `# Not run...`; the flags of its commands are
still read. `# Takes...` makes a block slow. A `print` or a command that two spaces and a comment
follow prints the comment.
"""

import ast
import contextlib
import inspect
import io
import operator
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import write_llama, write_meanings, write_model
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.app.cli import main as command_line
from adapters_jax.interop.peft import save_peft
from adapters_jax.methods import METHODS
from adapters_jax.models.bert import BertClassifier, classifier, load_bert
from adapters_jax.pretrained.assets import cached
from docs import facts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "measured" not in page.parts]
FENCE = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```$", re.M | re.S)
PRINTED = re.compile(r"^ *(?:print\(|adapters-jax ).*?(?<! )  # (.*)$", re.M)
INLINE = re.compile(r"(?<!`)`(aj\.[^`]+)`(?!`)")
EXPRESSION = re.compile(r"aj\.[\w.]+(\(.*\))?$", re.S)
RECIPES = ("adapters_jax.presets", "adapters_jax.methods")
OTHERS = {"json", "text", "{toctree}", "{include}", "{facts}", "{eval-rst}"}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def runs(self):
        return not self.text.startswith("# Not run")

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield Block(page, text[: found.start()].count("\n") + 1, *found.groups())


def params(language, runs=True):
    """The blocks of a language that are run, or those that are not."""
    blocks = (block for page in PAGES for block in blocks_of(page))
    return [
        pytest.param(
            block,
            id=block.name,
            marks=[pytest.mark.slow] if block.text.startswith("# Takes") else [],
        )
        for block in blocks
        if (block.language, block.runs) == (language, runs)
    ]


def commands(block):
    """The lines of a shell block, with those joined that a backslash continues."""
    text = block.text.replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def check_printed(block, printed):
    for expected in PRINTED.findall(block.text):
        assert expected in printed, f"{expected!r} is not in what the block prints:\n{printed}"


def write_their_adapter(directory, checkpoint):
    """An adapter of PEFT with a head for two labels."""
    config, bert = load_bert(checkpoint, pooler=True)
    base, ids = BertClassifier(config, num_labels=2, pooling="pooler"), jnp.ones((1, 4), int)
    params = base.init(jax.random.key(0), ids)["params"] | {"bert": bert}
    recipe = aj.lora(4, alpha=8, dropout=0.1, head="head")
    params = aj.init_adapters(aj.adapt(base, recipe), params, jax.random.key(1), ids)
    trained, frozen = aj.partition(params, recipe)
    save_peft(directory, recipe, trained, classifier.NAMES, frozen | {"head": params["head"]})


def write_classifier(directory, checkpoint):
    """A checkpoint with a head for three labels."""
    shutil.copytree(checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    width = tensors["embeddings.word_embeddings.weight"].shape[1]
    tensors |= {"classifier.weight": np.ones((3, width), np.float32)}
    tensors |= {"classifier.bias": np.zeros(3, np.float32)}
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the commands of the pages read: two small models and rows."""
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "my-bert", pooler=True)
    write_classifier(folder / "my-classifier", folder / "my-bert")
    write_llama(folder / "my-llama")
    write_their_adapter(folder / "their-adapter", folder / "my-bert")
    reviews = [
        f"{word} film,{label}" for word, label in (("good", 1), ("bad", 0)) for _ in range(40)
    ]
    spread = [f"{i} {row}" for i, row in enumerate(reviews)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *spread, ""]))
    write_meanings(folder / "rows.csv", 48)
    rows = (folder / "rows.csv").read_text().replace("mr,ref", "prompt,completion")
    (folder / "rows.csv").write_text(rows)
    turn = '{{"messages": [{{"role": "user", "content": "food {0}"}}, '
    turn += '{{"role": "assistant", "content": "It serves {0}"}}]}}\n'
    (folder / "chats.jsonl").write_text("".join(map(turn.format, ("French", "Thai", "Greek"))))
    return folder


@pytest.fixture
def registered():
    """Methods that a block registers are gone after it."""
    before = dict(METHODS)
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
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), {})
    check_printed(block, printed.getvalue())


@pytest.mark.parametrize("block", params("sh"))
def test_shell_runs_as_pasted(block, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for line in commands(block):
        if line.startswith("python3 -m venv "):  # .ci/run runs both of the README
            assert block.page.name == "README.md"
        elif line.startswith("adapters-jax "):
            status = command_line.main(shlex.split(line, comments=True)[1:])
            assert status == 0, capsys.readouterr().err
        else:
            subprocess.run(["bash", "-euc", line], check=True, env=os.environ)
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


def test_the_two_commands_are_there():
    readme = ROOT / "README.md"
    lines = [line for block in blocks_of(readme) for line in commands(block)]
    found = [line for line in lines if line.startswith("python3 -m venv ")]
    assert len(found) == 2
    assert "adapters-jax finetune" in found[0]
    assert "pytest" in found[1]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1500


@pytest.mark.slow
def test_the_readme_has_the_table_of_methods():
    text = (ROOT / "README.md").read_text()
    assert text.split(facts.BEGIN)[1].split(facts.END)[0].strip() == facts.methods()
