"""What flags of decoders do together: weights by head, ALiBi, parallel sublayers, prompts."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import double, drawn_like, read_arrays
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.peft.convert import from_peft, to_peft
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    Decoder,
    DecoderConfig,
    load_decoder,
)
from adapters_jax.finetune.models.parts.relative import Places, alibi
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
FUSED = {
    "bloom": "h.1.self_attention.query_key_value",
    "gpt_neox": "layers.1.attention.query_key_value",
}
by_head = pytest.mark.parametrize("name", FUSED)


def inputs_of(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return file["input_ids"], file["attention_mask"]


def adapted(model, recipe, ids):
    """The model with the recipe's leaves drawn, none of them zero."""
    model = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(ids,))
    noise = drawn_like(nnx.state(model, AdapterParam))
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(0.3 * x), noise))
    return model


@by_head
def test_what_trains_of_a_layer_fused_by_head_is_the_whole_tensor_in_peft_and_back(name):
    _, model = load_decoder(FIXTURES / name)
    base, names = nnx.to_pure_dict(nnx.state(model, nnx.Param)), ARCHITECTURES[name].names
    inner = model.config.intermediate_size
    mlp = {"a": np.ones((model.config.hidden_size, 1)), "b": np.ones((1, inner))}
    leaves = {f"layers/1/mlp/up/lora/{leaf}": x.astype(np.float32) for leaf, x in mlp.items()}
    trained = {
        path: 2 * np.asarray(x)
        for path, x in flatten(base).items()
        if path.startswith(("layers/1/attention/query", "layers/1/attention/key"))
    }
    recipe = aj.Recipe(aj.LoRA("**/1/mlp/up", 1), aj.Unfreeze("**/1/attention/{query,key}/*"))
    config, tensors, problems = to_peft(recipe, {**leaves, **trained}, names, base)
    assert not problems
    own = f"base_model.model.{names.prefixes[0]}{FUSED[name]}"
    stored = read_arrays(FIXTURES / name)
    heads, width = model.config.num_attention_heads, model.config.head_width
    for kind in ("weight", "bias"):
        whole = stored[f"{names.prefixes[0]}{FUSED[name]}.{kind}"].copy()
        parts = whole.reshape(heads, 3, width, *whole.shape[1:])
        parts[:, :2] *= 2  # the values do not train
        np.testing.assert_array_equal(tensors[f"{own}.{kind}"], whole)
    _, back = from_peft(config, tensors, names, base)
    for path, leaf in trained.items():
        np.testing.assert_array_equal(flatten(back)[path], leaf)


METHODS = {
    "lora": aj.LoRA("**/{query,key,value}", 2, 3.0),
    "dora": aj.DoRA("**/{query,value}", 2, 3.0),
    "ia3": aj.IA3("**/{key,value}"),
    "llama_adapter": aj.LlamaAdapter("**/attention", 3),
    "prefix": aj.PrefixTuning("**/attention", 3),
}


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("method", "name"),
    [
        *[(method, "bloom") for method in METHODS],
        ("lora", "gpt_neox"),
        ("llama_adapter", "gpt_neox"),
    ],
)
def test_an_axis_of_heads_changes_no_number(name, method):
    ids, mask = inputs_of(name)
    config, model = load_decoder(FIXTURES / name)
    one = adapted(model, aj.Recipe(METHODS[method]), ids)
    flat_config = replace(config, head_axis=False)
    flat = nnx.eval_shape(lambda: Decoder(flat_config, rngs=nnx.Rngs(0)))
    abstract = nnx.eval_shape(
        lambda: aj.adapt(flat, aj.Recipe(METHODS[method]), rngs=nnx.Rngs(0), example_inputs=(ids,))
    )
    arrays, shapes = (nnx.to_pure_dict(nnx.state(each)) for each in (one, abstract))
    assert jax.tree.map(jnp.shape, arrays) != jax.tree.map(jnp.shape, shapes)
    nnx.update(abstract, jax.tree.map(lambda x, own: x.reshape(own.shape), arrays, shapes))
    run = nnx.jit(lambda model: model.hidden(ids, mask))
    got, expected = run(one), run(abstract)
    assert np.abs(expected - run(load_decoder(FIXTURES / name)[1])).max() > 0.05
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["bloom", "cohere2", "gpt_neox", "opt-post"])
def test_prompts_and_factors_read_a_cache_as_they_read_the_text(name):
    ids, mask = inputs_of(name)
    recipe = aj.Recipe(
        aj.LoRA("**/{query,up,output}", 2, 3.0),
        aj.LlamaAdapter("**/attention", 3),
    )
    model = adapted(load_decoder(FIXTURES / name)[1], recipe, ids)
    whole = nnx.jit(lambda model: model.hidden(ids, mask))(model)

    @nnx.jit
    def stepwise(model):
        first, cache = model.extend(ids[:, :9], mask[:, :9], model.empty_cache(*ids.shape))
        rest, _ = model.extend(ids[:, 9:], mask[:, 9:], cache)
        return jnp.concatenate([first, rest], axis=1)

    np.testing.assert_allclose(stepwise(model)[mask == 1], whole[mask == 1], atol=1e-4)


