"""Adapters on every encoder go both ways with AdapterHub; needs `interop-test`."""

import json

import numpy as np
import pytest
import test_vision as vision
from helpers.trained import trained
from test_encoders import FIXTURES, expected, loaded

import adapters_jax as aj
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub

WHY = "needs torch, transformers, peft and adapters: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
hub = pytest.importorskip("adapters", reason=WHY)
from test_encoders_live import NAMES, base_of, logits_here, logits_there, theirs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

IN_HUB = tuple(name for name in NAMES if name != "modernbert")  # which AdapterHub does not support


HUB_RECIPES = {
    "houlsby": aj.houlsby(4, layer_norms=None),
    "seq": aj.pfeiffer(4, targets="**/mlp_norm", placement="norm", activation="relu"),
    "par": aj.parallel(4, targets="**/mlp_sum", activation="relu"),
    "lora": aj.lora(4, 2.0, targets=("**/{query,key,value}", "**/mlp/intermediate")),
}


def hub_model(name):
    model = theirs(name)
    hub.init(model)
    return model


@pytest.mark.parametrize("recipe", HUB_RECIPES)
@pytest.mark.parametrize("name", IN_HUB)
def test_what_is_trained_here_has_the_same_logits_in_adapterhub(name, recipe, tmp_path):
    recipe = aj.Recipe(HUB_RECIPES[recipe])
    names, _, params, _ = base_of(name)
    adapters, logits = trained(base_of(name), recipe)
    saved = save_adapterhub(tmp_path / "a", recipe, adapters, names, params)
    there, info = hub_model(name), {}
    there.load_adapter(str(saved), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    np.testing.assert_allclose(logits_there(name, there), logits, atol=1e-4)
    assert np.abs(expected(name)[1]["logits"] - logits).max() > 1e-2


HUB_CONFIGS = {
    "double": lambda: hub.DoubleSeqBnConfig(reduction_factor=6, non_linearity="gelu_new"),
    "seq": lambda: hub.SeqBnConfig(reduction_factor=6),
    "par": lambda: hub.ParBnConfig(reduction_factor=6),
    "lora": lambda: hub.LoRAConfig(
        r=3, alpha=7, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
}


@pytest.mark.parametrize("config", HUB_CONFIGS)
@pytest.mark.parametrize("name", IN_HUB)
def test_what_is_made_in_adapterhub_has_the_same_logits_here(name, config, tmp_path):
    torch.manual_seed(1)
    made = hub_model(name)
    made.add_adapter("made", config=HUB_CONFIGS[config](), set_active=True)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if ".made." in key:
                parameter += 0.2 * torch.randn_like(parameter)
    made.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True, with_head=False)
    names, _, params, _ = base_of(name)
    recipe, adapters = load_adapterhub(tmp_path / "a", names, params)
    wanted = logits_there(name, made)
    np.testing.assert_allclose(logits_here(name, recipe, adapters), wanted, atol=1e-4)
    assert np.abs(expected(name)[1]["logits"] - wanted).max() > 1e-2


CLASSES = {
    "xlm_roberta": "XLMRobertaAdapterModel",
    "distilbert": "DistilBertAdapterModel",
    "electra": "ElectraAdapterModel",
    "deberta_v3": "DebertaV2AdapterModel",
    "deberta_v2": "DebertaV2AdapterModel",
}


@pytest.mark.parametrize("name", IN_HUB)
def test_a_head_with_its_pooler_goes_to_adapterhub_and_back(name, tmp_path):
    base = loaded(name)[0].classifier.base
    recipe = aj.houlsby(4, layer_norms=None, head="head") + aj.Unfreeze(f"{base}/pooler/**")
    names, _, params, _ = base_of(name)
    adapters, logits = trained(base_of(name), recipe)
    types = {"xlm_roberta": {"model_type": "xlm-roberta", "model_class": CLASSES[name]}}
    saved = save_adapterhub(
        tmp_path / "a", recipe, adapters, names, params, pooling="pooler", **types.get(name, {})
    )
    there, info = getattr(hub, CLASSES[name]).from_pretrained(FIXTURES / name), {}
    there.load_adapter(str(saved), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    np.testing.assert_allclose(logits_there(name, there), logits, atol=1e-4)
    again, back = load_adapterhub(saved, names, params, pooling="pooler")
    np.testing.assert_allclose(logits_here(name, again, back), logits, atol=1e-4)


def vit_in_hub():
    there = transformers.ViTModel.from_pretrained(FIXTURES / "vit")
    hub.init(there)
    return there


def vit_hidden(there):
    pixels = torch.tensor(vision.expected("vit")["pixels"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        return there.eval()(pixel_values=pixels).last_hidden_state.numpy()


def vit_here(recipe, adapters):
    config, params = vision.family_at("vit").load(FIXTURES / "vit")
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    pixels = vision.expected("vit")["pixels"]
    return aj.adapt(vision.ImageEncoder(config), recipe).apply({"params": whole}, pixels)


VIT_RECIPES = {
    "houlsby": aj.houlsby(4, layer_norms=None),
    "par": aj.parallel(4, targets="**/mlp_sum", activation="relu"),
    "lora": aj.lora(4, 2.0, targets=("**/attention/{query,key,value}", "**/mlp/intermediate")),
}


@pytest.mark.parametrize("recipe", VIT_RECIPES)
def test_what_is_trained_on_vit_has_the_same_hidden_states_in_adapterhub(recipe, tmp_path):
    family, recipe = vision.family_at("vit"), aj.Recipe(VIT_RECIPES[recipe])
    config, params = family.load(FIXTURES / "vit")
    wanted = vision.expected("vit")
    inputs = {"pixels": wanted["pixels"]}
    adapters, hidden = trained((family.names, vision.ImageEncoder(config), params, inputs), recipe)
    saved = save_adapterhub(tmp_path / "a", recipe, adapters, family.names, params)
    assert json.loads((saved / "adapter_config.json").read_text())["model_type"] == "vit"
    there, info = vit_in_hub(), {}
    there.load_adapter(str(saved), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    np.testing.assert_allclose(vit_hidden(there), hidden, atol=1e-4)
    assert np.abs(wanted["hidden"] - hidden).max() > 1e-2


@pytest.mark.parametrize("config", HUB_CONFIGS)
def test_what_is_made_on_vit_in_adapterhub_has_the_same_hidden_states_here(config, tmp_path):
    torch.manual_seed(1)
    there = vit_in_hub()
    there.add_adapter("made", config=HUB_CONFIGS[config](), set_active=True)
    with torch.no_grad():
        for name, parameter in there.named_parameters():
            if ".made." in name:
                parameter += 0.2 * torch.randn_like(parameter)
    there.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    family = vision.family_at("vit")
    recipe, adapters = load_adapterhub(
        tmp_path / "a", family.names, family.load(FIXTURES / "vit")[1]
    )
    wanted = vit_hidden(there)
    np.testing.assert_allclose(vit_here(recipe, adapters), wanted, atol=1e-4)
    assert np.abs(vision.expected("vit")["hidden"] - wanted).max() > 1e-2
