"""Mixtures of experts within `vmap`: in a bank, in trainings side by side, and by its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.testing.subjects import shaken
from adapters_jax.trace.mapping import vmap

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 6, 4)).astype(np.float32)
W = RNG.normal(size=(3, 2, 4, 5)).astype(np.float32)
SIZES = jnp.array([[3, 2], [1, 5], [0, 6]])  # the first map has a row of no group
IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


@pytest.mark.parametrize(
    ("of_x", "of_sizes", "of_weight"),
    [(2, 1, None), (2, None, None), (None, 1, None), (2, 1, 0), (None, None, 0)],
)
def test_each_map_has_the_product_and_the_gradients_that_it_has_alone(of_x, of_sizes, of_weight):
    def f(x, w, sizes):
        return jnp.sin(jax.lax.ragged_dot(x, w, sizes))

    def each(i):
        return X[i if of_x else 0], W[0 if of_weight is None else i], SIZES[i if of_sizes else 0]

    given = (
        X.transpose(1, 2, 0) if of_x else X[0],
        W[0] if of_weight is None else W,
        SIZES.T if of_sizes else SIZES[0],
    )
    axes = (of_x, of_weight, of_sizes)
    alone = jnp.stack([f(*each(i)) for i in range(3)])
    np.testing.assert_allclose(vmap(f, axes)(*given), alone, rtol=1e-6, atol=1e-6)
    for argument in (0, 1):
        slope = jax.grad(lambda *args: f(*args).sum(), argument)
        alone = jnp.stack([slope(*each(i)) for i in range(3)])
        np.testing.assert_allclose(vmap(slope, axes)(*given), alone, rtol=1e-5, atol=1e-6)


def test_weights_are_not_copied_for_each_map():
    def f(x, sizes):
        return jax.lax.ragged_dot(x, W[0], sizes)

    def slope(x, sizes):
        return jax.grad(lambda x: jnp.sin(f(x, sizes)).sum())(x)

    for function, products in ((f, 1), (slope, 2)):
        text = str(jax.make_jaxpr(vmap(function))(X, SIZES))
        assert text.count("= ragged_dot_general") == products
        assert "[3,2,4,5]" not in text


CONFIG = DecoderConfig(24, 8, 16, 2, 2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2)
RECIPES = {
    "attention": aj.LoRA("**/attention/{query,value}", 2),
    "experts": aj.LoRA("**/experts/*", 2),
    "router and outputs": aj.Recipe(aj.LoRA("**/router", 2), aj.Bottleneck("**/mlp", 3)),
}


@pytest.fixture(
    scope="module",
    params=[
        "experts",
        *(pytest.param(x, marks=pytest.mark.slow) for x in RECIPES if x != "experts"),
    ],
)
def adapted(request):
    """A decoder with experts, adapted by a recipe, and the values of two adapters of it."""
    base = Decoder(CONFIG, rngs=nnx.Rngs(0))
    model = aj.adapt(base, RECIPES[request.param], rngs=nnx.Rngs(0), example_inputs=(IDS,))
    adapters = nnx.state(model, aj.nnx.AdapterParam)
    return model, [shaken(adapters, seed) for seed in (1, 2)]


@pytest.mark.slow
def test_rows_of_a_bank_are_those_of_their_adapters_alone(adapted):
    model, adapters = adapted
    bank = aj.Bank(model, capacity=2)
    for name, values in zip("ab", adapters, strict=True):
        bank = bank.put(name, (aj.nnx.recipe_of(model), values))
    rows = nnx.jit(lambda m, ids, rows: m(ids, adapters=rows))(
        bank.model, IDS, bank.rows(["b", None, "a"])
    )
    graphdef, own, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    alone = [nnx.jit(nnx.merge(graphdef, x, rest))(IDS) for x in (adapters[1], own, adapters[0])]
    expected = jnp.stack([alone[i][i] for i in range(3)])
    assert jnp.abs(expected[2] - alone[1][2]).max() > 0.01
    np.testing.assert_allclose(rows, expected, atol=2e-5)


@pytest.mark.slow
def test_trainings_side_by_side_are_those_alone(adapted):
    model, adapters = adapted
    graphdef, _, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    states = [
        aj.TrainState.create(
            nnx.merge(graphdef, x, rest, copy=True), tx=optax.sgd(1.0), key=jax.random.key(0)
        )
        for x in adapters
    ]

    def loss(model, ids, key):
        return jnp.square(model(ids)).mean()

    step = aj.make_train_step(loss)
    together, _ = step(aj.stack_states(states), jnp.stack([IDS, IDS[:, ::-1]]))
    for each, state, ids in zip(
        aj.unstack_states(together), states, (IDS, IDS[:, ::-1]), strict=True
    ):
        before = jax.tree.leaves(jax.tree.map(np.asarray, state.adapters))
        alone, _ = step(state, ids)
        pairs = zip(jax.tree.leaves(each.adapters), jax.tree.leaves(alone.adapters), strict=True)
        for (got, expected), start in zip(pairs, before, strict=True):
            assert np.abs(expected - start).max() > 0
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6)
