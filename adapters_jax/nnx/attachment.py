"""A method on an NNX module: its Variables become a child of the module."""

import functools
from typing import Any

from flax import nnx

from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import started
from adapters_jax.nnx.classes import refresh
from adapters_jax.nnx.containers import AddedDict, as_module
from adapters_jax.nnx.graph import modules_of
from adapters_jax.nnx.held import AdapterParam, holds, leaves_of
from adapters_jax.placement import Placement, taken
from adapters_jax.weights.quantized import is_quantized


def children_of(placed: Placement, rngs: nnx.Rngs) -> dict[str, Any]:
    """The Variables of a method, nested by their names, and its dropout."""
    children: dict[str, Any] = {}
    method, shapes = placed.method, dict(placed.arrays)
    for name, leaf in method.leaves(placed.point()).items():
        *groups, last = name.split("/")
        holder = functools.reduce(
            lambda d, group: d.setdefault(group, nnx.Dict()), groups, children
        )
        holder[last] = AdapterParam(leaf.init(rngs.params(), shapes[name]))
    if method.dropout:
        drop = children["dropout"] = nnx.Dropout(method.dropout, rngs=rngs)
        if placed.layers:
            drop.rngs = drop.rngs.split(placed.layers)
    return children


def grow(module: Any, placed: Placement, rngs: nnx.Rngs) -> None:
    """Adds the leaves of a method to a module.

    Args:
        module: the module.
        placed: the method, and where it is attached.
        rngs: seeds the leaves and their dropout.
    """
    method = placed.method
    children = nnx.Dict(children_of(placed, rngs))
    beside = any(other.nodes[0] == method.slot for other in holds(module))
    if hasattr(module, method.slot) and not (placed.node and beside):
        raise taken(placed.module, method)
    if not placed.node:
        setattr(module, method.slot, children)
    else:
        if not beside:
            setattr(module, method.slot, nnx.Dict())
        setattr(getattr(module, method.slot), placed.node, children)
    if method.from_weight:
        weight = vars(module)[placed.weight]
        value = weight.get_raw_value()
        leaves, rest = started(method, leaves_of(module, placed), placed.point(), value)
        if not is_quantized(value):
            weight[...] = rest
        for name, leaf in leaves.items():
            children[name][...] = leaf
    module.adapter_methods = (*holds(module), placed)
    refresh(module)


def module_at(model: Any, path: str, weight: str) -> Any:
    """The module at a path, made of the plain container there.

    Args:
        model: the model.
        path: the path of the module.
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
                f"{weight!r} cannot be changed: the container around it is none of nnx.Dict, "
                "nnx.List, list, tuple and dictionary; keep it in one of these, or exclude it: "
                f"'!{weight}'"
            )
        vars(node)[name] = node = child
    return node


def refresh_all(model: Any) -> None:
    """Gives every module of a model the class that it needs."""
    for module in list(modules_of(model).values()):
        refresh(module)
