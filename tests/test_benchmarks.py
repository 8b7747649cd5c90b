"""The arithmetic of the benchmarks, and equal work of our steps and those written by hand."""

import importlib
import json
import os
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest
from flax import nnx
from helpers.errors import raises
from helpers.programs import operations

from benchmarks import (
    __main__,
    harness,
    llama,
    paths,
    readme,
    scale,
    step,
    tracing,
    tunix_llama,
    workers,
)
from benchmarks.harness import Spread
from benchmarks.report import Report, _processor

pytestmark = pytest.mark.slow


def test_spread_and_ratio():
    assert Spread.of([5.0, 1.0, 2.0, 4.0]) == Spread(3.0, 1.75, 4.25, 4)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    with raises(ValueError, "Spread.of"):
        Spread.of([])
    # Round by round: the ratio of the medians would be 20 / 10.
    seconds = {"a": [1.0, 20.0, 60.0], "b": [1.0, 10.0, 20.0]}
    assert harness.ratio(seconds, "a", "b") == Spread(2.0, 1.5, 2.5, 3)


def test_interleave_takes_turns_and_drops_the_warmup():
    order, now = [], [0.0]

    def contender(name, took):
        def run():
            order.append(name)
            now[0] += took

        return run

    contenders = {"a": contender("a", 1.0), "b": contender("b", 10.0), "own": lambda: 7.5}
    seconds = harness.interleave(contenders, rounds=9, warmup=1, clock=lambda: now[0])
    assert seconds == {"a": [1.0] * 9, "b": [10.0] * 9, "own": [7.5] * 9}
    pairs = [tuple(order[i : i + 2]) for i in range(0, 20, 2)]
    assert {*pairs} == {("a", "b"), ("b", "a")}  # once a round, and none is always the first


def test_fresh_interpreter():
    assert harness.fresh("import benchmarks; print(6 * 7)").stdout == "42\n"
    with raises(RuntimeError, "no_such_name"):
        harness.fresh("no_such_name")


def test_quick_run_of_a_toy(monkeypatch, tmp_path, capsys):
    toy = types.ModuleType("benchmarks.toy")

    def run(report, quick):
        seconds = harness.interleave({"x": lambda: 2.0, "y": lambda: 1.0}, rounds=3 if quick else 9)
        report.samples("toy", seconds)
        for name, values in seconds.items():
            report.add("Times", name=name, seconds=Spread.of(values), bytes=12345)
        report.claim("x / y", harness.ratio(seconds, "x", "y"), 1.5)
        report.claim("y / x", harness.ratio(seconds, "y", "x"), 1.5)

    toy.run = run
    monkeypatch.setitem(sys.modules, "benchmarks.toy", toy)
    monkeypatch.setitem(__main__.BENCHMARKS, "toy", "a toy")
    assert __main__.main(["toy", "--quick", "--out", str(tmp_path)]) == 0

    lines = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    whole = json.loads((tmp_path / "toy.json").read_text())
    assert lines[0] == {key: value for key, value in whole.items() if key != "rows"}
    assert lines[1] == {"samples": "toy", "seconds": {"x": [2.0] * 3, "y": [1.0] * 3}}
    assert lines[2:] == whole["rows"]
    assert whole["rows"][0]["seconds"] == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 3}
    assert [row["met"] for row in whole["rows"][2:]] == [False, True]
    assert whole["command"] == "python -m benchmarks toy --quick"
    assert whole["versions"]["jax"] == jax.__version__

    text = (tmp_path / "toy.md").read_text()
    assert text + "\n" == capsys.readouterr().out
    assert "| x | 2 [2, 2] | 12,345 |\n| y | 1 [1, 1] | 12,345 |" in text
    assert "| x / y | 2 [2, 2] | 1.5 | no |" in text


