"""Cross-entropy over chunks has the values, gradients and FLOPs of that with all logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import UserError
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.training.losses import cross_entropy, sequence_log_probs
from adapters_jax.training.losses.chunked import token_log_probs

ROWS, LENGTH, D, WORDS = 3, 11, 6, 40
CAP = 4.0
RNG = np.random.default_rng(0)
HIDDEN, TABLE = RNG.normal(size=(ROWS, LENGTH, D)), RNG.normal(size=(D, WORDS))
LABELS = RNG.integers(0, WORDS, (ROWS, LENGTH))
LABELS[0, :4], LABELS[2, -1] = -1, -1
WEIGHTS = RNG.uniform(0.5, 2.0, LABELS.shape)


def by_formula(weights):
    """The loss of soft-capped logits, its gradients by hidden states and table, and each token's
    loss, in float64."""
    counted = LABELS >= 0
    weights = np.where(counted, 1 / counted.sum() if weights is None else weights, 0.0)
    bounded = np.tanh(HIDDEN @ TABLE / CAP)
    likely = np.exp(CAP * bounded)
    likely /= likely.sum(-1, keepdims=True)
    right = np.eye(WORDS)[np.maximum(LABELS, 0)]
    tokens = np.where(counted, -np.log((likely * right).sum(-1)), 0.0)
    slope = weights[..., None] * (likely - right) * (1 - bounded**2)
    by_table = np.einsum("btd,btv->dv", HIDDEN, slope)
    return (weights * tokens).sum(), slope @ TABLE.T, by_table, tokens


def capped(table):
    return lambda hidden: CAP * jnp.tanh(hidden @ table / CAP)


def tiny_decoder(**settings):
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "initializer_range": 0.5}
    config = DecoderConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, **settings)
    return Decoder(config, rngs=nnx.Rngs(0))


def arrays(dtype=jnp.float32):
    return jnp.asarray(HIDDEN, dtype), jnp.asarray(TABLE, dtype), jnp.asarray(LABELS)


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), one, other)


@pytest.mark.witness(
    "False-None-None",
    "False-4-weights1",
    "True-1-weights1",
    "True-5-None",
    "True-None-weights1",
    "False-11-None",
    "True-100-weights1",
)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("chunk", [None, 1, 4, 5, LENGTH, 100])
@pytest.mark.parametrize("jit", [False, True])
def test_value_and_gradients_are_those_of_the_formula(weights, chunk, jit):
    def loss(hidden, table, labels):
        return cross_entropy(hidden, capped(table), labels, weights, chunk=chunk)

    found, grads = (jax.jit if jit else lambda f: f)(jax.value_and_grad(loss, (0, 1)))(*arrays())
    value, *expected, _ = by_formula(weights)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(grads[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(grads[1], expected[1], atol=1e-5)
    forward = loss(*arrays())
    np.testing.assert_allclose(forward, value, rtol=1e-6)


def test_gradients_by_weights_and_of_a_scaled_loss():
    hidden, table, labels = arrays()

    def loss(weights, hidden):
        return -3.0 * cross_entropy(hidden, capped(table), labels, weights, chunk=4)

    by_weights, by_hidden = jax.grad(loss, (0, 1))(jnp.asarray(WEIGHTS, jnp.float32), hidden)
    _, expected, _, tokens = by_formula(WEIGHTS)
    np.testing.assert_allclose(by_weights, -3 * tokens, rtol=1e-5)
    np.testing.assert_allclose(by_hidden, -3 * expected, atol=1e-5)


@pytest.mark.slow
def test_each_row_by_vmap():
    hidden, table, labels = arrays()

    def losses(hidden, table):
        def row(hidden, labels):
            weights = jnp.ones((1, LENGTH))
            return cross_entropy(hidden[None], capped(table), labels[None], weights, chunk=4)

        return jax.vmap(row)(hidden, labels)

    *_, tokens = by_formula(None)
    np.testing.assert_allclose(losses(hidden, table), tokens.sum(1), rtol=1e-6)
    factors = jnp.array([1.0, -2.0, 0.5])
    grads = jax.grad(lambda *xs: losses(*xs) @ factors, (0, 1))(hidden, table)
    _, *expected, _ = by_formula(np.broadcast_to(np.asarray(factors)[:, None], LABELS.shape))
    np.testing.assert_allclose(grads[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(grads[1], expected[1], atol=1e-5)


def test_no_label_that_counts_is_no_loss():
    hidden, table, labels = arrays()
    loss = lambda hidden: cross_entropy(hidden, capped(table), jnp.full_like(labels, -100), chunk=4)  # noqa: E731
    value, grad = jax.value_and_grad(loss)(hidden)
    assert value == 0.0
    assert not grad.any()


def test_float16_gradients_survive_until_the_loss_scale():
    """A mean over many tokens has gradients below float16's smallest number."""
    hidden, table, labels = arrays(jnp.float16)

    def loss(hidden, chunk):
        weights = jnp.full(labels.shape, 2.0**-24, jnp.float32)
        return 2.0**24 * cross_entropy(hidden, capped(table), labels, weights, chunk=chunk)

    grad = jax.grad(loss)(hidden, 4)
    _, expected, *_ = by_formula(np.ones(LABELS.shape))
    assert grad.dtype == jnp.float16
    np.testing.assert_allclose(grad, expected, atol=1e-2 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.witness("**/query-True")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["**/query", "{head,embeddings}", "**"])
