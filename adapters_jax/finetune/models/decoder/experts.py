"""Experts: a layer has many feed-forwards, and a router chooses some of them for each token.

Reference: Shazeer et al., Outrageously large neural networks (2017),
https://arxiv.org/abs/1701.06538; Jiang et al., Mixtral of experts (2024),
https://arxiv.org/abs/2401.04088
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, gated

Rows = Float[Array, "rows d"]


class DecoderExperts(nnx.Module):
    """The weights of all experts, each an array with the experts on its first axis."""

    def __init__(self, config: Any, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        inner = config.moe_intermediate_size or config.intermediate_size
        init = nnx.initializers.normal(config.initializer_range)

        def stack(*shape: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (config.num_experts, *shape), param_dtype))

        self.gate = stack(width, inner)
        self.up = stack(width, inner)
        self.output = stack(inner, width)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dtype = dtype

    def __call__(self, rows: Rows, sizes: Int[Array, " experts"]) -> Rows:
        """Transforms rows: the first `sizes[0]` by the first expert, the next by the second, ..."""

        def product(x: Rows, weight: Any) -> Rows:
            x, kernel = promote_dtype((x, weight[...]), dtype=self.dtype)
            return jax.lax.ragged_dot(x, kernel, sizes)

        inner = gated(self.activation, product(rows, self.gate), product(rows, self.up))
        return product(inner, self.output)


class DecoderMixture(nnx.Module):
    """The feed-forward of a layer with experts: the weighted sum of those that a token takes."""

    def __init__(self, parts: Any):
        config = parts.config
        self.router = parts.linear(config.hidden_size, config.num_experts)
        self.experts = DecoderExperts(config, **parts.rest)
        self.taken = config.num_experts_per_tok
        self.normalized = config.norm_topk_prob

    def __call__(self, x: Float[Array, "batch length d"]) -> Float[Array, "batch length d"]:
        """Sends each position to its experts; none is dropped, however uneven they are taken."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), self.taken)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.ravel())  # the rows of one expert after those of the one before
        sizes = jnp.bincount(chosen.ravel(), length=logits.shape[-1])
        rows = self.experts(tokens[order // self.taken], sizes)
        back = rows[jnp.argsort(order)].reshape(*chosen.shape, -1)
        return (back * weights[..., None].astype(back.dtype)).sum(1).reshape(x.shape)
