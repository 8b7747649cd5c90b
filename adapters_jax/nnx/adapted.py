"""The NNX API: a copy of a model's structure, not of its arrays, with adapters in it."""

import dataclasses
from typing import Any

from flax import nnx

from adapters_jax.abstract import is_abstract
from adapters_jax.errors import UserError
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.nnx.attachment import AdapterParam, grow, taken, trained_class
from adapters_jax.nnx.graph import copy, modules_of, params_of, variable_path
from adapters_jax.nnx.points import known_width, point_of, points_of
from adapters_jax.recipe import Recipe, require_points
from adapters_jax.targets import require_match


def _check(recipe: Recipe, model: nnx.Module, points: dict[str, Any], traced: bool) -> None:
    """Raises TargetError for a pattern that meets nothing, or nothing its method can attach to."""
    modules, shared = modules_of(model), _other_names(model)
    for method in recipe.attached:
        usable = [path for path, (point, _) in points.items() if method.fits(point)]
        other = {p: method.why_not(m) for p, m in modules.items() if p not in usable}
        for path in other.keys() & points.keys():
            wide = dataclasses.replace(points[path][0], width=1)
            if not traced and method.fits(wide):  # all it lacks is the width of the output
                other[path] += "; pass example_inputs=(...) so that its output is known"
        require_points(method, usable, other | shared)
    for patterns in recipe.unfrozen:
        require_match("Unfreeze", patterns, params_of(model), shared)


def _other_names(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared modules and tied parameters, with the one that they go by."""
    known = modules_of(model).keys() | params_of(model).keys()
    names: dict[str, str] = {}
    for paths in nnx.find_duplicates(model):
        places = list(map(variable_path, paths))
        own = next((path for path in places if path in known), None)
        if own is not None:
            names |= {path: f"shared, it goes by {own}" for path in places if path != own}
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
        # Abstract in, abstract out: the caller's streams stay where they are.
        return nnx.eval_shape(
            lambda model, rngs: _adapted(model, recipe, rngs, example_inputs), model, copy(rngs)
        )
    return _adapted(model, recipe, rngs, example_inputs)


def _check_streams(recipe: Recipe, rngs: nnx.Rngs) -> None:
    """Raises TypeError for something that is not Rngs, ValueError for a stream that it lacks."""
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
    """The model adapted, after every check."""
    adapted = copy(model)
    whole = getattr(adapted, "adapter_recipe", Recipe()) + recipe
    points = points_of(adapted, example_inputs)
    _check(recipe, adapted, points, example_inputs is not None)
    modules, frozen = modules_of(adapted), params_of(adapted)
    for path, (point, layers) in points.items():
        for method in recipe.at(path):
            if method.fits(point):
                whole.at(path)  # two rounds of adapting clash as two methods of one recipe do
                grow(modules[path], method, point, layers, rngs)
    for path, variable in frozen.items():
        owner = recipe.owner(path)
        if owner and type(variable) is not AdapterParam:
            raise taken(*owner)  # it would pass for an adapter's
        if recipe.trains(path):
            variable.__class__ = trained_class(type(variable))  # type: ignore[arg-type]
    adapted.adapter_recipe = whole
    return adapted


def recipe_of(model: Any) -> Recipe:
    """The recipe that a model was adapted by.

    Raises:
        ValueError: it was not adapted.
    """
    if not hasattr(model, "adapter_recipe"):
        raise UserError(
            f"{type(model).__name__} has no adapters; call aj.adapt(model, recipe) first"
        )
    return model.adapter_recipe


def adapted_points(model: nnx.Module) -> list[tuple[Any, Method, AttachmentPoint]]:
    """Every module that has adapters of its own, with each method attached to it and where."""
    return [
        (module, method, point_of(module, path, known_width(module)))
        for module in modules_of(model).values()
        for method, path in getattr(module, "adapter_methods", ())
    ]


def detach(model: Any) -> None:
    """Takes every adapter off a model of one's own, and gives its modules their classes back."""
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
