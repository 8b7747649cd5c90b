"""`adapters-jax compare`: the order of cells, the choice of rates, and the files that it writes."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.commands import command_raises
from helpers.reports import Page
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.numpy import load_file

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune import console as steps
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.compare import comparison as work
from adapters_jax.finetune.compare.cells import CellConsole
from adapters_jax.finetune.compare.comparison import _Pace, compiled_in
from adapters_jax.finetune.compare.grid import Cell, Grid, read_candidate, spread
from adapters_jax.finetune.compare.options import CompareOptions
from adapters_jax.finetune.compare.tradeoff import Label, place_labels, tradeoff
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.inference.comparison import comparison_table
from adapters_jax.finetune.options.flags import from_plain, portable, words
from adapters_jax.finetune.options.parsing import UsageError, parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.report.pictures import write_png
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.loop import Training
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem

NORMS = "layer-norms"
RECIPES = ("houlsby --bottleneck-dim 2 --learning-rates 1e-2 1e-3", NORMS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a model and a file of reviews."""
    directory = tmp_path_factory.mktemp("compare")
    write_model(directory / "tiny")
    write_reviews(directory / "reviews.jsonl", rows=100)
    return directory


def compare(directory, out, *flags, recipes=RECIPES, seeds=(0, 1)):
    """A comparison's status, its summary on stdout, and its last line on stderr."""
    files = [
        "--model",
        directory / "tiny",
        "--train",
        directory / "reviews.jsonl",
        "--text",
        "review",
    ]
    rows = ["--max-length", 8, "--batch-size", 16, "--epochs", 1, "--limit", 32]
    words = [*files, *rows, "--recipes", *recipes, "--out", directory / out]
    words += [] if "--seeds" in flags else ["--seeds", *seeds]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(["compare", *map(str, words), "--json", *map(str, flags)])
    printed = stdout.getvalue()
    assert printed.count("\n") == (status == 0), printed
    last = (stderr.getvalue().splitlines() or [""])[-1]
    return status, json.loads(printed) if printed else None, last


def fails(directory, kind, *data, out="refused", flags=(), **options):
    """Runs a comparison that ends with a user error; returns its line on stderr."""
    with command_raises(kind, *data):
        status, _, last = compare(directory, out, *flags, **options)
    assert status == 2
    assert last.startswith("adapters-jax compare: ")
    assert not (directory / "refused").exists()
    return last


@pytest.fixture(scope="module")
def whole(directory):
    """A finished comparison: its summary and its directory."""
    status, summary, last = compare(directory, "whole")
    assert status == 0, last
    return summary, directory / "whole"


@pytest.mark.weekly
def test_every_cell_is_a_finished_run_of_finetune(whole):
    summary, out = whole
    names = sorted(path.name for path in (out / "cells").iterdir())
    best = f"{summary['recipes'][0]['learning_rate']:g}"
    assert names == sorted(
        [
            "houlsby-bottleneck-dim-2-lr-0.001-seed-0",
            "houlsby-bottleneck-dim-2-lr-0.01-seed-0",
            f"houlsby-bottleneck-dim-2-lr-{best}-seed-1",
            "layer-norms-lr-0.002-seed-0",
            "layer-norms-lr-0.002-seed-1",
        ]
    )
    config = Run(out / "cells" / names[0]).read_config()
    options = config["options"]
    assert (options["optimizer"]["learning_rate"], options["baselines"]) == (0.001, False)
    assert config["summary"]["results"][0]["method"] == "houlsby"
    assert len(config["summary"]["results"]) == 1


