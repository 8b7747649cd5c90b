"""Linen modules inside NNX models, by flax's `ToNNX`, whose adapters the linen API finds and runs.

A `ToNNX` keeps linen's variables as attributes, in nested dictionaries, and passes them to the
linen module in each call. With adapters it passes the changed weights, and in the places where the
linen API reads them the arrays of methods on outputs and attention.
"""

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from adapters_jax.errors import RecipeError
from adapters_jax.linen import Interceptor, seen
from adapters_jax.nnx.containers import PlainDict, names_of
from adapters_jax.nnx.graph import holds, leaves_of, original
from adapters_jax.placement import Placement, Visit, on_outputs
from adapters_jax.recipe import Recipe
from adapters_jax.trace.inputs import Inputs, is_array
from adapters_jax.trees import flatten, join, unflatten

# The attribute of a `ToNNX` with its path and the recipe: flax's bridge takes all attributes for
# variables, but those with this prefix.
INSIDE = "to_nnx__adapters"


def called(module: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
    """Calls the linen module in a `ToNNX` with its adapters."""
    cls, run = original(type(module)), method
    if hasattr(module, INSIDE):
        path, recipe = getattr(module, INSIDE)

        def run(inner: Any, *args: Any, **kwargs: Any) -> Any:
            with linen.intercept_methods(Interceptor(recipe, inner, init=False, at=path)):
                return Inputs(args, kwargs, method).call(inner)

    view: Any = object.__new__(cls)
    given = _passed(module)
    state = {name: x for name, x in vars(module).items() if name.startswith("_pytree__")}
    vars(view).update(state, **given)
    y = cls.__call__(view, *args, **kwargs, **({} if run is None else {"method": run}))
    for name in names_of(view):
        if vars(view)[name] is not given.get(name):
            _store(module, name, vars(view)[name])
    return y


def _passed(node: Any) -> dict[Any, Any]:
    """The attributes of a `ToNNX`, or of a dictionary in it, as the linen module gets them."""
    parts: dict[Any, Any] = {}
    for name in names_of(node):
        value, key = vars(node)[name], getattr(type(node), "key_type", str)(name)
        if isinstance(value, PlainDict):
            parts[key] = _passed(value)
        elif name.startswith("to_nnx__"):
            parts[key] = value
        else:
            is_leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
            parts[key] = jax.tree.map(_of_flax, getattr(node, name), is_leaf=is_leaf)
    for held in holds(node):
        if held.method.acts_on != "weight" and held.arrays:
            leaves = leaves_of(node, held)
            parts[held.nodes[0]] = unflatten({name: nnx.Param(x) for name, x in leaves.items()})
    return parts


def _of_flax(x: Any) -> Any:
    """A Variable of the class that flax's bridge knows."""
    if not hasattr(type(x), "adapted_from"):
        return x
    bare = x.copy(x.get_raw_value())
    bare.__class__ = original(type(x))
    if "seen_from" in bare.get_metadata():
        bare.del_metadata("seen_from")
    return bare


def _store(node: Any, name: str, value: Any) -> None:
    """Stores what a linen module returned of its state; its parameters stay as they are."""
    parts = node if isinstance(node, dict) else vars(node)
    if isinstance(value, dict) and name in parts:
        for inner, part in value.items():
            _store(parts[name], inner, part)
    elif isinstance(node, dict):
        parts.update({} if isinstance(value, nnx.Param) else {name: value})
    elif not isinstance(value, nnx.Param):
        setattr(node, name, nnx.data(value))


class LinenCall(NamedTuple):
    """One call of a `ToNNX`.

    Attributes:
        inputs: what the linen module got.
        layers: the layer axes that the module is stacked on.
    """

    path: str
    module: Any
    inputs: Inputs
    layers: tuple[int, ...]

    @classmethod
    def of(
        cls, path: str, module: Any, args: Any, kwargs: Any, layers: tuple[int, ...]
    ) -> "LinenCall":
        """A call with these arguments; only their shapes matter."""
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x  # noqa: E731
        own = {name: x for name, x in kwargs.items() if name not in ("rngs", "mutable", "method")}
        args, own = jax.tree.map(shape, (args, own))
        return cls(path, module, Inputs(args, own, kwargs.get("method")), layers)


class Inside(NamedTuple):
    """What runs of the linen modules in a model show.

    Attributes:
        attached: each method on each linen module.
        modules: the linen modules by path.
        visits: what the runs show of them.
        reached: those whose results the model's outputs depend on.
    """

    attached: list[Placement]
    modules: dict[str, Any]
    visits: dict[str, Visit]
    reached: set[str]


def inside(recipe: Recipe, calls: Sequence[LinenCall], reached: Container[str]) -> Inside:
    """Finds where methods on outputs and attention attach in the linen modules of a model.

    Args:
        calls: the calls of the model's `ToNNX`.
        reached: the paths of those whose results the model's outputs depend on.

    Raises:
        RecipeError: one of them has dropout.
    """
    found = Inside([], {}, {}, set())
    for call in calls if any(m.acts_on != "weight" for m in recipe.attached) else ():
        interceptor, variables = seen(call.module.to_nnx__module, recipe, call.inputs, call.path)
        shapes = {path: x.shape for path, x in flatten(variables.get("params", {})).items()}
        shapes = {join(call.path, path): shape for path, shape in shapes.items()}
        new = {p: x for p, x in interceptor.visited.items() if p not in found.visits}
        found.modules.update({path: module for path, (module, _) in new.items()})
        found.visits.update({path: visit for path, (_, visit) in new.items()})
        found.reached.update(interceptor.reached if call.path in reached else ())
        for _, visit in new.values():
            for each in on_outputs(recipe, visit):
                if each.method.dropout:
                    raise RecipeError(
                        f"{type(each.method).__name__} has dropout {each.method.dropout} and "
                        f"targets {each.module!r}, a linen module inside an NNX model, which has "
                        "no random stream for it; write dropout=0.0, or exclude it: "
                        f"'!{each.module}'"
                    )
                found.attached.append(each.stacked(shapes, call.layers))
    return found
