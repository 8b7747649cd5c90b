"""Layer stacking: trees of unrolled layers as trees of scanned ones and back, bit for bit.

An unrolled model has a module for each layer, `layer_3/attention/query`; a scanned one has one for
all of them, `layers/attention/query`, whose leaves have the layers on their first axis. An adapter
changes with its model: `remap` gives the recipe for leaves that have other paths now.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.errors import MismatchError, RecipeError, UserError, first_few
from adapters_jax.methods import Method
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.targets import join as join_names
from adapters_jax.targets import matches, selects
from adapters_jax.trees import Adapter, Tree, adapter_leaves, flatten, unflatten
from adapters_jax.weights.quantized import is_quantized, unboxed

ADVICE = "scanned layers are all alike; use the unrolled model (scan=False)"
_Flat = dict[str, Any]
PathPairs = Sequence[tuple[str, str]]  # the old and the new path of leaves, or of modules


class Stack(NamedTuple):
    """How a model names its layers; they may be anywhere in its tree.

    Attributes:
        unrolled: one of them, with `{}` for its number: `"layer_{}"`, `"layers/{}"`.
        scanned: the module that is all of them.

    Example:
        >>> stack = Stack("layer_{}", "layers")
        >>> stack.number("bert/layer_3/mlp/bias"), stack.layer("bert/layers/mlp/bias", 3)
        (('bert/layers/mlp/bias', 3), 'bert/layer_3/mlp/bias')
    """

    unrolled: str
    scanned: str = "layers"

    def number(self, path: str) -> tuple[str, int] | None:
        """The scanned path and the layer's number; None where the path is of no unrolled layer."""
        # `.*?` finds the outermost layer, where the parts of a layer are numbered like it.
        before, after = map(re.escape, self.unrolled.split("{}"))
        match = re.fullmatch(rf"((?:.*?/)?){before}(\d+){after}((?:/.*)?)", path)
        return match and (f"{match[1]}{self.scanned}{match[3]}", int(match[2]))

    def layer(self, path: str, number: int) -> str | None:
        """The path in one unrolled layer; None where the path is not of scanned layers."""
        match = re.fullmatch(rf"((?:.*?/)?){re.escape(self.scanned)}((?:/.*)?)", path)
        if match is None or self.number(path):
            return None
        return f"{match[1]}{self.unrolled.format(number)}{match[2]}"

    def holds(self, path: str) -> bool:
        """Whether a path is of scanned layers."""
        return self.layer(path, 0) is not None

    def place(self, path: str) -> str:
        """What is before the layers in a scanned path: two stacks may differ in their number.

        Example:
            >>> Stack("layer_{}").place("encoder/layers/mlp/bias")
            'encoder/'
        """
        return path[: re.search(rf"(^|(?<=/)){re.escape(self.scanned)}(/|$)", path).start()]  # type: ignore[union-attr]


class Names(Protocol):
    """Anything that knows how a model names its layers, as the `NAMES` beside a model does."""

    @property
    def stack(self) -> Stack | None:
        """The names of the layers; None for a model without numbered layers."""


def join(
    flat: Mapping[str, Any], stack: Stack, length: int | Mapping[str, int] | None = None
) -> _Flat:
    """Leaves by path, those of unrolled layers stacked; see `stack_layers`."""
    rest = {path: leaf for path, leaf in flat.items() if stack.number(path) is None}
    problems = [f"{path} is of scanned layers already" for path in rest if stack.holds(path)]
    found: dict[str, dict[int, Any]] = {}
    for path, leaf in flat.items():
        if numbered := stack.number(path):
            found.setdefault(numbered[0], {})[numbered[1]] = leaf
    most: dict[str, int] = {}
    for path, layers in found.items():
        most[stack.place(path)] = max(most.get(stack.place(path), 0), 1 + max(layers))
    if length is not None:
        most = dict(length) if isinstance(length, Mapping) else dict.fromkeys(most, length)
    for path, layers in found.items():
        numbers, length = sorted(layers), most[stack.place(path)]
        # jnp.stack would promote dtypes, and the layers of the unrolled model would come back in
        # others.
        kinds = {_kind(layers[i]): i for i in reversed(numbers)}
        if numbers != list(range(length)):
            where = ", ".join(map(str, numbers))
            problems.append(f"{path} is in layers {where}, expected all from 0 to {length - 1}")
        elif len(kinds) > 1:
            shapes = " and ".join(f"{kind} in layer {i}" for kind, i in reversed(kinds.items()))
            problems.append(f"{path} is {shapes}")
    if problems:
        raise MismatchError(f"stack_layers: {first_few(problems, 6, '; ')}; {ADVICE}")
    return rest | {path: _stacked([each[i] for i in sorted(each)]) for path, each in found.items()}


