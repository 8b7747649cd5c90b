"""Decoders of every family and adapters on them, read by transformers and PEFT, and back."""

import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like

import adapters_jax as aj
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub
from adapters_jax.files.adapterhub.architectures import ALIKE
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    DecoderConfig,
    load_decoder,
    save_decoder,
)
from adapters_jax.nnx import AdapterParam

WHY = "needs torch, transformers and peft: pip install 'adapters-jax[interop-test]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
peft = pytest.importorskip("peft", reason=WHY)
VERSION = transformers.__version__
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
FIVE = int(transformers.__version__.split(".")[0]) >= 5
TARGETS = {
    "gpt2": ("c_attn", "c_fc", "mlp.c_proj"),
    "phi3": ("qkv_proj", "gate_up_proj", "down_proj"),
    "mixtral": ("k_proj", "w3", "w2"),
    **dict.fromkeys(("glm", "glm4"), ("k_proj", "gate_up_proj", "down_proj")),
    "phi": ("k_proj", "fc1", "fc2"),
    "starcoder2": ("k_proj", "c_fc", "mlp.c_proj"),
    "opt": ("k_proj", "fc1", "fc2"),
    **dict.fromkeys(("gpt_neox", "bloom"), ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")),
    "deepseek_v3": ("q_b_proj", "kv_b_proj", "o_proj"),
    "gemma4_text": ("q_proj", "up_proj", "down_proj"),
    "qwen3_next": ("q_proj", "in_proj_qkvz", "out_proj"),
    "qwen3_5_text": ("q_proj", "up_proj", "out_proj"),
    "qwen3_5_moe_text": ("q_proj", "v_proj", "o_proj"),
}
OURS = {"deepseek_v3": "**/{query_up,key_value}"}  # what replaces query and value
EVERY = sorted(set(ARCHITECTURES) & set(transformers.CONFIG_MAPPING.keys()))
# Their experts are parameters of one module in transformers 4, too, and their router is none of
# PEFT's modules.
STACKED = {
    "gpt_oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"),
    "llama4_text": (
        *("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        "feed_forward.router.weight",
    ),
}
WITH_EXPERTS = [
    name for name in EVERY if any("experts" in x.ours for x in ARCHITECTURES[name].names.parameters)
]
DENSE = [name for name in EVERY if name not in WITH_EXPERTS]


def targets(name):
    """Names of projections: into the attention, into the feed-forward, and out of it."""
    return TARGETS.get(name, ("k_proj", "up_proj", "down_proj"))


def their_base(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


def narrow(name, directory):
    """A checkpoint like a fixture, as PEFT's LLaMA-Adapter expects it: its heads have the hidden
    size in all, and its output projection, which PEFT applies twice, has no bias."""
    config = transformers.AutoConfig.from_pretrained(FIXTURES / name)
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.attention_bias = False
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 * (parameter.ndim == 1), std=0.3)
    model.save_pretrained(directory)
    return directory


def inputs_of(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        ids, mask = file["input_ids"], file["attention_mask"]
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


def theirs(name, model):
    ids, mask, positions = map(torch.tensor, inputs_of(name))
    if name == "llama4_text":  # whose attention counts padding as positions
        rows = zip(ids, mask, strict=True)
        with torch.no_grad():
            rows = [model.eval()(input_ids=row[own == 1][None]).logits[0] for row, own in rows]
        return torch.cat(rows).numpy()
    with torch.no_grad():
        made = model.eval()(input_ids=ids, attention_mask=mask, position_ids=positions)
    return made.logits.numpy()[mask.numpy() == 1]


def ours(name, model):
    ids, mask, _ = inputs_of(name)
    return np.asarray(nnx.jit(lambda model: model(ids, mask))(model))[mask == 1]


def in_peft(name, base, directory):
    """The logits of a saved adapter in PEFT, which must miss no tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return theirs(name, peft.PeftModel.from_pretrained(their_base(base), directory))


def made_by_peft(name, base, config, directory):
    """The logits of an adapter that PEFT made, with values in all that trains, and saved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(their_base(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=1.0 * (parameter.ndim == 1), std=0.15)
    model.save_pretrained(directory)
    return theirs(name, model)


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    YARN,
    {**YARN, "beta_fast": 4.0, "beta_slow": 2.0},
    {**YARN, "attention_factor": 0.7},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {**YARN, "truncate": False, "factor": 0.5},
    {**YARN, "original_max_position_embeddings": 4096, "factor": 40.0},
    {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    {
        **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64},
        **{"short_factor": [1.0 + i for i in range(8)], "long_factor": [2.0] * 8},
    },
]


@pytest.mark.parametrize("length", [50, 300])
@pytest.mark.parametrize("given", SCALINGS)
def test_rotary_frequencies_are_those_of_transformers(given, length):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
    extra = {"original_max_position_embeddings": 64} if given["rope_type"] == "longrope" else {}
    values = {**sizes, "rope_theta": 500.0, **extra}
    theirs = transformers.LlamaConfig(**values, rope_scaling=dict(given))
    expected, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](theirs, None, seq_len=length)
    config = DecoderConfig.from_dict({**values, "rope_scaling": given})
    got, ours = config.rope_scaling.frequencies(16, 500.0, length)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)
    assert ours == pytest.approx(factor)
    assert DecoderConfig.from_dict(config.to_dict()) == replace(
        config, num_key_value_heads=4, head_dim=16
    )


