"""Texts of others change nothing where they are shown: terminals, JSON, Markdown, pages."""

import io
import json
import re
import sys

import jax.numpy as jnp
import pytest
from markdown_it import MarkdownIt

import adapters_jax as aj
from adapters_jax.errors import HIDDEN, visible
from adapters_jax.files.model_card import model_card, table
from adapters_jax.finetune.cli.main import _say, main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.report import pages
from adapters_jax.finetune.report.pictures import curves, figure_of
from adapters_jax.finetune.serving.guard import failure
from adapters_jax.finetune.tasks.base import Usage
from adapters_jax.texts import markdown, markdown_block, markdown_code

CLEAR = "\x1b[2J\x1b]0;owned\x07\x9b31m\rover \u202edesrever\u2069 \x00"
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
TAGS = (
    "x` <img src=https://a.b onerror=alert(1)>",
    "``` <script>alert(1)</script>",
    "[a](https://b.c) ![d](e) <https://f.g>",
    "a\n\n<b>c</b>\n\n# d",
    "|x|`|y",
    "`",
    "``",
    " a",
    "**b** _c_ &lt; \\",
    CLEAR,
)


def test_what_a_terminal_obeys_is_written_out_and_the_rest_is_as_it_was():
    kept = "naïve שלום \U0001f468\u200d\U0001f469 a\tb\nc\u200c"
    assert visible(kept) == kept
    for code in (*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x200F, 0xD800):
        assert visible(f"a{chr(code)}b") == f"a\\u{code:04x}b"
    assert visible("a\tb\nc", lines=False) == "a\\tb\\nc"
    assert json.loads(visible(json.dumps(CLEAR, ensure_ascii=False))) == CLEAR


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_by(use, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    use(Console(json=False))
    return stream.getvalue()


def everything(console):
    hostile = "[/red][link=file:///x]" + CLEAR
    console.say(hostile)
    console.table([hostile, "b"], [[hostile, "1"]])
    console.finish(["a"], [[hostile]], hostile, {})
    _say("predict", hostile, 2)
    with console.progress(hostile, 2) as progress:
        progress.update(2, "[/red]", news=True)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_console_shows_them_and_obeys_none(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = shown_by(everything, monkeypatch, stream())
    own = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.replace("\r", ""))  # what rich itself writes
    assert not HARMFUL.search(own)
    assert "\x1b[2J" not in out and out.count("\\u001b]0;owned\\u0007") >= 7
    assert out.count("[/red][link=file:///x]") >= 7


def test_an_audit_of_such_names_on_a_terminal(monkeypatch):
    tree = {"a\x1b[2J": {"kernel": jnp.ones((2, 2))}}
    counts = aj.audit(aj.Recipe(aj.Unfreeze("**")), tree)
    out = shown_by(lambda console: console.show(counts), monkeypatch, Terminal())
    assert "\x1b[2J" not in out and "\\u001b[2J" in out


def tokens_of(text):
    found = MarkdownIt("commonmark").enable("table").parse(text)
    return [t for token in found for t in (token, *(token.children or ()))]


def kinds_of(text):
    return {token.type for token in tokens_of(text)}


FREE = {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open", "softbreak"}


@pytest.mark.parametrize("text", TAGS)
def test_markdown_has_no_tag_link_or_line_of_them(text):
    plain, code = f"a {markdown(text)} b", f"a {markdown_code(text)} b"
    assert not FREE & (kinds_of(plain) | kinds_of(code))
    assert len([t for t in tokens_of(plain) if t.type == "inline"]) == 1
    (content,) = (t.content for t in tokens_of(code) if t.type == "code_inline")
    assert content.strip() == visible(text, lines=False).strip()
    (block,) = tokens_of(markdown_block(text, "python"))
    assert block.type == "fence" and block.content == visible(text) + "\n"
    row = tokens_of(table(["h", text], [[text, text]], code=(1,)))
    assert not FREE & {token.type for token in row}
    assert [t.type for t in row].count("td_open") == 2
    (content,) = (t.content for t in row if t.type == "code_inline")
    assert content.strip() == visible(text, lines=False).strip()


def test_addresses_that_github_would_link():
    assert "://" not in markdown("https://a.b") and "www." not in markdown("www.a.b")


@pytest.mark.parametrize("text", TAGS)
def test_a_card_of_hostile_names(text):
    card = model_card(
        text,
        aj.LoRA("**/query", 4),
        f"aj.load_adapter({text!r}, model)",
        base=aj.files.identity.BaseIdentity(id=text),
        metrics={text: 0.5},
        dataset=text,
        task="text-classification",
    )
    _, body = card.split("\n---\n", 1)
    assert not FREE & kinds_of(body)
    assert len([t for t in tokens_of(body) if t.type == "fence"]) == 2
    assert not HARMFUL.search(card)
    headings = [t for t in tokens_of(body) if t.type == "heading_open" and t.tag == "h1"]
    assert len(headings) == 1


def test_a_page_and_a_picture_of_such_names(tmp_path):
    page = pages.render(
        "comparison",
        title=CLEAR,
        results=([CLEAR], [[CLEAR]]),
        sentence=CLEAR,
        metric=CLEAR,
        notes=[CLEAR],
        picture="",
        cells=([CLEAR], [[CLEAR]]),
        again=CLEAR,
        best={"recipe": CLEAR},
        seed=CLEAR,
        usage=Usage(CLEAR, CLEAR),
        alone=CLEAR,
        cite=CLEAR,
        configuration=[(CLEAR, CLEAR)],
    )
    assert not HARMFUL.search(page) and page.count("\\u202edesrever") > 8
    records = [{"step": 1, "loss": 2.0}, {"step": 1, "dev": {"f1": 0.8}}]
    figure_of(curves(records, "a$\\x$", "f1", {"$^$": 0.5}, percent=True)).draw_without_rendering()


def test_the_page_and_the_errors_of_a_server():
    message = failure(400, CLEAR)["error"]["message"]
    assert not HARMFUL.search(message) and "\\u202edesrever" in message
    page = pages.render(
        "serve", title=CLEAR, base=CLEAR, key=True, chat=True, hidden=HIDDEN.pattern
    )
    assert not HARMFUL.search(page)
    (pattern,) = re.findall(r"new RegExp\((\".*?\"), \"gu\"\)", page)  # of what models write
    assert json.loads(pattern) == HIDDEN.pattern
    assert "textContent = text" not in page and page.count("shown(") == 2


def test_a_message_has_a_bound_whatever_the_names_in_a_file_are():
    assert str(aj.UserError("a" * 10_000)) == "a" * 10_000
    assert str(aj.UserError("a" * 60_000)) == "a" * 10_000 + "... (60000 characters)"


def test_words_that_are_no_text(capsys):
    assert main(["predict", "run", "a\udcff"]) == 2
    assert "a\\udcff" in capsys.readouterr().err
