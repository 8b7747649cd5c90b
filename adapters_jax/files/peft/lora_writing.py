"""LoRA and DoRA into PEFT's files: factors, ranks and alphas of every module and parameter.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_jax.files.layouts import Array, ModuleReference, rounded, their_factors
from adapters_jax.files.module_map import Added, ModuleMap, in_order
from adapters_jax.files.names import ROW
from adapters_jax.files.peft.config import NOT_ON_PARAMETERS, ROOT
from adapters_jax.files.peft.experts import modules_of
from adapters_jax.files.peft.parameters import WRITTEN, module_of, nested, their_pair
from adapters_jax.methods.leaf import axes_of
from adapters_jax.placement import in_tree
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join
from adapters_jax.weights.axes import Axes

Tensors = dict[str, Array]
_THEIR_STARTS = {"gaussian_rank": "gaussian"}


@dataclass(frozen=True)
class _Pair:
    """The factors of one of our weights, with its inputs before its outputs.

    Attributes:
        method: the LoRA or DoRA.
        target: the path of its target, by which the method has its scale.
        leaves: its leaves by name.
    """

    method: Any
    target: str
    leaves: Mapping[str, Array]

    @property
    def scale(self) -> float:
        return self.method.scale_at(self.target)


@dataclass(frozen=True)
class _Numbers:
    """The rank and the alpha of every module and parameter in the file."""

    rank_stabilized: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    def add(self, name: str, rank: int, scale: float) -> None:
        self.ranks[name] = rank
        self.alphas[name] = rounded(scale * (math.sqrt(rank) if self.rank_stabilized else rank))


def write(
    recipe: Recipe,
    added: Added,
    leaves: Mapping[str, Array],
    module_map: ModuleMap,
    prefix: str | None,
    problems: list[str],
) -> tuple[dict[str, Any], Tensors]:
    """Returns the fields, and the factors of every module and parameter."""
    methods: list[Any] = list(recipe.attached)
    if len({(m.dropout, m.rank_stabilized) for m in methods}) > 1:
        problems.append(
            "PEFT has one dropout and one rank_stabilized for all modules; these differ"
        )
    if any(m.a_init == "pissa" for m in methods):
        problems.append(
            "a_init='pissa' changed the base's weights, but PEFT adapts the original base"
        )
    pairs = _pairs(recipe, added, leaves, module_map, problems)
    numbers = _Numbers(methods[0].rank_stabilized, {}, {})
    tensors = _of_modules(pairs, module_map, prefix, numbers, problems)
    tensors |= _of_experts(pairs, module_map, prefix, numbers, problems)
    modules = set(numbers.ranks)
    tensors |= _of_parameters(pairs, module_map, prefix, numbers, problems)
    parameters = sorted(numbers.ranks.keys() - modules, key=in_order)
    unknown = sorted(pair.target for pair in pairs.values())
    problems += [f"names has no name for {path}; add it" for path in unknown]
    fields = _fields(methods, numbers, sorted(modules, key=in_order), module_map)
    if parameters:
        fields |= {"target_parameters": parameters, "peft_version": WRITTEN}
        problems += [
            f"{parameters[0]}: PEFT does not support {field}={fields[field]!r} on parameters"
            for field in NOT_ON_PARAMETERS
            if fields[field]
        ]
    if module_map.tied and module_map.full(module_map.tied[0], prefix) in modules:
        fields["ensure_weight_tying"] = True
    return fields, tensors


def _pairs(
    recipe: Recipe,
    added: Added,
    leaves: Mapping[str, Array],
    module_map: ModuleMap,
    problems: list[str],
) -> dict[str, _Pair]:
    """The factors of each weight, by its path; only those of `added`, which are complete."""
    owners = {path: owner for path in leaves if (owner := recipe.owner(path))}
    complete = {path: leaves[path] for path, owner in owners.items() if owner.path in added}
    shapes = {path: tuple(x.shape) for path, x in {**module_map.base, **complete}.items()}
    pairs = {}
    for each in in_tree(recipe, shapes):
        if each.method.acts_on != "leaf":
            continue
        own = _inputs_first(each.method, axes_of(each.point()), each.leaves(leaves))
        if own is None:
            shape = list(each.shape)
            problems.append(f"{each.path}: PEFT cannot take the axes of its weight {shape}")
            continue
        pairs[each.weight_path] = _Pair(each.method, each.path, own)
    return pairs


def _inputs_first(
    method: Any, axes: Axes, leaves: Mapping[str, Array]
) -> Mapping[str, Array] | None:
    """Leaves as of a weight whose inputs come before its outputs; None where there are none such.

    A weight whose outputs come first has the same change with A and B the other way round.
    """
    every, n = tuple(range(axes.ndim)), len(axes.shared)
    if (*axes.shared, *axes.inputs, *axes.outputs) == every:
        return leaves
    backwards = (*axes.shared, *axes.outputs, *axes.inputs) == every
    if not backwards or method.slices or leaves.keys() != {"a", "b"}:
        return None
    return {"a": np.moveaxis(leaves["b"], n, -1), "b": np.moveaxis(leaves["a"], -1, n)}


def _of_modules(
    pairs: dict[str, _Pair],
    module_map: ModuleMap,
    prefix: str | None,
    numbers: _Numbers,
    problems: list[str],
) -> Tensors:
    """The factors of PEFT's modules; takes them out of `pairs`."""
    tensors: Tensors = {}
    for bare, parts in module_map.modules.items():
        mine = [pairs.pop(join(each.path, each.weight), None) for each in parts]
        present = [pair for pair in mine if pair]
        wrong = [p for p, pair in zip(parts, mine, strict=True) if pair and not _fits(p, pair)]
        problems += [f"{p.path}: its factors do not fit its weight {list(p.shape)}" for p in wrong]
        if wrong or not present:
            continue
        name = module_map.full(bare, prefix)
        a, b, scale = _factors(parts, mine)
        numbers.add(name, len(a), scale)
        tensors |= _named(name, parts[0], a, b)
        if present[0].method.name == "dora":
            if len(present) < len(parts):
                problems.append(f"{bare}: PEFT's DoRA adapts all parts of a module or none")
                continue
            magnitudes = [pair.leaves["magnitude"].ravel() for pair in present]
            tensors[f"{ROOT}{name}.lora_magnitude_vector"] = _magnitude(magnitudes, a)
        if module_map.tied and bare == module_map.tied[1]:
            if present[0].method.name == "dora":
                problems.append(f"{parts[0].path}: PEFT's DoRA does not adapt a tied embedding")
            head = module_map.full(module_map.tied[0], prefix)
            numbers.add(head, len(a), scale)
            tensors |= {f"{ROOT}{head}.lora_A.weight": b.T, f"{ROOT}{head}.lora_B.weight": a.T}
    return tensors


