"""One call for both front doors."""

from collections.abc import Iterable
from typing import Any, overload

from flax import linen as nn
from flax import nnx

from adapters_jax.linen import Adapted
from adapters_jax.linen import adapt as adapt_linen
from adapters_jax.methods import Method
from adapters_jax.nnx import adapt as adapt_nnx
from adapters_jax.recipe import Recipe


@overload
def adapt(model: nn.Module, recipe: Recipe | Method) -> Adapted: ...


@overload
def adapt(
    model: nnx.Module,
    recipe: Recipe | Method,
    *,
    rngs: nnx.Rngs,
    example_inputs: Iterable[Any] | None = None,
) -> nnx.Module: ...


def adapt(
    model: Any,
    recipe: Recipe | Method,
    *,
    rngs: nnx.Rngs | None = None,
    example_inputs: Iterable[Any] | None = None,
) -> Any:
    """Gives a model adapters without editing it.

    Args:
        model: a linen or NNX module; it is not changed. A model that has adapters gets more.
        recipe: says where they go and what else trains.
        rngs: NNX only: seeds the adapters, and their dropout.
        example_inputs: NNX only: inputs of the model, arrays or `jax.ShapeDtypeStruct`. Needed
            where a bottleneck's target is not a plain layer, to find the width of its output.

    Returns:
        For linen, a module of the same calls and parameter paths; its adapter leaves come from
        `init_adapters`. For NNX, a model that shares the base's arrays and has its adapters.

    Raises:
        TargetError: NNX: a pattern meets nothing, or nothing its method can attach to. For linen
            `init_adapters` (and `model.init`) says so, since a linen model has no parts before.
        TypeError: `model` is neither, or an argument is of the other front door.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> adapted.lora["a"].shape, hasattr(model, "lora")
        ((4, 2), False)
    """
    recipe = Recipe(recipe)
    if isinstance(model, nn.Module):
        if rngs is not None or example_inputs is not None:
            raise TypeError(
                "adapt: rngs and example_inputs are for NNX models; for this linen model write "
                "model = aj.adapt(model, recipe), then "
                "params = aj.init_adapters(model, params, key, *example_inputs)"
            )
        return adapt_linen(model, recipe)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"adapt wants a linen or NNX module, got {type(model).__name__}")
    if rngs is None:
        raise TypeError(
            "adapt: an NNX model needs rngs; write aj.adapt(model, recipe, rngs=nnx.Rngs(0))"
        )
    return adapt_nnx(model, recipe, rngs, None if example_inputs is None else tuple(example_inputs))
