"""Losses over a vocabulary that never hold all logits.

The logits of a long batch are its largest array: 4 x 4096 tokens over 128,256 words are 8 GB in
float32, and their gradient is as large. Here they are made for one chunk of tokens at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import TraceContextError
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from adapters_jax.errors import UserError, check_size
from adapters_jax.weights.meshes import gathered

Head = Callable[..., Array]
Rows = tuple[Array, Array, Array]  # hidden states, labels, weights; the chunks on the first axis

TOKENS = 1024  # in a chunk, over all rows, by default


def cross_entropy(
    hidden: Float[Array, "batch length d"],
    head: Callable[[Float[Array, "batch chunk d"]], Float[Array, "batch chunk vocab"]],
    labels: Int[Array, "batch length"],
    weights: Float[Array, "batch length"] | None = None,
    *,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """The cross-entropy of tokens, from hidden states, with the logits of one chunk at a time.

    It equals `sum(weights * softmax_cross_entropy(head(hidden), labels))` to rounding, in value and
    gradients, and costs the same FLOPs: the gradients of a chunk are computed together with its
    loss, while its logits are there. Under `jax.vmap` it gives a loss for each row.

    Args:
        hidden: the last hidden states.
        head: computes logits of hidden states, each token by itself: `model.logits` of a decoder
            here, or any function. It may be tied to the embeddings, adapted, soft-capped, or split
            over devices by its vocabulary; whatever trains in it gets its gradient.
        labels: the next token of each position. Negative labels count nothing.
        weights: of each token. By default all are 1 / n for the n labels that count, so that the
            loss is their mean, and 0 where there are none.
        chunk: the number of positions, in every row, whose logits are held at once. By default as
            many as give 1,024 tokens over all rows.

    Returns:
        The loss, in float32 at least.

    Raises:
        UserError: shapes or dtypes do not fit, `chunk` is not a positive whole number, or the head
            draws dropout, which would have to differ from chunk to chunk.

    Example:
        >>> hidden, table = jnp.ones((2, 5, 4)), jnp.zeros((4, 8))
        >>> labels = jnp.array([[3, 1, 2, 0, -1]] * 2)
        >>> loss = cross_entropy(hidden, lambda x: x @ table, labels, chunk=2)
        >>> round(float(loss), 4), round(float(jnp.log(8)), 4)
        (2.0794, 2.0794)
    """
    _check(hidden, labels, weights)
    counted = labels >= 0
    if weights is None:
        weights = jnp.broadcast_to(1.0 / jnp.maximum(counted.sum(), 1), labels.shape)
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, weights.dtype), jnp.float32)
    weights = jnp.where(counted, weights.astype(wide), 0.0)
    parts = -(-labels.shape[1] // _chunk("cross_entropy", labels, chunk))
    if parts <= 1:
        return _loss(head, hidden, labels, weights)
    pure, held = _pure("cross_entropy", head, hidden, parts)
    # Gradients of weights near one stay in float16's range, as they would under a loss scale.
    largest = jax.lax.stop_gradient(jnp.abs(weights).max())
    largest = jnp.where(largest > 0, largest, 1.0)
    rows = tuple(_split(x, parts) for x in (hidden, labels, weights / largest))
    return largest * _total(pure, rows, held)


def sequence_log_probs(
    hidden: Float[Array, "batch length d"],
    head: Callable[[Float[Array, "batch chunk d"]], Float[Array, "batch chunk vocab"]],
    labels: Int[Array, "batch length"],
    *,
    chunk: int | None = None,
) -> Float[Array, " batch"]:
    """The log-probability of each sequence, the sum over its tokens, by `cross_entropy`.

    The logits of one chunk are held at a time, and gradients are exact. Where the head itself
    trains, its gradient is held once for each sequence until they are added up.

    Args:
        hidden: the last hidden states.
        head: computes logits of hidden states, as for `cross_entropy`.
        labels: the next token of each position. Negative labels, as those of a prompt, count
            nothing.
        chunk: the number of positions, in every sequence, whose logits are held at once; as for
            `cross_entropy`.

    Returns:
        The log-probabilities, in float32 at least; 0 for a sequence without labels that count.

    Raises:
        UserError: as for `cross_entropy`.

    Example:
        >>> hidden, table = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
        >>> labels = jnp.array([[-1, 1, 2], [-1, -1, 5]])
        >>> found = sequence_log_probs(hidden, lambda x: x @ table, labels, chunk=2)
        >>> (found / jnp.log(8)).round(4).tolist()
        [-2.0, -1.0]
    """
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    _check(hidden, labels, None)
    chunk = _chunk("sequence_log_probs", labels, chunk)
    weights = (labels >= 0).astype(jnp.promote_types(hidden.dtype, jnp.float32))
    if chunk >= labels.shape[1]:
        return -_losses(head, hidden, labels, weights).sum(-1)

    # A row at a time under vmap, since `cross_entropy` adds up all of its tokens.
    def one(*row: Array) -> Array:
        hidden, labels, weights = (x[None] for x in row)
        return -cross_entropy(hidden, head, labels, weights, chunk=chunk)

    return jax.vmap(one)(hidden, labels, weights)


def token_log_probs(
    hidden: Float[Array, "batch length d"],
    head: Callable[[Float[Array, "batch chunk d"]], Float[Array, "batch chunk vocab"]],
    labels: Int[Array, "batch length"],
    *,
    chunk: int | None = None,
) -> Float[Array, "batch length"]:
    """The log-probability of each token, for losses of any form, with few logits at a time.

    The logits of one chunk are held at a time, and gradients are exact. Those by the hidden states
    are computed together with the log-probabilities; those by the head, where it trains, take its
    logits once more.

    Args:
        hidden, head, labels, chunk: as in `sequence_log_probs`.

    Returns:
        The log-probabilities, in float32 at least; 0 for labels that do not count.

    Raises:
        UserError: as for `cross_entropy`.

    Example:
        >>> hidden, table = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
        >>> labels = jnp.array([[3, 1, 2], [-1, -1, 5]])
        >>> found = token_log_probs(hidden, lambda x: x @ table, labels, chunk=2)
        >>> (found / jnp.log(8)).round(4).tolist()
        [[-1.0, -1.0, -1.0], [0.0, 0.0, -1.0]]
    """
    _check(hidden, labels, None)
    batch, length = labels.shape
    parts = -(-length // _chunk("token_log_probs", labels, chunk))
    pure, held = _pure("token_log_probs", head, hidden, parts)
    found = _log_probs(pure, _split(hidden, parts), _split(labels, parts, -1), held)
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :length]


def _chunk(caller: str, labels: Array, given: int | None) -> int:
    """The positions in every row whose logits are held at once: as given, or for `TOKENS`."""
    chunk = max(1, -(-TOKENS // max(len(labels), 1))) if given is None else given
    check_size(caller, "chunk", chunk)
    return chunk


def _check(hidden: Any, labels: Any, weights: Any) -> None:
    """Raises UserError unless the arrays fit each other."""
    wrong = []
    if jnp.ndim(hidden) != 3 or not jnp.issubdtype(hidden.dtype, jnp.floating):
        wrong.append(
            f"hidden must be floats of shape (batch, length, d), got {jnp.shape(hidden)} of "
            f"{hidden.dtype}"
        )
    elif labels.shape != hidden.shape[:2] or not jnp.issubdtype(labels.dtype, jnp.integer):
        wrong.append(
            f"labels must be whole numbers of shape {hidden.shape[:2]}, as hidden has, got "
            f"{labels.shape} of {labels.dtype}"
        )
    elif weights is not None and weights.shape != labels.shape:
        wrong.append(f"weights must have the shape of labels, {labels.shape}, got {weights.shape}")
    if wrong:
        raise UserError(f"cross_entropy: {wrong[0]}")


def _split(x: Array, parts: int, fill: int = 0) -> Array:
    """An array (batch, length, ...) as (parts, batch, size, ...), padded to equal parts."""
    batch, length = x.shape[:2]
    size = -(-length // parts)  # the parts are nearly equal, so that little is padded
    padding = [(0, 0), (0, parts * size - length), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, parts, size, *x.shape[2:]), 1, 0)


def _pure(caller: str, head: Head, hidden: Array, parts: int) -> tuple[Head, tuple[Array, ...]]:
    """A head as a function of the arrays that it reads, and these."""
    batch, length, width = hidden.shape
    part = jax.ShapeDtypeStruct((batch, -(-length // parts), width), hidden.dtype)
    try:
        # custom_vjp differentiates arguments alone, and a head holds its weights in its closure:
        # closure_convert makes them arguments.
        pure, held = jax.closure_convert(head, part)
    except TraceContextError as error:
        raise UserError(
            f"{caller}: the head changes a state of the model, as dropout does, which cannot "
            "be done chunk by chunk; leave dropout out of the head's recipe, or write "
            f"chunk={length} to hold all logits at once"
        ) from error
    return pure, tuple(held)


def _loss(head: Head, hidden: Array, labels: Array, weights: Array, *held: Array) -> Array:
    """The weighted sum of the losses of some tokens, with all their logits."""
    return _losses(head, hidden, labels, weights, *held).sum()


def _losses(head: Head, hidden: Array, labels: Array, weights: Array, *held: Array) -> Array:
    """The weighted loss of each token."""
    logits = head(hidden, *held).astype(weights.dtype)
    # A sum over the vocabulary, unlike an index, stays apart where the vocabulary is split.
    mine = labels[..., None] == jnp.arange(logits.shape[-1])
    own = jnp.where(mine, logits, 0.0).sum(-1)
    return weights * (jax.nn.logsumexp(logits, -1) - own)


# jax would save every chunk's logits for the backward pass of this scan. So the gradients of a
# chunk are computed together with its loss, and are all that is saved.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(head: Head, rows: Rows, held: tuple[Array, ...]) -> Array:
    """The loss of all chunks; `held` are the arrays that the head reads."""

    whole = list(map(gathered, held))

    def add(total: Array, part: Rows) -> tuple[Array, None]:
        return total + _loss(head, *part, *whole), None

    return jax.lax.scan(add, jnp.zeros((), rows[2].dtype), rows)[0]


def _total_with_gradients(head: Head, rows: Any, held: Any) -> tuple[Array, Any]:
    """The loss, and its gradients by whatever is differentiated."""
    marked = [*rows, *held]
    # What trains stays split, as do the sums of its gradients.
    values: list[Any] = [x.value for x in rows]
    values += [x.value if x.perturbed else gathered(x.value) for x in held]
    trained = [i for i, x in enumerate(marked) if x.perturbed]
    by_row, by_head = [i for i in trained if i < 3], [i for i in trained if i >= 3]

    def loss(trained: dict[int, Array], part: Rows) -> Array:
        given = dict(enumerate([*part, *values[3:]])) | trained
        return _loss(head, *(given[i] for i in range(len(values))))

    def add(carry: Any, part: Rows) -> tuple[Any, Any]:
        total, sums = carry
        moving = {i: part[i] for i in by_row} | {i: values[i] for i in by_head}
        found, grads = jax.value_and_grad(loss)(moving, part)
        sums = {i: sums[i] + grads[i].astype(sums[i].dtype) for i in by_head}
        return (total + found, sums), {i: grads[i] for i in by_row}

    # Sums over many chunks in bfloat16 would stop growing.
    wide = {i: jnp.promote_types(values[i].dtype, jnp.float32) for i in by_head}
    zeros = {i: jnp.zeros(values[i].shape, wide[i]) for i in by_head}
    start = jnp.zeros((), values[2].dtype), zeros
    (total, sums), grads = jax.lax.scan(add, start, tuple(values[:3]))
    # Residuals are arrays; a scalar of each dtype says what the gradients have to be.
    kinds = [jnp.zeros((), x.dtype) for x in values]
    return total, (kinds, [(grads | sums).get(i) for i in range(len(values))])


def _gradients(head: Head, kept: Any, change: Any) -> Any:
    """The gradients, times that of the loss."""
    kinds, grads = kept
    # Nothing depends on the loss, as in a part of a program that is not used.
    if isinstance(change, SymbolicZero):
        change = jnp.zeros(change.shape, change.dtype)
    scaled = [
        None if g is None else (change * g).astype(kind.dtype)
        for kind, g in zip(kinds, grads, strict=True)
    ]
    return tuple(scaled[:3]), tuple(scaled[3:])


# Symbolic zeros tell which arguments are differentiated: a frozen head of 500 million weights needs
# no sum of gradients.
_total.defvjp(_total_with_gradients, _gradients, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(head: Head, hidden: Array, labels: Array, held: tuple[Array, ...]) -> Array:
    """The log-probabilities of all chunks; `held` are the arrays that the head reads."""
    whole = tuple(map(gathered, held))
    return jax.lax.map(lambda part: _of_chunk(head, part[0], part[1], whole), (hidden, labels))


def _of_chunk(head: Head, hidden: Array, labels: Array, held: tuple[Array, ...]) -> Array:
    """The log-probabilities of one chunk."""
    counts = (labels >= 0).astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return 0.0 - _losses(head, hidden, labels, counts, *held)


def _log_probs_with_gradients(head: Head, hidden: Any, labels: Any, held: Any) -> Any:
    """The log-probabilities, and what their gradients need."""
    values = tuple(x.value if x.perturbed else gathered(x.value) for x in held)

    def one(part: tuple[Array, Array]) -> Any:
        if not hidden.perturbed:
            return _of_chunk(head, part[0], part[1], values), None
        found, pull = jax.vjp(lambda x: _of_chunk(head, x, part[1], values), part[0])
        # A token's log-probability depends on its own hidden state alone, so that one pass backward
        # gives the gradients of all of them.
        return found, pull(jnp.ones_like(found))[0]

    found, grads = jax.lax.map(one, (hidden.value, labels.value))
    trained = [x.value if x.perturbed else None for x in held]
    rest = [None if x.perturbed else x.value for x in held]
    again = (hidden.value, labels.value) if any(x.perturbed for x in held) else None
    return found, (grads, again, trained, rest)


def _log_probs_gradients(head: Head, kept: Any, change: Any) -> Any:
    """The gradients by the hidden states and by what trains in the head."""
    by_hidden, again, trained, rest = kept
    if isinstance(change, SymbolicZero):
        change = jnp.zeros(change.shape, change.dtype)
    if by_hidden is not None:
        by_hidden = (change[..., None] * by_hidden).astype(by_hidden.dtype)
    if again is None:
        return by_hidden, None, tuple(None for _ in trained)
    moving = {i: x for i, x in enumerate(trained) if x is not None}

    def add(sums: dict[int, Array], part: Any) -> tuple[dict[int, Array], None]:
        hidden, labels, change = part

        def found(moving: dict[int, Array]) -> Array:
            held = tuple(moving.get(i, x) for i, x in enumerate(rest))
            return _of_chunk(head, hidden, labels, held)

        (grads,) = jax.vjp(found, moving)[1](change)
        return {i: sums[i] + grads[i].astype(sums[i].dtype) for i in sums}, None

    # Sums over many chunks in bfloat16 would stop growing.
    wide = {i: jnp.promote_types(x.dtype, jnp.float32) for i, x in moving.items()}
    zeros = {i: jnp.zeros(x.shape, wide[i]) for i, x in moving.items()}
    sums, _ = jax.lax.scan(add, zeros, (*again, change))
    held = tuple(None if x is None else sums[i].astype(x.dtype) for i, x in enumerate(trained))
    return by_hidden, None, held


_log_probs.defvjp(_log_probs_with_gradients, _log_probs_gradients, symbolic_zeros=True)
