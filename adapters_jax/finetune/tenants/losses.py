"""The losses of tokens, by their log-probabilities; rows of one batch may have different ones.

Each is a sum over tokens, so that gradients of several calls add up. The formulas and the default
thresholds are those that Tinker documents, https://tinker-docs.thinkingmachines.ai/tinker/losses/;
where it states no default, the example's value (DRO's beta) or the paper's (GSPO's thresholds).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

_LOW, _HIGH = "clip_low_threshold", "clip_high_threshold"
_LARGE = 80.0  # its exp is beyond all sensible thresholds, and float32 holds it


class Loss(NamedTuple):
    """A loss: what it needs.

    Attributes:
        values: the names of the values that each token has.
        config: its settings with their defaults. Thresholds may also be values of tokens.
    """

    values: tuple[str, ...]
    config: dict[str, float]


_POLICY = ("logprobs", "advantages")
LOSSES = {
    "cross_entropy": Loss(("weights",), {}),
    "importance_sampling": Loss(_POLICY, {}),
    "ppo": Loss(_POLICY, {_LOW: 0.8, _HIGH: 1.2}),
    "cispo": Loss(_POLICY, {_LOW: 0.0, _HIGH: 4.0}),
    "dro": Loss(_POLICY, {"beta": 0.05}),
    "gspo": Loss((*_POLICY, "sequence_ratio_mask"), {_LOW: 1 - 3e-4, _HIGH: 1 + 4e-4}),
}
KINDS = {name: i for i, name in enumerate(LOSSES)}
THRESHOLDS = (_LOW, _HIGH)


class Given(NamedTuple):
    """What the losses of a batch read, whichever they are.

    Attributes:
        kind: each row's loss, a number of `KINDS`.
        counts: which tokens are there, and not padding.
        weights: the weights, or the advantages.
        reference: the log-probabilities under the policy that sampled the tokens.
        sequence: GSPO's `sequence_ratio_mask`.
        beta: each row's beta of DRO.
    """

    kind: Int[Array, " rows"]
    counts: Bool[Array, "rows length"]
    weights: Float[Array, "rows length"]
    reference: Float[Array, "rows length"]
    low: Float[Array, "rows length"]
    high: Float[Array, "rows length"]
    sequence: Float[Array, "rows length"]
    beta: Float[Array, " rows"]


def token_losses(
    logprobs: Float[Array, "rows length"], given: Given
) -> Float[Array, "rows length"]:
    """The loss of each token; 0 for padding.

    With the log-probability l, that of the sampling policy q, the ratio r = exp(l - q) and the
    weight or advantage a, it is the negative of:

    - cross_entropy: l a
    - importance_sampling: r a
    - ppo (Schulman et al. 2017, arXiv:1707.06347): min(r a, clip(r) a)
    - cispo (MiniMax 2025, arXiv:2506.13585): l a clip(r), where clip(r) is a constant
    - dro (Richemond et al. 2024, arXiv:2405.19107): l a - beta / 2 (l - q)^2
    - gspo (Zheng et al. 2025, arXiv:2507.18071, GSPO-token): as ppo, with the geometric mean of r
      over the tokens that `sequence` marks, which has the gradient of the token's own l
    """
    kind, a, q = given.kind[:, None], given.weights, given.reference
    own = jnp.where(given.counts, logprobs, 0.0)
    fixed, change = stop_gradient(own), own - q
    marked = given.counts & (given.sequence != 0)
    total = jnp.where(marked, fixed - q, 0.0).sum(-1, keepdims=True)
    mean = total / jnp.maximum(marked.sum(-1, keepdims=True), 1)
    change = jnp.where(kind == KINDS["gspo"], mean + own - fixed, change)
    # A row of another loss may have no q at all, and exp of what is not selected could overflow,
    # whose gradient would be 0 times infinity.
    reads = jnp.array([name in ("importance_sampling", "ppo", "gspo") for name in LOSSES])
    power = jnp.where(reads[kind], change, 0.0)
    # Nor may it overflow where a large ratio is clipped or counts nothing: the slope is 0 there.
    flat = (a == 0) | ((a > 0) & (kind != KINDS["importance_sampling"]))
    ratio = jnp.exp(jnp.where(flat, jnp.minimum(power, _LARGE), power))
    clipped = jnp.minimum(ratio * a, jnp.clip(ratio, given.low, given.high) * a)
    coefficient = jnp.clip(jnp.exp(stop_gradient(change)), given.low, given.high)
    objectives = {
        "cross_entropy": own * a,
        "importance_sampling": ratio * a,
        "ppo": clipped,
        "cispo": coefficient * own * a,
        "dro": own * a - 0.5 * given.beta[:, None] * jnp.square(own - q),
        "gspo": clipped,
    }
    which = jnp.broadcast_to(kind, a.shape)
    objective = jax.lax.select_n(which, *(objectives[name] for name in LOSSES))
    return jnp.where(given.counts, -objective, 0.0)
