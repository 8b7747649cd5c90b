"""Counts the adapters in a parameter tree, each against the closed form of its method."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from adapters_jax.errors import MismatchError
from adapters_jax.methods import METHODS, Method
from adapters_jax.methods.base import Count
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.placement.placed import (
    Placement,
    Placements,
    Shape,
    Shapes,
    described,
    groups_of,
    located,
    own_leaves,
)
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.targets import around, join, selects


class Counted(NamedTuple):
    """One adapter of a tree, with the closed form of its parameters."""

    placed: Placement
    closed: Count

    @property
    def expected(self) -> int:
        """How many parameters the closed form gives."""
        return self.closed.parameters * self.closed.copies

    @property
    def actual(self) -> int:
        """How many parameters its own arrays hold that its method trains."""
        own = (shape for name, shape in self.placed.arrays if self.placed.counts(name))
        return sum(map(math.prod, own))

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
        adapters.append(one := Counted(each, each.count))
        if one.expected != one.actual:
            problems.append(
                f"{described(each)} has {one.actual:,} parameters, expected {one.formula} = "
                f"{one.expected:,}"
            )
    if problems:
        raise MismatchError("the arrays differ from the recipe: " + "; ".join(problems))
    return adapters


def _as_counted(recipe: Recipe, shapes: Shapes) -> list[Placement | str]:
    """The adapters in a tree that may be wrong, or what is wrong with their names."""
    groups, base = groups_of(recipe, shapes)
    owned = own_leaves(base)
    found: list[Placement | str] = [
        f"{path} belongs to no target" for path in _strays(recipe, shapes)
    ]
    inside: dict[str, list[str]] = {owner.prefix: [] for owner, _ in groups}
    for path in shapes:
        for node in inside.keys() & set(around(path)):
            inside[node].append(path.removeprefix(f"{node}/"))
    for owner, parts in groups:
        names, held = owner.method.leaf_names, dict.fromkeys([*inside[owner.prefix], *parts])
        if set(held) == set(names):
            found.append(_nearest(owner, parts, owned.get(owner.module, {})))
        else:
            where = described(owner)
            found.append(f"{where} has {', '.join(held)}, expected {', '.join(names)}")
    return found


def _nearest(owner: Owner, parts: Shapes, own: Shapes) -> Placement:
    """The placement of one adapter, at the largest weight of its module where it fits none."""
    try:
        return located(owner, parts, own)
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
        alike = {frozenset(kinds[module].items()) for module in have if module in kinds}
        found += [
            f"{path} ({type(method).__name__})"
            for path, kind in kinds.items()
            if path not in have
            and frozenset(kind.items()) in alike
            and _targeted(method, path, kind)
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
    slots = tuple(method.slot for method in METHODS.values() if method.slot)
    named = tuple(f"{slot}_" for slot in slots)  # entries with a name
    own = {path.rpartition("/")[0] for path in shapes}

    def is_slot(name: str) -> bool:
        return name in slots or name.startswith(named)

    found = []
    for path in shapes:
        names = path.split("/")
        modules = ("/".join(names[:i]) for i, name in enumerate(names) if is_slot(name))
        found += [path] if any(module in own for module in modules) else []
    return [path for path in found if not recipe.keeps(path)]


def _strays(recipe: Recipe, shapes: Mapping[str, Shape]) -> list[str]:
    """Leaves named as those of the recipe's methods, at modules that these do not target."""
    ends = tuple(f"{m.slot}/{name}" for m in recipe.attached for name in m.leaf_names)
    named = [path for path in shapes if ends and f"/{path}".endswith(tuple(f"/{e}" for e in ends))]
    owners = recipe.owners(named)
    return [path for path in named if path not in owners]
