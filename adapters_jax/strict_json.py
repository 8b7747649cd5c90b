"""Parses JSON of unknown origin: bounded in depth, without duplicate keys, its numbers finite."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from adapters_jax.errors import UserError, shortened

DEEPEST = 32  # nested lists and objects
MOST_DIGITS = 40  # of an integer; transformers writes 10**30 for "no limit"
_TOKEN = re.compile(r'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def loads(text: str) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is not JSON; or, as a UserError, it is nested more than 32 deep, or has a
            duplicate key, a number that is not finite or an integer of over 40 digits; or it has
            half a character.

    Example:
        >>> loads('{"r": 4, "r": 8}')
        Traceback (most recent call last):
        adapters_jax.errors.UserError: duplicate key 'r'
    """
    _check_depth(text)
    values = json.loads(
        text,
        object_pairs_hook=_object,
        parse_int=_int,
        parse_float=_float,
        parse_constant=_no_number,
    )
    if "\\u" in text:  # a lone surrogate is valid JSON, but not text
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    return values


def check_nesting(value: Any) -> None:
    """Raises UserError if lists and mappings are nested more than 32 deep, as `loads` does."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [x for x in level if isinstance(x, Mapping | list | tuple)]
        level = [y for x in inner for y in (x.values() if isinstance(x, Mapping) else x)]
        if not inner:
            return
    raise UserError(f"it is nested more than {DEEPEST} deep")


def _check_depth(text: str) -> None:
    """Raises UserError if lists and objects are nested too deep; brackets in texts do not count."""
    if text.count("[") + text.count("{") <= DEEPEST:  # as in most rows of data
        return
    depth = 0
    for found in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > DEEPEST:
            raise UserError(f"its JSON is nested more than {DEEPEST} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return values


def _int(text: str) -> int:
    return int(text) if len(text) <= MOST_DIGITS else _no_number(text)


def _float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> Any:
    raise UserError(f"{shortened(text, 30)} is not a finite number of at most {MOST_DIGITS} digits")
