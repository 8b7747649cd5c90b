"""Adapters on encoder-decoders, in AdapterHub and back; needs `interop-test`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub
from adapters_jax.finetune.models.t5 import NAMES, load_t5
from adapters_jax.nnx import AdapterParam

WHY = "needs torch and adapters: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
hub = pytest.importorskip("adapters", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES = Path(__file__).parent / "fixtures" / "t5"
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def model_of(name):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(FIXTURES / name)
    hub.init(model)
    return model


def inputs_of(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return {key: file[key] for key in INPUTS}


def logits_there(name, model):
    inputs = {key: torch.tensor(array) for key, array in inputs_of(name).items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def ours(name, model):
    return np.asarray(nnx.jit(lambda model, inputs: model(**inputs))(model, inputs_of(name)))


def compared(kind):
    """The rows to compare: of ReFT those without padding on the left.

    There AdapterHub looks for a decoder's first tokens behind the padding of the encoder's.
    """
    return [0, 2] if kind == "loreft" else slice(None)


RECIPES = {
    "houlsby": aj.houlsby(4, layer_norms=None, activation="silu"),
    "cross": aj.houlsby(4, layer_norms=None, targets="**/{attention,cross_attention,mlp}/output"),
    "sums": aj.Recipe(
        aj.Bottleneck("encoder/**/mlp_sum", 3), aj.Bottleneck("decoder/**/cross_attention_sum", 5)
    ),
    "parallel": aj.parallel(4, targets="**/mlp_sum"),
    "lora": aj.lora(3, 4.0, targets=("**/{query,key,value}", "**/{up|intermediate}")),
    "compacter": aj.compacter(8),
    "loreft": aj.loreft(2, num_layers=2, targets="**/layers/{}", prefix_positions=2),
    "layer": aj.lora(2, targets="decoder/layers/1/**/{query,value}"),
}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("name", ["t5", "flan_t5"])
def test_what_is_made_here_has_the_same_logits_in_adapterhub(name, kind, tmp_path):
    _, model = load_t5(FIXTURES / name)
    recipe, example = aj.Recipe(RECIPES[kind]), (inputs_of(name)["input_ids"],)
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    state = nnx.state(adapted, AdapterParam)
    noise = drawn_like(state)
    adapters = jax.tree.map(lambda x, y: x + jnp.asarray(0.1 * y), state, noise)
    nnx.update(adapted, adapters)
    directory = save_adapterhub(tmp_path / "a", recipe, adapters, NAMES, model)
    there, info = model_of(name), {}
    plain = logits_there(name, there)
    options = {"use_safetensors": True, "set_active": True, "loading_info": info}
    there.load_adapter(str(directory), **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    got, expected = logits_there(name, there), ours(name, adapted)
    np.testing.assert_allclose(got[compared(kind)], expected[compared(kind)], atol=2e-4)
    assert np.abs(plain - expected).max() > 1e-2
    about = json.loads((directory / "adapter_config.json").read_text())
    assert (about["model_type"], about["model_class"]) == ("t5", "T5AdapterModel")
    if kind != "sums":  # which needs two configurations
        assert "configs" not in about["config"]


CONFIGS = {
    "double": lambda: hub.DoubleSeqBnConfig(reduction_factor=5, non_linearity="gelu_new"),
    "cross": lambda: hub.DoubleSeqBnConfig(cross_adapter=True, leave_out=[0, 4]),
    "seq": lambda: hub.SeqBnConfig(reduction_factor={"0": 5, "3": 4, "default": 8}),
    "par": lambda: hub.ParBnConfig(),
    "loreft": lambda: hub.LoReftConfig(r=2, dropout=0.0),
    "lora": lambda: hub.LoRAConfig(
        r=3, alpha=7, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["t5", "flan_t5", "mt5"])
def test_what_is_made_there_has_the_same_logits_here(name, config, tmp_path):
    torch.manual_seed(1)
    there = model_of(name)
    there.add_adapter("made", config=CONFIGS[config](), set_active=True)
    with torch.no_grad():
        for key, parameter in there.named_parameters():
            if ".made." in key:
                parameter += 0.1 * torch.randn_like(parameter)
    there.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    _, model = load_t5(FIXTURES / name)
    recipe, adapters = load_adapterhub(tmp_path / "a", NAMES, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    adapted = aj.load_adapter(native, model, None, inputs_of(name)["input_ids"])
    rows = compared(config)
    np.testing.assert_allclose(
        ours(name, adapted)[rows], logits_there(name, there)[rows], atol=2e-4
    )


def test_adapterhub_saves_no_rule_of_a_t5_without_adapter_heads(tmp_path):
    there = model_of("t5")
    there.add_adapter("made", config=hub.CompacterConfig(reduction_factor=4), set_active=True)
    there.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    with raises(aj.AdapterFileError, "encoder.block.0.layer.0", "phm_rule"):
        load_adapterhub(tmp_path / "a", NAMES, load_t5(FIXTURES / "t5")[1])


def test_lora_on_one_of_two_attentions_is_not_for_adapterhub(tmp_path):
    _, model = load_t5(FIXTURES / "mt5")
    recipe = aj.Recipe(aj.LoRA("**/cross_attention/query", 2))
    example = (inputs_of("mt5")["input_ids"],)
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    adapters = nnx.state(adapted, AdapterParam)
    with pytest.raises(aj.UserError, match=r"EncDecAttention\.q alone.*SelfAttention\.q"):
        save_adapterhub(tmp_path / "a", recipe, adapters, NAMES, model)
