"""Runs a model's blocks one after the other: unrolled or scanned, with or without recomputation.

Scanned blocks are one module whose leaves have the layers on their first axis. It is traced and
compiled once, so compile time does not grow with the number of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.parts.functions import scanning

POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
Module = TypeVar("Module", bound=nnx.Module)
Contexts = Sequence[Any]  # of one structure each


def check_remat(remat: bool | str) -> dict[str, Any]:
    """Turns a model's option `remat` into the keyword arguments of flax's `remat`.

    Args:
        remat: True recomputes each block in the backward pass instead of storing its activations.
            The name of one of `jax.checkpoint_policies` decides which of them are stored.

    Raises:
        UserError: `remat` is not one of `POLICIES`.

    Example:
        >>> check_remat("dots")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: remat='dots' is not a policy; expected False, True (the \
same as 'nothing_saveable') or one of 'nothing_saveable', 'dots_with_no_batch_dims_saveable', \
'dots_saveable', 'everything_saveable'.
    """
    if isinstance(remat, bool):
        return {"policy": None}
    if remat not in POLICIES:
        raise UserError(
            f"remat={remat!r} is not a policy; expected False, True (the same as "
            f"'nothing_saveable') or one of {', '.join(map(repr, POLICIES))}."
        )
    return {"policy": getattr(jax.checkpoint_policies, remat)}


def run_linen(
    layers: nn.Module | Sequence[nn.Module], x: Array, *args: Any, length: int, remat: bool | str
) -> Array:
    """Runs linen blocks.

    Args:
        layers: a sequence of modules, one for each block, or one module to scan.
        x: the input of the first block.
        args: further arguments, the same for every block.
        length: the number of blocks.
        remat: see `check_remat`.

    Returns:
        The output of the last block.
    """
    scanned = isinstance(layers, nn.Module)

    def block(layer: Any, x: Array) -> Array:
        return layer(x, *args)

    @scanning()
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
    """Makes one module to scan from NNX blocks, each initialised from random numbers of its own."""
    return nnx.split_rngs(splits=length)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def run_nnx(
    layers: nnx.Module, x: Array, contexts: Contexts, kinds: Sequence[int], *, remat: bool | str
) -> Array:
    """Runs NNX blocks.

    Args:
        layers: an `nnx.List` of blocks, or a module from `stack_nnx`.
        x: the input of the first block.
        contexts: further arguments, for each kind of block.
        kinds: the number of each block's kind.
        remat: see `check_remat`.

    Returns:
        The output of the last block.
    """
    scanned = not isinstance(layers, nnx.List)

    def block(layer: Any, x: Array, context: Any) -> Array:
        return layer(x, *context)

    if remat:
        block = nnx.remat(block, prevent_cse=not scanned, **check_remat(remat))
    if not scanned:
        for layer, kind in zip(layers, kinds, strict=True):  # type: ignore[call-overload]
            x = block(layer, x, contexts[kind])
        return x
    context = _by_kind(contexts)
    scan = nnx.scan(
        scanning()(lambda x, layer, kind: block(layer, x, context(kind))),
        in_axes=(nnx.Carry, 0, 0),
        out_axes=nnx.Carry,
    )
    return scan(x, layers, jnp.array(kinds))


def extend_nnx(
    step: Callable[..., Any],
    layers: Any,
    x: Array,
    contexts: Contexts,
    kinds: Sequence[int],
    keys: Any,
    values: Any,
) -> tuple[Array, Any, Any]:
    """Runs NNX blocks with a cache; see `run_nnx`.

    Args:
        step: called for each block as `step(x, layer, context, key, value)`, returns
            `x, key, value`.
        layers: an `nnx.List` of blocks, or a module from `stack_nnx`.
        x: the input of the first block.
        contexts: for each kind of block.
        kinds: the number of each block's kind.
        keys: those in the cache, a tuple or an array with the layers on its first axis.
        values: likewise.

    Returns:
        The output of the last block, the keys and the values, in the form in which they came.
    """
    if not isinstance(layers, nnx.List):
        context = _by_kind(contexts)
        scan = nnx.scan(
            scanning()(lambda x, layer, kind, *pair: step(x, layer, context(kind), *pair)),
            in_axes=(nnx.Carry, 0, 0, 0, 0),
            out_axes=(nnx.Carry, 0, 0),
        )
        return scan(x, layers, jnp.array(kinds), keys, values)
    pairs = []
    for layer, kind, key, value in zip(layers, kinds, keys, values, strict=True):
        x, *pair = step(x, layer, contexts[kind], key, value)
        pairs.append(pair)
    return x, *zip(*pairs, strict=True)  # type: ignore[return-value]


def _by_kind(contexts: Contexts) -> Callable[[Array], Any]:
    """The context of a kind whose number is traced, of one array for all kinds."""
    if len(contexts) == 1:
        return lambda kind: contexts[0]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *contexts)
    return lambda kind: jax.tree.map(lambda leaf: leaf[kind], stacked)
