"""A model's blocks one after the other: unrolled or scanned, their activations stored or not.

Scanned blocks are one module whose leaves have the layers on their first axis. It is traced and
compiled once, so that compile time does not grow with depth.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import UserError

POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
Module = TypeVar("Module", bound=nnx.Module)


def check_remat(remat: bool | str) -> dict[str, Any]:
    """What the option `remat` of a model says, as an argument of flax's `remat`.

    Args:
        remat: whether to recompute each block in the backward pass instead of storing it, or what
            of it may be stored: the name of one of `jax.checkpoint_policies`.

    Raises:
        ValueError: it is no policy that is known.

    Example:
        >>> check_remat("dots")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: remat='dots' is no policy; it wants False, True (as \
'nothing_saveable'), or one of 'nothing_saveable', 'dots_with_no_batch_dims_saveable', \
'dots_saveable', 'everything_saveable'.
    """
    if isinstance(remat, bool):
        return {"policy": None}
    if remat not in POLICIES:
        raise UserError(
            f"remat={remat!r} is no policy; it wants False, True (as 'nothing_saveable'), or one "
            f"of {', '.join(map(repr, POLICIES))}."
        )
    return {"policy": getattr(jax.checkpoint_policies, remat)}


def run_linen(
    layers: nn.Module | Sequence[nn.Module], x: Array, *args: Any, length: int, remat: bool | str
) -> Array:
    """Runs linen blocks.

    Args:
        layers: one module for each, or one for all of them, which is scanned.
        x: what enters the first.
        args: what each is called with besides.
        length: how many there are.
        remat: see `check_remat`.

    Returns:
        What leaves the last.
    """
    scanned = isinstance(layers, nn.Module)

    def block(layer: Any, x: Array) -> Array:
        return layer(x, *args)

    def step(layer: Any, x: Array, _: None) -> tuple[Array, None]:
        return block(layer, x), None

    policy = check_remat(remat)
    if remat:
        block = nn.remat(block, prevent_cse=not scanned, **policy)
    if not scanned:
        for layer in layers:  # type: ignore[union-attr]
            x = block(layer, x)
        return x
    scan = nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
    )
    return scan(layers, x, None)[0]


def stack_nnx(make: Callable[[nnx.Rngs], Module], length: int, rngs: nnx.Rngs) -> Module:
    """NNX blocks as one module to scan, each from random numbers of its own."""
    return nnx.split_rngs(splits=length)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def run_nnx(layers: nnx.Module, x: Array, *args: Any, remat: bool | str) -> Array:
    """Runs NNX blocks, an `nnx.List` of them or one from `stack_nnx`; see `run_linen`."""
    scanned = not isinstance(layers, nnx.List)

    def block(layer: Any, x: Array) -> Array:
        return layer(x, *args)

    if remat:
        block = nnx.remat(block, prevent_cse=not scanned, **check_remat(remat))
    if not scanned:
        for layer in layers:  # type: ignore[attr-defined]
            x = block(layer, x)
        return x
    scan = nnx.scan(lambda x, layer: block(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return scan(x, layers)


def extend_nnx(
    step: Callable[..., Any], layers: Any, x: Array, keys: Any, values: Any
) -> tuple[Array, Any, Any]:
    """Runs blocks that have a cache: `step(x, layer, key, value)` for each, which returns the like.

    Returns:
        What leaves the last; the keys and the values, tuples or stacked as they were.
    """
    if not isinstance(layers, nnx.List):
        scan = nnx.scan(step, in_axes=(nnx.Carry, 0, 0, 0), out_axes=(nnx.Carry, 0, 0))
        return scan(x, layers, keys, values)
    pairs = []
    for layer, key, value in zip(layers, keys, values, strict=True):
        x, *pair = step(x, layer, key, value)
        pairs.append(pair)
    return x, *zip(*pairs, strict=True)  # type: ignore[return-value]
