"""The pattern language: which paths of a model a pattern matches.

A path is the names from the root of a model to a module or parameter, joined by slashes
(`layer_0/attention/query`). A pattern is a path with wildcards:

* `*` matches any characters within one name,
* `**` matches any number of whole names, also none,
* `{a,b}` matches either of its parts. Each part must match something, as a whole pattern must, so
  that no misspelt part is left out in silence,
* `{a|b}` matches either of its parts too, and one of them is enough: whichever the model has. In
  `{query,value|v_proj}`, query must match something, and so must value or v_proj.

Among several patterns, one that begins with `!` excludes paths that the others match. It must match
something in the model, if not what the others match: `!head` may stand where no head is adapted.

The same patterns serve linen and NNX, modules and parameters, single and stacked layers.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapters_jax.errors import TargetError, first_few, shortened

MOST = 65_536  # characters that one pattern may expand to
_DETAILED = 12  # failing patterns that a message explains
_ANY_NAMES, _END = "(?:/[^/]+)*", r"(?=/|\Z)"


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> Callable[[str], Any]:
    """A function that tells whether a pattern matches a path, which it takes with a slash in front.

    Matching never backtracks far: the text between two wildcards is fixed at its first match by an
    atomic group, `(?>...)`, since whatever can follow a later match can follow the first one too.
    """
    if _is_plain(pattern):
        return f"/{pattern}".__eq__
    return re.compile("|".join(map(_regex, _expanded(pattern)[0]))).fullmatch


def _is_plain(pattern: str) -> bool:
    """Whether a pattern is a path, as most are in large recipes, one for each layer."""
    return not re.search(r"[*{}]", pattern)


@functools.lru_cache(maxsize=1024)
def _any_of(patterns: tuple[str, ...]) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Two functions that tell whether a path is matched by any pattern, and by any that excludes.

    All plain paths are compared at once, so that a recipe may have as many as a model has layers.
    """

    def any_of(several: Sequence[str]) -> Callable[[str], bool]:
        plain = frozenset(filter(_is_plain, several))
        others = [_compile(p) for p in several if p not in plain]
        return lambda path: (
            path in plain or any(match(f"/{path}" if path else "") for match in others)
        )

    return any_of([p for p in patterns if p[0] != "!"]), any_of(
        [p[1:] for p in patterns if p[0] == "!"]
    )


def _regex(form: str) -> str:
    """The regular expression of a pattern without braces.

    Example:
        >>> _regex("a/**/b*")
        '/a(?:/[^/]+)*/b[^/]*'
    """
    first, *others = map(_names, re.split(r"/\*\*(?=/|$)", f"/{form}"))
    fixed = (f"(?>(?:/[^/]+)*?{part}{_END})" for part in others[:-1])
    return "".join([first, *fixed, *(_ANY_NAMES + part for part in others[-1:])])


def _names(part: str) -> str:
    """The regular expression of a part without `**`."""
    first, *others = map(re.escape, re.split(r"\*+", part))
    fixed = (f"(?>[^/]*?{text})" for text in others[:-1])
    return "".join([first, *fixed, *(f"[^/]*{text}" for text in others[-1:])])


def _expanded(pattern: str) -> tuple[list[str], int]:
    """The patterns without braces that a pattern expands to, innermost braces first.

    Also their length, the characters of every step. Raises TargetError for an unbalanced brace and
    for more than `MOST` characters.
    """
    # A recipe may come from a file of others: `{a,b}` twenty times in a row would be a million
    # patterns.
    forms, made = [pattern], len(pattern)
    while "{" in forms[0] or "}" in forms[0]:
        wider = []
        for form in forms:
            brace = re.search(r"\{([^{}]*)\}", form)
            if brace is None:
                raise TargetError(
                    f"target {shortened(repr(pattern))} has an unbalanced brace; write {{a,b}}"
                )
            before, after = form[: brace.start()], form[brace.end() :]
            for option in re.split("[,|]", brace[1]):
                wider.append(before + option.strip() + after)
                made += len(wider[-1]) + 1
                if made > MOST:
                    raise TargetError(
                        f"target {shortened(repr(pattern))} expands to too many patterns, "
                        f"of over {MOST} characters; write * or ** instead of some of its braces"
                    )
        forms = wider
    return forms, made


def join(*names: str) -> str:
    """Parts of a path joined by slashes, without empty parts such as the path of a whole model."""
    return "/".join(filter(None, names))


def around(path: str) -> list[str]:
    """The paths of what is around a path, the nearest first, without that of the whole model.

    Example:
        >>> around("layer_0/attention/query")
        ['layer_0/attention', 'layer_0']
    """
    names = path.split("/")
    return ["/".join(names[:i]) for i in range(len(names) - 1, 0, -1)]


def weight(*patterns: str) -> int:
    """How many characters the braces of patterns expand to: what compiling them costs.

    Raises:
        TargetError: there are more than `MOST` of one, or a brace is unbalanced.

    Example:
        >>> weight("{a,b}_{0,1}", "a_0")
        43
    """
    return sum(_expanded(pattern)[1] for pattern in patterns if not _is_plain(pattern))


