"""Experts in MXFP4: read as the numbers that they stand for, or refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises
from safetensors.numpy import save_file

from adapters_jax.errors import BaseFileError
from adapters_jax.finetune.base_files import mxfp4
from adapters_jax.finetune.models.decoder import (
    Decoder,
    DecoderConfig,
    load_decoder,
    save_decoder,
)

FIXTURE = Path(__file__).parent / "fixtures" / "decoders" / "gpt_oss"
STACKS = ("gate_up_proj", "down_proj")


def numbers():
    """Every number of four bits with powers of two from the smallest to the largest."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 5, 3, 16), dtype=np.uint8)
    blocks[0, 0, 0] = np.arange(16) * 16 + np.arange(16)[::-1]
    scales = rng.integers(100, 140, (2, 5, 3), dtype=np.uint8)
    scales[0, 0], scales[0, 1] = (0, 1, 127), (2, 200, 252)
    return blocks, scales


def by_hand(blocks, scales):
    """The formula: a sign, two bits of an exponent, one of a fraction, and the power of two."""
    found = np.zeros((*blocks.shape[:-1], 32))
    for i, code in np.ndenumerate(np.stack([blocks & 15, blocks >> 4], -1).reshape(found.shape)):
        exponent, half = (code >> 1) & 3, (code & 1) / 2
        size = half if exponent == 0 else (1 + half) * 2.0 ** (int(exponent) - 1)
        found[i] = (-1.0 if code & 8 else 1.0) * size * 2.0 ** (int(scales[i[:-1]]) - 127)
    return np.ascontiguousarray(found.reshape(*blocks.shape[:2], -1).swapaxes(-1, -2))


def test_every_number_is_that_of_the_formula():
    blocks, scales = numbers()
    found = mxfp4.whole({"w_blocks": blocks, "w_scales": scales, "w_bias": np.ones(3)})
    assert found.keys() == {"w", "w_bias"}
    assert (found["w"].shape, found["w"].dtype) == ((2, 96, 5), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found["w"], np.float64), by_hand(blocks, scales))


def test_they_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = numbers()
    expected = theirs.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    found = np.asarray(mxfp4.whole({"w_blocks": blocks, "w_scales": scales})["w"], np.float32)
    np.testing.assert_array_equal(found, expected.float().numpy())


@pytest.fixture
def packed(tmp_path):
    """A checkpoint whose experts are in MXFP4, and its tensors with the numbers they stand for."""
    tensors, rng = read_arrays(FIXTURE), np.random.default_rng(1)
    config = json.loads((FIXTURE / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config["layer_types"] = config["layer_types"][:1]
    plain = dict(config)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    shape = DecoderConfig.from_dict(plain)
    save_decoder(tmp_path / "plain", shape, Decoder(shape, rngs=nnx.Rngs(0)))
    tensors = read_arrays(tmp_path / "plain")
    exact = dict(tensors)
    for name in STACKS:
        full = f"model.layers.0.mlp.experts.{name}"
        experts, inputs, outputs = tensors.pop(full).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:-1], dtype=np.uint8)
        tensors |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
        exact[full] = by_hand(blocks, scales).astype(np.float32)
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    save_file(exact, tmp_path / "plain" / "model.safetensors")
    return tmp_path / "packed", tmp_path / "plain", tensors


@pytest.mark.slow
def test_a_checkpoint_is_read_as_its_numbers_and_saved_without_the_method(packed, tmp_path):
    directory, plain, _ = packed
    config, found = load_decoder(directory)
    more = json.loads((directory / "config.json").read_text())
    save_decoder(tmp_path / "saved", config, found, **more)
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    saved = read_arrays(tmp_path / "saved")
    for name, tensor in read_arrays(plain).items():
        np.testing.assert_array_equal(saved[name], tensor)


NAME = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda t: t.pop(f"{NAME}_scales"), (f"{NAME}_scales", "[4, 32, 1, 16] uint8")),
        (lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"][:, :-1]}), ("[4, 31, 1]",)),
        (lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"][..., 1:]}), ("[4, 32, 1, 15]",)),
        (lambda t: t.update({f"{NAME}_blocks": np.ones((4, 32, 1, 16), np.float32)}), ("float32",)),
        (lambda t: t[f"{NAME}_scales"].__setitem__((0, 0), 255), (f"{NAME}_scales", "bfloat16")),
    ],
)
def test_damaged_blocks_are_refused(packed, change, data):
    directory, _, tensors = packed
    tensors[f"{NAME}_blocks"][:] = 0x22
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with raises(BaseFileError, f"{NAME}_", *data):
        load_decoder(directory)
