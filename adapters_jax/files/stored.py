"""An adapter of a file whose arrays are not read yet: of one name, frozen, or stacked."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from adapters_jax.errors import (
    AdapterMismatchError,
    AdapterRecipeError,
    MismatchError,
    RecipeError,
    check_flag,
)
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.stacking import Stack, stack_layers, unstack_layers
from adapters_jax.trees import Tree, flatten, unflatten


class Tensors(NamedTuple):
    """Arrays by path that are not read yet."""

    shapes: Mapping[str, Any]
    read: Callable[[], Mapping[str, Any]]


class Stored(NamedTuple):
    """An adapter whose arrays are not read yet."""

    directory: Path
    recipe: Recipe
    trained: Tensors
    state: Tensors
    placements: Placements | None = None
    same_base: bool = False  # as the one that it was trained on, by the paths and shapes of all


def training(adapter: Stored, train: bool | None) -> Stored:
    """The adapter, all of whose added leaves train, or do not; None keeps it as it is."""
    if train is None:
        return adapter
    check_flag("load_adapter", "train", train)
    new = {m: m if m.slot is None else replace(m, train=train) for m in adapter.recipe}
    found = [replace(each, method=new[each.method]) for each in adapter.placements or ()]
    placements = None if adapter.placements is None else Placements(found)
    return adapter._replace(recipe=Recipe(*new.values()), placements=placements)


def named(adapter: Stored, name: str | None) -> Stored:
    """The entries of one name, with those that they run; None keeps all.

    Raises:
        AdapterRecipeError: no entry of the file has the name.
    """
    if name is None:
        return adapter
    try:
        recipe = adapter.recipe[name]
    except RecipeError as error:
        raise AdapterRecipeError(f"the adapter in {adapter.directory}: {error}") from error
    shapes = {p: adapter.trained.shapes[p] for p in recipe.owners(adapter.trained.shapes)}

    def read() -> Mapping[str, Any]:
        return {path: x for path, x in adapter.trained.read().items() if path in shapes}

    own = [each for each in adapter.placements or () if each.method in recipe.methods]
    placements = None if adapter.placements is None else Placements(own)
    return adapter._replace(recipe=recipe, trained=Tensors(shapes, read), placements=placements)


def as_in_model(adapter: Stored, tree: Tree, stack: Stack) -> Stored:
    """The adapter with its layers stacked if the model's are, and unrolled otherwise."""
    scanned = any(map(stack.holds, flatten(tree)))
    of_layers = stack.number if scanned else stack.holds
    convert = stack_layers if scanned else unstack_layers

    def converted(tensors: Tensors) -> Tensors:
        if not any(map(of_layers, tensors.shapes)):
            return tensors
        shapes = flatten(convert(unflatten(tensors.shapes), stack))
        return Tensors(shapes, lambda: flatten(convert(unflatten(tensors.read()), stack)))

    recipe, trained = adapter.recipe, adapter.trained
    try:
        if any(map(of_layers, trained.shapes)):
            recipe, _ = convert((recipe, unflatten(trained.shapes)), stack)
        return Stored(adapter.directory, recipe, converted(trained), converted(adapter.state))
    except RecipeError as error:
        raise AdapterRecipeError(f"the adapter in {adapter.directory}: {error}") from error
    except MismatchError as error:
        raise AdapterMismatchError(f"the adapter in {adapter.directory}: {error}") from error