def _of_experts(
    pairs: dict[str, _Pair],
    module_map: ModuleMap,
    prefix: str | None,
    numbers: _Numbers,
    problems: list[str],
) -> Tensors:
    """The factors of experts, each of which is a module of PEFT's; takes them out of `pairs`."""
    tensors: Tensors = {}
    for name, reference in module_map.parameters.items():
        pair = pairs.pop(reference.path, None) if ROW in name else None
        if pair is None:
            continue
        if pair.method.slices or pair.leaves.keys() != {"a", "b"}:
            problems.append(f"{reference.path}: PEFT's files of experts have LoRA without slices")
            continue
        a, b = pair.leaves["a"], pair.leaves["b"]
        for i, module in enumerate(modules_of(name, reference.shape[0])):
            full = module_map.full(module, prefix)
            numbers.add(full, a.shape[-1], pair.scale)
            tensors |= {
                f"{ROOT}{full}.lora_A.weight": a[i].T,
                f"{ROOT}{full}.lora_B.weight": b[i].T,
            }
    return tensors


def _of_parameters(
    pairs: dict[str, _Pair],
    module_map: ModuleMap,
    prefix: str | None,
    numbers: _Numbers,
    problems: list[str],
) -> Tensors:
    """The factors of parameters, of which PEFT nests those of one module; see `parameters`."""
    tensors: Tensors = {}
    mine = [name for name, own in module_map.parameters.items() if own.path in pairs]
    for module in dict.fromkeys(map(module_of, mine)):
        names = [name for name in mine if module_of(name) == module]
        full = module_map.full(module, prefix)
        if full in numbers.ranks:
            paths = ", ".join(module_map.parameters[name].path for name in names)
            problems.append(f"{paths}: PEFT adapts {full} or parameters in it, not both")
        for key, name in zip(nested(full, len(names)), names, strict=True):
            reference = module_map.parameters[name]
            pair = pairs.pop(reference.path)
            a, b, shape = pair.leaves["a"], pair.leaves["b"], reference.shape
            fits = (*a.shape[:-1], b.shape[-1]) == shape and len(shape) in (2, 3) and module
            if not fits or pair.method.slices:
                problems.append(
                    f"{reference.path} of {list(shape)} has factors {list(a.shape)} and "
                    f"{list(b.shape)}; PEFT adapts whole parameters of modules, (in, out) or "
                    "(experts, in, out)"
                )
                continue
            a_theirs, b_theirs = their_pair(reference, a, b)
            tensors |= {f"{ROOT}{key}.lora_A.weight": a_theirs}
            tensors |= {f"{ROOT}{key}.lora_B.weight": b_theirs}
            numbers.add(f"{full}.{name.rpartition('.')[2]}", a.shape[-1], pair.scale)
    return tensors


