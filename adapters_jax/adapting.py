"""`adapt`: one function for both APIs, linen and NNX."""

from collections.abc import Iterable
from typing import Any, overload

from flax import linen as nn
from flax import nnx

from adapters_jax.linen import Adapted
from adapters_jax.linen import adapt as adapt_linen
from adapters_jax.methods import Method
from adapters_jax.nnx import adapt as adapt_nnx
from adapters_jax.recipe import Recipe
from adapters_jax.trace.inputs import Inputs


@overload
def adapt(model: nn.Module, recipe: Recipe | Method) -> Adapted: ...


@overload
def adapt(
    model: nnx.Module,
    recipe: Recipe | Method,
    *,
    rngs: nnx.Rngs,
    example_inputs: Iterable[Any] | Inputs | None = None,
) -> nnx.Module: ...


def adapt(
    model: Any,
    recipe: Recipe | Method,
    *,
    rngs: nnx.Rngs | None = None,
    example_inputs: Iterable[Any] | Inputs | None = None,
) -> Any:
    """Gives a model adapters without editing it.

    Args:
        model: a linen or NNX module; it is not changed. A model that has adapters gets more.
        recipe: which modules get adapters, and what else trains.
        rngs: NNX only: seeds of the adapters and of their dropout.
        example_inputs: NNX only: inputs of the model, arrays or `jax.ShapeDtypeStruct`, in a tuple
            or as `aj.inputs(x, mask=m)`. Needed where a target is not a single layer of flax, to
            find how the model uses its weights, and the width of its output; so also for a
            bottleneck on `nnx.MultiHeadAttention`.

    Returns:
        For linen, a module with the same methods and parameter paths, whose adapter leaves
        `init_adapters` makes. For NNX, a model with adapters that shares the base's arrays.

    Raises:
        TargetError: NNX: a pattern matches no module that its method can attach to. A linen model
            has no modules before it runs, so there `init_adapters` and `model.init` raise it.
        RecipeError: NNX: a method's settings do not fit a module, or two methods keep their arrays
            at one path; for linen it comes where TargetError does.
        UserError: `example_inputs` are no tuple of inputs.
        TypeError: `model` is no linen or NNX module, `recipe` no recipe, an argument belongs to the
            other API, or `rngs` are missing.

    Warns:
        AdapterWarning: targets also match modules with weights that their method cannot adapt; the
            message counts them. For linen it comes where TargetError does.

    Example:
        >>> import adapters_jax as aj
        >>> from flax import nnx
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> adapted.lora["a"].shape, hasattr(model, "lora")
        ((4, 2), False)
    """
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(
            f"adapt: got {_described(model)}, expected a linen or NNX module; write "
            "aj.adapt(model, recipe)"
        )
    recipe = Recipe(recipe)
    if isinstance(model, nn.Module):
        if rngs is not None or example_inputs is not None:
            raise TypeError(
                "adapt: rngs and example_inputs are for NNX models; for this linen model write "
                "model = aj.adapt(model, recipe), then "
                "params = aj.init_adapters(model, params, key, *example_inputs)"
            )
        return adapt_linen(model, recipe)
    if rngs is None:
        raise TypeError(
            "adapt: an NNX model needs rngs; write aj.adapt(model, recipe, rngs=nnx.Rngs(0))"
        )
    return adapt_nnx(model, recipe, rngs, example_inputs)


def _described(model: Any) -> str:
    """What was given in the place of a model: the class of a model, or something of its type."""
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
