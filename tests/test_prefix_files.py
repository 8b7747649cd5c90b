"""PEFT's PREFIX_TUNING: what keys turn by, whole files, and files that do not fit."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises
from test_decoder_families import FIXTURES

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files.names import Keys
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.convert import from_peft
from adapters_jax.files.peft.prefix import turned
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import NAMES, Decoder, DecoderConfig, load_decoder
from adapters_jax.finetune.models.decoder.keys import attention_keys
from adapters_jax.finetune.models.parts.rotary import rotate, rotation
from adapters_jax.trees import flatten

K, WIDTH = 3, 6
SIZES = {
    **{"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": WIDTH},
}
MODEL = Decoder(DecoderConfig(**SIZES), rngs=nnx.Rngs(0))
METHOD = aj.PrefixTuning("**/attention", K)
CONFIG = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": K, "task_type": "CAUSAL_LM"}
ROWS = drawn((K, 2 * 2 * WIDTH), 1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_are_those_of_a_text_behind_the_prefix(interleaved):
    """A query at K + i with their key has the score of ours at i, for any frequencies."""
    frequencies, key, query = (0.3, 2.0), double(drawn((2, WIDTH), 2)), double(drawn((WIDTH,), 3))
    keys = Keys(2, WIDTH, frequencies, interleaved)
    own = turned(key, keys, -K)
    for i in range(4):
        there = turned(query, keys, K + i) @ key.T
        np.testing.assert_allclose(turned(query, keys, i) @ own.T, there, rtol=1e-12)
    assert np.abs(own - key).max() > 0.1
    np.testing.assert_array_equal(own[:, 4:], key[:, 4:])  # what does not turn


@pytest.mark.parametrize("name", ["glm", "llama", "phi", "cohere", "smollm3"])
def test_keys_turn_as_in_the_model(name):
    config, _ = load_decoder(FIXTURES / name)
    config = replace(config, sliding_window=None, layer_types=None)
    for kind, keys in zip(config.layer_kinds, attention_keys(config), strict=True):
        key = drawn((1, 1, keys.heads, keys.width), 1)
        place = rotation(np.array([[5]]), config.rotated, kind.rope_theta, kind.rope_scaling)
        factor = np.hypot(place.cos, place.sin).max()  # yarn's, of queries and of the text's keys
        expected = rotate(key, jax.tree.map(lambda x: x / factor, place), config.rotary_interleaved)  # noqa: B023
        np.testing.assert_allclose(turned(double(key), keys, 5), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.witness("True")
@pytest.mark.parametrize("scan", [False, True])
def test_it_goes_through_a_file(scan, tmp_path):
    model = Decoder(DecoderConfig(**SIZES), scan=scan, rngs=nnx.Rngs(0))
    adapted = aj.adapt(model, METHOD, rngs=nnx.Rngs(1), example_inputs=(np.ones((1, 4), int),))
    state = nnx.to_pure_dict(nnx.state(adapted, aj.nnx.AdapterParam))
    state = drawn_like(state)
    saved = save_peft(tmp_path / "a", METHOD, state, NAMES, model, task_type="CAUSAL_LM")
    recipe, again = load_peft(saved, NAMES, model)
    assert recipe == aj.Recipe(METHOD)
    for path, leaf in flatten(state).items():
        np.testing.assert_allclose(flatten(again)[path], leaf, atol=1e-6, err_msg=path)


def test_the_tensor_has_a_key_and_a_value_of_each_layer_in_turn():
    recipe, adapters = from_peft(CONFIG, {"prompt_embeddings": ROWS}, NAMES, MODEL)
    assert recipe == aj.Recipe(METHOD)
    rows = ROWS.reshape(K, 2, 2, 1, WIDTH)
    for i in range(2):
        own = adapters["layers"][str(i)]["attention"]["prefix"]
        np.testing.assert_array_equal(own["value"], rows[:, i, 1])
        key = turned(rows[:, i, 0], MODEL.attention_keys[i], -K)
        np.testing.assert_allclose(own["key"], key, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "tensors", "data"),
    [
        ({"num_virtual_tokens": 4}, {}, ["num_virtual_tokens=4", [3, 24]]),
        ({"num_layers": 3}, {}, ["num_layers=3", "has 2"]),
        ({"num_attention_heads": 2}, {}, ["num_attention_heads=2", "has 1"]),
        ({"num_transformer_submodules": 2}, {}, ["num_transformer_submodules=2"]),
        ({"prefix_projection": "yes"}, {}, ["prefix_projection='yes'"]),
        ({}, {"prompt_embeddings": None}, ["no prompt_embeddings"]),
        ({}, {"x.weight": np.ones(2)}, ["x.weight", "base_model."]),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(fields, tensors, data):
    whole = {"prompt_embeddings": ROWS} | tensors
    whole = {key: x for key, x in whole.items() if x is not None}
    with raises(AdapterFileError, *data):
        from_peft({**CONFIG, **fields}, whole, NAMES, MODEL)


def test_a_base_whose_keys_are_unknown_is_refused_unless_the_table_says_it():
    params, tensors = nnx.to_pure_dict(nnx.state(MODEL)), {"prompt_embeddings": ROWS}
    with raises(AdapterFileError, "keys turn by their position", "NameTable(..., keys=...)"):
        from_peft(CONFIG, tensors, NAMES, params)
    keys = (Keys(1, WIDTH),) * 2  # a model of one's own without rotations
    _, adapters = from_peft(CONFIG, tensors, replace(NAMES, keys=keys), params)
    own = adapters["layers"]["1"]["attention"]["prefix"]["key"]
    np.testing.assert_array_equal(own[:, 0], ROWS.reshape(K, 2, 2, WIDTH)[:, 1, 0])
    with raises(AdapterFileError, "keys of 1 layers", "in 2"):
        from_peft(CONFIG, tensors, replace(NAMES, keys=keys[:1]), params)


@pytest.mark.witness(
    "llama4_text-chunks",
    "qwen3_next-no softmax",
    "deepseek_v3-wider",
    "bloom-distance",
    "opt-embeddings",
    "gemma3_text-slides",
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "embeddings"),
        ("opt", "embeddings"),
        ("bloom", "distance"),
        ("deepseek_v3", "wider"),
        ("qwen3_next", "no softmax"),
        ("llama4_text", "chunks"),
        ("gemma3_text", "slides"),
        ("gemma4_text", "slides"),
        ("qwen3", "slides"),
    ],
)
def test_each_family_whose_numbers_would_be_others_says_why(name, reason):
    _, model = load_decoder(FIXTURES / name)
    with raises(AdapterFileError, "PREFIX_TUNING", reason):
        from_peft(CONFIG, {"prompt_embeddings": ROWS}, FAMILIES[name].names, model)


def test_frequencies_that_depend_on_the_length_are_refused():
    for name in ("phi3", "qwen3"):
        config = replace(load_decoder(FIXTURES / name)[0], sliding_window=None, layer_types=None)
        assert "length of the text" in attention_keys(config)


def test_what_peft_has_no_prefix_for_is_named(tmp_path):
    pair = {name: drawn((K, 1, WIDTH), 4) for name in ("key", "value")}
    layers = {str(i): {"attention": {"prefix": pair}} for i in range(2)}

    def saving(method, leaves, *data, **fields):
        with raises(UserError, *data):
            save_peft(tmp_path / "a", method, {"layers": leaves}, NAMES, MODEL, **fields)
        assert not (tmp_path / "a").exists()

    saving(METHOD, layers, "task_type")
    one = aj.PrefixTuning("layers/0/attention", K)
    saving(one, {"0": layers["0"]}, "every layer", "layers/1/attention")
    short = {"1": {"attention": {"prefix": {name: x[:2] for name, x in pair.items()}}}}
    both = aj.Recipe(one, aj.PrefixTuning("layers/1/attention", 2))
    saving(both, layers | short, "one length", [2, 3])
    task = {"task_type": "CAUSAL_LM"}
    saving(METHOD, layers, "num_attention_heads=2", num_attention_heads=2, **task)
