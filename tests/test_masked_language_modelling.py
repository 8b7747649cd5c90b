"""Masked language modelling: hiding, packing, training, files and resuming."""

import json
import math
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import CONFIG, WORDS, write_model, write_reviews
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import adapters_jax as aj
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.data.readers import DataError, read_file
from adapters_jax.finetune.formats.base import MASKED
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.merging import write_encoder
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.pretrained.encoder import load_encoder
from adapters_jax.finetune.run_directory import Run
from adapters_jax.finetune.runs.stopping import InterruptedRunError
from adapters_jax.finetune.serving.labels import EncoderBase
from adapters_jax.finetune.tasks import TASKS
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem
from adapters_jax.finetune.tasks.masked_language_modelling import MaskedTokens, Vocabulary, hide
from adapters_jax.finetune.tensors import to_tensors

TASK = "masked-language-modelling"
VOCAB = (*WORDS, "[MASK]")
TRAIN = f"finetune --task {TASK} --model tiny --train rows.txt --dev dev.txt --test test.txt"
TRAIN += " --name run --max-length 16"
TRAIN += " --method houlsby --bottleneck-dim 16 --layer-norms= --epochs 10 --batch-size 8"
TRAIN += " --learning-rate 0.05 --evaluations 1 --checkpoint-every 1000"


def write_masked(directory, head=True, mask="[MASK]"):
    """A random masked language model in Hugging Face's layout, with or without its head."""
    write_model(directory, vocab_size=len(VOCAB), initializer_range=0.4)
    if head:
        record = FAMILIES["bert"].masked_lm
        config = replace(CONFIG, vocab_size=len(VOCAB), initializer_range=0.4)
        model = record.build(config, 1, MASKED)
        params = model.init(jax.random.key(1), jnp.ones((1, 4), int))["params"]["head"]
        draw = np.random.default_rng(0)
        params["bias"] = draw.normal(0, 0.3, params["bias"].shape).astype(np.float32)
        tensors = load_file(directory / "model.safetensors")
        tensors |= to_tensors({"head": params}, record.names)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    words = {word.replace("[MASK]", mask): i for i, word in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", mask])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_texts(path, count=160):
    """One text over and over, so that a token's place in a block says what it is."""
    path.write_text("\n\n".join(["the film was good and music"] * count))
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_tenth_of_what_is_hidden_stays_and_a_tenth_is_random():
    vocabulary = Vocabulary(1000, 999, np.array([0, 1, 999]))
    ids = np.array([0, *range(2, 202), 1])
    fates = {"mask": 0, "same": 0, "other": 0}
    for seed in range(300):
        found = hide(ids, vocabulary, [seed])
        assert len(found.positions) == 30 and len({*found.positions.tolist()}) == 30
        np.testing.assert_array_equal(found.labels, ids[found.positions])
        rest = np.delete(np.arange(len(ids)), found.positions)
        np.testing.assert_array_equal(found.input_ids[rest], ids[rest])
        shown = found.input_ids[found.positions]
        fates["mask"] += (shown == 999).sum()
        fates["same"] += (shown == found.labels).sum()
        fates["other"] += ((shown != 999) & (shown != found.labels)).sum()
    assert not {0, len(ids) - 1} & {*found.positions.tolist()}
    shares = [fates[name] / 9000 for name in ("mask", "same", "other")]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.015)


@pytest.mark.slow
def test_texts_are_packed_into_blocks_and_no_token_is_lost():
    encoder = load_encoder(str(write_masked(Path("tiny"))), MASKED)
    texts = [("the film was", None), ("good", None), ("a plot and music " * 5, None)]
    encoder.tokenizer.enable_padding(length=9)  # as the files of some tokenizers say
    encoder.tokenizer.enable_truncation(4)
    found = MaskedTokens().encoded(encoder, texts, 10)
    blocks = [row.input_ids.tolist() for row in found.rows]
    assert [len(block) for block in blocks] == [10, 10, 10, 4] or len(blocks[-1]) <= 10
    assert all(block[0] == 2 and block[-1] == 3 for block in blocks)
    inside = [i for block in blocks for i in block[1:-1]]
    expected = [VOCAB.index(w) for w in ["the", "film", "was", "[SEP]", "good", "[SEP]"]]
    expected += [VOCAB.index(w) for w in ["a", "plot", "and", "music"]] * 5
    assert inside == expected


