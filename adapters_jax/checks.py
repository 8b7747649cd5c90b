"""Checks of the settings of a method."""

import math
import sys
from collections.abc import Iterable
from typing import Any

from adapters_jax.errors import UserError, shortened

LARGEST = 2**31  # longer than any axis can be


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    closed: bool = False,
) -> None:
    """Raises UserError unless `value` is a finite number in (low, high), or [low, high)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not number
        or not -sys.float_info.max <= value <= sys.float_info.max
        or not (low < value < high or (closed and value == low))
    ):
        lower = "" if low == -math.inf else f" {'>=' if closed else '>'} {low:g}"
        upper = f" and < {high:g}" if math.isfinite(high) else ""
        raise UserError(f"{owner}: {name}={shown(value)}, expected a finite number{lower}{upper}")


def check_size(owner: str, name: str, value: Any) -> None:
    """Raises UserError unless `value` is a whole number of at least 1 that an axis can have."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST:
        larger = f" and < {LARGEST}" if isinstance(value, int) and value >= LARGEST else ""
        raise UserError(f"{owner}: {name}={shown(value)}, expected a whole number >= 1{larger}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raises UserError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{owner}: {name}={shown(value)}, expected True or False")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{owner}: {name}={shown(value)}, expected one of {', '.join(choices)}")


def shown(value: Any) -> str:
    """A value as a message prints it."""
    return shortened(repr(value))
