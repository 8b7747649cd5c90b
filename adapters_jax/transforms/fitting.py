"""Adapters in the shapes of larger ones: with padding they compute what they did."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adapters_jax.errors import MismatchError, RecipeError
from adapters_jax.methods import Method
from adapters_jax.methods.base import started
from adapters_jax.methods.settings import settings_of
from adapters_jax.placement import Known
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.trees import join

# Finite, since the gradient of a softmax over -inf is NaN where all logits of a row are.
_UNSEEN = -1e9  # a logit that no softmax gives a share


@dataclasses.dataclass(frozen=True, eq=False)  # so that it is a key by its identity
class Fitted:
    """An adapter in other shapes, on the host.

    Attributes:
        leaves: its leaves by path, numpy; it has none where it adapts nothing.
        lengths: how many tokens its prompts have, by the path of the attention module.
        invocation: the tokens from which on it acts; None for all tokens.
        partly: whether some of its methods act on the tokens before the invocation, too.
    """

    leaves: dict[str, Any]
    lengths: dict[str, int]
    invocation: tuple[int, ...] | None = None
    partly: bool = False


def owners_of(recipe: Recipe, paths: Sequence[str]) -> list[Owner]:
    """The adapters that leaves belong to, each once."""
    owners = recipe.owners(paths).values()
    found = {owner.prefix: owner for owner in owners if not owner.shared}
    return list(found.values())


def _in_turn(recipe: Recipe, paths: Sequence[str]) -> list[list[Owner]]:
    """The adapters of each output, weight and attention, in the order that they act in."""
    found: dict[Any, list[Owner]] = {}
    for owner in sorted(owners_of(recipe, paths), key=lambda each: _turn(recipe, each.method)):
        found.setdefault((owner.method.acts_on, owner.path), []).append(owner)
    return list(found.values())


def _turn(recipe: Recipe, method: Method) -> tuple[int, ...]:
    """When an entry acts, to sort by: it has the turn of the composition that runs it."""
    own = recipe.attached.index(method)
    for other in recipe.attached:
        if method.name and method.name in other.members:
            return (*_turn(recipe, other), other.members.index(method.name), own)
    return (own,)


def is_prompt(owner: Owner) -> bool:
    """Whether an adapter is a prompt, whose tokens count."""
    return owner.method.acts_on == "attention"


def neutral(recipe: Recipe, flat: Mapping[str, Any], known: Known) -> dict[str, Array]:
    """The leaves that make a model its base: what its methods add does nothing.

    Args:
        flat: all of its leaves by path; those that are unfrozen are the base's.
        known: the placements of the model, as far as they are known.

    Raises:
        RecipeError: a method cannot leave the base as it is.
    """
    made = {path: leaf for path, leaf in flat.items() if recipe.keeps(path)}
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    placed = {each.prefix: each for each in known.of(recipe, shapes)}
    for method in [method for method in recipe.attached if not method.leaf_names]:
        method.neutral({})  # a composition may have none
    for owner in owners_of(recipe, list(made)):
        method = owner.method
        if method.from_weight == "changes":
            raise _changed_base(method, owner.path)
        paths = owner.paths()
        leaves = {n: flat[path] for n, path in paths.items()}
        # LoRA starts at zero change but with a random A; a bank wants arrays that are the same in
        # every process.
        idle = method.neutral(leaves)
        if method.from_weight:
            each = placed[owner.prefix]
            idle, _ = started(method, idle, each.point(), flat[each.weight_path])
        made |= {paths[n]: jnp.asarray(idle[n], x.dtype) for n, x in leaves.items()}
    return made


def fitted(
    caller: str, recipe: Recipe, flat: Mapping[str, Any], whole: Recipe, room: Mapping[str, Any]
) -> Fitted:
    """An adapter in the shapes of a larger one.

    Args:
        caller: the beginning of error messages.
        whole: the recipe of the larger one.
        room: the shapes and dtypes of its leaves by path.

    Raises:
        RecipeError: the larger recipe lacks a method, or has it with other settings than sizes and
            scales; or it runs methods in another order, or by other compositions.
        MismatchError: arrays do not fit, or are larger.
    """
    made: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    invocations: dict[Any, str] = {}
    for path in flat:
        if path not in room:
            raise _no_room(caller, path, recipe, whole)
    for owner in owners_of(recipe, list(flat)):
        mine = whole.owner(join(owner.prefix, owner.name))
        if mine is None:
            raise _no_room(caller, join(owner.prefix, owner.name), recipe, whole)
        _check_settings(caller, owner, mine.method)
        if mine.method.gated:
            invocations[getattr(owner.method, "invocation", None)] = owner.path
        paths = owner.paths()
        lacking = [path for path in paths.values() if path not in flat]
        if lacking:
            raise MismatchError(f"{caller}: the adapter lacks {', '.join(lacking)}")
        leaves = {n: np.asarray(flat[path]) for n, path in paths.items()}  # compiles nothing
        size = owner.method.size(leaves)
        most = mine.method.size({n: room[path] for n, path in paths.items()})
        # Padded tokens of zeros would still take a share of the softmax, so they are counted out.
        if is_prompt(owner):
            lengths[owner.path] = size or 0
        for n, leaf in owner.method.fitted(leaves, owner.path, mine.method).items():
            cut = n in owner.method.cut_leaves
            made[paths[n]] = _padded(caller, paths[n], leaf, room[paths[n]], size, most, cut)
    for path in flat:
        if recipe.owner(path) is None:
            if whole.owner(path):
                raise _no_room(caller, path, recipe, whole)
            made[path] = _unfrozen(caller, path, flat, room)
    if len(invocations) > 1:
        own = " and ".join(f"{tokens} at {path}" for tokens, path in invocations.items())
        raise RecipeError(f"{caller}: it acts from {own} on, and a row of a bank from one on")
    _check_turns(caller, recipe, list(flat), whole)
    owners = [whole.owner(path) for path in flat]
    partly = not all(owner and owner.method.gated for owner in owners)
    return Fitted(made, lengths, next(iter(invocations), None), partly)


def _check_turns(caller: str, recipe: Recipe, paths: Sequence[str], whole: Recipe) -> None:
    """Raises RecipeError where the larger recipe runs an adapter's methods in another way."""
    for owners in _in_turn(recipe, paths):
        methods: Any = [whole.owner(join(each.prefix, each.name)) for each in owners]
        turns = [_turn(whole, each.method) for each in methods]
        if turns != sorted(turns):
            own = ", ".join(each.method.name or type(each.method).__name__ for each in owners)
            raise RecipeError(
                f"{caller}: at {owners[0].path} it has {own} in this order, and there is room for "
                "them in another one; make the bank of a recipe with the adapter's order"
            )
    names = {owner.method.name for owner in owners_of(recipe, paths)}
    mine, theirs = (_compositions(each, names) for each in (recipe, whole))
    if mine != theirs:
        own, other = (", ".join(sorted(each)) or "no composition" for each in (mine, theirs))
        raise RecipeError(
            f"{caller}: its adapters are run by {own}, and those of the bank by {other}; make the "
            "bank of a recipe with the adapter's compositions"
        )


