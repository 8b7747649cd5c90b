"""The page of the zoo shows every cell, and as refused what the tests expect to be refused."""

import pytest

from .cells import EXPECTED, MODELS
from .methods import METHODS
from .table import PAGE, marks


@pytest.fixture(scope="module")
def rows():
    """The cells of every row of the page, by the row's first one."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    return {name: cells for name, *cells in lines if name in MODELS}


def test_page_shows_every_cell(rows):
    assert set(rows) == set(MODELS)
    for name, cells in rows.items():
        refused = {m for m, cell in zip(METHODS, cells, strict=False) if "refused" in cell}
        assert refused == {m for n, m in EXPECTED if n == name}, name


@pytest.mark.parametrize("library", ["transformers", "tunix"])
def test_page_gives_every_reason(library):
    begin, end = marks(library)
    part = PAGE.read_text().split(begin)[1].split(end)[0]
    whys = {r.why for (name, _), r in EXPECTED.items() if MODELS[name].library == library}
    assert all(f"] {why}." in part for why in whys)
