"""`Prompt`: the base class of methods that act inside an attention module."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import AttachmentPoint, Kind, Leaves, Method, zeros_like
from adapters_jax.methods.mixed import counting
from adapters_jax.trace.heads import Inline
from adapters_jax.trace.registry import Attention, AttentionFn

Tokens = tuple[Float[Array, "prompt kv_heads head_dim"], Float[Array, "prompt kv_heads head_dim"]]


class Attended(NamedTuple):
    """What queries get from some keys and values.

    Attributes:
        output: softmax(logits) v, (..., heads, head_dim).
        total: the logarithm of the sum of the exponentials of the logits, (..., heads), float32.
    """

    output: Array
    total: Array


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
    def joined(self, leaves: Leaves, context: Attended, prompt: Attended) -> Array:
        """The module's output, (..., heads, head_dim), before its output projection."""

    def of_head(self, leaves: Leaves, head: int, key_head: int) -> Leaves:
        """The arrays of one head, for modules that compute their heads one by one.

        Args:
            leaves: the arrays of all heads.
            head: its number.
            key_head: the number of its key head.
        """
        return leaves

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """Zeros; a bank gives rows without an adapter a prompt of no tokens."""
        return zeros_like(leaves)

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
        return self.joined(leaves, Attended(mixed, jnp.zeros(())), prompt).astype(mixed.dtype)

    def attend_inline(
        self, leaves: Leaves, point: AttachmentPoint, inline: Inline, mixed: Array
    ) -> Array:
        """What an attention in line gives, (..., heads, head_dim), and what comes of the tokens."""
        if inline.sizes.heads == 1:
            leaves = self.of_head(leaves, inline.before, inline.keys_before)
        prompt = self._prompt(leaves, point, inline.project, inline.query, inline.logits)
        total = inline.total() if self.shares_softmax else jnp.zeros(())
        return self.joined(leaves, Attended(mixed, total), prompt).astype(mixed.dtype)

    def _prompt(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        project: Callable[[str, Array], Array],
        query: Array,
        logits: Callable[[Array], Array],
    ) -> Attended:
        """What scaled queries get from the tokens, which are projected in the dtype of queries."""
        key, value = self.tokens(leaves, point, lambda n, x: project(n, x.astype(query.dtype)))
        counts = counting(point.path, key.shape[0])
        return attend_to(query, key, value, logits, point.precision, counts)


def attend_to(
    query: Float[Array, "... heads head_dim"],
    key: Float[Array, "prompt kv_heads head_dim"],
    value: Float[Array, "prompt kv_heads head_dim"],
    logits: Callable[[Array], Array],
    precision: Any = None,
    counts: Bool[Array, " prompt"] | None = None,
) -> Attended:
    """What queries get from a prompt, without a mask.

    Args:
        query: query head i reads key head i // (heads / kv_heads).
        key: the keys.
        value: the values.
        logits: the logits of products of queries and keys, float32.
        precision: as in `jnp.einsum`.
        counts: which tokens count; None for all.
    """
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    # Query heads are grouped by their key head, so that keys are not repeated in memory.
    groups = query.reshape(*query.shape[:-2], key.shape[1], -1, query.shape[-1])
    products = jnp.einsum("...kgh,pkh->...kgp", groups, key, precision=precision)
    # A softmax over bfloat16 logits loses the differences between near ones.
    scores = logits(products.astype(jnp.float32))
    if counts is not None:  # a finite number, since there may be no token that counts
        scores = jnp.where(counts, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores).astype(query.dtype)
    output = jnp.einsum("...kgp,pkh->...kgh", weights, value, precision=precision)
    total = jax.scipy.special.logsumexp(scores, axis=-1).reshape(query.shape[:-1])
    return Attended(output.reshape(query.shape), total)


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
