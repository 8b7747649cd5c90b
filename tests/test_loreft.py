"""LoReFT against its formula in float64 NumPy, on padded, packed and cached texts."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises
from helpers.tiny import write_llama, write_meanings
from test_bottleneck import FORMULAS

import adapters_jax as aj
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.models import bert
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.t5 import T5, T5Config
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.methods import known_tokens
from adapters_jax.methods.arrays import orthonormal
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.testing import check_method

FIXTURES = Path(__file__).parent / "fixtures"
D, R, LENGTH = 8, 2, 7
POINT = AttachmentPoint("output", "layer_0", width=D)
Y = drawn((2, LENGTH, D), 6)
SETTINGS = {
    "paper": {},
    "last": {"prefix_positions": 0, "suffix_positions": 2},
    "both": {"prefix_positions": 2, "suffix_positions": 3, "activation": "gelu"},
    "tied": {"prefix_positions": 2, "suffix_positions": 1, "tied": True},
    "meeting": {"prefix_positions": 5, "suffix_positions": 4},
    "noreft": {"orthogonal": False, "suffix_positions": 1},
    "direft": {"orthogonal": False, "subtract": False, "activation": "tanh"},
}


def method_of(name, **more):
    return aj.LoReFT("**", R, **SETTINGS[name], **more)


def leaves_of(method, seed=3):
    shapes = {name: jnp.zeros(leaf.shape) for name, leaf in method.leaves(POINT).items()}
    return drawn_like(shapes, seed)


def edit(method, leaves, unit, y):
    """The paper's formula in float64; R by LAPACK's QR, with a positive diagonal."""
    kernel, bias, turned = (double(leaves[f"{unit}/{part}"]) for part in method_parts)
    if method.orthogonal:
        turned, upper = np.linalg.qr(turned)
        turned = turned * np.sign(np.diag(upper))
    source = FORMULAS[method.activation](y @ kernel + bias)
    return y + (source - y @ turned * method.subtract) @ turned.T


method_parts = ("kernel", "bias", "projection")


def expected(method, leaves, y, texts=((0, LENGTH),)):
    """The output where each text is a row's positions from the first to before the last."""
    y, units = double(y), method.units
    out = y.copy()
    for begin, end in texts:
        n, m = method.prefix_positions, method.suffix_positions
        first = slice(begin, min(begin + n, end))
        last = slice(max(end - m, begin), end)
        if n:
            out[..., first, :] = edit(method, leaves, units[0], y[..., first, :])
        if m:
            out[..., last, :] = edit(method, leaves, units[-1], y[..., last, :])
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_the_formula(name):
    method = method_of(name)
    leaves = leaves_of(method)
    got = method.forward(leaves, POINT, None, jnp.asarray(Y))
    np.testing.assert_allclose(got, expected(method, leaves, Y), rtol=1e-4, atol=1e-4)
    one = method.forward(leaves, POINT, None, jnp.asarray(Y[0]))  # without a batch
    np.testing.assert_allclose(one, got[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_on_either_side_and_packed_texts(name):
    method = method_of(name)
    leaves = leaves_of(method)
    mask = jnp.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    with known_tokens(mask):
        got = method.forward(leaves, POINT, None, jnp.asarray(Y))
    for row, text in enumerate([(2, 7), (0, 4)]):
        want = expected(method, leaves, Y[row], [text])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2, 0]])
    with known_tokens((segments > 0).astype(int), segments):
        got = method.forward(leaves, POINT, None, jnp.asarray(Y))
    for row, texts in enumerate([[(0, 3), (3, 7)], [(0, 1), (1, 6)]]):
        want = expected(method, leaves, Y[row], texts)
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_counts(name):
    method = method_of(name)
    shapes = {name: leaf.shape for name, leaf in method.leaves(POINT).items()}
    count = method.count("", shapes, None)
    assert count.parameters == sum(map(math.prod, shapes.values())) == eval(count.formula)
    assert count.parameters == len(method.units) * (2 * D * R + R)
    stacked = method.count("", {leaf: (7, *x) for leaf, x in shapes.items()}, None)
    assert (stacked.parameters, stacked.copies) == (count.parameters, 7)


@pytest.mark.slow
def test_what_is_orthonormal_stays_and_columns_of_zeros_too():
    matrix = drawn((40, 6), 1) * np.array([1, 1e-3, 1e3, 1, 0, 1], np.float32)
    matrix[:, 3] = matrix[:, 0] + 1e-2 * matrix[:, 3]  # nearly dependent
    got = double(orthonormal(jnp.asarray(matrix)))
    np.testing.assert_allclose(got.T @ got, np.diag([1, 1, 1, 1, 0, 1]), atol=2e-6)
    kept = [0, 1, 2, 3, 5]
    want, upper = np.linalg.qr(double(matrix[:, kept]))
    np.testing.assert_allclose(got[:, kept], want * np.sign(np.diag(upper)), atol=2e-4)
    np.testing.assert_allclose(orthonormal(jnp.asarray(got, jnp.float32)), got, atol=2e-6)
    slope = jax.grad(lambda x: jnp.sin(orthonormal(x)).sum())(jnp.asarray(matrix))
    assert np.isfinite(slope).all()
    square = orthonormal(jax.nn.initializers.orthogonal()(jax.random.key(0), (6, 6)))
    np.testing.assert_allclose(square.T @ square, np.eye(6), atol=2e-6)


