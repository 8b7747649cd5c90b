"""A recipe for leaves that are elsewhere now: the same methods, at the places they moved to."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.targets import matches, selects

Moves = Sequence[tuple[str, str]]  # where leaves, or the modules they are of, were and are


def moved(recipe: Recipe, moves: Moves, problems: list[str]) -> Recipe:
    """The recipe of a tree whose trained leaves moved, several perhaps to one place.

    Patterns that mean the new places stay as they are; others become the places themselves.

    Args:
        recipe: says what trained at the old paths.
        moves: old and new paths of the trained leaves.
        problems: takes what is said of one new place otherwise than of it again.

    Example:
        >>> from adapters_jax import LoRA
        >>> moved(Recipe(LoRA("a/q"), LoRA("**/v")), [("a/q/lora/a", "b/q/lora/a")], [])
        Recipe(
          LoRA(targets=('b/q',)),
          LoRA(targets=('**/v',)),
        )
    """
    places_of: dict[Method, list[tuple[str, str]]] = {method: [] for method in recipe}
    claims: dict[tuple[str, str | None], dict[Method, None]] = {}
    for old, new in moves:
        owner = recipe.owner(old)
        if owner is None:
            for method in recipe:
                if method.slot is None and selects(method.targets, old):
                    places_of[method].append((old, new))
        else:
            module, method = owner
            place = new.removesuffix(old[len(module) :])
            places_of[method].append((module, place))
            claims.setdefault((place, method.slot), {})[_bare(method)] = None
    problems += [
        f"{place} has {_differing(methods)}"
        for (place, _), methods in claims.items()
        if len(methods) > 1
    ]
    made = [_retargeted(method, places_of[method], problems) for method in recipe]
    return Recipe(*dict.fromkeys(made))


def _bare(method: Any) -> Any:
    """A method without what it says of single targets."""
    own = (*method.pattern_fields, *method.subset_fields)
    return dataclasses.replace(method, targets="**", **dict.fromkeys(own, ()))


def _differing(methods: Iterable[Any]) -> str:
    """The fields in which methods differ."""
    rows = [{"method": type(m).__name__, **dataclasses.asdict(m)} for m in methods]
    values = {k: [repr(row.get(k)) for row in rows] for row in rows for k in row}
    return ", ".join(f"{k}={' and '.join(v)}" for k, v in values.items() if len(set(v)) > 1)


def _retargeted(method: Any, moves: Moves, problems: list[str]) -> Method:
    """A method for places that are elsewhere."""
    places = list(dict.fromkeys(new for _, new in moves))
    changes: dict[str, Any] = {}
    if not all(selects(method.targets, p) for p in places) or _idle(method.targets, places):
        changes["targets"] = tuple(places)
    for field in method.subset_fields:
        changes |= _subset(method, field, moves, problems)
    for field, name in method.pattern_fields.items():
        pairs, usual = getattr(method, field), getattr(method, name)
        values: dict[str, dict[Any, None]] = {}
        for old, new in moves if pairs else ():
            values.setdefault(new, {})[_at(pairs, old, usual)] = None
        problems += [
            f"{place} has {name}={' and '.join(map(str, several))}"
            for place, several in values.items()
            if len(several) > 1
        ]
        numbers = {place: next(iter(several)) for place, several in values.items()}
        stays = all(_at(pairs, place, usual) == value for place, value in numbers.items())
        if not stays or _idle([pattern for pattern, _ in pairs], places):
            changes[field] = {place: value for place, value in numbers.items() if value != usual}
    return dataclasses.replace(method, **changes)


def _subset(method: Any, field: str, moves: Moves, problems: list[str]) -> dict[str, Any]:
    """A field of patterns that match some of the targets, for modules that are elsewhere."""
    patterns = getattr(method, field)
    if not patterns:
        return {}
    matched = {new for old, new in moves if selects(patterns, old)}
    others = {new for old, new in moves if not selects(patterns, old)}
    problems += [f"{place} is in {field} of some layers only" for place in matched & others]
    stays = all(selects(patterns, new) == (new in matched) for _, new in moves)
    places = [new for _, new in moves]
    return {} if stays and not _idle(patterns, places) else {field: tuple(sorted(matched))}


def _at(pairs: Iterable[tuple[str, Any]], path: str, usual: Any) -> Any:
    """What a pattern says of a path."""
    return next((value for pattern, value in pairs if matches(pattern, path)), usual)


def _idle(patterns: Iterable[str], places: Sequence[str]) -> bool:
    """Whether a pattern means none of the places, or took away what is not among them."""
    means = [any(matches(pattern, place) for place in places) for pattern in patterns]
    return bool(places) and not all(means)