@pytest.mark.slow
def test_the_rate_is_chosen_on_dev_and_test_is_reported(whole):
    summary, out = whole
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    dev = {
        line["learning_rate"]: line["dev"]["accuracy"]
        for line in lines
        if line["recipe"].startswith("houlsby") and line["seed"] == 0
    }
    houlsby, norms = summary["recipes"]
    assert houlsby["learning_rate"] == max(dev, key=dev.get)
    assert norms["learning_rate"] == 2e-3
    for row in (houlsby, norms):
        mine = [r for r in lines if (r["recipe"], r["learning_rate"]) == _key(row)]
        test = [r["test"]["accuracy"] for r in mine]
        assert len(test) == 2
        deviation = abs(test[0] - test[1]) / np.sqrt(2)
        assert row["test"]["accuracy"]["mean"] == pytest.approx(np.mean(test))
        assert row["test"]["accuracy"]["deviation"] == pytest.approx(deviation)
        assert row["seeds"] == [0, 1]


def _key(row):
    return row["recipe"], row["learning_rate"]


@pytest.mark.slow
def test_trainable_parameters_have_the_head_and_a_percentage_of_the_base(whole, directory):
    summary, _ = whole
    houlsby, norms = summary["recipes"]
    head, layer_norms = 32 * 2 + 2, 3 * 2 * 32
    assert norms["trainable_parameters"] == layer_norms + head
    assert houlsby["trainable_parameters"] == 2 * aj.bottleneck_parameters(32, 2) + 192 + head
    base = sum(x.size for x in load_file(directory / "tiny" / "model.safetensors").values()) + head
    assert norms["percent"] == pytest.approx(100 * (layer_norms + head) / base)


@pytest.mark.slow
def test_the_page_is_one_file_with_the_commands_to_repeat_it(whole):
    summary, out = whole
    page = (out / "comparison.html").read_text()
    found = Page(page)
    assert {link for link in found.links if not link.startswith("#")} == {"data:,"}
    assert not {"script", "img", "iframe"} & set(found.tags)
    assert not re.search(r"url\([^#]|@import|https?://", page)
    assert found.sections["The same again"] == [portable(summary["command"], CompareOptions)]
    assert found.sections["The best on dev, trained alone"] == [
        portable(summary["best"]["command"], RunOptions)
    ]
    assert str(out.parent) not in page
    assert "F1 is that of the class yes, the positive one." in found.words
    (cited,) = found.sections["How to cite it"]
    assert "1902.00751" in cited and "@software{adapters_jax," in cited
    assert "missing" not in page
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "comparison.json").read_text()) == summary
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert not (out / "lock").exists()


@pytest.mark.slow
def test_the_page_shows_every_recipe_and_every_cell(whole):
    summary, out = whole
    sections = Page((out / "comparison.html").read_text()).sections
    header, rows = comparison_table(summary, ("dev", "test"))
    assert sections["Results"] == [header, *rows]
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [row[:5] for row in sections["Every cell"][1:]] == [
        [
            cell["recipe"],
            f"{cell['learning_rate']:g}",
            str(cell["seed"]),
            f"{100 * cell['dev']['accuracy']:.1f} %",
            f"{100 * cell['test']['accuracy']:.1f} %",
        ]
        for cell in cells
    ]
    configuration = dict(sections["Configuration"])
    assert configuration["model"] == "tiny"
    assert configuration["rows.train"] == "32"


@pytest.mark.slow
def test_the_best_command_is_that_of_its_cell_with_baselines(whole):
    summary, _ = whole
    program, name, *flags = shlex.split(summary["best"]["command"])
    assert (program, name) == ("adapters-jax", "finetune")
    options = parse(Finetune, flags)
    best = next(r for r in summary["recipes"] if r["recipe"] == summary["best"]["recipe"])
    assert options.optimizer.learning_rate == best["learning_rate"]
    assert options.baselines
    means = [row["dev"]["accuracy"]["mean"] for row in summary["recipes"]]
    assert best["dev"]["accuracy"]["mean"] == max(means)


