"""The shortest patterns that match some paths of a model and no others."""

import itertools
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from adapters_jax.targets import join, matches, selects

_Names = tuple[tuple[str, ...], ...]  # of a pattern, the alternatives of each name


def shortest(found: Sequence[str], others: Collection[str]) -> tuple[str, ...]:
    """The shortest patterns that together match all paths found, and none of the others.

    Example:
        >>> shortest(["layer_0/query", "layer_0/value", "layer_1/query", "layer_1/value"],
        ...     ["layer_0/key", "layer_1/key", "layer_0", "layer_1"])
        ('**/{query,value}',)
        >>> shortest(["layer_1/query"], ["layer_0/query"])
        ('layer_1/query',)
    """
    rest, chosen = list(dict.fromkeys(found)), []
    others = set(others).difference(found)
    while rest:
        best = min(
            (c for c in _candidates(rest[0]) if not any(matches(c, path) for path in others)),
            key=lambda c: (-sum(matches(c, path) for path in rest), len(c), c.count("*")),
        )
        chosen.append(best)
        rest = [path for path in rest if not matches(best, path)]
    anywhere = [f"**/{p.removeprefix('**/')}" for p in chosen]
    wrong = any(matches(p, path) for p in anywhere for path in others)
    forms = [_joined(chosen)] if wrong else [_joined(chosen), _joined(anywhere)]
    return tuple(_wildcards(p, others) for p in min(forms, key=len))


def _candidates(path: str) -> Iterator[str]:
    """Patterns that match a path: its last names, with its numbers or without them."""
    names = path.split("/")
    for n in range(1, len(names) + 1):
        forms = [dict.fromkeys((re.sub(r"\d+", "*", name), name)) for name in names[-n:]]
        for form in map("/".join, itertools.product(*forms)):
            if re.search(r"[^\d*/]", form):  # a layer's number alone says nothing
                yield f"**/{form}"
            if n == len(names):
                yield form


def _joined(patterns: Iterable[str]) -> list[str]:
    """Patterns that differ in one name as one pattern with braces, until none do."""
    rows: list[_Names] = [tuple((name,) for name in p.split("/")) for p in patterns]
    while pair := next(
        ((a, b, i) for a, b in itertools.combinations(rows, 2) for i in _one_difference(a, b)), None
    ):
        a, b, i = pair
        rows[rows.index(a)] = (*a[:i], (*a[i], *b[i]), *a[i + 1 :])
        rows.remove(b)
    return ["/".join(map(_braces, row)) for row in rows]


def _one_difference(a: _Names, b: _Names) -> list[int]:
    """The place of the only name that differs between two patterns; `**` does not count."""
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    one = len(a) == len(b) and len(places) == 1
    return places if one and ("**",) not in (a[places[0]], b[places[0]]) else []


def _braces(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def _wildcards(pattern: str, others: Collection[str]) -> str:
    """The pattern with `*norm` for `{a_norm,b_norm,norm}`, where that matches the same."""
    for brace in re.findall(r"\{[^}]*,[^}]*,[^}]*\}", pattern):
        names = brace[1:-1].split(",")
        for short in _starred(names):
            shorter = pattern.replace(brace, short)
            if not any(matches(shorter, path) for path in others):
                pattern = shorter
                break
    return pattern


def of_parameters(found: Sequence[str], others: Collection[str]) -> tuple[str, ...]:
    """As `shortest`, for parameters of whole modules: the modules, then the parameters' names.

    Example:
        >>> of_parameters(["a_norm/scale", "a_norm/bias", "b_norm/scale", "b_norm/bias"],
        ...     ["a_norm", "b_norm", "dense", "dense/bias"])
        ('{a_norm,b_norm}/{scale,bias}',)
        >>> of_parameters(["scale", "norm/scale"], ["norm", "dense", "dense/bias"])
        ('scale', 'norm/scale')
    """
    names: dict[str, list[str]] = {}
    for path in found:
        names.setdefault(posixpath.dirname(path), []).append(posixpath.basename(path))
    patterns = []
    for own in dict.fromkeys(map(tuple, names.values())):
        modules = [module for module, of_module in names.items() if tuple(of_module) == own]
        root = [""] if "" in modules else []  # no pattern of modules matches it alone
        below = shortest([module for module in modules if module], others)
        patterns += [join(p, _braces(own)) for p in (*root, *below)]
    wrong = [p for p in others if p not in found and selects(patterns, p)]
    return shortest(found, others) if wrong else tuple(patterns)


def _starred(names: Sequence[str]) -> list[str]:
    """One word that names begin or end with, and `*`.

    Example:
        >>> _starred(["ln_1", "ln_2", "ln_f"]), _starred(["a_norm", "norm"]), _starred(["in", "on"])
        (['ln_*'], ['*norm'], [])
    """
    start = re.match(r"[a-zA-Z]+_", names[0])
    end = re.search(r"[a-zA-Z]{2,}$", names[0])
    forms = [rf"{start[0]}.*"] if start else []
    forms += [rf"(.*_)?{end[0]}"] if end else []
    shown = [f"{start[0]}*"] if start else []
    shown += [f"*{end[0]}"] if end else []
    return [
        text
        for form, text in zip(forms, shown, strict=True)
        if all(re.fullmatch(form, name) for name in names)
    ]


def numbered(found: Sequence[str], others: Collection[str]) -> str | None:
    """The paths as one path with `{}` for the number of a layer, if they differ in it alone.

    Example:
        >>> numbered(["layers/0/attention", "layers/1/attention"], ["layers/0", "layers/1"])
        'layers/{}/attention'
        >>> numbered(["encoder/0/attention", "decoder/0/attention"], []) is None
        True
    """
    for number in re.finditer(r"\d+", found[0]) if len(found) > 1 else ():
        form = found[0][: number.start()] + "{}" + found[0][number.end() :]
        layers = {form.replace("{}", str(i)) for i in range(len(found))}
        every = form.replace("/{}/", "/**/").replace("{}", "*")  # as presets write all layers
        if layers == set(found) and not any(matches(every, p) for p in others if p not in found):
            return form
    return None
