"""What to adapt in a model that nobody described: found in how its data flows.

- `trace`: a linen or NNX model on shapes, with its parameters and modules; `graph`: its operations.
- `flow`: where weights meet activations, and what every value is made of; `softmax`: attentions;
  `norms`: the parameters of norms; `ranges`: the parts of fused layers.
- `roles`: query, key, value, feed-forward, head as paths; `patterns`: paths as short patterns.
- `suggestion`: the targets of each preset.
"""

from adapters_jax.suggesting.suggestion import Suggestion, suggest

__all__ = ["Suggestion", "suggest"]
