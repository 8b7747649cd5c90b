"""Adapters trained here compute the same in AdapterHub, both ways; needs `interop-test`."""

from contextlib import contextmanager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises
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
from adapters_jax.finetune.models.bert import Bert, BertClassifier, BertConfig, load_bert
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
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
        aj.Recipe(
            aj.methods.Invertible("bert/embeddings", reduction_factor=3.0, activation="tanh"),
            aj.Bottleneck("**/mlp_norm", 4, placement="norm", activation="tanh"),
        ),
        aj.compacter(reduction_factor=4, head="head"),
        aj.Recipe(
            aj.Compacter(
                "**/mlp_norm",
                8,
                phm_dim=2,
                **{**AROUND, "activation": "tanh"},
                full=True,
                shared_rule=False,
                factored_rule=True,
                norm_before=True,
            )
        ),
        aj.loreft(2, num_layers=2, suffix_positions=2, head="head"),
        aj.loreft(3, layers=[1], orthogonal=False, activation="tanh"),
    ],
    "gpt2": [
        aj.houlsby(4, layer_norms=None, activation="gelu_exact", scale=0.5),
        aj.Recipe(aj.Bottleneck("**/{attention,mlp}_sum", 3, activation="sigmoid")),
        aj.parallel(targets="**/mlp_sum", reduction_factor=5),
        aj.lora(4, 2.0, targets=("**/{key,value}", "**/mlp/up")),
        aj.Recipe(aj.IA3(("**/{key,value}", "**/mlp/up"))),
        aj.compacter(8, shared_weights=True, factored_rule=True, train_rule=False),
        aj.loreft(2, num_layers=2, prefix_positions=2, suffix_positions=1, tied=True) + aj.lora(2),
    ],
    "llama": [
        aj.houlsby(4, layer_norms=None, activation="silu"),
        aj.pfeiffer(targets="**/mlp_sum", reduction_factor=7, norm_before=True, norm_after=True),
        aj.parallel(4, targets="**/{attention,mlp}_sum"),
        aj.lora(3, 4.0, targets="**/{query,key,value,up}"),
        aj.compacter(8, targets="**/mlp_sum", bias=False, phm_rank=2, scale=2.0),
        aj.loreft(2, num_layers=2, prefix_positions=0, suffix_positions=2, activation="silu"),
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
    "compacter": lambda: hub.CompacterConfig(reduction_factor=4),
    "compacter_plus": lambda: hub.CompacterPlusPlusConfig(
        reduction_factor=8, shared_W_phm=True, factorized_phm_rule=True, learn_phm=False
    ),
    "compacter_whole": lambda: hub.CompacterPlusPlusConfig(
        reduction_factor={"0": 4, "default": 2},
        shared_phm_rule=False,
        factorized_phm_W=False,
        phm_dim=2,
        phm_bias=False,
    ),
    "loreft": lambda: hub.LoReftConfig(r=3),
    "loreft_both": lambda: hub.LoReftConfig(r=2, suffix_positions=2, non_linearity="gelu"),
    "noreft": lambda: hub.NoReftConfig(r=2, tied_weights=True, suffix_positions=1, layers=[0]),
    "reft_union": lambda: hub.ConfigUnion(hub.LoReftConfig(), hub.LoRAConfig(r=2)),
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


INVERTIBLE = {
    "seq": lambda: hub.SeqBnInvConfig(),
    "double": lambda: hub.DoubleSeqBnInvConfig(inv_adapter_reduction_factor=3),
}


def noisy(base, config):
    """A base in AdapterHub with an adapter whose tensors are far from their start."""
    torch.manual_seed(1)
    model = model_of(base, False)
    model.add_adapter("made", config=config, set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".made." in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("config", INVERTIBLE)
def test_an_invertible_adapter_from_there(config, tmp_path):
    model = noisy("bert", INVERTIBLE[config]())
    model.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    of = base_of("bert")
    recipe, adapters = load_adapterhub(tmp_path / "a", of[0], of[2])
    assert "invertible" in {method.kind for method in recipe}
    got = seen(of, logits_of(of, recipe, adapters, tmp_path))
    np.testing.assert_allclose(got, seen(of, logits_there(model, "bert")), atol=1e-4)


def test_an_invertible_adapter_of_a_decoder_is_refused(tmp_path):
    model = noisy("gpt2", hub.SeqBnInvConfig())
    model.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    of = base_of("gpt2")
    with raises(aj.AdapterFileError, "a decoder undoes it before its output"):
        load_adapterhub(tmp_path / "a", of[0], of[2])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", RECIPES)
def test_what_is_made_there_has_the_same_logits_here(base, config, tmp_path):
    model = noisy(base, CONFIGS[config]())
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


def summary(model, config):
    """AdapterHub's count of an adapter's parameters."""
    hub.init(model)
    model.add_adapter("counted", config=config)
    return next(
        row["#param"] for row in model.adapter_summary(as_dict=True) if row["name"] == "counted"
    )


BERT_BASE = {
    "compacter": (aj.compacter(), hub.CompacterConfig(), 57_088),
    "compacter_plus": (
        aj.compacter(targets="**/mlp/output"),
        hub.CompacterPlusPlusConfig(),
        28_576,
    ),
    "compacter_own": (
        aj.compacter(phm_rank=3, shared_rule=False, factored_rule=True),
        hub.CompacterConfig(phm_rank=3, shared_phm_rule=False, factorized_phm_rule=True),
        24 * (2 * 3 * (768 + 24) + 768 + 24 + 4 * 4**2),
    ),
    "noreft": (
        aj.loreft(4, num_layers=12, suffix_positions=3, orthogonal=False),
        hub.NoReftConfig(r=4, suffix_positions=3),
        12 * 2 * (2 * 768 * 4 + 4),
    ),
    "loreft": (
        aj.loreft(4, num_layers=12, suffix_positions=3, tied=True),
        hub.LoReftConfig(r=4, suffix_positions=3, tied_weights=True),
        12 * (2 * 768 * 4 + 4),
    ),
}


@pytest.mark.parametrize("name", BERT_BASE)
def test_counts_on_bert_base_are_adapterhubs(name):
    recipe, config, expected = BERT_BASE[name]
    assert summary(transformers.BertModel(transformers.BertConfig()), config) == expected
    model, ids = Bert(BertConfig()), jnp.ones((1, 4), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    adapted = aj.adapt(model, recipe)
    whole = aj.init_adapters(adapted, params, jax.random.key(1), ids)
    assert aj.audit(adapted, whole).adapter_parameters == expected


LLAMA = {"hidden_size": 1024, "intermediate_size": 1408, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("recipe", "config", "expected"),
    [
        (
            aj.compacter(),
            hub.CompacterConfig(),
            4 * (2 * (1024 + 32) + 1024 + 32) + 4**3,
        ),
        (
            aj.loreft(8, num_layers=2, prefix_positions=0, suffix_positions=1, tied=True),
            hub.LoReftConfig(r=8, prefix_positions=0, suffix_positions=1, tied_weights=True),
            2 * (2 * 1024 * 8 + 8),
        ),
        (
            aj.loreft(8, num_layers=2),
            # Its second unit is there although no position uses it.
            hub.LoReftConfig(r=8),
            2 * (2 * 1024 * 8 + 8),
        ),
    ],
)
def test_counts_on_a_llama_are_adapterhubs(recipe, config, expected):
    theirs = summary(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)), config)
    dead = getattr(config, "suffix_positions", 1) == 0
    assert theirs == expected * (2 if dead else 1)
    model = nnx.eval_shape(lambda: Decoder(DecoderConfig(**LLAMA), rngs=nnx.Rngs(0)))
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(1), example_inputs=(jnp.ones((1, 4), int),))
    assert aj.audit(adapted).adapter_parameters == expected


def test_the_direft_of_adapterhub_is_what_it_loads_again(tmp_path):
    torch.manual_seed(1)
    model = model_of("bert", False)
    model.add_adapter("made", config=hub.DiReftConfig(r=2), set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".made." in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_adapter(str(tmp_path / "a"), "made", use_safetensors=True)
    of = base_of("bert")
    recipe, adapters = load_adapterhub(tmp_path / "a", of[0], of[2])
    again = theirs("bert", tmp_path / "a")
    assert recipe.attached[0].subtract and np.abs(again - logits_there(model, "bert")).max() > 1e-2
    got = logits_of(of, recipe, adapters, tmp_path)
    np.testing.assert_allclose(seen(of, got), seen(of, again), atol=1e-4)
