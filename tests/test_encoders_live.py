"""Adapters on every encoder go both ways with PEFT, in transformers 4 and 5."""

import warnings
from functools import cache

import numpy as np
import pytest
import test_vision as vision
from helpers.trained import trained
from test_encoders import FIXTURES, classifier, expected, loaded

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("xlm_roberta", "distilbert", "electra", "modernbert", "deberta_v3", "deberta_v2")
FIVE = int(transformers.__version__.split(".")[0]) >= 5


@cache
def base_of(name):
    """The name table, the classifier, its parameters and its inputs."""
    return loaded(name)[0].classifier.names, *classifier(name), expected(name)[0]


def theirs(name):
    """The classifier in transformers."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        FIXTURES / name, attn_implementation="eager"
    ).eval()


def logits_there(name, model):
    inputs = {key: torch.tensor(value) for key, value in expected(name)[0].items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def logits_here(name, recipe, adapters):
    _, model, params, inputs = base_of(name)
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    return aj.adapt(model, recipe).apply({"params": whole}, **inputs)


PEFT_RECIPES = {
    "lora": aj.lora(2, 3.0, targets="**/attention/{query,key,value,output/dense}"),
    "mlp": aj.lora(
        3, targets="**/mlp/{intermediate,output/dense}", rank_pattern={"**/layer_1/**": 2}
    ),
    "dora": aj.lora(
        2, dora=True, targets=("**/attention/{query,key,value}", "**/mlp/output/dense")
    ),
    "ia3": aj.ia3(),
    "word": aj.Recipe(aj.LoRA("**/embeddings/word", 2, 3.0), aj.Unfreeze("**/mlp_norm/*")),
}


@pytest.mark.parametrize("recipe", PEFT_RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_here_has_the_same_logits_in_peft(name, recipe, tmp_path):
    recipe = aj.Recipe(PEFT_RECIPES[recipe])
    names, _, params, _ = base_of(name)
    adapters, logits = trained(base_of(name), recipe)
    saved = save_peft(tmp_path / "a", recipe, adapters, names, params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        there = peft.PeftModel.from_pretrained(theirs(name), saved)
    np.testing.assert_allclose(logits_there(name, there), logits, atol=1e-4)
    assert np.abs(expected(name)[1]["logits"] - logits).max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_head_with_its_pooler_goes_to_peft_and_back(name, tmp_path):
    base = loaded(name)[0].classifier.base
    recipe = aj.lora(2, head="head") + aj.Unfreeze(f"{base}/pooler/**")
    names, _, params, _ = base_of(name)
    adapters, logits = trained(base_of(name), recipe)
    options = {"task_type": "SEQ_CLS"}
    saved = save_peft(tmp_path / "a", recipe, adapters, names, params, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        there = peft.PeftModel.from_pretrained(theirs(name), saved)
    np.testing.assert_allclose(logits_there(name, there), logits, atol=1e-4)
    again, back = load_peft(saved, names, params)
    np.testing.assert_allclose(logits_here(name, again, back), logits, atol=1e-4)


QUERIES = {
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv", "Wi"],
    "deberta_v3": ["query_proj", "key_proj"],
    "deberta_v2": ["query_proj", "pos_key_proj"],
}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_made_in_peft_has_the_same_logits_here(name, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=QUERIES.get(name, ["query", "value"]),
        init_lora_weights=False,
        task_type="SEQ_CLS",
    )
    made = peft.get_peft_model(theirs(name), config)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "modules_to_save" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "a")
    names, _, params, _ = base_of(name)
    recipe, adapters = load_peft(tmp_path / "a", names, params)
    wanted = logits_there(name, made)
    np.testing.assert_allclose(logits_here(name, recipe, adapters), wanted, atol=1e-4)
    assert np.abs(expected(name)[1]["logits"] - wanted).max() > 1e-2


VISION = {
    "vit": (transformers.ViTModel, ["q_proj", "fc1"] if FIVE else ["query", "intermediate.dense"]),
    "dinov2": (transformers.Dinov2Model, ["q_proj" if FIVE else "query", "fc2"]),
    "clip": (transformers.CLIPVisionModel, ["q_proj", "fc1"]),
}


@pytest.mark.parametrize("name", VISION)
def test_adapters_of_image_encoders_go_both_ways_with_peft(name, tmp_path):
    config, params = vision.family_at(name).load(FIXTURES / name)
    names, model, wanted = (
        vision.family_at(name).names,
        vision.ImageEncoder(config),
        vision.expected(name),
    )
    prefix = "vision_model." if name == "clip" and not FIVE else ""
    build, targets = VISION[name]

    def hidden_there(adapted):
        pixels = torch.tensor(wanted["pixels"]).permute(0, 3, 1, 2)
        with torch.no_grad():
            return adapted.eval()(pixel_values=pixels).last_hidden_state.numpy()

    def hidden_here(recipe, adapters):
        whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
        return aj.adapt(model, recipe).apply({"params": whole}, wanted["pixels"])

    recipe = aj.lora(2, 3.0, targets=("**/attention/{query,output/dense}", "**/mlp/intermediate"))
    inputs = {"pixels": wanted["pixels"]}
    adapters, hidden = trained((names, model, params, inputs), recipe)
    saved = save_peft(tmp_path / "a", recipe, adapters, names, params, prefix=prefix)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        there = peft.PeftModel.from_pretrained(build.from_pretrained(FIXTURES / name), saved)
    np.testing.assert_allclose(hidden_there(there), hidden, atol=1e-4)
    assert np.abs(wanted["hidden"] - hidden).max() > 1e-2
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    made = peft.get_peft_model(build.from_pretrained(FIXTURES / name), lora)
    made.save_pretrained(tmp_path / "b")
    back = hidden_here(*load_peft(tmp_path / "b", names, params))
    np.testing.assert_allclose(back, hidden_there(made), atol=1e-4)
    assert np.abs(wanted["hidden"] - back).max() > 1e-2


@pytest.mark.parametrize("side", [8, 16, 28])
def test_dinov2_reads_images_of_other_sides(side):
    config, params = vision.family_at("dinov2").load(FIXTURES / "dinov2")
    config, params = config.of_images((side, side), params)
    pixels = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        there = VISION["dinov2"][0].from_pretrained(FIXTURES / "dinov2").eval()
        wanted = there(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).last_hidden_state
    found = vision.ImageEncoder(config).apply({"params": params}, pixels)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
