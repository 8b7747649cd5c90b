"""Where the adapters of a recipe are: from the shapes of a tree, or from how a model reads leaves.

A method keeps its arrays beside the module that it adapts, `layer_0/query/lora/{a,b}`. Weights that
are targets by their own path, or of which a module has several, have a node each,
`layer_0/experts/lora/up/{a,b}`. The roles of a weight's axes follow from the shapes of the arrays;
where other roles would fit them before, the node says them: `layer_0/out/lora/:1>0/{a,b}` for the
square kernel of a layer that computes `x @ kernel.T`.
"""

import functools
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from adapters_jax.errors import MismatchError, RecipeError, TargetError
from adapters_jax.methods import METHODS, Method, outputs
from adapters_jax.methods.base import AttachmentPoint, Count
from adapters_jax.methods.leaf import LeafMethod, axes_of
from adapters_jax.recipe import Owner, Recipe, require_points
from adapters_jax.targets import join, matches, selects
from adapters_jax.trace.registry import Attention
from adapters_jax.weights.axes import Axes, from_reads, from_text
from adapters_jax.weights.factors import RANK
from adapters_jax.weights.lazy import Tracked

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Placement:
    """One method on one module or weight of a model.

    An abstract run finds it once (`chosen`, `on_outputs`). The adapted model and the adapter's file
    keep it, and whoever needs to know where an adapter is reads it.

    Attributes:
        method: the method.
        path: the path of its target: a module, or a weight.
        module: the path of the module.
        node: where its arrays are below the method's slot in the module; "" for the slot itself.
        weight: the name of the weight that it changes; "" for methods on outputs and in attention.
        shape: the shape of that weight, with layer axes.
        axes: the roles of that weight's axes.
        width: the size of the last axis of the output that it acts on; 0 for other methods.
        attention: the sizes of the attention that it acts in; None for other methods.
        layers: the layer axes that the module is stacked on.
        arrays: the shapes of its arrays by name, as they are in the tree, with layer axes.
        reaches: whether a run showed that the model's outputs depend on it.
    """

    method: Any
    path: str
    module: str
    node: str = ""
    weight: str = ""
    shape: Shape = ()
    axes: Axes | None = None
    width: int = 0
    attention: Attention | None = None
    layers: Shape = ()
    arrays: tuple[tuple[str, Shape], ...] = ()
    reaches: bool = False

    @functools.cached_property
    def prefix(self) -> str:
        """The path of the node that holds its arrays."""
        return join(self.module, self.method.slot, self.node)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names that lead from the module to the node that holds its arrays."""
        return (self.method.slot, self.node) if self.node else (self.method.slot,)

    @functools.cached_property
    def weight_path(self) -> str:
        """The path of the weight that it changes."""
        return join(self.module, self.weight)

    @property
    def array_shapes(self) -> dict[str, Shape]:
        """The shapes of its arrays by path."""
        return {f"{self.prefix}/{name}": shape for name, shape in self.arrays}

    @property
    def count(self) -> Count:
        """The closed form of its parameters."""
        return self.method.count(self.path, dict(self.arrays), self.shape)

    def point(self, own: Shapes | None = None, **fields: Any) -> AttachmentPoint:
        """The attachment point, as the method sees it.

        Args:
            own: the shapes of the module's own leaves by name; by default that of the weight alone.
                Inside a loop over layers they lack the layer axes, and so do the roles then.
            **fields: further fields of the point, in place of those of the placement.
        """
        known = {self.weight: self.shape} if own is None and self.weight else own or {}
        first = next((name for name, shape in known.items() if len(shape) > 1), "")
        weight, axes = self.weight or first, self.axes
        if axes is not None:
            axes = axes.inside(axes.ndim - len(known[weight]))
        fields = {"width": self.width, "attention": self.attention, **fields}
        return AttachmentPoint(self.path, weight=weight, axes=axes, own=known, **fields)

    def roles(self) -> Any:
        """What of the roles of the weight's axes the method uses; None without a weight."""
        return None if self.axes is None else self.method.roles(self.axes, self.path)

    def paths(self) -> dict[str, str]:
        """The paths of its arrays by name."""
        return {name: f"{self.prefix}/{name}" for name in self.method.leaf_names}

    def leaves(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arrays by name, out of a tree's leaves by path."""
        return {name: flat[path] for name, path in self.paths().items()}

    def with_arrays(self) -> "Placement":
        """The placement with the shapes of its arrays, which follow from the method."""
        front = () if self.method.acts_on == "leaf" else self.layers
        leaves = self.method.leaves(self.point())
        return replace(self, arrays=tuple((n, (*front, *leaf.shape)) for n, leaf in leaves.items()))


class Placements(tuple[Placement, ...]):
    """The placements of a model, in the order of its recipe's methods.

    They are static: jit hashes them in every call, so that the hash is kept.
    """

    @functools.cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)

    def __hash__(self) -> int:
        return self._hash

    def fit(self, recipe: Recipe, shapes: Shapes) -> bool:
        """Whether a tree holds the weights and arrays of these placements, and no other adapter."""
        arrays = {p: shape for each in self for p, shape in each.array_shapes.items()}
        weights = {each.weight_path: each.shape for each in self if each.weight}
        present = all(shapes.get(path) == shape for path, shape in {**weights, **arrays}.items())
        others = [path for path in shapes if path not in arrays]
        nodes = tuple(f"{each.prefix}/" for each in self)
        inside = any(path.startswith(nodes) for path in others)
        return present and not inside and not recipe.owners(others)

    def differences(self, other: "Placements") -> list[str]:
        """In what these placements differ from others of the same model, which a tree may say.

        Example:
            >>> from adapters_jax import LoRA
            >>> placed = Placement(LoRA("q"), "q", "q", "", "kernel", (4, 3), Axes((0,), (1,)))
            >>> Placements([placed]).differences(Placements([replace(placed, shape=(4, 5))]))
            ['q/lora changes kernel of (4, 3), and here it is kernel of (4, 5)']
        """
        mine, theirs = ({each.prefix: each for each in these} for these in (self, other))
        found = [f"{prefix} is not here" for prefix in mine if prefix not in theirs]
        found += [f"{prefix} is only here" for prefix in theirs if prefix not in mine]
        for prefix in [prefix for prefix in mine if prefix in theirs]:
            one, two = mine[prefix], theirs[prefix]
            weights = [f"{each.weight} of {each.shape}" for each in (one, two)]
            if (one.path, one.module, one.method) != (two.path, two.module, two.method):
                found.append(f"{prefix} adapts {_described(one)}, and here {_described(two)}")
            elif weights[0] != weights[1]:
                found.append(f"{prefix} changes {weights[0]}, and here it is {weights[1]}")
            elif one.axes and two.axes and one.roles() != two.roles():
                axes = [each.axes.text for each in (one, two) if each.axes]
                found.append(f"{prefix} has the axes {axes[0]} (inputs>outputs), here {axes[1]}")
            elif one.with_arrays().arrays != two.arrays:
                arrays = [dict(each.arrays) for each in (one.with_arrays(), two)]
                found.append(f"{prefix} has arrays of {arrays[0]}, and here of {arrays[1]}")
        return found


