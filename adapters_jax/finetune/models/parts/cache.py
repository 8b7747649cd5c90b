"""The key-value cache of a decoder: a pytree that a call takes and returns, not model state.

All rows of a batch use the same slots and differ in which of them hold tokens, so prompts of
unequal length may be padded on either side.
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
    """Keys and values of one layer during a call; the layer's attention extends them.

    Args:
        key: the keys of all slots.
        value: the values of all slots.
        start: the first free slot.
    """

    def __init__(self, key: Slots, value: Slots, start: Int[Array, ""]):
        self.key, self.value, self.start = key, value, start

    def extend(
        self,
        key: Shaped[Array, "batch length kv_heads head_dim"],
        value: Shaped[Array, "batch length kv_heads head_dim"],
    ) -> tuple[Slots, Slots]:
        """Stores new keys and values from `start` on, and returns those of all slots."""
        self.key, self.value = self._put(self.key, key), self._put(self.value, value)
        return self.key, self.value

    def _put(self, slots: Slots, new: Shaped[Array, "batch length kv_heads head_dim"]) -> Slots:
        # XLA does this in place in the loop over tokens.
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), self.start, 1)


class Cache(NamedTuple):
    """The keys and values of the tokens that a decoder has read.

    Attributes:
        keys: one array for each layer, or one array for all layers if they are scanned.
        values: likewise.
        held: True for slots that hold a token; False for padding and for free slots.
        used: the number of slots taken, the same in every row.
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
        """Returns a cache without tokens.

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

    def row_axes(self) -> "Cache":
        """The axis of the rows of each array; -1 for `used`, which is that of all rows."""
        axis = 0 if isinstance(self.keys, tuple) else 1
        keys, values = jax.tree.map(lambda _: axis, (self.keys, self.values))
        return Cache(keys, values, 0, -1)  # type: ignore[arg-type]

    @property
    def positions(self) -> Int[Array, "batch slots"]:
        """The position of the token in each slot, counted without padding."""
        return jnp.cumsum(self.held, axis=1, dtype=jnp.int32) - 1

    def reserve(
        self, attention_mask: Num[Array, "batch length"]
    ) -> tuple[Self, Int[Array, "batch length"], Bool[Array, "batch 1 length slots"]]:
        """Takes the next slots for new tokens, before their keys and values are computed.

        Args:
            attention_mask: 1 for tokens and 0 for padding.

        Returns:
            The cache with these slots taken; the positions of the tokens, counted without padding;
            and the attention mask, by which each token sees itself and the tokens before it.

        Raises:
            UserError: there are more tokens than slots.

        Example:
            >>> cache = Cache.empty(1, batch=1, slots=4, kv_heads=1, head_dim=4, dtype="float32")
            >>> cache, positions, _ = cache.reserve(jnp.array([[0, 1]]))
            >>> cache, positions, mask = cache.reserve(jnp.array([[1]]))
            >>> positions.tolist(), mask.astype(int).tolist()
            ([[1]], [[[[0, 1, 1, 0]]]])
        """
        tokens, length, slots = attention_mask != 0, attention_mask.shape[1], self.held.shape[1]
        if length > slots:
            raise UserError(
                f"{length} tokens do not fit into a cache of {slots} slots; make it larger."
            )
        before = self.held.sum(1, keepdims=True, dtype=jnp.int32)
        positions = before + jnp.cumsum(tokens, axis=1, dtype=jnp.int32) - 1
        held = jax.lax.dynamic_update_slice_in_dim(self.held, tokens, self.used, 1)
        own = self.used + jnp.arange(length)
        past = jnp.arange(slots)[None] <= own[:, None]
        taken = self._replace(held=held, used=self.used + length)
        return taken, positions, past[None, None] & held[:, None, None]
