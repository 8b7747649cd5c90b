"""Checks of the values in files of unknown origin: a table of rules, one for each field."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from adapters_jax.errors import UserError, shown
from adapters_jax.files.expressions import LONGEST, has_ways, problem


@contextlib.contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Keeps the problem that is raised, so that one message has all problems of a file.

    Example:
        >>> problems = []
        >>> for name in ("a", "b"):
        ...     with collecting(problems):
        ...         raise UserError(name)
        >>> problems
        ['a', 'b']
    """
    try:
        yield
    except UserError as problem:
        problems.append(str(problem))


# A rule lists what is wrong with a value, as what was expected instead.
Rule = Callable[[Any], list[str]]


def rule(fits: Callable[[Any], bool], expected: str) -> Rule:
    """A rule that a test makes; `expected` says what passes it."""
    return lambda found: [] if fits(found) else [f"expected {expected}"]


def anything(found: Any) -> list[str]:
    """The rule that every value follows."""
    return []


def one_of(*allowed: Any, advice: str = "") -> Rule:
    """One of some values."""
    values = " or ".join(map(repr, allowed))

    def check(found: Any) -> list[str]:
        # 1 equals True, but says something else in JSON.
        kind = isinstance(found, bool)
        good = any(found == each and isinstance(each, bool) == kind for each in allowed)
        return [] if good else [f"expected {values}{advice}"]

    return check


def of(*types: type) -> Rule:
    """A value of one of some types; an int is no bool."""
    names = " or ".join(each.__name__ for each in types)
    return rule(lambda found: isinstance(found, types), names)


def whole(least: float = 0, below: float = math.inf) -> Rule:
    """A whole number from `least` on and below a limit."""
    return rule(lambda n: type(n) is int and least <= n < below, "a whole number")


def wholes(lengths: Collection[int], below: float) -> Rule:
    """A list of one of some lengths, of whole numbers from 0 on and below a limit."""
    return rule(
        lambda found: (
            isinstance(found, list)
            and len(found) in lengths
            and all(type(n) is int and 0 <= n < below for n in found)
        ),
        f"{max(lengths)} whole numbers or fewer",
    )


def is_number(found: Any) -> bool:
    """Whether a value is a number, and not a truth value."""
    return isinstance(found, int | float) and not isinstance(found, bool)


MOST_PATTERNS = 64  # of a mapping, beside plain names


def patterns(*types: type) -> Rule:
    """Regular expressions: a text, or the keys of a mapping to numbers; lists are plain names."""
    of_type = of(*types)

    def check(found: Any) -> list[str]:
        if wrong := of_type(found):
            return wrong
        if isinstance(found, dict) and not all(isinstance(n, int | float) for n in found.values()):
            return ["expected a number for each pattern"]
        several = [found] if isinstance(found, str) else found if isinstance(found, dict) else ()
        slow = [pattern for pattern in several if has_ways(pattern)]
        if len(slow) > MOST_PATTERNS or sum(map(len, slow)) > LONGEST:
            return [
                f"expected at most {MOST_PATTERNS} regular expressions of {LONGEST} characters "
                f"together, besides plain names, and these are {len(slow)}"
            ]
        return [f"but {why}" for why in map(problem, several) if why]

    return check


def plain_names(*types: type) -> Rule:
    """Plain names of modules, without signs that match several texts."""
    of_type = of(*types)

    def check(found: Any) -> list[str]:
        wrong, names = of_type(found), [found] if isinstance(found, str) else found
        if wrong or all(isinstance(name, str) and not has_ways(name) for name in names):
            return wrong
        return ["expected names of modules"]

    return check


def field_problems(
    config: Mapping[str, Any], rules: Mapping[str, Rule], idle: Collection[str]
) -> list[str]:
    """Lists the unsupported settings, each as `field=value` with the reason.

    Idle fields have no effect. All others without a rule must be null, false or empty.

    Example:
        >>> field_problems({"r": "4", "new": None, "other": 1}, {"r": of(int)}, ())
        ["r='4', expected int", 'other=1 is not supported']
    """
    given = {k: x for k, x in config.items() if k not in idle and x is not None}
    return value_problems(given, rules) + [
        f"{field}={shown(found)} is not supported"
        for field, found in given.items()
        if field not in rules and found is not False and found not in ({}, [], "")
    ]


def value_problems(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Lists the values that break a rule, each as `field=value` with the reason."""
    return [
        f"{field}={shown(found)}, {reason}"
        for field, found in values.items()
        for reason in (rules[field](found) if field in rules else ())
    ]


def object_problems(
    values: Mapping[str, Any], rules: Mapping[str, Rule], needed: Iterable[str]
) -> list[str]:
    """Lists the first keys without a rule, the needed keys that lack, and values that break a rule.

    Example:
        >>> object_problems({"r": -1, "s": 1}, {"r": whole(), "t": whole()}, ("r", "t"))
        ["unknown key 's'", "'t' is missing", 'r=-1, expected a whole number']
    """
    unknown = [f"unknown key {shown(key, 80)}" for key in values if key not in rules][:5]
    lacking = [f"{key!r} is missing" for key in needed if key not in values]
    return unknown + lacking + value_problems(values, rules)
