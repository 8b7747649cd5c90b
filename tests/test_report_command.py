"""`adapters-jax report`: pages from the files of runs and comparisons; nothing trains."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import command_of, command_raises
from helpers.reports import CONFIG, JUDGED, Page, write_compared, write_page

from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.report import findings
from adapters_jax.finetune.report.findings import read_findings, write_findings
from adapters_jax.finetune.run_directory import Run, RunConfigError, RunError
from adapters_jax.finetune.tasks.views import Judged

NEEDED = {"base_sha256": "0", "dtype": "float32", "max_length": 8, "pooling": "mean"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run with its page, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_page(tmp_path, {**CONFIG, **NEEDED})
    shutil.move("a run", "run")
    found = Run(Path("run"))
    found.write_config({**CONFIG, **NEEDED})
    return found


@pytest.mark.slow
def test_the_page_is_written_anew_from_the_files(run, capsys):
    before = Page(run.report.read_text()).sections
    run.report.unlink()
    run.curves.unlink()
    assert main(["report", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": "run/report.html"}
    after = Page(run.report.read_text()).sections
    for name in ("Classes", "Confusion matrix", "Highest losses on dev", "What was trained"):
        assert after[name] == before[name] != []
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    assert not (run.path / "lock").exists()


@pytest.mark.slow
def test_a_run_of_an_older_version_has_a_page_without_predictions(run):
    run.findings.unlink()
    assert main(["report", "run"]) == 0
    sections = Page(run.report.read_text()).sections
    assert "Results" in sections and "How to use it" in sections
    assert not {"Classes", "Lengths", "What was trained"} & sections.keys()


@pytest.mark.witness("{", "{}")
@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"rows": 1, "lengths": {}, "worst": [], "counts": {}}']
)
def test_damaged_findings_are_an_error(run, text):
    run.findings.write_text(text)
    with command_raises(RunError, run.findings, "remove"):
        assert main(["report", "run"]) == 2


@pytest.mark.slow
@pytest.mark.witness("damage0")
@pytest.mark.parametrize(
    "damage",
    [
        {"rows": {"dev": [], "test": [{"loss": 0.1}]}},
        {"rows": {"dev": [], "test": [{"gold": "none", "predicted": [1], "loss": 0.1}]}},
        {"lengths": {"train": [[-5, -3]]}},
        {"lengths": {"train": [[1, 1], [10**30, 2]]}},
        {"counts": {"dev": "x", "test": 1}},
        {"counts": {"test": 1}},
        {"trained": 3},
    ],
)
def test_findings_of_another_form_are_an_error(run, damage):
    run.findings.write_text(json.dumps({**json.loads(run.findings.read_text()), **damage}))
    with command_raises(RunError, run.findings, "remove"):
        assert main(["report", "run"]) == 2


def test_damaged_metrics_are_an_error(run):
    run.metrics.write_text("{\n")
    with command_raises(RunError, run.metrics):
        assert main(["report", "run"]) == 2


@pytest.mark.slow
def test_metrics_without_the_training_are_an_error(run):
    run.write_log([])
    with command_raises(RunError, run.metrics, "<lora>"):
        assert main(["report", "run"]) == 2


@pytest.mark.slow
def test_losses_that_are_not_finite_are_kept_and_shown(run):
    words = {"text": "t", "class": "no", "predicted": "yes"}
    values = (1.0, float("inf"), float("nan"), float("-inf"))
    rows = [{"gold": "no", "predicted": "no", "loss": x, "words": words} for x in values]
    counts = SimpleNamespace(rows=list, totals=list)
    write_findings(run, counts, Judged.of({}, dev=rows, test=rows))
    judged = read_findings(run).judged
    assert judged.column("dev", "loss") == [1.0, 1e30, 1e30, -1e30]
    assert [row["loss"] for row in judged.worst] == [1e30, 1e30, 1.0, -1e30]
    assert main(["report", "run"]) == 0


def test_what_has_no_page_is_an_error(run, tmp_path):
    with command_raises(RunConfigError, "none"):
        assert main(["report", "none"]) == 2
    run.write_config({k: v for k, v in {**CONFIG, **NEEDED}.items() if k != "summary"})
    with command_raises(RunError, "run", "--resume"):
        assert main(["report", "run"]) == 2
    Path("comparison.json").write_text("{}")
    with command_raises(RunError, "cells.jsonl"):
        assert main(["report", "."]) == 2
    Path("cells.jsonl").touch()
    with command_raises(RunError, "damaged"):
        assert main(["report", "."]) == 2
    assert not Path("comparison.html").exists()


def test_many_rows_are_kept_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "MOST", 2000)
    rows = [{"loss": float(i), "words": {"text": "x" * 1000}} for i in range(1000)]
    run, counts = Run(tmp_path), SimpleNamespace(rows=list, totals=list)
    write_findings(run, counts, Judged.of({}, dev=rows, test=rows[:10]))
    judged = read_findings(run).judged
    kept = judged.column("dev", "loss")
    assert 50 < len(kept) < 200 and kept[0] == 0.0 and kept[-1] > 980
    assert judged.column("test", "loss") == [float(i) for i in range(10)]
    assert judged.counts == {"dev": 1000, "test": 10}
    assert [row["loss"] for row in judged.worst] == [float(i) for i in range(999, 979, -1)]
    assert {len(row["words"]["text"]) for row in judged.worst} == {300}
    assert run.findings.stat().st_size < 20_000


@pytest.mark.slow
def test_what_is_kept_is_read_as_it_was(run):
    found = read_findings(run)
    assert found.judged == Judged(
        JUDGED.rows, {k: dict(v) for k, v in JUDGED.lengths.items()}, JUDGED.worst, JUDGED.counts
    )
    assert found.trained == [["w", "Unfreeze", "w [2, 3]", "2*3", "1", "6"]]


@pytest.mark.slow
def test_a_comparison_is_written_anew(tmp_path):
    out = tmp_path / "out"
    summary = write_compared(out)
    page = out / "comparison.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(out)]) == 0
    assert page.read_text() == before
    found = Page(before)
    assert found.sections["The same again"] == ["adapters-jax compare --train=b.csv --out=out"]
    assert found.sections["The best on dev, trained alone"] == [
        "adapters-jax finetune --train=b.csv"
    ]
    assert command_of(found.sections["The same again"][0]).out.name == "out"
    assert (
        command_of(found.sections["The best on dev, trained alone"][0]).data.train[0].name
        == "b.csv"
    )
    assert "How to use it" not in found.sections  # the cells are not there
    assert "A note." in found.words and "hu2021lora" in found.sections["How to cite it"][0]
    assert any("lora --rank 1: 128, 70.0 ± 1.0 %;" in label for label in found.labels)
    assert json.loads((out / "comparison.json").read_text()) == summary
