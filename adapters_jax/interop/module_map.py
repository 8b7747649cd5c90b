"""Where a model's modules are in files of other libraries."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.errors import UserError
from adapters_jax.interop.layouts import Array, ModuleReference
from adapters_jax.interop.names import NameTable
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.targets import selects
from adapters_jax.transforms.stacking import count_layers, split, stack_layers, unstack_layers
from adapters_jax.trees import Tree, flatten, join, unflatten
from adapters_jax.weights.quantized import unboxed

Names = NameTable | Mapping[str, str | Sequence[str]]
Leaves = dict[str, Array]  # by path
Added = dict[str, Leaves]  # by module, then by the leaf's name
HEADS = ("lm_head", "classifier", "score")  # beside the encoder or decoder, not in it


@dataclass(frozen=True)
class ModuleMap:
    """A model's modules by the names that PyTorch has for them.

    Attributes:
        modules: our modules by their name, without prefix; several where theirs is fused.
        attention: paths of our attention modules, likewise.
        base: the base's arrays by path.
        prefixes: leading words that their names may have.
        fan_in_fan_out: whether their linear weights are `(in, out)`.
        tied: whether the word embeddings are also the output layer.
        scanned: how many layers the base has as one module, 0 where they are unrolled. Paths are
            those of unrolled layers in any case.
    """

    modules: Mapping[str, tuple[ModuleReference, ...]]
    attention: Mapping[str, str]
    base: Mapping[str, Any]
    prefixes: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    tied: bool = False
    scanned: int = 0

    def at(self, name: str) -> tuple[ModuleReference, ...]:
        """Our modules for one of theirs, in the order of the parts; none where it is not known."""
        return self.modules.get(self.bare(name), ())

    def bare(self, name: str) -> str:
        """A name of theirs without prefix."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name

    def full(self, name: str, prefix: str | None) -> str:
        """A bare name as the model has it: with the prefix given, or the first of the table's."""
        prefix = "".join(self.prefixes[:1]) if prefix is None else prefix
        return name if name.split(".")[0] in HEADS else prefix + name

    @property
    def paths(self) -> list[str]:
        """Our modules that have parameters."""
        return sorted({path.rpartition("/")[0] for path in self.base})


def find_modules(names: Names, base: Any) -> ModuleMap:
    """Goes through a model and asks what its modules are called in PyTorch.

    Args:
        names: a model's table, or a mapping from their module names to our paths; to a tuple of
            paths where theirs is fused, to an attention module's path for prompts.
        base: the parameters as a tree of arrays, also abstract ones, or an NNX module.

    Raises:
        ValueError: nothing is found, or a mapping names paths that the base does not have.
    """
    state = nnx.state(base, nnx.Param) if isinstance(base, nnx.Module) else base
    leaves = {path: unboxed(leaf) for path, leaf in flatten(state).items()}
    stack = names.stack if isinstance(names, NameTable) else None
    scanned = count_layers(leaves, stack) if stack and any(map(stack.holds, leaves)) else 0
    if stack and scanned:
        leaves = split(leaves, stack, _row)
    by_path: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        by_path.setdefault(module, {})[name] = leaf
    if isinstance(names, NameTable):
        return replace(_by_table(names, by_path, leaves), scanned=scanned)
    return _by_mapping(names, by_path, leaves)


def _by_table(
    names: NameTable, by_path: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]
) -> ModuleMap:
    modules: dict[str, list[ModuleReference]] = {}
    attention = {}
    for path, leaves in by_path.items():
        try:
            source = names.module(path)
        except ValueError:
            continue  # a module that no file of theirs has, such as another head
        modules.setdefault(source.name, []).append(ModuleReference(path, leaves, source.part))
        if path.endswith("/query"):
            attention[source.name.rpartition(".")[0]] = path.removesuffix("/query")
    if not modules:
        raise UserError(
            f"names knows none of the base's modules {', '.join(list(by_path)[:3])}; give the "
            "NAMES that stands beside the model, and the parameters of that model"
        )
    ordered = {name: tuple(sorted(each, key=_index)) for name, each in modules.items()}
    tied = r"lm_head\.weight" in names.ignored and "lm_head" not in modules
    return ModuleMap(ordered, attention, base, names.prefixes, names.fan_in_fan_out, tied)


def _index(reference: ModuleReference) -> int:
    return reference.part[0] if reference.part else 0


