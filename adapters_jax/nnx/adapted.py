"""The NNX API: a model with adapters that shares the arrays of the given one."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from adapters_jax.abstract import is_abstract
from adapters_jax.errors import UserError
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.nnx.attachment import AdapterParam, grow, taken, trained_class
from adapters_jax.nnx.graph import copy, modules_of, params_of, variable_path
from adapters_jax.nnx.points import known_width, point_of, points_of
from adapters_jax.recipe import Recipe, reason, require_points
from adapters_jax.targets import selects


def _check(recipe: Recipe, model: nnx.Module, points: dict[str, Any], traced: bool) -> None:
    """Raises TargetError for a pattern that matches nothing its method can attach to."""
    modules, shared = modules_of(model), _other_names(model)
    for method in recipe:
        tied = {
            path: None if selects(method.targets, own) else f"shared with {own}; use that path"
            for path, own in shared.items()
        }
        if method.slot is None:
            require_points(method, list(params_of(model)), tied)
            continue
        usable = [path for path, (point, _) in points.items() if method.fits(point)]
        other = {
            path: reason(method, module, _own(module, points.get(path)))
            for path, module in modules.items()
            if path not in usable
        }
        for path in other.keys() & points.keys():
            wide = dataclasses.replace(points[path][0], width=1)
            if not traced and method.fits(wide):  # only the width of the output is missing
                why = method.why_not(modules[path])
                other[path] = f"{why}; pass example_inputs=(...) so that its output is known"
        require_points(method, usable, other | tied)


def _own(module: Any, found: tuple[AttachmentPoint, tuple[int, ...]] | None) -> list[Any]:
    """The shapes of a module's own parameters, without layer axes."""
    layers = len(found[1]) if found else 0
    own = [value for value in vars(module).values() if isinstance(value, nnx.Param)]
    return [jax.ShapeDtypeStruct(x.shape[layers:], x.dtype) for x in own]


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
    example_inputs: tuple[Any, ...] | None = None,
) -> nnx.Module:
    """See `adapters_jax.adapt`."""
    _check_streams(recipe, rngs)
    if is_abstract(nnx.state(model)):
        # An abstract model stays abstract, and the caller's random streams do not advance.
        return nnx.eval_shape(
            lambda model, rngs: _adapted(model, recipe, rngs, example_inputs), model, copy(rngs)
        )
    return _adapted(model, recipe, rngs, example_inputs)


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
    model: nnx.Module, recipe: Recipe, rngs: nnx.Rngs, example_inputs: tuple[Any, ...] | None
) -> nnx.Module:
    """An adapted copy of the model, after all checks."""
    adapted = copy(model)
    whole = getattr(adapted, "adapter_recipe", Recipe()) + recipe
    points = points_of(adapted, example_inputs)
    _check(recipe, adapted, points, example_inputs is not None)
    modules, frozen = modules_of(adapted), params_of(adapted)
    for path, (point, layers) in points.items():
        for method in recipe.at(path):
            if method.fits(point):
                whole.at(path)  # raises where methods of two recipes clash
                grow(modules[path], method, point, layers, rngs)
    for path, variable in frozen.items():
        owner = recipe.owner(path)
        if owner and type(variable) is not AdapterParam:
            raise taken(*owner)  # the recipe takes it for an adapter's leaf
        if recipe.trains(path):
            variable.__class__ = trained_class(type(variable))  # type: ignore[arg-type]
    adapted.adapter_recipe = whole
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


def adapted_points(model: nnx.Module) -> list[tuple[Any, Method, AttachmentPoint]]:
    """Every module that has adapters, with each of its methods and the attachment point."""
    return [
        (module, method, point_of(module, path, known_width(module)))
        for module in modules_of(model).values()
        for method, path in getattr(module, "adapter_methods", ())
    ]


def detach(model: Any) -> None:
    """Removes every adapter from a model, in place, and restores its modules' classes."""
    for module in list(modules_of(model).values()):
        if hasattr(module, "adapter_methods"):
            for method, _ in module.adapter_methods:
                delattr(module, method.slot)
            del module.adapter_methods
            module.__class__ = type(module).adapted_from
    for variable in params_of(model).values():
        if isinstance(variable, AdapterParam):
            variable.__class__ = type(variable).adapted_from  # type: ignore[assignment]
    del model.adapter_recipe