def test_heads_of_decoders_with_lora(tied, target):
    base = tiny_decoder(tie_word_embeddings=tied, final_logit_softcapping=3.0)
    if target.startswith("{"):
        target = "embeddings" if tied else "head"
    model = aj.adapt(base, aj.LoRA(target, 2), rngs=nnx.Rngs(0))
    graphdef, adapters, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    adapters = jax.tree.map(noise, adapters)
    ids = jax.random.randint(jax.random.key(0), (2, 9), 0, base.config.vocab_size)

    def loss(adapters, chunk):
        model = nnx.merge(graphdef, adapters, rest)
        return cross_entropy(model.hidden(ids[:, :-1]), model.logits, ids[:, 1:], chunk=chunk)

    whole, chunked = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(adapters, chunk) for chunk in (8, 3)
    )
    close(whole, chunked)
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole[1])) > 1e-3


@pytest.mark.slow
def test_a_linen_head_in_a_step():
    class Model(nn.Module):
        def setup(self):
            self.body, self.head = nn.Dense(D), nn.Dense(WORDS)

        def __call__(self, x):
            return self.head(self.body(x))

        def logits(self, x):
            return self.head(x)

        def hidden(self, x):
            return self.body(x)

    hidden, _, labels = arrays()
    base = Model()
    params = base.init(jax.random.key(0), hidden)["params"]
    model = aj.adapt(base, aj.LoRA("head", 2))
    params = aj.init_adapters(model, params, jax.random.key(1), hidden)
    noise = lambda x: x + 0.1  # noqa: E731

    def loss(params, chunk):
        variables = {"params": params}
        x = model.apply(variables, hidden, method="hidden")
        head = lambda x: model.apply(variables, x, method="logits")  # noqa: E731
        return cross_entropy(x, head, labels, chunk=chunk)

    params = jax.tree.map(noise, params)
    one, three = (jax.value_and_grad(loss)(params, chunk) for chunk in (LENGTH, 4))
    close(one, three)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("trained", [False, True])
def test_the_program_holds_one_chunk_and_costs_no_more(trained):
    """The body of the loop counts once in XLA's figures, so it is compared with one chunk."""
    rows, length, d, words, chunk = 2, 64, 128, 1024, 8
    hidden, table = jnp.ones((rows, length, d)), jnp.ones((d, words))
    labels = jnp.zeros((rows, length), int)

    def compiled(length, chunk):
        def loss(hidden, table):
            head = lambda x: x @ table  # noqa: E731
            return cross_entropy(hidden, head, labels[:, :length], chunk=chunk)

        by = (0, 1) if trained else 0
        return jax.jit(jax.value_and_grad(loss, by)).lower(hidden[:, :length], table).compile()

    chunked, one = compiled(length, chunk), compiled(chunk, chunk)
    products = (3 if trained else 2) * 2 * rows * chunk * d * words
    assert one.cost_analysis()["flops"] == pytest.approx(products, rel=0.06)
    assert chunked.cost_analysis()["flops"] == pytest.approx(products, rel=0.06)
    text = chunked.as_text()
    sizes = [np.prod([int(n) for n in m.split(",")]) for m in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) == d * words  # the table; all logits are as many
    logits = [m for m in re.findall(r"f32\[([\d,]+)\]", text) if m.endswith(f",{words}")]
    assert {m for m in logits if not m.startswith(f"{d},")} <= {
        f"{rows},{chunk},{words}",
        f"{rows * chunk},{words}",
    }


