"""BERT and RoBERTa: values of the reference implementation, paths, counts, dtypes, errors."""

import csv
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.arrays import read_arrays
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.models import KNOWN
from adapters_jax.finetune.models.bert import (
    BERT_BASE,
    Bert,
    BertClassifier,
    BertConfig,
    load_bert,
    mean_pool,
)

FIXTURES = Path(__file__).parent / "fixtures"
STSB = Path(__file__).parents[2] / "shared" / "data" / "stsb" / "dev.tsv"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TINY = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=10,
)
IDS = jnp.array([[3, 4, 5, 6], [7, 8, 9, 1]])


@cache
def tiny_variables():
    """Random parameters of a classifier; drawn by numpy, which compiles nothing."""
    draw = np.random.default_rng(0).normal
    params = abstract(BertClassifier(TINY, 2, "pooler"))
    return {"params": jax.tree.map(lambda x: draw(0, 0.3, x.shape).astype(x.dtype), params)}


def tiny_bert():
    return {"params": tiny_variables()["params"]["bert"]}


def reference(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        expected = dict(file)
    return {key: expected[key] for key in INPUTS if key in expected}, expected


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def abstract(model, ids=IDS, **options):
    return jax.eval_shape(partial(model.init, **options), jax.random.key(0), ids)["params"]


def pooled(bert, ids):
    return bert.pool(bert(ids))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_hidden_states_are_those_of_the_reference(name):
    inputs, expected = reference(name)
    config, params = load_bert(FIXTURES / name)
    hidden = Bert(config).apply({"params": params}, **inputs)
    np.testing.assert_allclose(hidden, expected["hidden"], atol=2e-5)


def test_pooler_and_classifier_are_those_of_the_reference():
    inputs, expected = reference("bert")
    config, params = load_bert(FIXTURES / "bert", pooler=True)
    hidden = Bert(config).apply({"params": params}, **inputs)
    pool = Bert(config).apply({"params": params}, hidden, method=Bert.pool)
    np.testing.assert_allclose(pool, expected["pooled"], atol=2e-5)

    tensors = read_arrays(FIXTURES / "bert")
    head = {"kernel": tensors["classifier.weight"].T, "bias": tensors["classifier.bias"]}
    model = BertClassifier(config, num_labels=3, pooling="pooler")
    logits = model.apply({"params": {"bert": params, "head": head}}, **inputs)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5)


def test_the_mask_may_have_any_dtype():
    inputs, _ = reference("bert")
    config, params = load_bert(FIXTURES / "bert")
    mask = inputs.pop("attention_mask")
    outputs = [
        Bert(config).apply({"params": params}, attention_mask=jnp.asarray(mask, dtype), **inputs)
        for dtype in (bool, jnp.int32, jnp.float32)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


@pytest.mark.witness("mean", "pooler")
@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_does_not_change_the_logits(pooling):
    apply = jax.jit(partial(BertClassifier(TINY, 2, pooling).apply, tiny_variables()))
    ids, mask = (jnp.pad(x, ((0, 0), (0, 3))) for x in (IDS, jnp.ones_like(IDS)))
    np.testing.assert_allclose(apply(ids, mask), apply(IDS), atol=1e-5)
    assert np.abs(apply(ids, mask) - apply(ids, jnp.ones_like(ids))).max() > 1e-4


@pytest.mark.slow
def test_pooling_picks_different_summaries():
    variables = tiny_variables()
    logits = [
        BertClassifier(TINY, 2, pooling).apply(variables, IDS)
        for pooling in ("mean", "cls", "pooler")
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    assert np.abs(logits[1] - logits[2]).max() > 1e-3
    hidden = Bert(TINY).apply(tiny_bert(), IDS)
    head = variables["params"]["head"]
    by_hand = hidden.mean(axis=1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits[0], by_hand, atol=1e-6)


def test_every_parameter_path():
    layer = {
        *(f"attention/{child}" for child in ("query", "key", "value", "output/dense")),
        *(f"mlp/{child}" for child in ("intermediate", "output/dense")),
    }
    norms = {"embeddings/norm", "layer_0/attention_norm", "layer_0/mlp_norm"}
    dense = {f"layer_0/{child}" for child in layer} | {"pooler/dense"}
    expected = {
        *(f"embeddings/{child}/embedding" for child in ("word", "position", "token_type")),
        *(f"{path}/{leaf}" for path in norms for leaf in ("scale", "bias")),
        *(f"{path}/{leaf}" for path in dense for leaf in ("kernel", "bias")),
    }
    params = abstract(Bert(TINY), method=pooled)
    assert set(flatten_dict(params, sep="/")) == expected


@pytest.mark.witness("bert-base-108891648", "roberta-base-124055040")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bert-base", 108_891_648),
        ("bert-large", 334_092_288),
        ("roberta-base", 124_055_040),
        ("roberta-large", 354_310_144),
    ],
)
def test_known_shapes_have_the_published_counts(name, count):
    model, inputs = KNOWN[name]()
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    assert size(params) == count


