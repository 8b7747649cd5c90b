"""Prompt tuning in commands: placeholders before rows that learn, are scored, predict, generate."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises
from helpers.finished import MEANINGS, REVIEWS, decoder_run, encoder_run
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews

import adapters_jax as aj
from adapters_jax.__main__ import main
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.serving.labels import EncoderBase
from adapters_jax.finetune.tasks.completion_problem import token_losses

K = 3
PROMPT = f"--method prompt-tuning --prompt-length {K}"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    write_meanings(tmp_path / "rows.csv", rows=40)
    write_model(tmp_path / "tiny", pooler=True)
    write_reviews(tmp_path / "reviews.jsonl", rows=40)


def problem_of(words):
    return parse(Finetune, f"{words} --name x".split()).prepare(Console(json=True)).problem


def shaken(problem):
    """The model with other adapters, which are large enough to matter."""
    model, own = problem.model, nnx.state(problem.model, aj.nnx.AdapterParam)
    nnx.update(model, jax.tree.map(jnp.asarray, drawn_like(own, 1)))
    return model


def test_the_loss_of_a_decoder_is_of_rows_behind_the_prompt():
    problem = problem_of(f"{MEANINGS} {PROMPT} --exact-match 0")
    model, batch = shaken(problem), problem.train[0]
    assert batch["segments"].max() == 1  # none are packed
    found = token_losses(model, batch, problem.most, problem.chunk(batch))
    bare = token_losses(problem.decoder.model, batch, problem.most, problem.chunk(batch))
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        there = batch["segments"][row] == 1
        ids, _, labels = aj.with_prompt(
            problem.recipe, ids[there][None], None, labels[there][None], ignore=NOTHING
        )
        logits = jax.nn.log_softmax(model(ids))[0]
        expected = -sum(float(logits[i, t]) for i, t in enumerate(labels[0]) if t != NOTHING)
        assert found[row] == pytest.approx(expected, rel=1e-4)
        logits = jax.nn.log_softmax(problem.decoder.model(ids[:, K:]))[0]
        expected = -sum(float(logits[i, t]) for i, t in enumerate(labels[0, K:]) if t != NOTHING)
        assert bare[row] == pytest.approx(expected, rel=1e-4)


def test_a_run_generates_behind_its_prompt():
    generator = load_generator(decoder_run(PROMPT))
    prompts, made = ["food French", "food food food Thai"], []
    for prompt in prompts:
        ids = [-1] * K + generator.prompts.encode(prompt, generator.decoder)
        new = []
        while len(new) < 5 and generator.decoder.end not in new:
            new.append(int(generator.model(np.array([ids + new]))[0, -1].argmax()))
        tokens = [token for token in new if token != generator.decoder.end]
        made.append(generator.decoder.tokenizer.decode(tokens))
    assert list(generator.generate(prompts, 5)) == made
    longest = generator.decoder.config.longest
    with raises(aj.UserError, str(longest)):
        next(generator.generate(["food"], longest - K))


@pytest.mark.parametrize("pooling", ["pooler", "mean", pytest.param("cls", marks=pytest.mark.slow)])
def test_the_outputs_of_an_encoder_are_of_rows_behind_the_prompt(pooling):
    predictor = load_predictor(encoder_run(f"{PROMPT} --pooling {pooling}"))
    texts = [("a good film", None), ("the plot was dull and the music", None)]
    rows = predictor.readout.inputs(predictor.encoder, texts, predictor.max_length).rows
    plain = aj.adapt(predictor.encoder.base.classifier(2), predictor.model.recipe)
    for text, row in zip(texts, rows, strict=True):
        ids, *_ = aj.with_prompt(predictor.model.recipe, np.asarray(row.input_ids)[None])
        scores = jax.nn.softmax(plain.apply({"params": predictor.params}, ids)[0])
        (found,) = predictor.predict([text])
        assert sorted(found.probabilities.values()) == pytest.approx(
            sorted(scores.tolist()), abs=1e-5
        )


def test_a_run_learns_and_is_read_again(capsys):
    words = f"{REVIEWS} {PROMPT} --epochs 1 --json --name a".split()
    assert main(["finetune", *words]) == 0
    capsys.readouterr()
    assert main(["predict", "runs/a", "a good film", "--json"]) == 0
    assert capsys.readouterr().out
    assert main(["convert", "runs/a", "theirs", "--to", "peft", "--json"]) == 0
    with raises(aj.UserError, "PromptTuning", "predict"):
        EncoderBase("tiny", "pooler").read(Path("runs/a"))


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (f"{REVIEWS} {PROMPT} --max-length 14", ["14", "13"]),
        (f"{MEANINGS} {PROMPT} --max-length 62", ["62", "61"]),
        (f"{REVIEWS} --method prompt-tuning --prompt-length 16", ["16 positions"]),
    ],
)
def test_a_prompt_takes_positions_of_the_model(words, data):
    words = words.replace("--max-length 12 ", "").replace("--max-length 32 ", "")
    with raises(aj.UserError, *data):
        problem_of(words)
