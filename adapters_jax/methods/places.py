"""Places: which positions of a call are tokens, and how many of their text are around each one.

A method on an output sees an array of positions, and neither padding, nor texts packed into a row,
nor what a cache holds. Models say it around their layers: `with known_tokens(mask): ...`.
"""

from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from adapters_jax.errors import RecipeError
from adapters_jax.trace.through import holding

Counts = Int[Array, "#batch length"]


@dataclass(frozen=True)
class Places:
    """The places of the positions of a call.

    Attributes:
        tokens: which positions are tokens.
        before: how many tokens of its text come before each position.
        after: how many come after it; None where a cache goes on, so that nobody knows.
    """

    tokens: Bool[Array, "#batch length"]
    before: Counts
    after: Counts | None


# Between a model's call and the methods in it lie modules of others, whose calls take no argument
# of ours. True: what positions the arrays have are the places.
_PLACES: ContextVar[Places | bool] = ContextVar("places", default=False)


def places() -> Places | bool:
    """What is said of the call: True for arrays that are whole texts, False where nothing is."""
    return _PLACES.get()


def ends(
    y: Num[Array, "*batch length d"], first: int, last: int, where: str
) -> tuple[Bool[Array, "*batch length"], Bool[Array, "*batch length"]]:
    """Which positions of an output are among the first tokens of their text, and the last ones.

    Args:
        first, last: how many are meant of each.
        where: the method and its module, for messages.

    Raises:
        RecipeError: the output is not of the call's tokens, or nobody knows which are the last.
    """
    known = _places_of(y, where)
    if known.after is None and last:
        raise RecipeError(
            f"{where}: the last tokens, {last} of each text, are not known in a pass with a cache; "
            "call the model on whole texts, or train with first tokens alone"
        )
    front = known.tokens & (known.before < first)
    return front, front if known.after is None else known.tokens & (known.after < last)


def _places_of(y: Num[Array, "*batch length d"], where: str) -> Places:
    """The places of the positions of an output."""
    known, length = places(), y.shape[-2] if y.ndim > 1 else 0
    if length < 2 and known is False:
        raise RecipeError(
            f"{where}: the output is {list(y.shape)}, expected (..., length, d). If it is one "
            "token, a step of a generation or a whole text, the model has to say which: with "
            "methods.known_tokens(mask, before=...) or methods.known_tokens()"
        )
    if isinstance(known, bool):
        n = jnp.arange(length)
        return Places(n >= 0, n, length - 1 - n)
    real = known.tokens
    if y.ndim != 3 or real.shape[1] != length or real.shape[0] not in (1, len(y)):
        raise RecipeError(
            f"{where}: the output is {list(y.shape)}, and the call has {list(real.shape)} tokens; "
            "target modules that return an array of (batch, length, d)"
        )
    return known


def known_tokens(
    mask: Num[Array, "batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
    *,
    before: Counts | None = None,
) -> AbstractContextManager[None]:
    """What the methods in the body know of the positions of their arrays.

    Enter it in the function that jax compiles, as its arrays are part of the program. A part of the
    model that is compiled by itself, as by `nnx.jit` inside of it, keeps those of its first call.

    Args:
        mask: 1 for tokens and 0 for padding, on either side; None: all are tokens.
        segments: the number of each position's text, where a row has several.
        before: in a pass that a cache goes before or after, the number of tokens before each one.

    Example:
        >>> with known_tokens(jnp.array([[0, 1, 1, 1]])):
        ...     places().before.tolist(), places().after.tolist()
        ([[0, 0, 1, 2]], [[3, 2, 1, 0]])
    """
    found: Places | bool = True
    given = next((x for x in (mask, segments, before) if x is not None), None)
    if given is not None:
        real = jnp.ones(given.shape, bool) if mask is None else mask != 0
        if before is not None:
            found = Places(real, before, None)
        else:
            found = Places(real, _before(real, segments), _after(real, segments))
    return holding(_PLACES, found)


def known_part(axis: int, start: int, end: int, length: int) -> AbstractContextManager[None]:
    """In its body, the places are those of some of the rows (axis 0) or of the positions (1).

    Args:
        axis: which of both.
        start, end: the part.
        length: the size of the whole axis.
    """
    known, at = places(), (slice(None),) * axis + (slice(start, end),)
    if axis and not isinstance(known, Places):
        n = jnp.arange(length)[None]
        known = Places(n >= 0, n, length - 1 - n)
    if isinstance(known, Places):
        tokens, before, after = (
            x if x is None or len(x) == 1 > axis else x[at]
            for x in (known.tokens, known.before, known.after)
        )
        known = Places(tokens, before, after)  # type: ignore[arg-type]
    return holding(_PLACES, known)


def _before(real: Bool[Array, "batch length"], segments: Array | None) -> Counts:
    """How many tokens of the same text come before each position."""
    counts = real.cumsum(1, dtype=jnp.int32) - real
    if segments is None:
        return counts
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    return counts - jax.lax.cummax(jnp.where(begins, counts, 0), axis=1)


def _after(real: Bool[Array, "batch length"], segments: Array | None) -> Counts:
    """How many tokens of the same text come after each position."""
    mirrored = None if segments is None else segments[:, ::-1]
    return _before(real[:, ::-1], mirrored)[:, ::-1]
