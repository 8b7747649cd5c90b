"""`Mask`: which keys a query sees, said by rules instead of an array of all pairs.

Kernels of attention take rules: an array of all pairs grows with the square of the length. `dense`
forms that array for whoever needs it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

PADDING = -(2**31)  # the segment of padding: no query is of it


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "segments"],
    meta_fields=["causal", "window", "prefix"],
)
@dataclass(frozen=True)
class Mask:
    """The keys that each query sees: those that satisfy every rule.

    It is a pytree, so that transformations carry its arrays along.

    Args:
        tokens: True for keys that are tokens; padding is seen by no query. None: all are tokens.
        segments: a number for each token; a query sees the keys with the same number. None: all.
        causal: whether a query sees no key after it.
        window: the distance from which on a query sees nothing, in both directions; 1 leaves it
            itself. None: no limit.
        prefix: the number of keys in front of those of the context, which all queries see. The
            other rules are about the keys of the context.

    Example:
        >>> Mask(causal=True, window=2).dense(3, 3)[0, 0].astype(int)
        Array([[1, 0, 0],
               [1, 1, 0],
               [0, 1, 1]], dtype=int32)
    """

    tokens: Bool[Array, "batch keys"] | None = None
    segments: Int[Array, "batch length"] | None = None
    causal: bool = False
    window: int | None = None
    prefix: int = 0

    @classmethod
    def of(
        cls,
        attention_mask: Num[Array, "batch length"] | None,
        segments: Int[Array, "batch length"] | None = None,
        causal: bool = False,
        window: int | None = None,
    ) -> Self:
        """The mask of rows whose `attention_mask` is 1 for tokens and 0 for padding."""
        tokens = None if attention_mask is None else attention_mask != 0
        return cls(tokens, segments, causal, window)

    @property
    def by_position(self) -> bool:
        """Whether the positions of query and key decide alone, in every row alike."""
        return self.tokens is None and self.segments is None

    @property
    def sees_all(self) -> bool:
        """Whether each query sees each key."""
        return self.by_position and not self.causal and self.window is None

    def with_prefix(self, length: int) -> Self:
        """The mask of the same keys behind `length` further ones, which all queries see."""
        return replace(self, prefix=self.prefix + length)

    def ids(
        self, batch: int, queries: int, keys: int
    ) -> tuple[Int[Array, "batch queries"], Int[Array, "batch keys"]] | None:
        """A number for each query and each key; a query sees the keys with its number.

        None where positions decide alone; and where there are segments and a prefix, since all
        queries see the prefix, and no number is that of all queries.
        """
        if self.by_position or (self.prefix and self.segments is not None):
            return None
        own = jnp.zeros((1, 1), jnp.int32) if self.segments is None else self.segments
        of_queries = jnp.broadcast_to(own, (batch, queries))
        of_keys = jnp.broadcast_to(own, (batch, keys - self.prefix))
        if self.tokens is not None:
            of_keys = jnp.where(self.tokens, of_keys, PADDING)
        front = jnp.zeros((batch, self.prefix), of_keys.dtype)
        return of_queries, jnp.concatenate([front, of_keys], axis=1)

    def dense(self, queries: int, keys: int) -> Bool[Array, "#batch 1 #queries keys"]:
        """The mask as an array, True where a query sees a key.

        Args:
            queries: the number of queries.
            keys: the number of keys, those of the prefix included.
        """
        context = keys - self.prefix
        back = jnp.arange(queries)[:, None] - jnp.arange(context)
        seen = jnp.ones((1, 1, 1, context), bool)
        if self.causal:
            seen &= back >= 0
        if self.window is not None:
            seen &= jnp.abs(back) < self.window
        if self.tokens is not None:
            seen &= self.tokens[:, None, None, :]
        if self.segments is not None:
            seen &= self.segments[:, None, :, None] == self.segments[:, None, None, :]
        edge = [(0, 0)] * 3 + [(self.prefix, 0)]
        return jnp.pad(seen, edge, constant_values=True) if self.prefix else seen


def as_array(
    mask: Mask | Array | None, query: Array, key: Array
) -> Bool[Array, "#batch #heads #queries keys"] | None:
    """A mask as an array or None, for queries and keys of shape `(..., length, heads, width)`."""
    if not isinstance(mask, Mask):
        return mask
    return None if mask.sees_all else mask.dense(query.shape[-3], key.shape[-3])
