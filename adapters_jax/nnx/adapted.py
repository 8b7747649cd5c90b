"""The NNX API: a model with adapters that shares the arrays of the given one."""

from typing import Any

from flax import nnx
from flax.nnx import bridge

from adapters_jax.abstract import Inputs, is_abstract
from adapters_jax.attached import check_nested, check_reached, check_targets, taken
from adapters_jax.errors import UserError
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.nnx.attachment import grow, module_at, refresh_all
from adapters_jax.nnx.graph import copy, modules_of, params_of, variable_path
from adapters_jax.nnx.held import AdapterParam, Held, holds, point_of, trained_class
from adapters_jax.nnx.linen_inside import INSIDE
from adapters_jax.nnx.points import points_of
from adapters_jax.recipe import Recipe


def _other_names(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared modules and tied parameters, each with the path to use."""
    known = modules_of(model).keys() | params_of(model).keys()
    names: dict[str, str] = {}
    for paths in nnx.find_duplicates(model):
        every = list(map(variable_path, paths))
        own = next((path for path in every if path in known), None)
        if own is not None:
            names |= {path: own for path in every if path != own}
    return names


def adapt(
    model: nnx.Module,
    recipe: Recipe,
    rngs: nnx.Rngs,
    example_inputs: Any = None,
) -> nnx.Module:
    """See `adapters_jax.adapt`."""
    _check_streams(recipe, rngs)
    inputs = Inputs.of(example_inputs)
    if is_abstract(nnx.state(model)):
        # An abstract model stays abstract, and the caller's random streams do not advance.
        return nnx.eval_shape(
            lambda model, rngs: _adapted(model, recipe, rngs, inputs), model, copy(rngs)
        )
    return _adapted(model, recipe, rngs, inputs)


def _check_streams(recipe: Recipe, rngs: nnx.Rngs) -> None:
    """Raises TypeError where rngs is no nnx.Rngs, UserError where it lacks a stream."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"adapt: rngs is of {type(rngs).__name__}, expected nnx.Rngs; write rngs=nnx.Rngs(0)"
        )
    streams = {"params": bool(recipe.attached), "dropout": any(m.dropout for m in recipe.attached)}
    missing = [name for name, used in streams.items() if used and not hasattr(rngs, name)]
    if missing:
        raise UserError(
            f"adapt: rngs has no stream {' and no '.join(missing)}; write rngs=nnx.Rngs(0), or "
            f"name it: rngs=nnx.Rngs({', '.join(f'{name}={i}' for i, name in enumerate(streams))})"
        )


def _adapted(
    model: nnx.Module, recipe: Recipe, rngs: nnx.Rngs, inputs: Inputs | None
) -> nnx.Module:
    """An adapted copy of the model, after all checks."""
    adapted = copy(model)
    whole = getattr(adapted, "adapter_recipe", Recipe()) + recipe
    found = points_of(adapted, recipe, inputs)
    attached, frozen = [each for each, _ in found.attached], params_of(adapted)
    others = _other_names(adapted)
    check_targets(
        recipe, attached, found.modules, found.points, found.reads, frozen, others, found.layers
    )
    check_reached(attached, found.reached)
    check_nested(attached)
    for each, layers in found.attached:
        module = module_at(adapted, each.module, each.point.path)
        before = holds(module)
        there = [held.method for held in before if held.weight == each.point.weight]
        whole.check([*there, each.method], each.point.path)
        grow(module, each, layers, rngs)
    for path, variable in frozen.items():
        owner = recipe.owner(path)
        if owner and type(variable) is not AdapterParam:
            raise taken(owner.module, owner.method)  # the recipe takes it for an adapter's leaf
        if recipe.trains(path):
            variable.__class__ = trained_class(type(variable))  # type: ignore[arg-type]
    adapted.adapter_recipe = whole
    if any(method.acts_on != "leaf" for method in whole.attached):
        for path, module in modules_of(adapted).items():
            if isinstance(module, bridge.ToNNX):
                setattr(module, INSIDE, (path, whole))
    refresh_all(adapted)
    return adapted


def recipe_of(model: Any) -> Recipe:
    """The recipe of an adapted model.

    Raises:
        UserError: the model has no adapters.
    """
    if not hasattr(model, "adapter_recipe"):
        raise UserError(
            f"{type(model).__name__} has no adapters; call aj.adapt(model, recipe) first"
        )
    return model.adapter_recipe


def adapted_points(model: nnx.Module) -> list[tuple[Any, Held, AttachmentPoint]]:
    """Every module that has adapters, with each of its methods and the attachment point."""
    return [
        (module, held, point_of(module, held))
        for module in modules_of(model).values()
        for held in holds(module)
    ]


def detach(model: Any) -> None:
    """Removes every adapter from a model, in place, and restores its modules' classes."""
    for module in list(modules_of(model).values()):
        for name in dict.fromkeys(held.node[0] for held in holds(module)):
            delattr(module, name)
        if holds(module):
            del module.adapter_methods
        if hasattr(module, INSIDE):
            delattr(module, INSIDE)
    for variable in params_of(model).values():
        if isinstance(variable, AdapterParam):
            variable.__class__ = type(variable).adapted_from  # type: ignore[assignment]
    del model.adapter_recipe
    refresh_all(model)
