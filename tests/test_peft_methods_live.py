"""What PEFT trains beside LoRA of modules computes the same here; needs `interop-test`."""

import json
import warnings

import numpy as np
import pytest
from flax import nnx
from helpers.trained import trained
from test_encoders import FIXTURES, classifier, expected, loaded

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    load_decoder,
    load_decoder_classifier,
    save_decoder,
)

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.array([[4, 9, 5, 6, 11, 7], [1, 2, 3, 4, 5, 6]])
SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
VERSION = transformers.__version__


def noisy(model, std=0.3):
    """The model, with values in all that trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * std)
    return model.eval()


def logits(model, ids=IDS, **inputs):
    inputs = {name: torch.tensor(x) for name, x in {"input_ids": ids, **inputs}.items()}
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def reloaded(base, directory):
    """An adapter in PEFT, which must miss no tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return peft.PeftModel.from_pretrained(base, directory).eval()


def ours_with(tmp_path, recipe, adapters, model, ids=IDS, **inputs):
    """The logits of an adapter on an NNX model."""
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    adapted = aj.load_adapter(native, model, example_inputs=(ids,))
    return nnx.jit(lambda model: model(ids, **inputs))(adapted)


MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]


@pytest.mark.skipif(int(VERSION.split(".")[0]) < 5, reason="transformers 5 stacks experts")
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:2], TARGETS[2:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_and_routers_go_both_ways(family, targets, tmp_path):
    name, more = MIXTURES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    kind = getattr(transformers, f"{name}ForCausalLM")
    noisy(kind(config)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"  # Qwen's of transformers 5 has num_local_experts alone
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    _, model = load_decoder(tmp_path / "base")
    names = ARCHITECTURES[family].names
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"experts.down_proj": 1},
    )
    theirs = noisy(peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), lora))
    theirs.save_pretrained(tmp_path / "theirs")
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    expected = logits(theirs)
    got = ours_with(tmp_path, recipe, adapters, model)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(model(IDS) - expected).max() > 0.05
    ours = save_peft(tmp_path / "ours", recipe, adapters, names.of_version(VERSION), model)
    again = reloaded(kind.from_pretrained(tmp_path / "base"), ours)
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)


CLASSIFIERS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gemma2": ("Gemma2", {"head_dim": 4}),
    "qwen3": ("Qwen3", {"head_dim": 4}),
    "phi3": ("Phi3", {}),
}
PADDED = np.array([[4, 9, 5, 6, 0, 0], [1, 2, 3, 4, 5, 6]])
MASK = (PADDED > 0).astype(int)


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_of_decoders_go_both_ways(family, embeds, tmp_path):
    name, more = CLASSIFIERS[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more, num_labels=3)
    kind = getattr(transformers, f"{name}ForSequenceClassification")
    noisy(kind(config)).save_pretrained(tmp_path / "base")
    _, model = load_decoder_classifier(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base").eval()
    own = {"attention_mask": MASK}
    plain = logits(base, PADDED, **own)
    np.testing.assert_allclose(model(PADDED, MASK), plain, atol=1e-4)
    first = {"gpt2": ("wte", "c_attn"), "phi3": ("embed_tokens", "qkv_proj")}
    words, query = first.get(family, ("embed_tokens", "q_proj"))
    targets = [words, query] if embeds else [query]
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=targets,
        task_type="SEQ_CLS",
        fan_in_fan_out=name == "GPT2",
    )
    theirs = noisy(peft.get_peft_model(base, lora))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, PADDED, **own)
    names = ARCHITECTURES[family].names
    _, empty = load_decoder_classifier(tmp_path / "base", 3)
    recipe, adapters = load_peft(tmp_path / "theirs", names, empty)
    got = ours_with(tmp_path, recipe, adapters, empty, PADDED, attention_mask=MASK)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(plain - expected).max() > 0.05
    ours = save_peft(tmp_path / "o", recipe, adapters, names, empty, task_type="SEQ_CLS")
    again = reloaded(kind.from_pretrained(tmp_path / "base"), ours)
    np.testing.assert_allclose(logits(again, PADDED, **own), expected, atol=1e-5)
    native = aj.save_adapter(tmp_path / "again", adapters, recipe)
    merged = aj.merge(aj.load_adapter(native, empty, example_inputs=(PADDED,)))
    save_decoder(tmp_path / "merged", merged.config, merged, pad_token_id=0)
    whole = kind.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits(whole, PADDED, **own), expected, atol=1e-4)


def encoder_of(name):
    """The name table, the classifier, its parameters and its inputs; and the one in PyTorch."""
    base = loaded(name)[0].classifier.names, *classifier(name), expected(name)[0]
    kind = transformers.AutoModelForSequenceClassification
    return base, kind.from_pretrained(FIXTURES / name, attn_implementation="eager").eval()


def encoder_logits(base, recipe, adapters):
    _, model, params, inputs = base
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    return aj.adapt(model, recipe).apply({"params": whole}, **inputs)