def either(pattern: str) -> str:
    """A pattern that matches the same paths, and needs no more than one part of each brace.

    Example:
        >>> either("**/{query,value}/bias")
        '**/{query|value}/bias'
    """
    for start, end in _braces(pattern):
        pattern = pattern[:start] + pattern[start:end].replace(",", "|") + pattern[end:]
    return pattern


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path.

    Args:
        pattern: a pattern of the language above.
        path: names joined by slashes; the root of a model is the empty path.

    Example:
        >>> matches("**/attention/{query,value}", "layer_0/attention/query")
        True
        >>> matches("*/query", "layer_0/attention/query")
        False
    """
    return bool(_compile(pattern)(f"/{path}" if path else ""))


def matches_any(pattern: str, paths: Collection[str]) -> bool:
    """Whether a pattern matches one of several paths.

    Example:
        >>> matches_any("*/query", ["layer_0/key", "layer_0/query"])
        True
    """
    return pattern in paths if _is_plain(pattern) else any(matches(pattern, p) for p in paths)


def selects(patterns: Sequence[str], *paths: str) -> bool:
    """Whether several patterns together match something that has one path, or several.

    Example:
        >>> patterns = ("**/query", "!layer_0/**")
        >>> selects(patterns, "layer_1/query"), selects(patterns, "layer_0/query")
        (True, False)
    """
    wanted, excluded = _any_of(tuple(patterns))
    return any(map(wanted, paths)) and not any(map(excluded, paths))


def as_patterns(targets: str | Iterable[str], owner: str) -> tuple[str, ...]:
    """Targets as a tuple of patterns; raises TargetError where they are not patterns."""
    several = isinstance(targets, Iterable) and not isinstance(targets, str)
    patterns: tuple[Any, ...] = tuple(targets) if several else (targets,)
    texts = bool(patterns) and all(isinstance(p, str) and p.removeprefix("!") for p in patterns)
    if not texts or all(p.startswith("!") for p in patterns):
        raise TargetError(
            f"{owner}: targets={targets!r}, expected one or more patterns such as '**/query'"
        )
    for pattern in patterns:
        _compile(pattern.removeprefix("!"))
    return patterns


def require_match(
    owner: str,
    patterns: Sequence[str],
    usable: Iterable[str],
    unusable: Mapping[str, str | None] | None = None,
) -> None:
    """Checks that every pattern, and every part of its braces, matches at least one usable path.

    A pattern that excludes must match some path, usable or not.

    Args:
        owner: the method that the patterns belong to, for the message.
        usable: paths that the method can attach to.
        unusable: the model's other paths, each with the reason; None where there is nothing that
            the method could adapt.

    Raises:
        TargetError: names the patterns and parts that fail, each with the paths nearest to it.

    Example:
        >>> require_match("LoRA", ("**/{query|q_proj}",), ["layer_0/query", "layer_0/up"])
        >>> require_match("LoRA", ("**/{query,dwn}",), ["layer_0/query", "layer_0/down"])
        Traceback (most recent call last):
        adapters_jax.errors.TargetError: LoRA: 'dwn' of target '**/{query,dwn}' matches nothing. ...
    """
    problems = failures(owner, patterns, usable, unusable)
    if problems:
        raise TargetError("\n".join(problems))


def failures(
    owner: str,
    patterns: Sequence[str],
    usable: Iterable[str],
    unusable: Mapping[str, str | None] | None = None,
    *,
    parts: bool = True,
) -> list[str]:
    """The lines of the message of `require_match`; without `parts`, only of whole patterns."""
    every = _failures(owner, patterns, list(usable), unusable or {}, parts)
    problems = list(itertools.islice(every, _DETAILED + 1))
    if len(problems) > _DETAILED:  # finding the nearest paths of all of them would be slow
        problems[-1] = f"{owner}: other targets fail as well"
    return problems


def _failures(
    owner: str,
    patterns: Sequence[str],
    usable: Sequence[str],
    unusable: Mapping[str, str | None],
    parts: bool,
) -> Iterator[str]:
    """A line of the message for each pattern, and each part of a brace, that fails."""
    for pattern in patterns:
        excludes = pattern.startswith("!")
        paths = [*usable, *unusable] if excludes else usable
        for part, narrowed in _unmatched(pattern.removeprefix("!"), paths, parts):
            what = f"target {pattern!r}" if part is None else f"{part!r} of target {pattern!r}"
            why = _problem(narrowed, paths, {} if excludes else unusable, "!" * excludes)
            yield f"{owner}: {what} {why}"
    matched = list(filter(_any_of(tuple(patterns))[0], usable))
    if matched and not any(selects(patterns, path) for path in matched):
        excluding = shortened(", ".join(repr(p) for p in patterns if p[0] == "!"))
        yield f"{owner}: {excluding} excludes everything of {_some(matched)}"


def is_expression(pattern: str) -> bool:
    """Whether a pattern has the signs of a regular expression."""
    return bool(re.search(r"\.[*+]|[()\[\]\\^$]", pattern))


def _problem(
    pattern: str, usable: Sequence[str], unusable: Mapping[str, str | None], sign: str
) -> str:
    """Why a pattern fails, as the end of a sentence; `sign` is what is written before it."""
    blocked: dict[str | None, list[str]] = {}
    for path, why in unusable.items():
        if matches(pattern, path):
            blocked.setdefault(why, []).append(path)
    inside = f"{pattern}/**"
    below = [path for path in usable if matches(inside, path)]
    if blocked:
        groups = [
            f"{_some(paths, 3)} ({why or 'it holds nothing itself to adapt'})"
            for why, paths in blocked.items()
        ]
        hint = f"; {sign + inside!r} matches what is in it, such as {below[0]}" if below else ""
        return f"matches only paths it cannot attach to: {_some(groups, 3)}" + (
            hint if [*blocked] == [None] else ""
        )
    deeper = [path for path in usable if any(matches(pattern, end) for end in _ends(path))]
    if deeper:
        return f"matches nothing, but '{sign}**/{pattern}' matches {_some(deeper, 2)}"
    near = below or nearest(pattern, usable) or usable
    problem = "matches nothing" + (f". Nearest paths: {_some(near)}" if near else "")
    slashes = pattern.replace(".", "/")
    plain = pattern.strip("/").removeprefix("params/")
    if below:
        problem += f"; it is a module, whose parameters are {sign + inside!r}"
    elif slashes != pattern and any(matches(slashes, path) for path in (*usable, *unusable)):
        problem += f"; slashes join the names of a path: {sign + slashes!r}"
    elif plain != pattern and any(matches(plain, path) for path in (*usable, *unusable)):
        problem += f"; paths begin and end with a name of the model: {sign + plain!r}"
    elif is_expression(pattern):
        problem += (
            "; it is no regular expression: * is anything within a name, ** any names, {a,b} either"
        )
    whole = re.sub(r"layer(s/|_)(\d+|\{[^{}]*\})", "layers", pattern)
    whole = re.sub(r"(^|/)(\d+|\{[\d,|]*\})(?=/)", "", whole)
    if whole != pattern and any(matches(whole, path) for path in usable):
        problem += (
            f"; {sign + whole!r} matches scanned layers, one module for all of them: to choose "
            "among them, use a model with unrolled layers (here, scan=False)"
        )
    return problem


def _ends(path: str) -> Iterator[str]:
    """The last names of a path, without the first one, the first two, and so on.

    Example:
        >>> list(_ends("layer_0/attention/query"))
        ['attention/query', 'query']
    """
    while "/" in path:
        path = path.partition("/")[2]
        yield path


def _unmatched(pattern: str, paths: Sequence[str], parts: bool) -> Iterator[tuple[str | None, str]]:
    """What of a pattern matches none of the paths: (None, pattern), or parts of its braces.

    Each part comes with the pattern narrowed to it.

    Example:
        >>> list(_unmatched("{a,b}_{0,1}", ["a_0", "a_1"], True))
        [('b', '{b}_{0,1}')]
    """

    if not matches_any(pattern, paths):
        yield None, pattern
    elif parts:
        yield from _unmatched_parts("", pattern, "", paths)


def _unmatched_parts(
    before: str, text: str, after: str, paths: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The parts of the braces in `text` that fail; `before + text + after` is matched."""
    for start, end in _braces(text):
        head, tail = before + text[:start], text[end:] + after
        for part in _split(text[start + 1 : end - 1], ","):
            options = [option.strip() for option in _split(part, "|")]
            taken = [option for option in options if matches_any(head + option + tail, paths)]
            if not taken:
                yield part.strip(), f"{head}{{{part}}}{tail}"
            for option in taken:  # an option that is not taken may fail
                yield from _unmatched_parts(head, option, tail, paths)