def test_pooler_parameters_exist_only_where_it_is_used():
    assert size(abstract(Bert(BERT_BASE), method=pooled)) == 109_482_240
    for pooling in ("mean", "cls"):
        assert "pooler" not in abstract(BertClassifier(TINY, 2, pooling))["bert"]
    assert "pooler" in abstract(BertClassifier(TINY, 2, "pooler"))["bert"]


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    low = {"dtype": jnp.bfloat16}
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(Bert(TINY, **low)))} == {
        jnp.dtype("float32")
    }
    assert jax.eval_shape(Bert(TINY, **low).apply, tiny_bert(), IDS).dtype == jnp.bfloat16
    exact, logits = (
        jax.jit(BertClassifier(TINY, 2, **types).apply)(tiny_variables(), IDS)
        for types in ({}, low)
    )
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.05)
    assert np.abs(logits - exact).max() > 1e-4


@pytest.mark.slow
def test_remat_changes_neither_values_nor_gradients():
    def loss(variables, remat):
        hidden = Bert(TINY, remat=remat).apply(variables, IDS)
        return (hidden**3).sum()

    plain, recomputed = (jax.value_and_grad(partial(loss, remat=remat)) for remat in (False, True))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-5),
        jax.jit(plain)(tiny_bert()),
        jax.jit(recomputed)(tiny_bert()),
    )
    assert str(jax.make_jaxpr(recomputed)(tiny_bert())).count("remat") >= TINY.num_hidden_layers


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_only_when_asked(rate):
    none = replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = Bert(replace(none, **{rate: 0.5}))
    quiet = model.apply(tiny_bert(), IDS)
    np.testing.assert_array_equal(quiet, Bert(none).apply(tiny_bert(), IDS))
    rngs = {"dropout": jax.random.key(1)}
    dropped = model.apply(tiny_bert(), IDS, deterministic=False, rngs=rngs)
    assert np.abs(quiet - dropped).max() > 0.1


@pytest.mark.slow
def test_scanned_blocks_start_from_random_numbers_of_their_own():
    model = Bert(replace(TINY, num_hidden_layers=2), scan=True)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    one, two = params["layers"]["mlp"]["output"]["dense"]["kernel"]
    assert one.shape == (12, 8)
    assert not np.any(one == two)


def test_both_sublayers_and_the_embeddings_drop():
    config = replace(TINY, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    apply = partial(
        Bert(config).apply,
        deterministic=False,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )
    _, seen = jax.jit(apply)(tiny_bert(), IDS, rngs={"dropout": jax.random.key(1)})
    outputs = {"/".join(path): out for path, (out,) in flatten_dict(seen["intermediates"]).items()}
    names = ("embeddings", "layer_0/attention/output", "layer_0/mlp/output")
    assert outputs.keys() == {f"{name}/Dropout_0/__call__" for name in names}
    assert all(0.3 < (out == 0).mean() < 0.7 for out in outputs.values())


def test_a_classifiers_dropout_is_its_own_or_that_of_hidden_states():
    for own, rate in ((None, 0.25), (0.0, 0.0), (0.5, 0.5)):
        config = replace(TINY, hidden_dropout_prob=0.25, classifier_dropout=own)
        model = BertClassifier(config, 2).bind(tiny_variables())
        assert model.dropout.rate == rate


def test_attention_fn_is_called_as_flax_calls_it():
    calls = []

    def attention_fn(query, key, value, **options):
        calls.append((query.shape, options))
        return nn.dot_product_attention(query, key, value, **options)

    model = Bert(TINY, attention=attention_fn)
    hidden = model.apply(tiny_bert(), IDS, jnp.ones_like(IDS))
    np.testing.assert_array_equal(hidden, Bert(TINY).apply(tiny_bert(), IDS, jnp.ones_like(IDS)))
    assert [shape for shape, _ in calls] == [(2, 4, 2, 4)] * TINY.num_hidden_layers
    options = calls[0][1]
    assert options["mask"].shape == (2, 1, 1, 4)
    assert options["mask"].dtype == bool
    assert options["deterministic"] is True
    assert options["broadcast_dropout"] is False  # every weight is dropped by itself
    assert options["dropout_rng"] is None


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"hidden_act": "mish"}, ["hidden_act='mish'", "'gelu_new'"]),
        ({"position_embedding_type": "relative_key"}, ["position_embedding_type='relative_key'"]),
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "'bert', 'roberta'"]),
        ({"is_decoder": True, "hidden_act": "mish"}, ["hidden_act='mish'", "is_decoder=True"]),
        ({"hidden_size": 10, "num_attention_heads": 4}, [10, 4]),
    ],
)
def test_unsupported_settings_raise_an_error_that_names_them(settings, data):
    with raises(aj.UserError, *data):
        BertConfig.from_dict(settings)


