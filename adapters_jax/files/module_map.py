"""The module map: a model's modules by the names that files of other libraries have for them."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.errors import MismatchError, UserError, first_few, shown
from adapters_jax.files.layouts import (
    WHOLE,
    Array,
    ModuleReference,
    ParameterReference,
    Span,
    our_leaf,
    spans,
    their_leaf,
)
from adapters_jax.files.names import HEADS, ROW, NameTable, ParameterRule
from adapters_jax.files.patterns import shortest
from adapters_jax.methods import AdaLoRA, Method
from adapters_jax.methods.adalora import as_lora, folded
from adapters_jax.placement import Placements, in_tree, own_leaves
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join
from adapters_jax.transforms.stacking import count_layers, split, stack_layers, unstack_layers
from adapters_jax.trees import Tree, flatten, unflatten
from adapters_jax.weights.quantized import unboxed

_WRAPPER = "base_model.model."  # before every name in PEFT's files
Names = NameTable | Mapping[str, str | Sequence[str]]
Leaves = dict[str, Array]  # by path
# By module of theirs, "" for what is of none, then by the leaf's name.
Added = dict[str, Leaves]
Parameters = Mapping[str, tuple[ParameterReference, ...]]  # by their name, without prefix


@dataclass(frozen=True)
class ModuleMap:
    """A model's modules by their names in PyTorch ("theirs").

    Attributes:
        modules: our modules by their name without prefix; several where theirs fuses ours.
        attention: paths of our attention modules by their name without prefix.
        base: the base's arrays by path.
        tied: their output layer and their embedding where these are one weight; else None.
        scanned: the number of layers that the base scans, by `Stack.place`; nothing if it unrolls
            them. Paths are always those of unrolled layers.
        parameters: our parameters by their name without prefix, those of one of their modules in
            the order that it defines them; several where theirs fuses ours.
        stacked: the same of parameters that only the model of transformers 5 has.
        prefix: begins the names that `full` makes.
        table: the model's table; of a mapping, one without rules.
    """

    modules: Mapping[str, tuple[ModuleReference, ...]]
    attention: Mapping[str, str]
    base: Mapping[str, Any]
    table: NameTable
    tied: tuple[str, str] | None = None
    scanned: Mapping[str, int] = field(default_factory=dict)
    parameters: Parameters = field(default_factory=dict)
    stacked: Parameters = field(default_factory=dict)
    prefix: str = ""

    def at(self, name: str) -> tuple[ModuleReference, ...]:
        """Our modules for one of theirs, in the order of its parts; empty if it is unknown."""
        return self.modules.get(self.bare(name), ())

    def at_parameter(self, name: str) -> tuple[ParameterReference, ...]:
        """Our parameters for one that a module of theirs holds itself."""
        bare = self.bare(name)
        return self.stacked.get(bare) or self.parameters[bare]

    def bare(self, name: str) -> str:
        """Their name without prefix, that of transformers 4 where 5 has another."""
        for prefix in self.table.prefixes:
            name = name.removeprefix(prefix)
        return self.table.renamed(name, back=True)

    def inputs_first(self, name: str) -> bool:
        """Whether the weight of their module is stored `(in, out)`; those of heads never are."""
        return self.table.inputs_first(self.bare(name))

    def full(self, name: str, prefix: str | None = None) -> str:
        """A bare name with this prefix, or with that of heads, as the written model has it."""
        own = self.prefix if prefix is None else prefix
        name = self.table.renamed(name)
        return (self.table.head_prefix if self.table.is_of_head(name) else own) + name

    def spelt_like(self, names: Iterable[str]) -> "ModuleMap":
        """The map whose `full` names are of the version of transformers that has these names."""
        if not self.table.since_5:
            return self
        plain = [name.removeprefix(each) for name in names for each in ("", *self.table.prefixes)]
        five = any(self.table.renamed(name, back=True) != name for name in plain)
        return replace(self, table=self.table.of_version(5 if five else 4))

    def unnamed(self, path: str) -> str:
        """What to do about a parameter or module of ours that is none of their modules."""
        every = (*self.parameters.items(), *self.stacked.items())
        theirs = next((name for name, own in every if path in (each.path for each in own)), "")
        if not theirs:
            return f"names has no module name for {path}; add it"
        return (
            f"PEFT's files have no place for {path}, their parameter {theirs}; leave it out of "
            "the recipe, or keep the adapter in a file of ours"
        )

    @cached_property
    def rows(self) -> dict[str, list[str]]:
        """Their modules, one for each row of a parameter of ours, such as experts, by its path."""
        return {
            reference.path: [
                name.replace(ROW, str(i)).removesuffix(".weight") for i in range(reference.shape[0])
            ]
            for name, (reference, *_) in self.parameters.items()
            if ROW in name
        }

    @cached_property
    def whole(self) -> set[str]:
        """The paths of our modules that are a module of theirs, or a part of one."""
        return {reference.path for parts in self.modules.values() for reference in parts}

    def is_alone(self, path: str) -> bool:
        """Whether one of our weights is the only one of its module."""
        module, _, name = path.rpartition("/")
        own = self._owned.get(module, {})
        return bool(module) and not any(
            each not in (name, "bias") and len(leaf.shape) > 1 for each, leaf in own.items()
        )

    @cached_property
    def _owned(self) -> dict[str, dict[str, Any]]:
        """The base's arrays by module, then by name."""
        return own_leaves(self.base)

    @property
    def paths(self) -> list[str]:
        """The paths of our modules that have parameters."""
        return sorted(self._owned)

    def targets(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Patterns of these modules or weights, and of no others."""
        return shortest(paths, [*self.paths, *self.base])


def find_modules(names: Names, base: Any, prefix: str | None = None) -> ModuleMap:
    """Builds the module map of a model.

    Args:
        names: the model's table, or a mapping from their module names to our paths: a tuple of
            paths where theirs fuses ours, an attention module's path for prompts; or from the name
            of a parameter to ours. Two names for one embedding are the embedding's, and then that
            of the output layer that is tied to it.
        base: the parameters as a tree of arrays (abstract ones suffice) or an NNX module.
        prefix: begins the names of all modules but heads in files; by default the table's first.

    Raises:
        UserError: no module is found, or the mapping has paths that the base does not have.
    """
    state = nnx.state(base, nnx.Param) if isinstance(base, nnx.Module) else base
    leaves = {path: unboxed(leaf) for path, leaf in flatten(state).items()}
    if not isinstance(names, NameTable | Mapping):
        raise TypeError(
            f"names is {shown(names)}, expected the NAMES of the model's package, or a mapping "
            "from their names of modules to paths of the base"
        )
    keys = getattr(base, "attention_keys", "") if isinstance(base, nnx.Module) else ""
    table = names if isinstance(names, NameTable) else NameTable(())
    table, stack = replace(table, keys=table.keys or keys), table.stack
    scanned = count_layers(leaves, stack) if stack and any(map(stack.holds, leaves)) else {}
    if stack and scanned:
        leaves = split(leaves, stack, _row)
    by_path: dict[str, dict[str, Any]] = own_leaves(leaves)
    if isinstance(names, NameTable):
        module_map = _by_table(table, by_path, leaves)
    else:
        module_map = _by_mapping(names, table, by_path, leaves)
    first = "".join(table.prefixes[:1])
    return replace(module_map, scanned=scanned, prefix=first if prefix is None else prefix)


def _by_table(
    names: NameTable, by_path: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]
) -> ModuleMap:
    modules: dict[str, dict[int, ModuleReference]] = {}
    attention, by_head = {}, set()
    parameters = _parameters(names, names.parameters, base)
    raw = {own.path for parts in parameters.values() for own in parts}
    for path, every in by_path.items():
        leaves = {name: leaf for name, leaf in every.items() if f"{path}/{name}" not in raw}
        if not leaves:
            continue
        try:
            source = names.module(path)
        except UserError:
            continue  # a module without counterpart, such as another head
        index = source.part[0] if source.part else 0  # a fused module may lack some of its parts
        modules.setdefault(source.name, {})[index] = ModuleReference(path, leaves)
        by_head |= {source.name} if source.by_head else set()
        # An attention module may have no parameters itself: its query tells where it is.
        if path.endswith("/query"):
            attention[source.name.rpartition(".")[0]] = path.removesuffix("/query")
    if not modules and not raw:
        raise UserError(
            f"names has none of the base's modules {', '.join(list(by_path)[:3])}; give the NAMES "
            "of the model's package (of a BERT with a head, adapters_jax.finetune.models.bert."
            "FAMILY.classifier.names), and the parameters of that model"
        )
    ordered = {
        name: in_parts([each[i] for i in sorted(each)], name in by_head)
        for name, each in modules.items()
    }
    tied = names.tied  # a classifier of sequences has another head, which is no embedding
    if tied and (tied[1] not in modules or any(head in modules for head in (tied[0], *HEADS))):
        tied = None
    stacked = _parameters(names, names.stacked, base)
    return ModuleMap(ordered, attention, base, names, tied, parameters=parameters, stacked=stacked)


def _parameters(
    names: NameTable, rules: tuple[ParameterRule, ...], base: Mapping[str, Any]
) -> Parameters:
    """Our parameters by the names that rules give them, in the rules' order."""
    found: dict[str, tuple[ParameterReference, ...]] = {}
    inside = {path: own for path in base if (own := names.parameter(path, rules))}
    for path, (number, name) in sorted(inside.items(), key=lambda item: item[1]):
        one = _parameter(path, base[path], *rules[number][2:])
        found[name] = (*found.get(name, ()), one)
    return found


def _parameter(
    path: str,
    leaf: Any,
    swapped: bool = False,
    is_transposed: bool | None = None,
    part: tuple[int, int] | None = None,
) -> ParameterReference:
    said = not swapped if is_transposed is None else is_transposed
    own = Span(part[0], part[0] + 1, part[1]) if part else WHOLE
    return ParameterReference(path, tuple(leaf.shape), swapped, said, own)


def in_parts(
    references: Sequence[ModuleReference], by_head: bool = False
) -> tuple[ModuleReference, ...]:
    """Modules of ours that one of theirs fuses, each with its part of the outputs."""
    if len(references) == 1:
        return tuple(references)
    blocks = references[0].shape[-2] if by_head else 1
    parts = spans([math.prod(each.shape) for each in references], blocks)
    return tuple(replace(each, part=part) for each, part in zip(references, parts, strict=True))


def _by_mapping(
    names: Mapping[str, str | Sequence[str]],
    table: NameTable,
    by_path: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any],
) -> ModuleMap:
    modules, attention, parameters, problems = {}, {}, {}, []
    named: dict[str, str] = {}
    tied = None
    if prefixed := [theirs for theirs in names if str(theirs).startswith(_WRAPPER)]:
        raise UserError(
            f"names has {prefixed[0]!r}; write {prefixed[0].removeprefix(_WRAPPER)!r}, a module's "
            "name without the prefix that PEFT's files add"
        )
    for theirs, ours in names.items():
        paths = [ours] if isinstance(ours, str) else list(ours)
        other = named.setdefault(paths[0], theirs)
        if other != theirs and len(paths) == 1 and "embedding" in by_path.get(paths[0], ()):
            tied = (theirs, other)
        elif all(path in by_path for path in paths):
            modules[theirs] = in_parts([ModuleReference(path, by_path[path]) for path in paths])
        elif len(paths) == 1 and paths[0] in base:
            kernel = paths[0].endswith("/kernel")
            parameters[theirs] = (_parameter(paths[0], base[paths[0]], swapped=kernel),)
        elif len(paths) == 1 and any(path.startswith(f"{paths[0]}/") for path in by_path):
            attention[theirs] = paths[0]
        else:
            near = difflib.get_close_matches(paths[0], [*by_path, *base], 3) or list(by_path)[:3]
            problems.append(f"{theirs!r} to {ours!r} (nearest: {', '.join(near)})")
    if problems:
        raise UserError(f"names maps to paths that the base does not have: {'; '.join(problems)}")
    return ModuleMap(modules, attention, base, table, tied, parameters=parameters)