def _braces(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the outermost braces."""
    depth = start = 0
    for match in re.finditer("[{}]", text):
        if match[0] == "{":
            start, depth = (start if depth else match.start()), depth + 1
        else:
            depth -= 1
            if not depth:
                yield start, match.end()


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between the separators that are in no brace.

    Example:
        >>> _split("a,{b,c}d", ",")
        ['a', '{b,c}d']
    """
    depth, parts = 0, [""]
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def nearest(pattern: str, paths: Iterable[str], count: int = 5) -> list[str]:
    """The paths most like a pattern, best first, compared by as many last names as it has.

    Of a pattern with braces, like the first few patterns that it expands to.
    """
    found: dict[str, None] = {}
    paths = list(paths)
    for form in _expanded(pattern)[0][:3]:
        plain = form.replace("**/", "").replace("/**", "")
        n = plain.count("/") + 1
        # All layers have the same last names, so that one of them stands for all.
        by_tail: dict[str, str] = {}
        for path in paths:
            by_tail.setdefault("/".join(path.split("/")[-n:]), path)
        near = difflib.get_close_matches(plain, by_tail, count, 0.4)
        found |= dict.fromkeys(by_tail[tail] for tail in near)
    return list(found)[:count]


def _some(paths: Sequence[str], count: int = 5) -> str:
    """The first few paths as a message prints them."""
    return first_few([path or "(the model itself)" for path in paths], count)
