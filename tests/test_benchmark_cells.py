"""Benchmarks whose trainings are kept: the defaults, the trade-off, the tasks beside baselines."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.compare.grid import read_candidate
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.trees import flatten, unflatten
from benchmarks import (
    ablations,
    accelerators,
    baselines,
    cells,
    defaults,
    fusion,
    methods,
    regret,
    sweep,
    tradeoff,
)
from benchmarks.report import Report

pytestmark = pytest.mark.slow


def _trained(score, monkeypatch):
    """Replaces trainings: the scores of a cell are those of `score(recipe, rate, seed)`.

    Returns the list of flags of each comparison.
    """
    calls = []

    def compared(flags):
        calls.append(flags)
        given = {name: [*values] for name, *values in _split(flags)}
        recipe, _, rates = given["--recipes"][0].partition(" --learning-rates ")
        out, lines = Path(given["--out"][0]), []
        for rate in map(float, rates.split() or read_candidate(recipe).learning_rates):
            for seed in map(int, given["--seeds"]):
                dev, test, size = score(recipe, rate, seed)
                cell = {"recipe": recipe, "learning_rate": rate, "seed": seed, "seconds": 60.0}
                scores = {"dev": {"f1": dev, "x": 0.0}, "test": {"f1": test, "x": 0.0}}
                ended = {**scores, "trainable_parameters": size, "best_step": 128}
                lines.append({**cell, **({"stopped": "step 3"} if dev is None else ended)})
        out.mkdir(parents=True, exist_ok=True)
        (out / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(cells, "compared", compared)
    return calls


def _split(flags):
    """The flags with their values."""
    found = []
    for word in flags:
        if word.startswith("--"):
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _tables(report):
    tables = {}
    for row in report.rows:
        tables.setdefault(row["table"].partition(":")[0], []).append(row)
    return tables


@pytest.mark.slow
@pytest.mark.parametrize(
    ("above", "apart", "size", "verdict"),
    [
        (0.3, 0.01, 27, "reproduced"),
        (0.3, 2.0, 27, "undecided"),
        (1.0, 0.01, 27, "not reproduced"),
        (-9.0, 0.01, 41, "not reproduced"),
    ],
)
def test_a_tradeoff_is_judged_by_an_interval_over_seeds(
    tmp_path, monkeypatch, above, apart, size, verdict
):
    best = {tradeoff.HOULSBY: 4e-3, tradeoff.FULL: 2.5e-5}  # beyond the first rates

    def score(recipe, rate, seed):
        if recipe not in best:
            return 0.5, 0.5, 9
        if rate == 16e-3:
            return None, None, None
        dev = 0.8 - abs(math.log2(rate / best[recipe])) / 10
        full = recipe == tradeoff.FULL
        return dev, (80 + above * full + apart * seed) / 100, 1000 if full else size

    monkeypatch.setattr(cells, "ROOT", tmp_path)
    calls = _trained(score, monkeypatch)
    report = Report("tradeoff-cola", "python -m benchmarks tradeoff-cola", tmp_path)
    tradeoff.run(report, False, "cola")
    tables = _tables(report)
    shown = {row["recipe"]: row for row in tables["cola, test f1 x 100"]}
    ours, full = shown[tradeoff.HOULSBY], shown[tradeoff.FULL]
    assert (ours["learning rate"], full["learning rate"]) == (4e-3, 2.5e-5)
    assert ours["best pass"] == 2  # of 64 steps, since the lengths' last batches are small
    assert ours["tried"] == "0.0005, 0.001, 0.002, 0.004, 0.008"
    assert full["tried"] == "1.25e-05, 2.5e-05, 5e-05, 0.0001, 0.0002"
    assert ours["inside"] and (ours["seeds"], ours["diverged"]) == (5, 0)
    assert ours["best pass"] == 2.0  # 126 steps of 63 in a pass
    assert full["mean"] - ours["mean"] == pytest.approx(above)
    assert ours["deviation"] == pytest.approx(apart * 10**0.5 / 2)
    assert shown["layer-norms"]["seeds"] == 1
    (limit,), (claim,) = tables["Wanted"], tables["Claims"]
    assert limit["measured"] == pytest.approx(above)
    assert claim["verdict"] == verdict
    if verdict == "reproduced":  # Welch's interval by its formula: equal variances, 8 degrees
        half = 2.306 * apart * 10**0.5 / 2 * (2 / 5) ** 0.5
        low, high = above - half, above + half
        assert claim["ours"].endswith(f"2.7 %, {low:.1f} to {high:.1f} points below")
    assert (tmp_path / "tradeoff-cola.png").read_bytes()[1:4] == b"PNG"
    done = len(calls)
    tradeoff.run(Report("tradeoff-cola", "again", tmp_path), False, "cola")
    assert len(calls) == done  # nothing is trained twice


def test_a_whole_training_set_has_two_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    calls = _trained(lambda recipe, rate, seed: (0.5, (50 + seed) / 100, 9), monkeypatch)
    report = Report("tradeoff-cola-whole", "", tmp_path)
    tradeoff.run(report, False, "cola", "whole")
    shown = _tables(report)["cola, test f1 x 100"]
    seeds = len(tradeoff.WHOLE_SEEDS)
    assert {row["recipe"]: row["seeds"] for row in shown} == dict.fromkeys(tradeoff.TUNED, seeds)
    for flags in calls:
        given = {name: values for name, *values in _split(flags)}
        assert (given["--limit"], given["--epochs"]) == (["7696"], ["3"])


def test_where_adapters_are_behind_more_recipes_tell_why(tmp_path, monkeypatch):
    above = {tradeoff.HOULSBY: 4.0, tradeoff.LAYERS: 0.0, tradeoff.AS_FULL: 4.0, tradeoff.WIDE: 1.0}

    def score(recipe, rate, seed):
        best = 2e-4 if recipe in (tradeoff.FULL, tradeoff.LAYERS) else 5e-4
        dev = 0.8 - abs(math.log2(rate / best)) / 10
        return dev, (80 - above.get(recipe, 0.0) + 0.1 * seed) / 100, 1000

    monkeypatch.setattr(cells, "ROOT", tmp_path)
    calls = _trained(score, monkeypatch)
    report = Report("tradeoff-wnut17", "", tmp_path)
    tradeoff.run(report, False, "wnut17")
    tables = _tables(report)
    apart = {row["recipe"]: row for row in tables[tradeoff.BELOW]}
    assert {recipe: row["points"] for recipe, row in apart.items()} == pytest.approx(above)
    half = 2.306 * 0.1 * (10**0.5 / 2) * (2 / 5) ** 0.5  # Welch's, of equal variances
    wide = apart[tradeoff.WIDE]
    assert (wide["low"], wide["high"]) == pytest.approx((1 - half, 1 + half), abs=1e-4)
    rows = {row["recipe"]: row for row in tables["wnut17, test f1 x 100"]}
    assert rows[tradeoff.LAYERS]["learning rate"] == 2e-4 and rows[tradeoff.WIDE]["inside"]
    own, as_full = rows[tradeoff.HOULSBY], rows[tradeoff.AS_FULL]
    assert {**own, "recipe": tradeoff.AS_FULL} == as_full  # which was trained apart
    assert sum("--dropout" in flags for flags in calls) == 3
    assert rows[tradeoff.WIDE]["seeds"] == 5 and rows["lora --rank 8"]["seeds"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["layer-norms", tradeoff.HOULSBY, tradeoff.FULL])
def test_a_recipe_that_always_diverges_has_a_row(tmp_path, monkeypatch, lost):
    def score(recipe, rate, seed):
        size = 1000 if recipe == tradeoff.FULL else 27
        return (None, None, None) if recipe == lost else (0.5, (50 + seed) / 100, size)

    monkeypatch.setattr(cells, "ROOT", tmp_path)
    _trained(score, monkeypatch)
    report = Report("tradeoff-cola", "", tmp_path)
    old = {"data": "cola", "rows": 4000, "passes": 3.0, "recipe": "full", "seed": 0}
    line = json.dumps({**old, "learning_rate": 1e-4, "stopped": "step 3", "seconds": 9e9})
    (tmp_path / "tradeoff-cola-cells.jsonl").write_text(line + "\n")  # of another number of rows
    tradeoff.run(report, False, "cola")
    tables = _tables(report)
    shown = {row["recipe"]: row for row in tables["cola, test f1 x 100"]}
    assert (shown[lost]["mean"], shown[lost]["trainable"]) == (0.0, None)
    assert shown[lost]["diverged"] == shown[lost]["seeds"]
    assert shown["lora --rank 8"]["inside"] is None  # its rate was not tuned
    assert ("Claims" in tables) == (lost == "layer-norms")
    (done,) = tables["Cells that are done; the same command goes on"]
    trained = [
        row for row in cells.read(tmp_path / "tradeoff-cola-cells.jsonl") if row["rows"] == 2000
    ]
    assert done["done"] == len(trained) > len(shown) and done["hours"] < 9


def test_rates_end_where_each_further_one_is_better(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    _trained(lambda recipe, rate, seed: (rate, rate, 9), monkeypatch)
    store = cells.Store(Report("tradeoff-cola", "", tmp_path))
    first = cells.Cells("cola", 9, "lora", (1e-3,), 1.0)
    assert tradeoff.tuned(store, first) == 16e-3  # the sixth
    assert len(first.of(store.rows)) == 1


def test_a_second_peak_of_the_rates_is_the_best_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    scores = {5e-4: 0.1, 1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.4, 8e-3: 0.0}
    _trained(lambda recipe, rate, seed: (scores[rate], 0.5, 9), monkeypatch)
    store = cells.Store(Report("tradeoff-cola", "", tmp_path))
    first = cells.Cells("cola", 9, "lora", (1e-3,), 1.0)
    assert tradeoff.tuned(store, first) == 1e-3
    store.train(replace(first, rates=(4e-3,)))  # asked for by hand
    assert tradeoff.tuned(store, first) == 4e-3
    assert len(store.rows) == len(scores)


def test_the_best_cells_are_in_the_order_of_their_seeds(tmp_path):
    asked = cells.Cells("cola", 9, "lora", (1e-3,), 1.0, (0, 1))
    row = {"data": "cola", "rows": 9, "passes": 1.0, "recipe": "lora", "learning_rate": 1e-3}
    found = [row | {"seed": seed, "score": {"dev": 0.5}} for seed in (1, 0)]
    assert [each["seed"] for each in asked.best(found)] == [0, 1]


def test_a_finished_cell_is_read_and_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.subprocess, "run", lambda *words, **options: 1 / 0)
    cell = baselines.Cell("regression", "stsb", "--train {}/rows.tsv", "--limit 9")
    run = tmp_path / "regression-stsb"
    run.mkdir()
    scores = [("mean", 0.0), ("head-only", 0.5), ("houlsby", 0.75)]
    results = [{"method": name, "test": {"pearson": score}} for name, score in scores]
    summary = {"seconds": 90, "results": results}
    config = {"metrics": ["pearson"], "method": "houlsby", "rows": {"train": 9}, "summary": summary}
    (run / "config.json").write_text(json.dumps(config))
    (row,) = baselines.rows((cell,), tmp_path, "", {})
    assert [row[name] for name in ("constant", "frozen base", "ours", "minutes", "rows")] == [
        0.0,
        0.5,
        0.75,
        1.5,
        9,
    ]
    words = "adapters-jax finetune --task regression --train DATA/stsb/rows.tsv --limit 9"
    assert row["command"] == f"`{words}`"
    assert [*baselines.rows((cell,), tmp_path, "", {row["command"]: {"kept": 1}})] == [{"kept": 1}]
    del config["summary"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZeroDivisionError):  # it would go on
        [*baselines.rows((cell,), tmp_path, "", {})]


def test_an_interruption_loses_no_row_of_the_results(tmp_path, monkeypatch):
    def interrupted(command, run):
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "finished", interrupted)
    shown = [baselines._shown(cell.command(tmp_path, "")) for cell in baselines.CELLS]
    first = Report("baselines", "", tmp_path)
    for command in (shown[0], *shown[2:]):  # the second cell is new
        first.add(baselines.TABLE, task="kept", command=command)
    first.finish()
    report = Report("baselines", "", tmp_path)
    baselines.run(report, False)
    assert [row["command"] for row in report.rows] == [shown[0], *shown[2:]]


def _cell(data, recipe, passes, rate, dev, test):
    """A finished cell, as `defaults.Cells.train` returns it."""
    about = {"data": data, "metric": "f1", "rows": 900, "passes": passes, "recipe": recipe}
    return {**about, "learning_rate": rate, "score": {"dev": dev, "test": test}, "seconds": 60.0}


def test_defaults_are_ranked_by_dev_and_reported_on_test(tmp_path):
    finished = [
        _cell("a", "lora", 12.0, 2e-3, 0.4, 0.3),
        _cell("a", "lora", 12.0, 4e-3, 0.5, 0.9),
        _cell("b", "lora", 12.0, 2e-3, 0.8, 0.7),
        _cell("b", "lora", 12.0, 4e-3, 0.4, 0.8),
        {**_cell("b", "lora", 12.0, 4e-3, 0.8, 1.0), "seed": 1},  # a setting has the mean of seeds
        _cell("a", "lora", 3.0, 2e-3, 0.25, 0.9),  # b has no cell of this setting
        *({**_cell(data, "lora", 12.0, 2e-3, 0.1, 1.0), "more": "--dropout 0.1"} for data in "ab"),
        _cell("a", "head-only", None, 1e-2, 0.9, 0.25),
        _cell("b", "head-only", None, 1e-2, 0.9, 0.75),
        _cell("cola", defaults.WIDE, 3.0, 1e-3, 0.25, 0.5),
    ]
    wide = {"recipe": tradeoff.HOULSBY, "seed": 0, "test": {"f1": 0.5, "accuracy": 0.9}}
    lines = [
        {**wide, "learning_rate": 1e-3, "dev": {"f1": 0.5, "accuracy": 0.1}},
        {**wide, "learning_rate": 2e-3, "dev": {"f1": 0.25, "accuracy": 0.9}},
        {**wide, "learning_rate": 4e-3, "stopped": "step 3"},
        {**wide, "learning_rate": 1e-3, "dev": {"f1": 0.9}, "seed": 1},  # not all rates have it
    ]
    shared = {"data": "cola", "rows": tradeoff.ROWS, "passes": tradeoff.PASSES}
    lines = [{**shared, **line} for line in lines]
    more = {"rows": 4000, "passes": 3.0, "dev": {"f1": 0.9}}  # of an earlier plan, on more rows
    text = "".join(json.dumps(line) + "\n" for line in (*lines, {**lines[0], **more}))
    (tmp_path / "tradeoff-cola-cells.jsonl").write_text(text)
    report = Report("defaults", "python -m benchmarks defaults", tmp_path)
    defaults.write(report, finished, tmp_path)
    tables = _tables(report)
    assert [
        (row["learning rate"], row["mean"], row["default"]) for row in tables["Dev, 900 rows"]
    ] == [
        (2e-3, pytest.approx(0.9), True),
        (4e-3, pytest.approx(0.875), False),
        (2e-3, pytest.approx(0.1625), False),
        (2e-3, None, False),
    ]
    assert [row["more"] for row in tables["Dev, 900 rows"]] == ["", "", "--dropout 0.1", ""]
    assert tables["Dev, 900 rows"][3]["a"] == pytest.approx(0.5)
    scores = [row["score x 100"] for row in tables["Dev, 900 rows"]]
    assert scores == [pytest.approx(60), pytest.approx(55), pytest.approx(10), None]
    more = [(row["learning rate"], row["mean"]) for row in tables["Dev, the rows of tradeoff"]]
    assert more == [(1e-3, 1.0), (2e-3, 0.5), (4e-3, 0.0)]
    above = [(row["data"], row["points above"]) for row in tables["Test"]]
    assert above == [("a", pytest.approx(5)), ("b", pytest.approx(-5))]
    assert [row["met"] for row in tables["Wanted"]] == [True, False]
    (wide,) = tables[f"{defaults.WIDE} on cola"]
    assert (wide["learning rate"], wide["dev x 100"], wide["test x 100"]) == (1e-3, 25.0, 50.0)


def test_a_cell_is_trained_once_and_a_divergence_counts_as_nothing(tmp_path, monkeypatch):
    def score(recipe, rate, seed):
        return (None, None, None) if rate == 4e-3 else (0.5, 0.25, 9)

    monkeypatch.setattr(cells, "ROOT", tmp_path)
    calls = _trained(score, monkeypatch)
    store = cells.Store(Report("defaults", "", tmp_path), ["--max-length", "16"])
    first = cells.Cells("cola", 900, "lora", (2e-3, 4e-3), 12.0)
    found, stopped = store.train(first)
    assert stopped["score"] == {"dev": 0.0, "test": 0.0}
    assert found["score"] == {"dev": 0.5, "test": 0.25}
    assert (found["data"], found["metric"], found["passes"]) == ("cola", "f1", 12.0)
    given = {name: values for name, *values in _split(calls[0])}
    assert given["--recipes"] == ["lora --learning-rates 0.002 0.004"]
    assert (given["--limit"], given["--epochs"], given["--seeds"]) == (["900"], ["12"], ["0"])
    assert given["--max-length"] == ["16"]
    # Another checkout has the results alone, and trains what they lack.
    monkeypatch.setattr(cells, "ROOT", tmp_path / "another")
    store = cells.Store(Report("defaults", "", tmp_path))
    assert store.train(first) == [found, stopped] and len(calls) == 1
    more = replace(first, rates=(2e-3, 1e-3))
    assert len(store.train(more)) == 2
    assert dict(_split(calls[1])[3:4]) == {"--epochs": "12"}
    assert ["--recipes", "lora --learning-rates 0.001"] in _split(calls[1])
    again = replace(first, rates=(2e-3,), seeds=(0, 1))
    assert len(store.train(again)) == 2 and ["--seeds", "1"] in _split(calls[2])
    # Without rates it is the cell of the preset's, not that of any rate.
    own = store.train(replace(first, rates=()))
    assert [row["learning_rate"] for row in own] == [*read_candidate("lora").learning_rates]
    other = replace(first, rates=(1e-3,), rows=9)
    assert len(store.train(other)) == 1 and other.rates != read_candidate("lora").learning_rates
    assert [row["learning_rate"] for row in store.train(replace(other, rates=()))] == [2e-3]
    del calls[3:]
    assert len(store.train(replace(first, passes=None, rates=()))) == 1 and len(calls) == 4
    assert store.rows == cells.read(store.path)
    calls.clear()
    monkeypatch.setattr(cells, "compared", lambda flags: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # keeps what was done before
        store.train(replace(first, seeds=(0, 2)))
    assert cells.read(store.path) == store.rows


def test_the_sweep_takes_each_data_set():
    # Rates, other passes, dropout and head, and the frozen base of each set; two more seeds of
    # CoLA; and m = 256.
    planned = 4 * (8 + 2 * 2 + 3 + 1) + 2 * (8 + 2 * 2 + 3) + 3
    grid = [*defaults.grid()]
    assert sum(map(len, grid)) == planned
    for each in grid:
        assert each.data in cells.SETS
    assert {each.data for each in grid if each.passes is None} == {*cells.SETS}


def test_the_sweep_counts_each_outcome(tmp_path):
    both = {"transformers": "5.0", "family": "llama"}
    found = [
        {"read": "equal", "written": "equal"},
        {"read": "equal", "written": "refused: a name"},
        {"read": "wrong by 0.2", "written": "equal"},
        {"read": "crashed: KeyError: 'a'"},
        {"read": f"{sweep.NO_PEFT}: ValueError: b"},
    ]
    rows = [{**both, "configuration": str(i), **row} for i, row in enumerate(found)]
    assert list(map(sweep.verdict, rows)) == [
        *("equal", "refused", "wrong", "crashed", sweep.NO_PEFT)
    ]
    report = Report("sweep", "python -m benchmarks sweep", tmp_path)
    sweep.tables(report, rows)
    (family,) = (row for row in report.rows if row["table"] == sweep.TABLE)
    shown = "1 equal, 1 refused, 1 not made by PEFT, 1 wrong, 1 crashed"
    assert family["transformers 5.0"] == shown
    broken = [row["reason"] for row in report.rows if row["table"] == sweep.BROKEN]
    assert broken == ["wrong by 0.2", "crashed: KeyError: 'a'"]
    assert [row["measured"] for row in report.rows if "wrong" in row.get("claim", "")] == [2]


def test_a_fusion_is_compared_with_the_best_single_adapter(tmp_path, monkeypatch):
    """Its rate is the best on dev with the first seed, and the points are those on test."""
    trained = []

    def train(self, cell):
        trained.append(cell)
        rate, above = cell.rate or 1e-3, cell.what == fusion.FUSION and cell.data != "cola"
        dev = 0.5 - 100 * abs(rate - fusion.RATES[1])
        result = {"learning_rate": rate, "trainable_parameters": 9, "seconds": 36.0}
        if above and cell.seed == 1:
            dev = 0.0  # of a seed that chooses nothing
        test = {"f1": 0.5 + 0.01 * above * (1 + cell.seed), "x": 0.0}
        result |= {"dev": {"f1": dev, "x": 0.0}, "test": test}
        self.record.keep(result, **asdict(cell))

    monkeypatch.setattr(fusion, "ROOT", tmp_path)
    monkeypatch.setattr(fusion.Trainings, "_train", train)
    report = Report("fusion", "", tmp_path)
    fusion.run(report, False)
    tables = _tables(report)
    rates, seeds, data = len(fusion.RATES), len(fusion.SEEDS), len(fusion.TASKS)
    # With no adapters in comparisons/, each fusion trains them again, in the place of their rows.
    fusions = data * (rates + seeds - 1)
    assert len(trained) == 2 * data * seeds + fusions + len(fusion.TASKS) * fusions
    (done,) = tables["Cells that are done; the same command goes on"]
    assert (done["done"], done["hours"]) == (2 * data * seeds + fusions, pytest.approx(0.3))
    later = {c.rate for c in trained if c.what == fusion.FUSION and c.seed}
    assert later == {fusion.RATES[1]}
    points = {
        row["data"]: (pytest.approx(row["mean"]), pytest.approx(row["deviation"]), row["each"])
        for row in tables["Points that the fusion is above, by seed"]
        if row["over"] == fusion.OWN
    }
    assert points["movies"] == (2.0, 1.0, "+1.0, +2.0, +3.0")
    assert points["cola"] == (0.0, 0.0, "+0.0, +0.0, +0.0")
    chosen = {row["learning rate"] for row in tables["Test x 100"] if row["what"] == fusion.FUSION}
    assert chosen == {fusion.RATES[1]}
    measured = {row["claim"].partition(",")[0]: row["measured"] for row in tables["Wanted"]}
    assert measured == pytest.approx({"wnut17": -2.0, "cola": 0.0, "movies": -2.0})

    trained.clear()
    again = Report("fusion", "", tmp_path)
    fusion.run(again, False)
    assert not trained and again.rows == report.rows


def test_ablations_are_judged_as_in_the_paper(tmp_path, monkeypatch):
    """Without an upper layer, 3 points are lost and more with later seeds; below, 1 or none."""
    trained, cost = [], np.array([0.0, 1.0, 3.0, 3.0])

    def train(data, std, seed, rows, passes):
        trained.append((data, std, seed))
        if (data, std) == ("movies", 1.0):
            return {"stopped": "step 3", "seconds": 36.0}
        test = {1e-7: 80.2, 1e-2: 80.0, 1.0: 70.0}[std] + 0.01 * seed
        result = {"dev": {"accuracy": 0.8}, "test": {"accuracy": test / 100}, "seconds": 36.0}
        spans = [(a, b) for a in range(4) for b in range(a, 4)]
        lost = [[a, b, 0.8 - cost[a : b + 1].sum() / 100 - 0.001 * seed * b] for a, b in spans]
        more = {"without": lost} if std == ablations.OWN else {}
        return {**result, **more}

    monkeypatch.setattr(ablations, "train", train)
    report = Report("ablations", "", tmp_path)
    ablations.run(report, False)
    assert len(trained) == len({*trained}) == 2 * len(ablations.STDS) * len(ablations.SEEDS)
    tables = _tables(report)
    (done,) = tables["Cells that are done; the same command goes on"]
    assert (done["done"], done["hours"]) == (18, pytest.approx(0.18))
    shown = [(row["ours"], row["verdict"]) for row in tables["Claims"] if "wnut17" in row["how"]]
    assert shown == [
        ("0.0, 1.1, 3.2, 3.3 by layer; the most: 2.6 to 4.0", "not reproduced"),
        ("1.1 points without the lower 2, 6.3 without the upper; +4.7 to +5.7 more", "reproduced"),
        ("-0.2, -0.2 to -0.2", "reproduced"),
        ("+10.0, +10.0 to +10.0", "reproduced"),
    ]
    diverged = tables["Claims"][-1]
    assert diverged["ours"].startswith("+80.0") and diverged["verdict"] == "reproduced"
    (wnut17, _) = tables["Score x 100 on dev without any adapter"]
    assert (wnut17["trained"], wnut17["without"]) == pytest.approx((80.0, 72.7))
    assert (tmp_path / "ablations.png").read_bytes()[1:4] == b"PNG"

    trained.clear()
    again = Report("ablations", "", tmp_path)
    ablations.run(again, False)
    assert not trained and again.rows == report.rows


def test_layers_without_adapters_compute_as_if_they_had_none():
    """Their up-projections are zeros, which add nothing; what else trains stays."""
    leaves = {
        f"bert/layer_{layer}/{path}": np.full(2, 1.0 + layer)
        for layer in range(3)
        for path in (
            *(f"mlp/output/adapter/{part}/kernel" for part in ("down", "up")),
            "mlp/output/adapter/up/bias",
            "mlp_norm/scale",
        )
    }
    tree = unflatten(leaves)
    assert ablations.layers(tree) == [0, 1, 2]
    cut = {path for path, x in flatten(ablations.without(tree, 1, 2)).items() if not x.any()}
    ups = ("adapter/up/kernel", "adapter/up/bias")
    assert cut == {f"bert/layer_{layer}/mlp/output/{up}" for layer in (1, 2) for up in ups}


def test_cells_of_bases_and_batches_are_apart_and_a_lower_perplexity_is_better(tmp_path):
    row = {"rows": 8, "passes": 1.0, "data": "e2e", "recipe": "lora", "learning_rate": 1e-3}
    row |= {"seed": 0, "dev": {"perplexity": 4.0}, "test": {"perplexity": 5.0}}
    named = {"base": "llama", "batch": 4}
    lines = [row, row | named, row | named | {"dev": {}, "test": {}, "seed": 1}]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = cells.read(tmp_path / "cells.jsonl")
    assert rows[1]["score"] == {"dev": -math.log(4.0), "test": -math.log(5.0)}
    assert rows[2]["score"] == {"dev": -math.inf, "test": -math.inf}  # it diverged
    plain = cells.Cells("e2e", 8, "lora", (1e-3,), 1.0)
    assert plain.of(rows) == rows[:1]
    mine = replace(plain, base="llama", batch=4)
    assert mine.of(rows) == rows[1:2] and replace(mine, batch=2).of(rows) == []
    assert plain.name != mine.name
    assert mine.flags()[-8:-4] == ["--model", "llama", "--batch-size", "4"]
    assert "{prompt}\\n" in mine.flags()


def test_rules_of_lora_are_judged_by_losses_and_best_rates(tmp_path):
    report = Report("regret", "", tmp_path)

    def cells_of(rate, *losses):
        return [{"learning_rate": rate, "score": {"dev": -loss}} for loss in losses]

    same = 1.0, 1.001, 1.002
    best = {regret.ALL: cells_of(1e-3, *same), regret.FULL: cells_of(1e-4, *same)}
    (_, attention, mlp, *_), houlsby = regret.EQUAL.values(), regret.HOULSBY
    best |= {mlp: cells_of(1e-3, 0.9, 1.0, 1.2)}  # whose interval has 0 in it
    best |= {attention: cells_of(1e-3, 1.2, 1.21, 1.19), houlsby: cells_of(1e-3, 0.9, 0.91, 0.92)}
    best |= {regret.lora(r): cells_of(1e-3 * (1 + (r == 1)), 1.0) for r in regret.RANKS if r != 16}
    best |= {regret.lora(r, r): cells_of(1e-3 * r, 1.0) for r in regret.RANKS}
    shared = regret.BASE, "e2e", regret.BATCH, 1.0
    regret.judge(report, {(*shared, name): x for name, x in best.items()})
    higher = "the loss above that of all linear layers, equal parameters"
    blog = f"{regret.BLOG}: "
    verdicts = {row["claim"].removeprefix(blog): row["verdict"] for row in report.rows}
    other = [row["claim"][:9] for row in report.rows if blog not in row["claim"]]
    assert other == ["Houlsby's", "the best "]
    assert verdicts == {
        "the best rate is 10 times that of full fine-tuning": "reproduced",
        "LoRA's loss is that of full fine-tuning": "reproduced",
        f"LoRA on attention, r = 42: {higher}": "reproduced",
        f"LoRA on feed-forward layers, r = 26: {higher}": "undecided",
        f"Houlsby's adapters, m = 70: {higher}": "not reproduced",
        "the best rate does not depend on the rank (alpha = 32)": "reproduced",
        "the best rate does not depend on the rank (alpha = r)": "not reproduced",
    }


def test_the_bars_of_the_picture_are_students_interval():
    # t at 97.5 % with two degrees of freedom, by a table; the deviation of 1, 2 and 3 is 1.
    assert regret.half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, 1e-5)


def test_the_ratio_of_best_rates_is_judged_on_each_data_set(tmp_path):
    report = Report("regret", "", tmp_path)
    rates = {("e2e", regret.ALL): 2e-3, ("e2e", regret.FULL): 2e-4, ("gsm8k", regret.ALL): 4e-3}
    rates |= {("wikitext2", regret.ALL): 2e-3, ("wikitext2", regret.FULL): 4e-4}
    regret.judge(report, {
        (regret.BASE, data, regret.BATCH, 1.0, recipe): [
            {"learning_rate": rate, "seed": 0, "score": {"dev": -1.0}}
        ]
        for (data, recipe), rate in rates.items()
    })  # fmt: skip
    found = [(row["how"].split(", ")[0], row["ours"], row["verdict"]) for row in report.rows]
    assert found == [("e2e", "10", "reproduced"), ("wikitext2", "5", "reproduced")]


def test_the_rule_of_the_batch_compares_gaps_of_the_same_seeds(tmp_path):
    def judged(lora, full):
        report = Report("regret", "", tmp_path)
        losses = {(1, regret.ALL): (2.0, 2.1, 2.2), (1, regret.FULL): (1.9, 2.0, 2.09)}
        losses |= {(16, regret.ALL): lora, (16, regret.FULL): full}
        found = {
            (regret.BASE, "e2e", batch, 1.0, recipe): [
                {"learning_rate": 1e-3, "seed": seed, "score": {"dev": -loss}}
                for seed, loss in enumerate(each)
            ]
            for (batch, recipe), each in losses.items()
        }
        regret.judge(report, found)
        return [(r["ours"], r["verdict"]) for r in report.rows if "at a batch of 16" in r["claim"]]

    # Gaps of 0.3 to 0.32 at 16, and of 0.1 to 0.11 at 1; the losses differ by more with the seed.
    ((ours, verdict),) = judged((2.3, 2.91, 3.52), (2.0, 2.6, 3.2))
    assert ours.startswith("+0.207, ") and verdict == "reproduced"
    assert judged((2.05, 2.65, 3.26), (2.0, 2.6, 3.2))[0][1] == "not reproduced"
    assert judged((2.3,), (2.0,)) == []  # one seed decides nothing


def test_the_rules_of_the_width_are_judged_on_the_narrow_llamas(tmp_path):
    def judged(**rates):
        report = Report("regret", "", tmp_path)
        shared = "e2e", regret.NARROW_BATCH, 1.0
        found = {
            (regret.path(int(width[1:])), *shared, recipe): [
                {"learning_rate": rate, "seed": 0, "score": {"dev": -1.0}}
            ]
            for width, pair in rates.items()
            for recipe, rate in zip(regret.NARROW, pair, strict=False)
        }
        regret.judge(report, found)
        return [(row["how"], row["ours"], row["verdict"]) for row in report.rows]

    assert judged(w64=(8e-3,), w256=(4e-3,)) == []
    widths = "E2E, Llamas of 64, 512, rank 8"
    assert judged(w64=(8e-3,), w512=(2e-3,)) == [(widths, "4 times: 0.008, 0.002", "reproduced")]
    assert judged(w64=(8e-3,), w512=(4e-3,))[0][2] == "not reproduced"  # of 5.1 times
    (ratio,) = judged(w128=(8e-3, 4e-3))
    assert ratio[0].startswith("e2e, a Llama of 128, rank 8,")
    assert ratio[1:] == ("2", "not reproduced")


def test_the_base_takes_every_recipe_of_regret():
    """Here in a layer of the sizes of SmolLM2-135M; a training of hours would find it too late."""
    config = DecoderConfig(64, 576, 1536, 1, 9, 3)
    base, example = Decoder(config, rngs=nnx.Rngs(0)), (jnp.ones((1, 4), int),)
    asked = {each.recipe for each in regret.questions()} - {regret.FULL}
    assert len(asked) > 13
    for recipe in sorted(asked):
        made = read_candidate(recipe).method.build()
        aj.adapt(base, made, rngs=nnx.Rngs(1), example_inputs=example)  # raises if it does not fit


def test_the_rule_of_the_rank_is_judged_once_the_extremes_are_done(tmp_path):
    def judged(*ranks):
        report = Report("regret", "", tmp_path)
        shared = regret.BASE, "e2e", regret.BATCH, 1.0
        found = {regret.lora(rank): rate for rank, rate in ranks}
        cell = {"score": {"dev": -1.0}}
        regret.judge(
            report, {(*shared, r): [{**cell, "learning_rate": x}] for r, x in found.items()}
        )
        return [(row["ours"], row["how"], row["verdict"]) for row in report.rows]

    assert judged((1, 1e-3), (16, 1e-3), (64, 1e-3)) == judged((16, 1e-3), (192, 1e-3)) == []
    (found,) = judged((1, 1e-3), (16, 4e-3), (192, 2e-3))
    assert found == ("0.001, 0.004, 0.002", "ranks 1, 16, 192", "not reproduced")


def test_the_default_rate_is_compared_with_the_best_one(tmp_path):
    report = Report("regret", "", tmp_path)
    shared = regret.BASE, "e2e", regret.BATCH
    cell = {**dict(zip(regret.NAMES, shared, strict=False)), "recipe": regret.ALL, "seed": 0}
    rows = [
        {**cell, "passes": passes, "learning_rate": rate, "score": {"dev": -loss}}
        for passes, rate, loss in (
            *((1.0, 0.00065, 1.4), (1.0, 0.0013, 1.03), (1.0, 0.0026, 1.0)),
            *((3.0, 0.0013, 0.9), (3.0, 0.0026, 0.95)),
        )
    ]
    best = {(*shared, row["passes"], regret.ALL): [row] for row in rows[2:4]}
    regret.judge(report, best, rows)
    shown = [(row["claim"], row["measured"], row["met"]) for row in report.rows]
    claim = "loss on dev at the default rate / at the best of"
    assert shown == [
        (f"{claim} 3, LoRA, e2e, 1 pass", 1.03, False),
        (f"{claim} 2, LoRA, e2e, 3 passes", 1.0, True),
    ]


def test_an_interrupted_run_reports_the_best_rate_so_far(tmp_path):
    asked = cells.Cells("e2e", 400, regret.ALL, (1.3e-3,), 1.0, (0,), regret.BASE, 4)
    rows = [
        {
            **asked.shared,
            "recipe": regret.ALL,
            "seed": seed,
            "learning_rate": rate,
            "run": f"{rate}",
        }
        | {"score": {"dev": score}}
        for rate, seed, score in ((1.3e-3, 0, -1.2), (2.6e-3, 0, -1.1), (2.6e-3, 1, -1.3))
    ]
    assert replace(asked, seeds=regret.SEEDS).best(rows) == rows[1:]
    assert replace(asked, rows=800).best(rows) == []
    store = SimpleNamespace(rows=rows, root=tmp_path)
    metrics = tmp_path / asked.name / "cells" / "0.0013" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    lines = [{"step": i, "loss": float(i)} for i in range(24)] + [{"step": 24, "dev_loss": 9.0}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    regret._add_losses(store, asked)
    assert rows[0]["losses"] == [2 * i + 0.5 for i in range(12)]
    assert "losses" not in rows[1]


def test_an_interrupted_run_judges_nothing_by_a_rate_that_is_not_settled(tmp_path, monkeypatch):
    def line(recipe, rate, perplexity):
        shared = cells.Cells("e2e", 400, recipe, (rate,), 1.0, (0,), regret.BASE, 4).shared
        score = {"dev": {"perplexity": perplexity}, "test": {"perplexity": perplexity}}
        return {
            **shared,
            "recipe": recipe,
            "learning_rate": rate,
            "seed": 0,
            "run": "none",
            **score,
        }

    lines = [line(regret.ALL, rate, p) for rate, p in ((1e-3, 4), (1.3e-3, 3), (2.6e-3, 3.5))]
    lines += [line(regret.FULL, 1e-4, 3)]  # half and twice of it are not there
    path = tmp_path / "regret-cells.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(regret, "tuned", interrupted)
    report = Report("regret", "", tmp_path)
    regret.run(report, quick=False)
    of = [row for row in report.rows if row["table"] == "The best rate of each recipe"]
    assert [(row["recipe"], row["inside"]) for row in of] == [
        (regret.ALL, True),
        (regret.FULL, False),
    ]
    (claim,) = report.rows[3:]
    assert claim["met"] and "best of 3" in claim["claim"]
    assert (tmp_path / "regret.png").exists()


def test_the_table_of_methods_compares_parameters_and_memory(tmp_path, monkeypatch):
    both = [methods.Cell("LoRA, r = 32", remat) for remat in (False, True)]
    path = tmp_path / "methods-cells.jsonl"
    counted = {"trainable": 9_175_040, "file": 36_700_584, "memory": 80 * 2**30}
    lines = [
        {"cell": accelerators.cell_key(cell), **counted, "peak": peak * 2**30}
        for cell, peak in zip(both, (14, 7), strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(methods.Record, "compile", lambda self, cell: None)
    report = Report("methods", "", tmp_path)
    methods.run(report, quick=False)
    row, claim = report.rows
    assert (row["peak GiB"], row["recomputed"], row["MB"]) == (14.0, 7.0, 36.700584)
    assert claim["published"] == "9,175,040; 36.7; at most 20.8, mean 13.4"
    assert claim["ours"] == "9,175,040; 36.7; 14.0, recomputed 7.0"
    assert claim["verdict"] == "reproduced"
    path.write_text("".join(json.dumps({**x, "trainable": 1}) + "\n" for x in lines))
    other = Report("methods", "", tmp_path)
    methods.run(other, quick=False)
    assert other.rows[1]["verdict"] == "not reproduced"
