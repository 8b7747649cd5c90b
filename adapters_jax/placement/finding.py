"""Finds the placements of a recipe in a model that ran, and checks that its patterns fit it."""

import functools
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from adapters_jax.errors import RecipeError, TargetError, first_few
from adapters_jax.methods import Method
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.placement.patterns import require_points
from adapters_jax.placement.placed import (
    Placement,
    Placements,
    Shape,
    Shapes,
    own_leaves,
    weight_in,
)
from adapters_jax.placement.visits import Visit, why_not
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around, join, matches, selects
from adapters_jax.trace.reads import Tracked
from adapters_jax.weights.axes import from_reads


def chosen(
    recipe: Recipe, reads: Mapping[str, Tracked], shapes: Shapes, layers: Mapping[str, int]
) -> list[Placement]:
    """The placements of the methods that change weights, from how a model reads them.

    Args:
        reads: how the model reads each float leaf of two or more axes, by path.
        shapes: the shapes of all of the base's leaves by path.
        layers: how many layer axes the leaves of a module are stacked on, by its path.

    Raises:
        RecipeError: two methods keep their arrays for one weight in one place, or a method that
            reads the weight comes after one that changes it.
    """
    owned, found = own_leaves(shapes), list[Placement]()
    methods = [method for method in recipe.attached if isinstance(method, LeafMethod)]
    taken = {m: {p: None for p, leaf in reads.items() if _changes(m, p, leaf)} for m in methods}
    # A module's slot holds the arrays of one weight; with several, each has its own node there.
    beside = Counter((m.slot, p.rpartition("/")[0]) for m, paths in taken.items() for p in paths)
    for method, paths in taken.items():
        for path in paths:
            module, _, name = path.rpartition("/")
            recipe.check([other for other in methods if path in taken[other]], module)
            own, leaf = owned[module], reads[path]
            axes = from_reads(leaf.reads, len(own[name]), layers.get(module, 0))
            alone = beside[method.slot, module] == 1 and selects(method.targets, module)
            target = module if alone else path
            added = [bias.rpartition("/") for bias in dict.fromkeys(leaf.biases)]
            biases = tuple(bias for around, _, bias in added if around == module)
            placed = Placement(method, target, module, "", name, own[name], axes, biases)
            stacked = own[name][: layers.get(module, 0)]
            placed = replace(placed, layers=stacked, reaches=leaf.reaches)
            found.append(named_node(placed, own))
    return found


def _changes(method: LeafMethod, path: str, leaf: Tracked) -> bool:
    """Whether a method changes a leaf: it is a target, and meets an input or is named."""
    selected = selects(method.targets, path.rpartition("/")[0], path)
    return selected and (not _obstacle(leaf) or _named(method.targets, path))


def _obstacle(leaf: Tracked) -> str:
    """Why wildcards pass over a leaf of two axes or more; empty where they do not."""
    if not leaf.reads:
        return (
            "the example inputs run nothing that reads it; give them with a function that does, as "
            "aj.inputs(..., method=...), or in linen init_adapters(..., method=...)"
        )
    if not leaf.reaches:
        return "the model's outputs do not depend on it, so that an adapter could not act"
    if not leaf.trains:
        return (
            "no gradient of the model's outputs gets to it, as jax.lax.stop_gradient or integers "
            "are in between, so that an adapter could never train"
        )
    reads = ", ".join(dict.fromkeys(read.operation for read in leaf.reads))
    if not any(read.inputs for read in leaf.reads):
        return (
            "it meets no input in a lookup, or in a product that sums over one of its axes (it is "
            f"read by {reads}); name it by its own path to adapt it"
        )
    fan_in, fan_out, _ = from_reads(leaf.reads, len(leaf.shape)).sizes(leaf.shape)
    if min(fan_in, fan_out) == 1 and not any(read.how == "product" for read in leaf.reads):
        return (
            f"it is read as {fan_in} x {fan_out} by {reads}, where no change has a lower rank than "
            "the weight; name it by its own path to adapt it with rank 1"
        )
    return ""


def _outputs(leaf: Tracked) -> int:
    """How many outputs a weight has, of all layers together."""
    _, fan_out, copies = from_reads(leaf.reads, len(leaf.shape)).sizes(leaf.shape)
    return fan_out * copies


def _named(targets: Sequence[str], path: str) -> bool:
    """Whether a pattern names a leaf: its last name has no wildcard."""
    return selects(_naming(tuple(targets)), path)


