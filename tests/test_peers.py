"""The peers' benchmark: equal work on JAX, failing peers as rows; PyTorch if it is installed."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.errors import raises

from benchmarks.peers import contenders, files, latency, steps, uses
from benchmarks.peers.contenders import Contender, Group
from benchmarks.report import FIGURES, Report
from benchmarks.workers import HERE, PeerError, Worker, forget_peak, peak_bytes

WHY = "needs torch, transformers, peft and adapters: pip install 'adapters-jax[interop-test]'"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*")
TOY = replace(files.TOY, bert=replace(files.TOY.bert, num_hidden_layers=1))
TOY = replace(TOY, llama=replace(TOY.llama, num_hidden_layers=1))
JAX = {"ours", "hand", "nnx_lora", "qwix_lora"}
CASES = [("bert", "lora"), ("bert", "houlsby"), ("llama", "lora")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("peers")
    files.write(directory, TOY)
    return directory


def side(name, directory, task, model="bert", method="lora"):
    job = TOY.job(task, directory, model, method)
    return importlib.import_module(f"benchmarks.sides.{name}").make(job.as_json())


def checked(names, directory, model, method):
    """The sides of a step, after the check of the benchmark."""
    found = {name: side(name, directory, "step", model, method) for name in sorted(names)}
    losses = {name: step.losses(3) for name, step in found.items()}
    steps.check_equal(losses, {name: step.about["trainable"] for name, step in found.items()})
    return found, losses


@pytest.mark.witness("bert-lora")
@pytest.mark.parametrize(("model", "method"), CASES)
def test_sides_on_jax_do_equal_work(directory, model, method):
    names = JAX if method == "lora" else {"ours", "hand"}
    found, losses = checked(names, directory, model, method)
    counted = {name: step.analysis() for name, step in found.items()}
    extra = counted["ours"]["flops"] - counted["hand"]["flops"]
    # The derivatives of our activations, norms and softmax take a little more or less.
    slack = 0.03 * counted["hand"]["flops"]
    assert -slack <= extra <= 14 * found["ours"].about["trainable"] + slack
    assert all(0 < c["temporary"] < c["live"] for c in counted.values())
    first, _, third = losses["ours"]
    assert third < first


@pytest.mark.parametrize("name", ["nnx_lora", "qwix_lora"])
def test_a_side_names_what_it_does_not_support(directory, name):
    with raises(ValueError, "houlsby", "lora"):
        side(name, directory, "step", method="houlsby")
    found = side(name, directory, "uses")
    assert found.time("adapt") > 0
    with raises(ValueError, "switch", "adapt"):
        found.time("switch")


def test_forward_passes_differ_by_their_adapters_alone(directory):
    found = side("ours", directory, "forward")
    logits = {(contenders.OURS, what): found.result(what) for what in found.works}
    latency.check_equal(logits)
    assert found.about["same"] and found.time("LoRA") > 0
    with raises(ValueError, ("PEFT", "LoRA")):
        latency.check_equal({**logits, ("PEFT", "LoRA"): logits[contenders.OURS, "base"]})


def test_a_switch_gives_each_adapters_logits_and_is_not_compiled(directory):
    found = side("ours", directory, "uses", method="houlsby")
    logits = []
    for _ in range(3):
        logits.append(found.result("forward"))
        found.time("switch")
    assert logits[0] == logits[2] != logits[1]
    assert found.result("traces") == 1
    assert all(found.time(what) > 0 for what in uses.USES)


def test_unequal_work_is_not_timed():
    equal = {"a": [0.7, 0.6], "b": [0.7, 0.6003]}
    steps.check_equal(equal, {"a": 9, "b": 9})
    with raises(ValueError, {"a": 9, "b": 8}, "step 0", 0.7001):
        steps.check_equal({**equal, "b": [0.7001, 0.6]}, {"a": 9, "b": 8})
    with raises(ValueError, "step 1", "nan"):
        steps.check_equal({**equal, "b": [0.7, float("nan")]}, {"a": 9, "b": 9})


class Stub:
    """A worker; "sides.none" cannot start, and "sides.weak" dies in its third run."""

    def __init__(self, environment, side, job, env):
        if side == "sides.none":
            raise PeerError("No module named 'none'")
        self.about, self.runs, self.fails = {"versions": {side: "1"}}, 0, side == "sides.weak"

    def ask(self, what, /, **arguments):
        self.runs += 1
        if self.fails and self.runs == 3:
            raise PeerError("ended with status -9")
        return float(self.runs)

    def close(self):
        pass


def test_failing_peers_become_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "Worker", Stub)
    report = Report("toy", "python -m benchmarks toy", tmp_path)
    with Group(report, "a toy") as group:
        names = {name: Contender(name) for name in ("good", "weak", "none")}
        group.start(names, TOY.job("step", tmp_path))
        seconds = group.time({name: (name, {}) for name in names}, rounds=4)
    assert seconds == {"good": [2.0, 3.0, 4.0, 5.0]}
    rows = [row for row in report.rows if row["table"] == contenders.FAILED]
    assert [(row["contender"], row["why"]) for row in rows] == [
        ("none", "No module named 'none'"),
        ("weak", "ended with status -9"),
    ]
    assert [row["side"] for row in report.rows if row["table"] == "Versions"] == ["good", "weak"]


class Here:
    """A worker in this process, instead of one of its own."""

    def __init__(self, environment, side, job, env):
        self.made = importlib.import_module(f"benchmarks.{side}").make(job)
        self.about = self.made.about

    def ask(self, what, /, **arguments):
        own = {"peak": peak_bytes, "forget_peak": forget_peak, "run": self.run}
        return own[what]() if what in own else getattr(self.made, what)(**arguments)

    def run(self):
        self.made.run()
        return 1.0

    def close(self):
        self.made = None


@pytest.mark.parametrize("worker", [Here, pytest.param(Worker, marks=pytest.mark.slow)])
def test_a_case_without_pytorch(directory, tmp_path, monkeypatch, worker):
    monkeypatch.setattr(contenders, "Worker", worker)
    absent = {contenders.TORCH: "torch could not be installed", HERE: None}
    monkeypatch.setattr(contenders, "unavailable", absent.get)
    some = {name: contenders.CONTENDERS[name] for name in ("adapters_jax", "PEFT")}
    monkeypatch.setattr(steps, "CONTENDERS", some)
    report = Report("toy", "python -m benchmarks toy", tmp_path)
    steps.run_case(report, "LoRA, BERT-base", TOY.job("step", directory), rounds=2)
    report.finish()
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    sides = [row["side"] for row in rows if row["table"] == "Step"]
    assert sides == ["adapters_jax", "adapters_jax, malloc kept"]
    failed = [row["contender"] for row in rows if row["table"] == contenders.FAILED]
    assert failed == ["PEFT", "matmul, torch"]
    assert (tmp_path / "toy.png").exists()
    step = next(row for row in rows if row["table"] == "Step")
    assert 0 < step["temporary MiB by XLA"] < step["peak MiB, steps alone"]
    claims = [row["claim"] for row in rows if row["table"] == FIGURES]
    assert claims == ["rate of a 256^3 matmul / rate of a step, LoRA, BERT-base"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "method"), CASES)
def test_pytorch_does_the_same_work(directory, model, method):
    for package in ("torch", "transformers", "peft", "adapters"):
        pytest.importorskip(package, reason=WHY)
    names = {"ours", "torch_adapters"} | ({"torch_peft"} if method == "lora" else set())
    checked(names, directory, model, method)


@pytest.mark.filterwarnings("ignore")
def test_pytorch_has_the_same_logits_and_switches(directory):
    for package in ("torch", "transformers", "peft", "adapters"):
        pytest.importorskip(package, reason=WHY)
    names = {contenders.OURS: "ours", "PEFT": "torch_peft", "AdapterHub": "torch_adapters"}
    found = {name: side(module, directory, "forward") for name, module in names.items()}
    latency.check_equal(
        {(name, what): works.result(what) for name, works in found.items() for what in works.works}
    )
    for module in ("torch_peft", "torch_adapters"):
        works = side(module, directory, "uses")
        first = works.result("forward")
        works.time("switch")
        second = works.result("forward")
        works.time("switch")
        assert works.result("forward") == first
        assert not np.allclose(first, second, 0, 1e-4)
        assert all(works.time(what) > 0 for what in uses.USES)