def own_leaves(shapes: Shapes) -> dict[str, dict[str, Shape]]:
    """The shapes of each module's own leaves by name, out of the base's leaves by path."""
    owned: dict[str, dict[str, Shape]] = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        owned.setdefault(module, {})[name] = shape
    return owned


class Known:
    """What a linen model remembers of its placements, once a run or a file has shown them.

    flax's modules are frozen and cloned for every call, so that the clones share this object. All
    of them are equal: what is known of a model does not make it another one.

    Attributes:
        placements: its placements; None before.
    """

    def __init__(self, placements: Placements | None = None):
        self.placements = placements

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known)

    def __hash__(self) -> int:
        return hash(Known)

    def of(self, recipe: Recipe, shapes: Shapes) -> Placements:
        """The placements in a tree: those that are known, where they are of this very tree.

        Args:
            recipe: the recipe of the model.
            shapes: the shapes of all leaves by path.

        Raises:
            MismatchError: as for `in_tree`.
        """
        if self.placements is not None and self.placements.fit(recipe, shapes):
            return self.placements
        return in_tree(recipe, shapes)


def in_tree(recipe: Recipe, shapes: Shapes) -> Placements:
    """The placements in a tree without its model: read off names and shapes.

    For trees and files that say no more, and for linen models that did not run yet. What an output
    is wide and whether it reaches the model's outputs is not in a tree.

    Args:
        recipe: the recipe of the adapters.
        shapes: the shapes of all leaves by path, the base's and the adapters'.

    Raises:
        MismatchError: an adapter lacks arrays, or fits no weight of its module.
    """
    return _in_tree(recipe, tuple(shapes.items()))


@functools.lru_cache(maxsize=32)
def _in_tree(recipe: Recipe, shapes: tuple[tuple[str, Shape], ...]) -> Placements:
    """`in_tree` of shapes as pairs; kept, since a linen model asks in every trace."""
    groups, base = _groups(recipe, dict(shapes))
    owned = own_leaves(base)
    found = [_located(owner, parts, owned.get(owner.module, {})) for owner, parts in groups]
    order = {method: i for i, method in enumerate(recipe.attached)}
    return Placements(sorted(found, key=lambda each: order[each.method]))


