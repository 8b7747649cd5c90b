"""Whisper and adapters on it, read by transformers and PEFT, and back."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.whisper import NAMES, load_whisper, save_whisper
from adapters_jax.nnx import AdapterParam

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURE = Path(__file__).parent / "fixtures" / "whisper"
NAMED = {"features": "input_features", "decoder_input_ids": "decoder_input_ids"}
with np.load(FIXTURE / "expected.npz") as file:
    INPUTS = {ours: file[ours] for ours in NAMED}


def their_base(path=FIXTURE):
    return transformers.WhisperForConditionalGeneration.from_pretrained(path)


def theirs(model):
    inputs = {NAMED[name]: torch.tensor(array) for name, array in INPUTS.items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def ours(model):
    return np.asarray(nnx.jit(lambda model: model(**INPUTS))(model))


def test_transformers_reads_what_is_saved_here_as_the_same_model(tmp_path):
    save_whisper(tmp_path, *load_whisper(FIXTURE), eos_token_id=None, bos_token_id=1)
    one, other = map(their_base, (FIXTURE, tmp_path))
    np.testing.assert_array_equal(theirs(other), theirs(one))
    whole, again = (model.config.to_dict() for model in (one, other))
    differing = {key for key, x in whole.items() if again.get(key) != x}
    assert differing <= {"_name_or_path", "begin_suppress_tokens"}  # which only generation reads


CONFIGS = {
    "query and value": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]
    ),
    "wide": lambda: peft.LoraConfig(
        r=4,
        target_modules=["k_proj", "out_proj", "fc1", "fc2"],
        rank_pattern={"fc2": 2},
        alpha_pattern={r"decoder.*encoder_attn.k_proj": 9},
    ),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "fc2"], use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_of_peft_is_the_same_here(kind, scan, tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(their_base(), CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=1.0 * (parameter.ndim == 1), std=0.15)
    model.save_pretrained(tmp_path)
    expected = theirs(model)
    _, base = load_whisper(FIXTURE, scan=scan)
    recipe, leaves = load_peft(tmp_path, NAMES, base)
    native = aj.save_adapter(tmp_path / "native", leaves, recipe)
    adapted = aj.load_adapter(native, base, None, *INPUTS.values())
    assert np.abs(expected - ours(base)).max() > 0.01
    np.testing.assert_allclose(ours(adapted), expected, atol=1e-4 * np.abs(expected).max())


RECIPES = {
    "lora": aj.Recipe(aj.LoRA("**/query", 3), aj.LoRA("**/mlp/*", 2)),
    "dora": aj.Recipe(aj.DoRA("**/cross_attention/value", 2)),
    "ia3": aj.Recipe(aj.IA3(("**/{key,value}", "**/mlp/output"), feed_forward="**/mlp/output")),
}


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_from_here_is_the_same_in_peft(kind, scan, tmp_path):
    _, base = load_whisper(FIXTURE, scan=scan)
    recipe, example = RECIPES[kind], tuple(INPUTS.values())
    adapted = aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    state = nnx.state(adapted, AdapterParam)
    adapters = jax.tree.map(lambda x, y: x + jnp.asarray(0.1 * y), state, drawn_like(state))
    nnx.update(adapted, adapters)
    save_peft(tmp_path / "a", recipe, adapters, NAMES, base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        other = theirs(peft.PeftModel.from_pretrained(their_base(), tmp_path / "a"))
    expected = ours(adapted)
    assert np.abs(expected - ours(base)).max() > 0.01
    np.testing.assert_allclose(other, expected, atol=1e-4 * np.abs(expected).max())
