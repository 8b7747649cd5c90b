"""T5, Flan-T5 and mT5 compute what transformers computes, in each way of running them."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises
from safetensors.numpy import save_file

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.parts.relative import relative_buckets
from adapters_jax.finetune.models.t5 import T5, T5Config, load_t5, save_t5

FIXTURES = Path(__file__).parent / "fixtures" / "t5"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
every = pytest.mark.parametrize("name", NAMES)
BOOKKEEPING = {
    *("transformers_version", "use_cache", "dtype", "eos_token_id", "pad_token_id"),
    *("classifier_dropout", "dropout_rate", "dense_act_fn", "is_gated_act", "tokenizer_class"),
}


def reference(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)


def run(model, expected):
    """Hidden states of encoder and decoder, and logits."""
    mask = expected["attention_mask"]
    encoded = model.encode(expected["input_ids"], mask)
    hidden = model.decode(expected["decoder_input_ids"], encoded, mask)
    return encoded, hidden, model.logits(hidden)


def assert_as_expected(got, expected, atol=1e-4):
    encoded, hidden, logits = got
    seen = expected["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(encoded)[seen], expected["encoded"][seen], atol=atol)
    np.testing.assert_allclose(hidden, expected["hidden"], atol=atol)
    np.testing.assert_allclose(logits, expected["logits"], atol=atol)


@pytest.mark.witness("False-t5")
@every
@pytest.mark.parametrize("scan", [False, True])
def test_hidden_states_and_logits_are_those_of_transformers(name, scan):
    expected = reference(name)
    _, model = load_t5(FIXTURES / name, scan=scan)
    assert_as_expected(nnx.jit(run)(model, expected), expected)


@pytest.mark.slow
@pytest.mark.witness("t5")
@every
def test_a_padded_row_is_that_row_by_itself(name):
    expected = reference(name)
    _, model = load_t5(FIXTURES / name)
    hidden_of = nnx.jit(lambda model, ids, written: model.hidden(ids, None, written))
    for row in (1, 2):
        tokens = expected["input_ids"][row][expected["attention_mask"][row] == 1][None]
        assert tokens.size < expected["input_ids"].shape[1]
        hidden = hidden_of(model, tokens, expected["decoder_input_ids"][row : row + 1])
        np.testing.assert_allclose(hidden[0], expected["hidden"][row], atol=1e-4)


def plain_bucket(distance, causal, buckets, farthest):
    """The published formula for one distance, in float64."""
    first = 0
    if causal:
        distance = max(-distance, 0)
    else:
        buckets //= 2
        first, distance = (buckets if distance > 0 else 0), abs(distance)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # The rounding error is far less than the distance of a number to the next whole one, unless it
    # is whole.
    share = math.log(distance / exact) / math.log(farthest / exact)
    return first + min(exact + int(share * (buckets - exact) + 1e-9), buckets - 1)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 7), (33, 500), (64, 1024)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_groups_of_distances_are_those_of_the_formula(buckets, farthest, causal):
    distances = np.arange(-1100, 1101)
    expected = [plain_bucket(int(d), causal, buckets, farthest) for d in distances]
    got = relative_buckets(jnp.asarray(distances), causal, buckets, farthest)
    np.testing.assert_array_equal(got, expected)


def stepwise(model, expected, first):
    """The decoder's hidden states by a cache: the first tokens at once, the others one by one."""
    written, parts = expected["decoder_input_ids"], []
    mask = np.ones_like(written)
    extend = nnx.jit(lambda model, *args: model.extend(*args))
    cache = model.read_prompts(expected["input_ids"], expected["attention_mask"], written.shape[1])
    cache = cache[2]
    for start, stop in [(0, first), *((i, i + 1) for i in range(first, written.shape[1]))]:
        hidden, cache = extend(model, written[:, start:stop], mask[:, start:stop], cache)
        parts.append(hidden)
    return np.concatenate(parts, axis=1)


@pytest.mark.weekly
@pytest.mark.parametrize(("name", "scan"), [(name, False) for name in NAMES] + [("t5", True)])
def test_a_cache_changes_nothing(name, scan):
    expected = reference(name)
    _, model = load_t5(FIXTURES / name, scan=scan)
    np.testing.assert_allclose(stepwise(model, expected, 3), expected["hidden"], atol=1e-4)


