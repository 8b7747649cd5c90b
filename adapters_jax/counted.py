"""The adapters in a parameter tree, each against the closed form of its method."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from adapters_jax.attached import own_leaves, weight_of
from adapters_jax.errors import MismatchError
from adapters_jax.methods import METHODS, Method
from adapters_jax.methods.base import Count
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.targets import join, selects

Shape = tuple[int, ...]


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