def _groups(recipe: Recipe, shapes: Shapes) -> tuple[list[tuple[Owner, dict[str, Shape]]], Shapes]:
    """The adapters in a tree, each with the shapes of its arrays; and the base's shapes."""
    groups: dict[str, tuple[Owner, dict[str, Shape]]] = {}
    owners = recipe.owners(shapes)
    for path, owner in owners.items():
        groups.setdefault(owner.prefix, (owner, {}))[1][owner.name] = shapes[path]
    base = {path: shape for path, shape in shapes.items() if path not in owners}
    return list(groups.values()), base


def _located(owner: Owner, parts: Shapes, own: Shapes) -> Placement:
    """The placement of one adapter in a tree."""
    method, kind = owner.method, type(owner.method).__name__
    lacking = sorted(set(method.leaf_names) - set(parts))
    if lacking:
        raise MismatchError(f"the adapter {owner.prefix} ({kind}) lacks {', '.join(lacking)}")
    arrays = tuple((name, parts[name]) for name in method.leaf_names)
    placed = Placement(method, owner.path, owner.module, owner.node, arrays=arrays)
    if not isinstance(method, LeafMethod):
        return placed
    found = _weight(placed, own)
    if found is None:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in parts.items())
        weights = ", ".join(f"{name} {list(shape)}" for name, shape in own.items()) or "no leaves"
        raise MismatchError(
            f"the adapter {owner.prefix} ({kind}) has {shapes}, which fits no weight of "
            f"{owner.module!r}: it has {weights}"
        )
    weight, axes = found
    return replace(placed, weight=weight, shape=own[weight], axes=axes)


def _weight(placed: Placement, own: Shapes) -> tuple[str, Axes] | None:
    """The name of the weight that arrays of these shapes change, and the roles of its axes."""
    method, parts = placed.method, dict(placed.arrays)
    weight, stated, text = placed.node.partition(":")
    by_axes = sorted(own.items(), key=lambda item: -len(item[1]))  # biases last
    for name, shape in by_axes:
        selected = selects(method.targets, placed.module, join(placed.module, name))
        if len(shape) < 2 or not selected or weight not in ("", name):
            continue
        if not stated:
            axes = method.infer(parts, shape, placed.path)
        else:
            axes = from_text(text)
            own_axes = method.weight_axes(axes, placed.path)
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
) -> list[Placement]:
    """The placements of the methods that change weights, from how a model reads them.

    Args:
        recipe: the recipe.
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
    beside = Counter((m.slot, p.rpartition("/")[0]) for m, paths in taken.items() for p in paths)
    for method, paths in taken.items():
        for path in paths:
            module, _, name = path.rpartition("/")
            recipe.check([other for other in methods if path in taken[other]], module)
            own, leaf = owned[module], reads[path]
            axes = from_reads(leaf.reads, len(own[name]), layers.get(module, 0))
            alone = beside[method.slot, module] == 1 and selects(method.targets, module)
            target = module if alone else path
            placed = Placement(method, target, module, "", name, own[name], axes)
            found.append(replace(_named_node(placed, own), reaches=leaf.reaches))
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


def _named_node(placed: Placement, own: Shapes) -> Placement:
    """A placement with the first node whose path and shapes say all of it.

    So a tree of arrays is enough to find it again. The shapes of the factors of a square weight
    fit both ways, for example, and its node then names the roles of its axes.
    """
    placed, axes = placed.with_arrays(), axes_of(placed.point())
    roles = placed.method.roles(axes, placed.path)
    stated = f":{axes.text}"
    nodes = ["", stated] if placed.path == placed.module else []
    for node in (*nodes, placed.weight):
        named = replace(placed, node=node)
        weight, read = _weight(named, own) or ("", axes)
        if weight == placed.weight and placed.method.roles(read, placed.path) == roles:
            return named
    return replace(placed, path=placed.weight_path, node=placed.weight + stated).with_arrays()


def on_outputs(recipe: Recipe, point: AttachmentPoint, layers: Shape = ()) -> Iterator[Placement]:
    """The placements of the methods that act on the output or attention of the module at a point.

    Args:
        recipe: the recipe.
        point: the module.
        layers: the layer axes that it is stacked on.
    """
    for method in recipe.at(point.path):
        seen = replace(outputs.seen_by(method, point), weight="")
        if method.acts_on != "leaf" and method.fits(seen):
            width = seen.width if method.acts_on == "output" else 0
            sizes = seen.attention if method.acts_on == "attention" else None
            placed = Placement(method, point.path, point.path, width=width, attention=sizes)
            yield replace(placed, layers=layers, reaches=True).with_arrays()


def check_targets(
    recipe: Recipe,
    found: Sequence[Placement],
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
        targeted = [each.path for each in found if each.method == method]
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
        weight = each.weight_path
        if isinstance(each.method, LeafMethod) and weight in further:
            raise TargetError(
                f"{type(each.method).__name__}: {weight} is the same parameter as "
                f"{further[weight]}, where an adapter on it would not act; share the module that "
                f"holds it, or exclude it with '!{each.path}'"
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


def check_reached(found: Sequence[Placement], reached: Container[str]) -> None:
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


def check_nested(found: Sequence[Placement]) -> None:
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
        placed: where it is.
        closed: the closed form of its parameters.
    """

    placed: Placement
    closed: Count

    @property
    def expected(self) -> int:
        """How many parameters the closed form gives."""
        return self.closed.parameters * self.closed.copies

    @property
    def actual(self) -> int:
        """How many parameters the arrays hold."""
        return sum(math.prod(shape) for _, shape in self.placed.arrays)

    @property
    def formula(self) -> str:
        """The closed form with its numbers, for all stacked layers."""
        formula, copies = self.closed.formula, self.closed.copies
        return formula if copies == 1 else f"{copies}*({formula})"


