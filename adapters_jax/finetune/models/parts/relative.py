"""Relative positions: ALiBi, and groups, so that few biases or embeddings serve any length.

T5 and DeBERTa group them differently, and round differently at the edge of a group.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Places(NamedTuple):
    """The positions of queries and of keys, each counted from the start of its text."""

    queries: Int[Array, "#batch length"]
    keys: Int[Array, "#batch keys"]


def alibi(places: Places, heads: int) -> Float[Array, "#batch heads length keys"]:
    """The bias of ALiBi: a key's distance before the query, times the slope of the head.

    Example:
        >>> each = jnp.arange(3)[None]
        >>> alibi(Places(each, each), 8)[0, 0, 2].tolist()
        [-1.0, -0.5, 0.0]

    Reference: Press et al., Train short, test long (2021), https://arxiv.org/abs/2108.12409
    """
    distance = places.keys[:, None, None, :] - places.queries[:, None, :, None]
    return jnp.asarray(_slopes(heads), jnp.float32)[:, None, None] * distance


def _slopes(heads: int) -> Float[np.ndarray, " heads"]:
    """Powers of a root of two; heads beyond a power of two have every other slope of the next.

    Example:
        >>> _slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    further = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([first, further])


def relative_buckets(
    distance: Int[Array, "*batch"], causal: bool, buckets: int, farthest: int
) -> Int[Array, "*batch"]:
    """The group of each distance, from 0 on.

    Half of the groups are of one distance each, the others of ranges that grow with the logarithm
    of the distance up to `farthest`; the last one holds all distances beyond.

    Args:
        distance: the position of a key less that of the query.
        causal: whether keys after the query, which it does not see, share the group of distance 0.
            Otherwise half of the groups are for keys before the query, half for those after it.
        buckets: the number of groups.
        farthest: the distance from which on all are of one group.

    Example:
        >>> relative_buckets(jnp.array([-9, -1, 0, 1, 9]), False, buckets=8, farthest=16).tolist()
        [3, 1, 0, 5, 7]
        >>> relative_buckets(jnp.array([-9, -1, 0, 1, 9]), True, buckets=8, farthest=16).tolist()
        [6, 1, 0, 0, 0]

    Reference: Raffel et al. (2020), section 2.1, https://arxiv.org/abs/1910.10683
    """
    after = jnp.zeros_like(distance)
    if causal:
        distance = jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        after, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    ranges = buckets - exact
    # The least distance of each group but the first, in whole numbers, which no device rounds.
    least = [*range(1, exact + 1), *(_start(i, ranges, exact, farthest) for i in range(1, ranges))]
    starts = jnp.array(least, distance.dtype)
    return after + jnp.searchsorted(starts, distance, side="right", method="compare_all")


def _start(i: int, ranges: int, exact: int, farthest: int) -> int:
    """The least whole number that is at least `exact * (farthest / exact) ** (i / ranges)`."""
    least = exact ** (ranges - i) * farthest**i  # its power of `ranges`
    start = int(exact * (farthest / exact) ** (i / ranges)) - 1
    while start**ranges < least:
        start += 1
    return start


def relative_positions(length: int, buckets: int, longest: int) -> Int[np.ndarray, "length length"]:
    """The number of DeBERTa's embedding for each query (first axis) and key.

    Distances below half the buckets have a bucket each; larger ones share them, in ranges that grow
    with the logarithm.

    Args:
        buckets: the number of embeddings to each side; 0 has one for each distance.
        longest: the largest distance, which the last bucket reaches.

    Example:
        >>> relative_positions(4, buckets=4, longest=9)
        array([[4, 3, 2, 1],
               [5, 4, 3, 2],
               [6, 5, 4, 3],
               [7, 6, 5, 4]])

    Reference: He et al. (2020), https://arxiv.org/abs/2006.03654
    """
    each = np.arange(length)
    distance, middle, span = each[:, None] - each, buckets // 2, buckets or longest
    if buckets:
        # In float32 as in transformers, since rounding can decide at the edge of a bucket.
        far = np.maximum(np.abs(distance), middle).astype(np.float32) / np.float32(middle)
        widest = np.log(np.float32((longest - 1) / middle))
        steps = np.ceil(np.log(far) / widest * np.float32(middle - 1)) + middle
        near = np.abs(distance) <= middle
        distance = np.where(near, distance, steps * np.sign(distance)).astype(np.int64)
    return np.clip(distance + span, 0, 2 * span - 1)