@pytest.mark.slow
def test_gradients_are_those_of_the_formula():
    method = method_of("both")
    leaves, along = leaves_of(method), leaves_of(method, 9)

    def loss(leaves, forward):
        return (forward(leaves) ** 2).mean()

    def ours(leaves):
        return method.forward(leaves, POINT, None, jnp.asarray(Y))

    slope = jax.grad(loss)(leaves, ours)
    got = sum(float(jnp.vdot(slope[name], along[name])) for name in leaves)
    ends = [
        loss(
            {k: x + s * 1e-5 * double(along[k]) for k, x in leaves.items()},
            lambda x: expected(method, x, Y),
        )
        for s in (1, -1)
    ]
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


def test_dropout_is_on_the_edited_states_alone():
    method = method_of("paper", dropout=0.5)
    leaves = leaves_of(method)
    got = method.forward(leaves, POINT, None, jnp.asarray(Y), jax.random.key(0))
    want = expected(method, leaves, Y)
    np.testing.assert_array_equal(got[:, 3:], Y[:, 3:])
    zero = np.asarray(got[:, :3] == 0.0)
    assert 0.2 < zero.mean() < 0.8
    np.testing.assert_allclose(got[:, :3][~zero], 2 * want[:, :3][~zero], rtol=1e-3, atol=1e-3)


IDS = (jnp.ones((1, 4), int),)
CONFIG = DecoderConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def moved(model):
    adapters = nnx.state(model, aj.nnx.ADAPTERS)
    nnx.update(model, drawn_like(adapters, 3))
    return model


@pytest.mark.witness("True")
@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder_reads_padding_packing_and_caches_alike(scan):
    of = {"targets": "layers"} if scan else {"num_layers": 2}
    model = Decoder(CONFIG, scan=scan, rngs=nnx.Rngs(0))
    base = nnx.clone(model)
    model = moved(aj.adapt(model, aj.loreft(2, **of), rngs=nnx.Rngs(1), example_inputs=IDS))
    assert aj.audit(model).adapter_parameters == 2 * (2 * 16 * 2 + 2)
    ids = jax.random.randint(jax.random.key(4), (1, 6), 1, 29)
    run = nnx.jit(lambda model, *args: model(*args))
    alone = run(model, ids)
    assert np.abs(alone - run(base, ids)).max() > 0.1
    padded = jnp.concatenate([jnp.zeros((1, 3), int), ids], 1)
    mask = (jnp.arange(9) >= 3).astype(int)[None]
    np.testing.assert_allclose(run(model, padded, mask)[:, 3:], alone, atol=2e-4)
    twice, texts = jnp.concatenate([ids, ids], 1), jnp.repeat(jnp.array([[1, 2]]), 6, 1)
    packed = run(model, twice, None, None, texts)
    np.testing.assert_allclose(packed, jnp.concatenate([alone, alone], 1), atol=2e-4)

    made = generate(model, padded, mask, max_new_tokens=5).ids
    want = ids
    for _ in range(5):
        last = run(model, jnp.pad(want, ((0, 0), (0, 11 - want.shape[1]))))[:, want.shape[1] - 1]
        want = jnp.concatenate([want, last.argmax(-1)[:, None]], 1)
    assert made.tolist() == want[:, 6:].tolist()
    assert made.tolist() != generate(base, padded, mask, max_new_tokens=5).ids.tolist()


@pytest.mark.slow
def test_the_last_tokens_of_a_generation_are_not_known():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    model = aj.adapt(
        model,
        aj.loreft(2, last=1, num_layers=2, suffix_positions=1),
        rngs=nnx.Rngs(1),
        example_inputs=IDS,
    )
    with raises(aj.RecipeError, "layers/1", "the last tokens, 1", "cache"):
        generate(model, jnp.ones((1, 4), int), max_new_tokens=2)


@pytest.mark.slow
def test_a_run_that_generates_has_no_last_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_llama(Path("llama"))
    write_meanings(Path("rows.csv"), 24)
    words = "--model llama --train rows.csv --prompt mr --completion ref --method loreft --last 1"
    options = parse(Finetune, [*words.split(), "--suffix-positions", "2", "--held-out", "6"])
    with raises(aj.UserError, "--suffix-positions 2", "--prefix-positions alone"):
        options.prepare(Console(json=True))
    # An encoder reads whole texts, whose last tokens are known.
    recipe = aj.Recipe(aj.LoReFT("encoder/layers/*", 2, suffix_positions=2))
    Path("recipe.json").write_text(recipe.to_json())
    words = words.replace("llama", f"{FIXTURES / 't5' / 't5'}").replace(
        "--method loreft --last 1", "--recipe recipe.json --learning-rate 1e-3 --held-out 6"
    )
    assert parse(Finetune, words.split()).prepare(Console(json=True)).problem.recipe == recipe