@pytest.mark.slow
def test_masks_are_functions_of_seed_and_step_and_those_of_dev_are_fixed():
    encoder = load_encoder(str(write_masked(Path("tiny"))), MASKED)
    readout, texts = MaskedTokens(), [("the film was good a plot and music " * 9, None)]
    rows = readout.encoded(encoder, texts, 16).rows
    make = [readout.batches(encoder, rows, None, 2, 5, (16,)) for _ in range(2)]
    epoch = len(make[0])
    _, again = make[0][1], make[0][1 + epoch]
    for name, array in make[0][3].items():
        np.testing.assert_array_equal(array, make[1][3][name])
    assert any((make[0][i]["positions"] != again["positions"]).any() for i in range(epoch))
    by_size = []
    for size in (2, 3):
        batches = readout.batches(encoder, rows, None, size, None, (16,))
        found = {
            row: (ids.tolist(), labels.tolist())
            for batch in batches
            for row, ids, labels in zip(
                batch["index"].tolist(), batch["input_ids"], batch["labels"], strict=True
            )
            if row >= 0
        }
        by_size.append(found)
    assert by_size[0] == by_size[1] and len(by_size[0]) == len(rows)


def test_the_loss_is_that_of_the_formula_and_fillers_do_not_count():
    outputs = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    labels = np.array([[4, 0, NOTHING], [6, NOTHING, NOTHING]])
    by_hand = -log_softmax(outputs.astype(np.float64), axis=-1)
    expected = [by_hand[0, 0, 4] + by_hand[0, 1, 0], by_hand[1, 0, 6]]
    readout, batch = MaskedTokens(), {"labels": labels}
    np.testing.assert_allclose(readout.losses(jnp.asarray(outputs), batch), expected, rtol=1e-5)
    assert readout.counts(batch).tolist() == [2, 1]
    found = readout.score(readout_metrics(), readout.reduced(jnp.asarray(outputs), batch), None)
    right = [outputs[0, 0].argmax() == 4, outputs[0, 1].argmax() == 0, outputs[1, 0].argmax() == 6]
    assert found["loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(right))


def readout_metrics():
    return ["perplexity", "loss", "accuracy"]


@pytest.mark.witness("True")
@pytest.mark.weekly
@pytest.mark.parametrize("head", [True, False])
def test_it_trains_predicts_and_comes_back_from_its_files(head, capsys):
    write_masked(Path("tiny"), head)
    for name, count in (("rows", 160), ("dev", 20), ("test", 24)):
        write_texts(Path(f"{name}.txt"), count)
    assert main(TRAIN.split()) == 0
    run = Run(Path("runs/run"))
    config = run.read_config()
    unigram, frozen, ours = config["summary"]["results"]
    assert [unigram["method"], frozen["method"]] == [
        "unigram",
        "frozen base" if head else "head-only",
    ]
    scores = [row["test"]["perplexity"] for row in (unigram, frozen, ours)]
    able = len(VOCAB) - 4  # each word counts 160 times and once more, five others once
    assert scores[0] == pytest.approx((6 * 160 + able) / 161)
    assert scores[2] < 3 < scores[1] and ours["test"]["accuracy"] > 0.6
    trained = aj.read_adapter(run.adapter)[1]
    assert any(path.startswith("head/dense") for path in trained) is not head

    usage = TASKS[TASK].usage("runs/run", config)
    assert main(shlex.split(usage.shell)[1:]) == 0
    exec(usage.python, {})
    asked = ["the film [MASK] good and music", "[MASK] film was good [MASK] music"]
    capsys.readouterr()
    assert main(["predict", "runs/run", *asked, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for text, line in zip(asked, lines, strict=True):
        for tokens in line["tokens"]:
            text = text.replace("[MASK]", tokens[0], 1)
        assert line["filled"] == text and "[MASK]" not in text
    assert "was" in lines[0]["tokens"][0] and len(lines[1]["tokens"]) == 2
    assert lines[1]["probabilities"][0] == sorted(lines[1]["probabilities"][0], reverse=True)
    assert main(["predict", "runs/run", asked[0]]) == 0

    assert main(["push", "runs/run", "me/native", "--dry-run"]) == 0
    (found,) = load_predictor("native", model="tiny").predict([(asked[0], None)])
    np.testing.assert_allclose(found.probabilities, lines[0]["probabilities"], rtol=1e-5)
    assert main(["push", "runs/run", "me/hub", "--dry-run", "--to", "adapterhub"]) == 0
    said = capsys.readouterr().out
    assert ("the head is left out" in said) is not head
    assert main(["convert", "hub", "back", "--to", "native", "--model", "tiny"]) == 0
    after = aj.read_adapter("back")[1]
    for path, tensor in trained.items():
        if not path.startswith("head/"):
            np.testing.assert_array_equal(after[path.removeprefix("bert/")], tensor, err_msg=path)


def prepared(words):
    return parse(Finetune, words.split()[1:]).prepare(Console(json=True))


def test_a_head_of_the_checkpoint_has_the_rate_of_the_other_weights():
    """The rate of a head is for one that starts from random values."""
    for name, count in (("rows", 40), ("dev", 4), ("test", 4)):
        write_texts(Path(f"{name}.txt"), count)
    words = TRAIN.replace("houlsby --bottleneck-dim 16 --layer-norms=", "full")
    words = words.replace("--learning-rate 0.05", "--learning-rate 1e-4").replace("--name run ", "")
    write_masked(Path("tiny"))
    for i, (given, rate) in enumerate((("", 1e-4), ("--head-learning-rate 2e-4", 2e-4))):
        job = prepared(f"{words} --name {i} {given}")
        assert job.optimizer.head_learning_rate == rate
        assert job.problem.recipe.trains("head/dense/kernel")
    shutil.rmtree("tiny")
    write_masked(Path("tiny"), head=False)
    assert prepared(f"{words} --name new").optimizer.head_learning_rate == 1e-3


def test_a_head_of_the_checkpoint_stays_frozen_after_a_classifier():
    write_masked(Path("tiny"))
    write_reviews(Path("reviews.jsonl"))
    words = "finetune --model tiny --train reviews.jsonl --text review --method lora --rank 2"
    assert main(f"{words} --name first --max-steps 1 --no-baselines".split()) == 0
    for name, count in (("rows", 40), ("dev", 4), ("test", 4)):
        write_texts(Path(f"{name}.txt"), count)
    words = TRAIN[: TRAIN.index(" --method")].replace("--name run", "--name second")
    recipe = prepared(f"{words} --init-from runs/first").problem.recipe
    assert not recipe.trains("head/dense/kernel")
    assert [type(each) for each in recipe] == [aj.LoRA]


@pytest.mark.slow
def test_a_resumed_run_hides_the_same_tokens(monkeypatch):
    """A run that is stopped and resumed has the adapter of one that was not, to the bit."""
    write_masked(Path("tiny"))
    for name, count in (("rows", 40), ("dev", 4), ("test", 4)):
        write_texts(Path(f"{name}.txt"), count)
    words = TRAIN.replace("--epochs 10", "--epochs 2").replace("every 1000", "every 3").split()
    assert main([*words, "--no-baselines"]) == 0
    whole = aj.read_adapter(Run(Path("runs/run")).adapter)[1]
    words[words.index("--name") + 1] = "again"
    batch = LabelledProblem.batch

    def stopped(self, step):
        if step == 4:
            raise InterruptedRunError(signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(LabelledProblem, "batch", stopped)
        assert main([*words, "--no-baselines"]) == 143
    assert main(["finetune", "--resume", "runs/again"]) == 0
    again = aj.read_adapter(Run(Path("runs/again")).adapter)[1]
    for path, tensor in whole.items():
        np.testing.assert_array_equal(again[path], tensor, err_msg=path)


@pytest.mark.slow
def test_a_tokenizer_with_more_special_tokens_than_embeddings():
    write_masked(Path("tiny"))
    tokenizer = Tokenizer.from_file("tiny/tokenizer.json")
    tokenizer.add_special_tokens(["[NEW]"])
    tokenizer.save("tiny/tokenizer.json")
    for name, count in (("rows", 40), ("dev", 4), ("test", 4)):
        write_texts(Path(f"{name}.txt"), count)
    assert main(TRAIN.replace("--epochs 10", "--epochs 1").split()) == 0
    write_model(Path("less"))  # whose vocabulary has no row for the mask
    shutil.copy("tiny/tokenizer.json", "less/tokenizer.json")
    with raises(aj.UserError, VOCAB.index("[MASK]"), len(WORDS)):
        Vocabulary.of(load_encoder("less", MASKED))


@pytest.mark.slow
def test_a_merged_run_is_a_masked_language_model():
    write_masked(Path("tiny"))
    for name, count in (("rows", 40), ("dev", 4), ("test", 4)):
        write_texts(Path(f"{name}.txt"), count)
    words = TRAIN.replace("houlsby --bottleneck-dim 16 --layer-norms=", "lora")
    words = words.replace("--epochs 10", "--epochs 3").split()
    assert main([*words, "--no-baselines"]) == 0
    assert main(["merge", "runs/run", "--out", "merged"]) == 0
    encoder = load_encoder("merged", MASKED)
    ours, own = load_predictor("runs/run"), load_encoder("tiny", MASKED)
    ids = jnp.asarray([[2, 5, len(VOCAB) - 1, 9, 3]])
    expected = ours.model.apply({"params": ours.params}, ids)
    found = encoder.classifier(1).apply({"params": encoder.under(encoder.head)}, ids)
    before = own.classifier(1).apply({"params": own.under(own.head)}, ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(before - expected).max() > 1e-2
    # In PEFT, it is an adapter of the masked language model, whose encoder has a name.
    assert main(["convert", "runs/run", "there", "--to", "peft"]) == 0
    config = json.loads(Path("there/adapter_config.json").read_text())
    assert config["task_type"] is None
    assert all(name.startswith("bert.encoder.") for name in config["target_modules"])
    assert "import AutoModelForMaskedLM\n" in Path("there/README.md").read_text()
    assert main(["convert", "there", "back", "--to", "native", "--model", "tiny"]) == 0
    (_, was), (_, now) = (aj.read_adapter(path)[:2] for path in ("runs/run/adapter", "back"))
    assert {f"bert/{path}" for path in now} == {*was}
    for path, leaf in now.items():
        np.testing.assert_array_equal(leaf, was[f"bert/{path}"])


@pytest.mark.slow
def test_a_merged_checkpoint_says_that_its_output_layer_is_its_word_embeddings():
    """Where it says otherwise, transformers draws an output layer at random."""
    config = json.loads((write_masked(Path("tiny")) / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "architectures": ["BertForMaskedLM"]}
    Path("tiny/config.json").write_text(json.dumps(config))
    tensors = load_file("tiny/model.safetensors")
    (words,) = (x for name, x in tensors.items() if name.endswith("word_embeddings.weight"))
    tensors["cls.predictions.decoder.weight"] = words.copy()  # which are equal all the same
    save_file(tensors, "tiny/model.safetensors", {"format": "pt"})
    encoder = load_encoder("tiny", MASKED)
    about = {"model": "tiny", "pooling": MASKED, "target": {}}
    write_encoder(Path("merged"), about, encoder.under(encoder.head))
    assert json.loads(Path("merged/config.json").read_text())["tie_word_embeddings"] is True
    assert not [name for name in load_file("merged/model.safetensors") if "decoder.weight" in name]


@pytest.mark.slow
def test_texts_to_predict_have_masks_that_fit():
    encoder = load_encoder(str(write_masked(Path("tiny"))), MASKED)
    readout = MaskedTokens()
    with raises(DataError, "text 2", "[MASK]"):
        readout.inputs(encoder, [("a [MASK]", None), ("a film", None)], 16)
    with raises(DataError, "text 1", "8 tokens"):
        readout.inputs(encoder, [("a " * 20 + "[MASK]", None)], 8)
    for text in ("", "[PAD] [SEP]"):
        with raises(DataError, "no text has a token that can be hidden"):
            readout.encoded(encoder, [(text, None)], 16)
    with raises(aj.UserError, "--max-length 7", 8):  # of fewer, no text could be predicted
        readout.encoded(encoder, [("a film", None)], 7)
    other = load_encoder(str(write_masked(Path("other"), mask="<mask>")), MASKED)
    assert readout.inputs(other, [("a [MASK]", None)], 16).where[1] == [1]


@pytest.mark.slow
def test_bases_without_a_mask_token_or_a_tied_head_are_refused(capsys):
    write_model(Path("bare"))
    write_texts(Path("rows.txt"), 40)
    write_texts(Path("dev.txt"), 4)
    write_texts(Path("test.txt"), 5)
    with command_raises(aj.UserError, "[MASK] or <mask>"):
        main(TRAIN.replace("--model tiny", "--model bare").split())
    write_masked(Path("tiny"))
    tensors = load_file("tiny/model.safetensors")
    words = tensors["embeddings.word_embeddings.weight"]
    save_file({**tensors, "cls.predictions.decoder.weight": words}, "tiny/model.safetensors")
    assert load_encoder("tiny", MASKED).head is not None
    save_file({**tensors, "cls.predictions.decoder.weight": words + 1}, "tiny/model.safetensors")
    with raises(aj.UserError, "cls.predictions.decoder.weight", "tie_word_embeddings"):
        load_encoder("tiny", MASKED)
    with raises(aj.UserError, "masked language model", "bert", "roberta", "distilbert"):
        load_encoder(str(Path(__file__).parent / "fixtures" / "electra"), MASKED)


@pytest.mark.slow
def test_masks_are_not_served():
    with raises(aj.UserError, "tiny", "masks", "adapters-jax predict"):
        EncoderBase(str(write_masked(Path("tiny"))), MASKED)


def test_a_text_file_has_a_row_in_each_line():
    Path("rows.txt").write_text("\n = A title = \n \nA text , with commas\n")
    header, records, _ = read_file(Path("rows.txt"))
    assert header == ["text"]
    assert records == [(2, ["= A title ="]), (4, ["A text , with commas"])]


def test_a_classifier_of_a_family_whose_heads_share_names_is_no_masked_language_model():
    fixture = Path(__file__).parent / "fixtures" / "modernbert"  # a classifier
    record = FAMILIES["modernbert"].masked_lm
    config, params = record.load(fixture, MASKED)
    with raises(aj.UserError, str(fixture), "head.dense.weight", "decoder.bias", "decoder_bias"):
        record.read_head(fixture, config, params["embeddings"]["word"]["embedding"])