@dataclass(frozen=True)
class _Row:
    """One layer of a stacked array, sliced only when its values are used."""

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
    """One layer of a stacked array; abstract if the array is."""
    if hasattr(stacked, "__array__"):
        return _Row(stacked, number)
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)


def as_in_model(
    methods: Sequence[Method], leaves: Leaves, module_map: ModuleMap
) -> tuple[Recipe, Tree]:
    """Returns recipe and tree for the base, stacking unrolled layers if the base scans them.

    Raises:
        UserError: the base scans its layers, but the adapter differs between layers.
    """
    recipe, tree = Recipe(*methods), unflatten({k: jnp.asarray(x) for k, x in leaves.items()})
    if not module_map.scanned:
        return recipe, tree
    return stack_layers((recipe, tree), module_map.table, length=module_map.scanned)


def as_in_file(
    recipe: Recipe | Method, leaves: Mapping[str, Array], module_map: ModuleMap
) -> tuple[Recipe, Leaves]:
    """Returns recipe and leaves of unrolled layers, unstacking those of a scanned base.

    An AdaLoRA is the LoRA with the same change, which every library reads.
    """
    recipe, leaves = _as_lora(Recipe(recipe), leaves)
    if not module_map.scanned:
        return recipe, leaves
    unrolled, tree = unstack_layers((recipe, unflatten(leaves)), module_map.table)
    return unrolled, flatten(tree)


