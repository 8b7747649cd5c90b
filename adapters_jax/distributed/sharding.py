"""Layouts: which device holds which part of a base and of its adapters.

A layout is a sharding for every leaf; XLA (GSPMD) gives the same results with any layout. The
sharding of a base leaf comes from its own annotations, else from the first rule whose pattern
matches its path, else it splits the largest axis that the mesh divides. The factors of LoRA inherit
the sharding of the kernel beside them: A of its input axes, B of its output axes. All other trained
leaves are small, and every device has them whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.distributed.mesh import ShardingError, check_mesh, place
from adapters_jax.errors import shown
from adapters_jax.methods import Method
from adapters_jax.nnx import AdapterParam, recipe_of
from adapters_jax.placement import Placement, in_tree
from adapters_jax.recipe import Recipe
from adapters_jax.targets import matches, require_match
from adapters_jax.training.state import TrainState
from adapters_jax.training.together import Optimizers, stack_states, unstack_states
from adapters_jax.trees import Tree, flatten, path_of
from adapters_jax.weights.factors import RANK
from adapters_jax.weights.quantized import is_quantized, unboxed

WEIGHTS = ("fsdp", "model")  # the axes that split a base without rules
SMALL = 2**16  # every device has leaves with fewer elements whole, unless `small` is given
Rules = Mapping[str, P]


def layout(
    params: Tree,
    mesh: Mesh,
    rules: Rules | None = None,
    recipe: Recipe | Method | None = None,
    small: int = SMALL,
) -> dict[str, NamedSharding]:
    """Lays out every parameter.

    Args:
        params: a linen tree with its boxes (`nn.with_partitioning`), or an NNX state with its
            Variables' metadata; arrays or abstract.
        mesh: of named axes.
        rules: partition specs by pattern of the parameter's path; the first that matches counts.
            They are for base leaves without annotations, and for adapters' leaves.
        recipe: tells adapters' leaves from the base's; None where there are none.
        small: leaves with fewer elements, without annotation and rule, are whole on every device.

    Returns:
        A sharding by path.

    Raises:
        ShardingError: an axis is not of the mesh, or its size does not divide a dimension.
        TargetError: a rule matches no parameter.
        UserError: `params` is not a tree of parameters.

    Example:
        >>> import adapters_jax as aj, jax.numpy as jnp
        >>> mesh = aj.make_mesh("data=-1,model=1")
        >>> where = layout({"q": {"kernel": jnp.ones((8, 4))}}, mesh, {"q/*": P(None, "model")})
        >>> where["q/kernel"].spec == P(None, "model")
        True
    """
    return _layout(_leaves(params), mesh, rules, Recipe(recipe or ()), small)


def _layout(
    leaves: Mapping[str, tuple[Any, P | None]],
    mesh: Mesh,
    rules: Rules | None,
    recipe: Recipe,
    small: int,
) -> dict[str, NamedSharding]:
    rules = dict(rules or {})
    require_match("sharding rules", tuple(rules), leaves)
    shapes = {path: tuple(leaf.shape) for path, (leaf, _) in leaves.items()}
    placements = in_tree(recipe, shapes)
    added = {path for each in placements for path in each.paths().values()}
    stated = {path: _stated(path, *each, mesh, rules) for path, each in leaves.items()}
    # A rule P() keeps a leaf whole, and is false.
    specs = {path: spec for path, spec in stated.items() if spec is not None}
    for path in shapes.keys() - added - specs.keys():
        specs[path] = _automatic(shapes[path], mesh, small)
    for each in placements:
        for name, path in each.paths().items():
            if path not in specs:
                specs[path] = _inherited(each, name, shapes[path], specs, small)
    return {path: NamedSharding(mesh, specs[path]) for path in leaves}


def _leaves(params: Tree) -> dict[str, tuple[Any, P | None]]:
    """Each leaf with the partition spec of its annotation."""
    if isinstance(params, nnx.State):
        specs = dict(flatten(nnx.get_partition_spec(params)))
        return {path: (leaf, specs[path] or None) for path, leaf in flatten(params).items()}
    flat = flatten(params)
    specs = {k: x.get_partition_spec() for k, x in flat.items() if isinstance(x, nn.Partitioned)}
    specs |= {path: leaf.spec for path, leaf in flat.items() if is_quantized(leaf)}
    return {path: (unboxed(leaf), specs.get(path)) for path, leaf in flat.items()}


def _stated(path: str, leaf: Any, annotation: P | None, mesh: Mesh, rules: Rules) -> P | None:
    """The checked spec of a leaf by its annotation or a rule; None where it has neither."""
    spec, who = annotation, "its annotation"
    if spec is None:
        pattern = next((pattern for pattern in rules if matches(pattern, path)), None)
        if pattern is None:
            return None
        spec, who = rules[pattern], f"rule {pattern!r}"
        if not isinstance(spec, P):
            raise ShardingError(
                f"{path}: {who} is {shown(spec)}, expected a PartitionSpec with a name of the mesh "
                "or None for each axis, such as P(None, 'model')"
            )
    if len(spec) > len(leaf.shape):
        raise ShardingError(
            f"{path} has the shape {list(leaf.shape)}, and {who} has {len(spec)} axes: {spec}"
        )
    for size, names in zip(leaf.shape, spec, strict=False):
        names = _names(names)
        unknown = [name for name in names if name not in mesh.shape]
        if unknown:
            raise ShardingError(
                f"{path}: {who} names the axis {unknown[0]!r}, and the mesh has "
                f"{', '.join(mesh.axis_names)}; add {unknown[0]}=1 to the mesh, or rename it"
            )
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ShardingError(
                f"{path} has the shape {list(leaf.shape)}, and {who}, {spec}, splits {size} into "
                f"{parts} parts, which do not divide it; choose another axis, or None"
            )
    return spec


def _names(names: Any) -> tuple[str, ...]:
    """The names of the mesh axes that split one dimension."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _automatic(shape: Sequence[int], mesh: Mesh, small: int) -> P:
    """Splits the largest axis that `fsdp` and `model` divide; the last one among equals."""
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) < small:
        return P()
    # `model` first: it splits products, so it should get the largest axis; `fsdp` only stores.
    for name in (name for name in reversed(WEIGHTS) if mesh.shape.get(name, 1) > 1):
        free = [
            i for i, size in enumerate(shape) if spec[i] is None and size % mesh.shape[name] == 0
        ]
        if free:
            spec[max(free, key=lambda i: (shape[i], i))] = name
    return P(*spec)


