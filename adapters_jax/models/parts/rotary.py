"""Rotary positions: each pair of features of a query or key is rotated by its position's angle.

Reference: Su et al., RoFormer (2021), https://arxiv.org/abs/2104.09864
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_angles(
    positions: Int[Array, "batch length"], head_dim: int, theta: float
) -> Float[Array, "batch length half"]:
    """The angle by which each position rotates each pair of a head's features, in float32."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[:, :, None] * frequencies


def rotate(
    x: Float[Array, "batch length heads head_dim"], angles: Float[Array, "#batch length half"]
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (feature i of the first half, feature i of the second half).

    Example:
        >>> quarter = jnp.full((1, 1, 1), jnp.pi / 2)
        >>> rotate(jnp.array([[[[1.0, 0.0]]]]), quarter).round(3).ravel().tolist()
        [-0.0, 1.0]
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
