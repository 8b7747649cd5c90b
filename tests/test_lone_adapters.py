"""Adapters as files: `finetune --init-from` starts with one, and commands use one without a run."""

import contextlib
import io
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from helpers.errors import raises
from helpers.finished import finished_run
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews
from safetensors.numpy import load_file, save_file

import adapters_jax as aj
from adapters_jax.errors import AdapterMismatchError, MismatchError, OtherBaseError, UserError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.merging import save_encoder
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.trees import flatten

LORA = ("--method", "lora", "--rank", 2, "--alpha", 6)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, rows, and a finished run of each kind of base, with random adapters."""
    place = tmp_path_factory.mktemp("starting")
    write_model(place / "tiny")
    write_reviews(place / "reviews.jsonl")
    write_llama(place / "llama", num_hidden_layers=1)
    write_meanings(place / "meanings.csv")
    untrained(place, "first", *LORA)
    untrained(place, "decoder", *LORA)
    return place


def untrained(place, name, *flags):
    """Makes a finished run with a random adapter."""
    scores = {"accuracy": 0.75, "f1": 0.8, "perplexity": 2.5}
    finished_run(" ".join(flags_of(place, name, *flags)), scores)


def flags_of(place, name, *flags):
    decoder = "decoder" in name
    rows = (
        "--train",
        place / "meanings.csv",
        "--prompt",
        "mr",
        "--completion",
        "ref",
        "--exact-match",
        0,
        "--batch-size",
        2,
    ) * decoder
    if "--train" in flags:
        rows = (*("--text", "review") * ("--task" not in flags), "--batch-size", 16)
    rows = rows or ("--train", place / "reviews.jsonl", "--text", "review", "--batch-size", 16)
    own = ("--model", place / ("llama" if decoder else "tiny"), "--runs", place, "--name", name)
    shared = (
        "--max-length",
        64 if decoder else 8,
        "--epochs",
        0.2,
        "--no-baselines",
        "--limit",
        64,
    )
    return [*map(str, (*own, *rows, *shared, "--learning-rate", 0.01, *flags))]


def finetune(place, name, *flags):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = main(["finetune", *flags_of(place, name, *flags)])
    return status, err.getvalue()


def prepared(place, name, *flags):
    """The job of a run that is not begun."""
    return parse(Finetune, flags_of(place, name, *flags)).prepare(Console(json=True))


def began(job):
    """The recipe of a run and its adapter's arrays before the first step; the run is removed."""
    job.unlock()
    shutil.rmtree(job.run.path)
    problem = job.problem
    state = aj.TrainState.create(
        problem.model, problem.params, tx=optax.sgd(0.1), key=jax.random.key(0)
    )
    return problem.recipe, {path: np.asarray(x) for path, x in flatten(state.adapters).items()}


def stored(run):
    return load_file(run / "adapter" / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "inside", "flags"),
    [("first", "", ()), ("first", "adapter/adapter.safetensors", LORA), ("decoder", "adapter", ())],
)
def test_a_run_starts_with_the_arrays_and_the_recipe_of_an_adapter(place, kind, inside, flags):
    job = prepared(place, f"{kind}-again", "--init-from", place / kind / inside, *flags)
    recipe, leaves = began(job)
    expected = stored(place / kind)
    assert leaves.keys() == expected.keys() and any(np.any(x) for x in expected.values())
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert {method.scale_at("") for method in recipe.attached} == {3.0}


@pytest.mark.slow
def test_a_run_starts_with_an_adapter_of_peft(place):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["convert", f"{place}/decoder", f"{place}/peft", "--to", "peft"]) == 0
    _, leaves = began(prepared(place, "decoder-peft", "--init-from", place / "peft"))
    for path, leaf in stored(place / "decoder").items():
        np.testing.assert_array_equal(leaves[path], leaf)


