"""The key-value cache of a decoder: a pytree that goes in and comes out, no state of the model.

Rows of a batch share the slots and differ in which of them hold tokens, so prompts of unequal
length may be padded on either side.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Int, Num, Shaped

from adapters_jax.errors import UserError

Slots = Shaped[Array, "batch slots kv_heads head_dim"]
Stacked = Shaped[Array, "layers batch slots kv_heads head_dim"]


class LayerCache:
    """Keys and values of one layer while a call runs; the layer's attention extends them.

    Args:
        key: of every slot.
        value: of every slot.
        start: the first slot that is free.
    """

    def __init__(self, key: Slots, value: Slots, start: Int[Array, ""]):
        self.key, self.value, self.start = key, value, start

    def extend(
        self,
        key: Shaped[Array, "batch length kv_heads head_dim"],
        value: Shaped[Array, "batch length kv_heads head_dim"],
    ) -> tuple[Slots, Slots]:
        """Keys and values of every slot, the new ones put in."""
        self.key, self.value = self._put(self.key, key), self._put(self.value, value)
        return self.key, self.value

    def _put(self, slots: Slots, new: Shaped[Array, "batch length kv_heads head_dim"]) -> Slots:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), self.start, 1)


class Cache(NamedTuple):
    """What a decoder keeps of the tokens it has read.

    Attributes:
        keys: of each layer; an array of all of them where layers are scanned.
        values: likewise.
        held: which slots hold a token, not padding and not nothing.
        used: how many slots are taken, in every row.
    """

    keys: tuple[Slots, ...] | Stacked
    values: tuple[Slots, ...] | Stacked
    held: Bool[Array, "batch slots"]
    used: Int[Array, ""]

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: Dtype,
        stacked: bool = False,
    ) -> Self:
        """A cache with nothing in it.

        Example:
            >>> cache = Cache.empty(1, batch=2, slots=5, kv_heads=1, head_dim=4, dtype="float32")
            >>> len(cache.keys), cache.keys[0].shape, int(cache.used)
            (1, (2, 5, 1, 4), 0)
        """
        shape, held = (batch, slots, kv_heads, head_dim), jnp.zeros((batch, slots), bool)
        rows = (
            jnp.zeros((layers, *shape), dtype)
            if stacked
            else tuple(jnp.zeros(shape, dtype) for _ in range(layers))
        )
        return cls(rows, rows, held, jnp.zeros((), jnp.int32))

    def reserve(
        self, attention_mask: Num[Array, "batch length"]
    ) -> tuple[Self, Int[Array, "batch length"], Bool[Array, "batch 1 length slots"]]:
        """Takes the next slots for tokens, whose keys and values are still to come.

        Args:
            attention_mask: 1 for tokens and 0 for padding.

        Returns:
            The cache with these slots taken; the positions of the tokens, counted without padding;
            and the mask of their attention: each sees itself and the tokens before.

        Raises:
            ValueError: there are more tokens than slots.

        Example:
            >>> cache = Cache.empty(1, batch=1, slots=4, kv_heads=1, head_dim=4, dtype="float32")
            >>> cache, positions, _ = cache.reserve(jnp.array([[0, 1]]))
            >>> cache, positions, mask = cache.reserve(jnp.array([[1]]))
            >>> positions.tolist(), mask.astype(int).tolist()
            ([[1]], [[[[0, 1, 1, 0]]]])
        """
        tokens, length, slots = attention_mask != 0, attention_mask.shape[1], self.held.shape[1]
        if length > slots:
            raise UserError(f"{length} tokens do not fit a cache of {slots} slots.")
        before = self.held.sum(1, keepdims=True, dtype=jnp.int32)
        positions = before + jnp.cumsum(tokens, axis=1, dtype=jnp.int32) - 1
        held = jax.lax.dynamic_update_slice_in_dim(self.held, tokens, self.used, 1)
        own = self.used + jnp.arange(length)
        past = jnp.arange(slots)[None] <= own[:, None]
        taken = self._replace(held=held, used=self.used + length)
        return taken, positions, past[None, None] & held[:, None, None]
