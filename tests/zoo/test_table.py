"""The page of the zoo shows every cell."""

from .cells import MODELS
from .methods import METHODS
from .table import NONE, PAGE


def test_page_shows_every_cell():
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    rows = {name: cells for name, *cells in lines if name in MODELS}
    assert set(rows) == set(MODELS)
    for name, cells in rows.items():
        counts = [cell.replace(",", "") for cell in cells[: len(METHODS)] if cell != NONE]
        refused = cells[: len(METHODS)].count(NONE)
        assert refused == (not MODELS[name].attention), name
        assert len(counts) + refused == len(METHODS) and all(map(str.isdecimal, counts)), name
