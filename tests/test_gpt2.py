"""GPT-2: values of the reference implementation, paths, counts, dtypes, errors."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.arrays import read_arrays
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.models import KNOWN
from adapters_jax.models.gpt2 import GPT2, GPT2Config, load_gpt2
from adapters_jax.models.parts.functions import causal_mask

FIXTURE = Path(__file__).parent / "fixtures" / "gpt2"
TINY = GPT2Config(vocab_size=20, n_positions=10, n_embd=8, n_layer=1, n_head=2)
IDS = jnp.array([[3, 4, 5, 6], [7, 8, 9, 1]])


@cache
def tiny_variables():
    """Random parameters; drawn by numpy, which compiles nothing."""
    draw = np.random.default_rng(0).normal
    variables = jax.eval_shape(GPT2(TINY).init, jax.random.key(0), IDS)
    return jax.tree.map(lambda x: draw(0, 0.3, x.shape).astype(x.dtype), variables)


def reference():
    with np.load(FIXTURE / "expected.npz") as file:
        expected = dict(file)
    inputs = ("input_ids", "attention_mask", "position_ids")
    return {key: expected[key] for key in inputs}, expected


def test_logits_are_those_of_the_reference_behind_padding():
    inputs, expected = reference()
    config, params = load_gpt2(FIXTURE)
    logits = GPT2(config).apply({"params": params}, **inputs)
    tokens = inputs["attention_mask"] == 1
    np.testing.assert_allclose(logits[tokens], expected["logits"][tokens], atol=2e-5)
    assert np.isfinite(logits).all()


def test_logits_without_padding_need_neither_mask_nor_positions():
    inputs, expected = reference()
    config, params = load_gpt2(FIXTURE)
    logits = GPT2(config).apply({"params": params}, inputs["input_ids"][:1])
    np.testing.assert_allclose(logits, expected["unpadded"], atol=2e-5)


def test_fused_projection_is_split_in_order():
    _, params = load_gpt2(FIXTURE)
    fused = read_arrays(FIXTURE)["transformer.h.1.attn.c_attn.weight"]
    attention = params["layer_1"]["attention"]
    kernels = [attention[name]["kernel"] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(np.concatenate(kernels, axis=1), fused)


def test_every_parameter_path():
    layer = {
        *(f"attention/{child}" for child in ("query", "key", "value", "output/dense")),
        *(f"mlp/{child}" for child in ("intermediate", "output/dense")),
    }
    norms = {"norm", "layer_0/attention_norm", "layer_0/mlp_norm"}
    expected = {
        "embeddings/word/embedding",
        "embeddings/position/embedding",
        *(f"layer_0/{path}/{leaf}" for path in layer for leaf in ("kernel", "bias")),
        *(f"{path}/{leaf}" for path in norms for leaf in ("scale", "bias")),
    }
    params = jax.eval_shape(GPT2(TINY).init, jax.random.key(0), IDS)["params"]
    assert set(flatten_dict(params, sep="/")) == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt3-175b", 174_604_259_328)],
)
def test_known_shapes_have_the_published_counts(name, count):
    model, inputs = KNOWN[name]()
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_later_tokens_do_not_reach_earlier_ones():
    apply = jax.jit(partial(GPT2(TINY).apply, tiny_variables()))
    before, after = apply(IDS), apply(IDS.at[:, 2].set(11))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2:] - after[:, 2:]).max() > 1e-3


def test_causal_mask_leaves_padding_out():
    mask = causal_mask(IDS, jnp.array([[0, 1, 1, 1], [1, 1, 1, 1.0]]))
    assert mask.shape == (2, 1, 4, 4)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask[1, 0], np.tri(4, dtype=bool))
    assert mask[0, 0].sum() == 6
    assert not mask[0, 0, :, 0].any()


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    low, variables = GPT2(TINY, dtype=jnp.bfloat16), tiny_variables()
    init = jax.eval_shape(low.init, jax.random.key(0), IDS)
    assert {leaf.dtype for leaf in jax.tree.leaves(init)} == {jnp.dtype("float32")}
    hidden = jax.eval_shape(partial(low.apply, method=GPT2.hidden), variables, IDS)
    assert hidden.dtype == jnp.bfloat16
    exact, logits = (jax.jit(model.apply)(variables, IDS) for model in (GPT2(TINY), low))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.05)
    assert np.abs(logits - exact).max() > 1e-4


def test_remat_changes_neither_values_nor_gradients():
    def loss(variables, remat):
        logits = GPT2(TINY, remat=remat).apply(variables, IDS)
        return jax.nn.log_softmax(logits)[:, :, 0].sum()

    plain, recomputed = (jax.value_and_grad(partial(loss, remat=remat)) for remat in (False, True))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5),
        jax.jit(plain)(tiny_variables()),
        jax.jit(recomputed)(tiny_variables()),
    )
    assert str(jax.make_jaxpr(recomputed)(tiny_variables())).count("remat") >= TINY.n_layer


def test_sublayers_and_embeddings_have_rates_of_their_own():
    config = replace(TINY, embd_pdrop=0.0, resid_pdrop=0.5, attn_pdrop=0.0)
    apply = partial(
        GPT2(config).apply,
        deterministic=False,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )
    _, seen = jax.jit(apply)(tiny_variables(), IDS, rngs={"dropout": jax.random.key(1)})
    outputs = {"/".join(path): out for path, (out,) in flatten_dict(seen["intermediates"]).items()}
    embeddings = outputs.pop("embeddings/dropout/__call__")
    assert not (embeddings == 0).any()
    names = ("layer_0/attention/output", "layer_0/mlp/output")
    assert outputs.keys() == {f"{name}/Dropout_0/__call__" for name in names}
    assert all(0.3 < (out == 0).mean() < 0.7 for out in outputs.values())


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"activation_function": "mish"}, ["activation_function='mish'", "'gelu'"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings=False"]),
        ({"model_type": "bert"}, ["model_type='bert'", "'gpt2'"]),
        ({"n_embd": 10, "n_head": 4}, [10, 4]),
    ],
)
def test_unsupported_settings_raise_an_error_that_names_them(settings, data):
    with raises(aj.UserError, *data):
        GPT2Config.from_dict(settings)


def test_a_sequence_too_long_raises():
    with raises(aj.UserError, "input_ids", 11, 10):
        jax.eval_shape(GPT2(TINY).init, jax.random.key(0), jnp.ones((2, 11), int))
