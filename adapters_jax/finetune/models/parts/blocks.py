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
from adapters_jax.finetune.models.parts.functions import is_scanning, scanning
from adapters_jax.nnx import AdapterParam
from adapters_jax.weights.products import ADAPTED_PRODUCT

POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
_SAVED = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names(ADAPTED_PRODUCT),
)
Module = TypeVar("Module", bound=nnx.Module)
Kind = TypeVar("Kind")
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


def recomputed(run: Callable[..., Array], last: nnx.Module, *inputs: Array) -> Array:
    """`run(*inputs)`, for whose gradient only products are stored, if its last one is adapted.

    An adapted product needs its input again. Where that is an activation of a stored product, it is
    cheaper to compute it a second time than to store it.

    Args:
        last: the module of its last product.
    """
    kinds = {type(x) for _, x in nnx.iter_graph(last)}
    # flax lets nobody draw keys, as for dropout, within `jax.checkpoint`.
    if AdapterParam not in kinds or any(issubclass(kind, nnx.RngState) for kind in kinds):
        return run(*inputs)
    return jax.checkpoint(run, prevent_cse=not is_scanning(), policy=_SAVED)(*inputs)


def distinct(layers: Sequence[Kind]) -> tuple[list[Kind], tuple[int, ...]]:
    """The kinds of layers that a model has, and the number of each layer's kind among them.

    Example:
        >>> distinct(["full", "sliding", "full"])
        (['full', 'sliding'], (0, 1, 0))
    """
    kinds = list(dict.fromkeys(layers))
    return kinds, tuple(map(kinds.index, layers))


def run_linen(
    layers: nn.Module | Sequence[nn.Module],
    x: Array,
    contexts: Contexts,
    kinds: Sequence[int],
    *,
    remat: bool | str,
) -> Array:
    """Runs linen blocks.

    Args:
        layers: a sequence of modules, one for each block, or one module to scan.
        x: the input of the first block.
        contexts: the second argument of each kind of block; scanned blocks are of one kind.
        kinds: the number of each block's kind.
        remat: see `check_remat`.
    """
    scanned = isinstance(layers, nn.Module)
    policy = check_remat(remat)

    def block(context: Any) -> Callable[[Any, Array], Array]:
        # The context is closed over: `nn.remat` would trace flags such as `deterministic`.
        def run(layer: Any, x: Array) -> Array:
            return layer(x, context)

        # In a scan, the loop itself keeps XLA from merging the recomputation with the forward pass.
        return nn.remat(run, prevent_cse=not scanned, **policy) if remat else run

    blocks = list(map(block, contexts))
    if not scanned:
        for layer, kind in zip(layers, kinds, strict=True):  # type: ignore[call-overload]
            x = blocks[kind](layer, x)
        return x

    @scanning()
    def step(layer: Any, x: Array, _: None) -> tuple[Array, None]:
        return blocks[0](layer, x), None

    scan = nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0},  # the latter for `capture_intermediates`
        split_rngs={"params": True, "dropout": True},
        length=len(kinds),
    )
    return scan(layers, x, None)[0]


def make_nnx(make: Callable[[nnx.Rngs], Module], length: int, scan: bool, rngs: nnx.Rngs) -> Any:
    """Makes NNX blocks, each initialised from other random numbers.

    Returns:
        An `nnx.List` of blocks, or with `scan` one block whose leaves have the layers on their
        first axis.
    """
    if not scan:
        return nnx.List(make(rngs) for _ in range(length))
    return nnx.split_rngs(splits=length)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def run_nnx(
    layers: nnx.Module, x: Array, contexts: Contexts, kinds: Sequence[int], *, remat: bool | str
) -> Array:
    """Runs NNX blocks.

    Args:
        layers: from `make_nnx`.
        x, contexts, kinds, remat: as in `run_linen`.
    """
    scanned = not isinstance(layers, nnx.List)

    def block(layer: Any, x: Array, context: Any) -> Array:
        return layer(x, context)

    if remat:
        block = nnx.remat(block, prevent_cse=not scanned, **check_remat(remat))

    def step(x: Array, layer: Any, context: Any) -> tuple[Array, None]:
        return block(layer, x, context), None

    return extend_nnx(step, layers, x, contexts, kinds)[0]


def extend_nnx(
    step: Callable[..., tuple[Array, Any]],
    layers: Any,
    x: Array,
    contexts: Contexts,
    kinds: Sequence[int],
    *rows: Any,
) -> tuple[Array, Any]:
    """Runs NNX blocks with what a cache has for each; see `run_nnx`.

    Args:
        step: called for each block as `step(x, layer, context, *row)`, returns `x` and what the
            block keeps.
        layers: from `make_nnx`.
        x, contexts, kinds: as in `run_nnx`.
        *rows: a list with a pytree for each block, or one pytree with the layers on the first axis.

    Returns:
        The output of the last block, and what the blocks keep, in the form of the rows.
    """
    if not isinstance(layers, nnx.List):
        # One traced body serves all layers, so a scanned number picks the context.
        context = _by_kind(contexts)
        scan = nnx.scan(
            scanning()(lambda x, layer, kind, *row: step(x, layer, context(kind), *row)),
            in_axes=(nnx.Carry, 0, 0, *(0 for _ in rows)),
            out_axes=(nnx.Carry, 0),
        )
        return scan(x, layers, jnp.array(kinds), *rows)
    kept = []
    for layer, kind, *row in zip(layers, kinds, *rows, strict=True):
        x, own = step(x, layer, contexts[kind], *row)
        kept.append(own)
    return x, kept


def _by_kind(contexts: Contexts) -> Callable[[Array], Any]:
    """The context of a kind whose number is traced, of one array for all kinds."""
    if len(contexts) == 1:
        return lambda kind: contexts[0]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *contexts)
    return lambda kind: jax.tree.map(lambda leaf: leaf[kind], stacked)
