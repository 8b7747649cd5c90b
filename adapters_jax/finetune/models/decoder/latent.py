"""Latent attention: keys and values are computed from one small vector for each token.

Queries may come from a small vector, too. A part of the features of a head's queries and keys has
no positions; the other part is rotated, and its key is the same for all heads.

Reference: DeepSeek-AI, DeepSeek-V2 (2024), https://arxiv.org/abs/2405.04434
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from adapters_jax.errors import check_size
from adapters_jax.finetune.base_files.typed_settings import check_settings
from adapters_jax.finetune.models.parts.cache import Kept, LayerCache
from adapters_jax.finetune.models.parts.counts import dense
from adapters_jax.finetune.models.parts.functions import split_heads
from adapters_jax.finetune.models.parts.rotary import Rotation, rotate

Hidden = Float[Array, "batch length d"]
EPSILON = 1e-6  # of the norms of the small vectors, whatever that of the others is


@dataclass(frozen=True)
class LatentSizes:
    """The sizes of a latent attention.

    Attributes:
        kv_rank: the width of the vector that keys and values are computed from.
        query_rank: the width of that of queries; None computes them from the hidden states.
        plain: the number of features of a head's queries and keys without positions.
        rotated: the number of those that are rotated.
        value: the width of a head's values.
    """

    kv_rank: int
    query_rank: int | None
    plain: int
    rotated: int
    value: int

    def __post_init__(self) -> None:
        check_settings("LatentSizes", self)
        for name, size in vars(self).items():
            if size is not None:
                check_size("LatentSizes", name, size)

    @property
    def width(self) -> int:
        """The width of a head's queries and keys."""
        return self.plain + self.rotated

    def parameters(self, width: int, heads: int, bias: bool) -> int:
        """The number of parameters, for hidden states of this width."""
        rank, queries = self.query_rank, heads * self.width
        query = dense(width, rank, bias) + rank + rank * queries if rank else width * queries
        latent = dense(width, self.kv_rank + self.rotated, bias) + self.kv_rank
        pairs = self.kv_rank * heads * (self.plain + self.value)
        return query + latent + pairs + dense(heads * self.value, width, bias)


class LatentAttention(nnx.Module):
    """Attention whose keys and values are computed from small vectors, which a cache keeps.

    Its `attention_fn` is called as that of `DecoderAttention`, with values of another width than
    that of queries and keys. With a cache, keys and values of all slots are computed anew.
    """

    def __init__(self, parts: Any):
        config, sizes = parts.config, parts.config.latent
        width, heads, biased = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.sizes: LatentSizes = sizes
        if sizes.query_rank:
            self.query_down = parts.linear(width, sizes.query_rank, biased)
            self.query_norm = parts.norm(sizes.query_rank, epsilon=EPSILON)
            self.query_up = parts.linear(sizes.query_rank, heads * sizes.width)
        else:
            self.query = parts.linear(width, heads * sizes.width)
        self.latent = parts.linear(width, sizes.kv_rank + sizes.rotated, biased)
        self.latent_norm = parts.norm(sizes.kv_rank, epsilon=EPSILON)
        self.key_value = parts.linear(sizes.kv_rank, heads * (sizes.plain + sizes.value))
        self.output = parts.linear(heads * sizes.value, width, biased)
        # See `DecoderAttention`.
        factor = config.attention_multiplier
        self.scale = 1.0 if factor is None else factor * sizes.width**0.5
        self.rotary_interleaved = config.rotary_interleaved
        self.attention_fn, self.dtype = parts.attention_fn, parts.dtype

    def __call__(
        self,
        x: Hidden,
        mask: Any,
        rotation: Rotation | None = None,
        bias: None = None,
        cache: LayerCache | None = None,
    ) -> Hidden:
        """Mixes, for each position, the values of the positions that `mask` lets it see."""
        sizes = self.sizes
        if sizes.query_rank:
            query = self.query_up(self.query_norm(self.query_down(x)))
        else:
            query = self.query(x)
        plain, turned = jnp.split(split_heads(query, sizes.width), [sizes.plain], axis=-1)
        query = jnp.concatenate([plain, self._rotated(turned, rotation)], axis=-1)
        latent, shared = jnp.split(self.latent(x), [sizes.kv_rank], axis=-1)
        own = self.latent_norm(latent), self._rotated(shared[:, :, None], rotation)
        latent, shared = own if cache is None else cache.extend(*own)
        pairs = split_heads(self.key_value(latent), sizes.plain + sizes.value)
        key, value = jnp.split(pairs, [sizes.plain], axis=-1)
        shared = jnp.broadcast_to(shared, (*key.shape[:-1], sizes.rotated))
        mixed = self.attention_fn(
            query if self.scale == 1.0 else query * self.scale,
            jnp.concatenate([key, shared.astype(key.dtype)], axis=-1),
            value,
            mask=mask,
            dropout_rng=None,
            dropout_rate=0.0,
            broadcast_dropout=False,
            deterministic=True,
            dtype=self.dtype,
        )
        return self.output(mixed.reshape(*x.shape[:-1], -1))

    def _rotated(self, x: Array, rotation: Rotation | None) -> Array:
        return x if rotation is None else rotate(x, rotation, self.rotary_interleaved)

    def empty_cache(self, batch: int, slots: int, dtype: Dtype) -> Kept:
        """What it keeps before the first token: no small vectors and no rotated keys."""
        latent = jnp.zeros((batch, slots, self.sizes.kv_rank), dtype)
        return Kept((latent, jnp.zeros((batch, slots, 1, self.sizes.rotated), dtype)))
