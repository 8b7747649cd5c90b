"""`Prompt`: the base class of methods that act inside an attention module."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
from adapters_jax.methods.base import AttachmentPoint, Kind, Leaves, Method, zeros
from adapters_jax.methods.mixed import counting
from adapters_jax.trace.heads import Inline
from adapters_jax.trace.registry import Attention, AttentionFn

Tokens = tuple[Float[Array, "prompt kv_heads head_dim"], Float[Array, "prompt kv_heads head_dim"]]


@dataclass(frozen=True)
class Prompt(Method):
    """A method whose tokens are read by every query of an attention module.

    Besides what a `Method` needs, it has:
        tokens(leaves, point, project): the keys and values of its tokens.
        joined(leaves, context, prompt): the module's output with what the queries get from them.

    Where the module computes its attention in line, `joined` is all; where it calls an attention
    function, `attend` is run instead. A method that shares the softmax of the context needs
    `context.total`, and its own `attend`, since attention functions do not give that.

    Args:
        targets: patterns of attention modules.

    Example:
        >>> from adapters_jax.methods import LlamaAdapter, Prompt
        >>> issubclass(LlamaAdapter, Prompt), Prompt.acts_on
        (True, 'attention')
    """

    acts_on: ClassVar[Kind] = "attention"
    shares_softmax: ClassVar[bool] = False
    neutral = zeros

    @abstractmethod
    def tokens(
        self, leaves: Leaves, point: AttachmentPoint, project: Callable[[str, Array], Array]
    ) -> Tokens:
        """The keys and values of the tokens, each (K, kv_heads, head_dim).

        Args:
            leaves: the arrays by name.
            point: the attention module that they adapt.
            project: `project("key", x)` is the module's own projection of x, (K, d).
        """

    @abstractmethod
    def joined(self, leaves: Leaves, context: arrays.Attended, prompt: arrays.Attended) -> Array:
        """The module's output, (..., heads, head_dim), before its output projection."""

    def of_head(self, leaves: Leaves, head: int, key_head: int) -> Leaves:
        """The arrays of one head, for modules that compute their heads one by one.

        Args:
            leaves: the arrays of all heads.
            head: its number.
            key_head: the number of its key head.
        """
        return leaves

    def attend(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        project: Callable[[str, Array], Array],
        attention_fn: AttentionFn,
        query: Float[Array, "... length heads head_dim"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Array, "... length heads head_dim"]:
        """The output of an attention function and what comes of the tokens; see `Method.attend`."""
        mixed = attention_fn(query, *args, **kwargs)
        # Attention functions of flax scale the query themselves; what `attend_inline` gets is
        # scaled already.
        scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
        cap = kwargs.get("softcap")  # the one of this library's decoders

        def logits(scores: Array) -> Array:
            return scores if cap is None else cap * jnp.tanh(scores / cap)

        prompt = self._prompt(leaves, point, project, scaled, logits)
        # jax.nn.dot_product_attention and its like return no denominator, so only methods with a
        # softmax for the prompt alone can do with this.
        context = arrays.Attended(mixed, jnp.zeros(()))
        return self.joined(leaves, context, prompt).astype(mixed.dtype)

    def attend_inline(
        self, leaves: Leaves, point: AttachmentPoint, inline: Inline, mixed: Array
    ) -> Array:
        """What an attention in line gives, (..., heads, head_dim), and what comes of the tokens."""
        if inline.sizes.heads == 1:
            leaves = self.of_head(leaves, inline.before, inline.keys_before)
        prompt = self._prompt(leaves, point, inline.project, inline.query, inline.logits)
        total = inline.total() if self.shares_softmax else jnp.zeros(())
        return self.joined(leaves, arrays.Attended(mixed, total), prompt).astype(mixed.dtype)

    def _prompt(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        project: Callable[[str, Array], Array],
        query: Array,
        logits: Callable[[Array], Array],
    ) -> arrays.Attended:
        """What scaled queries get from the tokens, which are projected in the dtype of queries."""
        key, value = self.tokens(leaves, point, lambda n, x: project(n, x.astype(query.dtype)))
        counts = counting(point.path, key.shape[0])
        return arrays.attend_to(query, key, value, logits, point.precision, counts)


def inserted(
    prompts: Sequence[tuple[Any, Leaves, AttachmentPoint]], inline: Inline, mixed: Array
) -> Array:
    """What an attention in line gives, after methods that act in it."""
    first = lambda each: not getattr(each[0], "shares_softmax", False)  # noqa: E731
    # Methods that share the softmax come first: their share is of the context's own denominator,
    # which says nothing once another prompt has added to the output.
    for method, leaves, point in sorted(prompts, key=first):
        point = replace(point, attention=inline.sizes)
        mixed = method.attend_inline(leaves, point, inline, mixed)
    return mixed


def grouped(point: AttachmentPoint, owner: str) -> Attention:
    """The sizes at a point; raises RecipeError unless heads are a multiple of key heads."""
    sizes = point.attention
    if sizes is None:
        raise RecipeError(f"{owner} at {point.path!r}: the module computes no attention")
    if sizes.heads % sizes.kv_heads:
        raise RecipeError(
            f"{owner} at {point.path!r}: {sizes.heads} query heads, expected a multiple of the "
            f"{sizes.kv_heads} key heads; target other attention modules"
        )
    return sizes
