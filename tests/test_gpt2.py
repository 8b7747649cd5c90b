"""GPT-2: values of the reference implementation, parts of its fused projection, settings."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises
from safetensors.numpy import save_file

import adapters_jax as aj
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import DecoderConfig, load_decoder
from adapters_jax.trees import flatten

FIXTURE = Path(__file__).parent / "fixtures" / "gpt2"
SMALL = FAMILIES["gpt2"].known["openai-community/gpt2"]


def reference():
    with np.load(FIXTURE / "expected.npz") as file:
        return dict(file)


@pytest.mark.slow
def test_logits_are_those_of_the_reference_behind_padding():
    expected = reference()
    ids, mask, positions = (
        expected[name] for name in ("input_ids", "attention_mask", "position_ids")
    )
    _, model = load_decoder(FIXTURE)
    for given in (positions, None):  # they are counted without padding by default
        logits = np.asarray(model(ids, mask, given))
        np.testing.assert_allclose(logits[mask == 1], expected["logits"][mask == 1], atol=2e-5)
        assert np.isfinite(logits).all()
    shifted = np.asarray(model(ids, mask, positions + 1))
    assert np.abs(shifted - expected["logits"])[mask == 1].max() > 1e-2


@pytest.mark.slow
def test_logits_without_padding_need_neither_mask_nor_positions():
    expected = reference()
    _, model = load_decoder(FIXTURE)
    np.testing.assert_allclose(model(expected["input_ids"][:1]), expected["unpadded"], atol=2e-5)


def test_the_fused_projection_is_split_in_order():
    _, model = load_decoder(FIXTURE)
    fused = read_arrays(FIXTURE)["transformer.h.1.attn.c_attn.weight"]
    attention = model.layers[1].attention
    kernels = [getattr(attention, name).kernel[...] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(np.concatenate(kernels, axis=1), fused)


def test_every_parameter_path():
    modules = {
        *(f"attention/{child}" for child in ("query", "key", "value", "output")),
        *("mlp/up", "mlp/output"),
    }
    layer = {f"{module}/{leaf}" for module in modules for leaf in ("kernel", "bias")}
    norms = {"norm", *(f"layers/{i}/{name}_norm" for i in (0, 1) for name in ("attention", "mlp"))}
    expected = {
        "embeddings/embedding",
        "position_embeddings/embedding",
        *(f"layers/{i}/{path}" for i in (0, 1) for path in layer),
        *(f"{path}/{leaf}" for path in norms for leaf in ("scale", "bias")),
    }
    assert set(flatten(nnx.state(load_decoder(FIXTURE)[1], nnx.Param))) == expected


def test_checkpoints_without_a_prefix_and_with_buffers(tmp_path):
    tensors = {k.removeprefix("transformer."): x for k, x in read_arrays(FIXTURE).items()}
    tensors["h.0.attn.bias"] = np.tri(16)[None, None]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURE / "config.json").read_text())
    ids = reference()["input_ids"][:1]
    found, expected = (load_decoder(path)[1](ids) for path in (tmp_path, FIXTURE))
    np.testing.assert_array_equal(found, expected)


def test_a_config_without_sizes_is_the_small_one():
    assert DecoderConfig.from_dict({"model_type": "gpt2"}) == SMALL
    assert DecoderConfig.from_dict({"model_type": "gpt2", "n_inner": None}) == SMALL
    wide = DecoderConfig.from_dict({"model_type": "gpt2", "n_embd": 60, "n_head": 5})
    assert (wide.intermediate_size, wide.head_width) == (240, 12)


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"activation_function": "mish"}, ["hidden_act='mish'", "'gelu'"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True"]),
        ({"add_cross_attention": True}, ["add_cross_attention=True"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings=False"]),
        ({"n_embd": "wide"}, ["'wide'"]),
    ],
)
def test_unsupported_settings_raise_an_error_that_names_them(settings, data):
    with raises(aj.UserError, *data):
        DecoderConfig.from_dict({"model_type": "gpt2", **settings})


def test_a_llama_cannot_be_saved_with_what_only_gpt2_has():
    for field, value in (("learned_positions", True), ("norm_type", "layer"), ("mlp_gate", False)):
        with raises(aj.UserError, "model_type='llama'", f"{field}={value!r}"):
            DecoderConfig(**{field: value}).to_dict()
    with raises(aj.UserError, "norm_type", "'group'"):
        DecoderConfig(norm_type="group")
