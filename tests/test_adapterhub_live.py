"""Adapters trained here compute the same in AdapterHub, both ways; needs `interop-test`."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from helpers.finished import encoder_run
from helpers.trained import trained
from test_adapterhub import (
    BASES,
    FIXTURE_NAMES,
    FIXTURES,
    base_of,
    loaded,
    logits_of,
    of_fixture,
    pooling_of,
    seen,
)

import adapters_jax as aj
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.models.bert import BertClassifier, load_bert
from adapters_jax.trees import flatten

WHY = "needs torch and adapters: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
hub = pytest.importorskip("adapters", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
loading = pytest.importorskip("adapters.loading", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
AROUND = {"placement": "norm", "activation": "relu"}
BESIDE = {"placement": "parallel", "scale": 4.0}
RECIPES = {
    "bert": [
        aj.houlsby(4, layer_norms=None, head="head"),
        aj.pfeiffer(5, targets="**/mlp_norm", head="head", **AROUND)
        + aj.Unfreeze("bert/pooler/**"),
        aj.parallel(4, activation="tanh", norm_before=True),  # beside whole sublayers
        aj.Recipe(aj.Bottleneck("**/attention_norm", reduction_factor=3.0, norm_after=True)),
        aj.Recipe(
            aj.Bottleneck("**/layer_0/attention/output", 4, activation="leaky_relu"),
            aj.Bottleneck("**/layer_0/mlp_sum", 2, activation="identity", **BESIDE),
            aj.Bottleneck("**/layer_1/{attention,mlp}_norm", 6, **AROUND),
            aj.LoRA(
                "**/layer_1/{attention/{query,value},mlp/intermediate}", 4, rank_stabilized=True
            ),
        ),
        aj.Recipe(aj.IA3("**/layer_1/{attention/{key,value},mlp/intermediate}")),
    ],
    "gpt2": [
        aj.houlsby(4, layer_norms=None, activation="gelu_exact", scale=0.5),
        aj.Recipe(aj.Bottleneck("**/{attention,mlp}_sum", 3, activation="sigmoid")),
        aj.parallel(targets="**/mlp_sum", reduction_factor=5),
        aj.lora(4, 2.0, targets=("**/{key,value}", "**/mlp/up")),
        aj.Recipe(aj.IA3(("**/{key,value}", "**/mlp/up"))),
    ],
    "llama": [
        aj.houlsby(4, layer_norms=None, activation="silu"),
        aj.pfeiffer(targets="**/mlp_sum", reduction_factor=7, norm_before=True, norm_after=True),
        aj.parallel(4, targets="**/{attention,mlp}_sum"),
        aj.lora(3, 4.0, targets="**/{query,key,value,up}"),
        aj.adalora(3, 4.0),  # as the LoRA with the same change
    ],
}
CASES = [(base, i) for base, recipes in RECIPES.items() for i in range(len(recipes))]
CONFIGS = {
    "ia3": lambda: hub.IA3Config(),
    "ia3_of_all": lambda: hub.IA3Config(attn_matrices=["q", "k", "v"], output_lora=True, alpha=2),
    "double": lambda: hub.DoubleSeqBnConfig(reduction_factor=7, non_linearity="gelu_new"),
    "seq": lambda: hub.SeqBnConfig(reduction_factor={"0": 5, "default": 64}, mh_adapter=True),
    "par": lambda: hub.ParBnConfig(ln_after=True),
    "before": lambda: hub.DoubleSeqBnConfig(ln_before=True, residual_before_ln=False),
    "plus": lambda: hub.SeqBnConfig(original_ln_after=False, residual_before_ln=False),
    "lora": lambda: hub.LoRAConfig(
        r=3, alpha=7, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
    "union": lambda: hub.ConfigUnion(
        hub.SeqBnConfig(non_linearity="tanh"),
        hub.DoubleSeqBnConfig(output_adapter=False, leave_out=[0]),
        hub.LoRAConfig(intermediate_lora=True, selfattn_lora=False),
    ),
}


def model_of(base, flexible):
    """A base in AdapterHub, with named heads or with the head of its class."""
    classes = {
        "bert": transformers.BertForSequenceClassification,
        "roberta": transformers.RobertaForSequenceClassification,
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
    }
    if flexible:
        names = {"bert": hub.BertAdapterModel, "roberta": hub.RobertaAdapterModel}
        return names[base].from_pretrained(BASES / base)
    model = classes[base].from_pretrained(BASES / base)
    hub.init(model)
    return model


def logits_there(model, base):
    with np.load(BASES / base / "expected.npz") as file:
        inputs = {name: torch.tensor(file[name]) for name in FIELDS if name in file}
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


def theirs(base, directory):
    """The logits of a saved adapter in AdapterHub, which must load every tensor."""
    model, info = model_of(base, (directory / "head_config.json").exists()), {}
    options = {"use_safetensors": True, "set_active": True, "loading_info": info}
    model.load_adapter(str(directory), **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return logits_there(model, base)


@pytest.mark.parametrize(("base", "index"), CASES)
def test_what_is_trained_here_has_the_same_logits_in_adapterhub(base, index, tmp_path):
    of = base_of(base)
    recipe = aj.Recipe(RECIPES[base][index])
    adapters, logits = trained(of, recipe)
    directory = save_adapterhub(tmp_path / "a", recipe, adapters, of[0], of[2], name="mine")
    got, wanted = seen(of, theirs(base, directory)), seen(of, logits)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    plain = seen(of, logits_there(model_of(base, False), base))
    assert np.abs(plain - wanted).max() > 1e-2


def test_a_head_on_the_first_token_goes_over(tmp_path):
    of = base_of("bert", "cls")
    recipe = aj.houlsby(4, layer_norms=None, head="head")
    adapters, logits = trained(of, recipe)
    saved = save_adapterhub(tmp_path / "a", recipe, adapters, of[0], of[2], pooling="cls")
    np.testing.assert_allclose(theirs("bert", saved), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "pooling", "width"),
    [
        ("tagging", "tokens", 3),
        ("question_answering", "tokens", 2),
        ("multilabel_classification", "cls", 3),
        ("multiple_choice", "pooler", 1),
    ],
)
def test_heads_of_other_tasks_go_over_and_come_back(kind, pooling, width, tmp_path):
    names, _, params, inputs = base_of("bert", "pooler" if pooling == "pooler" else "cls")
    head = {"kernel": np.zeros((32, width), np.float32), "bias": np.zeros(width, np.float32)}
    config = load_bert(BASES / "bert")[0]
    of = names, BertClassifier(config, width, pooling), {**params, "head": head}, inputs
    recipe = aj.houlsby(4, layer_norms=None, head="head")
    adapters, logits = trained(of, recipe)
    rows = [str(i) for i in range(len(logits))]
    saved = save_adapterhub(
        tmp_path / "a",
        recipe,
        adapters,
        names,
        of[2],
        pooling=pooling,
        head_type=kind,
        labels=rows if kind == "multiple_choice" else (),
    )
    model, info = hub.BertAdapterModel.from_pretrained(BASES / "bert"), {}
    model.load_adapter(str(saved), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert model.heads["adapter"].config["head_type"] == kind
    with torch.no_grad():
        there = model.eval()(**{name: torch.tensor(np.asarray(x)) for name, x in inputs.items()})
    if kind == "question_answering":
        got = np.stack([there.start_logits.numpy(), there.end_logits.numpy()], -1)
    else:
        got = there.logits.numpy().reshape(logits.shape)
    real = inputs["attention_mask"] == 1 if pooling == "tokens" else slice(None)
    np.testing.assert_allclose(got[real], np.asarray(logits)[real], atol=1e-4)
    model.save_adapter(str(tmp_path / "b"), "adapter", use_safetensors=True)
    _, again = load_adapterhub(tmp_path / "b", names, of[2], pooling=pooling)
    for path, tensor in flatten(adapters).items():
        np.testing.assert_allclose(flatten(again)[path], tensor, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("fixture", FIXTURE_NAMES)
def test_what_came_from_adapterhub_goes_back(fixture, tmp_path):
    of, base = of_fixture(fixture), fixture.split("_")[0]
    recipe, adapters = loaded(fixture)
    options = {"prefix": "roberta."} if base == "roberta" else {}
    directory = save_adapterhub(
        tmp_path / "a", recipe, adapters, of[0], of[2], pooling=pooling_of(fixture), **options
    )
    expected = np.load(FIXTURES / fixture / "logits.npy")
    np.testing.assert_allclose(seen(of, theirs(base, directory)), seen(of, expected), atol=1e-4)


@contextmanager
def tensors_apart():
    """AdapterHub's `ln_before` has two names for one tensor, which safetensors refuses."""
    save = loading.save_file

    def saving(tensors, path):
        save({name: tensor.clone() for name, tensor in tensors.items()}, path)

    with mock.patch.object(loading, "save_file", saving):
        yield


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", RECIPES)
def test_what_is_made_there_has_the_same_logits_here(base, config, tmp_path):
    torch.manual_seed(1)
    model = model_of(base, False)
    model.add_adapter("made", config=CONFIGS[config](), set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".made." in name:
                parameter += 0.2 * torch.randn_like(parameter)
    with tensors_apart():
        model.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    of = base_of(base)
    recipe, adapters = load_adapterhub(tmp_path / "a", of[0], of[2])
    got = seen(of, logits_of(of, recipe, adapters, tmp_path))
    np.testing.assert_allclose(got, seen(of, logits_there(model, base)), atol=1e-4)


def test_a_converted_run_has_the_same_logits_in_adapterhub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = encoder_run("--bottleneck-dim 4 --layer-norms=")
    assert main(["convert", run, "there", "--to", "adapterhub"]) == 0
    model, info = hub.BertAdapterModel.from_pretrained("tiny"), {}
    model.load_adapter("there", use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    ids = np.array([[2, 5, 9, 7, 3], [2, 8, 12, 4, 3]])
    with torch.no_grad():
        got = model.eval()(input_ids=torch.tensor(ids)).logits.numpy()
    ours = load_predictor(run)
    np.testing.assert_allclose(got, ours.model.apply({"params": ours.params}, ids), atol=1e-4)
    assert model.heads["there"].config["label2id"] == {"no": 0, "yes": 1}
