"""The blocks of an encoder, and those of a decoder that attends to one (flax.nnx)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.finetune.models.decoder.layers import (
    Context,
    DecoderLayer,
    Hidden,
    Parts,
    Seen,
    empty_cache,
    extend_layers,
)
from adapters_jax.finetune.models.parts.blocks import extend_nnx, make_nnx, run_nnx
from adapters_jax.finetune.models.parts.cache import Cache
from adapters_jax.methods.places import known_tokens


class CrossCache(NamedTuple):
    """What a decoder behind an encoder has read.

    Attributes:
        own: what it keeps of its tokens.
        source: keys and values of the encoder's hidden states, in the form of `own.layers`.
        seen: the mask of these hidden states; None sees all.
    """

    own: Cache
    source: Any
    seen: Bool[Array, "batch 1 1 source"] | None

    def reserve(
        self, attention_mask: Num[Array, "batch length"]
    ) -> tuple["CrossCache", Int[Array, "batch length"], Seen]:
        """Takes the next slots for tokens; see `Cache.reserve`."""
        own, positions, mask = self.own.reserve(attention_mask)
        return self._replace(own=own), positions, mask

    def row_axes(self) -> "CrossCache":
        """The axis of the rows of each array; see `Cache.row_axes`."""
        own = self.own.row_axes()
        axis = jax.tree.leaves(own.layers)[0]
        seen: Any = None if self.seen is None else 0
        return CrossCache(own, jax.tree.map(lambda _: axis, self.source), seen)


class Stack(nnx.Module):
    """Blocks, and the norm after the last one.

    Args:
        length: the number of blocks.
        crosses: whether they attend to an encoder's hidden states as well.
        parts: makes their layers from random numbers.
        remat, scan: see `Decoder`.
        rngs: the random numbers of the initial parameters.
    """

    def __init__(
        self,
        length: int,
        crosses: bool,
        parts: Callable[[nnx.Rngs], Parts],
        remat: bool | str,
        scan: bool,
        rngs: nnx.Rngs,
    ):
        own = parts(rngs)
        self.config, self.remat = own.config, remat
        self.kinds = (0,) * length  # all blocks are of one kind
        self.layers = make_nnx(lambda rngs: DecoderLayer(parts(rngs), crosses), length, scan, rngs)
        self.norm = own.norm(own.config.hidden_size)

    def __call__(
        self, x: Hidden, mask: Seen | None, source: Hidden | None = None, seen: Seen | None = None
    ) -> Hidden:
        """Computes the hidden states after the last norm; see `Context`."""
        at = jnp.arange(x.shape[1])[None]
        context = Context(mask, bias=self.bias(at, at), source=source, seen=seen)
        return self.norm(run_nnx(self.layers, x, [context], self.kinds, remat=self.remat))

    def bias(
        self, at: Int[Array, "#batch length"], keys_at: Int[Array, "#batch keys"]
    ) -> Float[Array, "#batch heads length keys"] | None:
        """The biases of the scores of queries and keys at these positions; None has none."""
        return None

    def read(self, source: Hidden) -> Any:
        """The keys and values of every cross-attention, in the form of a cache's layers."""

        def step(x: Array, layer: Any, _: Any) -> tuple[Array, Any]:
            return x, layer.cross_attention.read(x)

        return extend_nnx(step, self.layers, source, [None], self.kinds)[1]

    def empty_cache(
        self, source: Hidden, seen: Bool[Array, "batch 1 1 source"] | None, slots: int
    ) -> CrossCache:
        """The cache of a decoder that has read no tokens; see `extend`.

        Args:
            source: the encoder's hidden states.
            seen: their mask; None sees all.
            slots: the largest number of tokens.
        """
        own = empty_cache(self.layers, len(self.kinds), len(source), slots, source.dtype)
        with known_tokens(None if seen is None else seen[:, 0, 0]):
            return CrossCache(own, self.read(source), seen)

    def extend(
        self, x: Hidden, cache: CrossCache, positions: Int[Array, "batch length"], mask: Seen
    ) -> tuple[Hidden, CrossCache]:
        """Computes the hidden states of further tokens, and extends the cache by them.

        Args:
            x: the embeddings of the tokens.
            cache, positions, mask: from `CrossCache.reserve`, which has given them their slots.
        """
        own = cache.own
        context = Context(mask, bias=self.bias(positions, own.positions), seen=cache.seen)
        x, own = extend_layers(self.layers, x, [context], self.kinds, own, cache.source)
        return self.norm(x), cache._replace(own=own)
