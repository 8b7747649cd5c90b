"""Llama (flax.nnx): rotary positions, grouped-query attention, SwiGLU, RMS norms before each part.

Reference: Touvron et al., LLaMA (2023), https://arxiv.org/abs/2302.13971
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.interop import huggingface
from adapters_jax.models.gpt2 import causal_mask
from adapters_jax.models.parts.blocks import check_remat, extend_nnx, run_nnx, stack_nnx
from adapters_jax.models.parts.cache import Cache, LayerCache
from adapters_jax.models.parts.functions import ACTIVATIONS, dot_product_attention, gated, normalize
from adapters_jax.models.parts.layers import check_tokens
from adapters_jax.models.parts.rotary import rotary_angles, rotate
from adapters_jax.weights.attention import register_attention


@dataclass(frozen=True)
class LlamaConfig(huggingface.CheckpointConfig):
    """The shape of a Llama, under the names that `config.json` uses; LLaMA-7B by default.

    Example:
        >>> LlamaConfig.from_dict({"num_attention_heads": 9, "num_key_value_heads": 2})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: 9 attention heads do not divide into 2 key and value heads.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("llama",),
        "hidden_act": tuple(ACTIVATIONS),
        "rope_scaling": (None,),
        "rope_type": ("default",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"{self.num_attention_heads} attention heads do not divide into {self.kv_heads} "
                "key and value heads."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`, refusing settings not implemented."""
        # Newer files keep rope_theta and rope_type in an object of their own.
        return super().from_dict({**values, **(values.get("rope_parameters") or {})})

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


LLAMA_7B = LlamaConfig()


class LlamaAttention(nnx.Module):
    """Causal self-attention in which groups of query heads share a key and a value head.

    `attention_fn` is called as flax's attention modules call theirs: query and key are rotated, and
    key and value are of shape `(batch, length, kv_heads, head_dim)`, not repeated. With a cache,
    their length is its number of slots.
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
        """Mixes the positions that `mask` lets each one see."""
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
    """RMS normalisation over the last axis, as flax's, with the derivative of `normalize`."""

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
        """Each row of `x` over its root mean square, scaled; flax's has a mask besides."""
        scale: Any = self.scale
        x, scale = self.promote_dtype((x, scale[...]), dtype=self.dtype)
        return normalize(x, scale, self.epsilon, False).astype(x.dtype)


class LlamaSum(nnx.Module):
    """The residual stream behind a sublayer; a module, so that adapters can stand here."""

    def __call__(
        self, x: Float[Array, "batch length d"], y: Float[Array, "batch length d"]
    ) -> Float[Array, "batch length d"]:
        """What went into the sublayer plus what came out."""
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
        """The hidden states that leave the block."""
        x = self.attention_sum(x, self.attention(self.attention_norm(x), mask, angles, cache))
        return self.mlp_sum(x, self.mlp(self.mlp_norm(x)))


class Llama(nnx.Module):
    """The language model.

    Args:
        config: its shape.
        dtype: computation dtype; None means that of inputs and parameters together.
        param_dtype: dtype of the parameters.
        attention_fn: given to each attention; see `LlamaAttention`.
        remat: whether to recompute each block in the backward pass instead of storing it, or the
            name of one of `jax.checkpoint_policies`; see `blocks.POLICIES`.
        scan: whether `layers` is one block, its leaves stacked on their first axis, instead of a
            list of blocks.
        rngs: for the initial parameters.

    Raises:
        ValueError: `remat` is no policy.

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
        """Float32 logits of the next token; the arguments are those of `hidden`."""
        return self.logits(self.hidden(input_ids, attention_mask, positions, segments))

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of hidden states."""
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
        """The hidden states after the last norm.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            positions: by default 0, 1, 2, ...; only their differences matter.
            segments: of several texts in one row, each token's text; texts do not see each other.
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
        """A cache for so many rows and tokens a row, padding included; see `extend`."""
        config, dtype = self.config, self.dtype or self.embeddings.embedding.dtype
        sizes = config.num_hidden_layers, batch, slots, config.kv_heads, config.head_width
        return Cache.empty(*sizes, dtype, stacked=self.scan)

    def extend(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"],
        cache: Cache,
    ) -> tuple[Float[Array, "batch length d"], Cache]:
        """The hidden states of further tokens, and the cache with them in it.

        Args:
            input_ids: token ids; those before are in the cache.
            attention_mask: 1 for tokens and 0 for padding.
            cache: from `empty_cache` or an earlier call; it must have room, which only the first
                call can check.
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
