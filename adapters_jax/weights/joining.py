"""Several weights, some of them changed, as one changed weight: side by side, or as layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from adapters_jax.weights.changes import Change, Changed, LowRank
from adapters_jax.weights.factors import Factor
from adapters_jax.weights.quantized import is_quantized


def concatenated(pieces: Sequence[Changed], axis: int) -> Changed | None:
    """Weights one after the other along an axis; each one's changes act on its range alone.

    Returns:
        The whole; None where a change cannot act on a range alone, such as a scale.

    Example:
        >>> from adapters_jax.weights.factors import RANK
        >>> a, b = Factor(jnp.ones((4, 2)), (0, RANK)), Factor(jnp.ones((2, 3)), (RANK, 1))
        >>> pieces = Changed.of(jnp.zeros((4, 5))), Changed.of(jnp.zeros((4, 3)), [LowRank(a, b)])
        >>> concatenated(pieces, 1).formed()[0]
        Array([0., 0., 0., 0., 0., 2., 2., 2.], dtype=float32)
    """
    if all(piece.shape[axis] == 1 for piece in pieces):
        without = [n for i, n in enumerate(pieces[0].shape) if i != axis]
        flat = [piece.reshaped(without) for piece in pieces]
        layers = stacked([piece for piece in flat if piece is not None], axis)
        if None not in flat and layers is not None:
            return layers
    changes, start = list[Change](), 0
    for piece in pieces:
        for change in piece.changes:
            if not isinstance(change, LowRank) or change.start:
                return None
            if sum(axis in factor.axes for factor in change.factors) != 1:
                return None
            changes.append(replace(change, start=(axis, start)))
        start += piece.shape[axis]
    return _whole(pieces, jnp.concatenate, axis, changes)


def stacked(pieces: Sequence[Changed], axis: int) -> Changed | None:
    """Weights of one shape along a new axis, with separate factors for each index of it.

    Returns:
        The whole; None where the changes are not alike, so that their factors cannot be stacked.
    """
    shapes = [jax.tree.map(jnp.shape, piece.changes) for piece in pieces]
    if any(other != shapes[0] for other in shapes):
        return None
    changes = list[Change]()
    for alike in zip(*(piece.changes for piece in pieces), strict=True):
        moved = [change.renamed(lambda i: i + (i >= axis)) for change in alike]
        factors = [
            Factor(jnp.stack([factor.array for factor in each]), (axis, *each[0].axes))
            for each in zip(*(change.factors for change in moved), strict=True)
        ]
        changes.append(moved[0].with_factors(*factors))
    return _whole(pieces, jnp.stack, axis, changes)


def _whole(
    pieces: Sequence[Changed], join: Any, axis: int, changes: Sequence[Change]
) -> Changed | None:
    """The unchanged weights together, with these changes; None where one is packed."""
    bases = [piece.base for piece in pieces]
    if any(map(is_quantized, bases)):
        return None
    dtypes = {base.dtype for base in bases}
    if len(dtypes) > 1:
        bases = [piece.floats(piece.base) for piece in pieces]
    return replace(Changed.of(join(bases, axis=axis), changes), dtype=pieces[0].dtype)
