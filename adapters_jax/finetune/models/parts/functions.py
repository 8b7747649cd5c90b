"""Attention, activations and norms with derivatives that store few arrays.

When the weights around them are frozen, the backward pass needs neither the output of an activation
nor the input of a softmax. Differentiated automatically, each function stores more: BERT's GELU
stores two arrays beside its input, its softmax two beside its output, its norms three in all. The
derivatives here store one (`gated` its two inputs). Each is written in another form than its
function, so that XLA finds no common subexpression to store. Sums inside a derivative are written
as products with a vector, because XLA's CPU compiler stores the operands of a separate sum.

On a TPU, activations have JAX's own derivatives: its compiler makes them, the activation and the
products beside them one operation, and takes the other forms apart: a layer of BERT-large moves a
tenth fewer bytes that way.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adapters_jax.trace.masks import Mask, as_array

Activation = Callable[[Array], Array]
_SCANNING: ContextVar[bool] = ContextVar("scanning", default=False)


def _with(derivative: Activation, function: Activation) -> Activation:
    """Returns the function with this derivative, which is computed in float32 at least."""
    found = jax.custom_jvp(function)

    def automatic(x: Array) -> Array:
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    def tangent(change: Array, y: Array, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        slope = jax.lax.platform_dependent(wide, tpu=automatic, default=derivative)
        return change * slope.astype(change.dtype)

    found.defjvps(tangent)
    return found


def _gelu_slope(x: Array) -> Array:
    below = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    return below + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Array) -> Array:
    c, k = math.sqrt(2 / math.pi), 0.044715
    below = jax.nn.sigmoid(2 * c * (x + k * x**3))  # (1 + tanh(u)) / 2 in another form
    return below + x * below * (1 - below) * 2 * c * (1 + 3 * k * jnp.square(x))


def _silu_slope(x: Array) -> Array:
    below = 0.5 * (1.0 + jnp.tanh(0.5 * x))  # the sigmoid in another form
    return below * (1 + x * (1 - below))


gelu = _with(_gelu_slope, lambda x: jax.nn.gelu(x, approximate=False))
gelu_tanh = _with(_gelu_tanh_slope, lambda x: jax.nn.gelu(x, approximate=True))
silu = _with(_silu_slope, jax.nn.silu)
# A third form of the function, for a backward pass that needs both it and its derivative.
_AGAIN: dict[Activation, Activation] = {silu: lambda x: x * (1.0 - jax.nn.sigmoid(-x))}

ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.relu,
    "silu": silu,
    "swish": silu,
    "tanh": jnp.tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def gated(
    activation: Activation, gate: Float[Array, "*batch d"], x: Float[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    """Computes `activation(gate) * x`; its derivative stores only `gate` and `x`."""
    return activation(gate) * x


@gated.defjvp
def _gated_jvp(
    activation: Activation, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (gate, x), (of_gate, of_x) = primals, tangents
    opens = jax.jvp(activation, (gate,), (of_gate,))[1]
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    opened = _AGAIN.get(activation, activation)(wide).astype(gate.dtype)
    return gated(activation, gate, x), opens * x + opened * of_x


@jax.custom_jvp
def softmax(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Softmax over the last axis; its derivative stores only the result."""
    return jax.nn.softmax(x)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, change = softmax(*primals), tangents[0]
    return y, y * (change - (y * change).sum(-1, keepdims=True))


@jax.custom_jvp
def softmax_beside(
    x: Float[Array, "*batch n"], sink: Float[Array, "*#batch 1"]
) -> Float[Array, "*batch n"]:
    """The softmax of `x` and `sink` over the last axis, without the share that the sink takes.

    Its derivative stores only the result.

    Example:
        >>> softmax_beside(jnp.zeros((1, 2)), jnp.log(jnp.array([[2.0]]))).tolist()
        [[0.25, 0.25]]
    """
    most = jax.lax.stop_gradient(jnp.maximum(x.max(-1, keepdims=True), sink))
    each = jnp.exp(x - most)
    return each / (each.sum(-1, keepdims=True) + jnp.exp(sink - most))


@softmax_beside.defjvp
def _softmax_beside_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    y, (change, of_sink) = softmax_beside(*primals), tangents
    taken = 1 - y.sum(-1, keepdims=True)
    return y, y * (change - (y * change).sum(-1, keepdims=True) - taken * of_sink)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def normalize(
    x: Float[Array, "*batch d"], scale: Float[Array, " d"], epsilon: float, centred: bool
) -> Float[Array, "*batch d"]:
    """Normalises as flax's layer norm (centred) or RMS norm does, without a bias.

    Args:
        scale: factors of the result.
        epsilon: added to the variance.
        centred: whether to subtract the mean.

    Returns:
        The normalised rows, in float32 at least.
    """
    rest, inverse = _standardized(x, epsilon, centred)
    return rest * (inverse * scale)


