"""Functions of arrays that several methods use: initialisers, dropout, layer norm."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import UserError, shown

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]


def over_layers(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """A function of one layer's arrays as a function of arrays stacked on `axes` leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def key_at(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """The key of a path, the same whatever else a recipe adds."""
    # CRC-32 and not `hash`, which differs from process to process.
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def checked_key(caller: str, key: Any) -> Any:
    """A random key, of jax.random.key, PRNGKey or an NNX stream; raises UserError for others."""
    key = key[...] if isinstance(key, nnx.RngKey) else key
    dtype = key.dtype if isinstance(key, jax.Array | np.ndarray | jax.ShapeDtypeStruct) else None
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    # jax.random.PRNGKey gives raw words, which jax still takes everywhere.
    old = dtype == np.uint32 and key.ndim == 1
    if not old and not (typed and key.ndim == 0):
        got = f"{dtype}{list(key.shape)}" if dtype is not None else shown(key)
        raise UserError(f"{caller}: key={got}, expected a random key; write jax.random.key(0)")
    return key


def nearest_factors(
    matrix: Float[Array, "*layers in out"], rank: int, scale: float = 1.0
) -> tuple[Float[Array, "*layers in rank"], Float[Array, "*layers rank out"], Array]:
    """A and B whose product, times a scale, is nearest to a matrix; and its singular values.

    The decomposition U S V^T gives A = U_r sqrt(S_r / scale), B = sqrt(S_r / scale) V_r^T.
    """
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    # Each factor gets half of S, so that gradients of both are of one size.
    root = jnp.sqrt(s[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :], s


def normal(std: float) -> Initializer:
    """Gaussian with mean zero and deviation `std`."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def truncated_normal(std: float) -> Initializer:
    """Gaussian with mean zero and deviation `std`, truncated at two deviations."""
    return lambda key, shape: std * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def uniform(limit: float) -> Initializer:
    """Uniform between `-limit` and `limit`."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Zeros; the key is not used."""
    return jnp.zeros(shape)


def ones(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Ones; the key is not used."""
    return jnp.ones(shape)


def add_last(x: Float[Array, "... d"], bias: Float[Array, " d"]) -> Float[Array, "... d"]:
    """x + bias along the last axis, without implicit rank promotion."""
    # Tests run with jax_numpy_rank_promotion="raise", and so may users.
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "... d"]:
    """Layer normalisation with PyTorch's epsilon, 1e-5, and statistics in float32."""
    # A bfloat16 mean of squares has an error of about 1/256, which the division would keep.
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return add_last(normed.astype(x.dtype) * scale, bias)


def beside(x: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """x with axes of size 1 in front, so that it has as many axes as `like`."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)