def test_an_encoder_without_a_head_gets_a_new_one(place):
    command("convert", place / "first", place / "headless", "--to", "peft")
    recipe, leaves = began(prepared(place, "new-head", "--init-from", place / "headless"))
    assert recipe.trains("head/kernel") and leaves["head/kernel"].shape == (32, 2)
    before = stored(place / "first")
    assert not np.array_equal(leaves["head/kernel"], before["head/kernel"])
    path = "bert/layer_0/attention/query/lora/b"
    np.testing.assert_array_equal(leaves[path], before[path])


@pytest.mark.slow
def test_a_run_without_steps_to_speak_of_scores_as_the_one_before(place):
    assert finetune(place, "trained", *LORA)[0] == 0
    small = ("--learning-rate", 1e-12, "--head-learning-rate", 1e-12)
    status, err = finetune(place, "same", "--init-from", place / "trained", *small)
    assert status == 0, err
    before, after = (
        json.loads((place / n / "config.json").read_text()) for n in ("trained", "same")
    )
    assert after["summary"]["dev"] == before["summary"]["dev"]
    assert (before["method"], after["method"]) == ("lora", "from-trained")
    assert after["recipe"] == before["recipe"]
    page = (place / "same" / "report.html").read_text()
    assert "--init-from" in page and str(place / "trained") not in page


@pytest.mark.slow
def test_another_recipe_or_base_is_refused(place):
    def refused(kind, flags, *data):
        with raises(kind, *data):
            prepared(place, "refused", "--init-from", place / "first", *flags)
        assert not (place / "refused").exists()

    four = ["--method", "lora", "--rank", 4, "--alpha", 12]
    refused(AdapterMismatchError, four, "lora/a is [32, 2] there and [32, 4] in this run")
    refused(AdapterMismatchError, LORA[:4], "query", "the scale is 3 there and 1 in this run")
    refused(AdapterMismatchError, [*LORA, "--dora"], "LoRA there and DoRA in this run")
    refused(AdapterMismatchError, [*LORA, "--a-init", "pissa"], "a_init is", "'pissa' in this run")
    refused(AdapterMismatchError, ["--method", "loha", "--rank", 2], "query")
    refused(AdapterMismatchError, ["--pooling", "cls"], "mean", "cls", "--pooling mean")
    write_model(place / "wider", intermediate_size=64)
    refused(UserError, ["--model", place / "wider"], "other files")
    shutil.copytree(place / "first/adapter", place / "alone")
    refused(OtherBaseError, ["--model", place / "wider", "--init-from", place / "alone"])
    refused(UserError, ["--init-from", place / "none"], "none")


@pytest.mark.parametrize(
    "name",
    ["me/start", "me/start@v1", "/me@work/start", "/me@work/start/adapter", "runs/start@2"],
)
def test_a_run_has_the_name_of_what_it_starts_from(name):
    assert RunOptions(init_from=name).title == "from-start"


