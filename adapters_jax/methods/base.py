"""What every method of adaptation has in common: a site to attach to and leaves to add there."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.weights.attention import Attention
from adapters_jax.weights.contraction import Contraction

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Array]
Leaves = Mapping[str, Any]
Frozen = Callable[[str], Any]  # a module's own parameter by name, None where it has none


@dataclass(frozen=True)
class Site:
    """One place in a model that a method attaches to.

    Attributes:
        path: path of the module, names joined by slashes.
        call: the method of the module that is adapted, `__call__` or an embedding's `attend`.
        width: size of the last axis of the module's output, d; 0 where it is no float array.
        contraction: how the module's weight meets its input; None where it is not a linear layer.
        weight_shape: shape of that weight, without layer axes.
        precision: matmul precision of the module.
        attention: the sizes of an attention module; None where it is none that is known.
        again: the call under way, without adapters, on another input; None outside of a call.
    """

    path: str
    call: str
    width: int
    contraction: Contraction | None = None
    weight_shape: tuple[int, ...] = ()
    precision: Any = None
    attention: Attention | None = None
    again: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Leaf:
    """One array that a method adds: its shape and its initialiser, both without layer axes."""

    shape: tuple[int, ...]
    init: Initializer


@dataclass(frozen=True)
class Count:
    """How many parameters a method adds at one site, and why.

    Attributes:
        formula: the closed form with numbers put in, `2*768*64 + 64 + 768`.
        parameters: its value for one layer.
        copies: how many layers are stacked in the leaves.
    """

    formula: str
    parameters: int
    copies: int = 1


def over_layers(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """A function of one layer's arrays, for arrays that are stacked on so many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def nothing(name: str) -> None:
    """The parameters of a module that has none of its own."""


def key_at(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for every path, whatever else a recipe adds."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def normal(std: float) -> Initializer:
    """Gaussian with mean zero."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def truncated_normal(std: float) -> Initializer:
    """Gaussian with mean zero, redrawn beyond two standard deviations of the parent."""
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


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zeroes entries with probability `rate` and scales the rest; no key means evaluation."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def add_last(x: Float[Array, "... d"], bias: Float[Array, " d"]) -> Float[Array, "... d"]:
    """x + bias along the last axis, without leaning on implicit rank promotion."""
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "... d"]:
    """Layer normalisation as PyTorch's default: statistics in float32, epsilon 1e-5."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return add_last(normed.astype(x.dtype) * scale, bias)
