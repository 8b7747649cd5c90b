"""The page of a server in a real Chromium: wide and narrow, light and dark, by mouse and keyboard.

With the environment variable SCREENSHOTS, pictures of the page are put into that directory.
"""

import re

import pytest
from helpers.browser import BrowserPage
from helpers.finished import decoder_run
from helpers.pictures import check_picture
from helpers.serving import serving

from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.report.pages import render

pytestmark = pytest.mark.slow
PROMPT = "food food Thai"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = [
            decoder_run(f"--method lora --rank {n} --targets **/{{query,value}}", f"rank-{n}")
            for n in (2, 3)
        ]
    return [folder / run for run in runs]


@pytest.fixture(scope="module")
def server(runs):
    base = str(runs[0].parents[1] / "llama")
    with serving(base, *map(str, runs), "--context", "48", "--rows", "3") as server:
        yield server


class Page(BrowserPage):
    """The page of a server, at a width and in a colour scheme."""

    def __init__(self, browser, server, width=1280, scheme="light"):
        super().__init__(browser, server.address, width, scheme, "server-")
        self.wait(lambda: self.all("#models input"))

    def answers(self):
        """The texts of the answers by model, once all are there."""
        self.wait(lambda: self.one("#state").text == "Done")
        parts = [(s.find_elements("css selector", "h2, pre, .timing")) for s in self.all("section")]
        return {
            name.text: (text.get_property("textContent"), timing.text)
            for name, timing, text in parts
        }


@pytest.mark.weekly
@pytest.mark.witness("dark-390", "light-1280")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_base_and_adapters_side_by_side(browser, server, runs, width, scheme):
    page = Page(browser, server, width, scheme)
    listed = [label.text for label in page.all("#models label")]
    assert [text.split()[0] for text in listed] == ["llama", "rank-2", "rank-3"]
    assert "LoRA, 672 parameters, run" in listed[1]
    page.one("#prompt").send_keys(PROMPT)
    page.one("#chat").click()  # not as a conversation
    page.one("#tokens").clear()
    page.one("#tokens").send_keys("8")
    page.one("#send").click()
    answers = page.answers()
    for run in runs:
        text, timing = answers[run.name]
        assert text == next(load_generator(run).generate([PROMPT], 8))
        assert "tokens in" in timing and "the first after" in timing
    assert answers.keys() == {"llama", "rank-2", "rank-3"}
    places = [section.rect for section in page.all("section")]
    beside = {place["y"] for place in places}
    assert len(beside) == (1 if width == 1280 else 3)
    assert page.run("document.documentElement.scrollWidth") <= width
    dark = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(26, 26, 26)"
    assert dark == (scheme == "dark")
    assert page.violations() == []
    page.save_picture()
    check_picture(page)


def test_by_keyboard_alone(browser, server):
    from selenium.webdriver import ActionChains, Keys

    page = Page(browser, server)
    keys = lambda *k: ActionChains(browser).send_keys(*k).perform()  # noqa: E731
    keys(Keys.TAB, PROMPT, Keys.TAB, Keys.SPACE)  # the prompt; then not the base
    order = [page.run("document.activeElement.value")]
    for _ in range(7):
        keys(Keys.TAB)
        order.append(page.run("document.activeElement.id || document.activeElement.value"))
    wanted = ["llama", "rank-2", "rank-3", "reload", "tokens", "temperature", "seed", "chat"]
    assert order == wanted
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.one("#chat").is_selected()  # the base has a chat template
    keys(Keys.TAB, Keys.ENTER)  # Answer
    assert page.answers().keys() == {"rank-2", "rank-3"}
    assert any(url.endswith("/v1/chat/completions") for url in page.asked())
    page.run("document.getElementById('prompt').focus()")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(
        Keys.CONTROL
    ).perform()
    page.answers()


def test_a_base_without_a_chat_template_is_not_talked_with():
    page = render("serve", title="", base="llama", key=False, chat=False, hidden="")
    assert re.search('<input id="chat"[^>]* disabled>', page)


def test_errors_are_shown_and_nothing_else_is_asked(browser, server):
    page = Page(browser, server)
    page.one("#prompt").send_keys("food " * 100)
    page.one("#send").click()
    assert all("48" in timing for _, timing in page.answers().values())
    assert len(page.all("section.failed")) == 3
    assert [text for text in page.errors() if "400 (Bad Request)" not in text] == []
    asked = page.asked()
    foreign = {url for url in asked if not url.startswith((server.address, "data:"))}
    assert asked and not foreign
