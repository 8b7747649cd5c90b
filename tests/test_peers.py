"""The peers' benchmark: equal work on JAX, failing peers as rows; PyTorch if it is installed."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.errors import raises

from adapters_jax.finetune.models.decoder import load_decoder
from benchmarks import __main__
from benchmarks.harness import Spread
from benchmarks.peers import contenders, files, generation, latency, linear, steps, uses
from benchmarks.peers.contenders import OURS, PEFT, QWIX, Contender, Group
from benchmarks.report import FIGURES, Report
from benchmarks.workers import HERE, PeerError, forget_peak, peak_bytes

WHY = "needs torch, transformers, peft and adapters: pip install 'adapters-jax[interop-test]'"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
]
TOY = replace(files.TOY, bert=replace(files.TOY.bert, num_hidden_layers=1))
TOY = replace(TOY, llama=replace(TOY.llama, num_hidden_layers=1))
TOY = replace(TOY, qwen=replace(TOY.qwen, num_hidden_layers=1))
JAX = {"ours", "hand", "nnx_lora", "qwix_lora"}
CASES = [("bert", "lora"), ("bert", "houlsby"), ("llama", "lora")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("peers")
    files.write(directory, TOY)
    files.write_decoder(directory, TOY, "qwen", "lora", "lora-all")
    return directory


def side(name, directory, task, model="bert", method="lora", **settings):
    job = replace(TOY.job(task, directory, model, method), **settings)
    return importlib.import_module(f"benchmarks.sides.{name}").make(job.as_json())


def checked(names, directory, model, method, **settings):
    """The sides of a step, after the check of the benchmark."""
    found = {
        name: side(name, directory, "step", model, method, **settings) for name in sorted(names)
    }
    losses = {name: step.losses(3) for name, step in found.items()}
    steps.check_equal(losses, {name: step.about["trainable"] for name, step in found.items()})
    return found, losses


@pytest.mark.weekly
@pytest.mark.parametrize(("model", "method"), CASES)
def test_sides_on_jax_do_equal_work(directory, model, method):
    names = JAX if method == "lora" else {"ours", "hand"}
    found, losses = checked(names, directory, model, method)
    counted = {name: step.analysis() for name, step in found.items()}
    extra = counted["ours"]["flops"] - counted["hand"]["flops"]
    # The derivatives of our activations, norms and softmax take a little more or less.
    slack = 0.03 * counted["hand"]["flops"]
    assert -slack <= extra <= 14 * found["ours"].about["trainable"] + slack
    assert all(0 < c["temporary"] < c["live"] < c["bytes"] for c in counted.values())
    first, _, third = losses["ours"]
    assert third < first


@pytest.mark.slow
def test_all_linear_layers_train_on_both_sides_and_in_chunks(directory):
    more = {"batch": 8, "length": 160, "chunked": True}  # chunks of 80 tokens
    found, losses = checked({"ours", "qwix_lora"}, directory, "qwen", "lora-all", **more)
    sizes, rank = TOY.qwen, TOY.rank
    d, m, heads = sizes.hidden_size, sizes.intermediate_size, 9 * sizes.head_dim
    axes = [(d, heads), *[(d, heads // 3)] * 2, (heads, d), (d, m), (d, m), (m, d)]
    assert found["ours"].about["trainable"] == sum(rank * (a + b) for a, b in axes)
    whole = side("ours", directory, "step", "qwen", "lora-all", **{**more, "chunked": False})
    assert whole.losses(3) == pytest.approx(losses["ours"], rel=1e-5)


@pytest.mark.slow
def test_a_tenant_has_the_losses_that_it_has_alone(directory):
    """The first tenant has the adapter of the file and the first half of the rows."""
    more = {"chunked": True}
    both = side("ours", directory, "step", "qwen", "lora-all", tenants=2, **more)
    alone = side("ours", directory, "step", "qwen", "lora-all", batch=4, **more)
    losses = np.array(both.losses(3))
    np.testing.assert_allclose(losses[:, 0], alone.losses(3), rtol=1e-5)
    assert np.all(np.abs(losses[:, 1] - losses[:, 0]) > 1e-4)
    assert both.about["trainable"] == 2 * alone.about["trainable"]
    steps.check_equal({"a": losses, "b": losses}, {})
    with raises(ValueError, "step 2"):
        steps.check_equal({"a": losses, "b": np.add(losses, [[0, 0], [0, 0], [0, 1]])}, {})


@pytest.mark.weekly
def test_generated_tokens_are_the_likeliest_and_lora_changes_them(directory):
    job = TOY.job("generate", directory, "qwen", "lora-all")
    job = replace(job, batch=3, length=5, tokens=4)
    works = importlib.import_module("benchmarks.sides.ours").make(job.as_json())
    tokens = {(OURS, variant): works.result(variant) for variant in generation.VARIANTS}
    model = load_decoder(job.base)[1]
    ids = job.data()["ids"]
    for _ in range(job.tokens):
        ids = np.concatenate([ids, np.argmax(model(ids)[:, -1:], -1)], 1)
    assert tokens[OURS, "base"] == ids[:, job.length :].tolist()
    other = {(PEFT, variant): found for (_, variant), found in tokens.items()}
    assert set(generation.check_equal({**tokens, **other}).values()) == {1.0}
    with raises(ValueError, (PEFT, "base"), 0.0):
        none = [[-1] * job.tokens] * job.batch
        generation.check_equal({**tokens, **other, (PEFT, "base"): none})
    with raises(ValueError, "changes no token", PEFT):
        base = tokens[OURS, "base"]
        generation.check_equal({**tokens, (PEFT, "base"): base, (PEFT, "LoRA"): base})


def test_our_step_beside_others_and_its_limits(tmp_path):
    """Twice as long as qwix's, half as long as q and v would have to be."""
    seconds = {OURS: [2.0, 2.0], QWIX: [1.0, 1.0], linear.FEWER: [4.0, 4.0]}
    counted = {OURS: 6.0, QWIX: 3.0, linear.FEWER: 5.0}
    found = {
        name: steps.Found(name, seconds, {}, {"steps": n, "flops": n, "temporary": n}, None)
        for name, n in counted.items()
    }
    report = Report("toy", "python -m benchmarks toy", tmp_path)
    linear.compare(report, "Qwen 3 of 8 layers, 32 x 128", found)
    rows = {row["beside"]: row for row in report.rows if "beside" in row}
    assert rows[QWIX]["time"] == Spread(2.0, 2.0, 2.0, 2)
    assert rows[QWIX]["temporary, by XLA"] == 2.0 and rows[QWIX]["bytes, by XLA"] is None
    claims = {row["claim"]: row["met"] for row in report.rows if row["table"] == FIGURES}
    assert claims == {
        "time of a step, all linear / q and v, Qwen 3 of 8 layers, 32 x 128": True,
        "temporaries of a step, all linear / q and v, Qwen 3 of 8 layers, 32 x 128": False,
    }


