"""The layers of a T5: attention with biases of positions, feed-forward and the block they make."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from adapters_jax.finetune.models.decoder.layers import DecoderSum, RMSNorm
from adapters_jax.finetune.models.parts.cache import LayerCache
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, gated, split_heads
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.trace.masks import Mask
from adapters_jax.trace.registry import register_attention

Hidden = Float[Array, "batch length d"]
Heads = Float[Array, "batch length heads d_kv"]
Seen = Mask | Bool[Array, "#batch 1 #length keys"]
Bias = Float[Array, "#batch heads length keys"]
Source = Hidden | tuple[Heads, Heads]
Linear = Callable[[int, int, float], nnx.Linear]  # inputs, outputs, standard deviation


class T5Attention(nnx.Module):
    """Attention whose scores are not scaled but biased by relative positions.

    `attention_fn` is called as flax's attention modules call theirs, except that the mask may be a
    `Mask`.
    """

    def __init__(
        self,
        config: T5Config,
        linear: Linear,
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
    ):
        width, self.head_dim = config.d_model, config.d_kv
        inner = config.num_heads * self.head_dim
        self.query = linear(width, inner, (width * self.head_dim) ** -0.5)
        self.key = linear(width, inner, width**-0.5)
        self.value = linear(width, inner, width**-0.5)
        self.output = linear(inner, width, inner**-0.5)
        self.attention_fn = attention_fn
        self.dtype = dtype

    def __call__(
        self,
        x: Hidden,
        mask: Seen | None,
        bias: Bias | None = None,
        source: Source | None = None,
        cache: LayerCache | None = None,
    ) -> Hidden:
        """Mixes, for each position, the values of the positions that `mask` lets it see.

        Args:
            x: what the queries are computed from.
            mask: True where a query sees a key.
            bias: added to the scores.
            source: what it attends to, or keys and values from `read`; by default `x` itself.
            cache: the earlier keys and values.
        """
        query = self._heads(self.query(x))
        pair = source if isinstance(source, tuple) else self.read(x if source is None else source)
        key, value = pair if cache is None else cache.extend(*pair)
        mixed = self.attention_fn(
            query * self.head_dim**0.5,  # attention_fn divides by it
            key,
            value,
            bias=bias,
            mask=mask,
            dropout_rng=None,
            dropout_rate=0.0,
            broadcast_dropout=False,
            deterministic=True,
            dtype=self.dtype,
        )
        return self.output(mixed.reshape(*x.shape[:-1], -1))

    def read(self, source: Hidden) -> tuple[Heads, Heads]:
        """The keys and the values of hidden states."""
        return self._heads(self.key(source)), self._heads(self.value(source))

    def _heads(self, x: Float[Array, "batch length inner"]) -> Heads:
        return split_heads(x, self.head_dim)


register_attention(T5Attention)


class T5MLP(nnx.Module):
    """The feed-forward: `output(act(intermediate(x)))`, or `output(act(gate(x)) * up(x))`."""

    def __init__(self, config: T5Config, linear: Linear):
        width, inner = config.d_model, config.d_ff
        self.gated = config.gated
        if self.gated:
            self.gate = linear(width, inner, width**-0.5)
            self.up = linear(width, inner, width**-0.5)
        else:
            self.intermediate = linear(width, inner, width**-0.5)
        self.output = linear(inner, width, inner**-0.5)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Hidden) -> Hidden:
        """Transforms each position by itself."""
        if self.gated:
            return self.output(gated(self.activation, self.gate(x), self.up(x)))
        return self.output(self.activation(self.intermediate(x)))


class T5Layer(nnx.Module):
    """One block; that of a decoder attends to the encoder's hidden states as well."""

    def __init__(
        self,
        config: T5Config,
        linear: Linear,
        norm: Callable[[], RMSNorm],
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
        crosses: bool,
    ):
        attention: tuple[Any, ...] = config, linear, attention_fn, dtype
        self.attention_norm = norm()
        self.attention = T5Attention(*attention)
        self.attention_sum = DecoderSum()
        self.crosses = crosses
        if crosses:
            self.cross_attention_norm = norm()
            self.cross_attention = T5Attention(*attention)
            self.cross_attention_sum = DecoderSum()
        self.mlp_norm = norm()
        self.mlp = T5MLP(config, linear)
        self.mlp_sum = DecoderSum()

    def __call__(
        self,
        x: Hidden,
        mask: Seen | None,
        bias: Bias,
        source: Source | None = None,
        seen: Seen | None = None,
        cache: LayerCache | None = None,
    ) -> Hidden:
        """Computes the hidden states after the block.

        Args:
            x: those before it.
            mask, bias, cache: of the self-attention; see `T5Attention`.
            source, seen: what the cross-attention attends to, and its mask.
        """
        y = self.attention(self.attention_norm(x), mask, bias, cache=cache)
        x = self.attention_sum(x, y)
        if self.crosses:
            y = self.cross_attention(self.cross_attention_norm(x), seen, source=source)
            x = self.cross_attention_sum(x, y)
        return self.mlp_sum(x, self.mlp(self.mlp_norm(x)))
