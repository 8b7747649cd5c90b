"""How tokens are chosen from logits, with another way for each row of a batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adapters_jax.finetune.models.generation import nucleus

TOP = 20  # of the likeliest tokens, as many as OpenAI's API shows


class Choice(NamedTuple):
    """How a row's next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; any other value divides the logits.
        top_p: sample among the fewest tokens that have this probability together, from 0 to 1.
        top_k: sample among this many of the likeliest tokens; 0 is all.
        seed: the seed of the row, a whole number of 32 bits, 0 or more.
        step: the number of tokens that the row has already.
        top: whether the log-probabilities of the likeliest tokens are wanted, 0 or 1.
        presence: is subtracted from the logits of tokens that the row has made.
        frequency: is subtracted from them once for each time.
        bias: pairs of a token and what is added to its logit. All three count before temperature.

    Example:
        >>> Choice(temperature=0.7, bias=((5, -2.0),)).marked
        True

    Reference: OpenAI's API (penalties, bias); Holtzman et al., The Curious Case of Neural Text
    Degeneration (top-p sampling, 2020), arXiv:1904.09751; Fan et al., Hierarchical Neural Story
    Generation (top-k sampling, 2018), arXiv:1805.04833.
    """

    temperature: Any = 0.0
    top_p: Any = 1.0
    top_k: Any = 0
    seed: Any = 0
    step: Any = 0
    top: Any = 0
    presence: Any = 0.0
    frequency: Any = 0.0
    bias: Any = ()

    @property
    def marked(self) -> bool:
        """Whether logits are changed by tokens."""
        return bool(self.presence or self.frequency or self.bias)

    @classmethod
    def stacked(cls, rows: Sequence["Choice"]) -> "Choice":
        """The choices of several rows, as arrays (rows,): float32, int32, and uint32 for seeds.

        The bias becomes 1 or 0: whether the row is marked.

        Args:
            rows: the choice of each row.

        Example:
            >>> Choice.stacked([Choice(), Choice(top_k=5)]).top_k.tolist()
            [0, 5]
        """
        real, whole = np.float32, np.int32
        kinds = real, real, whole, np.uint32, whole, whole, real, real, whole
        fields = zip(*(row._replace(bias=row.marked) for row in rows), strict=True)
        return cls(*(np.array(x, kind) for x, kind in zip(fields, kinds, strict=True)))


class Likely(NamedTuple):
    """The likeliest tokens at some positions, and their log-probabilities: (..., TOP)."""

    ids: Any
    logprobs: Any


class Token(NamedTuple):
    """A token that was chosen.

    Attributes:
        finite: whether the logits that it was chosen by were finite.
        logprob: its log-probability by these logits, which are the model's, before penalties, bias
            and temperature.
        top: the likeliest tokens there, if its row's choice asks for them.
        given: for the tokens that were read before it, those asked for by `following`: the
            log-probabilities of the tokens that follow them, and the likeliest tokens there.
    """

    id: Any
    finite: Any
    logprob: Any
    top: Likely
    given: tuple[Any, Likely] | None = None


class Marks(NamedTuple):
    """What changes the logits of rows, by token: (rows, vocab). Rows without marks have old values.

    Attributes:
        counts: how often the row has made the token, int32.
        bias: what is added to its logit, float32.
    """

    counts: Any
    bias: Any


def choose(
    logits: Float[Array, "rows vocab"],
    feed: Choice,
    marks: Callable[[], Marks],
    allowed: Int[Array, "rows words"],
) -> Token:
    """Chooses a token for every row, as `generate` does for a batch of one, of those allowed.

    `marks` gives those of the rows; it is only computed where some row has any.
    """

    def changed() -> Array:
        (counts, bias), token = marks(), jnp.arange(logits.shape[-1])
        change = bias - feed.presence[:, None] * (counts > 0) - feed.frequency[:, None] * counts
        marked = logits + jnp.where(feed.bias[:, None] > 0, change, 0).astype(logits.dtype)
        bits = jnp.right_shift(allowed[:, token // 32], token % 32) & 1
        return jnp.where(bits > 0, marked, -jnp.inf)

    some = (feed.bias > 0).any() | (allowed != -1).any()
    shown = jax.lax.cond(some, changed, lambda: logits)
    first = jnp.argmax(shown, axis=-1).astype(jnp.int32)

    def sample() -> Array:
        scaled = shown / jnp.where(feed.temperature > 0, feed.temperature, 1.0)[:, None]
        kept = jax.lax.cond((feed.top_k > 0).any(), lambda: _of_top_k(scaled, feed), lambda: scaled)
        kept = jax.lax.cond(
            (feed.top_p < 1).any(), lambda: nucleus(kept, feed.top_p[:, None]), lambda: kept
        )
        return jnp.where(feed.temperature > 0, jax.vmap(draw)(feed, kept), first)

    def draw(feed: Choice, kept: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(feed.seed), 0), feed.step)
        return jax.random.categorical(key, kept).astype(jnp.int32)

    chosen = jax.lax.cond((feed.temperature > 0).any(), sample, lambda: first)
    shapes = jax.eval_shape(likeliest_of, logits)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    top = jax.lax.cond((feed.top > 0).any(), lambda: likeliest_of(logits), lambda: none)
    return Token(chosen, jnp.isfinite(logits.max(-1)), logprobs_of(logits, chosen), top)


def logprobs_of(logits: Float[Array, "n vocab"], ids: Int[Array, " n"]) -> Float[Array, " n"]:
    """The log-probability of one token by each row of logits."""
    own = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def likeliest_of(logits: Float[Array, "n vocab"]) -> Likely:
    """The likeliest tokens of each row of logits, at most TOP."""
    most, ids = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return Likely(ids, most - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def _of_top_k(logits: Float[Array, "rows vocab"], feed: Choice) -> Float[Array, "rows vocab"]:
    """Keeps the likeliest logits of rows with a top_k; the others become minus infinity."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.clip(feed.top_k - 1, 0, logits.shape[-1] - 1)
    least = jnp.take_along_axis(falling, last[:, None], axis=-1)
    return jnp.where((feed.top_k[:, None] > 0) & (logits < least), -jnp.inf, logits)
