"""Llama (flax.nnx): rotary positions, grouped-query attention, SwiGLU, RMS norms before each part.

Reference:
    Touvron et al., LLaMA (2023), https://arxiv.org/abs/2302.13971
    Su et al., RoFormer (2021), https://arxiv.org/abs/2104.09864
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.attention import register_attention
from adapters_jax.interop import huggingface
from adapters_jax.models.cache import Cache, LayerCache
from adapters_jax.models.gpt2 import causal_mask
from adapters_jax.models.layers import ACTIVATIONS, check_tokens


@dataclass(frozen=True)
class LlamaConfig(huggingface.CheckpointConfig):
    """The shape of a Llama, under the names that `config.json` uses; LLaMA-7B by default.

    Example:
        >>> LlamaConfig.from_dict({"num_attention_heads": 9, "num_key_value_heads": 2})
        Traceback (most recent call last):
        ValueError: 9 attention heads do not divide into 2 key and value heads.
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
            raise ValueError(
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


def rotary_angles(
    positions: Int[Array, "batch length"], head_dim: int, theta: float
) -> Float[Array, "batch length half"]:
    """The angle by which each position turns each pair of a head's features, in float32."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[:, :, None] * frequencies


def rotate(
    x: Float[Array, "batch length heads head_dim"], angles: Float[Array, "#batch length half"]
) -> Float[Array, "batch length heads head_dim"]:
    """Turns the pairs (feature i of the first half, feature i of the second half).

    Example:
        >>> quarter = jnp.full((1, 1, 1), jnp.pi / 2)
        >>> rotate(jnp.array([[[[1.0, 0.0]]]]), quarter).round(3).ravel().tolist()
        [-0.0, 1.0]
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


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
        return self.output(self.activation(self.gate(x)) * self.up(x))


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


def _run(layer: LlamaLayer, *args: Any) -> Array:
    return layer(*args)


class Llama(nnx.Module):
    """The language model.

    Args:
        config: its shape.
        dtype: computation dtype; None means that of inputs and parameters together.
        param_dtype: dtype of the parameters.
        attention_fn: given to each attention; see `LlamaAttention`.
        remat: whether to recompute each block in the backward pass instead of storing it.
        rngs: for the initial parameters.

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
        attention_fn: Callable[..., Array] = nnx.dot_product_attention,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(config.initializer_range)
        linear: Callable[..., nnx.Linear] = partial(
            nnx.Linear, use_bias=False, kernel_init=init, **types
        )
        norm: Callable[..., nnx.RMSNorm] = partial(
            nnx.RMSNorm, epsilon=config.rms_norm_eps, **types
        )
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.embeddings = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, **types
        )
        self.layers = nnx.List(
            LlamaLayer(config, linear, norm, attention_fn, dtype)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = norm(config.hidden_size)
        if not config.tie_word_embeddings:
            self.head = linear(config.hidden_size, config.vocab_size)

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
        run = nnx.remat(_run) if self.remat else _run
        for layer in self.layers:
            x = run(layer, x, mask, angles)
        return self.norm(x)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for so many rows and tokens a row, padding included; see `extend`."""
        config, dtype = self.config, self.dtype or self.embeddings.embedding.dtype
        return Cache.empty(
            config.num_hidden_layers, batch, slots, config.kv_heads, config.head_width, dtype
        )

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
        layers = cache.layers()
        cache, positions, mask = cache.reserve(attention_mask)
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)
        x = self.embeddings(input_ids)
        for layer, memory in zip(self.layers, layers, strict=True):
            x = layer(x, mask, angles, memory)
        return self.norm(x), cache.filled(layers)
