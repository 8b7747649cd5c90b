"""Prompt tuning in commands: placeholders before rows that learn, are scored, predict, generate."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises
from helpers.finished import MEANINGS, REVIEWS, decoder_run, encoder_run
from helpers.tiny import CONFIG, write_llama, write_meanings, write_model, write_reviews

import adapters_jax as aj
from adapters_jax.__main__ import main
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.data.batches import NOTHING
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.models.encoder.heads import EncoderClassifier, MaskedLanguageModel
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.pretrained.decoder import complete
from adapters_jax.finetune.serving.labels import EncoderBase
from adapters_jax.finetune.tasks.completion_problem import token_losses

T5 = Path(__file__).parent / "fixtures" / "t5" / "t5"
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


def padded(tokens, width=24):
    """One row of tokens, padded on the right, and its mask: one shape, which compiles once."""
    mask = (np.arange(width) < len(tokens)).astype(int)[None]
    return np.array([[*tokens, *[0] * (width - len(tokens))]]), mask


read = nnx.jit(lambda model, *inputs: jax.nn.log_softmax(model(*inputs))[0])


def greedy(model, start, end, *, of=lambda tokens: padded(tokens)):
    """Up to four tokens after some, by passes over all of them, without the one that ends."""
    tokens = list(start)
    while len(tokens) < len(start) + 4 and end not in tokens[len(start) :]:
        tokens.append(int(read(model, *of(tokens))[len(tokens) - 1].argmax()))
    return [token for token in tokens[len(start) :] if token != end]


@pytest.mark.slow
def test_the_loss_of_a_decoder_is_of_rows_behind_the_prompt():
    problem = problem_of(f"{MEANINGS} {PROMPT} --exact-match 0")
    assert max(row.segments.max() for row in problem.train.rows) == 1  # none are packed
    for model, virtual in ((shaken(problem), [-1] * K), (problem.decoder.model, [])):
        found = problem.run(token_losses, model, "dev")
        for row, loss in zip(problem.parts["dev"].batches.rows, found, strict=True):
            logits = np.asarray(read(model, *padded([*virtual, *row.input_ids])))[len(virtual) :]
            asked = [(i, token) for i, token in enumerate(row.labels) if token != NOTHING]
            assert loss == pytest.approx(-sum(logits[i, x] for i, x in asked), rel=1e-4)


@pytest.mark.weekly
def test_an_encoder_reads_the_prompt_before_the_prompts_of_a_decoder():
    words = MEANINGS.replace("--model llama", f"--model {T5}")
    problem = problem_of(f"{words} {PROMPT} --exact-match 0")
    model = shaken(problem)
    found = problem.run(token_losses, model, "dev")
    for row, loss in zip(problem.parts["dev"].batches.rows, found, strict=True):
        labels = row.labels[row.labels != NOTHING].tolist()
        inputs = padded([-1] * K + row.input_ids[row.segments == 1].tolist())
        logits = np.asarray(read(model, *inputs, *padded([0, *labels[:-1]], 16)))
        assert loss == pytest.approx(-sum(logits[i, x] for i, x in enumerate(labels)), rel=1e-4)
    prompts, made = [[4, 9, 1], [4, 9, 5, 6, 11, 7, 1]], []
    for prompt in prompts:
        inputs = padded([-1] * K + prompt)
        new = greedy(model, [0], problem.decoder.end, of=lambda x: (*inputs, *padded(x, 16)))  # noqa: B023
        made.append(problem.decoder.tokenizer.decode(new))
    assert complete(model, problem.decoder, prompts, 4) == made


@pytest.mark.slow
def test_a_run_generates_behind_its_prompt():
    generator = load_generator(decoder_run(PROMPT))
    prompts, made = ["food French", "food food food Thai"], []
    for prompt in prompts:
        ids = [-1] * K + generator.prompts.encode(prompt, generator.decoder)
        new = greedy(generator.model, ids, generator.decoder.end)
        made.append(generator.decoder.tokenizer.decode(new))
    assert list(generator.generate(prompts, 4)) == made
    longest = generator.decoder.config.longest
    with raises(aj.UserError, str(longest)):
        next(generator.generate(["food"], longest - K))


@pytest.mark.weekly
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


@pytest.mark.slow
def test_a_run_learns_and_is_read_again(capsys):
    words = f"{REVIEWS} {PROMPT} --epochs 1 --no-baselines --json --name a".split()
    assert main(["finetune", *words]) == 0
    capsys.readouterr()
    assert main(["predict", "runs/a", "a good film", "--json"]) == 0
    assert capsys.readouterr().out
    assert main(["convert", "runs/a", "theirs", "--to", "peft", "--json"]) == 0


@pytest.mark.slow
def test_a_server_refuses_a_run_with_a_prompt():
    run = Path(encoder_run(PROMPT))
    with raises(aj.UserError, "PromptTuning", "predict"):
        EncoderBase("tiny", "pooler").read(run)


def test_answers_that_share_a_sequence_have_no_prompt():
    rows = [{"prompt": f"food {i}", "chosen": "Thai", "rejected": "Greek"} for i in range(40)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with raises(aj.UserError, "--task preference", "--method"):
        problem_of(f"--model llama --train pairs.jsonl --task preference {PROMPT}")


@pytest.mark.slow
@pytest.mark.witness("words0-data0", "words2-data2")
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


@pytest.mark.slow
@pytest.mark.parametrize("of_tokens", [True, False])
def test_a_head_that_reads_each_token_gets_those_of_the_text(of_tokens):
    prompt = aj.PromptTuning("bert/embeddings/word", K)
    make = (
        (lambda **more: EncoderClassifier(CONFIG, 3, "tokens", **more))
        if of_tokens
        else (lambda **more: MaskedLanguageModel(CONFIG, **more))
    )
    ids, mask = jnp.array([[2, 5, 6, 3], [2, 7, 3, 0]]), jnp.array([[1] * 4, [1, 1, 1, 0]])
    base = make().init(jax.random.key(0), ids)["params"]
    params = aj.init_adapters(aj.adapt(make(), prompt), base, jax.random.key(1), ids)
    types = jnp.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    found = aj.adapt(make(prompt=prompt), prompt).apply({"params": params}, ids, mask, types)
    ids, mask, types = aj.with_prompt(prompt, ids, mask, types, ignore=0)
    whole = aj.adapt(make(), prompt).apply({"params": params}, ids, mask, types)
    np.testing.assert_allclose(found, whole[:, K:], atol=1e-5)
