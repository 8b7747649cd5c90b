"""`jax.vmap` that also maps `jax.lax.ragged_dot`, the product of mixtures of experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import batching
from jaxtyping import Array, Int

# jax.lax does not export the primitive.
_PRODUCT = next(p for p in batching.fancy_primitive_batchers if p.name == "ragged_dot_general")
_JAX_RULE = batching.fancy_primitive_batchers[_PRODUCT]


def vmap(
    function: Callable[..., Any], in_axes: Any = 0, spmd_axis_name: str | None = None
) -> Callable[..., Any]:
    """`jax.vmap`, which also maps rows in groups that meet weights without an axis of the map.

    Example:
        >>> x, w = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
        >>> sizes = jnp.array([[1, 2], [3, 0]])
        >>> vmap(lambda x, sizes: jax.lax.ragged_dot(x, w, sizes))(x, sizes).shape
        (2, 3, 5)
    """
    batching.fancy_primitive_batchers[_PRODUCT] = _mapped
    return jax.vmap(function, in_axes, spmd_axis_name=spmd_axis_name)


def _mapped(axis: Any, args: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    """The rule of `ragged_dot_general`; jax has one where all three arguments are mapped."""
    numbers = params["ragged_dot_dimension_numbers"]
    given = (
        numbers.dot_dimension_numbers,
        tuple(numbers.lhs_ragged_dimensions),
        tuple(numbers.rhs_group_dimensions),
    )
    # Along their inputs, as in a product, or along their outputs, as in its gradient.
    usual = [((((1,), (along,)), ((), ())), (0,), (0,)) for along in (1, 2)]
    shared = dims[1] is None and given in usual
    x, w, sizes = (
        each if number == 1 and shared else batching.bdim_at_front(each, dim, axis.size)
        for number, (each, dim) in enumerate(zip(args, dims, strict=True))
    )
    if shared:
        return _joined(x, w, sizes, params), 0
    return _JAX_RULE(axis, (x, w, sizes), (0, 0, 0), **params)


def _joined(x: Array, w: Array, sizes: Int[Array, "maps groups"], params: Any) -> Array:
    """One product of the rows of all maps, sorted by their groups.

    jax's rule would need a copy of all weights for each map.
    """
    maps, rows = x.shape[:2]
    # Rows behind the last group have the number after it, and the product makes them zero.
    group = (jnp.arange(rows)[:, None] >= jnp.cumsum(sizes, 1)[:, None]).sum(-1).reshape(-1)
    order = jnp.argsort(group)
    flat = x.reshape(maps * rows, x.shape[-1])[order]
    y = _PRODUCT.bind(flat, w, sizes.sum(0), **params)
    return y[jnp.argsort(order)].reshape(maps, rows, y.shape[-1])
