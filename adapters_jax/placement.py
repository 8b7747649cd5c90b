"""Where the adapters of a recipe are: from the shapes of a tree, or from how a model reads leaves.

A method keeps its arrays beside the module that it adapts, `layer_0/query/lora/{a,b}`. Weights that
are targets by their own path, or of which a module has several, have a node each,
`layer_0/experts/lora/up/{a,b}`. The roles of a weight's axes follow from the shapes of the arrays;
where other roles would fit them before, the node says them: `layer_0/out/lora/:1>0/{a,b}` for the
square kernel of a layer that computes `x @ kernel.T`.
"""

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from adapters_jax.errors import MismatchError, RecipeError, TargetError
from adapters_jax.methods import METHODS, Method, outputs
from adapters_jax.methods.base import AttachmentPoint, Count
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.recipe import Owner, Recipe, require_points
from adapters_jax.targets import join, matches, selects
from adapters_jax.trace.reads import Tracked
from adapters_jax.weights.axes import Axes, from_reads, from_text
from adapters_jax.weights.factors import RANK

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Attached:
    """One method on one module or weight.

    Attributes:
        method: the method.
        prefix: path of the node that holds its arrays.
        point: where it is attached; `point.path` is the path of the target.
        module: path of the module.
    """

    method: Any
    prefix: str
    point: AttachmentPoint
    module: str

    def leaves(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arrays by name, out of a tree's leaves by path."""
        return {name: flat[join(self.prefix, name)] for name in self.method.leaf_names}

    def own(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The module's own leaves by name, out of a tree's leaves by path."""
        paths = {name: join(self.module, name) for name in self.point.own}
        return {name: flat[path] for name, path in paths.items() if path in flat}


def own_leaves(shapes: Shapes) -> dict[str, dict[str, Shape]]:
    """The shapes of each module's own leaves by name, out of the base's leaves by path."""
    owned: dict[str, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        owned.setdefault(module, {})[name] = shape
    return owned


def in_tree(recipe: Recipe, shapes: Shapes) -> list[Attached]:
    """The weights that a tree's adapters change.

    Args:
        recipe: the recipe of the adapters.
        shapes: the shapes of all leaves by path, the base's and the adapters'.

    Raises:
        MismatchError: an adapter lacks arrays, or fits no weight of its module.
    """
    groups: dict[str, tuple[Owner, dict[str, Shape]]] = {}
    base: dict[str, Shape] = {}
    for path, shape in shapes.items():
        owner = recipe.owner(path)
        if owner is None:
            base[path] = shape
        elif isinstance(owner.method, LeafMethod):
            groups.setdefault(owner.prefix, (owner, {}))[1][owner.name] = shape
    owned = own_leaves(base)
    return [_located(owner, parts, owned.get(owner.module, {})) for owner, parts in groups.values()]


def _located(owner: Owner, parts: Shapes, own: dict[str, Shape]) -> Attached:
    """The weight that one adapter changes."""
    method, kind = owner.method, type(owner.method).__name__
    lacking = sorted(set(method.leaf_names) - set(parts))
    if lacking:
        raise MismatchError(f"the adapter {owner.prefix} ({kind}) lacks {', '.join(lacking)}")
    found = _weight(method, owner.path, owner.module, _node(owner), parts, own)
    if found is None:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in parts.items())
        weights = ", ".join(f"{name} {list(shape)}" for name, shape in own.items()) or "no leaves"
        raise MismatchError(
            f"the adapter {owner.prefix} ({kind}) has {shapes}, which fits no weight of "
            f"{owner.module!r}: it has {weights}"
        )
    point = AttachmentPoint(owner.path, 0, *found, own)
    return Attached(method, owner.prefix, point, owner.module)


def weight_of(owner: Owner, parts: Shapes, own: Shapes) -> str:
    """The name of the weight that an adapter changes, also where its arrays do not fit it.

    Args:
        owner: the adapter.
        parts: the shapes of its arrays by name.
        own: the shapes of its module's own leaves by name.

    Returns:
        The name; empty where the module has no leaves.
    """
    found = _weight(owner.method, owner.path, owner.module, _node(owner), parts, own)
    return found[0] if found else max(own, key=lambda name: len(own[name]), default="")


def _node(owner: Owner) -> str:
    """The name of an adapter's node below the method's slot; empty for the slot itself."""
    return owner.prefix.removeprefix(join(owner.module, owner.method.slot)).strip("/")


def _weight(
    method: Any, path: str, module: str, node: str, parts: Shapes, own: Shapes
) -> tuple[str, Axes] | None:
    """The name of the weight that arrays of these shapes change, and the roles of its axes."""
    weight, stated, text = node.partition(":")
    by_axes = sorted(own.items(), key=lambda item: -len(item[1]))  # biases last
    for name, shape in by_axes:
        selected = selects(method.targets, module, join(module, name))
        if len(shape) < 2 or not selected or weight not in ("", name):
            continue
        if not stated:
            axes = method.infer(parts, shape, path)
        else:
            axes = from_text(text)
            own_axes = method.weight_axes(axes, path)
            if any(not _fits(parts[part], shape, each) for part, each in own_axes.items()):
                axes = None
        if axes is not None:
            return name, axes
    return None


def _fits(part: Shape, weight: Shape, axes: Sequence[int]) -> bool:
    """Whether an array has these axes of a weight; slices of an axis are shorter."""
    return len(part) == len(axes) and all(
        axis == RANK or (axis < len(weight) and size <= weight[axis])
        for size, axis in zip(part, axes, strict=True)
    )


def chosen(
    recipe: Recipe, reads: Mapping[str, Tracked], shapes: Shapes, layers: Mapping[str, int]
) -> dict[Method, list[Attached]]:
    """The weights that each method of a recipe changes in a model.

    Args:
        recipe: the recipe.
        reads: how the model reads each float leaf of two or more axes, by path.
        shapes: the shapes of all of the base's leaves by path.
        layers: how many layer axes the leaves of a module are stacked on, by its path.

    Raises:
        RecipeError: two methods keep their arrays for one weight in one place, or a method that
            reads the weight comes after one that changes it.
    """
    owned, found = own_leaves(shapes), dict[Method, list[Attached]]()
    methods = [method for method in recipe.attached if isinstance(method, LeafMethod)]
    taken = {m: {p: None for p, leaf in reads.items() if _changes(m, p, leaf)} for m in methods}
    beside = Counter((m.slot, p.rpartition("/")[0]) for m, paths in taken.items() for p in paths)
    for method, paths in taken.items():
        found[method] = []
        for path in paths:
            module, _, name = path.rpartition("/")
            recipe.check([other for other in methods if path in taken[other]], module)
            own = owned[module]
            axes = from_reads(reads[path].reads, len(own[name]), layers.get(module, 0))
            alone = beside[method.slot, module] == 1 and selects(method.targets, module)
            point = AttachmentPoint(module if alone else path, 0, name, axes, own)
            found[method].append(_placed(method, point, module))
    return found


def _changes(method: LeafMethod, path: str, leaf: Tracked) -> bool:
    """Whether a method changes a leaf: it is a target, and meets an input or is named."""
    selected = selects(method.targets, path.rpartition("/")[0], path)
    return selected and (_meets(leaf) or _named(method.targets, path))


def _meets(leaf: Tracked) -> bool:
    """Whether a leaf meets an input in a product or lookup that reaches the model's outputs."""
    return leaf.reaches and any(read.inputs for read in leaf.reads)


def _named(targets: Sequence[str], path: str) -> bool:
    """Whether a pattern names a leaf: its last name has no wildcard."""
    return any(
        selects((p,), path) and "*" not in p.rpartition("/")[2] for p in targets if p[0] != "!"
    )


def _placed(method: LeafMethod, point: AttachmentPoint, module: str) -> Attached:
    """A method at a point, with the node whose path and shapes tell all of the point."""
    parts = {name: leaf.shape for name, leaf in method.leaves(point).items()}
    usual = join(module, method.slot)
    axes: Any = point.axes
    roles = method.roles(axes, point.path)
    stated = f":{axes.text}"
    nodes = ["", stated] if point.path == module else []
    for node in (*nodes, point.weight):
        found = _weight(method, point.path, module, node, parts, point.own)
        if found and found[0] == point.weight and method.roles(found[1], point.path) == roles:
            return Attached(method, join(usual, node), point, module)
    path = join(module, point.weight)
    point = AttachmentPoint(path, 0, point.weight, axes, point.own, point.precision)
    return Attached(method, join(usual, point.weight + stated), point, module)


def on_outputs(recipe: Recipe, point: AttachmentPoint) -> Iterator[Attached]:
    """The methods of a recipe that act on the output or attention of the module at a point."""
    for method in recipe.at(point.path):
        seen = replace(outputs.seen_by(method, point), weight="")
        if method.acts_on != "leaf" and method.fits(seen):
            yield Attached(method, join(point.path, method.slot), seen, point.path)


def check_targets(
    recipe: Recipe,
    found: Sequence[Attached],
    modules: Mapping[str, Any],
    points: Mapping[str, AttachmentPoint],
    reads: Mapping[str, Tracked],
    leaves: Mapping[str, Any],
    tied: Mapping[str, str],
    layers: Mapping[str, int],
) -> None:
    """Checks that the patterns of a recipe match what its methods can adapt in a model.

    Args:
        recipe: the recipe.
        found: where its methods attach.
        modules: the model's modules by path.
        points: the attachment points by path of the modules that methods on outputs or attention
            can attach to.
        reads: how the model reads each weight, by path; of the weights whose use is known.
        leaves: all of the base's leaves by path.
        tied: further paths of shared modules and leaves, each with the path to use.
        layers: how many layer axes the leaves of a module are stacked on, by its path.

    Raises:
        TargetError: a pattern matches nothing, or nothing that its method can attach to; or a
            weight is tied to one of another name, which would stay as it is.
    """
    meeting = {path.rpartition("/")[0] for path, leaf in reads.items() if _meets(leaf)}
    holding = {path.rpartition("/")[0] for path, leaf in leaves.items() if len(leaf.shape) > 1}
    for method in recipe:
        other: dict[str, str | None] = {
            path: None if selects(method.targets, own) else f"shared with {own}; use that path"
            for path, own in tied.items()
        }
        targeted = [each.point.path for each in found if each.method == method]
        if method.slot is None:
            usable = list(leaves)
        elif isinstance(method, LeafMethod):
            usable = usable_paths(method, reads)
            other |= {
                path: "none of its weights meets an input that reaches the model's outputs"
                if path in holding and _named(method.targets, path)
                else None
                for path in {**modules, **dict.fromkeys(holding)}
            }
            other |= {
                path: _why_not(method, path, x, reads, layers, meeting)
                for path, x in leaves.items()
            }
        else:
            usable = sorted(p for p, x in points.items() if method.fits(outputs.seen_by(method, x)))
            other |= dict.fromkeys((path.rpartition("/")[0] for path in leaves), _NO_MODULE)
            other |= {p: outputs.why_not(method, x, points.get(p)) for p, x in modules.items()}
        fitting = set(usable)
        unusable = {path: why for path, why in other.items() if path not in fitting}
        _require_own_paths(method, (*usable, *unusable), tied)
        require_points(method, usable, unusable, targeted)
    further = {own: path for path, own in tied.items()}
    for each in found:
        weight = join(each.module, each.point.weight)
        if isinstance(each.method, LeafMethod) and weight in further:
            raise TargetError(
                f"{type(each.method).__name__}: {weight} is the same parameter as "
                f"{further[weight]}, where an adapter on it would not act; share the module that "
                f"holds it, or exclude it with '!{each.point.path}'"
            )


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


def check_reached(found: Sequence[Attached], reached: Container[str]) -> None:
    """Checks that the model's outputs depend on the modules that methods on outputs adapt.

    Args:
        found: where methods attach.
        reached: the paths of the modules whose results the model's outputs depend on.

    Raises:
        TargetError: they do not depend on some, whose adapters could not act.
    """
    idle = [x for x in found if x.method.acts_on != "leaf" and x.module not in reached]
    if idle:
        paths = ", ".join(each.module or "(the model itself)" for each in idle[:_SHOWN])
        more = f" and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
        raise TargetError(
            f"{type(idle[0].method).__name__}: the model's outputs do not depend on what "
            f"{paths}{more} returns, so that an adapter there could not act; exclude it with "
            f"'!{idle[0].module}'"
        )


def check_nested(found: Sequence[Attached]) -> None:
    """Checks that no attention is adapted twice by one method, at its module and around it.

    Raises:
        TargetError: a prompt is attached to a module and to one inside it.
    """
    prompts = [each for each in found if each.method.acts_on == "attention"]
    places = {(each.method, each.module) for each in prompts}
    for each in prompts:
        names = each.module.split("/")
        for i in range(1, len(names)):
            around = "/".join(names[:i])
            if (each.method, around) in places:
                raise TargetError(
                    f"{type(each.method).__name__}: the targets {around} and {each.module} hold "
                    f"the same attention; exclude one of them, as with '!{around}'"
                )


_SHOWN = 5
_NO_MODULE = (
    "it holds weights, and no module that this API calls; target the module around it, or pass "
    "example_inputs=(...) where it is a linen module inside an NNX model"
)


def usable_paths(method: LeafMethod, reads: Mapping[str, Tracked]) -> list[str]:
    """What a method can target: weights that meet an input or are named, and their modules."""
    meeting = {path for path, leaf in reads.items() if _meets(leaf)}
    named = {
        path
        for path, leaf in reads.items()
        if leaf.reads and leaf.reaches and _named(method.targets, path)
    }
    return [*sorted({path.rpartition("/")[0] for path in meeting}), *sorted(meeting | named)]


def _why_not(
    method: Method,
    path: str,
    leaf: Any,
    reads: Mapping[str, Tracked],
    layers: Mapping[str, int],
    meeting: Container[str],
) -> str | None:
    """Why a leaf cannot be adapted; None where a wildcard may pass over it without a word.

    That is so for scales and biases: they have one axis, beside those of stacked layers, or are
    beside a weight that meets an input.
    """
    named = _named(method.targets, path)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"it is of {leaf.dtype}, expected floats" if named else None
    seen = reads[path].reads if path in reads else []
    module = path.rpartition("/")[0]
    stacked = frozenset(range(layers.get(module, 0))).union(*(read.shared for read in seen))
    wide = [i for i, size in enumerate(leaf.shape) if size > 1 and i not in stacked]
    if len(wide) < 2:
        shape = list(leaf.shape)
        return f"it has the shape {shape}, expected two axes or more" if named else None
    if module in meeting and not named:
        return None  # a bias
    if path not in reads:
        return "pass example_inputs=(...), which show how the model uses it"
    if not reads[path].reaches and seen:
        return "the model's outputs do not depend on it, so that an adapter could not act"
    if not seen:
        return "the example inputs run nothing that reads it; pass a method=... that does"
    return "it meets no input in a product or lookup; name it by its own path to adapt it"


def taken(module: str, method: Method) -> RecipeError:
    """The error for a base that already uses the name of a method's arrays."""
    return RecipeError(
        f"{type(method).__name__} keeps its parameters in {join(module, method.slot)}, but the "
        "base has something of that name there; rename it or do not target it"
    )


class Counted(NamedTuple):
    """One adapter of a tree.

    Attributes:
        owner: where it is, and its method.
        parts: the shapes of its arrays by name.
        weight: the name of the weight that it changes; empty if it changes none.
        closed: the closed form.
    """

    owner: Owner
    parts: dict[str, Shape]
    weight: str
    closed: Count

    @property
    def expected(self) -> int:
        """How many parameters the closed form gives."""
        return self.closed.parameters * self.closed.copies

    @property
    def actual(self) -> int:
        """How many parameters the arrays hold."""
        return sum(map(math.prod, self.parts.values()))

    @property
    def formula(self) -> str:
        """The closed form with its numbers, for all stacked layers."""
        formula, copies = self.closed.formula, self.closed.copies
        return formula if copies == 1 else f"{copies}*({formula})"


def counted(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[Counted]:
    """The adapters of a tree.

    Args:
        recipe: the recipe of the adapters.
        shapes: the shapes of all leaves by path, the base's and the adapters'.

    Raises:
        MismatchError: names every adapter that lacks arrays, has others, or holds another number
            of parameters than its closed form, and every one that the recipe does not target.
    """
    found: dict[str, tuple[Owner, dict[str, Shape]]] = {}
    for path, shape in shapes.items():
        owner = recipe.owner(path)
        if owner:
            found.setdefault(owner.prefix, (owner, {}))[1][owner.name] = shape
    owned = own_leaves({path: x for path, x in shapes.items() if recipe.owner(path) is None})
    adapters, problems = [], [f"{path} belongs to no target" for path in _strays(recipe, shapes)]
    for prefix, (owner, parts) in found.items():
        names, method = owner.method.leaf_names, type(owner.method).__name__
        where = f"{owner.path or '(the model itself)'} ({method})"
        held = [path.removeprefix(f"{prefix}/") for path in shapes if path.startswith(f"{prefix}/")]
        if set(held) != set(names):
            problems.append(f"{where} has {', '.join(held)}, expected {', '.join(names)}")
            continue
        own = owned.get(owner.module, {})
        weight = weight_of(owner, parts, own) if owner.method.acts_on == "leaf" else ""
        count = owner.method.count(owner.path, parts, own.get(weight, ()))
        adapter = Counted(owner, parts, weight, count)
        adapters.append(adapter)
        if adapter.expected != adapter.actual:
            problems.append(
                f"{where} has {adapter.actual:,} parameters, expected {adapter.formula} = "
                f"{adapter.expected:,}"
            )
    if problems:
        raise MismatchError("the arrays differ from the recipe: " + "; ".join(problems))
    return adapters


def without_adapter(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """Targets that have no adapter, though their leaves are like those of a target that has one.

    Example:
        >>> from adapters_jax import LoRA
        >>> shapes = {f"{name}/kernel": (4, 4) for name in ("query", "value")}
        >>> shapes |= {"query/lora/a": (4, 2), "query/lora/b": (2, 4)}
        >>> without_adapter(Recipe(LoRA("*", 2)), shapes)
        ['value (LoRA)']
    """
    owners = {path: recipe.owner(path) for path in shapes}
    owned = own_leaves({path: x for path, x in shapes.items() if owners[path] is None})
    kinds = {path: {name: len(x) for name, x in own.items()} for path, own in owned.items()}
    found = []
    for method in recipe.attached:
        have = {own.module for own in owners.values() if own and own.method == method}
        alike = [kinds[module] for module in have if module in kinds]
        found += [
            f"{path} ({type(method).__name__})"
            for path, kind in kinds.items()
            if path not in have and kind in alike and _targeted(method, path, kind)
        ]
    return found


def _targeted(method: Method, module: str, axes: Mapping[str, int]) -> bool:
    """Whether a method's targets select a module, or a weight of it where it changes weights."""
    if not isinstance(method, LeafMethod):
        return selects(method.targets, module)
    weights = [name for name, count in axes.items() if count > 1]
    return any(selects(method.targets, module, join(module, name)) for name in weights)


def left_over(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """Leaves beside a module under the name of a method that the recipe does not have there.

    Example:
        >>> from adapters_jax import LoRA
        >>> left_over(Recipe(LoRA("query")), {"query/kernel": (4, 4), "query/ia3/scale": (4,)})
        ['query/ia3/scale']
    """
    slots = {method.slot for method in METHODS.values() if method.slot}
    own = {path.rpartition("/")[0] for path in shapes}
    found = []
    for path in shapes:
        names = path.split("/")
        modules = ("/".join(names[:i]) for i, name in enumerate(names) if name in slots)
        beside = any(module in own for module in modules)
        if beside and not recipe.trains(path):
            found.append(path)
    return found


def _strays(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """Leaves named as those of the recipe's methods, at modules that these do not target."""
    ends = tuple(f"{m.slot}/{name}" for m in recipe.attached for name in m.leaf_names)
    named = [path for path in shapes if ends and f"/{path}".endswith(tuple(f"/{e}" for e in ends))]
    return [path for path in named if recipe.owner(path) is None]
