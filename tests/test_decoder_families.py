"""Every family of decoders computes what transformers computes, in each way of running it."""

import contextlib
import functools
import json
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    Decoder,
    DecoderConfig,
    load_decoder,
    save_decoder,
)
from adapters_jax.finetune.models.decoder.model import abstract_decoder

# Fields whose value shows in no parameter's shape.
ARITHMETIC = {
    *("hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("rope_local_base_freq", "no_rope_layers", "layer_types", "norm_offset"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("attn_logit_softcapping", "final_logit_softcapping", "norm_topk_prob", "expert_limit"),
    *("router_scores", "router_factor", "router_groups", "expert_reads_weighted"),
    *("warming_scale", "value_norm", "rotary_interleaved", "alibi"),
}
# The bookkeeping of a config.json, which names no arithmetic.
BOOKKEEPING = {
    *("transformers_version", "use_cache", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise", "pretraining_tp"),
    *("router_aux_loss_coef", "output_router_logits", "use_bidirectional_attention"),
    *("rope_parameters", "per_layer_config"),  # compared as fields
    # Layer types say it.
    *("_sliding_window_pattern", "max_window_layers", "no_rope_layer_interval"),
    *("attn_pdrop", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("summary_type", "summary_use_proj", "scale_attn_weights", "reorder_and_upcast_attn"),
    "scale_attn_by_inverse_layer_idx",
    "decoder_sparse_step",  # every layer has experts
    "interleave_moe_layer_step",  # moe_layers says it
    "mlp_only_layers",
    *("residual_dropout", "embedding_dropout", "use_qk_norm", "qk_layernorm"),
    *("hidden_dropout", "classifier_dropout", "slow_but_exact", "dropout", "layerdrop"),
    *("layer_norm_elementwise_affine", "_remove_final_layer_norm"),
    "apply_residual_connection_post_layernorm",
}
FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
CONFIGS = {name: DecoderConfig.from_json(FIXTURES / name / "config.json") for name in NAMES}
UNLIKE = [name for name in NAMES if len(set(CONFIGS[name].layer_forms)) > 1]  # layers
every = pytest.mark.parametrize("name", NAMES)
# One family of each kind of attention, positions and layers, for what the others share.
KINDS = ("bloom", "cohere2", "deepseek_v3", "gemma3_text", "gemma4_text", "gpt2", "gpt_oss")
KINDS += ("granite", "llama4_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3")
scannable = pytest.mark.parametrize("name", [name for name in NAMES if name not in UNLIKE])


@functools.cache
def loaded(name):
    """A model that no test changes."""
    return load_decoder(FIXTURES / name)[1]


def reference(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return dict(file)


def run(model, ids, mask=None, positions=None, segments=None):
    """Hidden states and logits, by the operations one by one: few of their shapes are new."""
    hidden = model.hidden(ids, mask, positions, segments)
    return hidden, model.logits(hidden)


def seen(mask, array):
    return np.asarray(array)[mask == 1]


def test_every_architecture_has_a_checkpoint():
    assert {name.split("-")[0] for name in NAMES} == set(ARCHITECTURES)


@pytest.mark.witness("gpt2")
@every
def test_hidden_states_and_logits_are_those_of_transformers(name):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    model = loaded(name)
    hidden, logits = run(model, ids, mask)
    np.testing.assert_allclose(seen(mask, hidden), seen(mask, expected["hidden"]), atol=1e-4)
    np.testing.assert_allclose(seen(mask, logits), seen(mask, expected["logits"]), atol=1e-4)
    short = expected["short"]
    np.testing.assert_allclose(run(model, ids[:1, : short.shape[1]])[1], short, atol=1e-4)


@pytest.mark.slow
@pytest.mark.witness("gemma3_text", "qwen3_moe")
@scannable
def test_scanned_layers_compute_the_same(name):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name, scan=True)
    hidden = nnx.jit(lambda model: model.hidden(ids, mask))(model)
    np.testing.assert_allclose(seen(mask, hidden), seen(mask, expected["hidden"]), atol=1e-4)


@pytest.mark.parametrize("name", UNLIKE)
def test_layers_of_unlike_modules_are_not_scanned(name):
    with raises(UserError, name, "scan=False", *(CONFIGS[name].layer_types or ["experts"])):
        load_decoder(FIXTURES / name, scan=True)


WITNESSES = ("gemma3_text", "gpt2", "granite", "qwen3_moe")


def flags():
    """A family and one of its settings, put back to the default of all decoders.

    These are all settings of the witnesses, and each other setting of the first family with it.
    """
    met = set()
    for name in sorted(NAMES, key=lambda name: name not in WITNESSES):
        epsilon = "rms_norm_eps" if name.startswith("opt") else None  # which is always PyTorch's
        slow = [] if name in WITNESSES else [pytest.mark.slow]
        config = CONFIGS[name]
        for field in fields(config):
            if field.name == "layer_types" and name in UNLIKE:  # which shows in its parameters
                continue
            if (
                field.name in ARITHMETIC - {epsilon}
                and getattr(config, field.name) != field.default
                and not (slow and field.name in met)
            ):
                met.add(field.name)
                change = {field.name: field.default}
                if field.name == "partial_rotary_factor":  # its factors are of as many features
                    change["rope_scaling"] = None
                if field.name == "router_groups":
                    change["router_groups_taken"] = 1
                yield pytest.param(name, config, change, id=f"{name}-{field.name}", marks=slow)
        for size in ("sliding_window", "attention_chunk_size"):
            if getattr(config, size) and not (slow and size in met):
                met.add(size)
                yield pytest.param(name, config, {size: 99}, id=f"{name}-{size}", marks=slow)


@pytest.mark.witness(
    "gemma3_text-rope_theta",
    "gemma3_text-rms_norm_eps",
    "gemma3_text-attention_multiplier",
    "gemma3_text-embedding_multiplier",
    "gemma3_text-rope_scaling",
    "gemma3_text-norm_offset",
    "gemma3_text-layer_types",
    "gemma3_text-rope_local_base_freq",
    "gemma3_text-sliding_window",
    "granite-residual_multiplier",
    "granite-logits_scaling",
    "qwen3_moe-norm_topk_prob",
    "gpt2-hidden_act",
)
@pytest.mark.parametrize(("name", "config", "change"), [*flags()])
def test_every_setting_of_a_checkpoint_shows_in_its_logits(name, config, change):
    expected = reference(name)
    model = loaded(name)
    other = nnx.eval_shape(lambda: Decoder(replace(config, **change), rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(model))
    _, logits = run(other, expected["input_ids"][:1])
    assert np.abs(logits - expected["logits"][:1]).max() > 1e-2


def stepwise(model, ids, mask, first):
    """The hidden states by a cache: the first tokens at once, the others one by one."""
    cache, parts = model.empty_cache(*ids.shape), []
    for start, stop in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        hidden, cache = model.extend(ids[:, start:stop], mask[:, start:stop], cache)
        parts.append(hidden)
    return np.concatenate(parts, axis=1)


def prompts(expected):
    """The rows, padded on the left, and the first one padded on the right, as prompts of 11 slots.

    Returns their ids, their mask, and the hidden states of what is not padding.
    """
    ids, mask, hidden = (expected[name] for name in ("input_ids", "attention_mask", "hidden"))
    right = np.concatenate([ids[0, :8], [0, 0, 0], ids[0, 8:11]])
    both = np.concatenate([mask, [[1] * 8 + [0] * 3 + [1] * 3]])
    return np.vstack([ids, right]), both, np.concatenate([seen(mask, hidden), hidden[0, :11]])


@pytest.mark.slow
@pytest.mark.witness("llama")
@pytest.mark.parametrize("name", ["llama", *KINDS])
def test_a_cache_changes_nothing(name):
    ids, mask, expected = prompts(reference(name))
    hidden = stepwise(loaded(name), ids, mask, first=11)
    np.testing.assert_allclose(seen(mask, hidden), expected, atol=1e-4)


@pytest.mark.witness("gemma3_text")
@pytest.mark.parametrize("name", ["gemma3_text", "smollm3"])
def test_a_cache_of_scanned_layers_of_several_kinds_changes_nothing(name):
    ids, mask, expected = prompts(reference(name))
    _, model = load_decoder(FIXTURES / name, scan=True)
    hidden = nnx.jit(lambda model: model.extend(ids, mask, model.empty_cache(*ids.shape))[0])(model)
    np.testing.assert_allclose(seen(mask, hidden), expected, atol=1e-4)


@pytest.mark.witness("gpt2")
@pytest.mark.parametrize("name", KINDS)
def test_packed_texts_are_those_of_rows_of_their_own(name):
    whole = reference(name)["input_ids"][0]
    first, second = whole[:6], whole[6:]
    rows = np.zeros((3, len(whole)), int)  # packed; and each alone, in a row of the same length
    rows[0], rows[1, :6], rows[2, :8] = whole, first, second
    segments = np.array([[1] * 6 + [2] * 8, [1] * 14, [1] * 14])
    positions = np.array([[*range(6), *range(8)], range(14), range(14)])
    hidden, _ = run(loaded(name), rows, None, positions, segments)
    np.testing.assert_allclose(hidden[0, :6], hidden[1, :6], atol=1e-4)
    np.testing.assert_allclose(hidden[0, 6:], hidden[2, :8], atol=1e-4)


@pytest.mark.witness("False-gpt2", "True-qwen3_moe")
@every
@pytest.mark.parametrize("scan", [False, True])
def test_a_checkpoint_is_written_as_it_was_read(name, scan, tmp_path):
    scan = scan and name not in UNLIKE
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
    if theirs["model_type"] == "gpt_neox":  # it writes two names for each of these
        for one, other in {
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        }.items():
            assert theirs.pop(one) == theirs[other]
    for key in theirs.keys() - BOOKKEEPING - {k for k in ("head_dim",) if theirs.get(k) is None}:
        assert ours.get(key) == theirs[key], key
    assert DecoderConfig.from_dict(ours) == written(config)


@pytest.mark.weekly
@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_rounds_no_more_than_in_transformers(name):
    expected = reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    _, model = load_decoder(FIXTURES / name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    hidden, logits = run(model, ids, mask)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact, theirs = (seen(mask, expected[key]) for key in ("logits", "bfloat16"))
    # The median, since rounding may choose another expert for a token.
    off, theirs_off = (np.median(np.abs(x - exact)) for x in (seen(mask, logits), theirs))
    assert 0 < off < 1.5 * theirs_off


def written(config):
    """A configuration with all that its `config.json` says in full."""
    whole = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}
    absent = ARCHITECTURES[config.model_type].absent
    return replace(config, **{key: x for key, x in whole.items() if key not in absent})


@pytest.mark.witness("gpt2", "qwen3_moe")
@every
def test_a_decoder_without_arrays_is_the_model_of_its_class(name):
    config = CONFIGS[name]
    for scan in (False,) if name in UNLIKE else (False, True):
        options = {"scan": scan, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "remat": True}
        whole = nnx.eval_shape(lambda o=options: Decoder(config, rngs=nnx.Rngs(0), **o))
        (expected, leaves), (found, own) = map(
            nnx.split, (whole, abstract_decoder(config, **options))
        )
        assert found == expected
        assert jax.tree.structure(own) == jax.tree.structure(leaves)
        same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), own, leaves)
        assert all(jax.tree.leaves(same))


NUMBERS = (-1, 0, 1.5, 2**40, float("nan"), float("inf"))
WRONG = (*NUMBERS, None, True, "", "x", [], ["x"], [2**40], {}, {"a": 1})


@pytest.mark.witness("deepseek_v3", "gemma3_text")
@every
def test_any_value_of_a_setting_is_taken_or_is_a_user_error_at_once(name):
    whole = json.loads((FIXTURES / name / "config.json").read_text())
    for key in whole.keys() | {"rope_parameters", "sliding_window_pattern", "hidden_activation"}:
        for value in WRONG:
            with contextlib.suppress(UserError):
                config = DecoderConfig.from_dict({**whole, key: value})
                assert config.num_hidden_layers <= 1_000
                assert len(config.layer_kinds) == config.num_hidden_layers
                json.dumps(config.to_dict())


@pytest.mark.slow
def test_a_small_phi3_has_no_token_that_transformers_assumes(tmp_path):
    config, model = load_decoder(FIXTURES / "phi3")
    save_decoder(tmp_path / "small", config, model)
    save_decoder(tmp_path / "own", config, model, pad_token_id=3)
    small, own = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("small", "own")
    )
    assert small["pad_token_id"] is None and small["eos_token_id"] is None
    assert own["pad_token_id"] == 3
