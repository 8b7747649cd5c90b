"""Losses of preferences: DPO, IPO, ORPO and KTO, from the log-probabilities of completions.

A log-probability is that of a whole completion after its prompt, as `sequence_log_probs` gives it.
DPO, IPO and KTO compare it with that of a reference, which under adapters is the same base with
the adapters left out: no second model is held, and as the base does not train, its
log-probabilities are computed once for all steps. The implicit reward of a completion is
`beta * (log_probs - reference)`.

Every function returns the loss of each row; the mean is the loss of a batch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adapters_jax.errors import UserError, check_number

Values = Float[Array, " batch"]


def dpo_loss(
    chosen: Values,
    rejected: Values,
    reference_chosen: Values,
    reference_rejected: Values,
    *,
    beta: float = 0.1,
) -> Values:
    """Direct preference optimisation: `-log sigmoid` of the margin between the implicit rewards.

    Args:
        chosen: the log-probabilities of the preferred completions.
        rejected: those of the others.
        reference_chosen: the log-probabilities of the preferred completions by the reference.
        reference_rejected: those of the others by the reference.
        beta: the strength of the penalty for leaving the reference; 0.1 as in TRL.

    Returns:
        The loss of each pair.

    Raises:
        UserError: the shapes differ, or `beta` is not a finite number above 0.

    Example:
        A step of DPO on your own model. The log-probabilities of the reference are those of
        `base.apply`, on the base's own parameters:

        >>> import adapters_jax as aj, optax
        >>> from flax import linen as nn
        >>> base = nn.Sequential([nn.Embed(5, 8), nn.Dense(5)])
        >>> tokens = jnp.array([[1, 2, 3], [1, 2, 4]])  # a prompt of one token, chosen and rejected
        >>> def log_probs(run, tokens):
        ...     words = jax.nn.log_softmax(run(tokens[:, :-1]))
        ...     return jnp.take_along_axis(words, tokens[:, 1:, None], -1).sum((1, 2))
        >>> params = base.init(jax.random.key(0), tokens)["params"]
        >>> reference = log_probs(lambda x: base.apply({"params": params}, x), tokens)
        >>> model = aj.adapt(base, aj.LoRA("layers_1", rank=2))
        >>> adapted = aj.init_adapters(model, params, jax.random.key(1), tokens)
        >>> def loss_fn(params, batch, key):
        ...     tokens, reference = batch
        ...     found = log_probs(lambda x: model.apply({"params": params}, x), tokens)
        ...     return dpo_loss(*found[:, None], *reference[:, None]).mean()
        >>> state = aj.TrainState.create(
        ...     model, adapted, tx=optax.adam(0.1), key=jax.random.key(2))
        >>> step, losses = aj.make_train_step(loss_fn), []
        >>> for _ in range(3):
        ...     state, metrics = step(state, (tokens, reference))
        ...     losses.append(float(metrics["loss"]))
        >>> round(losses[0], 4), losses[2] < losses[1] < losses[0]  # log 2 at the start
        (0.6931, True)

    Reference: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7.
    """
    _check("dpo_loss", beta, chosen, rejected, reference_chosen, reference_rejected)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    # log(sigmoid(x)) would be log(0) for a margin below about -88 in float32.
    return -jax.nn.log_sigmoid(beta * margin)


def ipo_loss(
    chosen: Values,
    rejected: Values,
    reference_chosen: Values,
    reference_rejected: Values,
    *,
    beta: float = 0.1,
) -> Values:
    """Identity preference optimisation: the squared distance of the margin to `1 / (2 beta)`.

    Args:
        chosen: the log-probabilities of the preferred completions: sums over tokens as the paper
            writes them, or means over tokens, which do not grow with the length. TRL takes means,
            as the paper's authors confirmed to it, and so does `adapters-jax finetune`.
        rejected: those of the others.
        reference_chosen, reference_rejected: as for `dpo_loss`, of the same kind.
        beta: the paper's tau; 0.1 as in TRL.

    Returns:
        The loss of each pair.

    Raises:
        UserError: as for `dpo_loss`.

    Example:
        >>> pair = jnp.array([-1.0]), jnp.array([-2.0])
        >>> ipo_loss(*pair, *pair, beta=0.5).tolist()  # no margin yet, and 1 is wanted
        [1.0]

    Reference: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human
    Preferences", arXiv 2310.12036, equation 17.
    """
    _check("ipo_loss", beta, chosen, rejected, reference_chosen, reference_rejected)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return jnp.square(margin - 1 / (2 * beta))


def orpo_loss(chosen: Values, rejected: Values, *, beta: float = 0.1) -> Values:
    """Odds ratio preference optimisation: learns the preferred completion, without a reference.

    It is the negative log-probability of the preferred completion, and `beta` times `-log sigmoid`
    of the logarithm of the ratio of both odds, `p / (1 - p)`.

    Args:
        chosen: the log-probabilities of the preferred completions, as means over their tokens.
        rejected: those of the others.
        beta: the paper's lambda; 0.1 as in the paper and in TRL.

    Returns:
        The loss of each pair.

    Raises:
        UserError: as for `dpo_loss`.

    Example:
        >>> half, third = jnp.log(jnp.array([1 / 2])), jnp.log(jnp.array([1 / 3]))
        >>> odds = orpo_loss(half, third, beta=1.0) + half  # odds of 1 and of 1/2
        >>> round(float(jnp.exp(-odds[0])), 4)  # sigmoid(log 2)
        0.6667

    Reference: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model",
    arXiv 2403.07691, equations 6 and 7.
    """
    _check("orpo_loss", beta, chosen, rejected)
    ratio = (chosen - _log_rest(chosen)) - (rejected - _log_rest(rejected))
    return -chosen - beta * jax.nn.log_sigmoid(ratio)


def kto_divergence(
    log_probs: Values, reference: Values, weights: Values | None = None
) -> Float[Array, ""]:
    """KTO's reference point: the divergence from the reference, estimated from mismatched rows.

    Args:
        log_probs: the log-probabilities of completions that belong to other prompts.
        reference: those by the reference.
        weights: of each row; None weighs all the same.

    Returns:
        The mean of `log_probs - reference`, at least 0; nothing is differentiated through it.

    Raises:
        UserError: the shapes differ.

    Example:
        >>> zeros = jnp.zeros(2)
        >>> [float(kto_divergence(jnp.array(x), zeros)) for x in ([1.0, 2.0], [1.0, -2.0])]
        [1.5, 0.0]

    Reference: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv
    2402.01306, section 4.1.
    """
    weights = jnp.ones_like(log_probs) if weights is None else weights
    _check("kto_divergence", 1.0, log_probs, reference, weights)
    # Without rows the mean is 0, not NaN.
    mean = jnp.sum(weights * (log_probs - reference)) / jnp.maximum(weights.sum(), 1e-12)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
    log_probs: Values,
    reference: Values,
    desirable: Bool[Array, " batch"],
    divergence: Float[Array, ""],
    *,
    beta: float = 0.1,
) -> Values:
    """Kahneman-Tversky optimisation: each completion is desirable or not, without a pair.

    A desirable completion loses `1 - sigmoid(reward - beta * divergence)`, any other one
    `1 - sigmoid(beta * divergence - reward)`.

    Args:
        log_probs: the log-probabilities of the completions.
        reference: those by the reference.
        desirable: whether each of them is desirable.
        divergence: the reference point of the batch, of `kto_divergence`.
        beta: the paper's beta, which scales rewards; 0.1 as in the paper and in TRL. Both kinds of
            rows weigh the same, as by default in both: lambda_D = lambda_U = 1.

    Returns:
        The loss of each row.

    Raises:
        UserError: as for `dpo_loss`.

    Example:
        >>> zeros = jnp.zeros(2)
        >>> kto_loss(zeros, zeros, jnp.array([True, False]), jnp.array(0.0)).tolist()
        [0.5, 0.5]

    Reference: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv
    2402.01306, equation 8.
    """
    _check("kto_loss", beta, log_probs, reference, desirable)
    gain = beta * (log_probs - reference - divergence)
    return jax.nn.sigmoid(jnp.where(desirable, -gain, gain))  # 1 - sigmoid(x) is sigmoid(-x)


def _log_rest(log_probs: Values) -> Values:
    """`log(1 - p)` of `log p`, exact for p near 0 and near 1."""
    # 1 - p loses its digits for p near 0, and log(1 - p) for p near 1: log1p and expm1 each keep
    # them on one side of p = 1/2, which is log p = -0.6931.
    near_one = log_probs > -0.6931
    # Each branch sees harmless values where the other one is taken, so that no gradient is NaN.
    small = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, log_probs)))
    # log p may round to 0, for which log(1 - p) is not finite.
    tiny = jnp.finfo(log_probs.dtype).tiny
    large = jnp.log(-jnp.expm1(jnp.minimum(jnp.where(near_one, log_probs, -0.5), -tiny)))
    return jnp.where(near_one, large, small)


def _check(owner: str, beta: Any, *values: Array) -> None:
    """Raises UserError unless beta is positive and the arrays have one shape."""
    check_number(owner, "beta", beta)
    shapes = [jnp.shape(x) for x in values]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise UserError(
            f"{owner}: arrays of the shapes {', '.join(map(str, shapes))}, expected one value for "
            "each row in all of them, (batch,)"
        )
