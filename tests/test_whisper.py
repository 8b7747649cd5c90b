"""Whisper computes what transformers computes, in each way of running it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.whisper import (
    NAMES,
    Whisper,
    WhisperConfig,
    load_whisper,
    log_mel,
    save_whisper,
)

FIXTURE = Path(__file__).parent / "fixtures" / "whisper"
CONFIG = WhisperConfig.from_json(FIXTURE / "config.json")


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURE / "expected.npz") as file:
        return dict(file)


def inputs_of(expected):
    return tuple(
        expected[name] for name in ("features", "decoder_input_ids", "decoder_attention_mask")
    )


@pytest.mark.slow
@pytest.mark.witness("True")
@pytest.mark.parametrize("scan", [False, True])
def test_hidden_states_and_logits_are_those_of_transformers(scan, expected):
    _, model = load_whisper(FIXTURE, scan=scan)
    features, ids, mask = inputs_of(expected)

    @nnx.jit
    def run(model):
        return model.encode(features), model.hidden(features, ids, mask), model(features, ids, mask)

    encoded, hidden, logits = run(model)
    written = mask == 1
    np.testing.assert_allclose(encoded, expected["encoded"], atol=1e-4)
    np.testing.assert_allclose(hidden[written], expected["hidden"][written], atol=1e-4)
    np.testing.assert_allclose(logits[written], expected["logits"][written], atol=1e-4)


@pytest.mark.slow
@pytest.mark.witness("True")
@pytest.mark.parametrize("scan", [False, True])
def test_generated_tokens_are_those_of_transformers(scan, expected):
    _, model = load_whisper(FIXTURE, scan=scan)
    prompts = jnp.asarray(expected["decoder_input_ids"][:, :2])
    new = expected["generated"].shape[1]
    made = generate(model, prompts, max_new_tokens=new, source=expected["features"])
    np.testing.assert_array_equal(made.ids, expected["generated"])


@pytest.mark.slow
def test_hidden_states_with_a_cache_are_those_without(expected):
    _, model = load_whisper(FIXTURE)
    features, ids, mask = inputs_of(expected)

    @nnx.jit
    def cached(model):
        cache, parts = model.listen(features, 9), []
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            part = slice(start, stop)
            hidden, cache = model.extend(ids[:, part], mask[:, part], cache)
            parts.append(hidden)
        return jnp.concatenate(parts, 1)

    whole = nnx.jit(lambda model: model.hidden(features, ids, mask))(model)
    written = mask == 1
    np.testing.assert_allclose(cached(model)[written], whole[written], atol=1e-5)


def test_a_saved_checkpoint_is_the_same_model(tmp_path, expected):
    config, model = load_whisper(FIXTURE)
    save_whisper(tmp_path, config, model, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, same = load_whisper(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(model))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("openai/whisper-tiny", 37_760_640),
        ("openai/whisper-base", 72_593_920),
        ("openai/whisper-small", 241_734_912),
        ("openai/whisper-medium", 763_857_920),
        ("openai/whisper-large-v2", 1_543_304_960),
        ("openai/whisper-large-v3", 1_543_490_560),
        ("openai/whisper-large-v3-turbo", 808_878_080),
    ],
)
def test_published_sizes(name, number):
    family = FAMILIES["whisper"]
    assert family.parameters(family.known[name]) == number


@pytest.mark.weekly  # numba compiles for a minute in a new environment
def test_log_mel_features_are_those_of_transformers(expected):
    pytest.importorskip("librosa", reason="needs librosa: pip install 'adapters-jax[audio]'")
    config = replace(CONFIG, max_source_positions=50)  # one second
    sound = expected["sound"]
    found = log_mel([sound, sound[:1000]], config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:1], expected["log_mel"], atol=1e-4)
    assert np.abs(found[1] - found[0]).max() > 0.1


@pytest.mark.parametrize(
    ("sound", "said"),
    [
        (np.zeros(16_001), "16001 samples, expected 1 to 16000, which are 1 seconds"),
        (np.zeros(0), "0 samples"),
        (np.zeros((2, 100)), "shape (2, 100) of float64, expected one channel"),
        (np.zeros(100, np.int16), "int16, expected one channel of floating-point samples"),
        (np.full(100, np.nan), "not finite"),
    ],
)
def test_a_sound_that_cannot_be_read(sound, said):
    pytest.importorskip("librosa", reason="needs librosa: pip install 'adapters-jax[audio]'")
    with raises(UserError, said):
        log_mel([sound], replace(CONFIG, max_source_positions=50))


def test_features_of_another_shape(expected):
    _, model = load_whisper(FIXTURE)
    with raises(UserError, "shape (3, 6, 18), expected (3, 6, 20)"):
        model.encode(expected["features"][:, :, :18])


def test_a_text_longer_than_the_positions(expected):
    _, model = load_whisper(FIXTURE)
    with raises(UserError, "18"):
        model(expected["features"][:1], jnp.zeros((1, 19), int))
    with raises(UserError, "18"):
        generate(model, jnp.ones((1, 2), int), max_new_tokens=17, source=expected["features"][:1])


def test_generation_needs_features():
    _, model = load_whisper(FIXTURE)
    with raises(UserError, "Whisper needs a source"):
        generate(model, jnp.ones((1, 2), int), max_new_tokens=2)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"decoder_start_token_id": 40}, "decoder_start_token_id=40"),
        ({"decoder_attention_heads": 3}, "decoder_attention_heads=3"),
        ({"encoder_layers": 5000}, "5000"),
        ({"num_mel_bins": 0}, "num_mel_bins"),
        ({"activation_function": "geloo"}, "geloo"),
    ],
)
def test_a_setting_that_cannot_be(setting, said):
    values = json.loads((FIXTURE / "config.json").read_text())
    with raises(UserError, said):
        WhisperConfig.from_dict(values | setting)


@pytest.mark.weekly
@pytest.mark.parametrize("scan", [False, True])
def test_lora_trains_and_merges(scan, expected):
    _, model = load_whisper(FIXTURE, scan=scan)
    features, ids, mask = inputs_of(expected)
    recipe = aj.lora(2, targets=("**/attention/query", "**/mlp/output", "encoder/conv2"))
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(features, ids))
    leaves = nnx.state(adapted, aj.nnx.AdapterParam)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    nnx.update(adapted, jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) / 5, leaves))
    run = nnx.jit(lambda model: model(features, ids, mask))
    logits, written = run(adapted), mask == 1
    assert np.abs(logits - expected["logits"])[written].max() > 0.1
    np.testing.assert_allclose(run(aj.merge(adapted))[written], logits[written], atol=1e-4)


@pytest.mark.weekly
def test_new_weights_are_finite():
    model = Whisper(CONFIG, rngs=nnx.Rngs(0))
    assert np.isfinite(model(jnp.ones((1, 6, 20)))).all()


@pytest.mark.slow
def test_stacks_of_unequal_lengths_are_unrolled_and_stacked_again(expected):
    _, model = load_whisper(FIXTURE, scan=True)
    recipe = aj.lora(2, targets="**/attention/query")
    example = expected["features"], expected["decoder_input_ids"]
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    adapters = nnx.to_pure_dict(nnx.state(adapted, aj.nnx.AdapterParam))
    one, flat = aj.unstack_layers((recipe, adapters), NAMES)
    assert [len(flat[stack]["layers"]) for stack in ("encoder", "decoder")] == [3, 2]
    np.testing.assert_array_equal(
        flat["encoder"]["layers"]["2"]["attention"]["query"]["lora"]["a"],
        adapters["encoder"]["layers"]["attention"]["query"]["lora"]["a"][2],
    )
    again, same = aj.stack_layers((one, flat), NAMES)
    assert again == recipe
    jax.tree.map(np.testing.assert_array_equal, same, adapters)
