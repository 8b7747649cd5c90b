"""The pages of runs and comparisons in a real Chromium: wide and narrow, light and dark.

With the environment variable SCREENSHOTS, pictures of the whole pages are put into that directory:
SCREENSHOTS=. pytest --slow tests/browser/test_report_pages.py
"""

import itertools

import pytest
from helpers.browser import CONTRASTS, BrowserPage
from helpers.pictures import check_picture
from helpers.reports import write_pages

pytestmark = pytest.mark.slow
PICTURED = ("classes", "comparison")
HIDING = """[...document.querySelectorAll(".wide > table:not(.matrix)")]
  .filter(each => each.offsetWidth > each.parentElement.clientWidth).map(each => each.className)"""
KINDS = ("classes", "numbers", "preferences", "comparison")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.mark.weekly
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_and_can_be_read(browser, pages, kind, width, scheme):
    page = BrowserPage(browser, pages[kind].as_uri(), width, scheme, f"{kind}-")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(HIDING) == []
    page.browser.execute_script(CONTRASTS)
    contrasts = page.run("contrasts()")
    assert len(contrasts) > 50
    assert [text for ratio, text in contrasts if ratio < 4.5] == []
    dark = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(26, 26, 26)"
    assert dark == (scheme == "dark")
    names = page.run("[...document.styleSheets[0].cssRules[0].style]")
    assert {"--text", "--quiet", "--grey", "--color-6"} <= {*names}
    for name in {*names} - {"--ground", "--line", "--block"}:  # of texts and of pictures
        assert page.run(f"contrast_of('var({name})')") >= (4.5 if "color" not in name else 3), name
    assert page.violations() == []
    assert page.errors() == []
    assert page.asked() - {page.address, "data:,"} == set()
    page.save_picture(whole=True)
    if kind in PICTURED:
        check_picture(page)


@pytest.mark.parametrize("width", [1280, 390])
def test_what_is_wide_scrolls_by_itself_and_by_keyboard(browser, pages, width):
    page = BrowserPage(browser, pages["classes"].as_uri(), width)
    regions = page.all(".wide")
    wider = [each for each in regions if each.get_property("scrollWidth") > each.size["width"]]
    assert {each.get_attribute("aria-label") for each in wider} >= {"Confusion matrix"}
    for each in regions:
        assert each.get_attribute("tabindex") == "0" and each.get_attribute("aria-label")
        assert each.rect["x"] >= 0 and each.rect["x"] + each.size["width"] <= width
    wider[0].send_keys("\ue014")  # the right arrow
    page.wait(lambda: wider[0].get_property("scrollLeft") > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_the_structure_that_it_shows(browser, pages, kind):
    page = BrowserPage(browser, pages[kind].as_uri())
    levels = [int(each.tag_name[1]) for each in page.all("h1, h2, h3, h4, h5, h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.one("html").get_attribute("lang") == "en" and page.one("main")
    for each in page.all("svg"):
        role, label = each.get_attribute("role"), each.get_attribute("aria-label")
        assert role == "img" and len(label) > 20
        assert each.size["width"] > 200 and each.size["height"] > 100
    assert page.all("svg")
    for table in page.all("table"):
        assert table.find_elements("css selector", "thead th[scope=col]")
    bare = page.run("[...document.querySelectorAll('th:not([scope])')].length")
    assert bare == 0
    marks = page.run("[...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(marks) == len({*marks})