def counted(
    recipe: Recipe, shapes: Mapping[str, Shape], known: Placements | None = None
) -> list[Counted]:
    """The adapters of a tree.

    Args:
        recipe: the recipe of the adapters.
        shapes: the shapes of all leaves by path, the base's and the adapters'.
        known: the placements of the model; None for a tree without one.

    Raises:
        MismatchError: names every adapter that lacks arrays, has others, or holds another number
            of parameters than its closed form, and every one that the recipe does not target.
    """
    fits = known is not None and known.fit(recipe, shapes)
    found = list(known or ()) if fits else _as_counted(recipe, shapes)
    adapters, problems = [], []
    for each in found:
        if isinstance(each, str):
            problems.append(each)
            continue
        adapters.append(Counted(each, each.count))
        if adapters[-1].expected != adapters[-1].actual:
            problems.append(_wrong_count(adapters[-1]))
    if problems:
        raise MismatchError("the arrays differ from the recipe: " + "; ".join(problems))
    return adapters


def _wrong_count(adapter: Counted) -> str:
    """Why an adapter's arrays are not those of its closed form."""
    return (
        f"{_described(adapter.placed)} has {adapter.actual:,} parameters, expected "
        f"{adapter.formula} = {adapter.expected:,}"
    )


def _as_counted(recipe: Recipe, shapes: Shapes) -> list[Placement | str]:
    """The adapters in a tree that may be wrong, or what is wrong with their names."""
    groups, base = _groups(recipe, shapes)
    owned = own_leaves(base)
    found: list[Placement | str] = [
        f"{path} belongs to no target" for path in _strays(recipe, shapes)
    ]
    for owner, parts in groups:
        names, within = owner.method.leaf_names, f"{owner.prefix}/"
        held = [path.removeprefix(within) for path in shapes if path.startswith(within)]
        if set(held) == set(names):
            found.append(_nearest(owner, parts, owned.get(owner.module, {})))
        else:
            where = _described(owner)
            found.append(f"{where} has {', '.join(held)}, expected {', '.join(names)}")
    return found


def _described(where: Owner | Placement) -> str:
    """An adapter for a message."""
    return f"{where.path or '(the model itself)'} ({type(where.method).__name__})"


def _nearest(owner: Owner, parts: Shapes, own: Shapes) -> Placement:
    """The placement of one adapter, at the largest weight of its module where it fits none."""
    try:
        return _located(owner, parts, own)
    except MismatchError:
        weight = max(own, key=lambda name: len(own[name]), default="")
        arrays = tuple((name, parts[name]) for name in owner.method.leaf_names)
        placed = Placement(owner.method, owner.path, owner.module, owner.node, arrays=arrays)
        return replace(placed, weight=weight, shape=own.get(weight, ()))


def without_adapter(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """Targets that have no adapter, though their leaves are like those of a target that has one.

    Example:
        >>> from adapters_jax import LoRA
        >>> shapes = {f"{name}/kernel": (4, 4) for name in ("query", "value")}
        >>> shapes |= {"query/lora/a": (4, 2), "query/lora/b": (2, 4)}
        >>> without_adapter(Recipe(LoRA("*", 2)), shapes)
        ['value (LoRA)']
    """
    owners = recipe.owners(shapes)
    owned = own_leaves({path: x for path, x in shapes.items() if path not in owners})
    kinds = {path: {name: len(x) for name, x in own.items()} for path, own in owned.items()}
    found = []
    for method in recipe.attached:
        have = {own.module for own in owners.values() if own.method == method}
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
        if any(module in own for module in modules):
            found.append(path)
    trained = recipe.trained(found)
    return [path for path in found if path not in trained]


def _strays(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """Leaves named as those of the recipe's methods, at modules that these do not target."""
    ends = tuple(f"{m.slot}/{name}" for m in recipe.attached for name in m.leaf_names)
    named = [path for path in shapes if ends and f"/{path}".endswith(tuple(f"/{e}" for e in ends))]
    owners = recipe.owners(named)
    return [path for path in named if path not in owners]
