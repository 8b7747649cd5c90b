"""The page and the picture of a run: valid, whole without anything else, and escaped."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

import adapters_jax as aj
from adapters_jax.app.console import Console, duration
from adapters_jax.app.report.run import (
    _smooth,
    draw_curves,
    results_table,
    show_metric,
    write_report,
)
from adapters_jax.io.run_directory import Run

RESULTS = [
    {
        "method": "majority class",
        "trainable_parameters": 0,
        "dev": {"f1": 0.1},
        "test": {"f1": 0.2},
    },
    {"method": "<lora>", "trainable_parameters": 1234, "dev": {"f1": 0.8}, "test": {"f1": 0.75}},
]
CONFIG = {
    "model": "some/<b>base</b>",
    "task": 'a "task" & more',
    "metrics": ["f1"],
    "rows": {"train": 12345, "dev": 20, "test": 30},
    "seed": 0,
    "nothing": None,
    "summary": {"best_step": 7, "dev": {"f1": 0.8}, "seconds": 61.0, "results": RESULTS},
}
RECORDS = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "dev": {"f1": 0.8}},
]


class Page(HTMLParser):
    """Takes a page apart, and checks that its tags nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.links = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        assert all(value is not None for _, value in attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def page(tmp_path):
    run = Run(tmp_path / "a run")
    run.path.mkdir()
    draw_curves(run.curves, "lora", RECORDS, "f1", {"majority class": 0.1})
    counts = aj.audit(aj.Recipe(aj.Unfreeze("w")), {"w": np.zeros((2, 3), np.float32)})
    write_report(run, CONFIG, counts)
    return run.report.read_text(encoding="utf-8")


def test_the_page_is_valid_and_needs_nothing_else(page):
    assert page.startswith("<!DOCTYPE html>")
    found = Page(page)
    assert [link[:22] for link in found.links] == ["data:image/png;base64,"]
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not re.search(r"url\(|@import|https?://", page)
    assert '<meta name="viewport"' in page
    headings = ["Results", "Curves", "What was trained", "How to use it", "Configuration"]
    assert [word for word in found.words if word in headings] == headings


def test_the_page_says_what_was_found_and_escapes_it(page):
    words = Page(page).words
    assert 'a "task" & more: <lora> on base<' not in page
    assert "<lora>" in words
    assert "1,234" in words
    assert "75.0 %" in words
    sentence = next(word for word in words if word.startswith("Trained on"))
    assert sentence == (
        "Trained on 12,345 rows, selected on 20 by f1 (best at step 7: 80.0 %), tested once on 30. "
        "The whole run took 1 min 1 s."
    )
    assert "rows.train" in words
    assert "nothing" not in words
    usage = next(word for word in words if word.startswith("adapters-jax predict"))
    assert usage.count("\n") == 2
    assert re.match(r"adapters-jax predict '.*/a run' ", usage)


def test_the_picture_is_a_png_of_a_readable_size(tmp_path):
    records = [*RECORDS[:2], {"step": 2, "dev": {"pearson": 0.5}}]
    draw_curves(tmp_path / "c.png", "lora", records, "pearson", {"mean": 0.0})
    raw = (tmp_path / "c.png").read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = (int.from_bytes(raw[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1350, 540)


def test_results_and_metrics_read_well():
    header, rows = results_table(RESULTS, ["f1"])
    assert header == ["method", "trainable parameters", "test f1"]
    assert rows == [["majority class", "0", "20.0 %"], ["<lora>", "1,234", "75.0 %"]]
    assert results_table([{**RESULTS[0], "method": "head-only"}], ["f1"])[1][0][0] == (
        "frozen base, trained head"
    )
    assert show_metric("matthews", 0.5) == "0.500"
    assert [duration(s) for s in (0.04, 59.94, 60, 3599)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "59 min 59 s",
    ]


def test_json_has_stdout_to_itself(capsys):
    output = Console(json=True)
    output.say("words")
    output.table(["a"], [["b"]])
    output.result({"a": "é"})
    captured = capsys.readouterr()
    assert captured.out == '{"a": "é"}\n'
    assert "words" in captured.err
    Console(json=False).result({"a": 1})
    assert capsys.readouterr().out == ""


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    with Console(json=False).progress("lora", 100) as meter:
        for step in range(1, 101):
            meter.update(step, "loss 0.5", news=step in (50, 100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lora  step 100 of 100  loss 0.5  ")
    with Console(json=False).progress("lora", 3) as meter:
        meter.began = meter.last = meter.last - 11
        meter.update(1, "loss 0.5")
        meter.update(2, "loss 0.4")
    assert capsys.readouterr().out == "lora  step 1 of 3  loss 0.5  22.0 s left\n"


def test_the_loss_is_smoothed_over_its_neighbours():
    values = [0.0, 10.0] * 20
    smooth = _smooth(values)
    assert smooth[20] == pytest.approx(5, abs=1.1)
    assert (smooth[0], _smooth([3.0]).tolist()) == (pytest.approx(10 / 3), [3.0])