@pytest.mark.witness("flan_t5")
@every
def test_generated_tokens_are_those_of_transformers_and_of_passes_without_a_cache(name):
    expected = reference(name)
    config, model = load_t5(FIXTURES / name)
    greedy, prompts = expected["greedy"], (expected["input_ids"], expected["attention_mask"])
    made = generate(model, *map(jnp.asarray, prompts), max_new_tokens=greedy.shape[1], stop=[1])
    for row, ids, length in zip(greedy.tolist(), made.ids.tolist(), made.lengths, strict=True):
        end = row.index(1) if 1 in row else len(row)
        assert (ids[:length], length) == (row[:end], end)
    assert len(np.unique(greedy)) > 2
    start = np.full_like(greedy[:, :1], config.decoder_start_token_id)
    logits = nnx.jit(model)(*prompts, np.concatenate([start, greedy[:, :-1]], axis=1))
    written = np.cumsum(greedy == 1, axis=1) - (greedy == 1) == 0  # until the end
    np.testing.assert_array_equal(np.argmax(logits, -1)[written], greedy[written])


CHANGES = {
    "t5": [
        {"relative_attention_max_distance": 20},
        {"layer_norm_epsilon": 1e-6},
        {"feed_forward_proj": "gelu"},
    ],
    "flan_t5": [{"feed_forward_proj": "gated-relu"}, {"relative_attention_max_distance": 20}],
}


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("name", "change"), [(name, each) for name, several in CHANGES.items() for each in several]
)
def test_every_setting_of_a_checkpoint_shows_in_its_logits(name, change):
    expected = reference(name)
    config, model = load_t5(FIXTURES / name)
    other = nnx.eval_shape(lambda: T5(replace(config, **change), rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(model))
    assert np.abs(run(other, expected)[2] - expected["logits"]).max() > 1e-2


@pytest.mark.slow
def test_the_decoder_reads_the_start_token_and_all_labels_but_the_last():
    _, model = load_t5(FIXTURES / "t5")
    labels = np.array([[5, 6, 1, -1], [7, 1, -1, -1]])
    assert model.shifted(labels).tolist() == [[0, 5, 6, 1], [0, 7, 1, 0]]
    ids = np.array([[5, 6, 7, 8]])
    np.testing.assert_array_equal(model(ids), model(ids, None, np.array([[0, 5, 6, 7]])))


@pytest.mark.witness("False-t5", "True-flan_t5")
@every
@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_written_as_it_was_read(name, scan, tmp_path):
    config, model = load_t5(FIXTURES / name, scan=scan)
    save_t5(tmp_path, config, model, eos_token_id=1)
    expected, got = (read_arrays(directory) for directory in (FIXTURES / name, tmp_path))
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
    theirs, ours = (
        json.loads((directory / "config.json").read_text())
        for directory in (FIXTURES / name, tmp_path)
    )
    for key in theirs.keys() - BOOKKEEPING:
        assert ours.get(key) == theirs[key], key
    assert ours["eos_token_id"] == 1
    again = T5Config.from_dict(ours)
    assert again == replace(config, num_decoder_layers=config.decoder_layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "flan_t5"])