def lora(name):
    attention, up, down = targets(name)
    # transformers 5 has one parameter for both, which PEFT adapts whole.
    fused = FIVE and name not in DENSE and up in ("w3", "up_proj")
    gates = [{"w3": "w1", "up_proj": "gate_proj"}[up]] if fused else []
    if name in STACKED:
        own = {"target_parameters": STACKED[name], "target_modules": ["k_proj", "o_proj"]}
        return peft.LoraConfig(r=4, lora_alpha=6, rank_pattern={"o_proj": 2}, **own)
    return peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[attention, up, down, *gates],
        rank_pattern={down: 2},
        alpha_pattern={rf"(layers|h).1.*.{attention}": 9},
    )


def dora(name):
    """PEFT has no DoRA on stacked experts, which are parameters of one module."""
    attention, up, _ = targets(name)
    chosen = [attention, up if name in DENSE else "o_proj"]
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=chosen, use_dora=True)


def ia3(name):
    """PEFT has no (IA)^3 on stacked experts."""
    attention, _, down = targets(name)
    if name not in DENSE:
        return peft.IA3Config(target_modules=[attention, "v_proj"], feedforward_modules=[])
    return peft.IA3Config(target_modules=[attention, down], feedforward_modules=[down])


def prompts(name):
    return peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", EVERY)
def test_transformers_reads_what_is_saved_here_as_the_same_model(name, tmp_path):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save_decoder(tmp_path, *load_decoder(FIXTURES / name), max_shard_size=3000, **tokens)
    one, other = map(their_base, (FIXTURES / name, tmp_path))
    # Sums depend on where a tensor lies in memory.
    np.testing.assert_allclose(theirs(name, other), theirs(name, one), atol=1e-5)
    whole, again = (model.config.to_dict() for model in (one, other))
    # No token ids are known here, and a setting at its default is not written.
    key = "rope_parameters" if FIVE else "rope_scaling"
    for rope in (whole.get(key) or {}, again.get(key) or {}):
        rope.setdefault("rope_type", rope.pop("type", None))  # some classes write both names
        rope.pop("type", None)
    for rope in (whole.get("rope_parameters") or {}, again.get("rope_parameters") or {}):
        for key in ("mrope_section", "mrope_interleaved"):  # of images
            rope.pop(key, None)
    differing = {k: (x, again.get(k)) for k, x in whole.items() if again.get(k) != x}
    assert differing.keys() <= {
        *("_name_or_path", "max_window_layers", "head_dim", "_sliding_window_pattern"),
        # transformers 4 writes these names beside rotary_emb_base and rotary_pct, and 5 keeps them.
        *(("rope_theta", "partial_rotary_factor") if name == "gpt_neox" else ()),
        "router_aux_loss_coef",  # of a loss that no model here has
        "interleave_moe_layer_step",  # moe_layers says it
    }
    assert whole.get("head_dim") in (None, again.get("head_dim"))


SMALL = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
OTHERS = [
    ("gpt_neox", {"use_parallel_residual": False, "intermediate_size": 20, "rotary_pct": 0.5}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 1.0}),
    ("opt", {"enable_bias": False, "ffn_dim": 20, "word_embed_proj_dim": 24}),
    ("opt", {"ffn_dim": 20, "tie_word_embeddings": False, "max_position_embeddings": 14}),
    ("bloom", {"hidden_size": 24, "n_head": 6, "n_layer": 2}),
    ("phi", {"intermediate_size": 20, "num_key_value_heads": 2, "partial_rotary_factor": 1.0}),
    ("starcoder2", {"use_bias": False, "intermediate_size": 20, "tie_word_embeddings": False}),
    ("cohere", {"intermediate_size": 20, "tie_word_embeddings": False, "num_key_value_heads": 1}),
    ("cohere2", {"intermediate_size": 20, "num_hidden_layers": 5, "sliding_window": 3}),
    ("glm4", {"intermediate_size": 20, "head_dim": 4, "attention_bias": True}),
]


@pytest.mark.parametrize(("name", "settings"), OTHERS)
def test_further_settings_compute_what_they_do_in_transformers(name, settings, tmp_path):
    config = transformers.AutoConfig.for_model(name, **(SMALL | settings))
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 * (parameter.ndim == 1), std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    expected = theirs(name, model)
    own, found = load_decoder(tmp_path / "theirs")
    np.testing.assert_allclose(ours(name, found), expected, atol=1e-4)
    save_decoder(tmp_path / "ours", own, found, pad_token_id=0)
    np.testing.assert_array_equal(theirs(name, their_base(tmp_path / "ours")), expected)
    assert own.num_parameters == sum(x.numel() for x in model.parameters())