@pytest.mark.weekly
def test_an_encoder_and_an_encoder_decoder_have_their_own_tokens():
    config = T5Config(29, 16, 8, 20, num_layers=1, num_decoder_layers=1, num_heads=2)
    recipe = aj.loreft(2, suffix_positions=2, targets="{encoder,decoder}/layers/*")
    model = moved(
        aj.adapt(T5(config, rngs=nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1), example_inputs=IDS)
    )
    ids, written = (
        jax.random.randint(jax.random.key(i), (1, n), 1, 29) for i, n in ((4, 6), (5, 4))
    )
    alone = model(ids, None, written)
    mask, own = (jnp.pad(jnp.ones((1, n), int), ((0, 0), (0, 3))) for n in (6, 4))
    padded, longer = (jnp.pad(x, ((0, 0), (0, 3))) for x in (ids, written))
    np.testing.assert_allclose(model(padded, mask, longer, own)[:, :4], alone, atol=2e-4)
    assert np.abs(model(padded, None, longer)[:, :4] - alone).max() > 1e-2
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = bert.Bert(bert.BertConfig(**sizes, intermediate_size=12))
    adapted = aj.adapt(encoder, aj.loreft(2, layers=[0, 1], suffix_positions=2))
    params = encoder.init(jax.random.key(0), ids)["params"]
    whole = aj.init_adapters(adapted, params, jax.random.key(1), ids)
    got = adapted.apply({"params": whole}, padded, mask)[:, :6]
    np.testing.assert_allclose(got, adapted.apply({"params": whole}, ids), atol=1e-5)


def test_what_is_not_known_is_an_error():
    method = method_of("both")
    leaves = leaves_of(method)
    step = jnp.asarray(Y[:, :1])
    with raises(aj.RecipeError, "layer_0", "[2, 1, 8]", "known_tokens"):
        method.forward(leaves, POINT, None, step)
    with known_tokens():
        method.forward(leaves, POINT, None, step)
    with known_tokens(jnp.ones((2, 5))), raises(aj.RecipeError, "[2, 7, 8]", "[2, 5]"):
        method.forward(leaves, POINT, None, jnp.asarray(Y))
    before = jnp.zeros((2, LENGTH), int)
    with known_tokens(before=before), raises(aj.RecipeError, "the last tokens, 3"):
        method.forward(leaves, POINT, None, jnp.asarray(Y))
    with raises(aj.RecipeError, "rank=9", "8 wide"):
        aj.LoReFT("**", 9).leaves(POINT)
    for fields in ({"prefix_positions": 0}, {"suffix_positions": 1.5}, {"prefix_positions": True}):
        with raises(aj.UserError, next(iter(fields))):
            aj.LoReFT("**", **fields)


@pytest.mark.slow
def test_the_whole_contract():
    method = aj.LoReFT("**/mlp/output", 2, suffix_positions=1)
    assert check_method(method, start_tolerance=math.inf, variants=("plain",)) == ["mlp"]
    with raises(aj.RecipeError, "some positions"):
        method.merged({}, POINT, {})


@pytest.mark.witness("direft")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "direft"])
def test_the_whole_contract_with_other_settings(name):
    method = aj.LoReFT("**/mlp/output", R, **SETTINGS[name])
    variants = ("plain", "scan")
    assert check_method(method, start_tolerance=math.inf, variants=variants) == ["mlp"]


@pytest.mark.slow
def test_what_a_decoder_attends_to_has_the_places_of_the_encoder():
    """Keys and values of cross-attention are of the encoder's tokens, on the left or the right."""
    config = T5Config(29, 16, 8, 20, num_layers=1, num_decoder_layers=1, num_heads=2)
    recipe = aj.LoReFT("**/cross_attention/{key,value}", 2, prefix_positions=2, suffix_positions=1)
    model = moved(
        aj.adapt(T5(config, rngs=nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1), example_inputs=IDS)
    )
    ids, written = (
        jax.random.randint(jax.random.key(i), (1, n), 1, 29) for i, n in ((4, 6), (5, 9))
    )
    alone = model(ids, None, written)
    for pad in ((3, 0), (0, 3)):
        padded, mask = (jnp.pad(x, ((0, 0), pad)) for x in (ids, jnp.ones((1, 6), int)))
        logits = model(padded, mask, written, jnp.ones((1, 9), int))
        np.testing.assert_allclose(logits, alone, atol=2e-4)
        _, _, cache = model.read_prompts(padded, mask, 9)
        hidden, _ = model.extend(written, jnp.ones((1, 9), int), cache)
        np.testing.assert_allclose(model.logits(hidden), alone, atol=2e-4)