def _inherited(
    placed: Placement, name: str, array: Sequence[int], base: Mapping[str, P], small: int
) -> P:
    """The spec of an adapter's array of a shape: axes of the weight are split like the weight's.

    An array that shares no axis with the weight is whole on every device.
    """
    # Only axes that are the weight's are split: a rank is too small to gain from it.
    if placed.axes is None or math.prod(array) < small:
        return P()
    axes = placed.method.weight_axes(placed.axes, placed.path).get(name)
    shape, spec = placed.shape, [*base[placed.weight_path]]
    spec += [None] * (len(shape) - len(spec))
    return P(
        *(
            spec[axis] if axis != RANK and array[i] == shape[axis] else None
            for i, axis in enumerate(axes or [RANK] * len(array))
        )
    )


def shard(subject: Any, mesh: Mesh, rules: Rules | None = None, **options: Any) -> Any:
    """Puts a tree of parameters, a model or the state of a training onto a mesh.

    Args:
        subject: a linen parameter tree; an NNX model, adapted or not; or a `TrainState`, whose
            optimiser state is laid out like its parameters, and whose statistics and collections
            are whole on every device; also one of several trainings, of `stack_states`. Arrays
            already there are not copied.
        mesh: of named axes; see `make_mesh`.
        rules: as for `layout`.
        **options: `recipe` of an adapted linen tree, and `small`; as for `layout`.

    Returns:
        The same on the mesh; for an NNX model a new model.

    Raises:
        ShardingError: as for `layout`, or `mesh` is not a mesh.
        TargetError: a rule matches no parameter.
        UserError: `subject` is something else.

    Example:
        >>> import adapters_jax as aj, jax.numpy as jnp
        >>> mesh = aj.make_mesh("data=-1,model=1")
        >>> shard({"kernel": jnp.ones((8, 4))}, mesh)["kernel"].sharding.mesh.axis_names
        ('data', 'model')
    """
    check_mesh("shard", mesh)
    if isinstance(subject, TrainState):
        several = isinstance(subject.tx, Optimizers)
        return (_shard_states if several else _shard_state)(subject, mesh, rules, **options)
    if isinstance(subject, nnx.Module):
        graphdef, *states = nnx.split(subject, nnx.Param, ...)
        params, other = states
        adapted = any(isinstance(x, AdapterParam) for x in _variables(params))
        recipe = recipe_of(subject) if adapted else None
        where = layout(params, mesh, rules, recipe, **options)
        # Copied, so that the Variables of the given model keep their arrays.
        return nnx.merge(graphdef, _put(params, where), _everywhere(other, mesh), copy=True)
    return _put(subject, layout(subject, mesh, rules, **options))