@pytest.mark.witness("generation")
@pytest.mark.weekly
@pytest.mark.parametrize("part", ["linear", "generation", "tenants"])
def test_a_part_runs_by_itself_and_without_its_peers(part, tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "Worker", Here)
    monkeypatch.setattr(files, "TOY", TOY)
    why = "could not be installed"
    monkeypatch.setattr(contenders, "unavailable", lambda name: None if name == HERE else why)
    assert __main__.main([f"peers-{part}", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / f"peers-{part}.json").read_text())["rows"]
    failed = {row["contender"].split(",")[0] for row in rows if row["table"] == contenders.FAILED}
    peers = {"linear": {PEFT, "SkyRL", "matmul"}, "generation": {PEFT}, "tenants": {"SkyRL"}}
    assert failed - {"matmul"} == peers[part] - {"matmul"}
    sides = [row["side"] for row in rows if row["table"] in ("Step", "Generation", "Tenants")]
    n = {"linear": 2 * 3, "generation": 2 * 2, "tenants": 2}
    assert len(sides) == n[part] and OURS in sides


@pytest.mark.filterwarnings("ignore")
def test_skyrl_does_the_same_work(directory):
    pytest.importorskip("tx", reason="needs skyrl-tx and jax<0.11 in this environment")
    for tenants in (1, 2):
        more = {"chunked": True, "tenants": tenants, "room": 2}
        checked({"ours", "skyrl"}, directory, "qwen", "lora-all", **more)


@pytest.mark.parametrize("name", ["nnx_lora", "qwix_lora"])
def test_a_side_names_what_it_does_not_support(directory, name):
    with raises(ValueError, "houlsby", "lora"):
        side(name, directory, "step", method="houlsby")
    found = side(name, directory, "uses")
    assert found.time("adapt") > 0
    with raises(ValueError, "switch", "adapt"):
        found.time("switch")


@pytest.mark.slow
def test_forward_passes_differ_by_their_adapters_alone(directory):
    found = side("ours", directory, "forward")
    logits = {(contenders.OURS, what): found.result(what) for what in found.works}
    latency.check_equal(logits)
    assert found.about["same"] and found.time("LoRA") > 0
    with raises(ValueError, ("PEFT", "LoRA")):
        latency.check_equal({**logits, ("PEFT", "LoRA"): logits[contenders.OURS, "base"]})


@pytest.mark.slow
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


@pytest.mark.weekly
def test_a_case_without_pytorch(directory, tmp_path, monkeypatch):
    """In processes, as benchmarks run."""
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
@pytest.mark.parametrize(("model", "method"), [*CASES, ("qwen", "lora-all")])
def test_pytorch_does_the_same_work(directory, model, method):
    for package in ("torch", "transformers", "peft", "adapters"):
        pytest.importorskip(package, reason=WHY)
    names = {"ours"} | ({"torch_peft"} if method != "houlsby" else set())
    names |= {"torch_adapters"} if method != "lora-all" else set()
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