@pytest.mark.slow
def test_the_best_on_dev_can_be_used_as_the_page_says(whole, monkeypatch, capsys):
    summary, out = whole
    best, rows = summary["best"], summary["recipes"]
    (rate,) = [row["learning_rate"] for row in rows if row["recipe"] == best["recipe"]]
    assert best["run"] == f"cells/{Cell(best['recipe'], rate, best['seed']).name}"
    expected = str(*load_predictor(out / best["run"]).predict(["A text of your own."]))
    monkeypatch.chdir(out.parent)  # also where another directory wrote the page
    assert main(["report", str(out)]) == 0
    sections = Page((out / "comparison.html").read_text()).sections
    shell, python = sections["How to use it"]
    assert shlex.split(shell)[:3] == ["adapters-jax", "predict", f"{out.name}/{best['run']}"]
    capsys.readouterr()
    exec(python, {})
    assert capsys.readouterr().out == f"{expected}\n"
    damaged = shutil.copytree(out, out.parent / "damaged")
    best = {name: best[name] for name in ("recipe", "run", "command")}
    (damaged / "comparison.json").write_text(json.dumps({**summary, "best": best}))
    with command_raises(RunError, "damaged", "seed"):
        main(["report", str(damaged)])


@pytest.mark.slow
def test_the_page_of_a_cell_shows_its_own_settings_alone(whole, directory):
    _, out = whole
    cell = out / "cells" / f"{NORMS}-lr-0.002-seed-1"
    sections = Page((cell / "report.html").read_text()).sections
    rows = dict(sections["Configuration"])
    assert (rows["model"], rows["text"], rows["seed"]) == ("tiny", "review", "1")
    assert not [name for name in rows if name.rpartition(".")[2] in ("prompt", "completion")]
    assert not [value for value in rows.values() if directory.as_posix() in value]
    (again,) = sections["The same again"]
    options = parse(Finetune, shlex.split(again)[2:])
    assert (options.seed, options.method.method, options.data.limit) == (1, NORMS, 32)


@pytest.fixture
def copy(whole, directory):
    """A copy of the finished comparison."""
    shutil.copytree(whole[1], directory / "copy")
    yield directory / "copy"
    shutil.rmtree(directory / "copy")


def never(*_, **__):
    raise AssertionError("something trains")


@pytest.mark.slow
def test_a_finished_comparison_trains_nothing_again(whole, directory, monkeypatch):
    monkeypatch.setattr(Training, "train", never)
    status, summary, last = compare(directory, "whole")
    assert (status, summary) == (0, whole[0]), last


@pytest.mark.weekly
def test_an_interrupted_comparison_continues_to_the_same_result(directory, monkeypatch):
    recipes, copy = (NORMS,), directory / "halted"
    whole = compare(directory, "straight", recipes=recipes)[1]
    shutil.copytree(directory / "straight", copy)
    shutil.rmtree(copy / "cells" / "layer-norms-lr-0.002-seed-1")
    batch, seen = LabelledProblem.batch, []

    def interrupted(self, step):
        seen.append(step)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(LabelledProblem, "batch", interrupted)
    status, _, last = compare(directory, copy.name, recipes=recipes)
    assert (status, seen) == (143, [0, 1])
    assert last.startswith("adapters-jax compare: ")
    assert "SIGTERM" in last
    assert last.endswith(f"--out={copy}")
    page = (copy / "comparison.html").read_text()
    assert "layer-norms (1)." in page
    monkeypatch.setattr(LabelledProblem, "batch", batch)
    status, summary, _ = compare(directory, copy.name, recipes=recipes)
    assert status == 0
    assert without_times(summary) == without_times(whole)


def without_times(summary):
    kept = {k: v for k, v in summary.items() if k not in ("seconds", "command", "out")}
    return json.dumps(kept, sort_keys=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "data"),
    [
        (("--epochs", 2), ["--epochs=1.0", "--epochs=2.0"]),
        (("--clip", 2), ["--clip=2.0"]),
    ],
)
def test_cells_of_other_flags_are_an_error(copy, directory, monkeypatch, flags, data):
    monkeypatch.setattr(Training, "train", never)
    cell = copy / "cells" / "houlsby-bottleneck-dim-2-lr-0.01-seed-0"
    fails(directory, RunError, cell, *data, "--out", out="copy", flags=flags)