def _compositions(recipe: Recipe, names: set[str]) -> set[str]:
    """The compositions that run entries of some names, but stacks by themselves: see `_turn`."""
    inner = {name for method in recipe.attached for name in method.members}
    touched, found = names - {""}, set()
    for method in recipe.attached:
        if touched & {*method.members}:
            touched = touched | ({method.name} - {""})
            if method.kind != "stack" or method.name in inner:
                hidden = ("targets", "train", "name", *method.size_fields)
                found.add(f"{method.kind}({', '.join(settings_of(method, hidden))})")
    return found


def _check_settings(caller: str, owner: Owner, whole: Method) -> None:
    """Raises RecipeError where two methods differ in more than sizes."""
    method = owner.method
    if method.from_weight == "changes":
        raise _changed_base(method, owner.path)
    if type(method) not in (type(whole), *whole.also):
        fix = "make the bank of a recipe with both, at separate targets"
        if type(whole) in method.also:
            fix = f"make the bank of {type(method).__name__}, which has room for both"
        raise RecipeError(
            f"{caller}: at {owner.path} it has {type(method).__name__}, and there is room for "
            f"{type(whole).__name__}; {fix}"
        )
    for field in dataclasses.fields(method):
        if field.name in ("targets", "train", *method.size_fields):
            continue
        own, other = getattr(method, field.name), getattr(whole, field.name)
        if own != other:
            raise RecipeError(
                f"{caller}: at {owner.path} its {type(method).__name__} has {field.name}={own!r}, "
                f"expected {other!r}, as all adapters there"
            )


