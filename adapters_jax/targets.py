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
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapters_jax.errors import TargetError


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, for paths that begin with a slash."""
    means = {"/**": "(?:/[^/]+)*", "*": "[^/]*"}
    forms = []
    for form in _expanded(pattern):
        if "{" in form or "}" in form:
            raise TargetError(f"target {pattern!r} has an unbalanced brace; write {{a,b}}")
        tokens = re.findall(r"/\*\*(?=/|$)|\*|[^*]", "/" + form)
        forms.append("".join(means.get(token) or re.escape(token) for token in tokens))
    return re.compile("|".join(forms))


def _expanded(pattern: str) -> list[str]:
    """The patterns without braces that a pattern stands for, from the innermost brace outwards."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    before, after = pattern[: brace.start()], pattern[brace.end() :]
    parts = (part.strip() for part in brace[1].split(","))
    return [form for part in parts for form in _expanded(before + part + after)]


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
    return _compile(pattern).fullmatch(f"/{path}" if path else "") is not None


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
        TargetError: names every pattern that fails and lists the paths nearest to it.
    """
    usable, problems = list(usable), []
    named = [path for path in usable if any(matches(p, path) for p in patterns if p[0] != "!")]
    for pattern in patterns:
        if pattern[0] == "!":
            taken = [path for path in named if matches(pattern[1:], path)]
            if not taken or len(taken) == len(named):
                what = "everything" if taken else "nothing"
                problems.append(f"{owner}: {pattern!r} takes away {what} of {_some(named)}")
            continue
        if any(matches(pattern, path) for path in usable):
            continue
        others = (unusable or {}).items()
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
        problems.append(f"{owner}: target {pattern!r} {problem}")
    if problems:
        raise TargetError("\n".join(problems))


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
