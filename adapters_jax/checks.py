"""Checks of the settings of methods and of models."""

import math
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from adapters_jax.errors import UserError, shortened

LARGEST = 2**31  # longer than any axis can be
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32, in which models compute
SMALLEST_FLOAT = 2.0**-126  # above 0, since XLA takes smaller ones for 0


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    closed: bool = False,
) -> None:
    """Raises UserError unless `value` is of float32, and in (low, high), or [low, high)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    held = number and (value == 0 or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT)
    if not held or not (low < value < high or (closed and value == low)):
        lower = "" if low == -math.inf else f" {'>=' if closed else '>'} {low:g}"
        upper = f" and < {high:g}" if math.isfinite(high) else ""
        kind = "finite number"
        if number and not held and abs(value) < math.inf:
            kind = "number that float32 can hold,"
        raise UserError(f"{owner}: {name}={shown(value)}, expected a {kind}{lower}{upper}")


def check_size(owner: str, name: str, value: Any) -> None:
    """Raises UserError unless `value` is a whole number of at least 1 that an axis can have."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST:
        more = f" and < {LARGEST}" if isinstance(value, int) and value >= LARGEST else ""
        if isinstance(value, str | tuple | list) and "*" in shown(value):
            more = f"; patterns are given by name, targets={shown(value)}"
        raise UserError(f"{owner}: {name}={shown(value)}, expected a whole number >= 1{more}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raises UserError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{owner}: {name}={shown(value)}, expected True or False")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{owner}: {name}={shown(value)}, expected one of {', '.join(choices)}")


def check_settings(owner: str, settings: Any) -> None:
    """Raises UserError if a field of a dataclass is not of its type, not finite or too large.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Shape:
        ...     width: int = 4
        >>> check_settings("Shape", Shape(2**40))
        Traceback (most recent call last):
        adapters_jax.errors.UserError: Shape: width=1099511627776, expected a whole number >= 0 ...
    """
    types = get_type_hints(type(settings))
    problems = []
    for name in (field.name for field in fields(settings)):
        value, kind = getattr(settings, name), types[name]
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        if not any(_is_of(value, each) for each in kinds):
            expected = " or ".join(map(_described, kinds))
            problems.append(f"{name}={shown(value)}, expected {expected}")
    if problems:
        raise UserError(f"{owner}: {'; '.join(problems)}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, numbers finite and whole ones those of an axis."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(each, get_args(kind)[0]) for each in value)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real)
        low, high = (0, LARGEST - 1) if kind is int else (-LARGEST_FLOAT, LARGEST_FLOAT)
        return number and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    """A type as a message names it."""
    if get_origin(kind) is tuple:
        return f"a list, each {_described(get_args(kind)[0])}"
    names = {
        int: f"a whole number >= 0 and < {LARGEST}",
        float: "a finite number",
        bool: "True or False",
        str: "a text",
        type(None): "None",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def full_name(kind: type) -> str:
    """A class's name with its module, since other libraries have classes of the same name."""
    at = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{at}{kind.__qualname__}"


def shown(value: Any) -> str:
    """A value as a message prints it, in one line."""
    try:
        text = repr(value)
        return shortened(" ".join(text.split()) if "\n" in text else text)
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep to print"
