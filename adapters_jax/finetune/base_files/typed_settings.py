"""Settings that come out of files of others, checked by the types of a dataclass's fields."""

from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from adapters_jax.errors import LARGEST, LARGEST_FLOAT, UserError, shown


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
