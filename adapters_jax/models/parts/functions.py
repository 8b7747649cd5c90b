"""What our transformers are made of: attention, activations, norms whose derivatives keep little.

Over a frozen weight, a backward pass needs neither what came out of an activation nor what led to
a softmax. Differentiated as they stand, XLA keeps several arrays for each: BERT's GELU two beside
its input, its softmax two beside its result, its norms three in place of one. These keep one. A
derivative is written in another form than the function, so that XLA does not take their common
parts for something to keep; its sums are products with a vector, since XLA's CPU compiler keeps
whatever goes into a sum of its own.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

Activation = Callable[[Array], Array]


def _with(derivative: Activation, function: Activation) -> Activation:
    """The function with this derivative, which sees float32 or more."""
    found = jax.custom_jvp(function)

    def tangent(change: Array, y: Array, x: Array) -> Array:
        slope = derivative(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return change * slope.astype(change.dtype)

    found.defjvps(tangent)
    return found


def _gelu_slope(x: Array) -> Array:
    below = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    return below + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Array) -> Array:
    c, k = math.sqrt(2 / math.pi), 0.044715
    below = jax.nn.sigmoid(2 * c * (x + k * x**3))  # (1 + tanh(u)) / 2, of another form
    return below + x * below * (1 - below) * 2 * c * (1 + 3 * k * jnp.square(x))


def _silu_slope(x: Array) -> Array:
    below = 0.5 * (1.0 + jnp.tanh(0.5 * x))  # the sigmoid, of another form
    return below * (1 + x * (1 - below))


gelu = _with(_gelu_slope, lambda x: jax.nn.gelu(x, approximate=False))
gelu_tanh = _with(_gelu_tanh_slope, lambda x: jax.nn.gelu(x, approximate=True))
silu = _with(_silu_slope, jax.nn.silu)
# The function itself in a third form, for where its derivative and it are both wanted backwards.
_AGAIN: dict[Activation, Activation] = {silu: lambda x: x * (1.0 - jax.nn.sigmoid(-x))}

ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": nn.relu,
    "silu": silu,
    "swish": silu,
}


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def gated(
    activation: Activation, gate: Float[Array, "*batch d"], x: Float[Array, "*batch d"]
) -> Float[Array, "*batch d"]:
    """`activation(gate) * x`; its derivative keeps `gate` and `x` alone."""
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
    """Along the last axis; its derivative keeps the result alone."""
    return jax.nn.softmax(x)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y, change = softmax(*primals), tangents[0]
    return y, y * (change - (y * change).sum(-1, keepdims=True))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def normalize(
    x: Float[Array, "*batch d"], scale: Float[Array, " d"], epsilon: float, centred: bool
) -> Float[Array, "*batch d"]:
    """What flax's layer norm (centred) and RMS norm compute, before a bias.

    Args:
        x: each row is normalised.
        scale: of the result.
        epsilon: added to the variance.
        centred: whether the mean is subtracted.

    Returns:
        Float32 at least.
    """
    rest, inverse = _standardized(x, epsilon, centred)
    return rest * (inverse * scale)


def _standardized(x: Array, epsilon: float, centred: bool) -> tuple[Array, Array]:
    """What is left of `x` without its mean, if that goes, and one over the deviation of a row."""
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
        """`row * scale` of `(..., 1)` and `(d,)`, as a product that is a product backwards too."""
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


def dot_product_attention(
    query: Float[Array, "*batch length heads width"],
    key: Float[Array, "*batch keys kv_heads width"],
    value: Float[Array, "*batch keys kv_heads width"],
    *,
    mask: Bool[Array, "*#batch #heads #length keys"] | None = None,
    dropout_rng: PRNGKeyArray | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = False,
    deterministic: bool = True,
    dtype: Dtype | None = None,
) -> Float[Array, "*batch length heads width"]:
    """Attention as flax's attention functions compute it, called as flax's modules call theirs.

    Args:
        query: its heads are in groups, one for each head of the keys.
        key: what they are compared with.
        value: what is mixed.
        mask: True where a query sees a key.
        dropout_rng: seeds dropout.
        dropout_rate: of the weights.
        broadcast_dropout: whether all heads and sequences drop the same.
        deterministic: no dropout.
        dtype: of the computation; None is that of the inputs together. The softmax is in float32
            at least.
    """
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    *batch, length, heads, width = query.shape
    grouped = query.reshape(*batch, length, key.shape[-2], -1, width)
    grouped = grouped / jnp.sqrt(width).astype(query.dtype)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, key)
    groups, scores = scores.shape, scores.reshape(*batch, heads, length, -1)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    weights = weights.astype(value.dtype)
    if dropout_rate > 0.0 and not deterministic:
        shape = weights.shape[-2:] if broadcast_dropout else weights.shape
        keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape)  # type: ignore[arg-type]
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0).astype(value.dtype)
    mixed = jnp.einsum("...hgqk,...khd->...qhgd", weights.reshape(groups), value)
    return mixed.reshape(*batch, length, heads, width)


def causal_mask(
    input_ids: Int[Array, "batch length"], attention_mask: Num[Array, "batch length"] | None = None
) -> Bool[Array, "#batch 1 length length"]:
    """Which keys (last axis) each query may see: itself and those before, without the padding.

    Example:
        >>> causal_mask(jnp.array([[5, 6]]), jnp.array([[0, 1]])).astype(int).tolist()
        [[[[0, 0], [0, 1]]]]
    """
    length = input_ids.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return mask if attention_mask is None else mask & (attention_mask != 0)[:, None, None, :]
