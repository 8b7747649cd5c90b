"""The decoder as a Llama: values of the reference, grouped heads, paths, counts, dtypes, errors."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from helpers.arrays import read_arrays
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.models import KNOWN
from adapters_jax.finetune.models.decoder import (
    Decoder,
    DecoderConfig,
    layers,
    load_decoder,
    save_decoder,
)
from adapters_jax.finetune.models.parts.rotary import LayerKind, RopeScaling, rotate, rotation
from adapters_jax.finetune.models.parts.tokens import Embed

FIXTURE = Path(__file__).parent / "fixtures" / "llama"
TINY = DecoderConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
IDS = jnp.array([[3, 4, 5, 6], [7, 8, 9, 1]])


def reference():
    with np.load(FIXTURE / "expected.npz") as file:
        expected = dict(file)
    return expected.pop("input_ids"), expected.pop("attention_mask"), expected


def build(config=TINY, **options):
    """A model with random parameters; drawn by numpy, which compiles nothing."""
    draw = np.random.default_rng(0).normal
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    state = nnx.to_pure_dict(nnx.state(model))
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(draw(0, 0.3, x.shape), x.dtype), state))
    return model


@nnx.jit
def run(model, ids):
    return model(ids)


def leaves(model):
    """The parameters by slash path."""
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


@pytest.mark.slow
def test_logits_are_those_of_the_reference_behind_padding():
    ids, mask, expected = reference()
    _, model = load_decoder(FIXTURE)
    for positions in (expected["position_ids"], None):  # rotary: only differences matter
        logits = model(ids, mask, positions)
        np.testing.assert_allclose(logits[mask == 1], expected["logits"][mask == 1], atol=5e-5)
        assert np.isfinite(logits).all()
    np.testing.assert_allclose(model(ids[:1]), expected["unpadded"], atol=5e-5)


def test_grouped_heads_are_repeated_heads():
    grouped, full = build(), build(replace(TINY, num_key_value_heads=4))
    state = nnx.to_pure_dict(nnx.state(grouped))
    for layer in state["layers"].values():
        for name in ("key", "value"):
            kernel = layer["attention"][name]["kernel"].reshape(16, 2, 4)
            layer["attention"][name]["kernel"] = kernel.repeat(2, axis=1).reshape(16, 16)
    nnx.update(full, state)
    np.testing.assert_allclose(run(grouped, IDS), run(full, IDS), atol=1e-5)


@pytest.mark.slow
def test_attention_fn_gets_rotated_queries_and_few_key_heads():
    calls = []

    def attention_fn(query, key, value, **options):
        calls.append((query, key.shape, value.shape, options))
        return nnx.dot_product_attention(query, key, value, **options)

    model = build(attention=attention_fn)
    np.testing.assert_allclose(model(IDS), build()(IDS), atol=1e-6)  # flax's sums in another order
    query, *shapes, options = calls[0]
    assert len(calls) == 1
    assert shapes == [(2, 4, 2, 4)] * 2
    assert options["mask"].shape == (1, 1, 4, 4)
    assert options["deterministic"] is True
    layer = model.layers[0]
    plain = layer.attention.query(layer.attention_norm(model.embeddings(IDS))).reshape(2, 4, 4, 4)
    turned = rotate(plain, rotation(jnp.arange(4)[None], 4, 10000.0))
    np.testing.assert_allclose(query, turned, atol=1e-5)
    assert np.abs(query - plain).max() > 0.1


def test_rotation_keeps_lengths_and_depends_on_differences():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at_query, at_key):
        turned = (
            rotate(x, rotation(np.array([[at]]), 8, 100.0))
            for x, at in ((query, at_query), (key, at_key))
        )
        return np.vdot(*turned)

    np.testing.assert_allclose(score(7, 3), score(14, 10), rtol=1e-4)
    np.testing.assert_allclose(score(5, 5), np.vdot(query, key), rtol=1e-4)
    assert abs(score(7, 3) - score(3, 7)) > 1e-3
    by = rotation(np.array([[5]]), 8, 100.0)
    assert (rotate(jnp.bfloat16(query), by).dtype, by.cos.dtype) == (jnp.bfloat16, jnp.float32)


def test_tied_embeddings_are_the_head():
    tied = build(replace(TINY, tie_word_embeddings=True))
    untied = build()
    assert not hasattr(tied, "head")
    state = nnx.to_pure_dict(nnx.state(tied))
    state["head"] = {"kernel": state["embeddings"]["embedding"].T}
    nnx.update(untied, state)
    np.testing.assert_allclose(run(tied, IDS), run(untied, IDS), atol=1e-5)


@pytest.mark.slow
def test_a_tied_checkpoint_may_repeat_its_head(tmp_path):
    config = json.loads((FIXTURE / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((FIXTURE / "model.safetensors").read_bytes())
    _, model = load_decoder(tmp_path)
    logits = model.hidden(IDS) @ model.embeddings.embedding[...].T
    np.testing.assert_allclose(model(IDS), logits, atol=1e-5)


def test_a_checkpoint_is_written_as_it_was_read(tmp_path):
    config, model = load_decoder(FIXTURE)
    save_decoder(tmp_path, config, model, eos_token_id=2)
    expected, got = (read_arrays(directory) for directory in (FIXTURE, tmp_path))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    again = DecoderConfig.from_json(tmp_path / "config.json")
    assert replace(again, num_key_value_heads=config.kv_heads, head_dim=config.head_width) == (
        replace(config, num_key_value_heads=config.kv_heads, head_dim=config.head_width)
    )
    written = json.loads((tmp_path / "config.json").read_text())
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": 2}
    assert fields.items() <= written.items()
    assert written["dtype"] == written["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"norm_placement": "both"}, ["'llama'", "norm_placement='both'", "'pre'"]),
        ({"model_type": "qwen2"}, ["'qwen2'", "attention_bias=False", True]),
        ({"model_type": "gemma2"}, ["'gemma2'", "norm_offset=0.0", "attention_multiplier"]),
        ({"model_type": "mixtral"}, ["'mixtral'", "norm_topk_prob=False", True]),
    ],
)
def test_a_model_that_its_architecture_does_not_have_is_not_saved(change, data, tmp_path):
    config = replace(TINY, **change)
    with raises(aj.UserError, *data):
        save_decoder(tmp_path, config, build(config))
    assert not list(tmp_path.iterdir())
    assert replace(TINY, model_type="smollm3").to_dict()["no_rope_layers"] == [1]


def test_the_identity_of_a_llama_has_no_flags_that_are_not_set():
    oldest = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    oldest += ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
    oldest += ("rms_norm_eps", "rope_theta", "initializer_range", "tie_word_embeddings")
    assert tuple(replace(TINY, max_position_embeddings=99).identity()) == oldest
    scaled = replace(TINY, rope_scaling=RopeScaling("linear", 2.0), sliding_window=3)
    assert scaled.identity().keys() - oldest == {"rope_scaling", "sliding_window"}


def test_segments_do_not_see_each_other():
    model, segments = build(), jnp.array([[1, 1, 2, 2], [1, 2, 2, 2]])
    together = nnx.jit(lambda model: model(IDS, segments=segments))(model)
    np.testing.assert_allclose(together[0, 2:], run(model, IDS[:1, 2:])[0], atol=1e-5)
    np.testing.assert_allclose(together[1, 1:], run(model, IDS[1:, 1:])[0], atol=1e-5)
    assert np.abs(together[0, 2:] - run(model, IDS)[0, 2:]).max() > 1e-3


@pytest.mark.weekly
def test_prompts_are_the_same_for_padded_and_packed_texts():
    """Prompts are not rotated, so a text's positions count, not only their differences."""
    model = aj.adapt(build(), aj.LlamaAdapter("**/attention", 3), rngs=nnx.Rngs(0))
    state = nnx.state(model, aj.nnx.AdapterParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.5, state))
    alone = np.asarray(model(IDS))
    assert np.abs(alone - build()(IDS)).max() > 0.1
    for left in (0, 3):
        widths = (0, 0), (left, 3 - left)
        padded = model(np.pad(IDS, widths), np.pad(np.ones((2, 4)), widths))
        np.testing.assert_allclose(padded[:, left : left + 4], alone, atol=1e-5)
    packed = model(IDS.reshape(1, 8), segments=jnp.array([[1] * 4 + [2] * 4]))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-5)
    packed = model(
        np.r_[[0], IDS.ravel()][None],
        np.r_[[0], np.ones(8)][None],
        segments=np.array([[0] + [1] * 4 + [2] * 4]),
    )
    np.testing.assert_allclose(packed[0, 1:].reshape(alone.shape), alone, atol=1e-5)