def test_copies_of_the_embedding_in_older_files_are_not_read(name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path, dirs_exist_ok=True)
    tensors = read_arrays(tmp_path)
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[copy] = tensors["shared.weight"]
    if name == "t5":
        tensors["lm_head.weight"] = tensors["shared.weight"]
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = np.ones((8, 4), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    expected = reference(name)
    assert_as_expected(run(load_t5(tmp_path)[1], expected), expected)
    del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with raises(aj.MismatchError, "embeddings/embedding (shared.weight)"):
        load_t5(tmp_path)


@pytest.mark.slow
@every
def test_bfloat16_rounds_no_more_than_in_transformers(name):
    expected = reference(name)
    _, model = load_t5(FIXTURES / name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    encoded, hidden, logits = run(model, expected)
    assert (encoded.dtype, hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact, theirs = expected["logits"], expected["bfloat16"]
    assert 0 < np.abs(logits - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


@pytest.mark.weekly
@pytest.mark.parametrize("scan", [False, True])
def test_recomputed_blocks_have_the_same_gradients(scan):
    expected = reference("mt5")
    found = []
    for remat in (False, "dots_saveable"):
        _, model = load_t5(FIXTURES / "mt5", scan=scan, remat=remat)

        @nnx.jit
        @nnx.grad
        def gradient(model):
            return jnp.square(run(model, expected)[2]).sum()

        found.append(nnx.to_pure_dict(gradient(model)))
    one, other = map(jax.tree.leaves, found)
    for a, b in zip(one, other, strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(a).max()))


def test_a_configuration_of_transformers_5_says_what_that_of_4_says():
    later = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert T5Config.from_dict({"model_type": "t5", **later}).tie_word_embeddings is False
    assert T5Config.from_dict({"model_type": "t5", "tie_word_embeddings": True}).tie_word_embeddings
    assert T5Config.from_dict({"model_type": "t5"}).tie_word_embeddings
    mt5 = T5Config.from_dict({"model_type": "mt5", "tie_word_embeddings": True})
    assert (mt5.tie_word_embeddings, mt5.d_ff, mt5.num_layers, mt5.mlp_gate) == (
        False,
        1024,
        8,
        True,
    )
    assert T5Config(feed_forward_proj="gated-gelu").hidden_act == "gelu_new"
    assert T5Config(feed_forward_proj="gated-silu").hidden_act == "silu"


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"feed_forward_proj": "gated-gelo"}, ["gated-gelo", "nearest: 'gated-gelu'"]),
        ({"model_type": "umt5"}, ["umt5", "nearest: 'mt5'"]),
        ({"is_encoder_decoder": False}, ["is_encoder_decoder=False"]),
        ({"d_kv": 2.5}, ["d_kv=2.5"]),
        ({"d_model": 2**40}, ["d_model", 2**40]),
        ({"num_heads": 0}, ["num_heads=0"]),
        ({"num_layers": 1_001}, [" num_layers=1001", 1_000]),
        ({"num_decoder_layers": 20_000}, ["num_decoder_layers=20000", 1_000]),
        ({"relative_attention_num_buckets": 2}, ["relative_attention_num_buckets=2"]),
        ({"relative_attention_max_distance": 16}, ["relative_attention_max_distance=16"]),
        ({"decoder_start_token_id": 32128}, ["decoder_start_token_id=32128", "vocab_size"]),
    ],
)
def test_settings_that_are_not_supported_are_named(settings, data):
    with raises(UserError, *data):
        T5Config.from_dict({"model_type": "t5", **settings})


def test_an_mt5_has_a_head_of_its_own():
    with raises(UserError, "mt5", "tie_word_embeddings=False"):
        T5Config(model_type="mt5")


NUMBERS = (-1, 0, 1.5, 2**40, float("nan"), float("inf"))
WRONG = (*NUMBERS, None, True, "", "x", [], ["x"], [2**40], {}, {"a": 1})


@every
def test_any_value_of_a_setting_is_taken_or_is_a_user_error_at_once(name):
    whole = json.loads((FIXTURES / name / "config.json").read_text())
    for key in whole.keys() | {"scale_decoder_outputs", "tie_word_embeddings"}:
        for value in WRONG:
            with contextlib.suppress(UserError):
                config = T5Config.from_dict({**whole, key: value})
                assert max(config.num_layers, config.decoder_layers) <= 1_000
                json.dumps(config.to_dict())


ON_DEVICES = """
import sys, jax, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from adapters_jax.distributed.mesh import make_mesh
from adapters_jax.finetune.models.t5 import load_t5, save_t5

base, out = sys.argv[1:]
rules = {"**/{query,key,value}/kernel": P(None, "model"), "embeddings/embedding": P("model")}
config, model = load_t5(base, mesh=make_mesh("model=4"), rules=rules)
query = model.encoder.layers[0].attention.query.kernel[...]
assert query.addressable_shards[0].data.shape == (16, 6), query.sharding
expected = np.load(base + "/expected.npz")
inputs = [expected[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")]
logits = nnx.jit(lambda model: model(*inputs))(model)
np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
save_t5(out, config, model)
"""


@pytest.mark.weekly
def test_a_model_on_several_devices_is_the_same_and_is_saved_whole(tmp_path):
    base = FIXTURES / "flan_t5"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    words = [sys.executable, "-c", ON_DEVICES, str(base), str(tmp_path)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected, got = map(read_arrays, (base, tmp_path))
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
