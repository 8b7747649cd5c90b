"""The pattern language: which paths of a model a pattern matches.

A path is the names from the root of a model to a module or parameter, joined by slashes
(`layer_0/attention/query`). A pattern is a path in which

* `*` matches any characters within one name,
* `**` matches any number of whole names, also none,
* `{a,b}` matches either of its parts.

Among several patterns, one that begins with `!` excludes paths that the others match.

The same patterns serve linen and NNX, modules and parameters, single and stacked layers.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapters_jax.errors import TargetError, shortened

MOST = 65_536  # characters that one pattern may expand to
_DETAILED = 12  # failing patterns that a message explains
_ANY_NAMES, _END = "(?:/[^/]+)*", r"(?=/|\Z)"


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> Callable[[str], Any]:
    """A function that tells whether a pattern matches a path, which it takes with a slash in front.

    Matching never backtracks far: the text between two wildcards is fixed at its first match by an
    atomic group, `(?>...)`, since whatever can follow a later match can follow the first one too.
    """
    if not re.search(r"[*{}]", pattern):
        return f"/{pattern}".__eq__
    return re.compile("|".join(map(_regex, _expanded(pattern)[0]))).fullmatch


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
            for option in brace[1].split(","):
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


def weight(pattern: str) -> int:
    """How many characters the braces of a pattern expand to: what compiling it costs.

    Raises:
        TargetError: there are more than `MOST`, or a brace is unbalanced.

    Example:
        >>> weight("{a,b}_{0,1}"), weight("a_0")
        (43, 0)
    """
    return _expanded(pattern)[1] if re.search(r"[*{}]", pattern) else 0


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


def selects(patterns: Sequence[str], *paths: str) -> bool:
    """Whether several patterns together match something that has one path, or several.

    Example:
        >>> patterns = ("**/query", "!layer_0/**")
        >>> selects(patterns, "layer_1/query"), selects(patterns, "layer_0/query")
        (True, False)
    """
    wanted = [p for p in patterns if p[0] != "!"]
    excluded = [p[1:] for p in patterns if p[0] == "!"]
    return any(matches(p, path) for p in wanted for path in paths) and not any(
        matches(p, path) for p in excluded for path in paths
    )


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
    unusable: Mapping[str, str] | None = None,
) -> None:
    """Checks that every pattern matches at least one usable path.

    Args:
        owner: the method that the patterns belong to, for the message.
        patterns: the patterns to check.
        usable: paths that the method can attach to.
        unusable: the model's other paths, each with the reason.

    Raises:
        TargetError: names the patterns that fail, each with the paths nearest to it.
    """
    failures = _failures(owner, patterns, list(usable), unusable or {})
    problems = list(itertools.islice(failures, _DETAILED + 1))
    if len(problems) > _DETAILED:  # finding the nearest paths of all of them would be slow
        problems[-1] = f"{owner}: other targets fail as well"
    if problems:
        raise TargetError("\n".join(problems))


def _failures(
    owner: str, patterns: Sequence[str], usable: Sequence[str], unusable: Mapping[str, str]
) -> Iterator[str]:
    """A line of the message for each pattern that fails."""
    matched = [path for path in usable if any(matches(p, path) for p in patterns if p[0] != "!")]
    for pattern in patterns:
        if pattern[0] == "!":
            excluded = [path for path in matched if matches(pattern[1:], path)]
            if not excluded or len(excluded) == len(matched):
                what = "everything" if excluded else "nothing"
                yield f"{owner}: {pattern!r} excludes {what} of {_some(matched)}"
            continue
        if any(matches(pattern, path) for path in usable):
            continue
        others = unusable.items()
        blocked = [f"{_shown(path)} ({why})" for path, why in others if matches(pattern, path)]
        if blocked:
            problem = f"matches only paths it cannot attach to: {_some(blocked, 3)}"
        else:
            near = nearest(pattern, usable) or usable
            problem = f"matches nothing. Nearest paths it could attach to: {_some(near)}"
            whole = re.sub(r"layer(s/|_)\d+", "layers", pattern)
            if any(matches(whole, path) for path in usable):
                problem += (
                    "; its layers are scanned, one module for all of them: to choose among them, "
                    "use the unrolled model (scan=False)"
                )
        yield f"{owner}: target {pattern!r} {problem}"


def nearest(pattern: str, paths: Iterable[str], count: int = 5) -> list[str]:
    """The paths most like a pattern, best first, compared by as many last names as it has."""
    plain = pattern.replace("**/", "").replace("/**", "")
    n = plain.count("/") + 1
    by_tail: dict[str, str] = {}
    for path in paths:
        by_tail.setdefault("/".join(path.split("/")[-n:]), path)
    return [by_tail[tail] for tail in difflib.get_close_matches(plain, by_tail, count, 0.4)]


def _some(paths: Sequence[str], count: int = 5) -> str:
    """The first few paths, and how many more there are, as a message prints them."""
    shown = ", ".join(map(_shown, paths[:count])) or "(none)"
    return shown if len(paths) <= count else f"{shown} and {len(paths) - count} more"


def _shown(path: str) -> str:
    return path or "(the model itself)"
