"""`adapt`: one function for linen, NNX, plain functions, Equinox and Haiku."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from flax import linen as nn
from flax import nnx

from adapters_jax.linen import Adapted
from adapters_jax.linen import adapt as adapt_linen
from adapters_jax.linen.functions import AdaptedFunction
from adapters_jax.linen.functions import adapt as adapt_function
from adapters_jax.linen.functions.function import is_function
from adapters_jax.methods import Method
from adapters_jax.methods.calibration import Calibration
from adapters_jax.nnx import adapt as adapt_nnx
from adapters_jax.recipe import Recipe
from adapters_jax.trace.inputs import Inputs


@overload
def adapt(model: nn.Module, recipe: Recipe | Method | Sequence[Method], /) -> Adapted: ...


@overload
def adapt(
    model: nnx.Module,
    recipe: Recipe | Method | Sequence[Method],
    /,
    *,
    rngs: nnx.Rngs,
    example_inputs: Iterable[Any] | Inputs | None = None,
    calibration: Calibration | None = None,
) -> nnx.Module: ...


@overload
def adapt(
    model: Callable[..., Any],
    params: Any,
    recipe: Recipe | Method | Sequence[Method],
    /,
    *,
    example_inputs: Iterable[Any] | Inputs,
) -> AdaptedFunction: ...


def adapt(
    model: Any,
    params: Any = None,
    recipe: Recipe | Method | Sequence[Method] | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    example_inputs: Iterable[Any] | Inputs | None = None,
    calibration: Calibration | None = None,
) -> Any:
    """Gives a model adapters without editing it.

    `adapt(model, recipe)` is for linen, NNX (with `rngs`) and Equinox (with `example_inputs`), and
    `adapt(fn, params, recipe, example_inputs=...)` for a function `fn(params, *inputs)`.

    Args:
        model: a linen, NNX or Equinox module, or a function of its parameters, such as the `apply`
            of Haiku; it is not changed. A model that has adapters gets more.
        params: functions only: the parameters, arrays or `jax.ShapeDtypeStruct` in any pytree.
        recipe: which modules or arrays get adapters, and what else trains; or its entries.
        rngs: NNX only: seeds of the adapters and of their dropout.
        example_inputs: inputs of the model, arrays or `jax.ShapeDtypeStruct`, in a tuple or as
            `aj.inputs(x, mask=m)`. In NNX they are needed where a target is not a single layer of
            flax, to find how the model uses its weights, and the width of its output; so also for a
            bottleneck on `nnx.MultiHeadAttention`. Functions and Equinox always need them; linen
            gets them from `init_adapters`.
        calibration: NNX only: what `aj.calibrate` saw, for methods that start from activations;
            others give it to `init_adapters`.

    Returns:
        For linen, a module with the same methods and parameter paths, whose adapter leaves
        `init_adapters` makes. For NNX, a model with adapters that shares the base's arrays. For a
        function or an Equinox module, a function of the tree that `init_adapters` makes.

    Raises:
        TargetError: a pattern matches no module that its method can attach to. A linen model has no
            modules before it runs, so there `init_adapters` and `model.init` raise it.
        RecipeError: a method's settings do not fit a module, or two methods keep their arrays at
            one path; for linen it comes where TargetError does.
        UserError: `example_inputs` are no tuple of inputs, or a function does not take them, or
            reads none of its parameters; or the calibration is missing or of another model.
        TypeError: `model` is none of these, `recipe` no recipe, an argument belongs to another
            kind of model, or `rngs` or the inputs are missing.

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
    flax = isinstance(model, nn.Module | nnx.Module)
    if recipe is None:
        params, recipe = None, params
    elif flax or isinstance(params, Recipe | Method):
        raise TypeError(
            f"adapt: got {_described(params)} between {_described(model)} and the recipe; write "
            "aj.adapt(model, recipe) for a model, aj.adapt(fn, params, recipe, "
            "example_inputs=(...)) for a function"
        )
    if calibration is not None and not isinstance(model, nnx.Module):
        raise TypeError(
            "adapt: calibration is for NNX models; for this one write params = "
            "aj.init_adapters(adapted, params, key, *example_inputs, calibration=...)"
        )
    if not flax:
        return _adapted_function(model, params, recipe, rngs, example_inputs)
    recipe = _after_those_of(model, recipe)
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
    return adapt_nnx(model, recipe, rngs, example_inputs, calibration)


def _adapted_function(model: Any, params: Any, recipe: Any, rngs: Any, inputs: Any) -> Any:
    """The adapted function, after the checks of what it is."""
    if not is_function(model):
        raise TypeError(
            f"adapt: got {_described(model)}, expected a linen, NNX or Equinox module, or a "
            "function; write aj.adapt(model, recipe)"
        )
    if rngs is not None:
        raise TypeError(
            "adapt: rngs are for NNX models; write aj.adapt(fn, params, recipe, "
            "example_inputs=(...))"
        )
    return adapt_function(model, params, _after_those_of(model, recipe), inputs)


def _after_those_of(model: Any, recipe: Any) -> Recipe:
    """A recipe for a model that may have adapters, which its compositions may name."""
    known = getattr(model, "adapter_recipe", None) or getattr(model, "recipe", None)
    known = known if isinstance(known, Recipe) else Recipe()
    return Recipe(known, recipe).beyond(len(known))


def _described(model: Any) -> str:
    """What was given in the place of a model: the class of a model, or something of its type."""
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
