"""Prefix tuning: learned keys and values before those of the context.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves
from adapters_jax.methods.mixed import counting
from adapters_jax.methods.prompt import Prompt, Tokens, grouped
from adapters_jax.methods.settings import number, size
from adapters_jax.trace.masks import Mask, as_array
from adapters_jax.trace.registry import AttentionFn


def prefix_parameters(length: int, kv_heads: int, head_dim: int) -> int:
    """Parameters of one layer's prefix, a key and a value for each token and key head: 2Kgh.

    Args:
        length: K, tokens of the prefix.
        kv_heads: g, heads of the keys and values.
        head_dim: h, width of a head.

    Example:
        >>> prefix_parameters(20, 12, 64)
        30720
    """
    return 2 * length * kv_heads * head_dim


@dataclass(frozen=True)
class PrefixTuning(Prompt):
    """Trained keys and values that every query of an attention module reads before the context.

    One softmax runs over the prefix and the context, so that the output does not start as the
    base's: even a prefix of zeros takes a share of the attention. Keys have no rotary embedding.
    What the module does to its weights after the softmax, as dropout does, leaves out the prefix.
    The prefix is trained directly, without the paper's reparametrisation by an MLP.
    Leaves are float32, (K, kv_heads, head_dim) each, and are cast to the dtypes of the module's
    keys and values.

    Args:
        targets: patterns of attention modules.
        length: K, tokens of the prefix.
        init_std: standard deviation of keys and values.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> PrefixTuning("**/attention", length=20)
        PrefixTuning(targets=('**/attention',), length=20, init_std=0.02)
    """

    kind: ClassVar[str] = "prefix"
    slot: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "2101.00190"
    leaf_names: ClassVar[tuple[str, ...]] = ("key", "value")  # type: ignore[misc]
    shares_softmax: ClassVar[bool] = True
    size_fields: ClassVar[tuple[str, ...]] = ("length", "init_std")
    unmergeable: ClassVar[str] = "its keys and values are a context, not a change of a weight"

    targets: str | tuple[str, ...]
    length: int = size(20)
    init_std: float = number(0.02, closed=True)

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """Keys and values, each (K, kv_heads, head_dim)."""
        sizes = grouped(point, "PrefixTuning")
        shape = (self.length, sizes.kv_heads, sizes.head_dim)
        # Zeros would be a saddle: queries would see no difference between tokens, and all of them
        # would learn the same.
        return {name: Leaf(shape, arrays.normal(self.init_std)) for name in self.leaf_names}

    def size(self, leaves: Leaves) -> int:
        """The number of tokens."""
        return leaves["key"].shape[-3]

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form 2Kgh; key heads g and their width h are the leaves', K the recipe's."""
        *copies, _, heads, width = shapes["key"]
        return Count(
            f"2*{self.length}*{heads}*{width}",
            prefix_parameters(self.length, heads, width),
            math.prod(copies),
        )

    def tokens(
        self, leaves: Leaves, point: AttachmentPoint, project: Callable[[str, Array], Array]
    ) -> Tokens:
        """The trained keys and values, each (K, kv_heads, head_dim)."""
        return leaves["key"], leaves["value"]

    def of_head(self, leaves: Leaves, head: int, key_head: int) -> Leaves:
        """The keys and values of one head."""
        return {name: x[:, key_head : key_head + 1] for name, x in leaves.items()}

    def joined(self, leaves: Leaves, context: arrays.Attended, prompt: arrays.Attended) -> Array:
        """The output of one softmax over the prefix and the context."""
        # exp(p) / (exp(p) + exp(c)) for the totals p and c, without an overflow of either.
        share = jax.nn.sigmoid(prompt.total - context.total)[..., None]
        mixed = (1 - share) * context.output.astype(jnp.float32) + share * prompt.output
        return mixed.astype(context.output.dtype)

    def attend(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        project: Callable[[str, Array], Array],
        attention_fn: AttentionFn,
        query: Float[Array, "... length heads head_dim"],
        key: Float[Array, "... context kv_heads head_dim"],
        value: Float[Array, "... context kv_heads head_dim"],
        bias: Array | None = None,
        mask: Mask | Array | None = None,
        **kwargs: Any,
    ) -> Float[Array, "... length heads head_dim"]:
        """The attention's output over the prefix and the context.

        Args: as in `Method.attend`; `mask` and `bias` cover the context without the prefix.

        Raises:
            RecipeError: `is_causal=True`, since the function would then mask the prefix too.
        """
        if kwargs.get("is_causal"):
            raise RecipeError(
                f"PrefixTuning at {point.path!r}: is_causal=True would hide the prefix; give the "
                "module a causal mask instead"
            )

        def longer(context: Array, prefix: Array) -> Array:
            # Attention functions expect keys of every row, though all rows have the same prefix.
            tokens = jnp.broadcast_to(prefix, (*context.shape[:-3], *prefix.shape))
            return jnp.concatenate([tokens.astype(context.dtype), context], axis=-3)

        def padded(rows: Array | None, prefix: Any) -> Array | None:
            if rows is None:
                return None
            rows = jnp.broadcast_to(rows, (*rows.shape[:-1], key.shape[-3]))
            front = jnp.broadcast_to(prefix, (*rows.shape[:-1], self.length))
            return jnp.concatenate([front.astype(rows.dtype), rows], axis=-1)

        counts = counting(point.path, self.length)
        if counts is not None:
            # A number of tokens that differs by row is an array, which masks by rule cannot hold.
            mask = as_array(mask, query, key)
            mask = jnp.ones((1,) * query.ndim, bool) if mask is None else mask
        seen: Mask | Array | None = (
            mask.with_prefix(self.length)
            if isinstance(mask, Mask)
            else padded(mask, True if counts is None else counts)
        )
        limits = {"bias": padded(bias, 0.0), "mask": seen}
        kwargs |= {name: limit for name, limit in limits.items() if limit is not None}
        key, value = longer(key, leaves["key"]), longer(value, leaves["value"])
        return attention_fn(query, key, value, **kwargs)
