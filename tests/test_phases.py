"""The phases of a run: announced before its first step, with times once steps are measured."""

import re

import pytest
from test_finetune import directory, finetune  # noqa: F401 - a fixture

from adapters_jax.finetune.runs.phases import COMPILED, FORWARD, REPORT, Phases
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem


def phases(times, compiled, **options):
    rows = {"train": 800, "dev": 100, "test": 60}
    given = {"steps": 100, "batch": 10, "shapes": 3, "marks": {50, 100}, "rows": rows}
    clocks = {"clock": iter(times).__next__, "compiled": iter(compiled).__next__}
    return Phases(**{**given, "passes": 1.0, **clocks, **options})


def test_times_follow_the_steps_and_then_the_first_scoring():
    made = phases([0.0, 20.0, 45.0, 51.0, 71.0], [1.0, 7.0, *[9.0] * 9])
    assert made.left() == {}  # nothing is known, so nothing is said
    made.first(1)
    made.stepped(11)  # 2 s a step
    row = FORWARD * 2 / 10
    left = made.left()
    assert list(left) == ["compiling", "training", "test", "baselines", "report"]
    assert left["compiling"] == pytest.approx(6 * 3 * (1 + 2 * COMPILED) - 8)
    assert left["training"] == 2 * 89 + 2 * row * 100
    assert left["test"] == row * 60 and left["baselines"] == row * 960
    assert left["report"] == REPORT
    made.stepped(51)
    made.scored()  # 6 s for 100 rows, which are no part of a step's time
    left = made.left()
    assert left["training"] == (45 / 50) * 49 + 0.06 * 100
    assert left["test"] == 0.06 * 60 and left["baselines"] == 0.06 * 960
    made.stepped(71)
    assert made.pace == (71 - 6) / 70
    made.done |= {"training", "test"}
    assert list(made.left()) == ["compiling", "baselines", "report"]
    assert made.left()["compiling"] == pytest.approx(6 * 3 * COMPILED)


def test_a_run_that_goes_on_has_the_pace_of_its_own_steps():
    made = phases([0.0, 20.0], [0.0, 1.0, *[99.0] * 9], passes=0.0)
    made.scored()  # it ended between a step and its scoring
    made.first(90)
    made.stepped(95)
    assert made.pace == 4.0 and made.left()["training"] == 4.0 * 5 + FORWARD * 4 / 10 * 100
    assert not {"baselines", "compiling"} & made.left().keys()  # more compiled than expected


@pytest.mark.slow
def test_a_run_announces_them_in_order_and_computes_nothing_twice(directory, monkeypatch):  # noqa: F811
    scored = []

    def counted(self, run, part, step):
        scored.append((part, self.inputs))
        return outputs(self, run, part, step)

    outputs = LabelledProblem._outputs
    monkeypatch.setattr(LabelledProblem, "_outputs", counted)
    _, summary, _, printed = finetune(directory, "--epochs", 1, "--name", "phases")
    marks = 2
    own = [part for part, inputs in scored if inputs != ("features",)]
    # The best step is the last one here, so the report takes what was scored.
    assert summary["best_step"] == 24
    assert own == ["dev"] * marks + ["test"]
    (start,) = re.findall(r"read in .* s; left: (.*); times follow", printed)
    assert start == (
        "compiling, training (24 steps, dev scored 2 x), test, baselines (majority class, frozen "
        "base, trained head), report"
    )
    left = re.findall(r"^left: about (.*?): (.*)$", printed, re.MULTILINE)
    first, last = left[0][1], left[-1][1]
    names = re.compile(r"(?:^|, )(\w+) ")
    assert names.findall(first)[-4:] == ["training", "test", "baselines", "report"]
    assert names.findall(last)[-2:] == ["baselines", "report"]
    assert re.search(r"step \d+ of 24 .* run: .* left", printed)
