"""Where the methods of a recipe attach in a linen model: from abstract runs of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PRNGKeyArray

from adapters_jax.errors import RecipeError
from adapters_jax.linen.interceptor import Interceptor
from adapters_jax.linen.weights import leaf_methods, reads_of
from adapters_jax.placement import (
    Placement,
    Placements,
    checked,
    chosen,
    on_outputs,
    taken,
)
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around, join
from adapters_jax.trace.inputs import MISFITS, Inputs, explained, is_array
from adapters_jax.trace.program import reaching
from adapters_jax.trace.reads import Tracked
from adapters_jax.trees import Tree, flatten, numbered_paths, unflatten


def points_of(
    base: nn.Module, recipe: Recipe, inputs: Inputs, params: Tree = None
) -> tuple[Placements, Tree]:
    """Finds where a recipe's methods attach in a base; see `points`.

    Args:
        params: the base's parameters, abstract, if they are known, which may save a run.
    """
    interceptor, like, own, reads = _runs(base, recipe, inputs, params)
    reads = {path: leaf for path, leaf in reads.items() if len(own[path].shape) > 1}
    whole = flatten(like)
    grown = {path: tuple(x.shape) for path, x in whole.items()}
    shapes = {path: tuple(x.shape) for path, x in own.items()}
    layers = _layers(interceptor, shapes)
    found: list[Placement] = chosen(recipe, reads, shapes, layers) if reads else []
    for _, visit in interceptor.visited.values():
        # flax's transforms have given layer axes to their arrays.
        found += [each.stacked(grown) for each in on_outputs(recipe, visit)]
    called = {path: module for path, (module, _) in interceptor.visited.items()}
    visits = {path: visit for path, (_, visit) in interceptor.visited.items()}
    modules = {**interceptor.uncalled, **called}
    given = flatten(params or {})
    unused = {p: x for p, x in given.items() if p not in own} if own.keys() <= given.keys() else {}
    every = {**{path: Tracked(path) for path in unused}, **reads}
    leaves, reached = {**own, **unused}, interceptor.reached
    placed = checked(recipe, found, modules, visits, every, leaves, {}, layers, reached)
    numbered = numbered_paths(like)
    held = {*own, *(above for path in own for above in around(path))}
    for each in placed:
        shared = each.method.shared_leaves
        if shared and each.method.slot in held:
            raise taken("", each.method)
        for name in shared:  # flax made a copy for each module
            whole.pop(join(each.prefix, name), None)
        if each.method.acts_on == "weight":
            if join(each.module, each.method.slot) in held:
                raise taken(each.module, each.method)
            if each.weight_path in numbered:
                raise RecipeError(
                    f"{type(each.method).__name__} cannot be attached at {each.path!r}, a "
                    "number in a list of an NNX module, since a tree of parameters has no names "
                    "beside numbers; keep the weights in an nnx.Dict, or exclude it: "
                    f"'!{each.path}'"
                )
        for path, shape in each.array_shapes.items():
            whole[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return placed, unflatten(whole, like)


def with_copies(params: Tree, placements: Placements) -> Tree:
    """Parameters with one of the copies that flax made of each shared array, in its own place."""
    flat = flatten(params)
    for each in placements:
        for name in each.method.shared_leaves:
            copy = flat.pop(join(each.prefix, name), None)
            if copy is not None:
                flat.setdefault(each.paths()[name], copy[(0,) * len(each.layers)])
    return unflatten(flat, params)


def _runs(
    base: nn.Module, recipe: Recipe, inputs: Inputs, params: Tree
) -> tuple[Interceptor, Tree, dict[str, Any], dict[str, Tracked]]:
    """What abstract runs of a base show: modules, all leaves, its own, and reads of these."""
    changing = leaf_methods(recipe)
    if params is not None and len(changing) == len(recipe.attached):
        own = flatten(params)
        try:
            with explained(base, inputs):
                reads, interceptor = reads_of(base, {"params": params}, inputs)
        except MISFITS:
            reads = {}  # these are not its parameters: another run shows what its are
        if reads and all(path in reads and reads[path].reads for path in own):
            return interceptor, params, own, reads
    interceptor, variables = seen(base, recipe, inputs)
    tree = variables.get("params", {})
    whole = flatten(tree)
    owners = recipe.owners(whole)
    for owner in owners.values():
        if owner.method.acts_on == "weight":  # none of them is there yet
            raise taken(owner.module, owner.method)
    own = {path: x for path, x in whole.items() if path not in owners}
    if not changing:
        return interceptor, tree, own, {}
    with explained(base, inputs):
        reads, _ = reads_of(base, {**variables, "params": unflatten(own, tree)}, inputs)
    return interceptor, tree, own, reads


def _layers(interceptor: Interceptor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """How many layer axes the leaves of each module are stacked on, by what its code saw."""
    found = {}
    for path, (_, visit) in interceptor.visited.items():
        for name, inside in visit.own.items():
            outside = shapes.get(join(path, name), inside)
            found[path] = max(len(outside) - len(inside), 0)
    return found


def seen(base: nn.Module, recipe: Recipe, inputs: Inputs, at: str = "") -> tuple[Interceptor, Tree]:
    """Runs a model abstractly.

    Args:
        base: the model.
        recipe: a recipe, whose methods on outputs and attention run.
        inputs: example inputs, as `aj.inputs` makes them; only shapes and dtypes matter.
        at: the path of the model in a larger one.

    Returns:
        The interceptor that saw every module, and all variables as shapes and dtypes.

    Raises:
        RecipeError: the base has the name of a method's leaves.
        UserError: the model takes other arguments than the example inputs.

    Example:
        >>> import adapters_jax as aj
        >>> model = nn.Sequential([nn.Dense(3), nn.relu])
        >>> interceptor, variables = seen(model, Recipe(), aj.inputs(jnp.ones((1, 4))))
        >>> list(interceptor.visited), variables["params"]["layers_0"]["kernel"].shape
        (['layers_0', ''], (4, 3))
    """
    interceptors: list[Interceptor] = []

    def run(module: nn.Module) -> Any:
        interceptors.append(Interceptor(recipe, module, init=True, at=at))
        with nn.intercept_methods(interceptors[-1]):
            return inputs.zeros().call(module)

    def init(key: PRNGKeyArray) -> tuple[list[Any], Tree]:
        y, variables = nn.Module.init_with_output(base, key, method=run)
        return [x for x in jax.tree.leaves(y) if is_array(x)], nn.meta.unbox(variables)

    with explained(base, inputs):
        traced, (y, variables) = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0))
    (interceptor,) = interceptors
    counted = [i < len(y) for i in range(len(traced.jaxpr.outvars))]
    interceptor.reached = reaching(traced.jaxpr, counted, gradient=True).names
    return interceptor, variables


def shapes_of(params: Tree) -> Tree:
    """A tree as shapes and dtypes, without the boxes of partitioned parameters.

    Args:
        params: a tree of arrays or `jax.ShapeDtypeStruct`, some in boxes such as `nn.Partitioned`.

    Returns:
        The same tree of `jax.ShapeDtypeStruct`.

    Example:
        >>> shapes_of({"kernel": nn.Partitioned(jnp.ones((4, 3)), names=(None, "model"))})
        {'kernel': ShapeDtypeStruct(shape=(4, 3), dtype=float32)}
    """
    return jax.eval_shape(nn.meta.unbox, params)
