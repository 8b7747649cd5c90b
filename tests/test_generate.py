"""Generation: the same tokens as full passes, alone or in a batch, adapted or merged."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises
from test_decoder_model import TINY, build

import adapters_jax as aj
from adapters_jax.finetune.models import generation as module
from adapters_jax.finetune.models.generation import generate, nucleus
from adapters_jax.finetune.models.parts.cache import Cache
from adapters_jax.finetune.models.parts.rotary import RopeScaling
from adapters_jax.nnx import AdapterParam

CONFIG = replace(TINY, num_hidden_layers=2)
SHORT, LONG = [3, 4], [5, 6, 7, 8]
NEW = 6
LEFT = jnp.array([[9, 9, *SHORT], LONG]), jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]])
RIGHT = jnp.array([[*SHORT, 9, 9], LONG]), jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]])


def doubled(query, key, value, **options):
    """A user's attention function, twice as sharp as ours."""
    return nnx.dot_product_attention(2 * query, key, value, **options)


def lively(**options):
    """A model that does not generate one token again and again."""
    model = build(CONFIG, **options)
    nnx.update(model, jax.tree.map(jnp.asarray, drawn_like(nnx.state(model), seed=4)))
    return model


@nnx.jit
def full_pass(model, ids):
    return model(ids)


def logits_of(model, prompt):
    """Logits at each token; padded to one shape, as no token sees a later one."""
    ids = np.zeros((1, len(LONG) + NEW), np.int32)
    ids[0, : len(prompt)] = prompt
    return np.asarray(full_pass(model, ids))[0, : len(prompt)]


def by_full_passes(model, prompt):
    """Greedy tokens without a cache."""
    made = []
    for _ in range(NEW):
        made.append(int(np.argmax(logits_of(model, prompt + made)[-1])))
    return made


@pytest.fixture(scope="module")
def model():
    return lively(attention=doubled)


@pytest.fixture(scope="module")
def expected(model):
    return [by_full_passes(model, prompt) for prompt in (SHORT, LONG)]


def shaken(model, recipe):
    """The model with adapters that change its tokens."""
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=(LEFT[0],))
    state = nnx.state(adapted, AdapterParam)
    nnx.update(adapted, jax.tree.map(lambda x: jnp.asarray(0.5 * x), drawn_like(state, 1)))
    return adapted


@pytest.mark.weekly
def test_greedy_is_full_passes_of_each_prompt_alone_on_either_side_of_padding(model, expected):
    for ids, mask in (LEFT, RIGHT):
        made = generate(model, ids, mask, max_new_tokens=NEW)
        assert made.ids.tolist() == expected
        assert made.lengths.tolist() == [NEW, NEW]
    alone = generate(model, jnp.array([SHORT]), max_new_tokens=NEW)
    assert alone.ids.tolist() == expected[:1]
    assert min(len(set(row)) for row in expected) > 4
    assert expected != [by_full_passes(lively(), prompt) for prompt in (SHORT, LONG)]


@pytest.mark.slow
def test_it_compiles_once_for_its_shapes(model):
    def size(prompts, **options):
        generate(model, *prompts, max_new_tokens=NEW, **options)
        return module._generate._cache_size()

    first = size(LEFT)
    assert size(RIGHT, temperature=0.5, top_p=0.5, key=jax.random.key(3)) == first
    assert size(LEFT, temperature=2.0, key=jax.random.key(4)) == first


@pytest.mark.slow
def test_a_row_draws_the_same_whatever_the_others(model):
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.9}
    draw = partial(generate, model, **options)
    alone = draw(jnp.array([SHORT]), key=jax.random.key(1)).ids
    batch = draw(*LEFT, key=jax.random.key(1)).ids
    assert batch[0].tolist() == alone[0].tolist()
    assert batch.tolist() == draw(*LEFT, key=jax.random.key(1)).ids.tolist()
    assert batch.tolist() != draw(*LEFT, key=jax.random.key(2)).ids.tolist()


def test_every_row_and_step_draws_from_a_key_of_its_own():
    key = jax.random.key(5)
    sampling = module._Sampling(jnp.float32(0.5), jnp.float32(1.0), key, jnp.zeros(0, jnp.int32))
    logits = jnp.arange(20.0).reshape(2, 10) / 20
    choose = jax.jit(module._choose)
    got = [choose(logits, step, sampling).tolist() for step in range(8)]

    @jax.jit
    def draw(row, step):
        key_of_row = jax.random.fold_in(key, row)
        return jax.random.categorical(jax.random.fold_in(key_of_row, step), logits[row] / 0.5)

    expected = [[int(draw(row, step)) for row in range(2)] for step in range(8)]
    assert got == expected
    assert len(set(map(tuple, expected))) > 4


