"""Adapters trained here compute the same in PEFT; needs the extra `interop-test`."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.finished import decoder_run, encoder_run
from helpers.trained import trained
from test_peft import BASES, FIXTURE_NAMES, FIXTURES, base_of

import adapters_jax as aj
from adapters_jax.app.cli.main import main
from adapters_jax.inference import load_generator, load_predictor
from adapters_jax.interop.peft import load_peft, save_peft
from adapters_jax.models.llama import Llama

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
RECIPES = {
    "bert": [
        aj.lora(4, 6.0, targets=("**/query", "**/mlp/intermediate"), bias="all", head="head"),
        aj.lora(2, dora=True, targets="**/{key,value}", bias="lora_only"),
        aj.Recipe(aj.LoRA("**/{word,value}", 3, 6.0), aj.Unfreeze("**/attention_norm/*")),
        aj.ia3(head="head"),
    ],
    "gpt2": [
        aj.lora(4, 8.0),  # query and value, which have no A in common
        aj.lora(2, dora=True, targets=("**/{query,key,value}", "**/mlp/output/dense")),
        aj.ia3(),  # key and value, two parts of three
        aj.lora(3, targets="**/attention/*", rank_stabilized=True, rank_pattern={"layer_0/**": 2}),
    ],
    "llama": [
        aj.lora(4, 8.0, targets="**/mlp/*", alpha_pattern={"**/up": 2.0}),
        aj.Recipe(aj.LoRA("**/{embeddings,head}", 2, 6.0), aj.Unfreeze("norm/*")),
        aj.llama_adapter(4, layers=[1], gate="layer"),
        aj.ia3(targets="**/attention/*"),
    ],
}
CASES = [(base, i) for base, recipes in RECIPES.items() for i in range(len(recipes))]


def theirs(base, directory):
    """The logits of a saved adapter in PEFT, which must miss no tensor."""
    classes = {
        "bert": transformers.BertForSequenceClassification,
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
    }
    model = classes[base].from_pretrained(BASES / base)
    with np.load(BASES / base / "expected.npz") as file:
        inputs = {name: torch.tensor(file[name]) for name in FIELDS if name in file}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return peft.PeftModel.from_pretrained(model, directory).eval()(**inputs).logits.numpy()


def seen(base, logits):
    """The logits without those of padding."""
    return np.asarray(logits)[base_of(base)[3]["attention_mask"] == 1] if base != "bert" else logits


@pytest.mark.parametrize(("base", "index"), CASES)
def test_what_is_trained_here_has_the_same_logits_in_peft(base, index, tmp_path):
    names, model, params, inputs = base_of(base)
    recipe = aj.Recipe(RECIPES[base][index])
    adapters, logits = trained(base_of(base), recipe)
    directory = save_peft(tmp_path / "a", recipe, adapters, names, params)
    np.testing.assert_allclose(seen(base, theirs(base, directory)), seen(base, logits), atol=1e-4)
    plain = (
        model(**inputs) if isinstance(model, Llama) else model.apply({"params": params}, **inputs)
    )
    assert np.abs(seen(base, plain) - seen(base, logits)).max() > 1e-2


@pytest.mark.parametrize("fixture", [name for name in FIXTURE_NAMES if not name.startswith("net")])
def test_what_came_from_peft_goes_back(fixture, tmp_path):
    base = fixture.split("_")[0]
    names, _, params, _ = base_of(fixture)
    recipe, adapters = load_peft(FIXTURES / fixture, names, params)
    directory: Path = save_peft(tmp_path / "a", recipe, adapters, names, params)
    expected = np.load(FIXTURES / fixture / "logits.npy")
    np.testing.assert_allclose(seen(base, theirs(base, directory)), seen(base, expected), atol=1e-4)


def in_peft(model, directory, ids):
    """The logits of a converted run in PEFT, which must miss no tensor, and those of its base."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        plain = model.eval()(input_ids=torch.tensor(ids)).logits.numpy()
        whole = peft.PeftModel.from_pretrained(model, directory).eval()
        return whole(input_ids=torch.tensor(ids)).logits.numpy(), plain


def test_converted_runs_have_the_same_logits_in_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.array([[2, 5, 9, 7, 3], [2, 8, 12, 4, 3]])
    for run in (encoder_run(), decoder_run()):
        assert main(["convert", run, f"{run}-peft", "--to", "peft"]) == 0
    encoder = transformers.BertForSequenceClassification.from_pretrained("tiny", num_labels=2)
    got, plain = in_peft(encoder, "runs/reviews-peft", ids)
    ours = load_predictor("runs/reviews")
    wanted = ours.model.apply({"params": ours.params}, ids)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.abs(plain - wanted).max() > 0.1
    decoder = transformers.LlamaForCausalLM.from_pretrained("llama")
    got, plain = in_peft(decoder, "runs/meanings-peft", ids % 12)
    wanted = load_generator("runs/meanings").model(ids % 12)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.abs(plain - wanted).max() > 0.1
