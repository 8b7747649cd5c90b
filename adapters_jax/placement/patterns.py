"""Checks of what the patterns of a recipe's methods match, and of what a recipe's entries hold."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar

from adapters_jax.errors import RecipeError, TargetError, other_names, shortened, warn
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.targets import failures, is_expression, matches, selects
from adapters_jax.trace.through import holding

_SUGGEST = "aj.suggest(model, *inputs) proposes targets for it"
_MOST_NAMES = 12  # targets in names of other libraries that a message translates
_SHOWN_KINDS = 3  # of those that a warning is about
# No argument: between those who set it (reading an adapter's file, resuming a run) and the check
# stand flax's `init`, which traces the model, and public functions such as `aj.adapt`.
_CHECKED: ContextVar[bool] = ContextVar("checked", default=False)  # see `checked_before`


def require_points(
    method: Method,
    usable: Sequence[str],
    unusable: Mapping[str, str | None],
    targeted: Iterable[str] | None = None,
) -> None:
    """Checks that every pattern of a method matches something that it attaches to.

    Warns once, with an `AdapterWarning`, where targets also match paths that it cannot adapt.

    Args:
        method: one method of a recipe.
        usable: paths that it can attach to: modules, weights, or parameters for `Unfreeze`.
        unusable: the model's other paths, each with the reason; None where there is nothing that
            the method could adapt, as in a norm for LoRA.
        targeted: the paths of its targets; by default the usable paths that it selects.

    Raises:
        TargetError: names every pattern that fails, with the paths nearest to it.
    """
    owner, first_time = type(method).__name__, not _CHECKED.get()
    problems = failures(owner, method.targets, usable, unusable, parts=first_time)
    wanted = [pattern for pattern in method.targets if not pattern.startswith("!")]
    if problems and (theirs := _theirs(method, usable, [*usable, *unusable])):
        rest = [pattern for pattern in method.targets if pattern not in theirs]
        problems = failures(owner, rest, usable, unusable, parts=first_time)
        problems += [
            f"{owner}: target {name!r} matches nothing; write {pattern!r}"
            for name, pattern in theirs.items()
        ]
    reasons = [why for path, why in unusable.items() if why and selects(wanted, path)]
    unseen = any("example_inputs" in why for why in reasons)  # no other target is needed
    # Where nothing fits at all, the recipe was written for another model: one hint says more than a
    # list of near paths for each pattern.
    if problems and not unseen and not any(selects(wanted, path) for path in usable):
        meant = other_names().ALL_LINEAR if "all-linear" in wanted else _meant(wanted, usable)
        problems = [] if meant else problems  # the nearest paths would be far from what is meant
        problems.append(
            f"{owner} with the targets {shortened(', '.join(map(repr, wanted)))} fits nothing in "
            f"this model; {meant or _SUGGEST}"
        )
    if not problems:
        chosen = targeted or (path for path in usable if selects(method.targets, path))
        own = dict.fromkeys(chosen)
        others = {p: f"not a target of {owner}" for p in (*usable, *unusable) if p not in own}
        fields = {f: [pattern for pattern, _ in getattr(method, f)] for f in method.pattern_fields}
        fields |= {f: list(getattr(method, f)) for f in method.subset_fields}
        for field, patterns in fields.items():
            problems += failures(f"{owner} {field}", patterns, own, others, parts=first_time)
    if problems:
        raise TargetError("\n".join(problems))
    skipped = {p: why for p, why in unusable.items() if why and selects(method.targets, p)}
    if skipped and first_time and method.acts_on != "attention":  # prompts mean attentions alone
        warn(_skipping(owner, skipped))


def _meant(targets: Sequence[str], usable: Sequence[str]) -> str:
    """What to write for targets in the notation of other libraries; nothing if one has no match."""
    found = dict.fromkeys(_here(target, usable) for target in targets)
    return "" if "" in found else f"write the targets {' and '.join(map(repr, found))}"


def _theirs(method: Method, usable: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The targets that match no path since they have names of other libraries, and ours."""
    excluded = [pattern for pattern in method.targets if pattern.startswith("!")]
    found: dict[str, str] = {}
    for target in method.targets:
        foreign = any(word in other_names().MODULES for word in re.findall(r"\w+", target))
        if not foreign or target[0] == "!" or any(matches(target, path) for path in paths):
            continue
        here = _here(target, usable)
        fits = here and any(selects([here, *excluded], path) for path in usable)
        if fits and here not in method.targets:
            found[target] = here
        # Each name is compared with all paths, which may be thousands.
        if len(found) == _MOST_NAMES:
            break
    return found


def _here(target: str, usable: Sequence[str]) -> str:
    """The pattern for a target in the notation of other libraries; nothing if it is a path."""
    patterns = other_names().patterns_here(target)
    if ("/" in target and patterns[0] == target) or is_expression(target):
        return ""
    return next((pattern for pattern in patterns if not failures("", (pattern,), usable)), "")


def _skipping(owner: str, skipped: Mapping[str, str]) -> str:
    """A warning about targets that a method cannot adapt, grouped by reason."""
    kinds: dict[str, list[str]] = {}
    for path, why in skipped.items():
        kinds.setdefault(why, []).append(path or "(the model itself)")
    shown = [
        f"{f'{len(paths)} such as ' if len(paths) > 1 else ''}{paths[0]} ({why})"
        for why, paths in itertools.islice(kinds.items(), _SHOWN_KINDS)
    ]
    if len(kinds) > _SHOWN_KINDS:
        shown.append(f"and {len(kinds) - _SHOWN_KINDS} other kinds")
    return (
        f"{owner}: its targets also match {len(skipped)} path{'s' * (len(skipped) > 1)} that it "
        f"cannot adapt: {'; '.join(shown)}. They stay as they are; name what you want instead, or "
        "exclude them with '!PATH' among the targets"
    )


def check_loaded(caller: str, recipe: Recipe, held: Iterable[str] = ()) -> None:
    """Raises RecipeError where the model would get frozen adapters that nothing has trained."""
    there = {owner.method for owner in recipe.owners(held).values()}
    fresh = [m for m in recipe.attached if not m.train and m not in there]
    if fresh and not _CHECKED.get():
        raise RecipeError(
            f"{caller}: {fresh[0]} is frozen, and the model has no leaves of it, which "
            "would stay as they start; load it, model = aj.load_adapter(directory, model, ..., "
            "train=False), and adapt that model with the other entries"
        )


def checked_before() -> AbstractContextManager[None]:
    """Around work on a recipe that a model was adapted by before: from a file, or to merge.

    Then every pattern must still match something, but parts of braces need not, since earlier
    versions did not check them; what targets skip was reported when the model was adapted; and the
    leaves of frozen entries come with the file.
    """
    return holding(_CHECKED, True)
