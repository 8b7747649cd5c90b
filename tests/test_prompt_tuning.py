"""Prompt tuning: what the model sees wherever placeholders are, its start, and PEFT's files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn
from helpers.contract import shaken
from helpers.errors import raises
from helpers.tiny import write_llama

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.files import directories
from adapters_jax.files.directories import PEFT
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.convert import from_peft
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    Decoder,
    DecoderConfig,
    load_decoder,
)
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.t5 import T5, T5Config
from adapters_jax.finetune.serving.adapters import DecoderBase

K, D = 3, 4
TABLE, PROMPT = drawn((10, D), 1), drawn((K, D), 2)
METHOD = aj.PromptTuning("embed", K)


class Net(nn.Module):
    """Averages the embeddings of what the mask has, and of positions."""

    @nn.compact
    def __call__(self, ids, mask=None):
        x = nn.Embed(10, D, name="embed")(ids)
        x = x + nn.Embed(20, D, name="position")(jnp.arange(ids.shape[-1]))[None]
        mask = jnp.ones(ids.shape) if mask is None else mask
        return nn.Dense(2, name="out")(jnp.tanh(x).cumsum(1) * mask[..., None])


def net(recipe=METHOD, ids=None):
    x = jnp.ones((2, 5), jnp.int32) if ids is None else ids
    base = Net().init(jax.random.key(0), x)["params"]
    base["embed"]["embedding"] = jnp.asarray(TABLE)
    model = aj.adapt(Net(), recipe)
    params = aj.init_adapters(model, base, jax.random.key(1), x)
    params["embed"]["prompt_tuning"]["embedding"] = jnp.asarray(PROMPT)
    return model, base, params


def by_hand(base, rows):
    """The output of rows of embeddings, in float64."""
    x = rows + double(base["position"]["embedding"])[: rows.shape[-2]]
    kernel, bias = (double(base["out"][name]) for name in ("kernel", "bias"))
    return np.cumsum(np.tanh(x), -2) @ kernel + bias


def test_the_model_sees_the_prompt_before_the_tokens():
    model, base, params = net()
    ids, *_ = aj.with_prompt(METHOD, np.array([[4, 5], [6, 7]]))
    tokens = double(TABLE)[ids[:, K:]]
    rows = np.concatenate([np.broadcast_to(double(PROMPT), (2, K, D)), tokens], 1)
    got = model.apply({"params": params}, ids)
    np.testing.assert_allclose(got, by_hand(base, rows), atol=1e-5)
    other = aj.adapt(nnx.Embed(10, D, rngs=nnx.Rngs(0)), aj.PromptTuning("**", K), rngs=nnx.Rngs(1))
    other.embedding[...], other.prompt_tuning["embedding"][...] = TABLE, PROMPT
    np.testing.assert_array_equal(other(ids), rows.astype(np.float32))


def test_placeholders_anywhere_get_the_prompt_in_order():
    model, base, params = net()
    ids = np.array([[-1, -1, -1, 4, -1, -1, -1, 5], [8, 8, -1, -1, -1, 6, 7, 1]])  # packed; padded
    order = np.array([[0, 1, 2, 9, 0, 1, 2, 9], [9, 9, 0, 1, 2, 9, 9, 9]])
    rows = np.where((order < K)[..., None], double(PROMPT)[order % K], double(TABLE)[ids])
    got = model.apply({"params": params}, ids)
    np.testing.assert_allclose(got, by_hand(base, rows), atol=1e-5)


def test_rows_without_placeholders_are_the_bases():
    model, base, params = net()
    ids = np.array([[4, 5, 9, 0, 1]])
    np.testing.assert_array_equal(
        model.apply({"params": params}, ids), Net().apply({"params": base}, ids)
    )


def test_unsigned_ids_get_placeholders_that_they_have_no_number_for():
    ids = np.array([[5, 6]], np.uint16)
    made = aj.with_prompt(METHOD, ids, ids > 0, labels=jnp.asarray(ids))
    assert made.ids.tolist() == [[-1] * K + [5, 6]]
    assert made.labels.tolist() == [[-100] * K + [5, 6]]
    assert made.mask.tolist() == [[1] * (K + 2)]


def test_the_prompt_is_next_to_a_text_that_is_padded_on_the_left():
    ids, there = (
        np.array([[0, 0, 7, 6, 5], [3, 4, 2, 0, 0]]),
        np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )
    made = aj.with_prompt(METHOD, ids, there, ids)
    assert made.ids.tolist() == [[0, 0, -1, -1, -1, 7, 6, 5], [-1, -1, -1, 3, 4, 2, 0, 0]]
    assert made.mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert made.labels.tolist() == [[0, 0, *[-100] * K, 7, 6, 5], [*[-100] * K, 3, 4, 2, 0, 0]]


@pytest.mark.slow
def test_a_padded_row_of_a_t5_has_its_prompt_at_the_distances_of_that_row_by_itself():
    """Its biases are of the places of a row, padding included."""
    config = T5Config(29, 16, 8, 20, num_layers=1, num_decoder_layers=1, num_heads=2)
    graphdef, params, rest = nnx.split(T5(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    base = nnx.merge(graphdef, shaken(params, 3), rest)
    recipe, written = aj.PromptTuning("embeddings", K), np.array([[0, 8, 9]])
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1))
    model.embeddings.prompt_tuning["embedding"][...] = drawn((K, 16), 5)
    alone = model(*aj.with_prompt(recipe, np.array([[7, 6, 5]]), np.ones((1, 3)))[:2], written)
    for padding in ((4, 0), (0, 4)):
        ids, there = (np.pad(x, ((0, 0), padding)) for x in ([[7, 6, 5]], np.ones((1, 3))))
        got = model(*aj.with_prompt(recipe, ids, there)[:2], written)
        np.testing.assert_allclose(got, alone, atol=1e-5)
    front, *_ = aj.with_prompt(recipe, ids)
    assert np.abs(model(front, None, written) - alone).max() > 0.01


def test_a_placeholder_may_be_a_token():
    recipe = aj.PromptTuning("embed", K, placeholder=9)
    model, base, params = net(recipe)
    ids, mask, labels = aj.with_prompt(
        recipe, jnp.array([[4, 5]]), jnp.array([[1, 0]]), jnp.array([[4, 5]])
    )
    assert ids.tolist() == [[9, 9, 9, 4, 5]]
    assert mask.tolist() == [[1, 1, 1, 1, 0]] and labels.tolist() == [[-100] * K + [4, 5]]
    rows = np.concatenate([double(PROMPT), double(TABLE)[[4, 5]]])[None]
    got = model.apply({"params": params}, ids)
    np.testing.assert_allclose(got, by_hand(base, rows), atol=1e-5)


def test_the_prompt_alone_has_a_gradient():
    model, _, params = net()
    ids, *_ = aj.with_prompt(METHOD, np.array([[4, 5]]))
    slopes = jax.grad(lambda params: model.apply({"params": params}, ids).sum())(params)
    assert (slopes["embed"]["prompt_tuning"]["embedding"] != 0).all()
    used = np.asarray(slopes["embed"]["embedding"] != 0).any(-1)
    np.testing.assert_array_equal(np.flatnonzero(used), [4, 5])  # not the row of the placeholder
    assert aj.audit(model, params).adapter_parameters == K * D
    with raises(aj.RecipeError, "PromptTuning", "embed", "input"):
        aj.merge(model, params, ids)


CONFIG = DecoderConfig(
    vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)


def decoder():
    graphdef, params, rest = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param, ...)
    base = nnx.merge(graphdef, shaken(params, 3), rest)
    model = aj.adapt(base, aj.PromptTuning("embeddings", K), rngs=nnx.Rngs(1))
    model.embeddings.prompt_tuning["embedding"][...] = drawn((K, 16), 5)
    return base, model


PROMPTS = np.random.default_rng(4).integers(1, 29, (3, 5))
THERE = np.array([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.mark.weekly
def test_decoding_with_a_cache_reads_the_prompt():
    base, model = decoder()
    ids, mask, _ = aj.with_prompt(aj.PromptTuning("embeddings", K), PROMPTS, THERE)
    made = generate(model, ids, mask, max_new_tokens=4)
    for i in range(3):
        tokens = [-1] * K + PROMPTS[i][THERE[i] == 1].tolist()
        for new in made.ids[i].tolist():
            assert int(model(np.array([tokens]))[0, -1].argmax()) == new
            tokens.append(new)
    without = generate(base, PROMPTS, THERE, max_new_tokens=4)
    assert made.ids.tolist() != without.ids.tolist()


@pytest.mark.weekly
def test_a_placeholder_has_no_row_in_the_tables_of_layers():
    """Nor has it that of the last token, which -1 would name."""
    _, base = load_decoder(Path(__file__).parent / "fixtures" / "decoders" / "gemma4_text")
    recipe = aj.prompt_tuning(2)
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1))
    ids, *_ = aj.with_prompt(recipe, np.array([[5, 6, 7]]))
    before = model(ids)
    table = model.per_layer.embeddings.embedding
    table[...] = table[...].at[-1].add(1.0)
    np.testing.assert_array_equal(model(ids), before)
    table[...] = table[...].at[5].add(1.0)
    assert np.abs(model(ids) - before).max() > 1e-4


@pytest.mark.slow
def test_rows_of_a_bank_have_a_prompt_each():
    base, model = decoder()
    recipe, own = aj.PromptTuning("embeddings", K), nnx.state(model, aj.nnx.AdapterParam)
    bank = aj.Bank(model, capacity=2)
    other = jax.tree.map(lambda x: 2 * x, own)
    bank = bank.put("a", (recipe, own)).put("b", (recipe, other))
    ids, *_ = aj.with_prompt(recipe, PROMPTS)
    ids[2] = np.abs(ids[2])  # a row of the base has no placeholders
    got = bank.model(ids, adapters=bank.rows(["a", "b", None]))
    np.testing.assert_allclose(got[0], model(ids)[0], atol=1e-5)
    np.testing.assert_allclose(got[2], base(ids)[2], atol=1e-5)
    nnx.update(model, other)
    np.testing.assert_allclose(got[1], model(ids)[1], atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 0.05


def test_a_prompt_starts_from_tokens():
    _, _, params = net()
    made = aj.start_prompt(params, METHOD, [7, 2])
    own = made["embed"]["prompt_tuning"]["embedding"]
    np.testing.assert_array_equal(own, TABLE[[7, 2, 7]])
    np.testing.assert_array_equal(params["embed"]["prompt_tuning"]["embedding"], PROMPT)
    base, model = decoder()
    model = aj.quantize(model, targets="embeddings/*")
    assert aj.start_prompt(model, aj.PromptTuning("embeddings", K), [1, 2, 3, 4]) is model
    own = model.embeddings.prompt_tuning["embedding"]
    np.testing.assert_allclose(own, base.embeddings.embedding[1:4], atol=0.05)
    for ids in ([], [10], [-1], 3):
        with raises(UserError, "ids"):
            aj.start_prompt(params, METHOD, ids)
    with raises(aj.RecipeError, "0 PromptTuning"):
        aj.start_prompt(params, aj.LoRA("q", 2), [1])
    with raises(aj.RecipeError, "no prompt"):
        aj.start_prompt({"embed": {"embedding": TABLE}}, METHOD, [1])


def test_what_cannot_be_a_prompt_is_an_error():
    with raises(UserError, "placeholder='x'"):
        aj.PromptTuning("embed", placeholder="x")
    with raises(UserError, "length=0"):
        aj.PromptTuning("embed", 0)
    with raises(aj.RecipeError, "'out'", "float32[2, 5, 4]", "ids"):
        net(aj.PromptTuning("out", K))
    with raises(UserError, "mask", [1, 3], [1, 2]):
        aj.with_prompt(METHOD, np.ones((1, 2), int), np.ones((1, 3)))
    with raises(aj.RecipeError, "2 PromptTuning"):
        aj.with_prompt(aj.Recipe(METHOD, aj.PromptTuning("embed", name="b")), np.ones((1, 2), int))


NAMES = {"model.embed_tokens": "embed", "model.wpe": "position", "out": "out"}
BASE = {
    "embed": {"embedding": np.zeros((10, D), np.float32)},
    "position": {"embedding": np.zeros((20, D), np.float32)},
}
LEAVES = {"embed": {"prompt_tuning": {"embedding": PROMPT}}}


def test_it_goes_through_a_file_of_peft(tmp_path):
    names = {name: path for name, path in NAMES.items() if path in BASE}
    saved = save_peft(tmp_path / "a", METHOD, LEAVES, names, BASE, task_type="CAUSAL_LM")
    recipe, adapters = load_peft(saved, names, BASE)
    assert recipe == aj.Recipe(METHOD)
    np.testing.assert_array_equal(adapters["embed"]["prompt_tuning"]["embedding"], PROMPT)
    for method, leaves, fields, data in [
        (METHOD, LEAVES, {}, ["task_type"]),
        (METHOD, LEAVES, {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, ["=2", "3"]),
        (aj.PromptTuning("position", K), {"position": LEAVES["embed"]}, {}, ["embed", "position"]),
    ]:
        with raises(UserError, *data):
            save_peft(tmp_path / "b", method, leaves, names, BASE, **fields)


CONFIG_OF_PEFT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": K, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("fields", "tensors", "names", "data"),
    [
        ({"num_virtual_tokens": 4}, {}, {}, ["num_virtual_tokens=4", [3, 4]]),
        ({"num_transformer_submodules": 2}, {}, {}, ["num_transformer_submodules=2", "CAUSAL_LM"]),
        ({"num_transformer_submodules": 3}, {}, {}, ["num_transformer_submodules=3"]),
        ({"task_type": "SEQ_2_SEQ_LM"}, {}, {}, [[3, 4], "twice"]),
        ({}, {"prompt_embeddings": None}, {}, ["no prompt_embeddings"]),
        ({}, {"x.weight": np.ones(2)}, {}, ["x.weight", "base_model."]),
        ({}, {}, {"other.embed_tokens": "position"}, ["other.embed_tokens", "one"]),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(fields, tensors, names, data):
    whole = {"prompt_embeddings": PROMPT} | tensors
    whole = {key: x for key, x in whole.items() if x is not None}
    names = {"model.embed_tokens": "embed"} | names
    with raises(aj.AdapterFileError, *data):
        from_peft({**CONFIG_OF_PEFT, **fields}, whole, names, BASE)


def test_gemmas_embeddings_are_scaled_in_some_versions_alone():
    base = {"embeddings": {"embedding": np.zeros((10, D), np.float32)}}
    for family in ("gemma", "gemma2", "gemma3_text"):
        with raises(aj.AdapterFileError, "transformers 5"):
            names = ARCHITECTURES[family].names
            from_peft(CONFIG_OF_PEFT, {"prompt_embeddings": PROMPT}, names, base)


@pytest.mark.slow
def test_a_server_refuses_a_prompt_that_would_have_no_effect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "llama")
    base = DecoderBase("llama")
    width = base.decoder.model.config.hidden_size
    config = {**CONFIG_OF_PEFT, "base_model_name_or_path": "llama"}
    directories.write(
        tmp_path / "theirs", PEFT.content(config, {"prompt_embeddings": drawn((K, width))}), None
    )
    with raises(UserError, "aj.with_prompt"):
        base.read(tmp_path / "theirs")
