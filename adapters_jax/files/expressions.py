"""Regular expressions of unknown origin, matched in a bounded number of steps.

Python's `re` tries one way after the other, and some expressions have more ways than a lifetime has
seconds. Here an expression is a term, and its derivative by a character is the term of what may
follow that character. Equal terms are one, so the derivatives become the states of an automaton as
names are read, and a name costs one look-up for each of its characters. Lookaheads are
intersections with what follows them.

Reference: Brzozowski 1964, "Derivatives of Regular Expressions"; Owens, Reppy and Turon 2009,
"Regular-expression derivatives re-examined"
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from adapters_jax.errors import UserError, shortened

LONGEST = 2**14  # characters; one that names each module of a model, one by one, has about as many
_STEPS = 40  # at most, for each character and for `_MORE` further ones; most need a quarter
_MORE = 64
_WAYS = re.compile(r"[*+?{|(]")  # what an expression has that can match in several ways
_SETS = re.compile(r"\[[^\]]*(\[|--|&&|~~|\|\|)")  # `re` warns of sets in sets
_TOKEN = re.compile(
    r"\((?:\?(?:[:=!]|P<\w+>))?|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\})[?+]?|.",
    re.DOTALL,
)
_REPEAT = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})([?+]?)")
_NUMBERS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_BETWEEN = {"^", "$", r"\A", r"\Z", r"\b"}  # match between characters
_AHEAD = ("(?=", "(?!")
# A token, the alternatives of a group, and how often they are repeated, at least and at most.
_Item = tuple[str, list[list[Any]], int, int | None]


def has_ways(pattern: str) -> bool:
    """Whether an expression can match a name in several ways, so that it needs an automaton.

    Example:
        >>> has_ways(r"layers\\.[0-3]\\.q_proj"), has_ways(".*q_proj")
        (False, True)
    """
    return _WAYS.search(pattern) is not None


def matches(pattern: str, name: str, form: str = "{}") -> bool:
    """Whether an expression, put into a form of ours, matches a whole name.

    Raises:
        UserError: it is not an expression, not one of those supported, or takes too many steps.

    Example:
        >>> matches(r"(?!.*visual).*\\.(q|v)_proj", "model.layers.0.v_proj")
        True
        >>> matches("q", "model.q", r"(.*\\.)?({})$"), matches("(([a-z]|[a-z_])+)+!", "q_proj" * 20)
        (True, False)
    """
    return bool(_compiled(pattern, form)(name))


def problem(pattern: str) -> str:
    """What is wrong with an expression, for a message; empty if `matches` supports it."""
    try:
        _compiled(pattern, "{}")
    except UserError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str, form: str) -> Callable[[str], Any]:
    whole, shown = form.replace("{}", pattern), shortened(repr(pattern))
    if len(whole) > LONGEST or _SETS.search(pattern):
        raise UserError(f"{shown} has over {LONGEST} characters, or a set of them within another")
    try:
        known = re.compile(whole)
        # Only our form repeats anything, so `re` has no more ways than the name has characters.
        return _Automaton(whole).matches if has_ways(pattern) else known.fullmatch
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{shown} has groups that are too deep") from error
    except (re.error, OverflowError, ValueError) as error:  # numbers of any length are among them
        raise UserError(f"{shown} is not a regular expression: {error}") from error


class _Automaton:
    """The terms of one expression, by number, and their derivatives as far as names asked."""

    def __init__(self, pattern: str):
        self.pattern, self.steps_left = pattern, _STEPS * (len(pattern) + _MORE)
        self.terms: list[tuple[Any, ...]] = []
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.derived: dict[tuple[int, str, int], int] = {}
        self.nothing, self.empty = self.term("or"), self.term("empty")
        self.everything = self.term("not", self.nothing)
        tokens = (match[0] for match in _TOKEN.finditer(pattern))
        self.start = self.group(self.parsed(tokens), self.empty)

    def matches(self, name: str) -> bool:
        """Whether the expression matches a whole name."""
        state, before = self.start, -1
        for char in name:
            state, before = self.derivative(state, char, before), _kind(char)
            if state == self.nothing:
                return False
        return self.is_empty(state, before, -1)

    def error(self, why: str) -> UserError:
        """The error about this expression."""
        return UserError(
            f"the regular expression {shortened(repr(self.pattern))} is not supported: {why}; "
            "list the names of the modules instead"
        )

    def parsed(self, tokens: Iterator[str]) -> list[list[_Item]]:
        """The alternatives up to the end of a group; `re` has compiled the expression before."""
        choices: list[list[_Item]] = [[]]
        for token in tokens:
            repeat, items = _REPEAT.fullmatch(token), choices[-1]
            if token == ")":
                break
            if token == "|":
                choices.append([])
            elif repeat and not items:  # of a group that begins with (?
                raise self.error("it has a group of another kind than (, (?:, (?P<name>, (?=, (?!")
            elif repeat:
                sign, least, comma, most, more = repeat.groups()
                last = most if comma else least
                low, high = _NUMBERS.get(sign) or (int(least or 0), int(last) if last else None)
                if more == "+" or any(map(_looks_ahead, items[-1:])):
                    raise self.error("it has a possessive repeat or repeats a lookahead")
                items[-1] = (*items[-1][:2], low, high)
            elif re.fullmatch(r"\\[0-9xuUNB]", token):
                raise self.error(f"it has {token}")
            else:
                items.append((token, self.parsed(tokens) if token[0] == "(" else [], 1, 1))
        return choices

    # Terms: each method returns the number of one.

    def term(self, *parts: Any) -> int:
        """The term of these parts; equal ones have the same number."""
        self.steps_left -= len(parts)
        if self.steps_left < 0:
            raise self.error("it takes too many steps")
        number = self.numbers.setdefault(parts, len(self.terms))
        if number == len(self.terms):
            self.terms.append(parts)
        return number

    def either(self, several: Iterable[int]) -> int:
        """What any of several terms matches."""
        every: set[int] = set()
        for each in several:
            every.update(self.terms[each][1:] if self.terms[each][0] == "or" else [each])
        if self.everything in every:
            return self.everything
        return every.pop() if len(every) == 1 else self.term("or", *sorted(every))

    def then(self, first: int, last: int) -> int:
        """What one term matches, and another one behind it."""
        if self.nothing in (first, last):
            return self.nothing
        if self.empty in (first, last):
            return first + last - self.empty
        return self.term("then", first, last)

    def both(self, left: int, right: int) -> int:
        """What two terms match."""
        if self.nothing in (left, right):
            return self.nothing
        if self.everything in (left, right):
            return left + right - self.everything
        return self.term("both", *sorted((left, right)))

    def group(self, choices: Iterable[list[_Item]], rest: int) -> int:
        """The alternatives of a group, and what comes behind it."""
        return self.either(functools.reduce(self.item, reversed(each), rest) for each in choices)

    def item(self, rest: int, item: _Item) -> int:
        """An item, and what comes behind it."""
        token, choices, least, most = item
        if (least, most) != (1, 1):
            once: _Item = (token, choices, 1, 1)
            if most is None:
                rest = self.then(self.term("star", self.item(self.empty, once)), rest)
            for _ in range((most or least) - least):
                rest = self.either([rest, self.item(rest, once)])
            for _ in range(least):
                rest = self.item(rest, once)
            return rest
        if token in _AHEAD:
            ahead = self.group(choices, self.everything)
            return self.both(self.term("not", ahead) if token == "(?!" else ahead, rest)
        if token[0] == "(":
            return self.group(choices, rest)
        known = ("between", token) if token in _BETWEEN else ("one", re.compile(token).fullmatch)
        return self.then(self.term(*known), rest)

    # Whether they match; `before` and `behind` are the kinds of the characters around.

    def derivative(self, number: int, char: str, before: int) -> int:
        """What may follow a character."""
        key = number, char, before
        if key not in self.derived:
            self.derived[key] = self.either(self.derivatives(number, char, before))
        return self.derived[key]

    def derivatives(self, number: int, char: str, before: int) -> Iterator[int]:
        """What may follow a character, as several terms."""
        kind, *parts = self.terms[number]
        while kind == "then":  # a loop, since a long expression is a long chain
            first, number = parts
            yield self.then(self.derivative(first, char, before), number)
            if not self.is_empty(first, before, _kind(char)):
                return
            kind, *parts = self.terms[number]
        if kind == "one":
            yield self.empty if parts[0](char) else self.nothing
        elif kind in ("or", "both", "not", "star"):
            several = [self.derivative(part, char, before) for part in parts]
            if kind == "star":
                several = [self.then(several[0], number)]
            elif kind == "both":
                several = [self.both(*several)]
            elif kind == "not":
                several = [self.term("not", several[0])]
            yield from several

    def is_empty(self, number: int, before: int, behind: int) -> bool:
        """Whether a term matches the empty text between two characters."""
        kind, *parts = self.terms[number]
        while kind == "then":
            if not self.is_empty(parts[0], before, behind):
                return False
            kind, *parts = self.terms[parts[1]]
        if kind == "between":
            if parts[0] == r"\b":
                return (before > 0) != (behind > 0)
            return (before if parts[0] in ("^", r"\A") else behind) < 0
        inner = (self.is_empty(part, before, behind) for part in parts if kind != "one")
        if kind in ("or", "not"):
            return any(inner) == (kind == "or")
        return kind in ("empty", "star") or (kind == "both" and all(inner))


def _kind(char: str) -> int:
    """1 for a character of a word, 0 for others; -1 stands for none."""
    return int(char.isalnum() or char == "_")


def _looks_ahead(item: _Item) -> bool:
    """Whether an item is a lookahead, or a group with one."""
    return item[0] in _AHEAD or any(_looks_ahead(each) for choice in item[1] for each in choice)
