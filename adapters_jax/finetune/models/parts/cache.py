"""The cache of a decoder: a pytree that a call takes and returns, not model state.

What a layer keeps is the layer's own business: `empty_cache` of the layer makes it, and the layer's
modules extend it. All rows of a batch use the same slots; `held` says which slots of a row hold
tokens, so prompts of unequal length may be padded on either side.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num, Shaped

from adapters_jax.errors import UserError


class Kept(NamedTuple):
    """What a layer keeps of the tokens that it has read; the rows are on the first axis.

    Attributes:
        slots: arrays with an entry for each token, on their second axis: keys and values.
        state: arrays that stand for all tokens together, as the state of a recurrence does.
    """

    slots: tuple[Shaped[Array, "batch slots *entry"], ...] = ()
    state: tuple[Shaped[Array, "batch ..."], ...] = ()


class LayerCache:
    """What a layer keeps, during a call; the layer's modules extend it.

    Args:
        start: the first free slot.

    Attributes:
        kept: likewise, with what the call has added.
    """

    def __init__(self, kept: Kept, start: Int[Array, ""]):
        self.kept, self.start = kept, start

    def extend(self, *new: Shaped[Array, "batch length *entry"]) -> tuple[Array, ...]:
        """Stores the entries of new tokens from `start` on, and returns those of all slots."""

        def put(slots: Array, new: Array) -> Array:
            # XLA does this in place in the loop over tokens.
            new = new.astype(slots.dtype)
            return jax.lax.dynamic_update_slice_in_dim(slots, new, self.start, 1)

        self.kept = self.kept._replace(slots=tuple(map(put, self.kept.slots, new)))
        return self.kept.slots


class Cache(NamedTuple):
    """What the layers of a decoder keep of the tokens that it has read.

    Attributes:
        layers: a list of what each layer keeps, or one `Kept` with the layers on the first axis if
            they are scanned.
        held: True for slots that hold a token; False for padding and for free slots.
        used: the number of slots taken, the same in every row.
    """

    layers: list[Kept] | Kept
    held: Bool[Array, "batch slots"]
    used: Int[Array, ""]

    @classmethod
    def empty(cls, layers: list[Kept] | Kept, batch: int, slots: int) -> Self:
        """Returns a cache without tokens, of what layers without tokens keep.

        Example:
            >>> cache = Cache.empty([Kept((jnp.zeros((2, 5, 1, 4)),))], batch=2, slots=5)
            >>> cache.layers[0].slots[0].shape, int(cache.used)
            ((2, 5, 1, 4), 0)
        """
        return cls(layers, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

    def row_axes(self) -> "Cache":
        """The axis of the rows of each array; -1 for `used`, which is that of all rows."""
        layers = jax.tree.map(lambda _: self._rows, self.layers)
        return Cache(layers, 0, -1)  # type: ignore[arg-type]

    @property
    def _rows(self) -> int:
        return 0 if isinstance(self.layers, list) else 1

    def narrow(self, width: int) -> Self:
        """The cache with its first slots alone, which must hold all tokens."""
        return self._map_slots(lambda x, axis: jax.lax.slice_in_dim(x, 0, width, axis=axis))

    def widen(self, like: "Cache") -> Self:
        """The cache with the further slots of another one; see `narrow`."""

        def put(part: Array, axis: int, whole: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, 0, axis)

        return self._map_slots(put, like)

    def _map_slots(self, change: Any, *others: "Cache") -> Self:
        """Changes all arrays with slots: `change(array, axis of the slots, *those of others)`."""

        def of_layer(kept: Kept, *rest: Kept) -> Kept:
            arrays = zip(kept.slots, *(each.slots for each in rest), strict=True)
            axis = self._rows + 1
            return kept._replace(slots=tuple(change(x, axis, *y) for x, *y in arrays))

        trees = (self.layers, *(each.layers for each in others))
        layers = jax.tree.map(of_layer, *trees, is_leaf=lambda x: isinstance(x, Kept))
        held = change(self.held, 1, *(each.held for each in others))
        return self._replace(layers=layers, held=held)

    def until(self, n: Int[Array, ""]) -> Self:
        """The cache with its first n slots alone, and room for others; others' numbers are gone."""

        def kept(x: Array, axis: int) -> Array:
            place = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
            return jnp.where(place < n, x, jnp.zeros((), x.dtype))

        return self._map_slots(kept)._replace(used=n)

    @property
    def positions(self) -> Int[Array, "batch slots"]:
        """The position of the token in each slot, counted without padding."""
        return jnp.cumsum(self.held, axis=1, dtype=jnp.int32) - 1

    def reserve(
        self, attention_mask: Num[Array, "batch length"]
    ) -> tuple[Self, Int[Array, "batch length"], Bool[Array, "batch 1 length slots"]]:
        """Takes the next slots for new tokens, before the layers read them.

        Args:
            attention_mask: 1 for tokens and 0 for padding.

        Returns:
            The cache with these slots taken; the positions of the tokens, counted without padding;
            and the attention mask, by which each token sees itself and the tokens before it.

        Raises:
            UserError: there are more tokens than slots.

        Example:
            >>> cache = Cache.empty([], batch=1, slots=4)
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
