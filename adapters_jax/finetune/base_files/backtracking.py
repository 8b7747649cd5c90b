"""How many ways a regular expression of a tokenizer may try at a place of a text, at most.

The package tokenizers matches by backtracking, with Oniguruma. An expression such as `(a+)+b` has
more ways than anyone waits for, and after 10 million of them Oniguruma panics. Here the expression
is read from its end: a part that may match in several lengths is tried again and again only if
something behind it can fail. The expressions of real tokenizers end in such parts, or have one of
them before something that can fail.

Reference: https://github.com/kkos/oniguruma/blob/master/doc/RE
"""

import re
from typing import Any

from adapters_jax.errors import UserError, shown

LONGEST = 2**13  # characters; that of o200k has 500
DEEPEST = 32  # groups in groups
MOST_WAYS = 1024  # by choices between a few
_WIDE = 16  # repeated more often counts as without end
_TOKEN = re.compile(
    r"\((?:\?(?:[im]*(?:-[im]+)?:|<?[=!]|>))?"
    r"|\\(?:[pP]\{\^?\w+\}|x\{[0-9a-fA-F]+\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^\W\d_]|[^\w])"
    r"|[*+?][?+]?|\{(?:[0-9]{1,6},?[0-9]{0,6}|,[0-9]{1,6})\}\??|[^\\(]",
    re.DOTALL,
)
_REPEAT = re.compile(r"([*+?])[?+]?|\{(\d*)(,?)(\d*)\}(\??)")
_ESCAPES = frozenset("dDsSwWhHnrtvfaebBAzZG")  # of letters; others refer to groups or repeat
_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_BETWEEN = frozenset((*_AROUND, "^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z", r"\G"))
_SIMPLE = {"*": (0, _WIDE), "+": (1, _WIDE), "?": (0, 1)}
# The ways of a part: how many parts without end are tried again, and the choices between a few.
_Ways = tuple[int, int]
# A part: the alternatives of a group or None, what opens it or all of it, how often at least and at
# most. One that gives nothing back, as `a++`, is read as one that does: it takes the same steps if
# what stands before it is tried again.
_Part = tuple[list[list[Any]] | None, str, int, int]


def check_expression(pattern: str, may_be_empty: bool = True) -> None:
    """Raises UserError for an expression that may try more than a few ways for each character.

    Args:
        pattern: the expression, in Oniguruma's syntax.
        may_be_empty: whether it may match between two characters, without any of them.

    Example:
        >>> check_expression(r" ?\\p{L}+|\\p{N}{1,3}|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
        >>> check_expression("(a+)+b")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: the regular expression '(a+)+b' repeats what is repeated ...
    """
    subject = f"the regular expression {shown(pattern, 80)}"
    if len(pattern) > LONGEST:
        raise UserError(f"{subject} has {len(pattern)} characters, expected at most {LONGEST}")
    try:
        parsed = _parsed(pattern)
        endless, choices = _ways(parsed, False)
    except UserError as error:
        raise UserError(f"{subject} {error}") from error
    if endless > 1 or choices > MOST_WAYS:
        raise UserError(f"{subject} can match in too many ways; write fewer *, + and ? in a row")
    if not may_be_empty and _can_be_empty(parsed):
        raise UserError(f"{subject} can match nothing, and would be replaced everywhere")


def _ways(alternatives: list[list[_Part]], can_fail: bool) -> _Ways:
    """The ways of alternatives, where what follows can fail or not."""
    found = [_of_sequence(parts, can_fail) for parts in alternatives]
    most = max(choices for _, choices in found)
    return max(endless for endless, _ in found), most * (len(found) if can_fail else 1)


