"""What a run is said to become before it trains is what it becomes after; merged encoders."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.arrays import read_arrays
from helpers.commands import command_of, command_raises
from helpers.finished import decoder_run, encoder_run, finished_run
from helpers.tiny import write_model, write_words
from safetensors.numpy import load_file

from adapters_jax.errors import UserError
from adapters_jax.finetune.cli.main import COMMANDS, main
from adapters_jax.finetune.cli.main import command_of as class_of
from adapters_jax.finetune.formats import FORMATS
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.merging import MERGED
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.bert import Bert
from adapters_jax.finetune.tensors import from_tensors

FIXTURES = Path(__file__).parent / "fixtures"
weekly = pytest.mark.weekly
MEAN = "--pooling mean --method"
WEIGHTS = "merged/model.safetensors"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "flags"),
    [
        (encoder_run, "--method lora --rank 2"),
        (encoder_run, f"{MEAN} houlsby"),
        (encoder_run, f"{MEAN} lora --quantize int8"),
        (decoder_run, "--method lora --rank 2"),
        pytest.param(decoder_run, "--method llama-adapter", marks=weekly),
        pytest.param(encoder_run, f"{MEAN} lora", marks=weekly),
        pytest.param(encoder_run, "--pooling cls --method ia3", marks=weekly),
        pytest.param(encoder_run, "--method lora --dora", marks=weekly),
        pytest.param(encoder_run, "--method houlsby --layer-norms=", marks=weekly),
        pytest.param(encoder_run, "--method compacter --reduction-factor 4", marks=weekly),
        pytest.param(encoder_run, "--method loreft --suffix-positions 1", marks=weekly),
        pytest.param(encoder_run, "--method vera --rank 4", marks=weekly),
        pytest.param(encoder_run, "--method head-only", marks=weekly),
        pytest.param(encoder_run, "--method layer-norms", marks=weekly),
        pytest.param(encoder_run, "--method prefix-tuning", marks=weekly),
        pytest.param(encoder_run, "--method prompt-tuning --prompt-length 3", marks=weekly),
        pytest.param(encoder_run, "--method lora --quantize int8", marks=weekly),
        pytest.param(decoder_run, "--method lora --dora", marks=weekly),
        pytest.param(decoder_run, "--method ia3", marks=weekly),
        pytest.param(decoder_run, "--method houlsby", marks=weekly),
        pytest.param(decoder_run, "--method prefix-tuning", marks=weekly),
        pytest.param(decoder_run, "--method prompt-tuning", marks=weekly),
        pytest.param(decoder_run, "--method lora --quantize int8", marks=weekly),
    ],
)
def test_what_is_promised_before_training_is_what_happens_after(make, flags, capsys):
    run = make(flags, "mine")
    promised = json.loads(Path(run, "config.json").read_text())["ways_out"]
    assert promised.keys() == {*FORMATS, MERGED}
    assert ("--dequantize" in promised[MERGED]) == ("quantize" in flags)
    for name, promise in promised.items():
        words = ["convert", run, name, "--to", name]
        if name == MERGED:
            words = ["merge", run, "--out", name, *(["--dequantize"] * ("quantize" in flags))]
        capsys.readouterr()
        status = main([*words, "--json"])
        out, line = capsys.readouterr()
        assert status == 2 * promise.startswith("no: "), line
        if status:
            nearest = "nearest LoRA" in promise  # what is lost is known after training
            assert ("--max-error" if nearest else promise.removeprefix("no: ")[:50]) in line
        else:
            notes = " ".join(json.loads(out)["notes"])
            left = "head is left out" in notes or "head.safetensors" in notes
            assert left == promise.startswith("yes, without its head"), notes


OTHERS = ("distilbert", "electra", "modernbert", "deberta_v3")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny", *(pytest.param(name, marks=weekly) for name in OTHERS)])
def test_a_merged_encoder_is_a_classifier_of_transformers(base):
    predictor = load_predictor(merged_encoder(base))
    texts = [("a good film", None), ("the plot was dull", None)]
    expected = _outputs(predictor, predictor.params, predictor.model, texts)
    config = json.loads(Path("merged/config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["problem_type"] == "single_label_classification"
    family = next(f for f in FAMILIES.values() if config["model_type"] in f.prefixes)
    model = predictor.encoder.classifier(2)
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    params = from_tensors(read_arrays("merged"), family.classifier.names, like)
    found = _outputs(predictor, params, model, texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    unmerged = {**params, family.classifier.base: predictor.encoder.params}
    plain = _outputs(predictor, unmerged, model, texts)
    assert np.abs(plain - expected).max() > 1e-3
    prefix = family.prefixes[config["model_type"]]
    heads = (prefix, "classifier.", "pre_classifier.", "head.", "pooler.")
    assert all(name.startswith(heads) for name in read_arrays("merged"))
    assert Path("merged/tokenizer.json").exists()


def merged_encoder(base):
    """Makes a run on an encoder in the current directory, and merges it; returns its path."""
    run = encoder_run()
    if base != "tiny":
        _fixture(base)
        run = finished_run(
            f"--model {base} --train reviews.jsonl --text review --max-length 12 --pooling pooler "
            "--method lora --rank 2 --name other",
            {"accuracy": 0.75, "f1": 0.8},
        )
    assert main(["merge", run, "--out", "merged"]) == 0
    return run


def _fixture(name):
    shutil.copytree(FIXTURES / name, name)
    write_words(Path(name))


def _outputs(predictor, params, model, texts):
    rows, _ = predictor.encoder.encode(texts, 12)
    batch = predictor.readout.batches(predictor.encoder, rows, None, 2, None, (12,))[0]
    arrays = [batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    return np.asarray(model.apply({"params": params}, *arrays))


@pytest.mark.slow
def test_a_head_that_transformers_has_not_is_in_a_file_of_its_own(capsys):
    run = encoder_run(f"{MEAN} lora --rank 2 --label stars --task regression", "mine")
    assert main(["merge", run, "--out", "merged", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "head.safetensors" in note and "mean of the tokens" in note
    assert "problem_type" not in json.loads(Path("merged/config.json").read_text())
    predictor = load_predictor(run)
    texts = [("a good film", None), ("the plot was dull", None)]
    rows, _ = predictor.encoder.encode(texts, 12)
    batch = predictor.readout.batches(predictor.encoder, rows, None, 2, None, (12,))[0]
    _, params = FAMILIES["bert"].load("merged")
    inputs = [batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    hidden = np.asarray(Bert(predictor.encoder.config).apply({"params": params}, *inputs))
    weights = batch["attention_mask"][:, :, None]
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    head = load_file("merged/head.safetensors")
    found = pooled @ head["weight"].T + head["bias"]
    expected = [p.value for p in predictor.predict(texts)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)


CHOICES = {"question": "the", "choice1": "good", "choice2": "bad"}
PAIR = {"sentence2": "the plot"}


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("task", "row", "metric", "shape"),
    [
        (
            "multiple-choice",
            lambda i: {**CHOICES, "premise": f"film {i}", "label": i % 2},
            "accuracy",
            (1, 32),
        ),
        (
            "sentence-embedding",
            lambda i: {**PAIR, "sentence1": f"film {i}", "score": i % 5},
            "spearman",
            None,
        ),
        (
            "token-classification",
            lambda i: {"tokens": ["film", str(i)], "ner_tags": ["O", "B-X"]},
            "f1",
            None,
        ),
    ],
)
def test_a_merged_encoder_of_another_task_is_one_of_transformers(task, row, metric, shape, capsys):
    write_model(Path("pooled"), pooler=True, max_position_embeddings=64)
    Path("rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    flags = f"--model pooled --train rows.jsonl --task {task} --method lora --rank 2 --name own"
    flags += " --max-length 20" + " --pooling pooler" * (task != "token-classification")
    run = finished_run(flags, {metric: 0.5})
    capsys.readouterr()
    assert main(["merge", run, "--out", "merged", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    config, tensors = json.loads(Path("merged/config.json").read_text()), load_file(WEIGHTS)
    assert not {"problem_type", "id2label"} & config.keys()
    head = tensors.get("classifier.weight")
    assert (None if head is None else head.shape) == shape
    if task == "token-classification":
        assert notes[0].endswith("head.safetensors: logits = last_hidden_state @ weight.T + bias")
    else:
        assert notes == [] and not Path("merged/head.safetensors").exists()


@pytest.mark.slow
def test_a_run_and_a_shape_without_weights_are_no_bases(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = encoder_run()
    with command_raises(UserError, f"'{run}' is a run", "tiny'"):
        assert main(["audit", "--model", run]) == 2
    flags = ["--train", "reviews.jsonl", "--text", "review"]
    with command_raises(UserError, "'bert-base' is a shape", "audit and plan", "minilm"):
        assert main(["finetune", "--model", "bert-base", *flags]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_help_are_lines_that_its_command_takes(name):
    lines = class_of(name).examples.replace("\\\n", " ").splitlines()
    called = [words for line in lines if (words := line.partition("adapters-jax ")[2])]
    assert called
    for words in called:  # without what a shell does behind it
        command = command_of(f"adapters-jax {re.split('[|<>]', words)[0]}")
        assert isinstance(command, class_of(name))


def test_a_label_and_a_decoder_are_one_sentence():
    decoder_run()
    with command_raises(UserError, "--label", "'llama'", "completion"):
        assert main(["finetune", "--model", "llama", "--train", "rows.csv", "--label", "ref"]) == 2
