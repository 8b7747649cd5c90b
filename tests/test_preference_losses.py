"""DPO, IPO, ORPO and KTO are their papers' formulas, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.errors import raises

from adapters_jax.errors import UserError
from adapters_jax.training.losses import dpo_loss, ipo_loss, kto_divergence, kto_loss, orpo_loss

RNG = np.random.default_rng(0)
SUMS = -RNG.uniform(0.5, 30.0, (4, 6))  # of policy and reference, chosen and rejected
MEANS = -RNG.uniform(0.01, 4.0, (2, 6))
GOOD = np.array([True, False, True, True, False, False])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dpo(beta, chosen, rejected, *reference):
    return -np.log(sigmoid(beta * ((chosen - reference[0]) - (rejected - reference[1]))))


def ipo(beta, chosen, rejected, *reference):
    return (np.log(np.exp(chosen - reference[0] - rejected + reference[1])) - 0.5 / beta) ** 2


def orpo(beta, chosen, rejected):
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (chosen, rejected)]
    return -chosen + beta * -np.log(sigmoid(np.log(odds[0] / odds[1])))


def kto(beta, policy, reference, divergence):
    point = beta * divergence
    reward = beta * (policy - reference)
    return np.where(GOOD, 1 - sigmoid(reward - point), 1 - sigmoid(point - reward))


CASES = {
    "dpo": (dpo_loss, dpo, SUMS),
    "ipo": (ipo_loss, ipo, SUMS),
    "orpo": (orpo_loss, orpo, MEANS),
    "kto": (lambda *x, beta: kto_loss(*x, GOOD, 1.7, beta=beta), kto, SUMS[:2]),
}


@pytest.mark.witness("dpo-0.7", "ipo-0.1", "orpo-0.7", "kto-0.1")
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name, beta):
    ours, formula, values = CASES[name]
    further = (1.7,) if name == "kto" else ()

    def exact(*values):
        return formula(beta, *values, *further)

    given = [jnp.asarray(x, jnp.float32) for x in values]
    np.testing.assert_allclose(ours(*given, beta=beta), exact(*values), rtol=2e-5)
    weights = np.arange(1.0, 7.0)
    grads = jax.grad(lambda *x: jnp.sum(weights * ours(*x, beta=beta)), range(len(given)))(*given)
    for i, grad in enumerate(grads):
        step = np.zeros_like(values)
        step[i] = 1e-5
        slope = (exact(*(values + step)) - exact(*(values - step))) / 2e-5
        np.testing.assert_allclose(grad, weights * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mean", [-30.0, -1e-3, -1e-6, 0.0])
def test_odds_of_likely_and_unlikely_completions_are_finite(mean):
    chosen, rejected = jnp.array([mean]), jnp.array([-1.0])
    loss, grad = jax.value_and_grad(lambda x: orpo_loss(x, rejected, beta=0.5)[0])(chosen)
    rest = -np.expm1(np.float64(np.float32(mean))) or np.finfo(np.float32).tiny
    ratio = mean - np.log(rest) - (-1.0 - np.log(-np.expm1(-1.0)))
    np.testing.assert_allclose(loss, -mean + 0.5 * np.log1p(np.exp(-ratio)), 1e-5, 1e-30)
    assert np.isfinite(grad).all()


def test_the_divergence_is_a_weighted_mean_above_0_without_gradient():
    policy, reference = jnp.array([1.0, -5.0, 3.0]), jnp.array([0.0, 1.0, 1.0])
    weights = jnp.array([2.0, 0.0, 1.0])
    assert float(kto_divergence(policy, reference, weights)) == pytest.approx((2 * 1 + 2) / 3)
    assert float(kto_divergence(policy, reference)) == 0.0
    assert not jax.grad(lambda x: kto_divergence(x, reference, weights))(policy).any()


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("name", CASES)
def test_beta_is_a_number_above_0(name, beta):
    ours, _, values = CASES[name]
    with raises(UserError, name, "beta", repr(beta)):
        ours(*values, beta=beta)


@pytest.mark.slow
def test_arrays_have_one_value_a_row():
    row, column = jnp.zeros(3), jnp.zeros((3, 1))
    for call in (
        lambda: dpo_loss(row, row, row, column),
        lambda: ipo_loss(row, column, row, row),
        lambda: orpo_loss(row, column),
        lambda: kto_loss(row, column, row > 0, 0.0),
        lambda: kto_divergence(row, column),
    ):
        with raises(UserError, "(3,)", "(3, 1)"):
            call()
    with raises(UserError, "(3, 1)"):
        orpo_loss(column, column)
