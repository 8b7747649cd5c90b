"""Fields of methods that say their own bounds; `Method` checks them when one is made."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from typing import Any

from adapters_jax.errors import UserError, check_choice, check_flag, check_number, check_size, shown
from adapters_jax.targets import as_patterns


def _field(default: Any, check: Callable[[str, str, Any], None]) -> Any:
    """A field that `check(owner, name, value)` checks; None passes where it is the default."""

    def checked(owner: str, name: str, value: Any) -> None:
        if value is not None or default is not None:
            check(owner, name, value)

    return field(default=default, metadata={"check": checked})


def check_name(owner: str, name: str, value: Any) -> None:
    """Raises UserError unless a value is the name of an adapter; "" is none."""
    if not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{0,64}", value)):
        raise UserError(
            f"{owner}: {name}={shown(value)}, expected at most 64 letters, digits and underscores, "
            "such as 'reviews'"
        )


def size(default: int | None, low: int = 1) -> Any:
    """A field for the size of an axis, or for a whole number from `low` on."""
    return _field(default, partial(check_size, low=low))


def number(default: float | None, **bounds: Any) -> Any:
    """A field for a number that float32 holds, above 0 or within the bounds of `check_number`."""
    return _field(default, partial(check_number, **bounds))


def choice(default: str, choices: Iterable[str]) -> Any:
    """A field for one of several names."""
    return _field(default, partial(check_choice, choices=choices))


def flag(default: bool) -> Any:
    """A field for True or False."""
    return _field(default, check_flag)


def settings_of(method: Any, without: Sequence[str] = ()) -> list[str]:
    """The fields of a method that do not have their default, as `name=value`."""
    return [
        f"{x.name}={getattr(method, x.name)!r}"
        for x in fields(method)
        if x.name not in without and (x.default is MISSING or getattr(method, x.name) != x.default)
    ]


def check_fields(method: Any) -> None:
    """Checks the fields of a method, turns those of patterns into tuples, `output` into a path.

    Raises:
        UserError: a value is out of its range; a TargetError where patterns are none.
    """
    owner = type(method).__name__
    checks = {x.name: x.metadata["check"] for x in fields(method) if "check" in x.metadata}
    for name, check in checks.items():
        check(owner, name, getattr(method, name))
    for name, usual in method.pattern_fields.items():
        pairs = _pairs(owner, name, getattr(method, name))
        for _, value in pairs if usual in checks else ():
            checks[usual](owner, usual, value)
        object.__setattr__(method, name, pairs)
    for name in method.subset_fields:
        patterns = getattr(method, name)
        patterns = patterns if patterns == () else as_patterns(patterns, f"{owner} {name}")
        # Methods are frozen, since jit hashes them; only so can `__post_init__` set a field.
        object.__setattr__(method, name, patterns)
    if "output" in {x.name for x in fields(method)}:
        object.__setattr__(method, "output", _path(owner, method.output))


def _path(owner: str, output: Any) -> str | None:
    """An `output` as a path of names and positions; None stays None.

    Raises:
        UserError: it is neither a name, a path nor a position.
    """
    if isinstance(output, str) and output:
        return output
    if isinstance(output, int) and not isinstance(output, bool) and output >= 0:
        return str(output)
    if output is not None:
        raise UserError(
            f"{owner}: output={output!r}, expected None, a position such as 1, a name such as "
            "'hidden_states', or a path of them such as '0/hidden_states'"
        )
    return None


def _pairs(owner: str, name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping from patterns, or its items, as checked pairs."""
    items = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, tuple | list) or not all(map(_is_pair, items)):
        raise UserError(
            f"{owner}: {name}={shown(value)}, expected a mapping such as {{'layer_0/**': 4}}"
        )
    for pattern, _ in items:
        as_patterns(pattern, f"{owner} {name}")
    return tuple((pattern, each) for pattern, each in items)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)