def _by_mapping(
    names: Mapping[str, str | Sequence[str]],
    by_path: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
) -> ModuleMap:
    modules, attention, problems = {}, {}, []
    for theirs, ours in names.items():
        paths = [ours] if isinstance(ours, str) else list(ours)
        if all(path in by_path for path in paths):
            parts = [(i, len(paths)) if len(paths) > 1 else None for i in range(len(paths))]
            pairs = zip(paths, parts, strict=True)
            modules[theirs] = tuple(
                ModuleReference(path, by_path[path], part) for path, part in pairs
            )
        elif len(paths) == 1 and any(path.startswith(f"{paths[0]}/") for path in by_path):
            attention[theirs] = paths[0]
        else:
            near = difflib.get_close_matches(paths[0], by_path, 3) or list(by_path)[:3]
            problems.append(f"{theirs!r} to {ours!r} (nearest: {', '.join(near)})")
    if problems:
        raise UserError(f"names maps to what the base does not have: {'; '.join(problems)}")
    return ModuleMap(modules, attention, base)


@dataclass(frozen=True)
class _Row:
    """One layer of a stacked array, read off it when its numbers are asked for."""

    stacked: Any
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stacked.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.stacked.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.stacked[self.number], dtype)


def _row(stacked: Any, number: int) -> Any:
    """One layer of a stacked array, abstract where that is."""
    if hasattr(stacked, "__array__"):
        return _Row(stacked, number)
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)


def as_in_model(
    methods: Sequence[Method], leaves: Leaves, names: Names, module_map: ModuleMap
) -> tuple[Recipe, Tree]:
    """What was read of unrolled layers as the base has it.

    Raises:
        ValueError: its layers are scanned, and those that were read are not alike.
    """
    recipe, tree = Recipe(*methods), unflatten({k: jnp.asarray(x) for k, x in leaves.items()})
    if not module_map.scanned or not isinstance(names, NameTable):
        return recipe, tree
    return stack_layers((recipe, tree), names, length=module_map.scanned)


def as_in_file(
    recipe: Recipe | Method, leaves: Leaves, names: Names, module_map: ModuleMap
) -> tuple[Recipe, Leaves]:
    """What a base trained, of unrolled layers."""
    if not module_map.scanned or not isinstance(names, NameTable):
        return Recipe(recipe), leaves
    unrolled, tree = unstack_layers((recipe, unflatten(leaves)), names)
    return unrolled, flatten(tree)


def by_module(
    recipe: Recipe, leaves: Mapping[str, Array], problems: list[str]
) -> tuple[Added, Leaves]:
    """The leaves that methods added, by module, and the base's own that train."""
    added: Added = {}
    trained: Leaves = {}
    for path, leaf in leaves.items():
        owner = recipe.owner(path)
        if owner is not None:
            module, method = owner
            added.setdefault(module, {})[path.removeprefix(join(module, method.slot) + "/")] = leaf
        elif recipe.trains(path):
            trained[path] = leaf
        else:
            problems.append(f"{path} is not trained by the recipe")
    for module in list(added):
        names = {name for method in recipe.at(module) for name in method.leaf_names}
        lacking = sorted(names - added[module].keys())
        if lacking:
            problems.append(f"{module} lacks {', '.join(lacking)}")
            del added[module]
    return added, trained


def trained_value(
    path: str, trained: Mapping[str, Array], module_map: ModuleMap, problems: list[str]
) -> Array:
    """A trained leaf, or the base's where its module is saved whole."""
    own = module_map.base[path]
    if path not in trained and not hasattr(own, "__array__"):
        problems.append(f"{path} goes with what trains: give a base with its values, not shapes")
        return np.zeros(own.shape, np.float32)
    return np.asarray(trained.get(path, own))


def as_in_base(leaves: Mapping[str, Array], module_map: ModuleMap) -> bool:
    """Whether these are the base's own values, which some files repeat."""
    both: Iterable[tuple[Array, Any]] = [(x, module_map.base[path]) for path, x in leaves.items()]
    return all(hasattr(own, "__array__") and np.array_equal(x, own) for x, own in both)


def shortest(wanted: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """Patterns that mean these paths and no others: by the last names, or the paths themselves.

    Example:
        >>> shortest(["layer_0/query", "layer_1/query"], ["layer_0/query", "layer_1/query", "norm"])
        ('**/query',)
        >>> shortest(["layer_0/query"], ["layer_0/query", "layer_1/query"])
        ('layer_0/query',)
    """
    wanted, among = set(wanted), list(among)
    for depth in (1, 2):
        tails = {"/".join(path.split("/")[-depth:]) for path in wanted}
        patterns = tuple(sorted(join("**", tail) for tail in tails))
        fewer = len(patterns) < len(wanted)
        if fewer and {path for path in among if selects(patterns, path)} == wanted:
            return patterns
    return tuple(sorted(wanted, key=in_order))


def in_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts paths with their numbers as numbers."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", path)]
