"""Where in a text adapters act that are invoked there, as `ActivatedLoRA`; what calls say of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from adapters_jax.errors import RecipeError, UserError, shown
from adapters_jax.methods.base import Method
from adapters_jax.trace.inputs import Inputs


def checked_tokens(owner: str, value: Any) -> tuple[int, ...]:
    """Checked ids of one or more tokens."""
    ids = np.asarray(value, object)
    if ids.ndim != 1 or not ids.size or any(not _is_token(x) for x in ids):
        raise UserError(
            f"{owner}: invocation={shown(value)}, expected the ids of its tokens, such as (49152, "
            "1598)"
        )
    return tuple(map(int, ids))


def _is_token(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(0 <= x < 2**31)


def invoked(
    ids: Int[Array, "*batch length"],
    invocation: Sequence[int] | Sequence[Sequence[int] | None],
    segments: Int[Array, "*batch length"] | None = None,
) -> Bool[Array, "*batch length"]:
    """Which tokens are those from the last invocation on, for `invoked=` in calls of a model.

    Args:
        ids: the tokens, padded on either side.
        invocation: the tokens of an `ActivatedLoRA`, its `invocation`; or for each row those of its
            adapter, None for one that acts on all of its tokens.
        segments: the number of each token's text, where a row has several, one behind another.

    Returns:
        False before the last invocation of a text, and in texts without one. Its last entry is
        right for the tokens that a generation makes after these.

    Raises:
        UserError: these are no tokens, or of another number of rows.

    Example:
        >>> invoked(jnp.asarray([[5, 7, 8, 1], [1, 1, 1, 7]]), (7, 8)).astype(int).tolist()
        [[0, 1, 1, 1], [0, 0, 0, 0]]
        >>> invoked(jnp.asarray([[5, 7], [5, 7]]), [(7,), None]).astype(int).tolist()
        [[0, 1], [1, 1]]
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or not ids.ndim:
        raise UserError(
            f"invoked: ids are {ids.dtype}{list(ids.shape)}, expected the ids of tokens, "
            "(batch, length)"
        )
    one = jnp.zeros(ids.shape, jnp.int32) if segments is None else jnp.asarray(segments)
    if not any(x is None or isinstance(x, Sequence) for x in invocation):
        return _from_last(ids, checked_tokens("invoked", invocation), one)
    if ids.ndim != 2 or len(ids) != len(invocation):
        raise UserError(
            f"invoked: there are the invocations of {len(invocation)} rows, and ids of "
            f"{list(ids.shape)}"
        )
    each = [
        jnp.ones(len(row), bool)
        if own is None
        else _from_last(row, checked_tokens("invoked", own), text)
        for row, own, text in zip(ids, invocation, one, strict=True)
    ]
    return jnp.stack(each)


def _from_last(ids: Array, tokens: tuple[int, ...], segments: Array) -> Array:
    """Which tokens do not come before the last of these sequences in their segment."""
    length = ids.shape[-1]
    n = length - len(tokens) + 1
    starts = jnp.zeros(ids.shape, bool)
    if n > 0:
        parts = [
            (ids[..., i : i + n] == token) & (segments[..., i : i + n] == segments[..., :n])
            for i, token in enumerate(tokens)
        ]
        starts = starts.at[..., :n].set(jnp.stack(parts).all(0))
    edge = segments[..., 1:] != segments[..., :-1]
    one, places, axis = jnp.ones((*ids.shape[:-1], 1), bool), jnp.arange(length), ids.ndim - 1
    first = jnp.where(jnp.concatenate([one, edge], -1), places, 0)
    last = jnp.where(jnp.concatenate([edge, one], -1), places, length)
    first, last = jax.lax.cummax(first, axis), jax.lax.cummin(last, axis, reverse=True)
    counts = jnp.cumsum(starts, -1)
    before = jnp.take_along_axis(counts - starts, first, -1)
    whole = jnp.take_along_axis(counts, last, -1)
    return (counts == whole) & (whole > before)


def start_of(ids: Sequence[int], tokens: tuple[int, ...] | None) -> int:
    """The first token of a text that an adapter acts on; the text's length where it has none.

    Args:
        tokens: the adapter's invocation; None for one that acts on all tokens.

    Example:
        >>> start_of([7, 8, 1, 7, 8], (7, 8)), start_of([7, 8], (8, 7)), start_of([7, 8], None)
        (3, 2, 0)
    """
    if tokens is None:
        return 0
    starts = range(len(ids) - len(tokens), -1, -1)
    return next((i for i in starts if tuple(ids[i : i + len(tokens)]) == tokens), len(ids))


def from_invocation(methods: Iterable[Method], ids: Any, segments: Any = None) -> dict[str, Array]:
    """What a call of a model with some methods takes beside its tokens: `invoked`, or nothing.

    Raises:
        RecipeError: methods have different invocations.
    """
    tokens = _tokens_of(methods)
    return {} if tokens is None else {"invoked": invoked(ids, tokens, segments)}


def _tokens_of(methods: Iterable[Method]) -> tuple[int, ...] | None:
    """The invocation of some methods; None where none has one."""
    found: set[Any] = {getattr(method, "invocation", ()) for method in methods if method.gated}
    if len(found) > 1:
        raise RecipeError(
            f"the recipe has the invocations {' and '.join(map(str, sorted(found)))}, and a call "
            "says for all of its methods where they act; write one for all"
        )
    return next(iter(found), None)


def call_gate(methods: Iterable[Method], given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a call says of where methods act, and its other arguments.

    Args:
        given: the call's keyword arguments.

    Raises:
        UserError: it is not whether or where an adapter is invoked.
        RecipeError: methods have different invocations.
    """
    if "invoked" not in given or _tokens_of(methods) is None:
        return None, dict(given)
    rest = dict(given)
    gate = rest.pop("invoked")
    if not isinstance(gate, bool) and getattr(gate, "dtype", None) != jnp.bool_:
        raise UserError(
            f"invoked={shown(gate)}, expected an array of true and false; write "
            "invoked=aj.invoked(ids, tokens), or True for all tokens"
        )
    return jnp.asarray(gate), rest


def everywhere(methods: Iterable[Method], inputs: Inputs) -> Inputs:
    """Inputs of an abstract run, where methods act on all tokens unless the inputs say which."""
    if not any(method.gated for method in methods):
        return inputs
    return Inputs(inputs.args, {"invoked": True, **inputs.kwargs}, inputs.method)
