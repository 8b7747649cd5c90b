"""Every function of the zoo with every method, and the page that shows them."""

import pytest

from .function_cells import BEGIN, END, MODELS, PAGE, applies, check, installed
from .methods import METHODS, OFTEN

CELLS = [(name, method) for name in MODELS for method in METHODS if applies(name, method)]


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="needs pip install 'adapters-jax[zoo-test]'")
@pytest.mark.witness(*(f"{name}-{method}" for name, method in CELLS if method in OFTEN))
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_cell(name, method, tmp_path):
    check(name, method, tmp_path / "a")


@pytest.mark.slow
def test_page_shows_every_cell():
    part = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    rows = {name: cells for name, *cells in lines if name in MODELS}
    assert set(rows) == set(MODELS)
    for name, cells in rows.items():
        counted = [cell.replace(",", "").isdecimal() for cell in cells]
        assert counted == [applies(name, method) for method in METHODS], name