def test_config_is_hashable_and_passes_over_bookkeeping():
    config = BertConfig.from_dict({"hidden_size": 384, "transformers_version": "4.8.2"})
    assert hash(config) == hash(BertConfig(hidden_size=384))


@pytest.mark.parametrize(
    ("inputs", "data"),
    [
        ((jnp.ones((2, 3)),), ["input_ids", "float32", (2, 3)]),
        ((jnp.ones(3, int),), ["input_ids", "int32", (3,)]),
        ((jnp.ones((2, 11), int),), ["input_ids", 11, 10]),
        ((IDS, jnp.ones((2, 1, 4))), ["attention_mask", (2, 4), (2, 1, 4)]),
        (
            (jnp.ones((2, 11), int), jnp.ones((2, 4))),
            ["input_ids", "attention_mask", (2, 11), (2, 4)],
        ),
    ],
)
def test_inputs_that_do_not_fit_raise(inputs, data):
    with raises(aj.UserError, *data):
        jax.eval_shape(Bert(TINY).init, jax.random.key(0), *inputs)


def test_roberta_has_fewer_usable_positions():
    roberta = Bert(replace(TINY, model_type="roberta", pad_token_id=1))
    abstract(roberta, jnp.ones((1, 8), int))
    with raises(aj.UserError, "input_ids", 9, 8):
        abstract(roberta, jnp.ones((1, 9), int))


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"num_labels": 0}, ["num_labels", 0]),
        (
            {"num_labels": 2, "pooling": "max"},
            ["pooling", "'mean', 'cls', 'pooler' or 'tokens'", "'max'"],
        ),
    ],
)
def test_classifier_settings_are_checked(settings, data):
    with raises(aj.UserError, *data):
        abstract(BertClassifier(TINY, **settings))


def test_mean_pool_without_a_mask_is_the_mean():
    hidden = jnp.arange(64.0).reshape(2, 4, 8) ** 2
    np.testing.assert_allclose(mean_pool(hidden), hidden.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(mean_pool(hidden, jnp.ones((2, 4))), mean_pool(hidden), rtol=1e-6)


def embed(directory, sentences):
    """Unit mean-pooled embeddings, computed in batches of like length."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(512)
    tokenizer.no_padding()
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    config, params = load_bert(directory)

    @jax.jit
    def encode(params, ids, mask):
        pooled = mean_pool(Bert(config).apply({"params": params}, ids, mask), mask)
        return pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True)

    embeddings = np.zeros((len(tokens), config.hidden_size), np.float32)
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        length = -(-max(len(tokens[row]) for row in rows) // 8) * 8  # few shapes, little padding
        ids = np.zeros((128, length), np.int32)
        mask = np.zeros((128, length), np.int32)
        for at, row in enumerate(rows):
            ids[at, : len(tokens[row])] = tokens[row]
            mask[at, : len(tokens[row])] = 1
        embeddings[rows] = np.asarray(encode(params, ids, mask))[: len(rows)]
    return embeddings


@pytest.mark.weekly
@pytest.mark.skipif(not STSB.is_file(), reason="the STS-B data is not here")
@pytest.mark.usefixtures("optimized")
def test_minilm_embeddings_agree_with_human_similarity():
    from scipy.stats import spearmanr

    from adapters_jax.finetune.pretrained import assets

    with STSB.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[::4]
    directory = assets.fetch("minilm")
    distinct = sorted({row[name] for row in rows for name in ("sentence1", "sentence2")})
    embedding = dict(zip(distinct, embed(directory, distinct), strict=True))
    first, second = (
        np.stack([embedding[row[name]] for row in rows]) for name in ("sentence1", "sentence2")
    )
    scores = [float(row["score"]) for row in rows]
    assert len(scores) == 375
    assert spearmanr((first * second).sum(axis=1), scores).statistic >= 0.86


@pytest.mark.slow
def test_merged_is_unmerged_on_minilm():
    from adapters_jax.finetune.pretrained.assets import cached

    directory = cached("minilm")
    if directory is None:
        pytest.skip("minilm is not in the cache")
    config, params = load_bert(directory)
    ids = jnp.asarray(np.random.default_rng(0).integers(1000, 20000, (2, 16)), jnp.int32)
    recipe = aj.Recipe(aj.LoRA("**/attention/{query,value}", 8)) + aj.DoRA("**/mlp/output/dense", 4)
    model = aj.adapt(Bert(config), recipe)
    whole = aj.init_adapters(model, params, jax.random.key(0), ids)
    adapters, base = aj.partition(whole, recipe)
    whole = aj.merge_trees(
        jax.tree.map(lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapters),
        base,
    )
    run = jax.jit(Bert(config).apply)
    unmerged = jax.jit(model.apply)({"params": whole}, ids)
    assert np.abs(unmerged - run({"params": params}, ids)).max() > 0.1
    merged = run({"params": aj.merge(model, whole, ids)}, ids)
    np.testing.assert_allclose(merged, unmerged, atol=1e-5)