def _standardized(x: Array, epsilon: float, centred: bool) -> tuple[Array, Array]:
    """Returns `x`, less its mean if centred, and one over the standard deviation of each row."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    variance, mean = jnp.square(x).mean(-1, keepdims=True), jnp.zeros(())
    if centred:
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum(0.0, variance - jnp.square(mean))
    return x - mean, jax.lax.rsqrt(variance + epsilon)


@partial(normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(
    epsilon: float, centred: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, scale), (change, of_scale) = primals, tangents
    rest, inverse = _standardized(x, epsilon, centred)
    y = rest * (inverse * scale)

    def along(row: Array, scale: Array) -> Array:
        """Computes `row * scale` of `(..., 1)` and `(d,)` as a product, also when transposed."""
        return jnp.matmul(row, scale[None].astype(row.dtype), precision="highest")

    moved = jnp.zeros_like(y)
    if not isinstance(change, SymbolicZero):
        change = change.astype(y.dtype)
        shrinks = (change * rest).mean(-1, keepdims=True) * inverse**3
        moved = change * inverse * scale - along(shrinks, scale) * rest
        if centred:
            moved -= along(change.mean(-1, keepdims=True) * inverse, scale)
    if not isinstance(of_scale, SymbolicZero):
        moved += along(inverse, of_scale) * rest
    return y, moved


def split_heads(
    x: Float[Array, "*batch features"], width: int
) -> Float[Array, "*batch heads width"]:
    """The heads of a projection, each of a width.

    A TPU's compiler makes the split a part of the product, and for that lays the stacked weights of
    scanned layers out anew: a copy of them in every step. A barrier keeps it from that.
    """
    x = jax.lax.optimization_barrier(x) if is_scanning() else x
    return x.reshape(*x.shape[:-1], -1, width)


def is_scanning() -> bool:
    """Whether what is traced now is the body of a scan over layers."""
    return _SCANNING.get()


@contextlib.contextmanager
def scanning() -> Iterator[None]:
    """What is traced in the body is the body of a scan over layers."""
    token = _SCANNING.set(True)
    try:
        yield
    finally:
        _SCANNING.reset(token)


def dot_product_attention(
    query: Float[Array, "*batch length heads width"],
    key: Float[Array, "*batch keys kv_heads width"],
    value: Float[Array, "*batch keys kv_heads out"],
    *,
    bias: Float[Array, "*#batch #heads #length keys"] | None = None,
    mask: Mask | Bool[Array, "*#batch #heads #length keys"] | None = None,
    dropout_rng: PRNGKeyArray | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = False,
    deterministic: bool = True,
    dtype: Dtype | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "*batch length heads out"]:
    """Computes what flax's `dot_product_attention` does, with its arguments, `softcap` and `sinks`.

    Args:
        query: the queries; consecutive heads form groups of equal size, one group for each key
            head.
        value: the values, with as many heads as the keys, perhaps of another width.
        bias: added to the scores, which are products divided by the root of the width.
        mask: a `Mask`, or True where a query sees a key.
        broadcast_dropout: whether all heads and sequences drop the same weights.
        deterministic: True turns dropout off.
        dtype: the computation dtype; None means that of the inputs together. The softmax is
            computed in float32 at least.
        softcap: the bound of the scores; see `capped`.
        sinks: a further score of each head, which takes its share of the softmax and has no value.
    """
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    *batch, length, heads, width = query.shape
    grouped = query.reshape(*batch, length, key.shape[-2], -1, width)
    grouped = grouped / jnp.sqrt(width).astype(query.dtype)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, key)
    groups, scores = scores.shape, scores.reshape(*batch, heads, length, -1)
    scores = capped(scores, softcap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    mask = as_array(mask, query, key)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if sinks is None:
        weights = softmax(scores)
    else:
        weights = softmax_beside(scores, sinks.astype(scores.dtype)[:, None, None])
    weights = weights.astype(value.dtype)
    if dropout_rate > 0.0 and not deterministic:
        shape = weights.shape[-2:] if broadcast_dropout else weights.shape
        keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape)  # type: ignore[arg-type]
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0).astype(value.dtype)
    mixed = jnp.einsum("...hgqk,...khd->...qhgd", weights.reshape(groups), value)
    return mixed.reshape(*batch, length, heads, value.shape[-1])


def capped(x: Float[Array, "*batch"], bound: float | None) -> Float[Array, "*batch"]:
    """Keeps numbers between `-bound` and `bound`: `bound * tanh(x / bound)`; None keeps them all.

    Example:
        >>> capped(jnp.array([0.0, 50.0]), 2.0).tolist()
        [0.0, 2.0]
    """
    return x if bound is None else bound * jnp.tanh(x / bound)
