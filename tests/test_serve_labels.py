"""An encoder's server: its labels are those of each run alone, and adapters come and go."""

import contextlib
import dataclasses
import json
import threading

import pytest
from helpers.annotated import asked, labelled, tagged
from helpers.errors import raises
from helpers.finished import encoder_run, finished_run
from helpers.tiny import write_model
from starlette.testclient import TestClient

from adapters_jax.errors import UserError
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.serving.adapters import covering
from adapters_jax.finetune.serving.api import application
from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.finetune.serving.labels import EncoderBase, LabelApi, Labeller
from adapters_jax.finetune.serving.requests import BusyError

HERE, LIMITS = "http://127.0.0.1", Limits()


@contextlib.contextmanager
def labelling(folder):
    """A server of a tiny BERT with a classifier and a regression."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        of_words = encoder_run("--method lora --rank 2 --label label", "words")
        numbers = "--method houlsby --bottleneck-dim 3 --task regression --label stars"
        runs = {"words": folder / of_words, "numbers": folder / encoder_run(numbers, "numbers")}
        base = EncoderBase(str(folder / "tiny"), "pooler")
        read = {name: base.read(path) for name, path in runs.items()}
    engine = Labeller(base, base.bank(covering(read.values()), 2, 3), 12, queue=2, adapters=3)
    engine.start()
    for name, each in read.items():
        engine.put(name, engine.fit(name, (each.recipe, each.leaves)), each.about).result()
    with pytest.raises(UserError, match="a bank of 3 places: expected at least 4"):
        Labeller(base, base.bank(covering(read.values()), 2, 3), 12, queue=2, adapters=4)
    api = LabelApi(base, engine, "tiny", LIMITS)
    yield TestClient(application(api, "", LIMITS), HERE), runs, engine, base
    engine.close()
    with raises(BusyError, "shutting down"):
        engine.predict("words", [("good film", None)])


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    with labelling(tmp_path_factory.mktemp("labels")) as made:
        yield made


def plain(value):
    """A prediction whose numbers compare with a tolerance."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return pytest.approx(value, rel=1e-4) if isinstance(value, float) else value


@pytest.mark.weekly
def test_labels_are_those_of_the_runs_alone(labels):
    client, runs, *_ = labels
    texts = ["good film", "the plot was dull and very poor", "music"] * 4
    for name, path in runs.items():
        expected = [p.to_dict() for p in load_predictor(path).predict([(t, None) for t in texts])]
        answer = client.post("/predict", json={"model": name, "texts": texts})
        found = answer.json()["predictions"]
        for one, other in zip(found, expected, strict=True):
            assert plain(one) == plain(other)
    assert len({str(p) for p in found}) > 2