@pytest.mark.slow
def test_dropout_in_the_head_is_refused_unless_all_logits_are_held():
    model = aj.adapt(
        tiny_decoder(tie_word_embeddings=False), aj.LoRA("head", 2, dropout=0.5), rngs=nnx.Rngs(0)
    )
    hidden = jnp.ones((2, 6, model.config.hidden_size))
    labels = jnp.zeros((2, 6), int)
    with raises(aj.UserError, "dropout", "chunk=6"):
        cross_entropy(hidden, model.logits, labels, chunk=2)
    assert np.isfinite(cross_entropy(hidden, model.logits, labels, chunk=6))
    model.eval()
    np.testing.assert_allclose(
        cross_entropy(hidden, model.logits, labels, chunk=2),
        cross_entropy(hidden, model.logits, labels, chunk=6),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"hidden": jnp.ones((3, 4))}, ["hidden", "(batch, length, d)", "(3, 4)"]),
        ({"hidden": jnp.ones((3, LENGTH, D), int)}, ["hidden", "int32"]),
        ({"labels": jnp.zeros((3, 4), int)}, ["labels", "(3, 11)", "(3, 4)"]),
        ({"labels": jnp.zeros((3, LENGTH))}, ["labels", "float32"]),
        ({"weights": jnp.ones((3,))}, ["weights", "(3, 11)", "(3,)"]),
        ({"chunk": 0}, ["chunk", "0"]),
        ({"chunk": 2.5}, ["chunk", "2.5"]),
    ],
)
def test_bad_input(given, named):
    hidden, table, labels = arrays()
    usual = {"hidden": hidden, "head": capped(table), "labels": labels}
    with raises(aj.UserError, *named):
        cross_entropy(**usual | given)


# Of whole sequences


@pytest.mark.witness("None", "100")
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_log_probabilities_of_sequences_are_those_of_the_formula(chunk):
    """Each with a factor of its own in the loss, as losses of preferences have."""
    factors = np.array([2.0, -0.5, 1.0])
    weights = np.broadcast_to(-factors[:, None], LABELS.shape)
    *_, tokens = by_formula(None)
    value, *expected, _ = by_formula(weights)
    found = sequence_log_probs(HIDDEN, capped(TABLE), LABELS, chunk=chunk)
    np.testing.assert_allclose(found, -tokens.sum(1), rtol=1e-6)

    def loss(hidden, table, labels):
        return factors @ sequence_log_probs(hidden, capped(table), labels, chunk=chunk)

    found, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays())
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(grads[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(grads[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("chunk", [4, LENGTH])
def test_log_probabilities_of_tokens_are_those_of_the_formula(chunk):
    """Each with a factor of its own in the loss, as losses of reinforcement learning have."""
    value, *expected, tokens = by_formula(WEIGHTS)
    found = token_log_probs(*arrays()[:1], capped(jnp.asarray(TABLE)), jnp.asarray(LABELS))
    np.testing.assert_allclose(found, -tokens, atol=1e-5)

    def loss(hidden, table, labels):
        return -(WEIGHTS * token_log_probs(hidden, capped(table), labels, chunk=chunk)).sum()

    found, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays())
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(grads[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(grads[1], expected[1], atol=1e-5)


def test_log_probabilities_hold_few_logits():
    hidden, labels = jnp.zeros((4, 64, 8)), jnp.zeros((4, 64), int)

    def loss(hidden, table):
        return sequence_log_probs(hidden, lambda x: x @ table, labels, chunk=8).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(hidden, jnp.zeros((8, 1000))))
    sizes = [np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert 4 * 8 * 1000 in sizes and max(sizes) == 4 * 8 * 1000


def test_sequences_that_do_not_fit_their_labels_are_errors():
    with raises(UserError, "labels", "(2, 3)"):
        sequence_log_probs(jnp.zeros((2, 4, 1)), lambda x: x, jnp.zeros((2, 3), int))
    with raises(UserError, "sequence_log_probs", "chunk=0"):
        sequence_log_probs(jnp.zeros((2, 3, 1)), lambda x: x, jnp.zeros((2, 3), int), chunk=0)
