"""Functions of arrays that several methods use: initialisers, layer norm, attention."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adapters_jax.errors import UserError, shown

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Output = Float[Array, "..."]  # of a module
Weight = Float[Array, "..."]
Key = PRNGKeyArray | None  # for dropout while training; None in evaluation
Initializer = Callable[[PRNGKeyArray, Shape], Array]


class Attended(NamedTuple):
    """What queries get from some keys and values.

    Attributes:
        output: softmax(logits) v, (..., heads, head_dim).
        total: the logarithm of the sum of the exponentials of the logits, (..., heads), float32.
    """

    output: Array
    total: Array


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


def affine(
    x: Float[Array, "... d"],
    kernel: Float[Array, "d m"],
    bias: Float[Array, " m"] | None = None,
    precision: Any = None,
) -> Float[Array, "... m"]:
    """`x kernel + bias` in the dtype of x; precision as in `jnp.matmul`."""
    product = jnp.matmul(x, kernel.astype(x.dtype), precision=precision)
    return product if bias is None else add_last(product, bias.astype(x.dtype))


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


def orthonormal(matrix: Float[Array, "d r"]) -> Float[Array, "d r"]:
    """The Q of `matrix = Q U` with orthonormal columns and U triangular, above 0 in its diagonal.

    Columns of zeros stay, so that a bank can pad with them.

    Example:
        >>> orthonormal(jnp.array([[2.0, 1.0], [0.0, -3.0], [0.0, 0.0]])).tolist()
        [[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]
    """
    columns = matrix.astype(jnp.float32)
    squares = jnp.square(columns).sum(0)
    empty = squares == 0.0
    columns = columns * jax.lax.rsqrt(jnp.where(empty, 1.0, squares))[None]
    # By Cholesky factors, since LAPACK's Q of a column of zeros is no zero, and its derivative NaN.
    # Twice, since once is as far from orthonormal as the square of the condition number.
    for _ in range(2):
        gram = jnp.matmul(columns.T, columns, precision="highest") + jnp.diag(empty * 1.0)
        columns = solve_triangular(jnp.linalg.cholesky(gram), columns.T, lower=True).T
    return columns


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