def laid_out(params: Tree, mesh: Mesh | None, rules: Rules | None = None) -> Tree:
    """Parameters as shapes, dtypes and shardings, for a checkpoint to be read into."""
    where = {} if mesh is None else layout(params, mesh, rules)
    # Checkpoints know neither boxes nor Variables.
    pure = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else nn.meta.unbox(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where.get(path_of(path))
        ),
        pure,
    )


def _variables(state: nnx.State) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _put(tree: Tree, where: Mapping[str, NamedSharding]) -> Tree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _place_leaf(leaf, where[path_of(path)]), tree, is_leaf=is_quantized
    )


def _place_leaf(leaf: Any, sharding: NamedSharding) -> Any:
    """Puts a leaf onto devices; scales of a quantised one are split only where that divides."""
    if not is_quantized(leaf):
        return place(leaf, sharding)
    mesh = sharding.mesh

    def fitting(x: Any) -> NamedSharding:
        parts = [math.prod(mesh.shape[name] for name in _names(axis)) for axis in sharding.spec]
        # A scale may stand for a whole axis, which then has the size 1.
        fits = [size % n == 0 for size, n in zip(x.shape, parts, strict=False)]
        kept = [axis if fit else None for axis, fit in zip(sharding.spec, fits, strict=True)]
        return NamedSharding(mesh, P(*kept))

    return jax.tree.map(lambda x: place(x, fitting(x)), leaf)


def _everywhere(tree: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(lambda leaf: place(leaf, NamedSharding(mesh, P())), tree)


def _shard_states(state: TrainState, mesh: Mesh, rules: Rules | None, **options: Any) -> TrainState:
    """Lays out several trainings as one each, with their own axis whole on every device."""
    first, *rest = unstack_states(state)
    first = _shard_state(first, mesh, rules, **options)
    made = [_shard_state(replace(each, base=first.base), mesh, rules, **options) for each in rest]
    return stack_states([first, *(replace(each, base=first.base) for each in made)])


def _shard_state(
    state: TrainState, mesh: Mesh, rules: Rules | None, small: int = SMALL
) -> TrainState:
    parts = [_leaves(state.adapters), _leaves(state.base)]
    where = _layout({**parts[0], **parts[1]}, mesh, rules, state.recipe, small)
    shapes = {path: leaf.shape for path, (leaf, _) in parts[0].items()}

    def of_optimizer(key_path: Any, leaf: Any) -> Any:
        """Lays a leaf out like the parameter whose path ends its own, if the shapes are equal."""
        names = path_of(key_path).split("/")
        # optax wraps trees of the parameters' structure in its own tuples:
        # `0/mu/layer_0/query/lora/a`. Sizes are compared, since factored optimisers keep rows and
        # columns under the same paths.
        ends = ("/".join(names[i:]) for i in range(len(names)))
        own = next((end for end in ends if shapes.get(end) == leaf.shape), None)
        return place(leaf, where[own] if own else NamedSharding(mesh, P()))

    small_parts = ("step", "key", "other", "loss_scale")
    laid = replace(
        state,
        adapters=_put(state.adapters, where),
        base=_put(state.base, where),
        opt_state=jax.tree_util.tree_map_with_path(of_optimizer, state.opt_state),
        **{name: _everywhere(getattr(state, name), mesh) for name in small_parts},
    )
    return replace(laid, layout=tuple(x.sharding for x in jax.tree.leaves(laid.checkpointed)))
