"""Token ids as models take them: checks, positions, and the table of embeddings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError


class Embed(nnx.Embed):
    """flax's table, whose product with hidden states reads it as it lies.

    flax transposes it first, and for a single row XLA's CPU compiler of jax 0.12 then reads it four
    times slower: 14.3 ms in place of 3.8 for SmolLM2's table.
    """

    def attend(
        self, query: Float[Array, "*batch d"], out_sharding: Any = None
    ) -> Float[Array, "*batch vocab"]:
        """Computes the product of hidden states with each row of the table."""
        given = query, self.embedding[...]
        query, table = self.promote_dtype(given, dtype=self.dtype)
        return jnp.einsum("...d,nd->...n", query, table, out_sharding=out_sharding)


def check_tokens(
    input_ids: Int[Array, "batch length"],
    attention_mask: Num[Array, "batch length"] | None = None,
    longest: int | None = None,
) -> None:
    """Raises `UserError` unless these are at most `longest` token ids and a mask of their shape."""
    wrong = []
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        wrong.append(
            f"input_ids must be integers of shape (batch, length), got {input_ids.dtype} of shape "
            f"{input_ids.shape}"
        )
    elif longest is not None and input_ids.shape[1] > longest:
        wrong.append(
            f"input_ids have length {input_ids.shape[1]}, but the model has {longest} positions; "
            "truncate them"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        wrong.append(
            f"attention_mask must have the shape of input_ids, {input_ids.shape}, got "
            f"{attention_mask.shape}"
        )
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def token_positions(
    input_ids: Int[Array, "batch length"],
    attention_mask: Num[Array, "batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
) -> Int[Array, "#batch length"]:
    """The number of each token in its text, from 0, where padding does not count.

    Example:
        >>> ids = jnp.array([[0, 5, 6, 7]])
        >>> token_positions(ids, jnp.array([[0, 1, 1, 1]])).tolist()
        [[0, 0, 1, 2]]
        >>> token_positions(ids, segments=jnp.array([[1, 1, 2, 2]])).tolist()
        [[0, 1, 0, 1]]
    """
    positions = jnp.arange(input_ids.shape[1])[None]
    if attention_mask is not None:
        positions = jnp.maximum((attention_mask != 0).cumsum(1) - 1, 0)
    if segments is None:
        return positions
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def chunks(
    positions: Int[Array, "#batch length"], segments: Int[Array, "batch length"] | None, size: int
) -> Int[Array, "batch length"]:
    """A number for each chunk of `size` tokens of each text, as `segments` are of texts.

    Example:
        >>> positions, texts = jnp.array([[0, 1, 2, 0, 1]]), jnp.array([[1, 1, 1, 2, 2]])
        >>> chunks(positions, texts, 2).tolist()
        [[0, 0, 1, 2, 2]]
    """
    number = positions // size
    begins = jnp.diff(number, axis=1, prepend=number[:, :1]) != 0
    if segments is not None:
        begins |= jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)
