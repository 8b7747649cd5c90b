"""The gated delta rule: its chunks against the recurrence, padding, texts, caches, gradients."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, load_decoder
from adapters_jax.finetune.models.decoder.delta import DeltaSizes, delta_rule
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.parts.cache import LayerCache
from adapters_jax.finetune.serving.choosing import Choice
from adapters_jax.finetune.serving.slots import Slots
from adapters_jax.testing.subjects import shaken
from adapters_jax.trace.masks import Mask

FIXTURE = Path(__file__).parent / "fixtures" / "decoders" / "qwen3_next"
BATCH, LENGTH, HEADS, WIDTH, VALUES = 2, 13, 3, 4, 5


def drawn(decay=0.3):
    """Queries, keys, values, logarithms of decays, betas and memories."""
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(BATCH, LENGTH, HEADS, n)) for n in (WIDTH, WIDTH, VALUES)]
    decays = -decay * rng.exponential(size=(BATCH, LENGTH, HEADS))
    betas = rng.uniform(size=(BATCH, LENGTH, HEADS))
    return *heads, decays, betas, rng.normal(size=(BATCH, HEADS, WIDTH, VALUES))


def recurrence(query, key, value, decay, beta, state, begins=()):
    """The rule, token by token, in float64; a text begins with an empty memory."""
    state, read = state.copy(), np.zeros(value.shape)
    for row, head in np.ndindex(state.shape[:2]):
        for t in range(value.shape[1]):
            memory = state[row, head] * (0 if t in begins else np.exp(decay[row, t, head]))
            q, k = (x[row, t, head] / np.linalg.norm(x[row, t, head]) for x in (query, key))
            change = beta[row, t, head] * (value[row, t, head] - memory.T @ k)
            state[row, head] = memory + np.outer(k, change)
            read[row, t, head] = state[row, head].T @ q / np.sqrt(len(q))
    return read, state


@pytest.mark.witness("4-0.3", "13-60.0", "1-0.3")
@pytest.mark.parametrize("decay", [0.3, 60.0])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_chunks_compute_the_recurrence(chunk, decay):
    inputs = drawn(decay)
    got = jax.jit(lambda *inputs: delta_rule(*inputs, chunk=chunk))(*inputs)
    for own, expected in zip(got, recurrence(*inputs), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_text_begins_with_an_empty_memory(chunk):
    inputs, begins = drawn(), (5, 6, 11)  # within a chunk, next to each other, in the last chunk
    texts = jnp.asarray([np.isin(np.arange(LENGTH), begins).cumsum()] * BATCH)
    got = jax.jit(lambda *inputs: delta_rule(*inputs, texts, chunk=chunk))(*inputs)
    for own, expected in zip(got, recurrence(*inputs, begins), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_chunks_are_those_of_the_recurrence():
    inputs = drawn(20.0)

    def loss(chunk, *inputs):
        read, state = delta_rule(*inputs, chunk=chunk)
        return jnp.sin(read).sum() + jnp.cos(state).sum()

    of = jax.jit(jax.grad(loss, argnums=tuple(range(1, 7))), static_argnums=0)
    for chunks, tokens in zip(of(5, *inputs), of(1, *inputs), strict=True):
        assert np.abs(tokens).max() > 1e-3
        np.testing.assert_allclose(chunks, tokens, atol=1e-5)


def layer():
    _, model = load_decoder(FIXTURE)
    return model.layers[0].attention


def read(layer, x, tokens, cut):
    """What a layer makes of `x` in two calls with a cache, and what it keeps."""
    cache = LayerCache(layer.empty_cache(len(x), 0, jnp.float32), jnp.zeros((), int))
    parts = [
        layer(x[:, a:b], Mask(tokens[:, a:b]), cache=cache) for a, b in ((0, cut), (cut, None))
    ]
    return np.concatenate(parts, axis=1), cache.kept.state


PADDING = {
    "left": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 1, 0, 0, 0],
    "between": [1, 0, 1, 1, 0, 0, 1, 1, 1],
    "few": [0, 0, 1, 0, 0, 1, 0, 0, 0],  # fewer tokens in a call than the convolution sees
}


@pytest.mark.weekly
@pytest.mark.parametrize("row", PADDING.values(), ids=PADDING)
def test_padding_changes_nothing(row):
    model, tokens = layer(), np.array([row, [1] * 9], bool)
    x = np.random.default_rng(1).normal(size=(2, 9, 16)).astype(np.float32)
    got, (memory, last) = read(model, x, tokens, 5)
    whole = model(x, Mask(tokens))
    np.testing.assert_allclose(np.asarray(whole)[tokens], got[tokens], atol=1e-5)
    for i, own in enumerate(tokens):
        alone = x[i : i + 1, own]
        one, kept = read(model, alone, np.ones((1, len(alone[0])), bool), 1)
        np.testing.assert_allclose(got[i][own], one[0], atol=1e-5)
        np.testing.assert_allclose(memory[i], kept[0][0], atol=1e-5)
        np.testing.assert_allclose(last[i], kept[1][0], atol=1e-5)
        plain = model(alone, Mask())
        np.testing.assert_allclose(one, plain, atol=1e-5)
        assert np.abs(plain).max() > 0.1


METHODS = {
    "invoked": aj.ActivatedLoRA("layers/0/attention/*", 2, alpha=8.0, invocation=(5,)),
    "first": aj.LoReFT("layers/0/attention/query_key_value_gate", 2, prefix_positions=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_adapters_of_some_tokens_act_on_these_behind_padding(name):
    config = DecoderConfig.from_json(FIXTURE / "config.json")
    kinds = {"num_hidden_layers": 1, "layer_types": ("linear_attention",), "initializer_range": 0.3}
    ids = jnp.array([[3, 8, 9, 5, 7, 6]])
    model = aj.adapt(
        Decoder(replace(config, **kinds), rngs=nnx.Rngs(0)),
        METHODS[name],
        rngs=nnx.Rngs(1),
        example_inputs=(ids,),
    )
    graphdef, tree, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    model = nnx.merge(graphdef, shaken(tree, 3), rest)

    def logits(ids, mask):
        given = {"invoked": aj.invoked(ids, (5,))} if name == "invoked" else {}
        return model(ids, mask, **given)

    alone = logits(ids, None)
    padded, mask = (jnp.pad(x, ((0, 0), (3, 0))) for x in (ids, jnp.ones(ids.shape, int)))
    np.testing.assert_allclose(logits(padded, mask)[:, 3:], alone, atol=1e-4)


def test_the_convolution_is_causal_and_of_each_feature():
    short, rng = layer().convolution, np.random.default_rng(0)
    kernel = np.asarray(short.kernel[...])[:, 0]
    x, before = (jnp.asarray(rng.normal(size=(1, n, kernel.shape[1]))) for n in (5, 2))
    whole = np.concatenate([before, x], axis=1)[0]
    expected = [(whole[t : t + 3] * kernel).sum(0) for t in range(5)]
    np.testing.assert_allclose(short(x, before)[0], expected, atol=1e-6)


def test_what_a_delta_layer_keeps_does_not_grow_with_the_text():
    model = nnx.eval_shape(
        lambda: Decoder(DecoderConfig.from_json(FIXTURE / "config.json"), rngs=nnx.Rngs(0))
    )
    short, long = (nnx.eval_shape(lambda n=n: model.empty_cache(1, n)) for n in (8, 800))
    sizes = [
        [sum(x.size for x in jax.tree.leaves(kept)) for kept in cache.layers]
        for cache in (short, long)
    ]
    assert [b / a for a, b in zip(*sizes, strict=True)] == [1, 100, 1, 1]


def test_prompts_say_that_a_delta_layer_has_no_softmax():
    _, model = load_decoder(FIXTURE)
    for method in (aj.LlamaAdapter("layers/0/attention", 2), aj.PrefixTuning("layers/0/attention")):
        with raises(aj.TargetError, "layers/0/attention", "GatedDelta", "softmax"):
            aj.adapt(
                model, aj.Recipe(method), rngs=nnx.Rngs(0), example_inputs=(np.ones((1, 4), int),)
            )


@pytest.mark.slow
def test_a_prompt_of_gated_attention_is_added_before_the_gate():
    _, model = load_decoder(FIXTURE)
    recipe, ids = aj.Recipe(aj.LlamaAdapter("layers/1/attention", 5)), np.arange(3, 8)[None]
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(ids,))
    rng, attention = np.random.default_rng(0), adapted.layers[1].attention
    for leaf in (attention.prompt.embedding, attention.prompt.gate):
        leaf[...] = jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, 4, 16)), jnp.float32)
    got = attention(x, None) - load_decoder(FIXTURE)[1].layers[1].attention(x, None)

    base, prompt = model.layers[1].attention, attention.prompt.embedding[...]
    query, gate = np.split(np.asarray(base.query(x)).reshape(4, 4, 16), 2, axis=-1)
    query = np.asarray(base.query_norm(query))
    key, value = (np.asarray(f(prompt)).reshape(5, 2, 8) for f in (base.key, base.value))
    mixed = np.zeros((4, 4, 8))
    for head in range(4):  # two heads of queries for each of keys
        scores = np.exp(query[:, head] @ key[:, head // 2].T / np.sqrt(8))
        weights = scores / scores.sum(-1, keepdims=True)
        mixed[:, head] = np.tanh(attention.prompt.gate[head]) * weights @ value[:, head // 2]
    expected = base.output((mixed / (1 + np.exp(-gate))).reshape(1, 4, 32))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("sizes", [{"key_heads": 0}, {"value_width": 2**40}, {"kernel": 1.5}])
def test_a_size_is_a_whole_number(sizes):
    with raises(aj.UserError, *sizes, *sizes.values()):
        DeltaSizes(**sizes)


def test_linear_attention_needs_its_sizes():
    with raises(aj.UserError, "linear_attention", "llama"):
        DecoderConfig(num_hidden_layers=1, layer_types=("linear_attention",))


@pytest.mark.witness("qwen3_5_moe_text")
@pytest.mark.weekly
@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gemma4_text"])
def test_rows_of_a_server_generate_what_they_do_alone(name):
    """Prompts in pieces, and rows that wait while others go on, each with what its layers keep."""
    config = DecoderConfig.from_json(FIXTURE.parent / name / "config.json")
    config = replace(config, initializer_range=0.3)
    model, example = Decoder(config, rngs=nnx.Rngs(0)), (np.ones((1, 4), int),)
    recipe = aj.lora(2, targets="**/attention/query")
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    slots = Slots(aj.Bank(adapted, capacity=2), rows=2, context=16, pieces=(1, 4))
    prompts, new = ([5, 9, 7, 3, 8, 6], [4, 11]), 5
    expected = [
        generate(model, jnp.array([prompt]), max_new_tokens=new).ids[0].tolist()
        for prompt in prompts
    ]

    def read(row, prompt):
        for at in range(0, len(prompt), 4):
            token = slots.read(row, prompt[at : at + 4], at == 0, None, Choice())
        return [token.id]

    made = [read(0, prompts[0]), []]
    for _ in range(2):  # row 1 waits
        made[0].append(slots.step([made[0][-1], None], [None, None], [Choice()] * 2)[0].id)
    made[1] = read(1, prompts[1])
    for _ in range(2):
        tokens = slots.step([row[-1] for row in made], [None, None], [Choice()] * 2)
        made = [[*row, token.id] for row, token in zip(made, tokens, strict=True)]
    for _ in range(2):  # row 0 waits
        made[1].append(slots.step([None, made[1][-1]], [None, None], [Choice()] * 2)[1].id)
    assert made == expected
