"""Remapping: the recipe of a tree whose leaves have other paths than those it was written for."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from adapters_jax.methods import Method
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.targets import join, matches, selects

PathPairs = Sequence[tuple[str, str]]  # the old and the new path of leaves, or of modules


def remap(recipe: Recipe, pairs: PathPairs, problems: list[str]) -> Recipe:
    """The recipe with the same methods for leaves at new paths; several may share a new path.

    Patterns that match the new paths stay as they are; others are replaced by the paths themselves.

    Args:
        recipe: says what trained at the old paths.
        pairs: old and new paths of the trained leaves.
        problems: gets a line for each new path whose old paths have different settings.

    Example:
        >>> from adapters_jax import LoRA
        >>> remap(Recipe(LoRA("a/q"), LoRA("**/v")), [("a/q/lora/a", "b/q/lora/a")], [])
        Recipe(
          LoRA(targets=('b/q',)),
          LoRA(targets=('**/v',)),
        )
    """
    pairs_of: dict[Method, list[tuple[str, str]]] = {method: [] for method in recipe}
    settings: dict[tuple[str, str | None], dict[Method, None]] = {}
    for old, new in pairs:
        owner = recipe.owner(old)
        if owner is None:
            for method in recipe:
                if method.slot is None and selects(method.targets, old):
                    pairs_of[method].append((old, new))
        else:
            method, path = owner.method, _remapped(owner, old, new)
            pairs_of[method].append((owner.path, path))
            settings.setdefault((path, method.slot), {})[_bare(method)] = None
    problems += [
        f"{path} has {_differing(methods)}"
        for (path, _), methods in settings.items()
        if len(methods) > 1
    ]
    made = [_retargeted(method, pairs_of[method], problems) for method in recipe]
    return Recipe(*dict.fromkeys(made))


def _remapped(owner: Owner, old: str, new: str) -> str:
    """The new path of a target, from the old and the new path of one of its leaves."""
    module = owner.prefix.rpartition(f"{owner.method.slot}")[0].rstrip("/")
    path = new.removesuffix(old[len(module) :])
    return join(path, owner.path[len(module) :].strip("/"))


def _bare(method: Any) -> Any:
    """A method without its targets and without its settings for single targets."""
    own = (*method.pattern_fields, *method.subset_fields)
    return dataclasses.replace(method, targets="**", **dict.fromkeys(own, ()))


def _differing(methods: Iterable[Any]) -> str:
    """The fields that differ between methods, with their values."""
    rows = [{"method": type(m).__name__, **dataclasses.asdict(m)} for m in methods]
    values = {k: [repr(row.get(k)) for row in rows] for row in rows for k in row}
    return ", ".join(f"{k}={' and '.join(v)}" for k, v in values.items() if len(set(v)) > 1)


def _retargeted(method: Any, pairs: PathPairs, problems: list[str]) -> Method:
    """A method with patterns for the new paths of its targets."""
    paths = list(dict.fromkeys(new for _, new in pairs))
    changes: dict[str, Any] = {}
    if not all(selects(method.targets, p) for p in paths) or _unused(method.targets, paths):
        changes["targets"] = tuple(paths)
    for field in method.subset_fields:
        changes |= _subset(method, field, pairs, problems)
    for field, name in method.pattern_fields.items():
        patterns, usual = getattr(method, field), getattr(method, name)
        values: dict[str, dict[Any, None]] = {}
        for old, new in pairs if patterns else ():
            values.setdefault(new, {})[_value_at(patterns, old, usual)] = None
        problems += [
            f"{path} has {name}={' and '.join(map(str, several))}"
            for path, several in values.items()
            if len(several) > 1
        ]
        numbers = {path: next(iter(several)) for path, several in values.items()}
        stays = all(_value_at(patterns, path, usual) == value for path, value in numbers.items())
        if not stays or _unused([pattern for pattern, _ in patterns], paths):
            changes[field] = {path: value for path, value in numbers.items() if value != usual}
    return dataclasses.replace(method, **changes)


def _subset(method: Any, field: str, pairs: PathPairs, problems: list[str]) -> dict[str, Any]:
    """The new patterns of a field whose patterns match some of the targets; empty to keep it."""
    patterns = getattr(method, field)
    if not patterns:
        return {}
    matched = {new for old, new in pairs if selects(patterns, old)}
    others = {new for old, new in pairs if not selects(patterns, old)}
    problems += [f"{path} is in {field} of some layers only" for path in matched & others]
    stays = all(selects(patterns, new) == (new in matched) for _, new in pairs)
    paths = [new for _, new in pairs]
    return {} if stays and not _unused(patterns, paths) else {field: tuple(sorted(matched))}


def _value_at(pairs: Iterable[tuple[str, Any]], path: str, usual: Any) -> Any:
    """The value of the first pattern that matches a path."""
    return next((value for pattern, value in pairs if matches(pattern, path)), usual)


def _unused(patterns: Iterable[str], paths: Sequence[str]) -> bool:
    """Whether some pattern, also one that excludes, matches none of the paths."""
    used = [any(matches(pattern, path) for path in paths) for pattern in patterns]
    return bool(paths) and not all(used)
