"""Checks of what a method is configured with."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from adapters_jax.targets import as_patterns


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    closed: bool = False,
) -> None:
    """Raises ValueError unless `value` is a finite number in (low, high), or [low, high)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or not (low < value < high or (closed and value == low))
    ):
        lower = "" if low == -math.inf else f" {'>=' if closed else '>'} {low:g}"
        upper = f" and < {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{owner}: {name}={value!r}, wanted a finite number{lower}{upper}")


def check_size(owner: str, name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}: {name}={value!r}, wanted a whole number >= 1")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name}={value!r}, wanted True or False")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{owner}: {name}={value!r}, wanted one of {', '.join(choices)}")


def pairs(field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping from patterns, or its items, as pairs."""
    items = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, tuple | list) or not all(map(_is_pair, items)):
        raise ValueError(f"LoRA: {field}={value!r}, wanted a mapping such as {{'layer_0/**': 4}}")
    for pattern, _ in items:
        as_patterns(pattern, f"LoRA {field}")
    return tuple((pattern, number) for pattern, number in items)


def ranges(value: Any) -> tuple[tuple[int, int], ...]:
    """Ranges of whole numbers in order, none of them empty or in another."""
    ranges = tuple(map(tuple, value)) if isinstance(value, tuple | list) else None
    ends = [end for each in ranges or () for end in each]
    good = ranges is not None and all(len(each) == 2 for each in ranges)
    if not good or ends != sorted(ends) or any(a == b or a < 0 for a, b in ranges or ()):
        raise ValueError(f"LoRA: slices={value!r}, wanted ranges in order such as ((0, 768),)")
    return ranges or ()


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)
