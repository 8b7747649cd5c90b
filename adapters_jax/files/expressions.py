"""Regular expressions of unknown origin, matched in a bounded number of steps.

Python's `re` tries one way after the other, and some expressions have more ways than a lifetime has
seconds. Here an expression is a term, and its derivative by a character is the term of what may
follow that character. Equal terms are one, so the derivatives become the states of an automaton as
names are read, and a name costs one look-up for each of its characters.

Lookaheads are intersections with what follows. References to groups, lookbehinds, flags and
possessive repeats are refused.

Reference: Brzozowski 1964, "Derivatives of Regular Expressions"; Owens, Reppy and Turon 2009,
"Regular-expression derivatives re-examined"
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from adapters_jax.errors import UserError, shortened

LONGEST = 2**14  # characters; one that names each module of a model, one by one, has about as many
_STEPS = 40  # at most, for each character and for `_MORE` further ones; most need a quarter
_MORE = 64
_WAYS = re.compile(r"[*+?{|(]")  # what an expression has that can match in several ways
_TOKEN = re.compile(
    r"\((?:\?(?:[:=!]|P<\w+>))?|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"
    r"|(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\})[?+]?|.",
    re.DOTALL,
)
_BETWEEN = {"^", "$", r"\A", r"\Z", r"\b"}  # match between characters
_REPEAT = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})([?+]?)")
_NUMBERS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Item(NamedTuple):
    """A character, a place between two, or a group, and how often it is repeated."""

    token: str
    choices: list["list[_Item]"]
    least: int = 1
    most: int | None = 1


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


def has_ways(pattern: str) -> bool:
    """Whether an expression can match a name in several ways, so that it needs an automaton.

    Example:
        >>> has_ways(r"layers\\.[0-3]\\.q_proj"), has_ways(".*q_proj")
        (False, True)
    """
    return _WAYS.search(pattern) is not None


def problem(pattern: str) -> str:
    """What is wrong with an expression, for a message; empty if `matches` supports it."""
    try:
        _compiled(pattern, "{}")
    except UserError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str, form: str) -> Callable[[str], Any]:
    whole = form.replace("{}", pattern)
    if len(whole) > LONGEST:
        raise UserError(f"{shortened(repr(pattern))} has over {LONGEST} characters")
    if re.search(r"\[[^\]]*(\[|--|&&|~~|\|\|)", pattern):  # `re` warns of these
        raise UserError(f"{shortened(repr(pattern))} has a set of characters within another")
    try:
        known = re.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{shortened(repr(pattern))} is not a regular expression: {error}"
        ) from error
    # Only our form repeats anything, so `re` has no more ways than the name has characters.
    return _Automaton(whole).matches if has_ways(pattern) else known.fullmatch


class _Automaton:
    """The terms of one expression, by number, and their derivatives as far as names asked."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.steps_left = _STEPS * (len(pattern) + _MORE)
        self.terms: list[tuple[Any, ...]] = []
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.derived: dict[tuple[int, str, int], int] = {}
        self.nothing, self.empty = self.term("or"), self.term("empty")
        self.everything = self.complement(self.nothing)
        try:
            tokens = (match[0] for match in _TOKEN.finditer(pattern))
            self.start = self.choices(self.parsed(tokens), self.empty)
        except RecursionError:
            raise self.error("its groups are too deep") from None

    def error(self, why: str) -> UserError:
        """The error about this expression."""
        return UserError(
            f"the regular expression {shortened(repr(self.pattern))} is not supported: {why}; "
            "list the names of the modules instead"
        )

    def matches(self, name: str) -> bool:
        """Whether the expression matches a whole name."""
        state, before = self.start, -1
        for char in name:
            state, before = self.derivative(state, char, before), _kind(char)
            if state == self.nothing:
                return False
        return self.is_empty(state, before, -1)

    # Reading the expression.

    def parsed(self, tokens: Iterator[str]) -> list[list[_Item]]:
        """The alternatives up to the end of a group; `re` has compiled the expression before."""
        choices: list[list[_Item]] = [[]]
        for token in tokens:
            repeat = _REPEAT.fullmatch(token)
            if token == ")":
                break
            if token == "|":
                choices.append([])
            elif repeat and not choices[-1]:
                raise self.error("it has a group of another kind than (, (?:, (?P<name>, (?=, (?!")
            elif repeat:
                sign, least, comma, most, more = repeat.groups()
                last = most if comma else least
                low, high = _NUMBERS.get(sign) or (int(least or 0), int(last) if last else None)
                if more == "+":
                    raise self.error("it has a possessive repeat")
                choices[-1][-1] = choices[-1][-1]._replace(least=low, most=high)
            elif token.startswith("("):
                choices[-1].append(_Item(token, self.parsed(tokens)))
            elif re.fullmatch(r"\\[0-9xuUNB]", token):
                raise self.error(f"it has {token}")
            else:
                choices[-1].append(_Item(token, []))
        return choices

    # Terms.

    def term(self, *parts: Any) -> int:
        """The number of a term; equal ones have the same."""
        self.steps_left -= len(parts)
        if self.steps_left < 0 and self.terms:
            raise self.error("it takes too many steps")
        number = self.numbers.setdefault(parts, len(self.terms))
        if number == len(self.terms):
            self.terms.append(parts)
        return number

    def either(self, several: Iterable[int]) -> int:
        """The term that matches what any of several terms does."""
        every: set[int] = set()
        for each in several:
            every.update(self.terms[each][1:] if self.terms[each][0] == "or" else [each])
        if self.everything in every:
            return self.everything
        return every.pop() if len(every) == 1 else self.term("or", *sorted(every))

    def then(self, first: int, last: int) -> int:
        """The term that matches one after the other."""
        if self.nothing in (first, last):
            return self.nothing
        if first == self.empty:
            return last
        return first if last == self.empty else self.term("then", first, last)

    def both(self, left: int, right: int) -> int:
        """The term that matches what two terms do."""
        if self.nothing in (left, right):
            return self.nothing
        if self.everything in (left, right) or left == right:
            return right if left == self.everything else left
        return self.term("both", *sorted((left, right)))

    def complement(self, inner: int) -> int:
        """The term that matches what another one does not."""
        kind, *parts = self.terms[inner]
        return parts[0] if kind == "not" else self.term("not", inner)

    def choices(self, several: Iterable[list[_Item]], rest: int) -> int:
        """The term of a group's alternatives and of what comes behind the group."""
        return self.either(functools.reduce(self.item, reversed(each), rest) for each in several)

    def item(self, rest: int, item: _Item) -> int:
        """The term of an item and of what comes behind it."""
        token, choices, least, most = item
        once = item._replace(least=1, most=1)
        if (least, most) != (1, 1):
            if any(_lookaheads([once])):
                raise self.error("it repeats a lookahead")
            if most is None:
                rest = self.then(self.term("star", self.item(self.empty, once)), rest)
            for _ in range((most or least) - least):
                rest = self.either([rest, self.item(rest, once)])
            for _ in range(least):
                rest = self.item(rest, once)
            return rest
        if not token.startswith("("):
            between = token in _BETWEEN
            known = token if between else re.compile(token).fullmatch
            return self.then(self.term("between" if between else "one", known), rest)
        if token not in ("(?=", "(?!"):
            return self.choices(choices, rest)
        ahead = self.choices(choices, self.everything)
        return self.both(self.complement(ahead) if token == "(?!" else ahead, rest)

    # What they match; `before` and `behind` are the kinds of the characters around.

    def derivative(self, number: int, char: str, before: int) -> int:
        """The term of what may follow a character."""
        key = number, char, before
        if key not in self.derived:
            self.derived[key] = self.either(self.derivatives(number, char, before))
        return self.derived[key]

    def derivatives(self, number: int, char: str, before: int) -> Iterator[int]:
        """The terms of what may follow a character, of which any may."""
        kind, *parts = self.terms[number]
        while kind == "then":  # a loop, since a long expression is a long chain
            first, number = parts
            yield self.then(self.derivative(first, char, before), number)
            if not self.is_empty(first, before, _kind(char)):
                return
            kind, *parts = self.terms[number]
        if kind == "one":
            yield self.empty if parts[0](char) else self.nothing
        elif kind == "star":
            yield self.then(self.derivative(parts[0], char, before), number)
        elif kind == "or":
            yield from (self.derivative(part, char, before) for part in parts)
        elif kind == "both":
            yield self.both(*(self.derivative(part, char, before) for part in parts))
        elif kind == "not":
            yield self.complement(self.derivative(parts[0], char, before))

    def is_empty(self, number: int, before: int, behind: int) -> bool:
        """Whether a term matches the empty text between two characters."""
        kind, *parts = self.terms[number]
        while kind == "then":
            if not self.is_empty(parts[0], before, behind):
                return False
            kind, *parts = self.terms[parts[1]]
        if kind == "between":
            at = {"^": before < 0, r"\A": before < 0, "$": behind < 0, r"\Z": behind < 0}
            return at.get(parts[0], (before > 0) != (behind > 0))
        if kind in ("or", "both", "not"):
            inner = (self.is_empty(part, before, behind) for part in parts)
            return any(inner) if kind == "or" else all(inner) if kind == "both" else not next(inner)
        return kind in ("empty", "star")


def _kind(char: str) -> int:
    """1 for a character of a word, 0 for others; -1 stands for none."""
    return int(char.isalnum() or char == "_")


def _lookaheads(items: Iterable[_Item]) -> Iterator[bool]:
    """Whether each of some items, and what is in it, is a lookahead."""
    for item in items:
        yield item.token in ("(?=", "(?!")
        for choice in item.choices:
            yield from _lookaheads(choice)
