"""Losses of decoders.

- `chunked`: the cross-entropy and the log-probabilities of tokens, without holding all logits.
- `preferences`: DPO, IPO, ORPO and KTO, from log-probabilities.
"""

from adapters_jax.training.losses.chunked import TOKENS, cross_entropy, sequence_log_probs
from adapters_jax.training.losses.preferences import (
    dpo_loss,
    ipo_loss,
    kto_divergence,
    kto_loss,
    orpo_loss,
)

__all__ = [
    "TOKENS",
    "cross_entropy",
    "dpo_loss",
    "ipo_loss",
    "kto_divergence",
    "kto_loss",
    "orpo_loss",
    "sequence_log_probs",
]