@pytest.mark.slow
def test_cells_of_other_rows_are_an_error(copy, directory):
    path = copy / "cells" / "layer-norms-lr-0.002-seed-1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_sha256": "0"}))
    fails(directory, RunError, path.parent, "data_sha256", "--out", out="copy")


@pytest.mark.slow
def test_cells_of_older_versions_with_their_command_line_are_the_same(copy, directory, monkeypatch):
    for path in (copy / "cells").glob("*/config.json"):
        config = json.loads(path.read_text())
        command = words(from_plain(RunOptions, config.pop("options")))
        path.write_text(json.dumps({**config, "command": ["--runs=/else", *command[::-1]]}))
    monkeypatch.setattr(Training, "train", never)
    assert compare(directory, "copy", "--checkpoint-every", 7)[0] == 0


@pytest.mark.slow
def test_one_process_at_a_time(copy, directory):
    cell = Run(copy / "cells" / "layer-norms-lr-0.002-seed-1")
    config = cell.read_config()
    del config["summary"]
    cell.write_config(config)
    for run in (cell, Run(copy)):
        handle = run.lock()
        fails(directory, RunError, run.path, os.getpid(), out="copy")
        run.unlock(handle)


@pytest.mark.weekly
def test_a_cell_that_diverges_is_a_result_and_not_run_again(directory, monkeypatch):
    recipes, only = ("head-only --learning-rates 3e38 1e-2",), {"seeds": (0,)}
    status, summary, last = compare(directory, "diverged", "--clip", 0, recipes=recipes, **only)
    assert status == 0, last
    (head,) = summary["recipes"]
    assert (head["learning_rate"], head["seeds"], head["missing"]) == (1e-2, [0], 0)
    recipes = ("head-only --learning-rates 3e38", NORMS)
    status, summary, last = compare(directory, "diverged", "--clip", 0, recipes=recipes, **only)
    assert status == 0, last
    head, norms = summary["recipes"]
    assert (head["diverged"], head["seeds"], head["missing"]) == (1, [], 0)
    assert "test" not in head
    assert norms["seeds"] == [0]
    rows = {row[0]: row for row in comparison_table(summary)[1]}
    assert rows["head-only"][-2:] == ["0, 1 diverged", ""]
    assert "diverged" in (directory / "diverged" / "comparison.html").read_text()
    monkeypatch.setattr(Training, "train", never)
    again = compare(directory, "diverged", "--clip", 0, recipes=recipes, **only)
    assert again[:2] == (0, summary)


@pytest.mark.weekly
def test_a_decoder_is_compared_by_perplexity(tmp_path, monkeypatch):
    write_llama(tmp_path / "llama", num_hidden_layers=1)
    write_meanings(tmp_path / "rows.csv", rows=40)
    monkeypatch.chdir(tmp_path)
    words = "compare --model llama --train rows.csv --prompt mr --completion ref --max-length 32"
    words += " --exact-match 0 --epochs 1 --limit 8 --seeds 3 --learning-rates 3e-2 1e-9 --out out"
    assert main([*words.split(), "--recipes", "lora --rank 2"]) == 0
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (row,) = summary["recipes"]
    assert (summary["metrics"], row["learning_rate"]) == (["perplexity"], 3e-2)
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    dev = [json.loads(line)["dev"]["perplexity"] for line in lines]
    assert dev[0] < dev[1]