def _of_sequence(parts: list[_Part], can_fail: bool) -> _Ways:
    endless, choices = 0, 1
    for inner, opening, least, most in reversed(parts):
        if inner is not None:
            # A turn that fails ends a loop, unless there must be more turns: then, or if something
            # behind the loop fails, those before it are tried again.
            if most > 1 and (can_fail or least > 1) and not _is_fixed(inner):
                raise UserError("repeats what is repeated or chosen already")
            more, times = _ways(inner, can_fail or opening in _AROUND)
            endless, choices = endless + more, choices * times
        if can_fail and most >= _WIDE:
            endless += 1
        elif can_fail:
            choices *= most - least + 1
        can_fail = can_fail or least > 0
    return endless, choices


def _can_be_empty(alternatives: list[list[_Part]]) -> bool:
    return any(
        all(
            least == 0 or opening in _BETWEEN or (inner is not None and _can_be_empty(inner))
            for inner, opening, least, _ in parts
        )
        for parts in alternatives
    )


def _is_fixed(alternatives: list[list[_Part]]) -> bool:
    """Whether a group has one alternative, and every part in it matches equally often."""
    (first, *others) = alternatives
    return not others and all(
        least == most and (inner is None or _is_fixed(inner)) for inner, _, least, most in first
    )


def _parsed(pattern: str) -> list[list[_Part]]:
    """The alternatives of an expression; raises UserError for what is not known here."""
    stack: list[tuple[str, list[list[_Part]]]] = [("", [[]])]
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "[":
            place = _end_of_set(pattern, place)
            stack[-1][1][-1].append((None, "", 1, 1))
            continue
        found = _TOKEN.match(pattern, place)
        token = found[0] if found else pattern[place : place + 3]
        if found is None or (token[0] == "\\" and len(token) == 2 and not _is_known(token[1])):
            raise UserError(f"has {token!r}, which is not supported in a tokenizer")
        if token == "(" and pattern[place + 1 : place + 2] in ("?", "*"):
            raise UserError(f"has {pattern[place : place + 4]!r}, which is not supported")
        place += len(token)
        if len(stack) > DEEPEST:
            raise UserError(f"has groups over {DEEPEST} deep")
        if token[0] == "(":
            stack.append((token, [[]]))
        elif token == ")" and len(stack) > 1:
            opening, alternatives = stack.pop()
            stack[-1][1][-1].append((alternatives, opening, 1, 1))
        elif token == "|":
            stack[-1][1].append([])
        elif repeat := _REPEAT.fullmatch(token):
            _repeat(stack[-1][1][-1], repeat)
        else:
            stack[-1][1][-1].append((None, token, 1, 1))
    if len(stack) > 1:
        raise UserError("has a ( without its )")
    return stack[0][1]


def _is_known(letter: str) -> bool:
    return letter in _ESCAPES or not letter.isalnum()


def _repeat(parts: list[_Part], repeat: re.Match[str]) -> None:
    if not parts:
        raise UserError("repeats nothing")
    inner, opening, *before = parts.pop()
    if repeat[1]:
        least, most = _SIMPLE[repeat[1]]
    else:
        low, high = repeat[2], repeat[4] if repeat[3] else repeat[2]
        least, most = int(low or 0), int(high or _WIDE)
        if repeat[4] and least > most:  # Oniguruma swaps some of these
            raise UserError(f"has {repeat[0]!r}, whose numbers are not in order")
        least *= bool(repeat[3] or not repeat[5])  # `a{2}?` is `(?:a{2})?` there
    if before != [1, 1]:  # a repeated part is repeated again, as Oniguruma reads `a{2}+`
        inner, opening = [[(inner, opening, *before)]], "(?:"
    parts.append((inner, opening, least, min(max(most, least), _WIDE)))


def _end_of_set(pattern: str, place: int) -> int:
    """The place behind a set of characters, which may have sets within."""
    depth = 0
    while place < len(pattern):
        char = pattern[place]
        if pattern[place : place + 2] in (r"\c", r"\C", r"\M"):  # which may take a [ or a ]
            raise UserError(f"has {pattern[place : place + 4]!r} in a set, which is not supported")
        place += 2 if char == "\\" else 1
        depth += (char == "[") - (char == "]")
        if depth == 0:
            return place
    raise UserError("has a [ without its ]")
