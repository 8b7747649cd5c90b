"""The weights of a linen model: how it reads them, and its parameters with the changed ones."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.linen.interceptor import Interceptor
from adapters_jax.methods import arrays
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.placement import Placement, own_leaves
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join
from adapters_jax.trace import reads
from adapters_jax.trace.inputs import Inputs, is_array
from adapters_jax.trace.reads import Tracked
from adapters_jax.trees import Tree, flatten, path_of, unflatten
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.lazy import Lazy, Thin, formed, lazy
from adapters_jax.weights.quantized import is_quantized, unboxed


def changed_weights(
    params: Tree,
    placements: Sequence[Placement],
    trace: Thin,
    key: PRNGKeyArray | None = None,
    gate: Array | None = None,
) -> Tree:
    """Parameters as the model's code sees them: with changed weights, without what changes them.

    Args:
        params: the whole parameter tree, with its boxes.
        key: for dropout while training; None in evaluation.
        gate: the tokens that gated methods act on.
    """
    flat = flatten(params)
    shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flat.items()}
    changes: dict[str, list[Any]] = {path: [] for path, leaf in flat.items() if is_quantized(leaf)}
    attached = [each for each in placements if each.method.acts_on == "weight"]
    owned = own_leaves(shapes)
    for each in attached:
        weight = flat[each.weight_path]
        own = arrays.key_at(key, each.prefix) if key is not None and each.method.dropout else None
        leaves = {name: formed(unboxed(leaf)) for name, leaf in each.leaves(flat).items()}
        leaves |= {"invoked": gate} if each.method.gated else {}
        point = each.point(owned[each.module])
        found = each.method.changes(leaves, point, lambda w=weight: formed(nn.meta.unbox(w)), own)
        for name, several in found.items():
            changes.setdefault(join(each.module, name), []).extend(several)
    added = {path for each in attached for path in each.paths().values()}
    seen = {path: leaf for path, leaf in flat.items() if path not in added}
    for each in placements:
        seen |= each.copies(flat) if each.method.acts_on != "weight" else {}
    for path, several in changes.items():
        seen[path] = _seen(path, flat[path], several, trace)
    return unflatten(seen, params)


def _seen(path: str, leaf: Any, changes: list[Any], trace: Thin) -> Any:
    """A changed weight in the box of the weight, from which flax takes it.

    Inside another adapted model the leaf may be a changed or watched weight of that one. Its
    changes come first, since this model is the base that they were made for.
    """
    value = unboxed(leaf)
    if isinstance(value, Lazy):
        changes = [*value.changed.changes, *changes]
        changed = value.within(trace, replace(value.changed, changes=tuple(changes)))
    else:
        changed = lazy(trace, Changed.of(value, changes), path)
    return changed if is_quantized(leaf) else nn.meta.replace_boxed(leaf, changed)


def reads_of(
    base: nn.Module, variables: Mapping[str, Tree], inputs: Inputs
) -> tuple[dict[str, Tracked], Interceptor]:
    """How a model reads each float leaf, by an abstract run, and the modules that it ran.

    Args:
        base: the model.
        variables: its parameters, abstract, without boxes; of other collections, those that are
            missing are initialised.
        inputs: example inputs, as `aj.inputs` makes them; only shapes and dtypes matter.

    Returns:
        By path of each float leaf that is no scalar, its `reads`: operations, with the axes of the
        leaf that meet an input and those that the output keeps; and the interceptor of the run.

    Example:
        >>> import adapters_jax as aj
        >>> params = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
        >>> base, x = nn.Dense(3, use_bias=False), jnp.ones((1, 4))
        >>> reads, _ = reads_of(base, {"params": params}, aj.inputs(x))
        >>> [(read.how, read.inputs, read.outputs) for read in reads["kernel"].reads]
        [('product', frozenset({0}), frozenset({1}))]
    """
    tracked = [
        path
        for path, leaf in flatten(variables["params"]).items()
        if leaf.shape and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    interceptors: list[Interceptor] = []
    arrays, whole = inputs.split()

    def call(given: Inputs, module: nn.Module) -> Any:
        interceptors.append(Interceptor(Recipe(), module, init=False))
        with nn.intercept_methods(interceptors[-1]):
            return given.call(module)

    def run(variables: Any, arrays: Any) -> Any:
        key = jax.random.key(0)
        y, _ = nn.Module.apply(
            base,
            variables,
            rngs={"params": key, "dropout": key},
            mutable=DenyList("params"),
            method=functools.partial(call, whole(arrays)),
        )
        return [x for x in jax.tree.leaves(y) if is_array(x)]

    traced = jax.make_jaxpr(run)(dict(variables), arrays)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(dict(variables))]
    numbers = {path: i for i, path in enumerate(paths)}
    given = range(len(paths), len(paths) + len(arrays))
    leaves = {numbers[f"params/{path}"]: path for path in tracked}
    return reads.reads_of(traced, leaves, given), interceptors[-1]


def run_abstractly(model: nn.Module, params: Tree, inputs: Inputs) -> Any:
    """The shapes of a model's outputs; collections other than parameters are initialised.

    Args:
        model: a linen model, adapted or not.
        params: its parameter tree; arrays or abstract.
        inputs: example inputs, as `aj.inputs` makes them; only shapes and dtypes matter.

    Returns:
        The arrays among the outputs, as a list of `jax.ShapeDtypeStruct`.

    Example:
        >>> import adapters_jax as aj
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        >>> run_abstractly(nn.Dense(3), params, aj.inputs(jnp.ones((2, 4))))
        [ShapeDtypeStruct(shape=(2, 3), dtype=float32)]
    """

    def run(params: Tree) -> Any:
        given = inputs.zeros()
        key = jax.random.key(0)
        y, _ = model.apply(
            {"params": params},
            rngs={"params": key, "dropout": key},
            mutable=DenyList("params"),
            method=lambda base: given.call(base),
        )
        return [x for x in jax.tree.leaves(y) if is_array(x)]

    return jax.eval_shape(run, params)


def leaf_methods(recipe: Recipe) -> list[LeafMethod]:
    """The methods of a recipe that change weights."""
    return [method for method in recipe.attached if isinstance(method, LeafMethod)]