@pytest.mark.parametrize(
    ("recipes", "flags", "kind", "data"),
    [
        (["lora --rnk 4"], [], UsageError, ["--recipes 'lora --rnk 4'", "--rnk"]),
        (["loraa"], [], UsageError, ["--recipes 'loraa'", "--method"]),
        (["lora --help"], [], UsageError, ["--recipes 'lora --help'"]),
        (["full --learning-rates"], [], UsageError, ["--learning-rates"]),
        (["full --learning-rates -1"], [], UserError, ["'full'", "--learning-rates=-1.0"]),
        (["nix.json"], [], UserError, ["nix.json"]),
        (["full", "full"], [], UserError, ["full-lr-5e-05-seed-0"]),
        (["full"], ["--learning-rates", 1e-3, 1e-3], UserError, ["full-lr-0.001"]),
        (["lora", "lora --rank 8"], [], UserError, ["'lora'", "'lora --rank 8'"]),
        (["full"], ["--learning-rate", 1], UserError, ["--learning-rate 1", "--learning-rates"]),
        (["full"], ["--seeds", 1, 1], UserError, ["--seeds 1:"]),
        (["full"], ["--seeds", -1], UserError, ["--seeds -1", "2**32 - 1"]),
        (["full"], ["--tuning-seeds", 3], UserError, ["--tuning-seeds 3", "2 --seeds"]),
        (["full"], ["--tuning-seeds", 0], UserError, ["--tuning-seeds=0", ">= 1"]),
        (["full"], ["--mesh", "data=3"], UserError, ["data=3"]),
        (["full"], ["--mesh", "fdsp=-1"], UserError, ["'fdsp'", "data, fsdp, model"]),
    ],
)
def test_errors_are_found_before_anything_is_written(
    directory, monkeypatch, recipes, flags, kind, data
):
    monkeypatch.setattr(Training, "train", never)
    fails(directory, kind, *data, flags=flags, recipes=recipes)


@pytest.mark.slow
def test_errors_of_several_recipes_are_listed_and_one_of_the_rows_is_named_once(directory):
    recipes = ("lora --targets x", "bitfit", "houlsby --rank 3")
    data = ("--recipes 'lora --targets x'", "--recipes 'houlsby --rank 3'", "--method houlsby")
    line = fails(directory, UserError, *data, recipes=recipes)
    assert line.count("--recipes ") == 2
    line = fails(directory, UserError, "'nix'", flags=("--label", "nix"), recipes=("bitfit", NORMS))
    assert "--recipes" not in line
    assert line.count("'nix'") == 1


def grid(*texts, seeds=(0, 1, 2), tuning=1, metric="accuracy"):
    return Grid(tuple(map(read_candidate, texts)), seeds, tuning, metric)


def fill(grid, score):
    """Runs a grid without training; the cells in order, and the results."""
    order, results = [], {}
    while (cell := grid.next(results)) is not None:
        missing = sum(grid.missing(c, results) for c in grid.candidates)
        value = score(cell)
        found = {"stopped": "so"} if value is None else {"dev": value, "test": value}
        order.append(cell)
        results[cell] = {"seed": cell.seed, "seconds": 2.0, **found}
        if value is not None:
            assert sum(grid.missing(c, results) for c in grid.candidates) == missing - 1
    return order, results


def test_a_seed_of_all_recipes_comes_before_the_next_and_only_the_best_rate_goes_on():
    two = grid("lora --rank 4 --learning-rates 1e-3 2e-3 4e-3", "full")
    dev = {1e-3: 0.7, 2e-3: 0.9, 4e-3: 0.9, 5e-5: 0.1}  # the first of equals
    order, results = fill(two, lambda cell: {"accuracy": dev[cell.learning_rate]})
    assert [(c.recipe, c.learning_rate, c.seed) for c in order] == [
        ("lora --rank 4", 1e-3, 0),
        ("lora --rank 4", 2e-3, 0),
        ("lora --rank 4", 4e-3, 0),
        ("full", 5e-5, 0),
        ("lora --rank 4", 2e-3, 1),
        ("full", 5e-5, 1),
        ("lora --rank 4", 2e-3, 2),
        ("full", 5e-5, 2),
    ]
    assert two.row(two.candidates[0], results)["seeds"] == [0, 1, 2]


