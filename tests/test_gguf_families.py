"""GGUF of every family that the format carries: the logits are those of the safetensors."""

import json
import math
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises

from adapters_jax.errors import BaseFileError, BaseMismatchError
from adapters_jax.finetune.base_files.gguf import read_gguf
from adapters_jax.finetune.gguf.architectures import ARCHITECTURES, MODEL_TYPES
from adapters_jax.finetune.models.decoder import DecoderConfig, load_decoder
from adapters_jax.finetune.models.registry import family_of

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
# A Mistral is a Llama there; GGUF files of other families are not read.
CARRIED = {path.name for path in FIXTURES.iterdir()} & {*MODEL_TYPES, "mistral"}
NAMES = {
    **{"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"},
    "cohere": "command-r",
}
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")  # those of Llama's converter
NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}

# What files cannot carry, as llama.cpp assumes it.
ASSUMED = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2": NO_WINDOW,
    "qwen3": {**NO_WINDOW, "rope_scaling": None},
    "qwen3_moe": NO_WINDOW,
    "gemma": {"rope_theta": 10_000.0},
    "gemma2": {"rope_theta": 10_000.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"layer_types": None, "query_pre_attn_scalar": 8},
    "smollm3": {**NO_WINDOW, "no_rope_layers": None},
    "starcoder2": {"sliding_window": None},
    "cohere2": {"layer_types": None},
}


def key(name):
    """The names of `config.json` for the fields that the format's own writer has methods for."""
    return {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "norm_epsilon": "attention.layer_norm_epsilon",
        "logit_scale": "logit_scale",
        "max_position_embeddings": "context_length",
        "num_experts_per_tok": "expert_used_count",
        "num_local_experts": "expert_count",
        "num_experts": "expert_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "rope_local_base_freq": "rope.freq_base_swa",
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }.get(name)


def fields_of(name, values):
    """The fields of a file, by their name without the architecture."""
    found = {key(k): x for k, x in values.items() if key(k) and x is not None}
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if name not in ("gemma", "gemma2"):
        found["rope.freq_base"] = values["rope_theta"]
    if name in ("gemma2", "gemma3_text", "phi3", "cohere2") and values.get("sliding_window"):
        found["attention.sliding_window"] = values["sliding_window"]
    if name in ("phi3", "glm4"):
        found["rope.dimension_count"] = int(head * values["partial_rotary_factor"])
    if name == "phi3":
        original = values["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        growth = values["max_position_embeddings"] / original
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(growth) / math.log(original))
    else:
        found |= {"attention.key_length": head, "attention.value_length": head}
    if name in PERMUTED:
        found["rope.dimension_count"] = head
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": scaling["factor"]}
    if kind == "yarn":
        original = scaling["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        for bound in ("beta_fast", "beta_slow"):
            found[f"rope.scaling.yarn_{bound}"] = scaling[bound]
    return found


def llama3_factors(values):
    """By what each frequency is divided: nothing, the factor, or what is between them."""
    scaling, head = values["rope_scaling"], values["head_dim"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, head, 2):
        wave = 2 * math.pi * values["rope_theta"] ** (i / head)
        turns = scaling["original_max_position_embeddings"] / wave
        kept = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - kept) / scaling["factor"] + kept))
    return np.array(factors, np.float32)


def tensors_of(name, values, stored):
    """The tensors of a file by the names of the package `gguf`."""
    kind = next(k for k, x in gguf.MODEL_ARCH_NAMES.items() if x == NAMES.get(name, name))
    names = gguf.get_tensor_name_map(kind, values["num_hidden_layers"])
    merged, found = {}, {}
    for theirs, weight in stored.items():
        parts = theirs.split(".")
        if "experts" in parts:  # one tensor of all experts
            at = parts.index("experts") + 1
            merged.setdefault(".".join(parts[:at] + parts[at + 1 :]), {})[int(parts[at])] = weight
        else:
            merged[theirs] = weight
    for theirs, weight in merged.items():
        if isinstance(weight, dict):
            weight = np.stack([weight[i] for i in range(len(weight))])
            theirs = theirs.replace("model.layers", "layers").replace(
                "block_sparse_moe", "feed_forward"
            )
            theirs = theirs if "feed_forward" in theirs else f"model.{theirs}"
        rows = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        heads = rows.get(theirs.split(".")[-2])
        if heads and name in PERMUTED:
            shape = weight.shape
            split = weight.reshape(values[heads], 2, -1, *shape[1:])
            weight = split.swapaxes(1, 2).reshape(shape)
        if name.startswith("gemma") and theirs.endswith("norm.weight"):
            weight = weight + 1
        own = names.get_name(theirs, (".weight", ".bias"))
        assert own, theirs
        found[own] = np.ascontiguousarray(weight)
    scaling = values.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_factors(values)
    for length in ("short", "long"):
        if f"{length}_factor" in scaling:
            factors = np.array(scaling[f"{length}_factor"], np.float32)
            found[f"rope_factors_{length}.weight"] = factors
    return found