def test_a_head_of_other_classes_is_new(place):
    lines = (place / "reviews.jsonl").read_text()
    rows = [{**json.loads(line), "label": f"c{i % 3}"} for i, line in enumerate(lines.splitlines())]
    try:
        (place / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = prepared(place, "three", "--label", "label", "--init-from", place / "first/adapter")
    finally:
        (place / "reviews.jsonl").write_text(lines)
    _, leaves = began(job)
    assert leaves["head/bias"].shape == (3,)
    path = "bert/layer_0/attention/query/lora/b"
    np.testing.assert_array_equal(leaves[path], stored(place / "first")[path])


def test_a_head_of_another_task_is_left_out(place):
    def rows(name, **columns):
        lines = [json.loads(line) for line in (place / "reviews.jsonl").read_text().splitlines()]
        found = [{k: make(row) for k, make in columns.items()} for row in lines[:64]]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        return "--train", place / f"{name}.jsonl"

    def first_word(row):
        return row["review"].split()[0]

    asked = rows(
        "asked", question=first_word, context=lambda row: row["review"], answers=first_word
    )
    words = {"tokens": lambda row: row["review"].split()}
    tagged = rows("tagged", **words, ner_tags=lambda row: ["B-x", *"O" * row["review"].count(" ")])
    untrained(place, "asks", *asked, *LORA, "--task", "question-answering", "--max-length", 16)
    before = stored(place / "asks")
    # Its head has two outputs for each token: as many as that of two tags, or of two classes.
    for name, flags in {
        "tags": (*tagged, "--task", "token-classification"),
        "classes": ("--train", place / "reviews.jsonl"),
    }.items():
        _, leaves = began(prepared(place, name, *flags, "--init-from", place / "asks"))
        assert leaves["head/kernel"].shape == before["head/kernel"].shape
        assert not np.array_equal(leaves["head/kernel"], before["head/kernel"])
        path = "bert/layer_0/attention/query/lora/b"
        np.testing.assert_array_equal(leaves[path], before[path])


@pytest.mark.slow
def test_a_run_has_the_defaults_of_the_run_that_it_starts_from(place):
    def settings(name, *flags):
        words = flags_of(place, name, *flags)
        at = words.index("--learning-rate")
        job = parse(Finetune, words[:at] + words[at + 2 :]).prepare(Console(json=True))
        job.unlock()
        return {k: x for k, x in job.config["optimizer"].items() if k != "epochs"}

    expected = settings("like-full", "--method", "full")
    assert expected["learning_rate"] == 5e-5 and expected["dropout"] is None
    untrained(place, "full", "--method", "full")
    assert settings("from-full", "--init-from", place / "full") == expected
    untrained(place, "second", "--init-from", place / "full")
    assert settings("third", "--init-from", place / "second/adapter") == expected


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_adapter_that_it_started_with(place, monkeypatch):
    shutil.copytree(place / "first" / "adapter", place / "copy")
    (place / "latest").symlink_to("copy")
    monkeypatch.chdir(place / "latest")  # that the run goes on in another directory is no change
    prepared(place, "resumed", "--init-from", "../latest").unlock()
    monkeypatch.chdir(place)
    file = place / "latest" / "adapter.safetensors"
    whole = file.read_bytes()
    save_file({k: x + 1 for k, x in load_file(file).items()}, file)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert main(["finetune", "--resume", str(place / "resumed")]) == 2
        assert "init_sha256" in err.getvalue()
        file.write_bytes(whole)
        assert main(["finetune", "--resume", str(place / "resumed")]) == 0, err.getvalue()


def command(*words, status=0):
    """The JSON lines that a command prints, and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*map(str, words), "--json"]) == status, err.getvalue()
    return [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


@pytest.fixture(scope="module")
def pooler(place):
    """A run whose head PEFT has, too."""
    write_model(place / "pooled", pooler=True)
    model = ("--model", place / "pooled", "--pooling", "pooler")
    untrained(place, "pooler", *LORA, *model)
    return place / "pooler"


@pytest.mark.slow
def test_predict_takes_an_adapter_of_any_format_for_classes(place, pooler):
    texts = ["a good film", "dull", "the plot was poor"]
    of_run, _ = command("predict", pooler, *texts)
    command("convert", pooler, place / "pooler-peft", "--to", "peft")
    for adapter in ("pooler/adapter", "pooler-peft"):
        flags = ("--model", place / "pooled", "--pooling", "pooler")
        found, err = command("predict", place / adapter, *texts, *flags)
        assert "a head of 2 outputs, that reads pooler; it is taken for classification" in err
        for ours, theirs in zip(found, of_run, strict=True):
            names = {"LABEL_0": "no", "LABEL_1": "yes"}
            named = {names[label]: p for label, p in ours["probabilities"].items()}
            assert named == pytest.approx(theirs["probabilities"], abs=1e-6)


@pytest.mark.slow
def test_predict_without_a_head_gives_embeddings(place):
    command("convert", place / "first", place / "bare", "--to", "peft")
    model = ("--model", place / "tiny")
    (found,), err = command("predict", place / "bare", "dull", *model)
    assert "without a head" in err and len(found["embedding"]) == 32
    command("merge", place / "bare", "--out", place / "merged-bare", *model)
    command("merge", place / "first", "--out", place / "merged-first")
    ours, theirs = (
        load_file(place / name / "model.safetensors") for name in ("merged-bare", "merged-first")
    )
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_generate_and_merge_take_an_adapter_of_a_decoder(place):
    model = ("--model", place / "llama")
    command("convert", place / "decoder", place / "for-llama", "--to", "gguf")
    asked = ("--prompt", "food Thai", "--max-new-tokens", 4)
    assert (
        command("generate", place / "decoder/adapter", *asked, *model)[0]
        == (command("generate", place / "decoder", *asked)[0])
    )
    command("merge", place / "decoder", "--out", place / "merged")
    weights = load_file(place / "merged" / "model.safetensors")
    changed = load_file(place / "llama" / "model.safetensors")
    assert any(not np.array_equal(weights[k], changed[k]) for k in weights)
    for number, adapter in enumerate(("decoder/adapter", "for-llama/adapter.gguf")):
        command("merge", place / adapter, *model, "--out", place / f"merged{number}")
        found = load_file(place / f"merged{number}" / "model.safetensors")
        for path, weight in weights.items():
            np.testing.assert_allclose(found[path], weight, atol=1e-6)


@pytest.mark.slow
def test_merge_takes_an_adapter_of_an_encoder(place, pooler):
    flags = ("--model", place / "pooled", "--pooling", "pooler")
    command("merge", pooler, "--out", place / "classifier")
    command("merge", pooler / "adapter", *flags, "--out", place / "labels")
    ours, theirs = (load_file(place / n / "model.safetensors") for n in ("labels", "classifier"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_an_adapter_without_a_run_needs_its_base(place):
    shutil.copytree(place / "first/adapter", place / "lone")
    _, err = command("predict", place / "lone", "dull", status=2)
    assert "does not name its base model; add --model" in err
    _, err = command("predict", place / "first", "dull", "--pooling", "cls", status=2)
    assert "--pooling: for an adapter without a run" in err
    found = [command("predict", place / n, "dull")[0] for n in ("first", "first/adapter")]
    assert found[0] == found[1]  # which is no adapter without a run
    write_model(place / "other", intermediate_size=64)
    _, err = command("predict", place / "first/adapter", "x", "--model", place / "other", status=2)
    assert "trained on another base" in err
    _, err = command("generate", place / "first/adapter", "--model", place / "tiny", status=2)
    assert "use adapters-jax predict" in err


def test_a_merged_encoder_is_saved_in_python(place, pooler):
    predictor = load_predictor(pooler)
    example = predictor.encoder.example
    merged = aj.merge(predictor.model, predictor.params, example)
    labels = ["no", "yes"]
    notes = save_encoder(place / "ours", place / "pooled", merged, pooling="pooler", labels=labels)
    command("merge", pooler, "--out", place / "theirs")
    assert notes == []
    assert files_of(place / "ours") == files_of(place / "theirs")
    assert save_encoder(place / "bare-bert", place / "pooled", merged["bert"]) == []
    ours, before = (load_file(place / name / "model.safetensors") for name in ("bare-bert", "ours"))
    assert all(np.array_equal(x, before[name]) for name, x in ours.items())
    (note,) = save_encoder(place / "mean", place / "pooled", without_pooler(merged))
    assert "head.safetensors" in note and "mean" in note
    with raises(UserError, "3 labels", "2 outputs"):
        save_encoder(place / "x", place / "pooled", merged, pooling="pooler", labels=["a"] * 3)
    with raises(MismatchError, "lora", "aj.merge"):
        save_encoder(place / "x", place / "pooled", predictor.params, pooling="pooler")
    with raises(UserError, "exists"):
        save_encoder(place / "ours", place / "pooled", merged, pooling="pooler")
    with raises(UserError, "decoder"):
        save_encoder(place / "x", place / "llama", merged)
    assert not (place / "x").exists()


def without_pooler(params):
    return {**params, "bert": {k: v for k, v in params["bert"].items() if k != "pooler"}}


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}