def test_the_mean_over_the_tuning_seeds_decides_lower_perplexity_too():
    scores = {(1e-3, 0): 5.0, (1e-3, 1): 9.0, (2e-3, 0): 6.0, (2e-3, 1): 7.0}

    def run(metric):
        one = grid("lora --learning-rates 1e-3 2e-3", seeds=(0, 1), tuning=2, metric=metric)
        score = lambda cell: {metric: scores[cell.learning_rate, cell.seed]}  # noqa: E731
        return one, *fill(one, score)

    one, order, results = run("perplexity")
    assert len(order) == 4
    assert one.chosen(one.candidates[0], results) == 2e-3  # 6.5 against 7
    assert one.row(one.candidates[0], results)["test"]["perplexity"]["mean"] == 6.5
    one, _, results = run("accuracy")
    assert one.chosen(one.candidates[0], results) == 1e-3


def test_a_rate_that_diverges_is_not_chosen_and_where_all_do_no_seed_follows():
    one = grid("lora --learning-rates 1e-3 2e-3", "full")
    order, results = fill(
        one, lambda cell: None if cell.learning_rate == 1e-3 else {"accuracy": 0.5}
    )
    assert one.chosen(one.candidates[0], results) == 2e-3
    assert len(order) == 2 + 2 + 3
    order, results = fill(one, lambda cell: None if cell.recipe == "lora" else {"accuracy": 0.5})
    assert len(order) == 2 + 3
    row = one.row(one.candidates[0], results)
    assert (row["learning_rate"], row["diverged"], row["missing"]) == (None, 2, 0)


def test_means_and_deviations_are_those_by_hand():
    assert spread([0.8, 0.9, 0.7])["mean"] == pytest.approx(0.8)
    assert spread([0.8, 0.9, 0.7])["deviation"] == pytest.approx(0.1)
    assert spread([0.5]) == {"mean": 0.5, "deviation": None}
    assert spread([1.0, float("inf")]) == {"mean": float("inf"), "deviation": None}


def test_recipes_of_one_family_differ_in_their_size_alone(tmp_path):
    texts = ("lora --rank 4", "lora --dora --rank 2", "last-layers --layers 1", "bitfit", "lora")
    found = [read_candidate(text) for text in texts]
    assert [(c.family, c.size) for c in found] == [
        ("lora", 4),
        ("lora --dora", 2),
        ("last-layers", 1),
        ("bitfit", None),
        ("lora", None),
    ]
    assert read_candidate("a/b.json --learning-rates 1e-3").text == "a/b.json"
    middle = read_candidate("lora --learning-rates 1e-3 2e-3 --rank 4", [5e-3])
    assert (middle.text, middle.learning_rates) == ("lora --rank 4", (1e-3, 2e-3))
    assert read_candidate("lora", [5e-3]).learning_rates == (5e-3,)
    assert Cell("lora --targets '**/{query,value}'", 5e-5, 2).name == (
        "lora-targets-query-value-lr-5e-05-seed-2"
    )


def test_the_time_left_is_that_of_finished_cells():
    two = grid("full", "bitfit", seeds=(0, 1))
    results = {}
    pace = _Pace(two, results)
    assert (pace.total, pace.done, pace.left()) == (4, 0, None)
    results[Cell("full", 5e-5, 0)] = {"seconds": 8.0, "dev": {"accuracy": 1}}
    assert (pace.done, pace.left()) == (1, 3 * 8.0)
    results[Cell("bitfit", 2e-3, 0)] = {"seconds": 2.0, "dev": {"accuracy": 1}}
    assert (pace.done, pace.left()) == (2, 8.0 + 2.0)
    pace.start(Cell("full", 5e-5, 1))
    pace.began -= 3.0
    assert pace.left() == pytest.approx(5.0 + 2.0, abs=0.5)
    pace.began -= 60.0
    assert pace.left() == 2.0  # it takes longer than the one before


