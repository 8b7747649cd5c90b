"""The NNX API: a model with adapters that shares the arrays of the given one."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx import bridge
from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint, started
from adapters_jax.methods.calibration import Calibration, inputs_for
from adapters_jax.nnx.classes import refresh_all, without_adapters
from adapters_jax.nnx.containers import AddedDict, as_module
from adapters_jax.nnx.graph import (
    ADAPTERS,
    CALLS,
    AdapterParam,
    FrozenAdapterParam,
    copy,
    frozen_leaves,
    holds,
    leaves_of,
    modules_of,
    param_class,
    params_of,
    point_of,
)
from adapters_jax.nnx.linen_inside import INSIDE
from adapters_jax.nnx.points import points_of
from adapters_jax.nnx.state import Calls
from adapters_jax.placement import Placement, Placements, taken
from adapters_jax.placement.patterns import check_loaded
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around
from adapters_jax.trace.inputs import Inputs, is_abstract
from adapters_jax.weights.fingerprints import remember
from adapters_jax.weights.quantized import is_quantized


def children_of(placed: Placement, rngs: nnx.Rngs) -> dict[str, Any]:
    """The Variables of a method, nested by their names, and its dropout."""
    children: dict[str, Any] = {}
    method, shapes = placed.method, dict(placed.arrays)
    for name, leaf in method.leaves(placed.point()).items():
        if name in method.shared_leaves:
            if placed.module:  # its place for the time of a call; see `sharing`
                children[name] = nnx.data(None)
            continue
        *groups, last = name.split("/")
        holder = functools.reduce(
            lambda d, group: d.setdefault(group, nnx.Dict()), groups, children
        )
        holder[last] = _variable(method, name, leaf.init(_drawn(rngs.params), shapes[name]))
    if method.gated:
        children["invoked"] = nnx.data(None)  # likewise
    if method.dropout:
        drop = children["dropout"] = nnx.Dropout(method.dropout, rngs=rngs)
        if placed.layers:
            drop.rngs = drop.rngs.split(placed.layers)
    return children


def _variable(method: Method, name: str, value: Array) -> nnx.Param:
    """The Variable of a leaf, whose class says whether it trains."""
    return AdapterParam(value) if method.trains(name) else FrozenAdapterParam(value)


def _grow_shared(model: Any, placements: Sequence[Placement], rngs: nnx.Rngs) -> None:
    """Adds the leaves that the modules of a method share to the model itself."""
    for each in placements:
        method = each.method
        if not method.shared_leaves or method.slot in vars(model):
            continue
        leaves, shapes = method.leaves(each.point()), dict(each.arrays)
        node: Any = nnx.Dict()
        for name in method.shared_leaves:
            value = leaves[name].init(_drawn(rngs.params), shapes[name])
            setattr(node, name, _variable(method, name, value))
        setattr(model, method.slot, node)


def _drawn(stream: nnx.RngStream) -> Array:
    """The next key of a stream, as a call of it gives."""
    # `count[...] += 1` asks a tracer for its sharding, and jax writes the history of the tracer
    # into the error that flax then drops: a sixth of the time of adapting an abstract model.
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key


def grow(module: Any, placed: Placement, rngs: nnx.Rngs, inputs: Any = None) -> None:
    """Adds the leaves of a method to a module, which then needs a `refresh` of its class.

    Args:
        rngs: seeds the leaves and their dropout.
        inputs: what a calibration has of the weight's inputs.
    """
    method, others = placed.method, holds(module)
    module.adapter_methods = (*others, placed)
    if not placed.arrays:
        return
    children = children_of(placed, rngs)
    beside = any(other.nodes[0] == method.slot for other in others)
    top = bool(method.shared_leaves) and not placed.module  # what is shared is there already
    if hasattr(module, method.slot) and not top and not (placed.node and beside):
        raise taken(placed.module, method)
    if not (beside or top):
        setattr(module, method.slot, nnx.Dict())
    held = {placed.node: nnx.Dict(children)} if placed.node else children
    for name, child in held.items():
        setattr(getattr(module, method.slot), name, child)
    if method.from_weight or inputs is not None:
        weight = vars(module)[placed.weight]
        value = weight.get_raw_value()
        leaves, rest = started(method, leaves_of(module, placed), placed.point(), value, inputs)
        if not is_quantized(value):
            weight[...] = rest
        for name, leaf in leaves.items():
            children[name][...] = leaf


def module_at(model: Any, path: str, weight: str) -> Any:
    """The module at a path, made of the plain container there.

    Args:
        weight: the path of the weight for which it is needed, for the message.

    Raises:
        RecipeError: what is there is no container that can become a module.
    """
    node = model
    for name in path.split("/") if path else ():
        if name not in vars(node):
            setattr(node, name, AddedDict())
        child = as_module(vars(node)[name])
        if child is None:
            raise RecipeError(
                f"{weight!r} cannot be changed: the container around it must be an nnx.Dict, an "
                "nnx.List, a list, a tuple or a dictionary; keep it in one of these, or exclude "
                f"it: '!{weight}'"
            )
        vars(node)[name] = node = child
    return node


def adapt(
    model: nnx.Module,
    recipe: Recipe | Method | Sequence[Method],
    rngs: nnx.Rngs,
    example_inputs: Any = None,
    calibration: Calibration | None = None,
) -> nnx.Module:
    """Gives an NNX model adapters; `adapters_jax.adapt` calls it.

    Args:
        model: an NNX module, concrete or abstract; it is not changed. One with adapters gets more.
        recipe, rngs, example_inputs, calibration: as in `adapters_jax.adapt`.

    Returns:
        A model with adapters, float32, that shares the base's arrays; abstract where `model` is.

    Raises:
        TargetError: a pattern matches nothing that its method can attach to, the model's outputs do
            not depend on a target, or one method attaches to an attention twice.
        RecipeError: methods on one module exclude each other, or the base has a name of theirs; or
            the model reads its parameters as state, and would read an adapter of an output so; or
            an entry is frozen, which only `load_adapter` can attach.
        UserError: `rngs` lacks a stream, the model takes other arguments than the inputs, or the
            calibration is missing or of another model.
        TypeError: `rngs` is no `nnx.Rngs`.

    Warns:
        AdapterWarning: as for `adapters_jax.adapt`.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = adapt(model, aj.LoRA("**", rank=2), nnx.Rngs(1))
        >>> {path: x.shape for path, x in params_of(adapted).items()}
        {'bias': (3,), 'kernel': (4, 3), 'lora/a': (4, 2), 'lora/b': (2, 3)}
    """
    # A recipe is taken as it is: `beyond` leaves entries whose members the model has.
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    _check_streams(recipe, rngs)
    check_loaded("adapt", recipe)
    inputs = Inputs.of(example_inputs)
    if is_abstract(nnx.state(model)):
        # An abstract model stays abstract, and the caller's random streams do not advance.
        return nnx.eval_shape(
            lambda model, rngs: _adapted(model, recipe, rngs, inputs), model, copy(rngs)
        )
    seen = functools.partial(inputs_for, "adapt", given=calibration)
    return _adapted(model, recipe, rngs, inputs, seen)


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
    model: nnx.Module,
    recipe: Recipe,
    rngs: nnx.Rngs,
    inputs: Inputs | None,
    seen: Callable[[Sequence[Placement]], Mapping[str, Any]] = lambda _: {},
) -> nnx.Module:
    """An adapted copy of the model, after all checks; `seen` has the inputs of its weights."""
    base = not hasattr(model, "adapter_recipe")
    bare = model if base else copy(model)
    if not base:
        detach(bare)  # else its adapters would be weights, and hide how the base's are read
    held = getattr(model, "adapter_recipe", Recipe())
    attached, stated = points_of(bare, recipe, inputs, held)
    adapted: Any = _grown(copy(model), recipe, attached, rngs, seen(attached))
    if inputs and base and CALLS in vars(adapted) and not callable(inputs.method):
        vars(adapted)[CALLS].note(adapted, inputs, stated)
    return adapted


def adapt_at(model: nnx.Module, recipe: Recipe, placements: Sequence[Placement]) -> nnx.Module:
    """Gives an NNX model adapters at known placements, without a run of the model.

    Args:
        model: an NNX module, concrete or abstract; it is not changed.
        placements: the placements, as a run of a model of the same modules and shapes found them.

    Returns:
        A model as from `adapt`; its adapters are to be overwritten, and their seed is fixed.

    Raises:
        RecipeError: methods on one module exclude each other, or the base has a name of theirs.
    """
    return _grown(copy(model), recipe, placements, nnx.Rngs(0))


def _grown(
    adapted: Any,
    recipe: Recipe,
    placements: Sequence[Placement],
    rngs: nnx.Rngs,
    seen: Mapping[str, Any] | None = None,
) -> nnx.Module:
    """A model with the adapters of a recipe at their placements, which are added in place."""
    whole = getattr(adapted, "adapter_recipe", Recipe()) + recipe
    frozen = params_of(adapted)
    if wrong := [m for m in recipe if m.shared_leaves and m.slot in vars(adapted)]:
        raise taken("", wrong[0])
    _grow_shared(adapted, placements, rngs)
    for each in placements:
        module = module_at(adapted, each.module, each.path)
        there = [other.method for other in holds(module) if other.weight == each.weight]
        whole.check([*there, each.method], each.path)
        grow(module, each, rngs, (seen or {}).get(each.weight_path))
    for path, owner in recipe.owners(frozen).items():
        if type(frozen[path]) not in ADAPTERS:
            raise taken(owner.module, owner.method)  # the recipe takes it for an adapter's leaf
    # The class of the Variable says what trains, so that filters of NNX select it by its type.
    for path in whole.trained(frozen):
        frozen[path].__class__ = param_class(AdapterParam, type(frozen[path]))  # type: ignore[arg-type]
    adapted.adapter_recipe = whole
    if any(method.acts_on != "weight" for method in whole.attached):
        for path, module in modules_of(adapted).items():
            if isinstance(module, bridge.ToNNX):
                setattr(module, INSIDE, (path, whole))
    _note_calls(adapted)
    refresh_all(adapted)
    remember(frozen_leaves(adapted))
    return adapted


def _note_calls(model: Any) -> None:
    """Gives each module around adapters what is to be known of its calls."""
    modules = modules_of(model)
    held = [path for path, module in modules.items() if holds(module)]
    outside = {each for path in held for each in (path, *around(path), "")}
    for path in outside & modules.keys():
        if not isinstance(modules[path], nnx.List | nnx.Dict):  # their attributes are their parts
            setattr(modules[path], CALLS, Calls())


def recipe_of(model: Any) -> Recipe:
    """The recipe of an adapted model.

    Args:
        model: an NNX model; one adapted several times has all their methods in one recipe.

    Raises:
        UserError: the model has no adapters.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> recipe_of(aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1)))
        Recipe(
          LoRA(targets=('**',), rank=2),
        )
    """
    if not hasattr(model, "adapter_recipe"):
        raise UserError(
            f"{type(model).__name__} has no adapters; call aj.adapt(model, recipe) first"
        )
    return model.adapter_recipe


def adapted_points(model: nnx.Module) -> list[tuple[Any, Placement, AttachmentPoint]]:
    """Every module that has adapters, with each of its methods and the attachment point.

    Args:
        model: an adapted NNX model.

    Returns:
        A triple for each method on each module: the module; the placement, with `method`, `path`
        and `prefix`, the path of the arrays; and the point, with the module's shapes. Empty for a
        model without adapters.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> ((_, placed, point),) = adapted_points(adapted)
        >>> placed.method.rank, placed.prefix, point.own
        (2, 'lora', {'bias': (3,), 'kernel': (4, 3)})
    """
    return [
        (module, placed, point_of(module, placed))
        for module in modules_of(model).values()
        for placed in holds(module)
    ]


def placements_of(model: nnx.Module) -> Placements:
    """Where the adapters of a model are, in the order of its recipe's methods."""
    found = [placed for module in modules_of(model).values() for placed in holds(module)]
    return Placements.ordered(recipe_of(model), found)


def detach(model: Any) -> None:
    """Removes every adapter from a model, in place, and restores its modules' classes.

    What the recipe unfroze keeps its value and is a frozen parameter again.

    Args:
        model: an adapted NNX model.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> detach(adapted)
        >>> type(adapted).__name__, list(params_of(adapted))
        ('Linear', ['bias', 'kernel'])
    """
    for variable in params_of(model).values():
        if isinstance(variable, AdapterParam):
            variable.__class__ = type(variable).adapted_from  # type: ignore[assignment]
    shared = [method.slot for method in model.adapter_recipe if method.shared_leaves]
    del model.adapter_recipe
    without_adapters(model)
    for slot in shared:
        if slot in vars(model):
            delattr(model, slot)