def _fits(reference: ModuleReference, pair: _Pair) -> bool:
    """Whether factors fit one weight; those of stacked layers do not."""
    inputs, outputs = pair.leaves["a"].shape[:-1], pair.leaves["b"].shape[1:]
    sliced = pair.method.slices
    return inputs + outputs == reference.shape or (sliced and inputs == reference.shape[:-1])


def _factors(
    parts: Sequence[ModuleReference], mine: Sequence[_Pair | None]
) -> tuple[Array, Array, float]:
    """Returns A, B and the scale of one of PEFT's modules, which may fuse several of ours.

    If all parts share one A, it is written once and their Bs are stacked. Otherwise each part gets
    its own rows of A, and B has zeros for the rows of the others.
    """
    made: list[tuple[Array, Array] | None] = []
    scales: list[float] = []
    for reference, own in zip(parts, mine, strict=True):
        if own is None:
            made.append(None)
            continue
        scales.append(own.scale)
        a, b = their_factors(reference, own.leaves, own.method.slices)
        made.append((a, b if scales[-1] == scales[0] else b * (scales[-1] / scales[0])))
    if len(made) == 1 and made[0]:
        return *made[0], scales[0]
    present = [pair for pair in made if pair]
    shared = all(np.array_equal(a, present[0][0]) for a, _ in present)
    a = present[0][0] if shared else np.concatenate([a for a, _ in present])
    rows, start = [], 0
    for reference, pair in zip(parts, made, strict=True):
        block = np.zeros((reference.width, len(a)), a.dtype)
        if pair:
            block[:, start : start + len(pair[0])] = pair[1]
            start += 0 if shared else len(pair[0])
        rows.append(block)
    return a, np.concatenate(rows), scales[0]


def _named(name: str, reference: ModuleReference, a: Array, b: Array) -> Tensors:
    if reference.weight == "embedding":
        return {f"{ROOT}{name}.lora_embedding_A": a, f"{ROOT}{name}.lora_embedding_B": b}
    return {f"{ROOT}{name}.lora_A.weight": a, f"{ROOT}{name}.lora_B.weight": b}


def _magnitude(parts: Sequence[Array], a: Array) -> Array:
    """The magnitudes of all outputs; for a convolution they lie along the second axis."""
    whole = np.concatenate(parts)
    return whole if a.ndim == 2 else whole.reshape(1, -1, *(1,) * (a.ndim - 2))


def _fields(
    methods: Sequence[Any], numbers: _Numbers, modules: Sequence[str], module_map: ModuleMap
) -> dict[str, Any]:
    """Returns the configuration: the commonest rank and alpha, and patterns for the others."""
    ranks, alphas = numbers.ranks, numbers.alphas
    (rank, _), *_ = Counter(ranks.values()).most_common(1) or [(methods[0].rank, 0)]
    (alpha, _), *_ = Counter(alphas.values()).most_common(1) or [(rank, 0)]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": methods[0].dropout,
        "use_rslora": methods[0].rank_stabilized,
        "use_dora": methods[0].name == "dora",
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(modules),
        "fan_in_fan_out": module_map.fan_in_fan_out,
        "init_lora_weights": _THEIR_STARTS.get(methods[0].a_init, True),
    }