def test_paths_of_two_toy_files(tmp_path):
    (tmp_path / "low.py").write_text("def one(x): return x\ndef many(): yield from (1, 2)\n")
    lines = ["def top(): return [one(x) for x in many()], later(), list(map(one, 'ab'))"]
    lines += ["def later(): return (lambda: one(3))()"]
    (tmp_path / "high.py").write_text("\n".join(["from low import one, many", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        high = importlib.import_module("high")
    found = paths.profiled(lambda: json.dumps(high.top()[0]), f"{tmp_path}{os.sep}")
    names = {"high.py": ("top", "later"), "low.py": ("one", "many")}
    assert found.functions == {(file, name) for file in names for name in names[file]}
    # `many` is entered once and resumed twice; what `map` calls is called by `top`.
    assert found.moves == {("high.py", "low.py"): 3 + 2 + 1 + 2}
    assert found.sizes() == (2, 4, 8)


def test_command_line(capsys):
    assert __main__.main([]) == 0
    assert "\nstep " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        __main__.main(["stpe"])
    assert stop.value.code == 2
    known = ", ".join(__main__.BENCHMARKS)
    line = capsys.readouterr().err
    assert "stpe" in line and known in line
    assert list(__main__.BENCHMARKS) == sorted(__main__.BENCHMARKS)
    with pytest.raises(SystemExit) as stop:
        __main__.main(["--help"])
    assert stop.value.code == 0
    assert "python -m benchmarks step --quick" in capsys.readouterr().out


def test_report_writes_rows_as_they_come(tmp_path):
    report = Report("half", "python -m benchmarks half", tmp_path)
    report.add("Table", name="first")
    assert json.loads((tmp_path / "half.jsonl").read_text().splitlines()[1])["name"] == "first"
    assert not (tmp_path / "half.json").exists()


@pytest.mark.weekly
@pytest.mark.parametrize(
    "case", step.cases(replace(step.TINY, layers=1), m=8), ids=lambda c: c.name
)
def test_ours_and_by_hand_do_equal_work(case):
    sides = step.sides(case)
    step.check_equal(sides)
    for api in ("linen", "NNX"):
        # Ours also has the gradient's norm and keeps the state where it is not finite: work that
        # grows with the adapters alone, a few operations a parameter.
        ours, hand = sides[api, "ours"], sides[api, "by hand"]
        # The derivatives of our BERT's activations and softmax take a little less.
        assert -0.03 * hand.flops <= ours.flops - hand.flops <= 14 * ours.trainable


@pytest.mark.weekly
def test_the_decoder_by_hand_does_equal_work():
    size = llama.Size(replace(llama.TINY, num_hidden_layers=2), batch=2, length=6)
    base, ids = llama.Decoder(size.config, rngs=nnx.Rngs(0)), size.ids(size.length)
    for recipe in size.recipes.values():
        model = llama.adapted(base, recipe)
        sides = {"ours": llama.ours(model, ids), "by hand": llama.by_hand(model, size.config, ids)}
        llama.check_equal(sides)
        ours, hand = sides.values()
        assert -0.03 * hand.flops <= ours.flops - hand.flops <= 14 * ours.trainable


@pytest.mark.skipif(bool(tunix_llama.missing()), reason="needs google-tunix and qwix")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what tunix and qwix use
def test_ours_and_qwix_do_equal_work_on_the_llama_of_tunix():
    sides = tunix_llama.sides(tunix_llama.TOY)
    llama.check_equal(sides)
    assert sides["ours"].flops <= sides["qwix"].flops
    assert sides["ours"].bytes <= sides["qwix"].bytes
    # At these sizes what norms compute again shows.
    assert sides["ours, our decoder"].flops <= 1.01 * sides["qwix"].flops
    assert sides["ours, our decoder"].bytes <= sides["qwix"].bytes


def test_packages_that_are_missing_are_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(tunix_llama, "PACKAGES", {"no_such_module": "no-such-package"})
    report = Report("toy", "toy", tmp_path)
    tunix_llama.run_steps(report)
    assert "pip install no-such-package" in report.rows[0]["skipped"]


def test_layers_traced_by_hand_have_the_operations_of_ours():
    sides = tracing.nnx_sides(layers=1)
    names = tracing.BASE, "LoRA on all linear layers", tracing.HAND
    base, ours, hand = (operations(sides[name].trace("outputs")) for name in names)
    assert hand - base == {"dot_general": 14, "mul": 7, "add": 7}
    # Beside the products, how a CPU computes and stores them, and what it computes again.
    forms = dict.fromkeys(("name", "optimization_barrier"), 7) | {"remat2": 1}
    forms |= dict.fromkeys(("platform_index", "cond", "reshape"), 14)
    assert ours - hand == forms
    assert not hand - ours


@pytest.mark.weekly
@pytest.mark.parametrize("api", ["linen", "NNX"])
def test_the_program_of_scanned_layers_does_not_grow(api):
    def lines(deep):
        return deep.lower(deep.state()).as_text().count("\n")

    few, many, two, three = (
        lines(scale.Deep(api, n, scan))
        for n, scan in ((2, True), (5, True), (2, False), (3, False))
    )
    assert few == many
    assert three > 1.1 * two


class Stub:
    def __init__(self, trainable, losses):
        self.trainable, self.losses, self.loss = trainable, iter(losses), None

    def __call__(self):
        self.loss = next(self.losses)


def test_unequal_work_is_not_timed():
    def check(*sides):
        step.check_equal(dict(zip(("ours", "by hand"), sides, strict=True)), steps=2)

    check(Stub(9, [0.7, 0.6]), Stub(9, [0.7000001, 0.6]))
    counts = {"ours": 8, "by hand": 9}
    with raises(ValueError, f"trainable parameters {counts}", "step 1", 0.6001) as caught:
        check(Stub(8, [0.7, 0.6]), Stub(9, [0.7, 0.6001]))
    assert "step 0" not in str(caught.value)
    with raises(ValueError, "step 0", "nan"):
        check(Stub(9, [float("nan")] * 2), Stub(9, [0.7, 0.6]))


def test_a_worker_answers_times_itself_and_fails_with_one_line(tmp_path, monkeypatch):
    side = tmp_path / "benchmarks" / "toy_side.py"
    side.parent.mkdir()
    (side.parent / "__init__.py").touch()
    for name in ("harness", "workers"):
        text = (harness.ROOT / "benchmarks" / f"{name}.py").read_text()
        (side.parent / f"{name}.py").write_text(text)
    side.write_text(
        "class Toy:\n"
        "    def __init__(self, job):\n"
        "        print('noise of a library')\n"
        "        self.about = {'twice': 2 * job['n']}\n"
        "    def run(self):\n"
        "        self.kept = None; self.kept = bytearray(64 << 20)\n"
        "    def add(self, a, b):\n"
        "        return a + b\n"
        "    def fail(self):\n"
        "        raise ValueError('no such job')\n"
        "make = Toy\n"
    )
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    worker = workers.Worker(workers.HERE, "toy_side", {"n": 21})
    assert worker.about == {"twice": 42}
    assert worker.ask("add", a=1, b=2) == 3
    before = worker.ask("peak")
    assert 0 < worker() < 10
    worker.ask("forget_peak")
    assert worker.ask("peak") - before > 60 << 20
    with pytest.raises(workers.PeerError) as caught:
        worker.ask("fail")
    assert str(caught.value) == "ValueError: no such job"
    worker.close()


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A list of packages, one of which does not exist."""
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    monkeypatch.setattr(workers, "PEERS", tmp_path)
    (tmp_path / "none.txt").write_text("./no-such-package\n")
    return "none"


@pytest.mark.weekly
def test_pip_cannot_install_a_package_that_does_not_exist(peer):
    with raises(workers.PeerError, peer, "no-such-package"):
        workers.interpreter(peer)


def test_an_environment_is_used_only_after_it_was_installed(peer, tmp_path, monkeypatch):
    """The interpreter of a failed installation exists, and must not be used."""
    ran = []

    def run(command, **_):
        ran.append(command[2])
        if command[2] == "venv":
            Path(command[-1]).mkdir(exist_ok=True)
        failed = command[2] == "pip" and len(ran) < 5
        error = "\nno-such-package\n" if failed else "a warning"
        return types.SimpleNamespace(returncode=int(failed), stdout="", stderr=error)

    monkeypatch.setattr(workers.subprocess, "run", run)
    for _ in range(2):
        with raises(workers.PeerError, peer, "no-such-package"):
            workers.interpreter(peer)
    assert ran == ["venv", "pip"] * 2
    for _ in range(2):
        python = Path(workers.interpreter(peer))
        assert (python.name, python.parents[2]) == ("python", tmp_path)
    assert ran == ["venv", "pip"] * 3


def test_a_processor_has_family_and_model_beside_its_name(monkeypatch):
    lines = {"model name": "AMD EPYC", "cpu family\t": "25", "model\t": "17"}
    monkeypatch.setattr("benchmarks.report._read", lambda path, key: lines[key])
    assert _processor() == "AMD EPYC, family 25, model 17"
    lines["model\t"] = ""
    assert _processor() == "AMD EPYC"


def test_panels_are_drawn(tmp_path):
    report = Report("drawn", "python -m benchmarks drawn", tmp_path)
    report.verdict("a claim", "1.33", "1.4", "a step", "in part")
    report.panel("Step", "ms", {"ours": Spread(2.0, 1.5, 2.5, 3), "theirs": 3}, ours=["ours"])
    assert "| a claim | 1.33 | 1.4 | a step | in part |" in report.finish()
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (readme.PAGES / "index.md", readme.summary),
        *((readme.PAGES / f"{page}.md", partial(readme.section, page)) for page in readme.SHOWN),
        (readme.README, readme.compared),
        (readme.DEVICES, readme.accelerators),
        (readme.TASKS, readme.tasks),
        (readme.PEFT, readme.peft),
    ],
)
def test_the_pages_have_the_results_that_are_committed(page, text):
    assert page.read_text().split(readme.BEGIN)[1].split(readme.END)[0].strip() == text()


def test_the_pages_of_results(tmp_path):
    def measured(name):
        report = Report(name, f"python -m benchmarks {name}", tmp_path)
        report.verdict("adapters are free", "+0 %", "+3 %", "a forward", "not reproduced")
        report.claim(f"int8 of {name}", Spread(0.5, 0.4, 0.6, 3), 0.65)
        report.claim("bytes", 7.0, 6.0)
        report.finish()

    for name in ("bank", "accelerators"):
        measured(name)
    text = readme.section("many", tmp_path)
    assert (
        "`python -m benchmarks bank`. All tables: [bank](../../benchmarks/results/bank.md)" in text
    )
    assert "| adapters are free | +0 % | +3 % | a forward | not reproduced |" in text
    assert "| int8 of bank | 0.65 | 0.5 [0.4, 0.6] |" in text
    assert text.count("| bytes | 6 | 7 **(above)** |") == 1
    halves = [readme.section(page, tmp_path) for page in ("accelerators", "quantised")]
    assert ["bytes" in half for half in halves] == [True, False]  # each row once
    assert ["int8" in half for half in halves] == [False, True]
    assert ["adapters are free" in half for half in halves] == [True, False]

    rows = readme.summary(tmp_path).splitlines()
    assert rows[0] == "2 of 4 figures are within their limits."
    assert rows[4:] == [
        "| [Many adapters over one base](many.md) | 1 of 2 |  |  |  | 1 |",
        "| [Accelerators](accelerators.md) | 0 of 1 |  |  |  | 1 |",
        "| [Layers and quantised bases on accelerators](quantised.md) | 1 of 1 |  |  |  |  |",
    ]
    measured("new")
    with raises(ValueError, "new", "SHOWN"):
        readme.summary(tmp_path)


def test_pages_are_written_between_their_marks(tmp_path):
    pages = [tmp_path / f"{name}.md" for name in ("index", *readme.SHOWN)]
    for page in pages:
        page.write_text(f"above\n{readme.BEGIN}\nold\n{readme.END}\nbelow\n")
    results = tmp_path / "results"
    report = Report("bank", "python -m benchmarks bank", results)
    report.claim("bytes", 5.0, 6.0)
    report.finish()
    readme.write(pages=tmp_path, results=results)
    texts = {page.stem: page.read_text() for page in pages}
    text = readme.section("many", results)
    assert texts["many"] == f"above\n{readme.BEGIN}\n\n{text}\n\n{readme.END}\nbelow\n"
    assert "1 of 1" in texts["index"]
    pages[1].write_text("no marks")
    with raises(ValueError, pages[1], readme.BEGIN, readme.END):
        readme.write(pages=tmp_path, results=results)
    assert pages[1].read_text() == "no marks"


def test_the_readme_compares_what_was_measured(tmp_path):
    """A part of `peers` that has results adds its rows, in the column of its processor."""
    for name, of in (
        ("peers", "peers"),
        ("peers-linear-zen5", "peers-linear"),
        ("peers-linear", "peers-linear"),
    ):
        report = Report(name, f"python -m benchmarks {name}", tmp_path)
        for i, claim in enumerate(readme.COMPARED[of]):
            report.claim(claim, i + (1.5 if name.endswith("zen5") else 0.5), 1.0)
        report.finish()
    rows = readme.compared(tmp_path).splitlines()
    assert rows[0] == f"| figure | {readme.ZEN4} | {readme.ZEN5} |"
    assert rows[2:4] == [
        f"| {readme.COMPARED['peers'][0]} | 0.5 |  |",
        f"| {readme.COMPARED['peers'][1]} | 1.5 |  |",
    ]
    assert rows[-1] == f"| {readme.COMPARED['peers-linear'][-1]} | 2.5 | 3.5 |"
    assert len(rows) == 2 + sum(len(readme.COMPARED[n]) for n in ("peers", "peers-linear"))


@pytest.mark.weekly
def test_files_may_be_read_before_they_are_written_in_a_round(tmp_path):
    """Every round has an order of its own; the whole runs at toy sizes."""
    assert __main__.main(["files", "--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "files.json").read_text())["rows"]