def split(flat: Mapping[str, Any], stack: Stack, row: Callable[[Any, int], Any]) -> _Flat:
    """Leaves by path, a scanned one as `row(leaf, number)` for each layer; see `unstack_layers`."""
    lengths, rows = count_layers(flat, stack), dict[str, Any]()
    for path, leaf in flat.items():
        if stack.holds(path):
            numbers = range(lengths.get(stack.place(path), 0))
            rows |= {str(stack.layer(path, i)): row(leaf, i) for i in numbers}
        else:
            rows[path] = leaf
    return rows


def count_layers(flat: Mapping[str, Any], stack: Stack) -> dict[str, int]:
    """The number of scanned layers by their `Stack.place`.

    Raises:
        MismatchError: leaves differ in the number of layers, or layers are unrolled already.
    """
    problems = [f"{path} is of an unrolled layer" for path in flat if stack.number(path)]
    axes: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, x in flat.items():
        if stack.holds(path) and _has_axes(x):
            axes.setdefault(stack.place(path), {})[path] = x.shape[:1]
    for each in axes.values():
        if len(set(each.values())) > 1 or () in each.values():
            problems += [f"{path} has {axis or 'no'} layers" for path, axis in each.items()]
    if problems:
        raise MismatchError(
            f"unstack_layers: {first_few(problems, 6, '; ')}; expected scanned layers"
        )
    return {place: next(iter(each.values()))[0] for place, each in axes.items()}


def _has_axes(leaf: Any) -> bool:
    """Whether a leaf is an array; an optimiser's state has other leaves where nothing trains."""
    return hasattr(leaf, "shape")


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if _has_axes(leaf) else type(leaf).__name__


def _stacked(leaves: Sequence[Any]) -> Any:
    """Leaves of layers as one; an NNX Variable or a quantised weight is a pytree of arrays."""

    def stacked(*parts: Any) -> Any:
        if isinstance(parts[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(parts), *parts[0].shape), parts[0].dtype)
        if not _has_axes(parts[0]):
            return parts[0]
        # numpy's arrays, of a file, may be larger than the device: they stay on the host.
        return (np if isinstance(parts[0], np.ndarray) else jnp).stack(parts)

    return jax.tree.map(stacked, *leaves)


