"""Decoders that classify: the formula, checkpoints with and without a score, PEFT's adapters."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers.arrays import drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import MismatchError, UserError
from adapters_jax.files.directories import PEFT
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    load_decoder,
    load_decoder_classifier,
    save_decoder,
)
from adapters_jax.trees import flatten, unflatten

LLAMA = Path(__file__).parent / "fixtures" / "llama"
NAMES = ARCHITECTURES["llama"].names
IDS = np.array([[4, 9, 5, 6, 0], [1, 2, 3, 4, 5]])
SCORE = drawn((32, 3))


def scored(**options):
    """The fixture with a score."""
    _, model = load_decoder_classifier(LLAMA, 3, **options)
    np.testing.assert_array_equal(model.score.kernel[...], 0)
    model.score.kernel[...] = SCORE
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_the_score_reads_the_last_token_of_each_row(scan):
    model, plain = scored(scan=scan), load_decoder(LLAMA)[1]
    right = (IDS > 0).astype(int)
    hidden = np.asarray(plain.hidden(IDS, right))
    expected = hidden[[0, 1], [3, 4]] @ np.asarray(SCORE)
    np.testing.assert_allclose(model(IDS, right), expected, atol=1e-5)
    np.testing.assert_allclose(model(IDS, jnp.asarray(right, bool)), expected, atol=1e-5)
    left, mask = np.roll(IDS, [1, 0], axis=[1, 0]), np.array([[0, 1, 1, 1, 1], [1] * 5])
    left[1] = IDS[1]
    np.testing.assert_allclose(model(left, mask), expected, atol=1e-5)
    np.testing.assert_allclose(model(IDS[1:]), expected[1:], atol=1e-5)


def test_a_saved_classifier_loads_and_a_language_model_without_score_does_not(tmp_path):
    model = scored()
    save_decoder(tmp_path / "a", model.config, model, pad_token_id=0)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    assert settings["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    _, again = load_decoder_classifier(tmp_path / "a")
    assert again.num_labels == 3
    np.testing.assert_array_equal(again(IDS), model(IDS))
    with raises(UserError, "score.weight", "num_labels"):
        load_decoder_classifier(LLAMA)
    with raises(MismatchError, "score/kernel (score.weight)", [3, 32], [2, 32]):
        load_decoder_classifier(tmp_path / "a", 2)
    with raises(MismatchError, "1 missing", "lm_head.weight", "score.weight"):
        load_decoder(tmp_path / "a")
    with raises(UserError, "num_labels=0"):
        load_decoder_classifier(LLAMA, 0)


def adapter():
    """An adapter of the embedding, which is no output layer here, and of queries, with a score."""
    recipe = aj.Recipe(aj.LoRA("{embeddings,**/query}", 2, 3.0), aj.Unfreeze("score/*"))
    sizes = {"embeddings": (60, 32)} | {f"layers/{i}/attention/query": (32, 32) for i in (0, 1)}
    leaves = {
        f"{path}/lora/{name}": drawn(shape, seed=len(path))
        for path, (rows, columns) in sizes.items()
        for name, shape in (("a", (rows, 2)), ("b", (2, columns)))
    }
    return recipe, unflatten(leaves | {"score/kernel": SCORE})


def test_adapters_with_a_score_go_to_peft_and_back(tmp_path):
    _, model = load_decoder_classifier(LLAMA, 3)
    recipe, tree = adapter()
    directory = save_peft(tmp_path / "a", recipe, tree, NAMES, model, task_type="SEQ_CLS")
    config = json.loads((directory / PEFT.config).read_text())
    assert config["modules_to_save"] == ["score"] and "ensure_weight_tying" not in config
    tensors = safetensors.numpy.load_file(directory / PEFT.tensors)
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], SCORE.T)
    again = flatten(load_peft(directory, NAMES, model)[1])
    for path, leaf in flatten(tree).items():
        np.testing.assert_array_equal(again[path], leaf)
    _, other = load_decoder_classifier(LLAMA, 2)
    with raises(UserError, "score.weight", [3, 32], [32, 2]):
        load_peft(directory, NAMES, other)


@pytest.mark.slow
def test_a_command_converts_a_score(tmp_path):
    _, model = load_decoder_classifier(LLAMA, 3)
    recipe, tree = adapter()
    named = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(LLAMA)}
    save_peft(tmp_path / "a", recipe, tree, NAMES, model, **named)
    for source, to in (("a", "native"), ("native", "peft")):
        places = str(tmp_path / source), str(tmp_path / to), "--model", str(LLAMA)
        assert main(["convert", *places, "--to", to]) == 0
    adapted = aj.load_adapter(tmp_path / "native", scored(), example_inputs=(IDS,))
    back = load_peft(tmp_path / "peft", NAMES, model)
    native = aj.save_adapter(tmp_path / "b", back[1], back[0])
    again = aj.load_adapter(native, model, example_inputs=(IDS,))
    logits = nnx.jit(lambda model: model(IDS))
    np.testing.assert_array_equal(logits(adapted), logits(again))
    config = json.loads((tmp_path / "peft" / PEFT.config).read_text())
    assert config["task_type"] == "SEQ_CLS"
    for form in ("native", "peft"):
        card = (tmp_path / form / "README.md").read_text()
        assert "text-classification" in card
    assert "num_labels=3" in card


def test_the_score_of_a_gpt2_is_no_convolution(tmp_path):
    names, kernel = ARCHITECTURES["gpt2"].names, np.ones((4, 3), np.float32)
    base = {"score": {"kernel": kernel}, "layers": {"0": {"mlp": {"up": {"kernel": kernel}}}}}
    recipe = aj.Recipe(aj.LoRA("**/up", 2), aj.Unfreeze("score/*"))
    leaves = {"layers/0/mlp/up/lora/a": drawn((4, 2)), "layers/0/mlp/up/lora/b": drawn((2, 3))}
    tree = unflatten(leaves | {"score/kernel": drawn((4, 3))})
    directory = save_peft(tmp_path / "a", recipe, tree, names, base)
    tensors = safetensors.numpy.load_file(directory / PEFT.tensors)
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], drawn((4, 3)).T)
    again = flatten(load_peft(directory, names, base)[1])
    np.testing.assert_array_equal(again["score/kernel"], drawn((4, 3)))
    assert names.source("score/kernel").transposed