@pytest.mark.slow
def test_a_prefix_is_at_no_distance_in_alibi():
    """Each head's softmax over the prefix, without a bias, and the context, with its own."""
    ids, _ = inputs_of("bloom")
    _, model = load_decoder(FIXTURES / "bloom")
    model = adapted(model, aj.Recipe(aj.PrefixTuning("layers/0/attention", 2)), ids[:1])
    attention, x = model.layers[0].attention, jnp.asarray(drawn_like(np.zeros((1, 5, 12))))
    places = Places(jnp.arange(5)[None], jnp.arange(5)[None])
    mask = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    got = attention(x, mask, None, places)
    prefix = flatten(nnx.to_pure_dict(nnx.state(attention, AdapterParam)))
    query, key, value = (
        np.einsum("ld,dhw->lhw", double(x[0]), double(getattr(attention, n).kernel[...]))
        + double(getattr(attention, n).bias[...])
        for n in ("query", "key", "value")
    )
    key = np.concatenate([double(prefix["prefix/key"]), key])
    value = np.concatenate([double(prefix["prefix/value"]), value])
    scores = np.einsum("qhw,khw->hqk", query, key) / 2  # the root of a width of 4
    distance = np.arange(5)[None] - np.arange(5)[:, None]
    for head, slope in enumerate((2**-4, 2**-8, 2**-2)):
        scores[head, :, 2:] += np.where(distance > 0, -np.inf, slope * distance)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hqk,khw->qhw", shares / shares.sum(-1, keepdims=True), value).reshape(5, 12)
    output = attention.output
    expected = mixed @ double(output.kernel[...]) + double(output.bias[...])
    np.testing.assert_allclose(got[0], expected, atol=1e-5)


def test_the_bias_of_alibi_is_small_near_the_query_wherever_that_is():
    """So that bfloat16 keeps it: the bias of a key's own position, 4000, is rounded to 16."""
    far = Places(jnp.array([[4001]]), jnp.array([[3999, 4000, 4001]]))
    near = jnp.asarray(alibi(far, 4)[0, :, 0], jnp.bfloat16)
    np.testing.assert_array_equal(
        near.astype(jnp.float32), np.outer([-0.25, -0.0625, -(2**-6), -(2**-8)], [2, 1, 0])
    )


@pytest.mark.parametrize("turn", [1, -1])
def test_a_setting_under_its_own_name_precedes_a_common_one(turn):
    both = {"model_type": "gpt_neox", "rotary_emb_base": 50.0, "rope_theta": 70.0}
    assert DecoderConfig.from_dict(dict([*both.items()][::turn])).rope_theta == 50.0


TINY = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        ({"parallel": "both"}, ["parallel", "'both'", "'shared'"]),
        ({"parallel": "own", "norm_placement": "sum"}, ["parallel='own'", "'sum'", "'pre'"]),
        ({"head_axis": True, "qk_norm": "projection"}, ["head_axis", "'projection'"]),
        ({"head_axis": True, "attention_gate": True}, ["head_axis", "attention_gate"]),
        ({"alibi": True, "learned_positions": True}, ["alibi", "learned_positions"]),
        ({"embedding_size": 4, "embedding_norm": True}, ["embedding_size=4", "embedding_norm"]),
        ({"head_bias": True, "tie_word_embeddings": True}, ["head_bias", "tied"]),
        ({"embedding_size": 0}, ["embedding_size", "0"]),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, data):
    with raises(aj.UserError, *data):
        DecoderConfig(**TINY, **flags)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        {"parallel": "shared", "norm_type": "layer", "norm_bias": False, "qk_norm": "head"},
        {"parallel": "own", "head_axis": True, "attention_bias": True, "head_bias": True},
        {"norm_placement": "sum", "embedding_size": 4, "learned_positions": True},
        {"alibi": True, "embedding_norm": True, "num_key_value_heads": 1, "head_axis": True},
        {"position_offset": 3, "learned_positions": True, "tie_word_embeddings": True},
    ],
)
def test_the_count_of_parameters_is_that_of_the_arrays(flags, scan):
    config = DecoderConfig(**{**TINY, "intermediate_size": 6, "num_hidden_layers": 2, **flags})
    model = nnx.eval_shape(lambda: Decoder(config, scan=scan, rngs=nnx.Rngs(0)))
    assert config.num_parameters == sum(x.size for x in jax.tree.leaves(nnx.state(model)))