def _row(leaf: Any, number: int) -> Any:
    """One layer of a leaf."""

    def row(part: Any) -> Any:
        if isinstance(part, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(part.shape[1:], part.dtype)
        return part[number] if _has_axes(part) else part

    return jax.tree.map(row, leaf)


def stack_layers(
    tree: Tree | Adapter, names: Names | Stack, *, length: int | Mapping[str, int] | None = None
) -> Any:
    """Stacks the leaves of a model's layers on one axis, as the scanned model has them.

    Args:
        tree: a tree of parameters or of adapters alone, linen's or an `nnx.State`, concrete or
            abstract; or the state of an optimiser such as Adam, whose moments are trees of
            this kind. Or an adapter: its recipe and its tree, as `read_adapter` returns them.
        names: the `NAMES` beside a model, or a `Stack`.
        length: the number of layers; by default one more than the highest number of a layer. Of
            stacks that differ in it, a mapping from `Stack.place` to the number of each.

    Returns:
        The tree; for an adapter its recipe and its tree, as `save_adapter` takes them. Patterns
        that still match the same modules stay as they are. Leaves outside of layers are unchanged.

    Raises:
        MismatchError: a leaf is missing in some layer, or its shape or dtype differs.
        RecipeError: the layers' methods differ, for example in alpha or dropout.
        UserError: `names` has no names of layers.
        TypeError: `tree` is a path.

    Example:
        >>> tree = {"layer_0": {"bias": np.zeros(3)}, "layer_1": {"bias": np.ones(3)}}
        >>> stack_layers(tree, Stack("layer_{}"))["layers"]["bias"].tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    stack = stack_of(names)

    def pairs(flat: _Flat) -> PathPairs:
        return [(path, numbered[0] if (numbered := stack.number(path)) else path) for path in flat]

    return _converted(tree, lambda flat: join(flat, stack, length), pairs)


def unstack_layers(tree: Tree | Adapter, names: Names | Stack) -> Any:
    """The inverse of `stack_layers`: each layer has its own leaves, as in the unrolled model.

    Args:
        tree: as in `stack_layers`, with the leaves of all layers stacked on their first axis.
        names: as in `stack_layers`.

    Returns:
        As in `stack_layers`; the leaves of a layer lack that axis.

    Raises:
        MismatchError: leaves of scanned layers differ in their first axis, or layers are unrolled
            already.
        UserError: `names` has no names of layers.
        TypeError: `tree` is a path.

    Example:
        >>> unstack_layers({"layers": {"bias": np.ones((2, 3))}}, Stack("layer_{}"))
        {'layer_0': {'bias': array([1., 1., 1.])}, 'layer_1': {'bias': array([1., 1., 1.])}}
    """
    stack = stack_of(names)

    def pairs(flat: _Flat) -> PathPairs:
        lengths = count_layers(flat, stack)

        def rows(path: str) -> Iterable[str | None]:
            held = range(lengths.get(stack.place(path), 1)) if stack.holds(path) else ()
            return (stack.layer(path, i) for i in held) if held else (path,)

        return [(path, str(row)) for path in flat for row in rows(path)]

    return _converted(tree, lambda flat: split(flat, stack, _row), pairs)


def stack_of(names: Names | Stack) -> Stack:
    """The names of a model's layers; raises UserError where `names` does not have them."""
    stack = names if isinstance(names, Stack) else getattr(names, "stack", None)
    if stack is None:
        raise UserError(
            "names does not name layers; give the NAMES beside a model, or "
            "Stack('layer_{}', 'layers') with the names of one layer and of all as one"
        )
    return stack


def _converted(
    subject: Any, change: Callable[[_Flat], _Flat], pairs: Callable[[_Flat], PathPairs]
) -> Any:
    """A tree with every mapping in it changed; an adapter with its recipe remapped, too."""
    if isinstance(subject, str | Path):
        raise TypeError(
            f"got the path {str(subject)!r} of an adapter; write aj.read_adapter({str(subject)!r})"
        )
    pair = isinstance(subject, tuple) and len(subject) == 2
    if not (pair and isinstance(subject[0], Recipe | Method)):
        return _mapped(subject, change)
    recipe, flat = adapter_leaves(subject, "stack_layers")
    made, problems = change(flat), list[str]()
    recipe = remap(recipe, pairs(flat), problems)
    if problems:
        raise RecipeError(f"stack_layers: {first_few(problems, 6, '; ')}; {ADVICE}")
    return recipe, unflatten(made)


def _mapped(tree: Tree, change: Callable[[_Flat], _Flat]) -> Tree:
    """Every mapping in a pytree changed, as a flat one."""

    def changed(node: Any) -> Any:
        if isinstance(node, nnx.State):
            flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(node)}
            # A state has the numbers of lists as integers, which texts would not match.
            new: Any = {_keys(path): leaf for path, leaf in change(flat).items()}
            return nnx.from_flat_state(new)
        if isinstance(node, Mapping):
            flat = change({path: _unannotated(leaf) for path, leaf in flatten(node).items()})
            return unflatten({path: _mapped(leaf, change) for path, leaf in flat.items()})
        return node

    return jax.tree.map(changed, tree, is_leaf=lambda node: isinstance(node, Mapping))


def _unannotated(leaf: Any) -> Any:
    """A leaf without the names of its axes, which are others now."""
    return leaf.replace(spec=None) if is_quantized(leaf) else unboxed(leaf)


def _keys(path: str) -> tuple[str | int, ...]:
    """A path as NNX has it, numbers as integers."""
    return tuple(int(name) if name.isdecimal() else name for name in path.split("/"))