def test_adapters_of_an_encoder_come_and_go(labels):
    client, runs, engine, _ = labels
    folder = runs["words"]
    files = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    files["config.json"] = (folder / "config.json").read_bytes()
    put = lambda files: client.put(  # noqa: E731
        "/v1/adapters/new", files=[("files", each) for each in files.items()]
    )
    asked = {"texts": ["good film"]}
    assert put(files).status_code == 201
    first, second = (
        client.post("/predict", json={"model": name, **asked}).json()["predictions"]
        for name in ("words", "new")
    )
    assert first == second
    config = json.loads(files["config.json"])
    target = {**config["target"], "names": ["one", "two", "three"]}
    for changed, datum in [
        ({**config, "target": target}, "3 outputs"),
        ({**config, "target": 5}, "target"),
        ({**config, "max_length": 10**9}, "1000000000"),
        ({**config, "pooling": "mean"}, "mean"),
        ({**config, "base_sha256": "0" * 64}, "0000"),
    ]:
        answer = put({**files, "config.json": json.dumps(changed).encode()})
        assert answer.status_code == 400 and datum in answer.json()["error"]["message"]
    assert client.delete("/v1/adapters/new").status_code == 200
    assert client.post("/predict", json={"model": "new", **asked}).status_code == 404
    pair = {"model": "words", "texts": [["good", "film"]]}
    assert "single texts" in client.post("/predict", json=pair).json()["error"]["message"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = client.post(path, json={})
        assert answer.status_code == 400 and "encoder" in answer.json()["error"]["message"]
    assert list(engine.adapters) == ["words", "numbers"]


TASKS = {
    "multilabel": (labelled, "--pooling cls", ["the fine plot was bad", "dull music"]),
    "token-classification": (tagged, "", ["a good plot was dull", "a film"]),
    "question-answering": (asked, "", [["the plot", "a film and lovely music"]]),
}


@pytest.mark.weekly
@pytest.mark.parametrize("task", TASKS)
def test_every_task_with_a_head_is_served_as_its_run_alone(task, tmp_path, monkeypatch):
    write, flags, texts = TASKS[task]
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny")
    write(tmp_path / "rows.jsonl")
    words = f"--model tiny --train rows.jsonl --max-length 16 {flags} --method lora --rank 2"
    # Scores on dev; the threshold of multilabel belongs to its answers.
    run = tmp_path / finished_run(f"{words} --name run", {"f1": 0.5, "threshold": 0.9})
    alone = load_predictor(run)
    base = EncoderBase(
        str(tmp_path / "tiny"), json.loads((run / "config.json").read_text())["pooling"]
    )
    read = base.read(run)
    engine = Labeller(
        base, base.bank(covering([read]), read.about.readout.width + 1, 2), 16, 2, adapters=2
    )
    engine.start()
    engine.put("run", engine.fit("run", (read.recipe, read.leaves)), read.about).result()
    client = TestClient(application(LabelApi(base, engine, "tiny", LIMITS), "", LIMITS), HERE)
    answer = client.post("/predict", json={"model": "run", "texts": texts})
    engine.close()
    rows = [(text, None) if isinstance(text, str) else tuple(text) for text in texts]
    for one, other in zip(answer.json()["predictions"], alone.predict(rows), strict=True):
        assert plain(one) == plain(json.loads(json.dumps(other.to_dict())))


@contextlib.contextmanager
def held(engine):
    """While the block runs, all requests wait."""
    go_on = threading.Event()
    engine._thread.submit(go_on.wait)
    try:
        yield
    finally:  # also after a failure, or the engine could not be closed
        go_on.set()


@pytest.mark.slow
def test_requests_that_wait_are_computed_together_whatever_their_adapters(labels):
    _, runs, engine, _ = labels
    texts = {"words": "good film", "numbers": "the plot was dull and very poor"}
    before = engine.counts.steps
    with held(engine):
        futures = {name: engine.predict(name, [(text, None)] * 3) for name, text in texts.items()}
        assert engine.waiting == 2
        with raises(BusyError, 2):
            engine.predict("words", [("one more", None)])
    for name, future in futures.items():
        (expected, *_) = load_predictor(runs[name]).predict([(texts[name], None)] * 3)
        assert [plain(each) for each in future.result()] == [expected.to_dict()] * 3
    assert engine.counts.steps == before + 1


def test_a_cancelled_request_leaves_its_place_in_the_queue_at_once(labels):
    _, _, engine, _ = labels
    with held(engine):
        first, second = (engine.predict("words", [("good film", None)]) for _ in range(2))
        assert first.cancel()
        third = engine.predict("words", [("good film", None)])
    assert second.result() == third.result()


def test_a_request_that_cannot_be_answered_leaves_the_others(labels):
    _, _, engine, _ = labels
    with held(engine):
        bad = engine.predict("words", [("a", "pair")])
        good = engine.predict("words", [("good film", None)])
    with raises(UserError, "single texts"):
        bad.result()
    assert len(good.result()) == 1


def test_a_bug_reaches_who_waits_and_not_as_a_busy_server(labels, monkeypatch):
    _, _, engine, _ = labels

    def broken(*_):
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.adapters["words"].about.readout), "predictions", broken)
        future = engine.predict("words", [("good film", None)])
        with pytest.raises(ZeroDivisionError):
            future.result()
    assert len(engine.predict("words", [("good film", None)]).result()) == 1


def test_an_adapter_of_longer_texts_than_there_are_programs_for_is_refused(labels):
    _, runs, engine, _ = labels
    read = EncoderBase(str(runs["words"].parents[1] / "tiny"), "pooler").read(runs["words"])
    fitted = engine.fit("long", (read.recipe, read.leaves))
    with raises(UserError, 13, 12):
        engine.put("long", fitted, dataclasses.replace(read.about, max_length=13))


def test_the_base_labels_nothing_and_time_is_limited(labels):
    client, _, engine, base = labels
    answer = client.post("/predict", json={"model": "tiny", "texts": ["good film"]})
    assert answer.status_code == 400 and "adapter" in answer.json()["error"]["message"]
    limits = dataclasses.replace(LIMITS, seconds=1e-9)
    late = TestClient(application(LabelApi(base, engine, "tiny", limits), "", limits), HERE)
    several = {"model": "words", "texts": ["the plot was dull"] * 64}
    assert late.post("/predict", json=several).status_code == 408
    assert client.post("/predict", json=several).status_code == 200  # comes after it
    engine._thread.submit(int).result()  # its turn ends after its answer
    assert (engine.waiting, engine.running) == (0, 0)
