"""The pattern language: which paths of a model a method means.

A path is the names from the root of a model to a module or parameter, joined by slashes
(`layer_0/attention/query`). A pattern is a path in which

* `*` stands for any characters within one name,
* `**` stands for any number of whole names, also none,
* `{a,b}` stands for either of its parts.

Among several patterns, one that begins with `!` takes away what the others mean.

The same patterns serve linen and NNX, modules and parameters, single and stacked layers.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapters_jax.errors import TargetError, shortened

MOST = 65_536  # characters that taking the braces of one pattern apart may make
_DETAILED = 12  # failing patterns that a message tells about
_ANY_NAMES, _END = "(?:/[^/]+)*", r"(?=/|\Z)"


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> Callable[[str], Any]:
    """What tells whether a pattern means a path, given with a slash before it.

    No pattern is slow: what stands between two wildcards is settled where it first fits, `(?>...)`,
    since whatever can follow a later place can follow the first one too.
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
    settled = (f"(?>(?:/[^/]+)*?{part}{_END})" for part in others[:-1])
    return "".join([first, *settled, *(_ANY_NAMES + part for part in others[-1:])])


def _names(part: str) -> str:
    """The regular expression of names with single stars in them."""
    first, *others = map(re.escape, re.split(r"\*+", part))
    settled = (f"(?>[^/]*?{text})" for text in others[:-1])
    return "".join([first, *settled, *(f"[^/]*{text}" for text in others[-1:])])


def _expanded(pattern: str) -> tuple[list[str], int]:
    """The patterns without braces that a pattern stands for, from the innermost brace outwards.

    Also how many characters that made; raises TargetError for an unbalanced brace and for too many.
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
                        f"target {shortened(repr(pattern))} stands for too many patterns, of over "
                        f"{MOST} characters; write * or ** instead of some of its braces"
                    )
        forms = wider
    return forms, made


def weight(pattern: str) -> int:
    """How many characters of plain patterns there are to make of a pattern and to compile.

    Raises:
        TargetError: they are too many, or a brace is not closed.

    Example:
        >>> weight("{a,b}_{0,1}"), weight("a_0")
        (43, 0)
    """
    return _expanded(pattern)[1] if re.search(r"[*{}]", pattern) else 0


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern means a path.

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


def selects(patterns: Sequence[str], path: str) -> bool:
    """Whether several patterns together mean a path.

    Example:
        >>> patterns = ("**/query", "!layer_0/**")
        >>> selects(patterns, "layer_1/query"), selects(patterns, "layer_0/query")
        (True, False)
    """
    return any(matches(p, path) for p in patterns if p[0] != "!") and not any(
        matches(p[1:], path) for p in patterns if p[0] == "!"
    )


def as_patterns(targets: str | Iterable[str], owner: str) -> tuple[str, ...]:
    """Targets as a tuple of patterns; raises TargetError where they are none at all."""
    several = isinstance(targets, Iterable) and not isinstance(targets, str)
    patterns: tuple[Any, ...] = tuple(targets) if several else (targets,)
    texts = bool(patterns) and all(isinstance(p, str) and p.removeprefix("!") for p in patterns)
    if not texts or all(p.startswith("!") for p in patterns):
        raise TargetError(
            f"{owner} got targets={targets!r}; it wants one or more patterns such as '**/query'"
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
    """Checks that every pattern means at least one usable path.

    Args:
        owner: what the message calls the method that the patterns belong to.
        patterns: the patterns to check.
        usable: paths the method can attach to.
        unusable: the model's other paths, each with the reason.

    Raises:
        TargetError: names the patterns that fail and lists the paths nearest to each.
    """
    failures = _failures(owner, patterns, list(usable), unusable or {})
    problems = list(itertools.islice(failures, _DETAILED + 1))
    if len(problems) > _DETAILED:  # to find the nearest paths of all of them would take its time
        problems[-1] = f"{owner}: other targets fail as well"
    if problems:
        raise TargetError("\n".join(problems))


def _failures(
    owner: str, patterns: Sequence[str], usable: Sequence[str], unusable: Mapping[str, str]
) -> Iterator[str]:
    """What is wrong with each pattern that fails."""
    named = [path for path in usable if any(matches(p, path) for p in patterns if p[0] != "!")]
    for pattern in patterns:
        if pattern[0] == "!":
            taken = [path for path in named if matches(pattern[1:], path)]
            if not taken or len(taken) == len(named):
                what = "everything" if taken else "nothing"
                yield f"{owner}: {pattern!r} takes away {what} of {_some(named)}"
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
    """The paths most like a pattern, best first, judged by the pattern's own last names."""
    wanted = pattern.replace("**/", "").replace("/**", "")
    depth = wanted.count("/") + 1
    by_tail: dict[str, str] = {}
    for path in paths:
        by_tail.setdefault("/".join(path.split("/")[-depth:]), path)
    return [by_tail[tail] for tail in difflib.get_close_matches(wanted, by_tail, count, 0.4)]


def _some(paths: Sequence[str], count: int = 5) -> str:
    """The first few paths for a message, and how many more there are."""
    shown = ", ".join(map(_shown, paths[:count])) or "(none)"
    return shown if len(paths) <= count else f"{shown} and {len(paths) - count} more"


def _shown(path: str) -> str:
    return path or "(the model itself)"