def test_a_cache_may_be_filled_to_its_last_slot():
    cache = Cache.empty([], batch=2, slots=3)
    cache, positions, mask = cache.reserve(jnp.array([[0, 1, 1], [1, 1, 1]]))
    assert positions.tolist() == [[-1, 0, 1], [0, 1, 2]]
    assert mask.astype(int).tolist() == [
        [[[0, 0, 0], [0, 1, 0], [0, 1, 1]]],
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]
    assert int(cache.used) == 3


@pytest.mark.slow
def test_sampled_tokens_have_the_probabilities_of_temperature_and_top_p(model):
    rows, temperature, top_p = 4000, 2.0, 0.8
    prompts = jnp.tile(jnp.array([SHORT]), (rows, 1))
    options = {"temperature": temperature, "top_p": top_p, "key": jax.random.key(0)}
    made = generate(model, prompts, max_new_tokens=1, **options).ids[:, 0]
    logits = logits_of(model, SHORT)[-1].astype(np.float64)
    full = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-full)
    kept = order[: np.searchsorted(full[order].cumsum(), top_p) + 1]
    assert 2 < len(kept) < CONFIG.vocab_size
    expected = np.where(np.isin(np.arange(len(full)), kept), full, 0) / full[kept].sum()
    got = np.bincount(made, minlength=len(expected)) / rows
    assert set(made.tolist()) == set(kept.tolist())
    np.testing.assert_allclose(got, expected, atol=4 * np.sqrt(expected.max() / rows))


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.5, 1), (0.51, 2), (0.8, 3), (1.0, 4)])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, kept):
    logits = np.log([0.125, 0.5, 0.25, 0.124])
    got = np.asarray(nucleus(jnp.asarray(logits, jnp.float32), top_p))
    assert np.isfinite(got).sum() == kept
    assert set(np.flatnonzero(np.isfinite(got))) == set(np.argsort(-logits)[:kept])


@pytest.mark.slow
def test_a_stop_token_ends_its_row_and_the_last_one_the_work(expected):
    passes = []

    def counted(query, key, value, **options):
        jax.debug.callback(lambda: passes.append(query.shape[1]))
        return doubled(query, key, value, **options)

    stop = expected[0][2]
    made = generate(lively(attention=counted), *LEFT, max_new_tokens=NEW, stop=[19, stop])
    lengths = [row.index(stop) if stop in row else NEW for row in expected]
    cut = [row[:n] + [0] * (NEW - n) for row, n in zip(expected, lengths, strict=True)]
    assert made.lengths.tolist() == lengths
    assert made.ids.tolist() == cut
    jax.effects_barrier()
    layers = CONFIG.num_hidden_layers
    assert passes.count(4) == layers
    assert passes.count(1) == layers * min(max(lengths), NEW - 1)


def test_attention_fn_gets_every_slot_of_few_key_heads():
    seen = []

    def attention_fn(query, key, value, **options):
        seen.append((query.shape, key.shape, value.shape, options["mask"].shape))
        return nnx.dot_product_attention(query, key, value, **options)

    model = build(TINY, attention=attention_fn)
    jax.eval_shape(lambda: generate(model, *LEFT, max_new_tokens=3))
    slots = (2, 7, 2, 4)
    assert seen[0] == ((2, 4, 4, 4), slots, slots, (2, 1, 4, 7))
    assert seen[1] == ((2, 1, 4, 4), slots, slots, (2, 1, 1, 7))


@pytest.mark.slow
def test_a_cache_is_extended_in_pieces_and_not_changed(model):
    ids, mask = LEFT

    @nnx.jit
    def extend(model, *args):
        hidden, cache = model.extend(*args)
        return model.logits(hidden), cache

    empty = model.empty_cache(2, 5)
    first, half = extend(model, ids[:, :2], mask[:, :2], empty)
    second, whole = extend(model, ids[:, 2:], mask[:, 2:], half)
    np.testing.assert_allclose(second[0], logits_of(model, SHORT), atol=1e-4)
    both = jnp.concatenate([first[1], second[1]])
    np.testing.assert_allclose(both, logits_of(model, LONG), atol=1e-4)
    assert [int(cache.used) for cache in (empty, half, whole)] == [0, 2, 4]
    assert not np.any(empty.layers[0].slots[0])
    assert np.any(half.layers[0].slots[0][:, :2]) and not np.any(half.layers[0].slots[0][:, 2:])
    assert whole.held.astype(int).tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]]
    with raises(aj.UserError, "4 tokens", "3 slots"):
        model.extend(ids, mask, model.empty_cache(2, 3))