def test_every_parameter_path():
    layer = (
        *(f"attention/{child}/kernel" for child in ("query", "key", "value", "output")),
        *(f"mlp/{child}/kernel" for child in ("gate", "up", "output")),
        "attention_norm/scale",
        "mlp_norm/scale",
    )
    expected = {f"layers/0/{path}" for path in layer}
    expected |= {"embeddings/embedding", "norm/scale", "head/kernel"}
    assert set(leaves(build())) == expected


def test_llama_7b_has_the_published_count_without_allocating():
    model, _ = KNOWN["huggyllama/llama-7b"]()
    arrays = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arrays)
    assert sum(leaf.size for leaf in arrays) == 6_738_415_616


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    low = build(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in leaves(low).values()} == {jnp.dtype("float32")}
    assert nnx.eval_shape(lambda model: model.hidden(IDS), low).dtype == jnp.bfloat16
    exact, logits = run(build(), IDS), run(low, IDS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.05)
    assert np.abs(logits - exact).max() > 1e-4


def test_parameters_load_in_the_dtype_asked_for():
    _, model = load_decoder(FIXTURE, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in leaves(model).values()} == {jnp.dtype("bfloat16")}


def feed_forward_gradient(scan, dropout=0.0):
    """The gradient of adapters on all of a feed-forward, whose factors are drawn."""
    recipe = aj.LoRA("**/mlp/*", 2, dropout=dropout)
    ids = jnp.arange(6).reshape(2, 3)
    model = aj.adapt(build(scan=scan), recipe, rngs=nnx.Rngs(1), example_inputs=(ids,))
    state, rng = nnx.state(model, aj.nnx.AdapterParam), np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)) / 4, state))
    loss = lambda model: jnp.square(model(ids)).mean()  # noqa: E731
    return nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, aj.nnx.AdapterParam)))(model)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["plain", "scan"])