def _as_lora(recipe: Recipe, leaves: Mapping[str, Array]) -> tuple[Recipe, Leaves]:
    """An adapter whose AdaLoRAs are LoRAs with the same change: l is in B.

    Raises:
        UserError: leaves of an AdaLoRA are missing.

    Example:
        >>> node = {"a": np.ones((3, 1)), "lambda": np.full(1, 2.0), "b": np.ones((1, 2))}
        >>> leaves = {f"q/adalora/{name}": x for name, x in node.items()}
        >>> recipe, made = _as_lora(Recipe(AdaLoRA("q", 1)), leaves)
        >>> sorted(made), made["q/lora/b"].tolist()
        (['q/lora/a', 'q/lora/b'], [[2.0, 2.0]])
    """
    made = dict(leaves)
    owners = [own for own in recipe.owners(leaves).values() if isinstance(own.method, AdaLoRA)]
    for own in {each.prefix: each for each in owners}.values():
        node = {name: made.pop(path, None) for name, path in own.paths().items()}
        if lacking := [name for name, x in node.items() if x is None]:
            raise UserError(f"{own.path} lacks {', '.join(lacking)} of its AdaLoRA")
        prefix = join(own.module, as_lora(own.method).slot, own.node)
        made |= {join(prefix, name): x for name, x in folded(node).items()}
    return Recipe(*(as_lora(m) if isinstance(m, AdaLoRA) else m for m in recipe)), made