def written(path, name, values, stored, words=0, **changes):
    """Writes a file with the package `gguf`; llama.cpp reads one whose tokenizer has words."""
    architecture = NAMES.get(name, name)
    writer = gguf.GGUFWriter(path, architecture)
    for field, value in {**fields_of(name, values), **changes}.items():
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add = writer.add_string if isinstance(value, str) else add
            add(f"{architecture}.{field}", value)
    if words:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([chr(256 + i) for i in range(words)])
        writer.add_token_types([gguf.TokenType.NORMAL] * words)
        writer.add_token_merges([f"{chr(256)} {chr(257)}"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for own, weight in tensors_of(name, values, stored).items():
        writer.add_tensor(own, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text()) | ASSUMED.get(name, {})


@nnx.jit
def full_pass(model, ids, mask):
    return model(ids, mask)


@pytest.mark.slow
@pytest.mark.witness("qwen3_moe")
@pytest.mark.parametrize("name", sorted(CARRIED))
def test_the_logits_are_those_of_the_safetensors(name, tmp_path):
    values, stored = values_of(name), read_arrays(FIXTURES / name)
    base = Path(shutil.copytree(FIXTURES / name, tmp_path / "base"))
    (base / "config.json").write_text(json.dumps(values))
    file = written(tmp_path / "tiny.gguf", name, values, stored)
    (_, expected), (config, found) = load_decoder(base), load_decoder(file)
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        inputs = dict(arrays)
    ids, mask = jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["attention_mask"])
    want, got = full_pass(expected, ids, mask), full_pass(found, ids, mask)
    seen = np.asarray(mask, bool)
    np.testing.assert_allclose(got[seen], want[seen], atol=2e-4, rtol=1e-3)
    assert np.asarray(want[seen]).std() > 0.1
    if name not in ASSUMED:
        np.testing.assert_allclose(got[seen], inputs["logits"][seen], atol=2e-3, rtol=1e-2)
    assert family_of(read_gguf(file).config, str(file)).name == config.model_type
    assert DecoderConfig.from_dict(config.to_dict()).layer_kinds == config.layer_kinds


def test_every_architecture_is_tested():
    assert {NAMES.get(name, name) for name in CARRIED} == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("name", "changes", "data"),
    [
        ("olmo2", {"attention.sliding_window": 4}, ["olmo2.attention.sliding_window=4"]),
        ("qwen3_moe", {"expert_shared_count": 1}, ["qwen3moe.expert_shared_count=1"]),
        ("qwen2", {"rope.scaling.type": "longrope"}, ["rope.scaling.type='longrope'"]),
        ("gemma3_text", {"attention.sliding_window_pattern": 3}, ["sliding_window_pattern=3"]),
        ("granite", {"rope.dimension_count": 2}, ["rotates 2 of 4"]),
    ],
)
def test_what_is_not_supported_is_named(name, changes, data, tmp_path):
    values, stored = values_of(name), read_arrays(FIXTURES / name)
    file = written(tmp_path / "tiny.gguf", name, values, stored, **changes)
    with raises(BaseFileError, file, *data):
        load_decoder(file)


def test_experts_of_another_number_are_named(tmp_path):
    values, stored = values_of("mixtral"), read_arrays(FIXTURES / "mixtral")
    file = written(tmp_path / "tiny.gguf", "mixtral", values, stored, expert_count=5)
    with raises(BaseMismatchError, "block_sparse_moe.experts.4.w1.weight"):
        load_decoder(file)
