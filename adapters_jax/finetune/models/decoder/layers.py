"""The layers of a decoder: attention, feed-forward, norms and the block that they make."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from adapters_jax.finetune.models.decoder.config import DecoderConfig
from adapters_jax.finetune.models.decoder.experts import DecoderExperts, DecoderMixture
from adapters_jax.finetune.models.parts.cache import LayerCache
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, gated, normalize, split_heads
from adapters_jax.finetune.models.parts.rotary import Rotation, rotate
from adapters_jax.trace.masks import Mask
from adapters_jax.trace.registry import register_attention
from adapters_jax.weights.meshes import split_rows

Hidden = Float[Array, "batch length d"]
Seen = Mask | Bool[Array, "#batch 1 length keys"]
Linear = Callable[..., nnx.Linear]


class RMSNorm(nnx.RMSNorm):
    """RMS normalisation over the last axis, as in flax, with the derivative of `normalize`.

    The factor of each row is `offset + scale`.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        offset: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        init = nnx.initializers.constant(1.0 - offset)
        super().__init__(features, epsilon=epsilon, scale_init=init, rngs=rngs, **types)
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:  # type: ignore[override]
        """Divides each row of `x` by its root mean square and scales it; takes no mask."""
        scale: Any = self.scale
        x, scale = self.promote_dtype((x, scale[...]), dtype=self.dtype)
        if self.offset:  # in float32, in which 1 + scale has all digits of the scale
            scale = self.offset + scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
        return normalize(x, scale, self.epsilon, False).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the last axis, as in flax, with the derivative of `normalize`."""

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:  # type: ignore[override]
        """Normalises, scales and shifts each row of `x`; takes no mask."""
        scale: Any = self.scale
        bias: Any = self.bias
        x, scale, bias = self.promote_dtype((x, scale[...], bias[...]), dtype=self.dtype)
        return (normalize(x, scale, self.epsilon, True) + bias).astype(x.dtype)


Norm = RMSNorm | LayerNorm


class DecoderAttention(nnx.Module):
    """Causal self-attention in which groups of query heads share a key and a value head.

    `attention_fn` is called as flax's attention modules call theirs, except that the mask may be a
    `Mask` (a model's `attention` of your own gets an array), and with `softcap` where the
    configuration bounds the scores. Query and key are rotated already. Key and value are not
    repeated: their shape is `(batch, length, kv_heads, head_dim)`, and with a cache their length is
    its number of slots.
    """

    def __init__(
        self,
        config: DecoderConfig,
        linear: Linear,
        norm: Callable[..., Norm],
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
    ):
        width, self.head_dim = config.hidden_size, config.head_width
        heads, kv_heads = (n * self.head_dim for n in (config.num_attention_heads, config.kv_heads))
        biased = partial(linear, use_bias=config.attention_bias)
        self.query, self.key, self.value = (
            biased(width, heads),
            biased(width, kv_heads),
            biased(width, kv_heads),
        )
        self.output = linear(heads, width, use_bias=config.has_output_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            by_head = self.qk_norm == "head"
            self.query_norm = norm(self.head_dim if by_head else heads)
            self.key_norm = norm(self.head_dim if by_head else kv_heads)
        self.scale = _query_scale(config)
        self.softcap = config.attn_logit_softcapping
        self.attention_fn = attention_fn
        self.dtype = dtype

    def __call__(
        self, x: Hidden, mask: Seen, rotation: Rotation | None, cache: LayerCache | None = None
    ) -> Hidden:
        """Mixes, for each position, the values of the positions that `mask` lets it see."""
        query, key = (self._heads(name, x) for name in ("query", "key"))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        value = split_heads(self.value(x), self.head_dim)
        if cache is not None:
            key, value = cache.extend(key, value)
        bounded = {} if self.softcap is None else {"softcap": self.softcap}
        mixed = self.attention_fn(
            query if self.scale == 1.0 else query * self.scale,
            key,
            value,
            mask=mask,
            dropout_rng=None,
            dropout_rate=0.0,
            broadcast_dropout=False,
            deterministic=True,
            dtype=self.dtype,
            **bounded,
        )
        return self.output(mixed.reshape(*x.shape[:-1], -1))

    def _heads(self, name: str, x: Hidden) -> Float[Array, "batch length heads head_dim"]:
        """Queries or keys, normalised where the configuration says so."""
        y = getattr(self, name)(x)
        match self.qk_norm:
            case "head":
                return getattr(self, f"{name}_norm")(split_heads(y, self.head_dim))
            case "projection":
                return split_heads(getattr(self, f"{name}_norm")(y), self.head_dim)
            case _:
                return split_heads(y, self.head_dim)


register_attention(DecoderAttention)


def _query_scale(config: DecoderConfig) -> float:
    """The factor of queries, by which `attention_fn`, dividing by a root, gets its own scale."""
    scale = config.attention_multiplier
    return 1.0 if scale is None else scale * config.head_width**0.5


class DecoderMLP(nnx.Module):
    """The feed-forward: `output(act(gate(x)) * up(x))`, or `output(act(up(x)))` without a gate."""

    def __init__(self, config: DecoderConfig, linear: Linear):
        biased = partial(linear, use_bias=config.mlp_bias)
        self.gated = config.mlp_gate
        if self.gated:
            self.gate = biased(config.hidden_size, config.intermediate_size)
        self.up = biased(config.hidden_size, config.intermediate_size)
        self.output = biased(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Hidden) -> Hidden:
        """Transforms each position by itself."""
        if not self.gated:
            return self.output(self.activation(self.up(x)))
        return self.output(gated(self.activation, self.gate(x), self.up(x)))


class DecoderSum(nnx.Module):
    """The residual sum: the input of a sublayer plus its output.

    It is a module so that it can be an attachment point of adapters.
    """

    def __call__(self, x: Hidden, y: Hidden) -> Hidden:
        """Adds the input `x` and the output `y` of a sublayer."""
        return split_rows(x + y)


class DecoderLayer(nnx.Module):
    """One block: attention and feed-forward, with norms before them, after them or both."""

    def __init__(
        self,
        config: DecoderConfig,
        linear: Linear,
        norm: Callable[..., Norm],
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
        experts: Callable[[DecoderConfig], DecoderExperts] | None = None,
    ):
        width, placement = config.hidden_size, config.norm_placement
        self.before, self.after = placement != "post", placement != "pre"
        self.multiplier = config.residual_multiplier
        if self.before:
            self.attention_norm = norm(width)
        self.attention = DecoderAttention(config, linear, norm, attention_fn, dtype)
        if self.after:
            self.attention_post_norm = norm(width)
        self.attention_sum = DecoderSum()
        if self.before:
            self.mlp_norm = norm(width)
        self.mlp = (
            DecoderMixture(config, linear, experts) if experts else DecoderMLP(config, linear)
        )
        if self.after:
            self.mlp_post_norm = norm(width)
        self.mlp_sum = DecoderSum()

    def __call__(
        self, x: Hidden, mask: Seen, rotation: Rotation | None, cache: LayerCache | None = None
    ) -> Hidden:
        """Computes the hidden states after the block."""
        y = self.attention(self.attention_norm(x) if self.before else x, mask, rotation, cache)
        x = self.attention_sum(x, self._output(y, "attention_post_norm"))
        y = self.mlp(self.mlp_norm(x) if self.before else x)
        return self.mlp_sum(x, self._output(y, "mlp_post_norm"))

    def _output(self, y: Hidden, norm: str) -> Hidden:
        """What a sublayer adds to its input."""
        y = getattr(self, norm)(y) if self.after else y
        return y if self.multiplier == 1.0 else y * self.multiplier
