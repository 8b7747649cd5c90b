"""The page and the picture of a run: valid HTML in one file, with every value escaped."""

import ast
import io
import json
import re
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import rich.console
from helpers.commands import command_of
from helpers.errors import raises
from helpers.finished import REVIEWS
from helpers.reports import CONFIG, HOSTILE, PICTURES, RECORDS, RESULTS, Page, write_page
from helpers.tiny import write_model, write_reviews
from jinja2 import UndefinedError
from matplotlib.backends.backend_agg import FigureCanvasAgg

import adapters_jax as aj
from adapters_jax import presets
from adapters_jax.finetune import console
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console, duration
from adapters_jax.finetune.options.method import PRESETS, MethodOptions
from adapters_jax.finetune.report import pages
from adapters_jax.finetune.report.papers import PAPERS, bibtex, papers_of
from adapters_jax.finetune.report.pictures import curves, figure_of, smooth, svg
from adapters_jax.finetune.report.run import no_better, results_table
from adapters_jax.finetune.tasks import task_of
from adapters_jax.finetune.tasks.metrics import show_metric
from adapters_jax.methods import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(folder):
    return write_page(folder, CONFIG)


def test_the_page_is_valid_html_in_one_file(page):
    assert page.startswith("<!DOCTYPE html>")
    found = Page(page)
    assert {link for link in found.links if not link.startswith("#")} == {"data:,"}
    assert not {"script", "iframe", "img"} & set(found.tags)
    assert not re.search(r"url\([^#]|@import|https?://", page)
    assert '<meta name="viewport"' in page
    assert [*found.sections] == [
        *("Results", "Learning curves", "Classes", "Confusion matrix", "Highest losses on dev"),
        *("Lengths", "What was trained", "How to use it", "The same again", "How to cite it"),
        "Configuration",
    ]
    assert (found.tags.count("h1"), found.tags.count("main")) == (1, 1)


def test_pictures_have_words_and_the_colours_of_the_page(page, folder):
    found = Page(page)
    assert found.tags.count("svg") == 3
    assert {
        "Training loss over the steps: 2 at step 1, 1 at step 2.",
        "f1 (%) on dev over the steps: 80 at step 2, 80 at step 2.",
        "Lengths, tokens of a row. train: 3 from 5 to 5, median 5; dev: 3 from 5 to 9, median 9.",
    } <= {*found.labels}
    drawn = page[page.index("<svg") : page.rindex("</svg>")]
    assert {*re.findall(r"#[0-9a-f]{6}", drawn)} <= {"#000000", "#ffffff"}
    used = {*re.findall(r"var\((--[\w-]+)\)", drawn)}
    assert {"--text", "--line", "--grey", "--color-0"} <= used
    scheme = page[: page.index("</style>")]
    for name in used:  # in the light, and in the dark
        assert scheme.count(f"{name}:") == 2, name
    marks = re.findall(r'\bid="([^"]*)"', page)
    assert len(marks) == len({*marks})
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= {*marks}
    assert (folder / "a run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_results_and_what_was_trained(page):
    found = Page(page)
    assert found.words.count('a "task" & more: <lora> on <b>base') == 2  # the title and the heading
    assert found.sections["Results"] == [
        ["method", "trainable parameters", "test f1"],
        ["majority class", "0", "20.0 %"],
        ["<lora>", "1,234", "75.0 %"],
    ]
    sentence = next(word for word in found.words if word.startswith("Trained on"))
    assert sentence == (
        "Trained on 12,345 rows, selected on 20 by f1 (best at step 7: 80.0 %), tested once on 30. "
        "The whole run took 1 min 1 s."
    )
    (_, row) = found.sections["What was trained"]
    assert row == ["w", "Unfreeze", "w [2, 3]", "2*3", "1", "6"]
    assert any(word.startswith("trainable 6 ") for word in found.words)


def test_the_configuration_has_only_this_task_and_no_paths(page):
    _, *rows = Page(page).sections["Configuration"]
    assert dict(rows) == {
        "model": "some/<b>base",
        "task": 'a "task" & more',
        "method": "lora",
        "optimizer.epochs": "1.0",
        "data_sha256": "0",
        "metrics": '["f1"]',
        "recipe.methods": json.dumps(CONFIG["recipe"]["methods"]),
        "rows.train": "12345",
        "rows.dev": "20",
        "rows.test": "30",
        "seed": "0",
        "text": HOSTILE,
        "pairs": "false",
        "files.train": "machine.csv",
    }


@pytest.mark.slow
def test_its_commands_run_as_they_are(page, folder):
    shell, program = Page(page).sections["How to use it"]
    command = command_of(shell)
    assert (type(command).__name__, command.run, len(command.texts)) == ("Predict", "a run", 2)
    compile(program, "page", "exec")
    assert ast.literal_eval(ast.parse(program).body[1].value.args[0]) == "a run"
    assert program.startswith("from adapters_jax.finetune.inference import load_predictor\n")
    (again,) = Page(page).sections["The same again"]
    words = ["adapters-jax", "finetune", "--train=machine.csv", f"--text={HOSTILE}"]
    assert shlex.split(again) == words
    assert command_of(again).data.train == (Path("machine.csv"),)
    assert str(folder) not in page and "/of/this" not in page


@pytest.mark.slow
def test_paths_below_the_working_directory_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**CONFIG, "options": {"data": {"train": str(tmp_path / "in" / "rows.csv")}}}
    sections = Page(write_page(tmp_path, config)).sections
    assert sections["The same again"] == ["adapters-jax finetune --train=in/rows.csv"]
    assert command_of(sections["How to use it"][0]).run == "a run"


