"""Llama (flax.nnx): rotary positions, grouped-query attention, SwiGLU, pre-norm with RMS norms.

Reference: Touvron et al., LLaMA (2023), https://arxiv.org/abs/2302.13971
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.attention.registry import register_attention
from adapters_jax.models.llama.config import LlamaConfig
from adapters_jax.models.parts.blocks import check_remat, extend_nnx, run_nnx, stack_nnx
from adapters_jax.models.parts.cache import Cache, LayerCache
from adapters_jax.models.parts.functions import (
    ACTIVATIONS,
    causal_mask,
    dot_product_attention,
    gated,
    normalize,
)
from adapters_jax.models.parts.layers import check_tokens
from adapters_jax.models.parts.rotary import rotary_angles, rotate


class LlamaAttention(nnx.Module):
    """Causal self-attention in which groups of query heads share a key and a value head.

    `attention_fn` is called as flax's attention modules call theirs. Query and key are rotated
    already. Key and value are not repeated: their shape is `(batch, length, kv_heads, head_dim)`,
    and with a cache their length is its number of slots.
    """

    def __init__(
        self,
        config: LlamaConfig,
        linear: Callable[..., nnx.Linear],
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
    ):
        width, heads = config.hidden_size, config.num_attention_heads * config.head_width
        self.query = linear(width, heads)
        self.key = linear(width, config.kv_heads * config.head_width)
        self.value = linear(width, config.kv_heads * config.head_width)
        self.output = linear(heads, width)
        self.head_dim = config.head_width
        self.attention_fn = attention_fn
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Bool[Array, "#batch 1 length keys"],
        angles: Float[Array, "#batch length half"],
        cache: LayerCache | None = None,
    ) -> Float[Array, "batch length d"]:
        """Mixes, for each position, the values of the positions that `mask` lets it see."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (
            child(x).reshape(heads) for child in (self.query, self.key, self.value)
        )
        key = rotate(key, angles)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = self.attention_fn(
            rotate(query, angles),
            key,
            value,
            mask=mask,
            dropout_rng=None,
            dropout_rate=0.0,
            broadcast_dropout=False,
            deterministic=True,
            dtype=self.dtype,
        )
        return self.output(mixed.reshape(*x.shape[:-1], -1))


register_attention(LlamaAttention)


class LlamaMLP(nnx.Module):
    """The gated feed-forward: `output(act(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, linear: Callable[..., nnx.Linear]):
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.output = linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "batch length d"]) -> Float[Array, "batch length d"]:
        """Transforms each position by itself."""
        return self.output(gated(self.activation, self.gate(x), self.up(x)))


class RMSNorm(nnx.RMSNorm):
    """RMS normalisation over the last axis, as in flax, with the derivative of `normalize`."""

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(features, epsilon=epsilon, rngs=rngs, **types)

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:  # type: ignore[override]
        """Divides each row of `x` by its root mean square and scales it; takes no mask."""
        scale: Any = self.scale
        x, scale = self.promote_dtype((x, scale[...]), dtype=self.dtype)
        return normalize(x, scale, self.epsilon, False).astype(x.dtype)


class LlamaSum(nnx.Module):
    """The residual sum: the input of a sublayer plus its output.

    It is a module so that it can be an attachment point of adapters.
    """

    def __call__(
        self, x: Float[Array, "batch length d"], y: Float[Array, "batch length d"]
    ) -> Float[Array, "batch length d"]:
        """Adds the input `x` and the output `y` of a sublayer."""
        return x + y


class LlamaLayer(nnx.Module):
    """One pre-norm block."""

    def __init__(
        self,
        config: LlamaConfig,
        linear: Callable[..., nnx.Linear],
        norm: Callable[..., nnx.RMSNorm],
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
    ):
        self.attention_norm = norm(config.hidden_size)
        self.attention = LlamaAttention(config, linear, attention_fn, dtype)
        self.attention_sum = LlamaSum()
        self.mlp_norm = norm(config.hidden_size)
        self.mlp = LlamaMLP(config, linear)
        self.mlp_sum = LlamaSum()

    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Bool[Array, "#batch 1 length keys"],
        angles: Float[Array, "#batch length half"],
        cache: LayerCache | None = None,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the block."""
        x = self.attention_sum(x, self.attention(self.attention_norm(x), mask, angles, cache))
        return self.mlp_sum(x, self.mlp(self.mlp_norm(x)))


