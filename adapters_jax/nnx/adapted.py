"""The NNX API: a model with adapters that shares the arrays of the given one."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from adapters_jax.abstract import Inputs, is_abstract
from adapters_jax.attached import Attached, other_leaves, taken, usable_paths
from adapters_jax.errors import UserError
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.nnx.attachment import (
    AdapterParam,
    Held,
    grow,
    holds,
    point_of,
    refresh,
    trained_class,
)
from adapters_jax.nnx.graph import copy, modules_of, params_of, variable_path
from adapters_jax.nnx.points import points_of
from adapters_jax.recipe import Recipe, require_points
from adapters_jax.targets import require_match
from adapters_jax.weights.lazy import Tracked


def _check(
    recipe: Recipe,
    model: nnx.Module,
    found: Sequence[tuple[Attached, Any]],
    points: Mapping[str, AttachmentPoint],
    reads: Mapping[str, Tracked],
    traced: bool,
) -> None:
    """Raises TargetError for a pattern that matches nothing its method can attach to."""
    modules, shared = modules_of(model), _other_names(model)
    more = "" if traced else "; pass example_inputs=(...), which show how the model uses it"
    for method in recipe.attached:
        other = dict(shared)
        if isinstance(method, LeafMethod):
            usable = usable_paths(method, reads)
            other = other_leaves(params_of(model), usable) | shared
        else:
            usable = [path for path, point in points.items() if method.fits(point)]
        other |= {p: method.why_not(m) + more for p, m in modules.items() if p not in usable}
        targeted = [each.point.path for each, _ in found if each.method == method]
        require_points(method, usable, other, targeted or None)
    for patterns in recipe.unfrozen:
        require_match("Unfreeze", patterns, params_of(model), shared)


def _other_names(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared modules and tied parameters, each with the path to use."""
    known = modules_of(model).keys() | params_of(model).keys()
    names: dict[str, str] = {}
    for paths in nnx.find_duplicates(model):
        every = list(map(variable_path, paths))
        own = next((path for path in every if path in known), None)
        if own is not None:
            names |= {path: f"shared with {own}; use that path" for path in every if path != own}
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
    found, points, reads = points_of(adapted, recipe, inputs)
    _check(recipe, adapted, found, points, reads, inputs is not None)
    modules, frozen = modules_of(adapted), params_of(adapted)
    for each, layers in found:
        before = holds(modules[each.module])
        there = [held.method for held in before if held.weight == each.point.weight]
        whole.check([*there, each.method], each.point.path)
        grow(modules[each.module], each, layers, rngs)
    for path, variable in frozen.items():
        owner = recipe.owner(path)
        if owner and type(variable) is not AdapterParam:
            raise taken(owner.module, owner.method)  # the recipe takes it for an adapter's leaf
        if recipe.trains(path):
            variable.__class__ = trained_class(type(variable))  # type: ignore[arg-type]
    refresh(adapted, root=True)
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
        if hasattr(type(module), "adapted_from"):
            refresh(module)
    for variable in params_of(model).values():
        if isinstance(variable, AdapterParam):
            variable.__class__ = type(variable).adapted_from  # type: ignore[assignment]
    del model.adapter_recipe
