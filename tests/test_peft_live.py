"""Adapters trained here compute the same in PEFT; needs the extra `interop-test`."""

import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from helpers.finished import decoder_run, encoder_run
from helpers.trained import trained
from test_peft import BASES, FIXTURE_NAMES, FIXTURES, base_of

import adapters_jax as aj
from adapters_jax.files.directories import PEFT
from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.models import decoder
from adapters_jax.finetune.models.decoder import Decoder
from adapters_jax.finetune.tensors import from_tensors

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.array([[2, 5, 9, 7, 3], [2, 8, 12, 4, 3]])
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
        aj.lora(2, dora=True, targets=("**/{query,key,value}", "**/mlp/output")),
        aj.ia3(),  # key and value, two parts of three
        aj.Recipe(
            aj.LoRA("{embeddings,position_embeddings}", 2, 6.0), aj.LoRA("**/query", 3)
        ),  # tied
        aj.Recipe(aj.LoRA("**/query", 3), aj.Unfreeze("embeddings/*")),
        aj.lora(3, targets="**/attention/*", rank_stabilized=True, rank_pattern={"layers/0/**": 2}),
    ],
    "llama": [
        aj.lora(4, 8.0, targets="**/mlp/*", alpha_pattern={"**/up": 2.0}),
        aj.Recipe(aj.LoRA("**/{embeddings,head}", 2, 6.0), aj.Unfreeze("norm/*")),
        aj.llama_adapter(4, layers=[1], gate="layer"),
        aj.ia3(targets="**/attention/*"),
    ],
}
CASES = [(base, i) for base, recipes in RECIPES.items() for i in range(len(recipes))]


def theirs(base, directory, strict=True):
    """The logits of a saved adapter in PEFT, which must miss no tensor if it is strict."""
    classes = {
        "bert": transformers.BertForSequenceClassification,
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
    }
    model = classes[base].from_pretrained(BASES / base)
    with np.load(BASES / base / "expected.npz") as file:
        inputs = {name: torch.tensor(file[name]) for name in FIELDS if name in file}
    with warnings.catch_warnings() if strict else nullcontext(), torch.no_grad():
        if strict:
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
        model(**inputs) if isinstance(model, Decoder) else model.apply({"params": params}, **inputs)
    )
    assert np.abs(seen(base, plain) - seen(base, logits)).max() > 1e-2


ON_CHECKPOINTS = [name for name in FIXTURE_NAMES if name.split("_")[0] not in ("net", "moe")]


@pytest.mark.parametrize("fixture", ON_CHECKPOINTS)
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


def changed(directory, edit=None, **fields):
    """A copy of a LoRA on a Llama with its tensors or its configuration changed."""
    copy = shutil.copytree(FIXTURES / "llama_rslora", directory)
    config = json.loads((copy / PEFT.config).read_text())
    (copy / PEFT.config).write_text(json.dumps(config | fields))
    tensors = safetensors.numpy.load_file(copy / PEFT.tensors)
    safetensors.numpy.save_file(edit(tensors) if edit else tensors, copy / PEFT.tensors)
    return copy


def without_layer(tensors):
    return {key: x for key, x in tensors.items() if "layers.0." not in key}


def without_prefix(tensors):
    return {key.replace(".model.model.", ".model."): x for key, x in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "fields", "warning"),
    [
        (without_layer, {}, "missing adapter keys"),
        (without_prefix, {}, "missing adapter keys"),
        (None, {"some_future_field": 1}, "Unexpected keyword arguments"),
    ],
)
def test_what_peft_warns_of_is_a_warning_here(edit, fields, warning, tmp_path):
    names, _, model, _ = base_of("llama")
    directory = changed(tmp_path / "a", edit, **fields)
    with pytest.warns(UserWarning, match=warning):
        theirs("llama", directory, strict=False)
    with pytest.warns(aj.AdapterWarning):
        load_peft(directory, names, model)


def test_what_peft_cannot_read_is_an_error_here(tmp_path):
    names, _, model, _ = base_of("llama")
    directory = changed(tmp_path / "a", modules_to_save=["norm"])
    with pytest.raises(KeyError, match=r"norm\.weight"):
        theirs("llama", directory)
    with pytest.raises(aj.AdapterFileError, match=r"no norm\.weight"):
        load_peft(directory, names, model)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_of_torch_are_what_peft_reads(is_zip, tmp_path):
    names, _, model, _ = base_of("llama")
    directory = changed(tmp_path / "a")
    tensors = safetensors.numpy.load_file(directory / PEFT.tensors)
    whole = {key: torch.nn.Parameter(torch.tensor(x)) for key, x in tensors.items()}
    torch.save(whole, directory / PEFT.pickle, _use_new_zipfile_serialization=is_zip)
    expected = load_peft(directory, names, model)
    (directory / PEFT.tensors).unlink()
    recipe, adapters = load_peft(directory, names, model)
    assert recipe == expected[0]
    jax.tree.map(np.testing.assert_array_equal, adapters, expected[1])
    logits = np.load(FIXTURES / "llama_rslora" / "logits.npy")
    np.testing.assert_allclose(
        seen("llama", theirs("llama", directory)), seen("llama", logits), atol=1e-4
    )


