"""Encoder-decoders and adapters on them, read by transformers and PEFT, and back."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises
from helpers.tiny import write_meanings

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator
from adapters_jax.finetune.models.t5 import NAMES, load_t5, save_t5
from adapters_jax.nnx import AdapterParam

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES = Path(__file__).parent / "fixtures" / "t5"
EVERY = sorted(path.name for path in FIXTURES.iterdir())
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def their_base(path):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(path)


def inputs_of(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return {key: file[key] for key in INPUTS}


def theirs(name, model):
    inputs = {key: torch.tensor(array) for key, array in inputs_of(name).items()}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def ours(name, model):
    return np.asarray(nnx.jit(lambda model, inputs: model(**inputs))(model, inputs_of(name)))


def in_peft(name, directory):
    """The logits of a saved adapter in PEFT, which must miss no tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        base = their_base(FIXTURES / name)
        return theirs(name, peft.PeftModel.from_pretrained(base, directory))


@pytest.mark.parametrize("name", EVERY)
def test_transformers_reads_what_is_saved_here_as_the_same_model(name, tmp_path):
    tokens = {"eos_token_id": 1, "pad_token_id": 0}
    save_t5(tmp_path, *load_t5(FIXTURES / name), **tokens)
    one, other = map(their_base, (FIXTURES / name, tmp_path))
    np.testing.assert_array_equal(theirs(name, other), theirs(name, one))
    whole, again = (model.config.to_dict() for model in (one, other))
    differing = {key for key, x in whole.items() if again.get(key) != x}
    # transformers 5 keeps the tokenizer's class, which transformers 4 wrote into the fixture.
    assert differing <= {"_name_or_path", "tokenizer_class"}


def test_shards_and_copies_of_tied_weights_are_read(tmp_path):
    base = their_base(FIXTURES / "flan_t5")
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _, model = load_t5(tmp_path)
    np.testing.assert_allclose(ours("flan_t5", model), theirs("flan_t5", base), atol=1e-4)


def default_lora(model_type):
    """The modules of PEFT's default for the architecture: query and value."""
    return peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=6)


def wide_lora(model_type):
    up = "wi" if model_type == "t5" else "wi_1"
    return peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=4,
        target_modules=["k", "o", up, "wo"],
        rank_pattern={"wo": 2},
        alpha_pattern={r"decoder.*EncDecAttention.k": 9},
    )


def dora(model_type):
    targets = ["q", "wo"]
    return peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=targets, use_dora=True)


def default_ia3(model_type):
    return peft.IA3Config(task_type="SEQ_2_SEQ_LM")


def made_by_peft(name, kind, directory):
    """The logits of an adapter that PEFT made, with values in all that trains, and saved."""
    torch.manual_seed(0)
    base = their_base(FIXTURES / name)
    gated = "mt5" if base.config.is_gated_act else "t5"
    model = peft.get_peft_model(base, kind(gated))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=1.0 * (parameter.ndim == 1), std=0.15)
    model.save_pretrained(directory)
    return theirs(name, model)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", [default_lora, wide_lora, dora, default_ia3])
def test_what_peft_made_computes_the_same_here_and_goes_back(name, kind, tmp_path):
    expected = made_by_peft(name, kind, tmp_path / "theirs")
    assert np.abs(theirs(name, their_base(FIXTURES / name)) - expected).max() > 0.05
    _, model = load_t5(FIXTURES / name)
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, model)
    if kind is default_lora:
        assert recipe.methods[0].targets == ("**/query", "**/value")
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    example = inputs_of(name)["input_ids"]
    adapted = aj.load_adapter(native, model, None, example)
    np.testing.assert_allclose(ours(name, adapted), expected, atol=1e-4)
    back = save_peft(tmp_path / "ours", recipe, adapters, NAMES, model, task_type="SEQ_2_SEQ_LM")
    assert json.loads((back / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    np.testing.assert_allclose(in_peft(name, back), expected, atol=1e-4)


def test_an_embedding_changes_in_vain_in_peft_and_is_not_read(tmp_path):
    def shared(model_type):
        return peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["shared"])

    logits = made_by_peft("flan_t5", shared, tmp_path / "theirs")
    np.testing.assert_array_equal(logits, theirs("flan_t5", their_base(FIXTURES / "flan_t5")))
    with raises(aj.AdapterFileError, "embeddings", "'shared'"):
        load_peft(tmp_path / "theirs", NAMES, load_t5(FIXTURES / "flan_t5")[1])


@pytest.mark.parametrize("alone", [True, False])
def test_rows_of_tokens_of_a_tied_embedding_are_read(alone, tmp_path):
    def rows(model_type):
        if alone:
            return peft.TrainableTokensConfig(task_type="SEQ_2_SEQ_LM", token_indices=[3, 5])
        tokens = {"trainable_token_indices": [3, 5], "target_modules": ["q"]}
        return peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, **tokens)

    logits = made_by_peft("t5", rows, tmp_path / "theirs")
    _, model = load_t5(FIXTURES / "t5")
    assert np.abs(ours("t5", model) - logits).max() > 0.05
    recipe, adapters = load_peft(tmp_path / "theirs", NAMES, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    adapted = aj.load_adapter(native, model, None, inputs_of("t5")["input_ids"])
    np.testing.assert_allclose(ours("t5", adapted), logits, atol=1e-4)


RECIPES = {
    "lora": aj.lora(2, 5.0),
    "ia3": aj.ia3(),
    "head": aj.LoRA("head", 2),
    "norms": aj.Recipe(aj.LoRA("**/cross_attention/*", 2), aj.Unfreeze("**/mlp_norm/*")),
}
CASES = [
    *[(name, kind) for name in ("t5", "flan_t5") for kind in ("lora", "ia3", "norms")],
    ("mt5", "head"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_made_here_computes_the_same_in_peft(name, kind, tmp_path):
    _, model = load_t5(FIXTURES / name, scan=name == "flan_t5")
    recipe, example = aj.Recipe(RECIPES[kind]), (inputs_of(name)["input_ids"],)
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    state = nnx.state(adapted, AdapterParam)
    noise = drawn_like(state)
    adapters = jax.tree.map(lambda x, y: x + jnp.asarray(0.1 * y), state, noise)
    nnx.update(adapted, adapters)
    directory = save_peft(tmp_path / "a", recipe, adapters, NAMES, model)
    logits = ours(name, adapted)
    np.testing.assert_allclose(in_peft(name, directory), logits, atol=1e-4)
    assert np.abs(ours(name, model) - logits).max() > 0.05


@pytest.mark.slow
def test_a_converted_run_has_the_same_logits_in_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "flan_t5", "base")
    write_meanings(tmp_path / "rows.csv", rows=40)
    words = (
        "finetune --model base --train rows.csv --prompt mr --completion ref --name mine "
        "--method lora --rank 4 --alpha 4 --targets **/{query,value} --epochs 2 --exact-match 0 "
        "--no-baselines --learning-rate 0.1"
    )
    assert main(words.split()) == 0
    assert main(["convert", "runs/mine", "there", "--to", "peft"]) == 0
    adapted = ours("flan_t5", load_generator("runs/mine").model)
    np.testing.assert_allclose(in_peft("flan_t5", "there"), adapted, atol=2e-4)
    assert np.abs(ours("flan_t5", load_t5("base")[1]) - adapted).max() > 0.05
