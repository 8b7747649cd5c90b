"""Checks the models of the installed libraries, and writes their part of the page."""

import sys
from pathlib import Path
from typing import Any

import pytest


class Results:
    """A plugin of pytest that keeps what the cells reported."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        for key, (name, method, cell) in report.user_properties * (report.when == "call"):
            if key == "cell":
                self.cells[name, method] = cell


def main(arguments: list[str]) -> int:
    """Runs pytest with further arguments such as `-n auto`; writes the page if all is right."""
    results = Results()
    tests = str(Path(__file__).with_name("test_cells.py"))
    status = pytest.main(["--slow", *arguments, tests], plugins=[results])
    if status == 0:
        from . import table  # after pytest, which wants to be first to import its plugins
        from .cells import MODELS

        for library in {MODELS[name].library for name, _ in results.cells}:
            table.write(library, results.cells)
        print(table.PAGE)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
