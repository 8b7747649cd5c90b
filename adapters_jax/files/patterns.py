"""Patterns for the recipes of files, which name modules one by one."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adapters_jax.targets import join, selects


def shortest(paths: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match these paths and no others: by their last names, or the paths themselves.

    Example:
        >>> shortest(["layer_0/query", "layer_1/query"], ["layer_0/query", "layer_1/query", "norm"])
        ('**/query',)
        >>> shortest(["layer_0/query"], ["layer_0/query", "layer_1/query"])
        ('layer_0/query',)
    """
    chosen, among = set(paths), list(among)
    for length in (1, 2):
        tails = {"/".join(path.split("/")[-length:]) for path in chosen}
        patterns = tuple(sorted(join("**", tail) for tail in tails))
        fewer = len(patterns) < len(chosen)
        if fewer and {path for path in among if selects(patterns, path)} == chosen:
            return patterns
    return tuple(sorted(chosen, key=in_order))


def pattern_of(
    numbers: Mapping[str, Any], usual: Any, stated: Collection[str] = ()
) -> dict[str, Any]:
    """Patterns of modules for each number that differs from the usual one, or has to be stated."""
    chosen = {path: n for path, n in numbers.items() if n != usual or path in stated}
    others = sorted({*chosen.values()})
    groups = {n: [path for path, number in chosen.items() if number == n] for n in others}
    return {pattern: n for n in others for pattern in shortest(groups[n], numbers)}


def in_order(path: str) -> list[tuple[int, str]]:
    """A sort key that compares the numbers in paths as numbers."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path)]