@pytest.mark.slow
def test_an_adapted_model_generates_what_its_merged_one_does(model, expected):
    adapted = shaken(model, aj.LoRA("**/{query,value}", 8))
    made = generate(adapted, *LEFT, max_new_tokens=NEW).ids.tolist()
    assert made == generate(aj.merge(adapted), *LEFT, max_new_tokens=NEW).ids.tolist()
    assert made != expected


@pytest.mark.slow
def test_bottlenecks_on_whole_layers_act_and_dropout_does_not(model, expected):
    recipe = aj.Recipe(
        aj.Bottleneck("layers/*/attention", 4, dropout=0.5), aj.Bottleneck("layers/*", 4)
    )
    adapted = shaken(model, recipe)
    before = nnx.to_pure_dict(nnx.state(adapted, nnx.RngState))
    made = generate(adapted, *LEFT, max_new_tokens=NEW).ids.tolist()
    after = nnx.to_pure_dict(nnx.state(adapted, nnx.RngState))
    assert str(before) == str(after)
    assert not adapted.layers[0].attention.adapter.dropout.deterministic
    adapted.eval()
    assert made == [by_full_passes(adapted, prompt) for prompt in (SHORT, LONG)]
    assert made != expected


def test_the_cache_has_the_dtype_of_the_computation():
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        model = nnx.eval_shape(partial(build, CONFIG, **options))
        cache = nnx.eval_shape(lambda model: model.empty_cache(1, 2), model)
        assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens", "got 0"]),
        ({"max_new_tokens": 1.5}, ["max_new_tokens", 1.5]),
        ({"temperature": -1.0}, ["temperature", -1.0]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"temperature": float("inf"), "key": jax.random.key(0)}, ["temperature", "inf"]),
        ({"top_p": 0.0}, ["top_p", 0.0]),
        ({"top_p": 1.1}, ["top_p", 1.1]),
        ({"temperature": 0.7}, ["temperature 0.7", "key=jax.random.key"]),
        (
            {"attention_mask": jnp.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])},
            ["row 1, 2", "bos"],
        ),
        ({"input_ids": jnp.zeros((0, 3), int)}, ["rows", "bos"]),
        ({"input_ids": jnp.zeros((1, 0), int)}, ["row 0", "bos"]),
        ({"max_new_tokens": 0, "top_p": 2}, ["max_new_tokens", "got 0", "top_p", "got 2"]),
    ],
)
def test_bad_arguments_raise(model, options, data):
    rows = len(options.get("attention_mask", LEFT[0]))
    options = {"max_new_tokens": 2, "input_ids": jnp.ones((rows, 4), int)} | options
    with raises(aj.UserError, "generate", *data):
        generate(model, **options)


def test_shapes_that_do_not_fit_raise(model):
    with raises(aj.UserError, "attention_mask", (2, 4), (2, 3)):
        generate(model, LEFT[0], jnp.ones((2, 3)), max_new_tokens=1)


def test_only_decoders_generate():
    with raises(TypeError, "generate", "Linear", "Decoder"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LEFT[0], max_new_tokens=1)


@pytest.mark.slow
def test_prompts_beyond_the_longest_text_are_an_error():
    config = replace(CONFIG, max_position_embeddings=8)
    model = build(config)
    generate(model, LEFT[0], LEFT[1], max_new_tokens=4)
    with raises(aj.UserError, "prompt 2", 4, 9, 5, "at most 8", "at most 4 new"):
        generate(model, LEFT[0], LEFT[1], max_new_tokens=5)
    with raises(aj.UserError, "prompt 1", 9, 10, "shorten"):
        generate(model, jnp.ones((1, 9), int), max_new_tokens=1)
    adapted = aj.adapt(model, aj.Recipe(aj.LoRA("**/query", 2)), rngs=nnx.Rngs(0))
    with raises(aj.UserError, "prompt 2", "at most 8"):
        generate(adapted, LEFT[0], LEFT[1], max_new_tokens=5)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 32),
        (RopeScaling("linear", factor=4.0), 128),
        (RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16), 64),
        (RopeScaling("yarn", factor=4.0, original_max_position_embeddings=8), 32),
        (RopeScaling("dynamic", factor=3.0, original_max_position_embeddings=32), 96),
        (
            RopeScaling(
                "llama3",
                factor=8.0,
                original_max_position_embeddings=16,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
            32,
        ),
    ],
)
def test_scaled_rotary_positions_count(scaling, longest):
    config = replace(CONFIG, max_position_embeddings=32, rope_scaling=scaling)
    assert config.longest == longest
    assert replace(config, sliding_window=4).longest == longest
