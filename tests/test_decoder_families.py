"""Every family of decoders computes what transformers computes, in each way of running it."""

import contextlib
import json
from dataclasses import fields, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays

from adapters_jax.errors import UserError
from adapters_jax.models.decoder import (
    ARCHITECTURES,
    Decoder,
    DecoderConfig,
    load_decoder,
    save_decoder,
)

# Fields whose value shows in no parameter's shape.
ARITHMETIC = {
    *("hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("rope_local_base_freq", "no_rope_layers", "layer_types", "norm_offset"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("attn_logit_softcapping", "final_logit_softcapping", "norm_topk_prob"),
}
# The bookkeeping of a config.json, which names no arithmetic.
BOOKKEEPING = {
    *("transformers_version", "use_cache", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise", "pretraining_tp"),
    *("router_aux_loss_coef", "output_router_logits", "use_bidirectional_attention"),
    # Layer types say it.
    *("_sliding_window_pattern", "max_window_layers", "no_rope_layer_interval"),
    "decoder_sparse_step",  # every layer has experts
    "mlp_only_layers",
}
FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
every = pytest.mark.parametrize("name", NAMES)


def reference(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)


@nnx.jit
def run(model, ids, mask=None, positions=None, segments=None):
    hidden = model.hidden(ids, mask, positions, segments)
    return hidden, model.logits(hidden)


def seen(mask, array):
    return np.asarray(array)[mask == 1]


def test_every_architecture_has_a_checkpoint():
    assert set(NAMES) == set(ARCHITECTURES)


@every
@pytest.mark.parametrize("scan", [False, True])
def test_hidden_states_and_logits_are_those_of_transformers(name, scan):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name, scan=scan)
    hidden, logits = run(model, ids, mask)
    np.testing.assert_allclose(seen(mask, hidden), seen(mask, expected["hidden"]), atol=1e-4)
    np.testing.assert_allclose(seen(mask, logits), seen(mask, expected["logits"]), atol=1e-4)
    short = expected["short"]
    np.testing.assert_allclose(run(model, ids[:1, : short.shape[1]])[1], short, atol=1e-4)


def flags():
    """A family and one of its settings, put back to the default of all decoders."""
    for name in NAMES:
        config = DecoderConfig.from_json(FIXTURES / name / "config.json")
        for field in fields(config):
            if field.name in ARITHMETIC and getattr(config, field.name) != field.default:
                change = {field.name: field.default}
                if field.name == "partial_rotary_factor":  # its factors are of as many features
                    change["rope_scaling"] = None
                yield pytest.param(config, change, id=f"{name}-{field.name}")
        if config.sliding_window:
            yield pytest.param(config, {"sliding_window": 99}, id=f"{name}-sliding_window")


@pytest.mark.parametrize(("config", "change"), [*flags()])
def test_every_setting_of_a_checkpoint_shows_in_its_logits(config, change):
    ids = reference(config.model_type)["input_ids"][:1]
    _, model = load_decoder(FIXTURES / config.model_type)
    other = nnx.eval_shape(lambda: Decoder(replace(config, **change), rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(model))
    assert np.abs(run(other, ids)[1] - run(model, ids)[1]).max() > 1e-2


extend = nnx.jit(lambda model, ids, mask, cache: model.extend(ids, mask, cache))


def stepwise(model, ids, mask, first):
    """The hidden states by a cache: the first tokens at once, the others one by one."""
    cache, parts = model.empty_cache(*ids.shape), []
    for start, stop in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        hidden, cache = extend(model, ids[:, start:stop], mask[:, start:stop], cache)
        parts.append(hidden)
    return jnp.concatenate(parts, axis=1)


@every
@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_changes_nothing(name, scan):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name, scan=scan)
    hidden = stepwise(model, ids, mask, first=11)
    np.testing.assert_allclose(seen(mask, hidden), seen(mask, expected["hidden"]), atol=1e-4)


@every
def test_prompts_padded_on_the_right_are_continued_like_others(name):
    ids = reference(name)["input_ids"][:1]
    _, model = load_decoder(FIXTURES / name)
    padded = np.concatenate([ids[:, :6], np.zeros((1, 4), int), ids[:, 6:10]], axis=1)
    mask = np.array([[1] * 6 + [0] * 4 + [1] * 4])
    hidden = stepwise(model, padded, mask, first=10)
    whole = np.concatenate([ids[:, :10], np.zeros((1, 4), int)], axis=1)  # of the same length
    expected, _ = run(model, whole)
    np.testing.assert_allclose(hidden[mask == 1], expected[0, :10], atol=1e-4)


@every
def test_packed_texts_are_those_of_rows_of_their_own(name):
    ids = reference(name)["input_ids"][:1]
    _, model = load_decoder(FIXTURES / name)
    segments = np.array([[1] * 6 + [2] * 8])
    positions = np.array([[*range(6), *range(8)]])
    packed, _ = run(model, ids, None, positions, segments)
    for start, stop in ((0, 6), (6, 14)):
        alone = np.zeros_like(ids)  # of the same length
        alone[:, : stop - start] = ids[:, start:stop]
        hidden, _ = run(model, alone)
        np.testing.assert_allclose(packed[:, start:stop], hidden[:, : stop - start], atol=1e-4)


@every
@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_written_as_it_was_read(name, scan, tmp_path):
    config, model = load_decoder(FIXTURES / name, scan=scan)
    save_decoder(tmp_path, config, model)
    expected, got = (read_arrays(directory) for directory in (FIXTURES / name, tmp_path))
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
    theirs, ours = (
        json.loads((directory / "config.json").read_text())
        for directory in (FIXTURES / name, tmp_path)
    )
    if theirs["model_type"] == "olmoe":  # transformers writes the type of its rope_scaling twice
        del theirs["rope_scaling"]["type"]
    for key in theirs.keys() - BOOKKEEPING - {k for k in ("head_dim",) if theirs.get(k) is None}:
        assert ours.get(key) == theirs[key], key
    assert DecoderConfig.from_dict(ours) == replace(
        config, num_key_value_heads=config.kv_heads, head_dim=config.head_width
    )


@every
def test_bfloat16_rounds_no_more_than_in_transformers(name):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    hidden, logits = run(model, ids, mask)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact, theirs = (seen(mask, expected[key]) for key in ("logits", "bfloat16"))
    assert 0 < np.abs(seen(mask, logits) - exact).mean() < 1.5 * np.abs(theirs - exact).mean()


NUMBERS = (-1, 0, 1.5, 2**40, float("nan"), float("inf"))
WRONG = (*NUMBERS, None, True, "", "x", [], ["x"], [2**40], {}, {"a": 1})


@every
def test_any_value_of_a_setting_is_taken_or_is_a_user_error_at_once(name):
    whole = json.loads((FIXTURES / name / "config.json").read_text())
    for key in whole.keys() | {"rope_parameters", "sliding_window_pattern", "hidden_activation"}:
        for value in WRONG:
            with contextlib.suppress(UserError):
                config = DecoderConfig.from_dict({**whole, key: value})
                assert config.num_hidden_layers <= 10_000
                assert len(config.layer_kinds) == config.num_hidden_layers
                json.dumps(config.to_dict())