def placed(
    recipe: Recipe, leaves: Mapping[str, Array], module_map: ModuleMap, problems: list[str]
) -> tuple[Placements, Leaves]:
    """Where the methods of an adapter are in the base, and the base's own leaves that train."""
    owners = recipe.owners(leaves)
    trained = {p: leaf for p, leaf in leaves.items() if p not in owners and recipe.trains(p)}
    if frozen := [path for path in leaves if path not in owners and path not in trained]:
        problems.append(
            f"the recipe does not train {len(frozen)} of these leaves, such as {frozen[0]}; give "
            "the trained part alone: adapters, _ = aj.partition(params, recipe)"
        )
    incomplete = set()
    for owner in {each.prefix: each for each in owners.values() if not each.shared}.values():
        names = [name for name, path in owner.paths().items() if path not in leaves]
        if names:
            incomplete.add(owner.prefix)
            problems.append(f"{owner.path} lacks {', '.join(sorted(names))}")
    whole = {path: leaves[path] for path, own in owners.items() if own.prefix not in incomplete}
    shapes = {path: tuple(x.shape) for path, x in {**module_map.base, **whole}.items()}
    try:
        found = in_tree(recipe, shapes)
        if several := found.several():
            problems.append(
                f"{first_few(several)}, and the file holds one for a module; write the recipe of "
                "one name, recipe['...'], or the sum of LoRAs, aj.combine"
            )
        return found, trained
    except MismatchError as problem:
        problems.append(str(problem))
        return Placements(), trained


def our_leaves(
    key: str,
    kind: str,
    tensor: Array,
    references: Sequence[ModuleReference],
    fan_in_fan_out: bool,
    problems: list[str],
) -> Leaves:
    """The base's leaves by path that a tensor of theirs holds, called `key` in the problems.

    Its kind is "weight" or "bias"; each of our modules gets its part of it.
    """
    found: Leaves = {}
    for reference in references:
        leaf = "bias" if kind == "bias" else reference.weight
        fits = leaf in reference.leaves and kind in ("bias", "weight")
        array = our_leaf(reference, leaf, tensor, fan_in_fan_out) if fits else None
        if array is None:
            ours = f" {list(reference.leaves[leaf].shape)}" if leaf in reference.leaves else ""
            problems.append(
                f"{key} is {list(tensor.shape)}, which does not fit {reference.path}{ours}"
            )
        else:
            found[f"{reference.path}/{leaf}"] = array
    return found


def their_leaves(
    parts: Sequence[ModuleReference],
    names: Iterable[str],
    trained: Mapping[str, Array],
    base: Mapping[str, Any],
    fan_in_fan_out: bool,
    problems: list[str],
) -> dict[str, Array]:
    """Their tensors `weight` and `bias` of a module that is saved whole; undoes `our_leaves`.

    Leaves that do not train have the base's values.
    """
    found = {}
    for name in names:
        arrays = []
        for path in (f"{part.path}/{name}" for part in parts):
            own = trained.get(path, base[path])
            if not hasattr(own, "__array__"):
                problems.append(
                    f"{path} is saved with its module: give a base with values, not only shapes"
                )
                own = np.zeros(own.shape, np.float32)
            arrays.append(np.asarray(own))
        kind = "bias" if name == "bias" else "weight"
        found[kind] = their_leaf(name, arrays, fan_in_fan_out, parts[0].blocks)
    return found


def as_in_base(leaves: Mapping[str, Array], module_map: ModuleMap) -> bool:
    """Whether leaves equal the base's, which some files repeat."""
    both: Iterable[tuple[Array, Any]] = [(x, module_map.base[path]) for path, x in leaves.items()]
    return all(hasattr(own, "__array__") and np.array_equal(x, own) for x, own in both)
