"""Which cases of a test run by default, slowly, and once a week."""

from types import SimpleNamespace

import pytest
from conftest import pytest_collection_modifyitems


class Item:
    """What the hook reads of a test."""

    path = SimpleNamespace(name="test_it.py")

    def __init__(self, test, case, *marks):
        self.nodeid, self.callspec = f"{test}[{case}]", SimpleNamespace(id=case)
        self.marks = [mark.mark for mark in marks]

    def iter_markers(self, name):
        return (mark for mark in self.marks if mark.name == name)

    def get_closest_marker(self, name):
        return next(self.iter_markers(name), None)

    def add_marker(self, mark):
        self.marks.append(mark.mark)

    @property
    def groups(self):
        return {mark.name for mark in self.marks} & {"slow", "weekly", "skip"}


def collected(items, slow=False, args=()):
    """The marks of tests, by their names, after the hook."""
    gone = []
    config = SimpleNamespace(
        **{"getoption": lambda name: slow, "args": args, "option": SimpleNamespace(markexpr="")},
        hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)),
    )
    every = items[:]
    pytest_collection_modifyitems(config, items)
    assert [item for item in every if item not in gone] == items
    deselected = {item.nodeid: item.groups | {"deselected"} for item in gone}
    return {item.nodeid: item.groups for item in items} | deselected


SLOW, WEEKLY, WITNESS = pytest.mark.slow, pytest.mark.weekly, pytest.mark.witness("a")


def test_cases_that_are_no_witnesses_run_once_a_week():
    items = [
        *(Item("quick", case, WITNESS) for case in "ab"),
        *(Item("slow", case, SLOW, WITNESS) for case in "ab"),
        Item("week", "a", WEEKLY),
    ]
    slow, weekly = {"slow", "deselected"}, {"slow", "weekly", "deselected"}
    assert collected(items) == {
        **{"quick[a]": set(), "quick[b]": weekly},
        **{"slow[a]": slow, "slow[b]": weekly, "week[a]": weekly},
    }
    again = [Item("slow", "b", SLOW, pytest.mark.witness("b")), Item("week", "a", WEEKLY)]
    assert collected(again, slow=True) == {"slow[b]": {"slow"}, "week[a]": {"slow", "weekly"}}


def test_a_witness_that_is_no_case_is_an_error_where_all_cases_are_collected():
    with pytest.raises(pytest.UsageError, match=r"quick: \['a'\]"):
        collected([Item("quick", "b", WITNESS)])
    assert collected([Item("quick", "b", WITNESS)], args=["tests/test_it.py::quick[b]"]) == {
        "quick[b]": {"slow", "weekly", "skip"}
    }