@functools.lru_cache(maxsize=1024)
def _naming(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns whose last name has no wildcard."""
    return tuple(p for p in targets if p[0] != "!" and "*" not in p.rpartition("/")[2])


def named_node(placed: Placement, own: Shapes) -> Placement:
    """A placement with the first node whose path and shapes say all of it.

    So a tree of arrays is enough to find it again. The shapes of the factors of a square weight
    fit both ways, for example, and its node then names the roles of its axes.
    """
    placed, roles = placed.with_arrays(), placed.roles()
    stated = f":{placed.axes.text}" if placed.axes else ""
    nodes = ["", stated] if placed.path == placed.module else []
    for node in (*nodes, placed.weight):
        named = replace(placed, node=node)
        weight, axes = weight_in(named, own) or ("", placed.axes)
        if weight == placed.weight and placed.method.roles(axes, placed.path) == roles:
            return named
    return replace(placed, path=placed.weight_path, node=placed.weight + stated).with_arrays()


def on_outputs(recipe: Recipe, visit: Visit, layers: Shape = ()) -> Iterator[Placement]:
    """The placements of the methods that act on the output or attention of a module.

    Args:
        layers: the layer axes that it is stacked on.
    """
    points: dict[str, Any] = {}
    for method in recipe.at(visit.path):
        found = [points[name] for name in method.members if name in points]
        if point := next(iter(found), None) if method.members else visit.point(method):
            points.setdefault(method.name, point)
            width, sizes = point.width, point.attention
            placed = Placement(method, visit.path, visit.path, width=width, attention=sizes)
            yield replace(placed, layers=layers, reaches=True).with_arrays()


def checked(
    recipe: Recipe,
    found: Sequence[Placement],
    modules: Mapping[str, Any],
    visits: Mapping[str, Visit],
    reads: Mapping[str, Tracked],
    leaves: Mapping[str, Any],
    tied: Mapping[str, str],
    layers: Mapping[str, int],
    reached: Container[str],
) -> Placements:
    """The placements of a recipe in a model, once they fit it, with the shapes of shared leaves.

    Args:
        visits: what a run showed of its modules, by path.
        reads: how the model reads each weight, by path; of the weights whose use is known.
        leaves: all of the base's leaves by path.
        tied: further paths of shared modules and leaves, each with the path to use.
        layers: how many layer axes the leaves of a module are stacked on, by its path.
        reached: the paths of the modules to whose results gradients of the outputs get.

    Raises:
        TargetError: a pattern matches nothing, or nothing that its method can attach to; a weight
            is tied to one of another name, which would stay as it is; gradients do not get to some
            adapters; or one method adapts an attention twice.
        RecipeError: modules ask for several shapes of a leaf that they share.
    """
    biases = {
        bias
        for leaf in reads.values()
        for bias in leaf.biases
        # A table that is added to a product is no bias.
        if bias in leaves and math.prod(leaves[bias].shape) == _outputs(leaf)
    }
    for method in [method for method in recipe if not method.members]:
        other: dict[str, str | None] = {
            path: None if selects(method.targets, own) else f"shared with {own}; use that path"
            for path, own in tied.items()
        }
        targeted = [each.path for each in found if each.method == method]
        if method.slot is None:
            usable = list(leaves)
        elif isinstance(method, LeafMethod):
            usable = _usable_paths(method, reads)
            why = {p: _why_not(method, p, x, reads, layers, biases) for p, x in leaves.items()}
            inside = {path.rpartition("/")[0]: reason for path, reason in why.items() if reason}
            other |= {
                path: f"of its weights: {inside[path]}"
                if path in inside and _named(method.targets, path)
                else None
                for path in {**modules, **inside}
            }
            other |= why
        else:
            usable = sorted(path for path, visit in visits.items() if visit.point(method))
            other |= dict.fromkeys((path.rpartition("/")[0] for path in leaves), _NO_MODULE)
            other |= {p: why_not(method, x, visits.get(p)) for p, x in modules.items()}
        fitting = set(usable)
        unusable = {path: why for path, why in other.items() if path not in fitting}
        _require_own_paths(method, (*usable, *unusable), tied)
        require_points(method, usable, unusable, targeted)
    further = {own: path for path, own in tied.items()}
    for each in found:
        weight = each.weight_path
        if isinstance(each.method, LeafMethod) and weight in further:
            raise TargetError(
                f"{type(each.method).__name__}: {weight} is the same parameter as "
                f"{further[weight]}, where an adapter on it would not act; share the module that "
                f"holds it, or exclude it with '!{each.path}'"
            )
    _check_reached(found, reached)
    _check_nested(found)
    return Placements.ordered(recipe, _with_shared(found))


def _require_own_paths(method: Method, paths: Sequence[str], tied: Mapping[str, str]) -> None:
    """Checks that no target names something in a shared module by a further path of the module.

    Raises:
        TargetError: names each such target, and the path to write.
    """
    problems = []
    for target in method.targets if tied else ():
        if target.startswith("!") or any(matches(target, path) for path in paths):
            continue
        further = (
            (f"{other}{path.removeprefix(own)}", path)
            for other, own in tied.items()
            for path in paths
            if path.startswith(f"{own}/")
        )
        found = next((pair for pair in further if matches(target, pair[0])), None)
        if found:
            problems.append(
                f"{type(method).__name__}: target {target!r} matches {found[0]}, which is shared "
                f"with {found[1]}; use that path"
            )
    if problems:
        raise TargetError("\n".join(problems))


def _check_reached(found: Sequence[Placement], reached: Container[str]) -> None:
    """Raises TargetError where no gradients get to a module that a method on outputs adapts."""
    idle = [x for x in found if x.method.acts_on != "weight" and x.module not in reached]
    if idle:
        paths = first_few([each.module or "(the model itself)" for each in idle])
        raise TargetError(
            f"{type(idle[0].method).__name__}: the model's outputs do not depend on what "
            f"{paths} returns, or let no gradient through to it (jax.lax.stop_gradient), so "
            f"that an adapter there could not train; exclude it with '!{idle[0].module}'"
        )


def _check_nested(found: Sequence[Placement]) -> None:
    """Raises TargetError where a prompt is attached to a module and to one inside it."""
    prompts = [each for each in found if each.method.acts_on == "attention"]
    places = {(each.method, each.module) for each in prompts}
    for each in prompts:
        for above in around(each.module):
            if (each.method, above) in places:
                raise TargetError(
                    f"{type(each.method).__name__}: the targets {above} and {each.module} hold "
                    f"the same attention; exclude one of them, as with '!{above}'"
                )


def _with_shared(found: Sequence[Placement]) -> list[Placement]:
    """The placements with the shape that each leaf has which all modules of an entry share.

    Raises:
        RecipeError: modules ask for several, and the method cannot cut one; names the first two.
    """
    shapes: dict[str, tuple[Placement, Shape]] = {}
    for each in found:
        for name, shape in each.arrays:
            if name not in each.method.shared_leaves:
                continue
            path = each.paths()[name]
            other, known = shapes.setdefault(path, (each, shape))
            if name in each.method.cut_leaves:
                shapes[path] = each, tuple(map(max, known, shape))
            elif known != shape:
                raise RecipeError(
                    f"{type(each.method).__name__}: all modules share {name!r}, and it is "
                    f"{list(known)} at {other.path!r} and {list(shape)} at {each.path!r}; give one "
                    "entry for the modules of each size, with a name"
                )
    return [
        replace(
            each,
            arrays=tuple(
                (name, shapes.get(each.paths()[name], (each, shape))[1])
                for name, shape in each.arrays
            ),
        )
        for each in found
    ]


_NO_MODULE = (
    "it holds weights, and no module that this API calls; target the module around it, or pass "
    "example_inputs=(...) where it is a linen module inside an NNX model, or inputs with a "
    "method=... that runs it; in a plain function, which has no modules, change its weights, as "
    "LoRA does"
)


def _usable_paths(method: LeafMethod, reads: Mapping[str, Tracked]) -> list[str]:
    """What a method can target: weights that meet an input or are named, and their modules."""
    meeting = {path for path, leaf in reads.items() if not _obstacle(leaf)}
    named = {
        path
        for path, leaf in reads.items()
        if leaf.reads and leaf.reaches and leaf.trains and _named(method.targets, path)
    }
    return [*sorted({path.rpartition("/")[0] for path in meeting}), *sorted(meeting | named)]


def _why_not(
    method: Method,
    path: str,
    leaf: Any,
    reads: Mapping[str, Tracked],
    layers: Mapping[str, int],
    biases: Container[str],
) -> str | None:
    """Why a leaf cannot be adapted; None where a wildcard may pass over it without a word.

    That is so for scales and biases, which have one axis beside those of stacked layers or are
    added to a product, and for integers.
    """
    named, module = _named(method.targets, path), path.rpartition("/")[0]
    seen = reads[path].reads if path in reads else []
    stacked = frozenset(range(layers.get(module, 0))).union(*(read.shared for read in seen))
    wide = [i for i, size in enumerate(leaf.shape) if size > 1 and i not in stacked]
    if len(wide) < 2 or path in biases:
        if not named:
            return None
        if len(wide) < 2:
            return f"it has the shape {list(leaf.shape)}, expected two axes or more"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        complex_ = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        kind = "complex, of " if complex_ else "of "
        return f"it is {kind}{leaf.dtype}, expected floats" if named or complex_ else None
    if path not in reads:
        return "pass example_inputs=(...), which show how the model uses it"
    return _obstacle(reads[path]) or None


def taken(module: str, method: Method) -> RecipeError:
    """The error for a base that already uses the name of a method's arrays."""
    return RecipeError(
        f"{type(method).__name__} keeps its parameters in {join(module, method.slot)}, but the "
        "base has something of that name there; rename it or do not target it"
    )
