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

from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, gated, normalize

Rows = Float[Array, "rows d"]


class DecoderExperts(nnx.Module):
    """The weights of all experts, each an array with the experts on its first axis."""

    def __init__(self, config: Any, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        inner = config.moe_intermediate_size or config.intermediate_size
        init = nnx.initializers.normal(config.initializer_range)

        def stack(*shape: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (config.num_experts, *shape), param_dtype))

        self.gate_at, self.biased = config.expert_gate, config.expert_bias
        apart = {"gate": inner, "up": inner}
        first = apart if self.gate_at == "apart" else {"gate_up": 2 * inner}
        for name, outputs in first.items():
            setattr(self, name, stack(width, outputs))
        self.output = stack(inner, width)
        for name, outputs in {**first, "output": width}.items():
            if self.biased:
                bias = jnp.zeros((config.num_experts, outputs), param_dtype)
                setattr(self, f"{name}_bias", nnx.Param(bias))
        self.limit = config.expert_limit
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dtype = dtype

    def __call__(
        self, rows: Rows, sizes: Int[Array, " experts"], experts: Int[Array, " rows"]
    ) -> Rows:
        """Transforms rows: the first `sizes[0]` by the first expert, the next by the second, ...

        Args:
            sizes: their number for each expert.
            experts: the expert of each.
        """

        def product(x: Rows, name: str) -> Rows:
            weight = getattr(self, name)
            x, kernel = promote_dtype((x, weight[...]), dtype=self.dtype)
            y = jax.lax.ragged_dot(x, kernel, sizes)
            if not self.biased:
                return y
            bias = getattr(self, f"{name}_bias")[...]
            mine = experts[:, None] == jnp.arange(len(bias))
            return y + jnp.where(mine[..., None], bias, 0).sum(1).astype(y.dtype)

        if self.gate_at == "apart":
            gate, up = product(rows, "gate"), product(rows, "up")
        else:
            both = product(rows, "gate_up")
            interleaved = self.gate_at == "interleaved"
            gate, up = (both[:, ::2], both[:, 1::2]) if interleaved else jnp.split(both, 2, axis=-1)
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit) + 1
        return product(gated(self.activation, gate, up), "output")


class DecoderMixture(nnx.Module):
    """The feed-forward of a layer with experts: the weighted sum of those that a token takes."""

    def __init__(self, parts: Any, shared: nnx.Module | None = None):
        config = parts.config
        self.router = parts.linear(config.hidden_size, config.num_experts, config.router_bias)
        self.scores, self.normalized = config.router_scores, config.norm_topk_prob
        self.factor, self.weighs_inputs = config.router_factor, config.expert_reads_weighted
        self.groups, self.groups_taken = config.router_groups, config.router_groups_taken
        if config.router_correction:
            self.router.dtype = jnp.float32  # its checkpoints compute in it, whatever their dtype
            self.correction = nnx.Param(jnp.zeros(config.num_experts, parts.rest["param_dtype"]))
        if config.router_scale:
            dtype = parts.rest["param_dtype"]
            self.input_scale = nnx.Param(jnp.ones(config.hidden_size, dtype))
            self.expert_scale = nnx.Param(jnp.ones(config.num_experts, dtype))
        self.epsilon = config.rms_norm_eps
        self.experts = DecoderExperts(config, **parts.rest)
        self.taken = config.num_experts_per_tok
        self.shared = nnx.data(shared)  # the expert that all tokens take
        if shared is not None and config.shared_expert_gate:
            self.shared_gate = parts.linear(config.hidden_size, 1)

    def __call__(
        self,
        x: Float[Array, "batch length d"],
        routed: Float[Array, "batch length d"] | None = None,
    ) -> Float[Array, "batch length d"]:
        """Sends each position to its experts; none is dropped, however uneven they are taken.

        Args:
            x: what the experts read.
            routed: what the router reads; by default the same.
        """
        tokens = x.reshape(-1, x.shape[-1])
        read = tokens if routed is None else routed.reshape(tokens.shape)
        if hasattr(self, "input_scale"):
            scale = self.input_scale[...] * x.shape[-1] ** -0.5
            read = normalize(read, scale, self.epsilon, False).astype(read.dtype)
        weights, chosen = self._route(self.router(read).astype(jnp.float32))
        taken = chosen.ravel()
        order = jnp.argsort(taken)  # the rows of one expert after those of the one before
        sizes = jnp.bincount(taken, length=self.router.out_features)
        rows = tokens[order // self.taken]
        if self.weighs_inputs:
            rows = rows * weights.ravel()[order, None].astype(rows.dtype)
            weights = jnp.ones_like(weights)
        rows = self.experts(rows, sizes, taken[order])
        back = rows[jnp.argsort(order)].reshape(*chosen.shape, -1)
        y = (back * weights[..., None].astype(back.dtype)).sum(1).reshape(x.shape)
        if self.shared is None:
            return y
        always = self.shared(x)
        if hasattr(self, "shared_gate"):
            always = always * jax.nn.sigmoid(self.shared_gate(x))
        return y + always

    def _route(
        self, logits: Float[Array, "rows experts"]
    ) -> tuple[Float[Array, "rows taken"], Int[Array, "rows taken"]]:
        """The weights of the experts that each row takes, and their numbers."""
        scores = (jax.nn.softmax if self.scores == "softmax" else jax.nn.sigmoid)(logits)
        wanted = logits
        if hasattr(self, "correction"):
            wanted = scores + self.correction[...]
        if self.groups > 1:
            wanted = self._in_best_groups(wanted)
        chosen = jax.lax.top_k(wanted, self.taken)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdims=True)
        if hasattr(self, "expert_scale"):
            weights = weights * self.expert_scale[...][chosen]
        return weights if self.factor == 1.0 else weights * self.factor, chosen

    def _in_best_groups(self, wanted: Float[Array, "rows experts"]) -> Array:
        """Leaves the groups of experts whose best two are wanted most."""
        each = wanted.reshape(len(wanted), self.groups, -1)
        of_group = jax.lax.top_k(each, 2)[0].sum(-1)
        best = jax.lax.top_k(of_group, self.groups_taken)[1]
        is_best = jax.nn.one_hot(best, self.groups, dtype=bool).any(1)
        return jnp.where(is_best[..., None], each, -jnp.inf).reshape(wanted.shape)
