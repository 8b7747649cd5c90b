"""A tenant's adapter in the shapes of the largest one, so that it trains as it would alone.

Its leaves are padded with zeros, whose gradients are not used. Its scale stays out of them, unlike
in a bank: the programs multiply by it, so gradients and optimiser are those of unscaled leaves.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import MismatchError, RecipeError
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.fitting import fitted, is_prompt, owners_of

Shape = tuple[int, ...]
Host = dict[str, np.ndarray]  # leaves by path


class Room(NamedTuple):
    """The largest adapter.

    Attributes:
        idle: the leaves that change nothing, by path; those of tenants are float32.
        trained: the paths of the leaves that train, in the order of `idle`.
        prompts: the paths of attention modules with prompts.
    """

    recipe: Recipe
    idle: Host
    trained: tuple[str, ...]
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, idle: Mapping[str, Any]) -> "Room":
        """The room of a model of a recipe whose leaves are `idle`."""
        paths = list(idle)
        trained = recipe.trained(paths)
        prompts = [owner.path for owner in owners_of(recipe, paths) if is_prompt(owner)]
        host = {path: np.asarray(x) for path, x in idle.items()}
        return cls(recipe, host, tuple(p for p in paths if p in trained), tuple(prompts))

    @property
    def ndim(self) -> int:
        """The largest number of axes."""
        return max(x.ndim for x in self.idle.values())

    def fit(self, name: str, recipe: Recipe, shapes: Mapping[str, Shape]) -> "Fit":
        """How a recipe's leaves, of these shapes, lie in the room.

        Raises:
            RecipeError: the room lacks a method, or has it with other settings than sizes and
                scales; or the method needs other numbers in the larger shapes.
            MismatchError: a leaf is larger than its room.
        """
        ones = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
        made = fitted(f"tenant {name!r}", recipe, ones, self.recipe, self.idle)
        if made.invocation is not None:
            raise RecipeError(f"tenant {name!r}: activated adapters are not trained here")
        scales = np.ones(len(self.idle), np.float32)
        sizes = np.zeros((len(self.trained), self.ndim), np.int32)
        trained = recipe.trained(list(shapes))
        for i, path in enumerate(self.idle):
            if path not in shapes:
                continue
            own = made.leaves[path][tuple(map(slice, shapes[path]))]
            scales[i] = own.flat[0]
            padded = shapes[path] != self.idle[path].shape
            if np.any(own != own.flat[0]) or (padded and recipe.owner(path) is None):
                raise RecipeError(
                    f"tenant {name!r}: {path} of shape {list(shapes[path])} needs other numbers in "
                    f"{list(self.idle[path].shape)}; give it the sizes of the largest recipe"
                )
            if path in trained and path in self.trained:
                # Axes that the leaf lacks have one entry.
                row = [*shapes[path], *[1] * (self.ndim - len(shapes[path]))]
                sizes[self.trained.index(path)] = row
        lengths = [made.lengths.get(path, 0) for path in self.prompts]
        return Fit(dict(shapes), scales, sizes, np.array(lengths, np.int32))

    def padded(self, leaves: Mapping[str, Any], *, zeros: bool = False) -> Host:
        """Leaves in the room's shapes: idle ones where a path is absent, or zeros."""
        paths = self.trained if zeros else self.idle
        return {path: _padded(leaves.get(path), self.idle[path], zeros) for path in paths}


class Fit(NamedTuple):
    """How a tenant's leaves lie in the room.

    Attributes:
        shapes: their own shapes by path.
        scales: by what each of the room's leaves is multiplied before the model reads it.
        sizes: how many entries of each axis train, for each leaf that trains in the room.
        lengths: how many tokens its prompts have.
    """

    shapes: dict[str, Shape]
    scales: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray

    def cut(self, leaves: Mapping[str, Any]) -> Host:
        """Leaves of the room in the tenant's own shapes; copies."""
        own = {path: x for path, x in leaves.items() if path in self.shapes}
        return {p: np.array(x[tuple(map(slice, self.shapes[p]))]) for p, x in own.items()}

    def check(self, name: str, leaves: Mapping[str, Any], *, some: bool = False) -> None:
        """Raises MismatchError unless these are leaves of the tenant's shapes; `some` may lack."""
        shapes = {path: tuple(np.shape(x)) for path, x in leaves.items()}
        known = {p: s for p, s in self.shapes.items() if not some or p in shapes}
        wrong = [path for path in {**shapes, **known} if shapes.get(path) != known.get(path)]
        if wrong:
            given, own = (each.get(wrong[0], "absent") for each in (shapes, known))
            raise MismatchError(
                f"tenant {name!r}: {wrong[0]} of the snapshot is {given}, expected {own}; restore "
                "it to a tenant that was created with the snapshot's recipe"
            )


def _padded(leaf: Any, idle: np.ndarray, zeros: bool) -> np.ndarray:
    if leaf is None:
        return np.zeros(idle.shape, np.float32) if zeros else idle.astype(np.float32)
    edges = [(0, most - own) for own, most in zip(leaf.shape, idle.shape, strict=True)]
    return np.pad(np.asarray(leaf, np.float32), edges)