def test_an_activation_that_is_computed_again_changes_no_gradient(scan, monkeypatch):
    again = feed_forward_gradient(scan)
    monkeypatch.setattr(layers, "recomputed", lambda run, last, *inputs: run(*inputs))
    stored = feed_forward_gradient(scan)
    assert all(jnp.abs(x).max() > 1e-4 for x in jax.tree.leaves(stored))
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, again, stored)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["plain", "scan"])
def test_an_adapter_with_dropout_draws_where_activations_are_computed_again(scan):
    found, without = feed_forward_gradient(scan, 0.5), feed_forward_gradient(scan)
    apart = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), found, without)
    assert all(x > 1e-4 for x in jax.tree.leaves(apart))


@pytest.mark.slow
def test_remat_changes_neither_values_nor_gradients():
    def loss(model):
        return jax.nn.log_softmax(model(IDS))[:, :, 0].sum()

    plain, recomputed = build(), build(remat=True)
    step = nnx.jit(nnx.value_and_grad(loss))
    (value, gradients), (again, same) = step(plain), step(recomputed)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), gradients, same
    )
    graph, state = nnx.split(recomputed)
    jaxpr = jax.make_jaxpr(jax.grad(lambda state: loss(nnx.merge(graph, state))))(state)
    assert str(jaxpr).count("remat") >= TINY.num_hidden_layers


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "factor"]),
        (
            {"rope_scaling": {"type": "mrope", "factor": 2.0}},
            ["rope_type='mrope'", "linear", "yarn"],
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "axes": 3}},
            ["axes", "low_freq_factor"],
        ),
        ({"rope_scaling": 2.0}, ["rope_scaling=2.0"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"hidden_act": "gelu_fsat"}, ["hidden_act='gelu_fsat'", "nearest: 'gelu"]),
        ({"attention_dropout": 0.1}, ["attention_dropout=0.1", 0.0]),
        ({"model_type": "bert"}, ["model_type='bert'", "'llama'"]),
        ({"num_attention_heads": 9, "num_key_value_heads": 2}, [9, 2]),
        ({"num_hidden_layers": 2**40}, ["num_hidden_layers", 2**40]),
        ({"num_hidden_layers": 20_000}, ["num_hidden_layers", 20_000, 1_000]),
        ({"hidden_size": -4}, ["hidden_size=-4"]),
        ({"hidden_size": 0}, ["hidden_size=0"]),
        ({"hidden_size": "4096"}, ["hidden_size='4096'"]),
        ({"num_attention_heads": 4.0}, ["num_attention_heads=4.0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
        ({"rope_theta": float("inf")}, ["rope_theta=inf"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
        ({"hidden_act": ["silu"]}, ["hidden_act=['silu']"]),
        ({"head_dim": 7}, ["7 of 7 features"]),
    ],
)
def test_unsupported_settings_raise_an_error_that_names_them(settings, data):
    with raises(aj.UserError, *data):
        DecoderConfig.from_dict(settings)


@pytest.mark.parametrize(
    "settings", [{"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}]
)
def test_rope_theta_is_read_from_old_and_new_files(settings):
    assert DecoderConfig.from_dict(settings).rope_theta == 500.0


def test_inputs_that_do_not_fit_raise():
    with raises(aj.UserError, "attention_mask", (2, 4), (2, 3)):
        build()(IDS, jnp.ones((2, 3)))


def test_rotary_settings_of_each_kind_of_layer_are_read():
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 50.0}
    each = {"full_attention": whole, "sliding_attention": local}
    new = {"model_type": "gemma3_text", "num_hidden_layers": 6, "rope_parameters": each}
    old = {
        **{"model_type": "gemma3_text", "num_hidden_layers": 6, "rope_theta": 1e6},
        **{"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_local_base_freq": 50.0},
    }
    config = DecoderConfig.from_dict(new)
    assert config == DecoderConfig.from_dict(old)
    *sliding, full = config.layer_kinds
    assert set(sliding) == {LayerKind(4096, 50.0, None)}
    assert full == LayerKind(None, 1e6, RopeScaling("linear", 8.0))


@pytest.mark.slow
def test_a_checkpoint_makes_its_directory(tmp_path):
    model = build(TINY)
    save_decoder(tmp_path / "new" / "one", TINY, model)
    assert DecoderConfig.from_json(tmp_path / "new" / "one" / "config.json").vocab_size
    (tmp_path / "file").write_text("")
    with raises(aj.UserError, tmp_path / "file", "cannot be written"):
        save_decoder(tmp_path / "file", TINY, model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_product_with_a_tied_table_reads_it_as_it_lies(dtype):
    """A transposed table takes four times as long for one row, on a CPU with jax 0.12."""
    table = Embed(7, 4, dtype=dtype, rngs=nnx.Rngs(0))
    for shape in ((4,), (1, 4), (2, 3, 4)):
        hidden = jax.random.normal(jax.random.key(1), shape)
        found, expected = table.attend(hidden), nnx.Embed.attend(table, hidden)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-6)
        assert "transpose" not in str(jax.make_jaxpr(table.attend)(hidden))
