"""Disentangled attention: scores of content and of relative position, each from vectors of its own.

The score of a query and a key is the sum of three products, divided by the root of three times the
width of a head: of query and key; of the query with the key of their relative position (c2p); and
of the key with the query of that position (p2c). Relative positions share one embedding from a
distance on, in buckets that widen logarithmically.

Reference:
    He et al., DeBERTa (2020), https://arxiv.org/abs/2006.03654
    He et al., DeBERTaV3 (2021), https://arxiv.org/abs/2111.09543
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adapters_jax.finetune.models.deberta.config import DebertaConfig
from adapters_jax.finetune.models.parts.functions import dot_product_attention
from adapters_jax.finetune.models.parts.layers import Output, Typed
from adapters_jax.trace.masks import Mask
from adapters_jax.trace.registry import register_attention


def relative_positions(length: int, config: DebertaConfig) -> Int[np.ndarray, "length length"]:
    """The number of the embedding for each query (first axis) and key.

    Distances below half the buckets have a bucket each; larger ones share them. The arithmetic is
    in float32 as in transformers, since rounding can decide at the edge of a bucket.

    Example:
        >>> relative_positions(4, DebertaConfig(position_buckets=4, max_relative_positions=9))
        array([[4, 3, 2, 1],
               [5, 4, 3, 2],
               [6, 5, 4, 3],
               [7, 6, 5, 4]])
    """
    each = np.arange(length)
    distance, middle = each[:, None] - each, config.position_buckets // 2
    if config.position_buckets:
        far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
        widest = np.log(np.float32((config.longest - 1) / middle))
        steps = np.ceil(np.log(far) / widest * np.float32(middle - 1)) + middle
        near = np.abs(distance) <= middle
        distance = np.where(near, distance, steps * np.sign(distance)).astype(np.int64)
    return np.clip(distance + config.span, 0, 2 * config.span - 1)


class DisentangledAttention(Typed):
    """Self-attention with `query`, `key`, `value` and `output`, and relative positions.

    With shared keys, `query` and `key` project the relative positions as well; otherwise
    `position_query` and `position_key` do.
    """

    config: DebertaConfig
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        relative: Float[Array, "positions d"],
        index: Int[Array, "length length"],
        mask: Mask | Bool[Array, "batch 1 1 length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Mixes, for each position, the values of the positions that `mask` lets it see.

        Args:
            x: the hidden states.
            relative: the embeddings of relative positions.
            index: the number of the embedding for each query and key.
            mask: a `Mask`, or True for the keys that are seen.
            deterministic: True turns dropout off.
        """
        c, heads = self.config, self.config.num_attention_heads
        inits = {"kernel_init": nn.initializers.normal(c.initializer_range), **self.types}
        dense = {
            name: nn.Dense(c.hidden_size, name=name, **inits) for name in ("query", "key", "value")
        }

        def project(name: str, of: Array) -> Array:
            return dense[name](of).reshape(*of.shape[:-1], heads, -1)

        query, key, value = (project(name, x) for name in ("query", "key", "value"))
        relative = nn.Dropout(c.hidden_dropout_prob)(relative, deterministic=deterministic)
        parts, both = [], (("c2p", query, "key", index), ("p2c", key, "query", index.T))
        for kind, content, other, positions in both:
            if kind not in c.pos_att_type:
                continue
            if not c.share_att_key:
                name = f"position_{other}"
                dense[name] = nn.Dense(c.hidden_size, name=name, **inits)
                other = name
            scores = jnp.einsum("bqhd,phd->bhqp", content, project(other, relative))
            found = jnp.take_along_axis(scores, positions[None, None], axis=-1)
            parts.append(found if kind == "c2p" else found.swapaxes(-1, -2))
        # The function itself divides by the root of a head's width.
        scale = 1 / math.sqrt(1 + len(parts))
        drops = c.attention_probs_dropout_prob > 0 and not deterministic
        mixed = self.attention_fn(
            query * scale,
            key,
            value,
            bias=sum(parts) * (scale / math.sqrt(query.shape[-1])) if parts else None,
            mask=mask,
            dropout_rng=self.make_rng("dropout") if drops else None,
            dropout_rate=c.attention_probs_dropout_prob if drops else 0.0,
            broadcast_dropout=False,
            deterministic=deterministic,
            dtype=self.dtype,
        )
        output = Output(c.hidden_size, c.hidden_dropout_prob, name="output", **inits)
        return output(mixed.reshape(x.shape), deterministic)


register_attention(DisentangledAttention)