def everywhere(name):
    """Also at Qwen's gates of one output, where the rank is above its size."""
    return peft.LoraConfig(r=3, lora_alpha=1, target_modules="all-linear", task_type="CAUSAL_LM")


CASES = [(name, kind) for name in EVERY for kind in (lora, dora, ia3)]
# PEFT has LLaMA-Adapter for these alone.
CASES += [("llama", prompts), ("mistral", prompts)]
CASES += [(name, everywhere) for name in EVERY if name in ("qwen3_next", "qwen3_5_moe_text")]


# The names of all families, and all methods on a few; once a week, all of both.
@pytest.mark.slow
@pytest.mark.witness(*(f"{name}-lora" for name in EVERY))
@pytest.mark.witness("llama-dora", "llama-ia3", "llama-prompts", "gpt_oss-dora")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_peft_made_computes_the_same_here_and_goes_back(name, kind, tmp_path):
    base = narrow(name, tmp_path / "base") if kind is prompts else FIXTURES / name
    expected = made_by_peft(name, base, kind(name), tmp_path / "theirs")
    assert np.abs(theirs(name, their_base(base)) - expected).max() > 0.05
    names, (_, model) = ARCHITECTURES[name].names, load_decoder(base)
    recipe, adapters = load_peft(tmp_path / "theirs", names, model)
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    np.testing.assert_allclose(
        ours(name, aj.load_adapter(native, model, None, inputs_of(name)[0])), expected, atol=1e-4
    )
    back = save_peft(tmp_path / "ours", recipe, adapters, names.of_version(VERSION), model)
    np.testing.assert_allclose(in_peft(name, base, back), expected, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_made_here_computes_the_same_in_peft(name, tmp_path):
    names, (_, model) = ARCHITECTURES[name].names, load_decoder(FIXTURES / name)
    norms = "**/attention_post_norm/*" if name == "olmo2" else "**/attention_norm/*"
    mlp = aj.LoRA("**/mlp/*" if name in DENSE else "**/{experts/*,router}", 3, 4.0)
    attention = aj.LoRA(OURS.get(name, "**/{query,value}"), 2, 5.0)
    recipe = aj.Recipe(attention, mlp, aj.Unfreeze(norms))
    ids, *_ = inputs_of(name)
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(ids,))
    noise = drawn_like(nnx.state(adapted, AdapterParam))
    nnx.update(adapted, jax.tree.map(lambda x: jnp.asarray(0.2 * x), noise))
    adapters = nnx.state(adapted, AdapterParam)
    directory = save_peft(tmp_path / "a", recipe, adapters, names.of_version(VERSION), model)
    logits = ours(name, adapted)
    np.testing.assert_allclose(in_peft(name, FIXTURES / name, directory), logits, atol=1e-4)
    assert np.abs(ours(name, load_decoder(FIXTURES / name)[1]) - logits).max() > 0.05


RECIPES = {
    "houlsby": aj.houlsby(4, layer_norms=None, activation="silu"),
    "parallel": aj.parallel(4, targets="**/{attention,mlp}_sum"),
    "lora": aj.lora(3, 4.0, targets="**/{query,key,value,up}"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_mistral_computes_the_same_in_adapterhub(recipe, tmp_path):
    hub = pytest.importorskip("adapters", reason=WHY)
    recipe, (ids, *_) = aj.Recipe(recipe), inputs_of("mistral")
    names, (_, model) = ARCHITECTURES["mistral"].names, load_decoder(FIXTURES / "mistral")
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(ids,))
    noise = drawn_like(nnx.state(adapted, AdapterParam))
    nnx.update(adapted, jax.tree.map(lambda x: jnp.asarray(0.2 * x), noise))
    adapters, there = nnx.state(adapted, AdapterParam), their_base(FIXTURES / "mistral")
    kind = {"model_type": "mistral", "model_class": ALIKE["mistral"]}
    directory = save_adapterhub(tmp_path / "a", recipe, adapters, names, model, name="a", **kind)
    hub.init(there)
    info = {}
    there.load_adapter(str(directory), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    logits = ours("mistral", adapted)
    np.testing.assert_allclose(theirs("mistral", there), logits, atol=1e-4)
    assert np.abs(ours("mistral", model) - logits).max() > 0.05
    again, back = load_adapterhub(directory, names, model)
    native = aj.save_adapter(tmp_path / "native", back, again)
    loaded = aj.load_adapter(native, load_decoder(FIXTURES / "mistral")[1], None, ids)
    np.testing.assert_allclose(ours("mistral", loaded), logits, atol=1e-4)
