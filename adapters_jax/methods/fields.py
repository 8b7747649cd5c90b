"""Checks of what a method is configured with."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from adapters_jax.errors import shortened
from adapters_jax.targets import as_patterns

LARGEST = 2**31  # no axis is as long


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
        or not -sys.float_info.max <= value <= sys.float_info.max
        or not (low < value < high or (closed and value == low))
    ):
        lower = "" if low == -math.inf else f" {'>=' if closed else '>'} {low:g}"
        upper = f" and < {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{owner}: {name}={_told(value)}, wanted a finite number{lower}{upper}")


def check_size(owner: str, name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number of at least 1 that an axis can have."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST:
        larger = f" and < {LARGEST}" if isinstance(value, int) and value >= LARGEST else ""
        raise ValueError(f"{owner}: {name}={_told(value)}, wanted a whole number >= 1{larger}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name}={_told(value)}, wanted True or False")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: {name}={_told(value)}, wanted one of {', '.join(choices)}")


def pairs(field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping from patterns, or its items, as pairs."""
    items = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, tuple | list) or not all(map(_is_pair, items)):
        raise ValueError(
            f"LoRA: {field}={_told(value)}, wanted a mapping such as {{'layer_0/**': 4}}"
        )
    for pattern, _ in items:
        as_patterns(pattern, f"LoRA {field}")
    return tuple((pattern, number) for pattern, number in items)


def ranges(value: Any) -> tuple[tuple[int, int], ...]:
    """Ranges of whole numbers in order, none of them empty or in another."""
    if not isinstance(value, tuple | list) or not all(map(_is_range, value)):
        wrong = True
    else:
        ends = [end for each in value for end in each]
        wrong = ends != sorted(ends)
    if wrong:
        raise ValueError(f"LoRA: slices={_told(value)}, wanted ranges in order such as ((0, 768),)")
    return tuple((start, stop) for start, stop in value)


def _is_range(item: Any) -> bool:
    pair = isinstance(item, tuple | list) and len(item) == 2 and all(type(x) is int for x in item)
    return pair and 0 <= item[0] < item[1] < LARGEST


def _told(value: Any) -> str:
    """A value for a message."""
    return shortened(repr(value))


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)