@pytest.mark.parametrize("names", [["lm_head"], ["wte", "lm_head"]])
def test_a_tied_output_layer_is_trained_in_peft_as_the_error_says(names, tmp_path):
    """GPT-2's embedding alone is not tied by `ensure_weight_tying`; its output layer's name is."""
    model = transformers.GPT2LMHeadModel.from_pretrained(BASES / "gpt2")
    config = peft.LoraConfig(r=2, target_modules=names, ensure_weight_tying=True)
    trained = peft.get_peft_model(model, config)
    for name, factor in trained.named_parameters():
        if "lora_embedding" in name:
            torch.nn.init.normal_(factor.data)
    trained.save_pretrained(tmp_path / "a")
    table, _, base, _ = base_of("gpt2")
    recipe, adapters = load_peft(tmp_path / "a", table, base)
    assert [method.targets for method in recipe] == [("embeddings",)]
    assert np.abs(adapters["embeddings"]["lora"]["b"]).max() > 0


class TheirExperts(torch.nn.Module):
    """Two layers of experts with a linear layer, in the layouts that models in PyTorch have."""

    class Experts(torch.nn.Module):
        def __init__(self, inputs, hidden, swapped, is_transposed):
            super().__init__()
            self.swapped = swapped
            for name, shape in (("up", (inputs, hidden)), ("down", (hidden, inputs))):
                shape = shape[::-1] if swapped else shape
                setattr(self, name, torch.nn.Parameter(torch.randn(3, *shape)))
            if is_transposed:
                self.is_transposed = True

        def forward(self, x):
            up, down = (w.transpose(1, 2) if self.swapped else w for w in (self.up, self.down))
            return torch.bmm(torch.relu(torch.bmm(x, up)), down)

    def __init__(self, inputs, *args):
        super().__init__()
        self.experts = self.Experts(inputs, *args)
        self.gate = torch.nn.Linear(inputs, inputs)

    def forward(self, x):
        return self.gate(self.experts(x))


class OurExperts(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[-1]
        init = nn.initializers.normal()
        up = self.param("up", init, (3, inputs, self.hidden))
        down = self.param("down", init, (3, self.hidden, inputs))
        x = nn.relu(jnp.einsum("ecd,edf->ecf", x, up))
        return nn.Dense(inputs, name="gate")(jnp.einsum("ecf,efd->ecd", x, down))


@pytest.mark.parametrize("hidden", [6, 4])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_experts_compute_and_merge_as_in_peft(swapped, is_transposed, hidden, tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(TheirExperts(4, hidden, swapped, is_transposed))
    tensors = {name: x.detach().numpy().copy() for name, x in base.state_dict().items()}
    names = NameTable(
        (Rule("gate", "0.gate"),),
        parameters=tuple(
            ParameterRule(name, f"0.experts.{name}", swapped, is_transposed)
            for name in ("up", "down")
        ),
    )
    model, x = OurExperts(hidden), np.random.default_rng(0).normal(size=(3, 5, 4)).astype("f4")
    like = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = from_tensors(tensors, names, like)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[],
        target_parameters=["experts.up", "experts.down", "gate.weight"],
        rank_pattern={"experts.up": 1},
        alpha_pattern={"experts.down": 7},
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = adapted(torch.tensor(x)).numpy()
    recipe, adapters = load_peft(tmp_path / "theirs", names, params)
    whole, ours = aj.merge_trees(adapters, params), aj.adapt(model, recipe)
    got = ours.apply({"params": whole}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(model.apply({"params": params}, x) - expected).max() > 0.1

    ours_saved = save_peft(tmp_path / "ours", recipe, adapters, names, params)
    theirs, back = (
        safetensors.numpy.load_file(each / PEFT.tensors)
        for each in (tmp_path / "theirs", ours_saved)
    )
    assert theirs.keys() == back.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    fresh = torch.nn.Sequential(TheirExperts(4, hidden, swapped, is_transposed))
    fresh.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    merged = peft.PeftModel.from_pretrained(fresh, ours_saved).merge_and_unload().state_dict()
    values = from_tensors({k: v.detach().numpy() for k, v in merged.items()}, names, like)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        aj.merge(ours, whole, x),
        values,
    )


def randomised(model):
    """The model, with values in all that trains; tied parameters have one storage."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_tied_embeddings_of_llama_go_both_ways(fields, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_pretrained(BASES / "llama")
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    _, model = decoder.load_decoder(tmp_path / "base")

    def logits(adapted):
        with torch.no_grad():
            return adapted.eval()(input_ids=torch.tensor(IDS)).logits.numpy()

    def their_base():
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")

    lora = peft.LoraConfig(r=2, lora_alpha=3, ensure_weight_tying=True, **fields)
    theirs = randomised(peft.get_peft_model(their_base(), lora))
    theirs.save_pretrained(tmp_path / "theirs")
    recipe, adapters = load_peft(tmp_path / "theirs", decoder.NAMES, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    np.testing.assert_allclose(aj.load_adapter(native, model)(IDS), logits(theirs), atol=1e-4)
    assert np.abs(logits(their_base()) - logits(theirs)).max() > 1
    ours = save_peft(tmp_path / "ours", recipe, adapters, decoder.NAMES, model)
    again = peft.PeftModel.from_pretrained(their_base(), ours)
    np.testing.assert_allclose(logits(again), logits(theirs), atol=1e-6)
