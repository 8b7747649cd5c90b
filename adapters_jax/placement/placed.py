"""Where the adapters of a recipe are: from the shapes of a tree, or from how a model reads leaves.

A method keeps its arrays beside the module that it adapts, `layer_0/query/lora/{a,b}`. Weights that
are targets by their own path, or lie in a module with several, have a node each,
`layer_0/experts/lora/up/{a,b}`. The roles of a weight's axes follow from the shapes of the arrays;
where other roles would fit them before, the node says them: `layer_0/out/lora/:1>0/{a,b}` for the
square kernel of a layer that computes `x @ kernel.T`.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from adapters_jax.errors import MismatchError, RecipeError
from adapters_jax.methods.base import AttachmentPoint, Count
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.targets import around, join, selects
from adapters_jax.trace.registry import Attention
from adapters_jax.weights.axes import Axes, from_text
from adapters_jax.weights.factors import RANK
from adapters_jax.weights.quantized import unboxed

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Placement:
    """One method on one module or weight of a model.

    An abstract run finds it once (`chosen`, `on_outputs`). The adapted model and the adapter's file
    keep it, and whoever needs to know where an adapter is reads it.

    Attributes:
        path: the path of its target: a module, or a weight.
        module: the path of the module.
        node: where its arrays are below the method's slot in the module; "" for the slot itself.
        weight: the name of the weight that it changes; "" for methods on outputs and in attention.
        shape: the shape of that weight, with layer axes.
        axes: the roles of that weight's axes.
        biases: the names of the module's leaves that are added to the weight's products; None where
            that is not known.
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
    biases: tuple[str, ...] | None = ()
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

    @functools.cached_property
    def array_shapes(self) -> dict[str, Shape]:
        """The shapes of its arrays by path."""
        return {self.method.path_of(self.prefix, name): shape for name, shape in self.arrays}

    def counts(self, name: str) -> bool:
        """Whether an array is one that `count` is about: its module's own, and not frozen."""
        return name in self.method.own_leaves and name not in self.method.frozen_leaves

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
        kind = self.method.acts_on
        if kind == "weight":
            if self.axes is None:
                raise RecipeError(f"{described(self)} changes a weight, and none is known there")
            axes = self.axes.inside(self.axes.ndim - len(known[self.weight]))
            fields = {"weight": self.weight, "axes": axes, "biases": self.biases, **fields}
        else:
            fields = {"width": self.width, "attention": self.attention, **fields}
        return AttachmentPoint(kind, self.path, known, **fields)

    def roles(self) -> Any:
        """What of the roles of the weight's axes the method uses; None without a weight."""
        return None if self.axes is None else self.method.roles(self.axes, self.path)

    def paths(self) -> dict[str, str]:
        """The paths of its arrays by name."""
        return {name: self.method.path_of(self.prefix, name) for name in self.method.leaf_names}

    def leaves(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The method's arrays by name, out of a tree's leaves by path."""
        return {name: flat[path] for name, path in self.paths().items()}

    def copies(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The shared arrays by the paths that the module's own would have, with its layer axes.

        A loop over layers, as flax makes it, gives each layer its part of a tree.
        """
        shared = {name: unboxed(flat[self.paths()[name]]) for name in self.method.shared_leaves}
        return {
            f"{self.prefix}/{name}": jnp.broadcast_to(x, (*self.layers, *x.shape))
            for name, x in shared.items()
        }

    def stacked(self, shapes: Shapes, around: Shape = ()) -> "Placement":
        """The placement with the layer axes that its arrays have in a tree.

        Args:
            shapes: the shapes of the tree's leaves by path.
            around: the layer axes that the whole tree is stacked on.
        """
        if not self.arrays:
            return replace(self, layers=around)
        name = self.method.own_leaves[0]
        own, grown = dict(self.arrays)[name], shapes[join(self.prefix, name)]
        return replace(self, layers=(*around, *grown[: len(grown) - len(own)])).with_arrays()

    def with_arrays(self) -> "Placement":
        """The placement with the shapes of its arrays, which follow from the method."""
        # The roles of a weight's axes include its layer axes; outputs are those of one layer.
        front = () if self.method.acts_on == "weight" else self.layers
        leaves = self.method.leaves(self.point())
        return replace(
            self,
            arrays=tuple(
                (n, leaf.shape if n in self.method.shared_leaves else (*front, *leaf.shape))
                for n, leaf in leaves.items()
            ),
        )


class Placements(tuple[Placement, ...]):
    """The placements of a model, in the order of its recipe's methods.

    They are static: jit hashes them in every call, so that the hash is kept.
    """

    @functools.cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def ordered(cls, recipe: Recipe, found: Iterable[Placement]) -> "Placements":
        """Placements in the order of the recipe's methods."""
        order = {method: i for i, method in enumerate(recipe.attached)}
        return cls(sorted(found, key=lambda each: order[each.method]))

    def fit(self, recipe: Recipe, shapes: Shapes) -> bool:
        """Whether a tree holds the weights and arrays of these placements, and no other adapter."""
        arrays = {p: shape for each in self for p, shape in each.array_shapes.items()}
        weights = {each.weight_path: each.shape for each in self if each.weight}
        present = all(shapes.get(path) == shape for path, shape in {**weights, **arrays}.items())
        others = [path for path in shapes if path not in arrays]
        nodes = {each.prefix for each in self}
        inside = any(not nodes.isdisjoint(around(path)) for path in others)
        return present and not inside and not recipe.owners(others)

    def several(self) -> list[str]:
        """The modules and weights with more than one adapter of a kind, in words.

        Files and trees of other libraries hold one.

        Example:
            >>> from adapters_jax import LoRA
            >>> two = [LoRA("q", name="old"), LoRA("q", name="new")]
            >>> Placements(Placement(method, "q", "q", "") for method in two).several()
            ["q has the adapters 'old' and 'new'"]
        """
        names: dict[tuple[str, str, str], list[str]] = {}
        for each in self:
            key = (type(each.method).slot, each.module, each.weight)
            names.setdefault(key, []).append(repr(each.method.name))
        return [
            f"{join(module, weight)} has the adapters {' and '.join(own)}"
            for (_, module, weight), own in names.items()
            if len(own) > 1
        ]

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
                found.append(f"{prefix} adapts {described(one)}, and here {described(two)}")
            elif weights[0] != weights[1]:
                found.append(f"{prefix} changes {weights[0]}, and here it is {weights[1]}")
            # Not the axes themselves: shapes tell of them only what the method uses.
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
    """

    def __init__(self, placements: Placements | None = None):
        self.placements = placements

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known)

    def __hash__(self) -> int:
        return hash(Known)

    def of(self, recipe: Recipe, shapes: Shapes) -> Placements:
        """The placements in a tree: those that are known, where they are of this very tree.

        Raises:
            MismatchError: as for `in_tree`.
        """
        # One model may be given the parameters of another width, whose placements differ.
        if self.placements is not None and self.placements.fit(recipe, shapes):
            return self.placements
        return in_tree(recipe, shapes)


def in_tree(recipe: Recipe, shapes: Shapes) -> Placements:
    """The placements in a tree without its model: read off names and shapes.

    For trees and files that say no more, and for linen models that did not run yet. What an output
    is wide and whether it reaches the model's outputs is not in a tree.

    Args:
        shapes: the shapes of all leaves by path, the base's and the adapters'.

    Raises:
        MismatchError: an adapter lacks arrays, or fits no weight of its module.
    """
    return _in_tree(recipe, tuple(shapes.items()))


@functools.lru_cache(maxsize=32)
def _in_tree(recipe: Recipe, shapes: tuple[tuple[str, Shape], ...]) -> Placements:
    """`in_tree` of shapes as pairs; kept, since a linen model asks in every trace."""
    groups, base = groups_of(recipe, dict(shapes))
    owned = own_leaves(base)
    found = [located(owner, parts, owned.get(owner.module, {})) for owner, parts in groups]
    return Placements.ordered(recipe, [*found, *_compositions(recipe, found)])


def _compositions(recipe: Recipe, found: Sequence[Placement]) -> list[Placement]:
    """The placements of compositions without arrays: they are where their members are."""
    names: dict[str, set[str]] = {}
    for each in found:
        if each.method.acts_on == "output":
            names.setdefault(each.module, set()).add(each.method.name)
    made = []
    for method in [m for m in recipe.attached if m.members and not m.leaf_names]:
        for module in [path for path, own in names.items() if not own.isdisjoint(method.members)]:
            made.append(Placement(method, module, module))
            names[module].add(method.name)
    return made


def groups_of(
    recipe: Recipe, shapes: Shapes
) -> tuple[list[tuple[Owner, dict[str, Shape]]], Shapes]:
    """The adapters in a tree, each with the shapes of its arrays; and the base's shapes."""
    groups: dict[str, tuple[Owner, dict[str, Shape]]] = {}
    owners = recipe.owners(shapes)
    for path, owner in owners.items():
        if not owner.shared:
            groups.setdefault(owner.prefix, (owner, {}))[1][owner.name] = shapes[path]
    for owner, parts in groups.values():
        paths = owner.paths()
        shared = [name for name in owner.method.shared_leaves if paths[name] in shapes]
        parts.update({name: shapes[paths[name]] for name in shared})
    base = {path: shape for path, shape in shapes.items() if path not in owners}
    return list(groups.values()), base


def located(owner: Owner, parts: Shapes, own: Shapes) -> Placement:
    """The placement of one adapter in a tree."""
    method, kind = owner.method, type(owner.method).__name__
    lacking = sorted(set(method.leaf_names) - set(parts))
    if lacking:
        raise MismatchError(f"the adapter {owner.prefix} ({kind}) lacks {', '.join(lacking)}")
    arrays = tuple((name, parts[name]) for name in method.leaf_names)
    placed = Placement(method, owner.path, owner.module, owner.node, arrays=arrays)
    if not isinstance(method, LeafMethod):
        return placed
    found = weight_in(placed, own)
    if found is None:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in parts.items())
        weights = ", ".join(f"{name} {list(shape)}" for name, shape in own.items()) or "no leaves"
        raise MismatchError(
            f"the adapter {owner.prefix} ({kind}) has {shapes}, which fits no weight of "
            f"{owner.module!r}: it has {weights}"
        )
    weight, axes = found
    placed = replace(placed, weight=weight, shape=own[weight], axes=axes)
    return replace(placed, biases=_biases(placed, own) if method.changes_biases(owner.path) else ())


def _biases(placed: Placement, own: Shapes) -> tuple[str, ...] | None:
    """The biases of a weight as far as shapes say it: None where other leaves could be some."""
    axes = placed.point().axes
    shape = tuple(placed.shape[i] for i in (*axes.shared, *axes.outputs))
    alike = [name for name, other in own.items() if other == shape and name != placed.weight]
    return tuple(alike) if set(alike) <= {"bias"} else None


def weight_in(placed: Placement, own: Shapes) -> tuple[str, Axes] | None:
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


def described(where: Owner | Placement) -> str:
    """An adapter for a message."""
    return f"{where.path or '(the model itself)'} ({type(where.method).__name__})"