class Llama(nnx.Module):
    """The language model.

    Args:
        config: the model's shape.
        dtype: the computation dtype; None means that of inputs and parameters together.
        param_dtype: the dtype of the parameters.
        attention_fn: the attention function of every layer; see `LlamaAttention`.
        remat: True recomputes each block in the backward pass instead of storing its activations;
            the name of a policy in `blocks.POLICIES` stores some of them.
        scan: whether `layers` is one block, with leaves stacked on their first axis, instead of a
            list of blocks.
        rngs: the random numbers of the initial parameters.

    Raises:
        UserError: `remat` is not a policy.

    Example:
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> def logits(ids):
        ...     return Llama(config, rngs=nnx.Rngs(0))(ids)
        >>> nnx.eval_shape(logits, jnp.array([[1, 2, 3]])).shape
        (1, 3, 16)
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        attention_fn: Callable[..., Array] = dot_product_attention,
        remat: bool | str = False,
        scan: bool = False,
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        init = nnx.initializers.normal(config.initializer_range)
        linear: Callable[..., nnx.Linear] = partial(
            nnx.Linear, use_bias=False, kernel_init=init, **types
        )
        norm: Callable[..., nnx.RMSNorm] = partial(RMSNorm, epsilon=config.rms_norm_eps, **types)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.scan = scan

        def block(rngs: nnx.Rngs) -> LlamaLayer:
            parts = partial(linear, rngs=rngs), partial(norm, rngs=rngs)
            return LlamaLayer(config, *parts, attention_fn, dtype)

        self.embeddings = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs, **types
        )
        length = config.num_hidden_layers
        self.layers = (
            stack_nnx(block, length, rngs) if scan else nnx.List(block(rngs) for _ in range(length))
        )
        self.norm = norm(config.hidden_size, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Computes float32 logits of the next token; the arguments are those of `hidden`."""
        return self.logits(self.hidden(input_ids, attention_mask, positions, segments))

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Computes float32 logits of hidden states."""
        tied = self.config.tie_word_embeddings
        logits = self.embeddings.attend(hidden) if tied else self.head(hidden)
        return logits.astype(jnp.float32)

    def hidden(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the last norm.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            positions: by default 0, 1, 2, ...; only their differences matter.
            segments: the number of each token's text, if a row holds several texts; a token sees
                only its own text.
        """
        check_tokens(input_ids, attention_mask)
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)
        mask = causal_mask(input_ids, attention_mask)
        if segments is not None:
            mask &= segments[:, None, :, None] == segments[:, None, None, :]
        x = self.embeddings(input_ids)
        return self.norm(run_nnx(self.layers, x, mask, angles, remat=self.remat))

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for `batch` rows of at most `slots` tokens, padding included; see `extend`."""
        config, dtype = self.config, self.dtype or self.embeddings.embedding.dtype
        sizes = config.num_hidden_layers, batch, slots, config.kv_heads, config.head_width
        return Cache.empty(*sizes, dtype, stacked=self.scan)

    def extend(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"],
        cache: Cache,
    ) -> tuple[Float[Array, "batch length d"], Cache]:
        """Computes the hidden states of further tokens, and extends the cache by them.

        Args:
            input_ids: token ids; the earlier ones are in the cache.
            attention_mask: 1 for tokens and 0 for padding.
            cache: from `empty_cache` or an earlier call. It must have room for the tokens; only the
                first call can check that.

        Returns:
            The hidden states after the last norm, and the extended cache.
        """
        check_tokens(input_ids, attention_mask)
        start = cache.used
        cache, positions, mask = cache.reserve(attention_mask)
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)

        def step(x: Array, layer: LlamaLayer, key: Array, value: Array) -> tuple[Array, ...]:
            memory = LayerCache(key, value, start)
            x = layer(x, mask, angles, memory)
            return x, memory.key, memory.value

        x, keys, values = extend_nnx(
            step, self.layers, self.embeddings(input_ids), cache.keys, cache.values
        )
        return self.norm(x), cache._replace(keys=keys, values=values)


def abstract_llama(config: LlamaConfig, **options: Any) -> Llama:
    """Returns a Llama without arrays; the options are those of `Llama`."""
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options))