@pytest.mark.parametrize(
    ("config", "command", "loader", "call"),
    [
        (
            {"kind": "decoder"},
            "generate",
            "load_generator",
            "generator.generate(['A prompt of your own.'])",
        ),
        (
            {"kind": "encoder", "pairs": True},
            "predict",
            "load_predictor",
            "predictor.predict([('A text of your own.', 'Another one.')])",
        ),
        (
            {"pairs": False},
            "predict",
            "load_predictor",
            "predictor.predict([('A text of your own.', None)])",
        ),
    ],
)
def test_usage_depends_on_the_kind_of_a_run(config, command, loader, call):
    usage = task_of(config).usage("a 'run'", config, model="base")
    assert shlex.split(usage.shell)[1:3] == [command, "a 'run'"]
    program = usage.python
    assert [type(line) for line in ast.parse(program).body] == [
        ast.ImportFrom,
        ast.Assign,
        ast.Expr,
    ]
    assert f"""= {loader}("a 'run'", model='base')""" in program
    assert call in program


def test_hostile_text_is_escaped(tmp_path):
    sample = {"prompt": HOSTILE, "completion": "two\n  lines", "generated": "<img src=x onerror=y>"}
    last = {**RESULTS[1], "method": HOSTILE, "samples": [sample]}
    config = {**CONFIG, "task": HOSTILE, "metrics": ["f1"], "kind": "decoder"}
    config["summary"] = {**CONFIG["summary"], "results": [RESULTS[0], last]}
    page = write_page(tmp_path, config)
    found = Page(page)
    assert not {"script", "img"} & {*found.tags}
    assert "{{ 1 + 1 }}" in page  # values are not templates
    assert found.sections["Results"][-1][0] == HOSTILE
    assert found.sections["Samples"] == [
        ["prompt", "reference", "generated"],
        [HOSTILE, "two\n  lines", "<img src=x onerror=y>"],
    ]
    (again,) = found.sections["The same again"]
    assert shlex.split(again)[-1] == f"--text={HOSTILE}"


def test_attributes_are_escaped_too():
    alt = f'"{HOSTILE}"'
    page = pages.render(
        "comparison",
        title="t",
        metric=alt,
        results=(["a"], [["b"]]),
        sentence="s",
        notes=[alt],
        picture=svg(figure_of(PICTURES), alt),
        cells=(["a"], [["b"]]),
        again="c",
        best=None,
        usage=None,
        cite="",
        configuration=[],
    )
    assert {f"Test {alt} against trainable parameters", alt} <= {*Page(page).labels}
    assert "script" not in Page(page).tags


def test_a_value_that_a_page_lacks_is_an_error():
    with raises(UndefinedError, "title"):
        pages.render("run")