HEADS = {
    "head": aj.lora(2, head="head"),
    "biases": aj.lora(2, bias="all"),
    "both": aj.lora(2, bias="all", head="head"),
}


@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize("name", ["distilbert", "xlm_roberta", "electra"])
def test_heads_and_all_biases_go_to_peft_and_back(name, recipe, tmp_path):
    base, there = encoder_of(name)
    recipe = aj.Recipe(HEADS[recipe])
    adapters, wanted = trained(base, recipe)
    names, _, params, inputs = base
    saved = save_peft(tmp_path / "a", recipe, adapters, names, params, task_type="SEQ_CLS")
    got = logits(reloaded(there, saved), **inputs)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    back = load_peft(saved, names, params)
    np.testing.assert_allclose(encoder_logits(base, *back), wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["distilbert", "xlm_roberta", "electra"])
def test_all_biases_of_peft_with_a_head_are_read(name, tmp_path):
    base, there = encoder_of(name)
    targets = ["q_lin", "v_lin"] if name == "distilbert" else ["query", "value"]
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS", bias="all")
    made = noisy(peft.get_peft_model(there, lora))
    made.save_pretrained(tmp_path / "a")
    names, _, params, inputs = base
    recipe, adapters = load_peft(tmp_path / "a", names, params)
    wanted = logits(made, **inputs)
    np.testing.assert_allclose(encoder_logits(base, recipe, adapters), wanted, atol=1e-4)


def llama(tmp_path, **more):
    """A tiny Llama here, and a function that makes the one in PyTorch."""
    kind = transformers.LlamaForCausalLM
    noisy(kind(transformers.LlamaConfig(**SIZES, **more))).save_pretrained(tmp_path / "base")
    return load_decoder(tmp_path / "base")[1], lambda: kind.from_pretrained(tmp_path / "base")


def lora(**fields):
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], **fields)


READ = {
    "rows": ({}, lambda: lora(trainable_token_indices=[4, 11])),
    "tied rows": (
        {"tie_word_embeddings": True},
        lambda: lora(trainable_token_indices={"embed_tokens": [4, 11]}),
    ),
    "rows of both": (
        {},
        lambda: lora(trainable_token_indices={"embed_tokens": [4], "lm_head": [7, 3]}),
    ),
    "rows alone": (
        {},
        lambda: peft.TrainableTokensConfig(token_indices=[4, 11], target_modules=["embed_tokens"]),
    ),
    "tied rows alone": (
        {"tie_word_embeddings": True},
        lambda: peft.TrainableTokensConfig(token_indices=[4, 11], task_type="CAUSAL_LM"),
    ),
    "biases of B": ({"attention_bias": True}, lambda: lora(lora_bias=True)),
    "biases of B and the base": (
        {"attention_bias": True},
        lambda: lora(lora_bias=True, use_rslora=True, bias="lora_only"),
    ),
    "eva": ({}, lambda: lora(init_lora_weights="eva", eva_config=peft.EvaConfig())),
    "norms": (
        {},
        lambda: peft.LNTuningConfig(
            task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]
        ),
    ),
    "norms by default": ({}, lambda: peft.LNTuningConfig(task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("case", READ)
def test_what_peft_trains_has_the_same_logits_here_and_back(case, tmp_path):
    more, config = READ[case]
    model, base = llama(tmp_path, **more)
    theirs = noisy(peft.get_peft_model(base(), config()))
    theirs.save_pretrained(tmp_path / "theirs")
    names, expected = ARCHITECTURES["llama"].names, logits(theirs)
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    got = ours_with(tmp_path, recipe, adapters, model)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(model(IDS) - expected).max() > 0.02
    if case.endswith("rows alone"):  # an embedding that trains alone has no file there
        with pytest.raises(UserError, match="LN_TUNING"):
            save_peft(tmp_path / "ours", recipe, adapters, names, model)
        return
    ours = save_peft(tmp_path / "ours", recipe, adapters, names, model)
    np.testing.assert_allclose(logits(reloaded(base(), ours)), expected, atol=1e-5)


def test_norms_of_encoders_train_beside_a_head(tmp_path):
    base, there = encoder_of("xlm_roberta")
    config = peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])
    made = noisy(peft.get_peft_model(there, config))
    made.save_pretrained(tmp_path / "a")
    names, _, params, inputs = base
    recipe, adapters = load_peft(tmp_path / "a", names, params)
    wanted = logits(made, **inputs)
    np.testing.assert_allclose(encoder_logits(base, recipe, adapters), wanted, atol=1e-4)
    saved = save_peft(tmp_path / "b", recipe, adapters, names, params, task_type="SEQ_CLS")
    again = reloaded(encoder_of("xlm_roberta")[1], saved)
    np.testing.assert_allclose(logits(again, **inputs), wanted, atol=1e-5)