def _changed_base(method: Method, path: str) -> RecipeError:
    return RecipeError(
        f"Bank: {type(method).__name__} at {path} starts by changing the base's weight, so that no "
        f"other adapter fits that base; train it with {method.other_starts or 'another start'}"
    )


def _no_room(caller: str, path: str, recipe: Recipe, whole: Recipe) -> Exception:
    """The error for a leaf that the larger adapter lacks."""
    owner = recipe.owner(path)
    kind = type(owner.method).__name__ if owner else "an unfrozen parameter"
    others = ", ".join(dict.fromkeys(type(method).__name__ for method in whole))
    return MismatchError(
        f"{caller}: it has {path} ({kind}), and the bank has no leaf there; it was made for "
        f"{others}; make it of a recipe whose targets include that, or give an adapter of this base"
    )


def _padded(
    caller: str, path: str, leaf: Any, room: Any, size: int | None, most: int | None, cut: bool
) -> np.ndarray:
    """A leaf with zeros behind its entries on the one axis that is a size of its method.

    Of leaves that modules cut, any axis may be shorter, as where the largest module has no adapter.
    """
    pairs = list(zip(leaf.shape, room.shape, strict=False))
    # Only the axis of the method's size may differ; by its lengths in both, since leaves do not
    # name their axes.
    known = [
        own == other or (own, other) == (size, most) or (cut and own < other)
        for own, other in pairs
    ]
    if leaf.ndim != len(room.shape) or not all(known):
        raise MismatchError(
            f"{caller}: {path} is {list(leaf.shape)}, expected {list(room.shape)}; is it an "
            "adapter of this base?"
        )
    if any(own > other for own, other in pairs):
        raise MismatchError(
            f"{caller}: {path} is {list(leaf.shape)}, and the bank has room for "
            f"{list(room.shape)}; make the bank of a recipe with a size of {size}, not {most}"
        )
    return np.pad(leaf.astype(room.dtype), [(0, other - own) for own, other in pairs])


def _unfrozen(caller: str, path: str, flat: Mapping[str, Any], room: Mapping[str, Any]) -> Any:
    """An unfrozen parameter; the last axis may be shorter in a head with fewer outputs.

    Its kernel then gets zeros, and its bias numbers that no softmax gives a share.
    """
    leaf, whole = np.asarray(flat[path]), room[path]
    if leaf.shape == tuple(whole.shape):
        return leaf.astype(whole.dtype)
    module = path.rpartition("/")[0]
    outputs = {
        (x.shape[-1], room[p].shape[-1])
        for p, x in flat.items()
        if p.rpartition("/")[0] == module and p in room and x.ndim == 1
    }
    longer = leaf.ndim and leaf.shape[:-1] == whole.shape[:-1] and leaf.shape[-1] < whole.shape[-1]
    if not longer or (leaf.shape[-1], whole.shape[-1]) not in outputs:
        raise MismatchError(
            f"{caller}: {path} is {list(leaf.shape)}, expected {list(whole.shape)}; only heads "
            "with a bias may have fewer outputs than the bank's"
        )
    edge = [(0, 0)] * (leaf.ndim - 1) + [(0, whole.shape[-1] - leaf.shape[-1])]
    fill = _UNSEEN if leaf.ndim == 1 else 0.0
    return np.pad(leaf.astype(whole.dtype), edge, constant_values=fill)