def test_the_first_cell_has_an_estimate_without_what_it_compiles(monkeypatch):
    now, shown, compiling = [100.0], [], steps.Compiling()
    for module in (work, steps):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(steps, "_compiling", lambda: compiling)
    pace = _Pace(grid("full", seeds=(0, 1, 2)), {})
    progress = SimpleNamespace(update=lambda done, note: shown.append((done, note)))
    pace.start(Cell("full", 5e-5, 0))
    pace.show(progress, 0.0, "compiling")
    assert pace.left() is None
    now[0] = 160.0
    pace.show(progress, 0.1, "0.1")
    assert pace.left() is None
    # Rows of another length compile half a minute; each tenth takes 2 s.
    compiling.note(30.0, 190.0)
    for now[0], part in ((192.0, 0.2), (194.0, 0.3)):
        pace.show(progress, part, f"{part}")
        took = now[0] - 100
        assert pace.left() == pytest.approx(3 * (took + 2 * 10 * (1 - part)) - took)
    assert shown[0] == (0, "full, learning rate 5e-05, seed 0  compiling")
    pace.show(progress, 0.0, "compiling")  # of its second part
    for now[0], part in ((200.0, 0.1), (205.0, 0.2)):
        pace.show(progress, part, f"{part}")
    assert pace.whole == pytest.approx(105 + 5 * 10 * 0.8)
    pace.start(Cell("full", 5e-5, 1))
    assert pace.left() is None  # it may be of another recipe


def test_cells_print_a_line_once_and_no_table_nor_spinner(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    reported = []
    console = CellConsole(Console(json=False), lambda part, note: reported.append((part, note)))
    for _ in range(2):
        console.say("3 texts are cut")
        console.show("an audit")
        console.finish(["a"], [["b"]], "finished", {})
        with console.progress("lora", 8, first="compiling") as progress:
            progress.update(2, "loss 0.5")
        with console.waiting("scoring"):
            pass
    assert capsys.readouterr() == ("3 texts are cut\n", "")
    assert reported == [(0.0, "compiling"), (0.25, "step 2 of 8  loss 0.5")] * 2


def test_compiled_programs_are_cached_unless_jax_has_a_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        work._configure({"jax_compilation_cache_dir": str(tmp_path / "theirs")})
        with compiled_in(tmp_path / "a"):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
        work._configure({"jax_compilation_cache_dir": None})
        with compiled_in(tmp_path / "b"):
            jax.jit(lambda x: x * 3 + 1)(np.ones(3)).block_until_ready()
        assert jax.config.jax_compilation_cache_dir is None
        assert os.listdir(tmp_path / "b")
    finally:
        work._configure({"jax_compilation_cache_dir": before})


def test_labels_of_one_point_do_not_cover_each_other_or_the_line():
    figure = Figure(layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 4), ylim=(0, 4))
    figure.draw_without_rendering()
    line = np.array([[2.0, 2.0], [2.0, 4.0]])
    place_labels(axes, [Label(text, [(2.0, 2.0)], "black") for text in ("first", "second")], [line])
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert not boxes[0].overlaps(boxes[1])
    ends = axes.transData.transform(line)
    assert not any(box.contains(ends[0, 0], y) for box in boxes for y in np.linspace(*ends[:, 1]))


@pytest.mark.slow
def test_several_data_sets_are_drawn_side_by_side(tmp_path):
    row = {"method": "lora", "family": "lora", "size_name": "rank"}
    scores = {"accuracy": {"mean": 0.8, "deviation": None}}
    rows = [
        {**row, "recipe": f"lora --rank {r}", "size": r, "trainable_parameters": r, "test": scores}
        for r in (1, 8)
    ]
    lost = {"accuracy": {"mean": float("inf"), "deviation": None}}
    rows += [{**rows[0], "test": lost}, {**row, "recipe": "x", "trainable_parameters": 1}]
    full = {**rows[0], "method": "full", "family": "full", "trainable_parameters": 1000}
    data = {"a": rows, "b": [full], "c": [], "d": [*rows, full]}
    write_png(tmp_path / "x.png", tradeoff(data, dict.fromkeys(data, "accuracy")))
    raw = (tmp_path / "x.png").read_bytes()
    width, height = (int.from_bytes(raw[i : i + 4], "big") for i in (16, 20))
    assert raw.startswith(b"\x89PNG")
    assert (width, height) == (3 * 810, 2 * 660)
    assert os.listdir(tmp_path) == ["x.png"]