def remap(recipe: Recipe, pairs: PathPairs, problems: list[str]) -> Recipe:
    """The recipe with the same methods for leaves at new paths; several may share a new path.

    Patterns that match the new paths stay as they are; others are replaced by the paths themselves.

    Args:
        recipe: says what trained at the old paths.
        pairs: old and new paths of the trained leaves.
        problems: gets a line for each new path whose old paths have different settings.

    Example:
        >>> from adapters_jax import LoRA
        >>> remap(Recipe(LoRA("a/q"), LoRA("**/v")), [("a/q/lora/a", "b/q/lora/a")], [])
        Recipe(
          LoRA(targets=('b/q',)),
          LoRA(targets=('**/v',)),
        )
    """
    pairs_of: dict[Method, list[tuple[str, str]]] = {method: [] for method in recipe}
    settings: dict[tuple[str, str | None], dict[Method, None]] = {}
    for old, new in pairs:
        owner = recipe.owner(old)
        if owner is None:
            for method in recipe:
                if method.slot is None and selects(method.targets, old):
                    pairs_of[method].append((old, new))
        elif not owner.shared:  # what all modules share is of no target
            method, path = owner.method, _remapped(owner, old, new)
            pairs_of[method].append((owner.path, path))
            settings.setdefault((path, method.slot), {})[_bare(method)] = None
    problems += [
        f"{path} has {_differing(methods)}"
        for (path, _), methods in settings.items()
        if len(methods) > 1
    ]
    made = [_retargeted(method, pairs_of[method], problems) for method in recipe]
    return Recipe(*dict.fromkeys(made))


def _remapped(owner: Owner, old: str, new: str) -> str:
    """The new path of a target, from the old and the new path of one of its leaves."""
    module = owner.prefix.rpartition(f"{owner.method.slot}")[0].rstrip("/")
    path = new.removesuffix(old[len(module) :])
    return join_names(path, owner.path[len(module) :].strip("/"))


def _bare(method: Any) -> Any:
    """A method without its targets and without its settings for single targets."""
    own = (*method.pattern_fields, *method.subset_fields)
    return dataclasses.replace(method, targets="**", **dict.fromkeys(own, ()))


def _differing(methods: Iterable[Any]) -> str:
    """The fields that differ between methods, with their values."""
    rows = [{"method": type(m).__name__, **dataclasses.asdict(m)} for m in methods]
    values = {k: [repr(row.get(k)) for row in rows] for row in rows for k in row}
    return ", ".join(f"{k}={' and '.join(v)}" for k, v in values.items() if len(set(v)) > 1)


def _retargeted(method: Any, pairs: PathPairs, problems: list[str]) -> Method:
    """A method with patterns for the new paths of its targets."""
    paths = list(dict.fromkeys(new for _, new in pairs))
    changes: dict[str, Any] = {}
    if not all(selects(method.targets, p) for p in paths) or _unused(method.targets, paths):
        changes["targets"] = tuple(paths)
    for field in method.subset_fields:
        changes |= _subset(method, field, pairs, problems)
    for field, name in method.pattern_fields.items():
        patterns, usual = getattr(method, field), getattr(method, name)
        values: dict[str, dict[Any, None]] = {}
        for old, new in pairs if patterns else ():
            values.setdefault(new, {})[_value_at(patterns, old, usual)] = None
        problems += [
            f"{path} has {name}={' and '.join(map(str, several))}"
            for path, several in values.items()
            if len(several) > 1
        ]
        numbers = {path: next(iter(several)) for path, several in values.items()}
        stays = all(_value_at(patterns, path, usual) == value for path, value in numbers.items())
        if not stays or _unused([pattern for pattern, _ in patterns], paths):
            changes[field] = {path: value for path, value in numbers.items() if value != usual}
    return dataclasses.replace(method, **changes)


def _subset(method: Any, field: str, pairs: PathPairs, problems: list[str]) -> dict[str, Any]:
    """The new patterns of a field whose patterns match some of the targets; empty to keep it."""
    patterns = getattr(method, field)
    if not patterns:
        return {}
    matched = {new for old, new in pairs if selects(patterns, old)}
    others = {new for old, new in pairs if not selects(patterns, old)}
    problems += [f"{path} is in {field} of some layers only" for path in matched & others]
    stays = all(selects(patterns, new) == (new in matched) for _, new in pairs)
    paths = [new for _, new in pairs]
    return {} if stays and not _unused(patterns, paths) else {field: tuple(sorted(matched))}


def _value_at(pairs: Iterable[tuple[str, Any]], path: str, usual: Any) -> Any:
    """The value of the first pattern that matches a path."""
    return next((value for pattern, value in pairs if matches(pattern, path)), usual)


def _unused(patterns: Iterable[str], paths: Sequence[str]) -> bool:
    """Whether some pattern, also one that excludes, matches none of the paths."""
    used = [any(matches(pattern, path) for path in paths) for pattern in patterns]
    return bool(paths) and not all(used)