def test_the_picture_is_a_png_of_a_readable_size(page, folder):
    raw = (folder / "a run" / "curves.png").read_bytes()
    width, height = (int.from_bytes(raw[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1350, 540)


def test_margins_of_rewards_have_a_picture_of_their_own():
    records = [
        {"step": 1, "loss": 0.7, "margin": 0.0},
        {"step": 2, "loss": 0.6, "margin": 0.5},
        {"step": 2, "dev": {"accuracy": 0.8, "margin": 0.25}},
    ]
    *_, margins = curves(records, "lora", "accuracy", {}, percent=True)
    (axes,) = figure_of([margins]).axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert axes.get_title() == "Reward margin"
    assert lines == [[[1, 0.0], [2, 0.5]], [[1, 0.0], [2, 0.5]], [[2, 0.25]]]


def test_no_legend_covers_anything():
    levels = {"majority class": 0.1, "frozen base, trained head": 0.4}
    _, dev = curves(RECORDS, "lora", "f1", levels, percent=True)
    figure = figure_of([dev])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend().get_window_extent(renderer)
    for other in (axes.patch, axes.xaxis.label, *axes.get_xticklabels()):
        assert not legend.overlaps(other.get_window_extent(renderer)), other
    assert legend.y0 >= 0 and legend.x0 >= 0


@pytest.fixture
def clock(monkeypatch):
    """The time that progress reads, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


UPDATES = ((60.0, 1), (60.0, 2), (80.0, 12), (90.0, 17))  # the second is read with the first


def test_the_time_left_is_from_the_steps_that_are_done(clock, capsys):
    with Console(json=False).progress("lora", 100, first="compiling") as progress:
        for clock[0], step in UPDATES:
            progress.update(step, f"loss {step}")
    assert capsys.readouterr().out.splitlines() == [
        "lora  compiling",
        "lora  step 1 of 100  loss 1",
        "lora  step 12 of 100  loss 12  2 min 56 s left",
        "lora  step 17 of 100  loss 17  2 min 46 s left",
    ]


def test_a_terminal_shows_the_same(clock):
    shown, terminal = io.StringIO(), Console(json=False)
    terminal.printer = rich.console.Console(file=shown, force_terminal=True, width=99)
    with terminal.progress("lora", 100, first="compiling") as progress:
        for clock[0], step in UPDATES:
            progress.update(step, "")
    assert "compiling" in shown.getvalue() and "2 min 46 s left" in shown.getvalue()


@pytest.mark.parametrize(("first", "left"), [("compiling", "10.0 s left"), ("", "30.0 s left")])
def test_compiling_is_in_no_estimate_of_what_compiles_first(
    clock, capsys, monkeypatch, first, left
):
    compiling = console.Compiling()
    monkeypatch.setattr(console, "_compiling", lambda: compiling)
    with Console(json=False).progress("work", 20, first=first) as progress:
        progress.update(0, "")
        compiling.note(20.0, 25.0)
        clock[0] = 30.0
        progress.update(10, "")
    assert capsys.readouterr().out.splitlines()[-1] == f"work  step 10 of 20  {left}"


def test_the_clock_stands_still_while_jax_compiles():
    square = jax.jit(lambda x: (x @ x).sum())
    since, began = console.clock(), time.monotonic()
    square(np.ones((31, 31))).block_until_ready()
    compiled = console._compiling().seconds
    assert 0 <= console.clock() - since < time.monotonic() - began
    square(np.ones((31, 31))).block_until_ready()
    assert console._compiling().seconds == compiled
    square(np.ones((32, 32))).block_until_ready()
    assert console._compiling().seconds > compiled


def test_events_within_others_count_once():
    compiling = console.Compiling()
    for seconds, end in ((1.0, 3.0), (1.0, 5.0), (4.0, 6.0), (2.0, 8.0), (7.5, 8.9), (1.0, 10.0)):
        compiling.note(seconds, end)
    assert compiling.seconds == 8.5


def test_the_speed_is_of_steps_that_took_time(clock):
    speed, found = console.Speed(tokens=10.0), []
    for clock[0], step in ((5.0, 1), (5.0, 3), (7.0, 5)):  # the second is read with the first
        found.append(speed.at(step))
    assert found == ["", "", "10 tokens/s"]
    speed.pause()
    assert speed.at(6) == ""


@pytest.mark.parametrize(
    ("metric", "own", "others", "expected"),
    [
        ("accuracy", 0.8, {"majority class": 0.5, "head-only": 0.7}, None),
        (
            *("accuracy", 0.5, {"majority class": 0.5, "head-only": 0.7}),
            "accuracy on dev, 50.0 %, is no better than that of the majority class (50.0 %) and of "
            "the frozen base, trained head (70.0 %): the training does not help; try a lower "
            "--learning-rate, or more --epochs",
        ),
        ("perplexity", 3.0, {"base": 9.0}, None),
        ("perplexity", 9.5, {"base": 9.0}, "perplexity on dev, 9.500, is no better than"),
        ("accuracy", 0.5, {}, None),  # --no-baselines
    ],
)
def test_a_training_that_does_not_help_is_said(metric, own, others, expected):
    rows = [{"method": name, "dev": {metric: score}} for name, score in others.items()]
    rows += [{"method": "houlsby", "dev": {metric: own}}]
    said = no_better({"metrics": [metric, "f1"], "summary": {"results": rows}})
    assert len(said) == (expected is not None)
    assert expected is None or said[0].startswith(expected)


@pytest.mark.slow
def test_a_run_that_does_not_help_ends_with_that(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(Path("tiny"), pooler=True)
    write_reviews(Path("reviews.jsonl"), rows=40)
    rates = "--learning-rate 1e-9 --head-learning-rate 1e-9"
    assert main(["finetune", *f"{REVIEWS} {rates} --epochs 1 --name none".split()]) == 0
    said = "is no better than that of the"
    assert said in " ".join(capfd.readouterr().out.split())
    assert said in Path("runs/none/report.html").read_text()


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


def test_only_json_goes_to_stdout(capsys):
    console = Console(json=True)
    console.say("words")
    console.table(["a"], [["b"]])
    console.result({"a": "é"})
    captured = capsys.readouterr()
    assert captured.out == '{"a": "é"}\n'
    assert "words" in captured.err
    Console(json=False).result({"a": 1})
    assert capsys.readouterr().out == ""


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    with Console(json=False).progress("lora", 100) as progress:
        for step in range(1, 101):
            progress.update(step, "loss 0.5", news=step in (50, 100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lora  step 100 of 100  loss 0.5  ")
    with Console(json=False).progress("lora", 3) as progress:
        progress.began = progress.last = progress.last - 11
        progress.update(1, "loss 0.5")
        progress.update(2, "loss 0.4")
    assert capsys.readouterr().out == "lora  step 1 of 3  loss 0.5\n"


def test_the_loss_is_smoothed_over_its_neighbours():
    values = [0.0, 10.0] * 20
    found = smooth(values)
    assert found[20] == pytest.approx(5, abs=1.1)
    assert (found[0], smooth([3.0]).tolist()) == (pytest.approx(10 / 3), [3.0])


def test_every_method_and_preset_has_the_paper_that_it_names():
    own = [m for m in METHODS.values() if m.__module__.startswith("adapters_jax.")]  # no plugins
    for method in own:
        about = sys.modules[method.__module__].__doc__
        assert method.paper in about and bool(method.paper) == ("arXiv:" in about), method
    for name, preset in PRESETS.items():
        function = getattr(presets, name.replace("-", "_"), preset.make)
        assert preset.paper in (function.__doc__ or ""), name
    used = {method.paper for method in own} | {x.paper for x in PRESETS.values()}
    assert used - {""} == PAPERS.keys()


def test_citations_are_bibtex():
    text = bibtex([*PAPERS, "1234.56789"])
    keys = re.findall(r"^@(?:misc|software)\{([\w.]+),$", text, re.MULTILINE)
    assert len(keys) == len({*keys}) == len(PAPERS) + 2
    assert text.count("{") == text.count("}") and "arxiv1234" in text
    assert all(re.match(r"@misc\{\D+(\d+)[^@]*year = \{\1\}", entry) for entry in PAPERS.values())


def test_a_run_cites_its_recipe():
    recipe = json.loads(aj.Recipe(aj.DoRA("**/query", 2), aj.Unfreeze("head")).to_json())
    assert papers_of(MethodOptions("lora"), recipe) == ["2402.09353"]
    assert papers_of(MethodOptions("bitfit"), recipe) == ["2106.10199"]
    mine = MethodOptions("bitfit", recipe=Path("mine.json"))
    assert papers_of(mine, recipe) == ["2402.09353"]
    gone = {"methods": [{"method": "of_a_package_that_is_gone", "targets": ["**"]}]}
    assert papers_of(MethodOptions("lora"), gone) == []
