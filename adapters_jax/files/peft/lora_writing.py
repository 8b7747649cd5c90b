"""LoRA and DoRA into PEFT's files: factors, ranks and alphas of every module and parameter.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.files.layouts import (
    Array,
    ModuleReference,
    ParameterReference,
    joined,
    rounded,
    their_factors,
)
from adapters_jax.files.module_map import Leaves, ModuleMap, Parameters
from adapters_jax.files.patterns import in_order
from adapters_jax.files.peft.config import NOT_ON_PARAMETERS, ROOT, factor_keys
from adapters_jax.files.peft.parameters import WRITTEN, fused_pair, module_of, nested, their_pair
from adapters_jax.methods.lora import CHANGING
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join
from adapters_jax.weights.axes import Axes

Factors = Mapping[str, Array]
_THEIR_STARTS = {"gaussian_rank": "gaussian"}


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, and the factors of every module and parameter."""
    methods: list[Any] = list(recipe.attached)
    if len({(m.dropout, m.rank_stabilized) for m in methods}) > 1:
        problems.append(
            "PEFT has one dropout and one rank_stabilized for all modules; these differ"
        )
    problems += [
        f"a_init={start!r} changed the base's weights, but PEFT adapts the original base"
        for start in CHANGING
        if any(m.a_init == start for m in methods)
    ]
    if len({getattr(m, "invocation", ()) for m in methods}) > 1:
        problems.append("PEFT has one alora_invocation_tokens for all modules; these differ")
    pairs = _pairs(added, leaves, problems)
    writer = _Writer(module_map, pairs, methods[0].rank_stabilized, problems)
    if module_map.table.stacks:
        writer.add_parameters(module_map.stacked)
    writer.add_modules()
    writer.add_experts()
    writer.add_parameters(module_map.parameters)
    parameters = sorted(writer.parameters, key=in_order)
    modules = writer.ranks.keys() - set(parameters)
    unknown = sorted(pair.target for pair in pairs.values())
    problems += [*map(module_map.unnamed, unknown)]
    fields = _fields(methods, writer, sorted(modules, key=in_order))
    if methods[0].gated:
        # PEFT looks for the invocation in the calls of its class of this task alone.
        tokens = list(methods[0].invocation)
        fields |= {"alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"}
    if parameters:
        fields |= {"target_parameters": parameters, "peft_version": WRITTEN}
        problems += [
            f"{parameters[0]}: PEFT does not support {field}={fields[field]!r} on parameters"
            for field in NOT_ON_PARAMETERS
            if fields.get(field)
        ]
    if module_map.tied and module_map.full(module_map.tied[0]) in modules:
        fields["ensure_weight_tying"] = True
    return fields, writer.tensors


def _fields(methods: Sequence[Any], writer: "_Writer", modules: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration: the commonest rank and alpha, and patterns for the others."""
    ranks, alphas = writer.ranks, writer.alphas
    # Some servers ignore patterns, so as few modules as possible need one.
    (rank, _), *_ = Counter(ranks.values()).most_common(1) or [(methods[0].rank, 0)]
    (alpha, _), *_ = Counter(alphas.values()).most_common(1) or [(rank, 0)]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": methods[0].dropout,
        "use_rslora": methods[0].rank_stabilized,
        "use_dora": methods[0].kind == "dora",
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(modules),
        "fan_in_fan_out": writer.module_map.table.fan_in_fan_out,
        "init_lora_weights": _THEIR_STARTS.get(methods[0].a_init, True),
    }


class _Pair(NamedTuple):
    """The factors of one of our weights, with its inputs before its outputs.

    Attributes:
        target: the path of its target, by which the method has its scale.
    """

    method: Any
    target: str
    leaves: Factors

    @property
    def scale(self) -> float:
        return self.method.scale_at(self.target)


def _pairs(added: Placements, leaves: Leaves, problems: list[str]) -> dict[str, _Pair]:
    """The factors of each weight, by its path."""
    pairs = {}
    for each in added:
        own = _inputs_first(each.method, each.point().axes, each.leaves(leaves))
        if own is None:
            shape = list(each.shape)
            problems.append(f"{each.path}: PEFT cannot take the axes of its weight {shape}")
            continue
        pairs[each.weight_path] = _Pair(each.method, each.path, own)
    return pairs


def _inputs_first(method: Any, axes: Axes, leaves: Factors) -> Factors | None:
    """Leaves as of a weight whose inputs come before its outputs; None where that cannot be.

    A weight whose outputs come first has the same change with A and B the other way round.
    """
    every, n = tuple(range(axes.ndim)), len(axes.shared)
    if (*axes.shared, *axes.inputs, *axes.outputs) == every:
        return leaves
    backwards = (*axes.shared, *axes.outputs, *axes.inputs) == every
    if not backwards or method.slices or leaves.keys() != {"a", "b"}:
        return None
    return {"a": np.moveaxis(leaves["b"], n, -1), "b": np.moveaxis(leaves["a"], -1, n)}


@dataclass(frozen=True)
class _Writer:
    """PEFT's tensors, and the rank and the alpha of every module and parameter, added so far.

    What is added leaves `pairs`, which has the rest by the paths of our weights.
    """

    module_map: ModuleMap
    pairs: dict[str, _Pair]
    rank_stabilized: bool
    problems: list[str]
    tensors: dict[str, Array] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def number(self, name: str, rank: int, scale: float) -> None:
        """Adds the numbers of a module or a parameter."""
        self.ranks[name] = rank
        self.alphas[name] = rounded(scale * (math.sqrt(rank) if self.rank_stabilized else rank))

    def factors(self, key: str, a: Array, b: Array, of_embedding: bool = False) -> None:
        """Adds A and B."""
        self.tensors.update(zip(factor_keys(key, of_embedding), (a, b), strict=True))

    def add_modules(self) -> None:
        """Adds the factors of PEFT's modules, which may fuse several of ours."""
        module_map, problems = self.module_map, self.problems
        for bare, parts in module_map.modules.items():
            mine = [self.pairs.pop(join(each.path, each.weight), None) for each in parts]
            present = [pair for pair in mine if pair]
            both = list(zip(parts, mine, strict=True))
            wrong = [part for part, pair in both if pair and not _fits(part, pair)]
            problems += [
                f"{p.path}: its factors do not fit its weight {list(p.shape)}" for p in wrong
            ]
            if wrong or not present:
                continue
            name, is_dora = module_map.full(bare), present[0].method.kind == "dora"
            a, b, scale = _fused(both)
            self.number(name, len(a), scale)
            self.factors(name, a, b, of_embedding=parts[0].weight == "embedding")
            if is_dora and len(present) < len(parts):
                problems.append(f"{bare}: PEFT's DoRA adapts all parts of a module or none")
                continue
            if is_dora:
                lengths = [pair.leaves["magnitude"].ravel() for pair in present]
                whole = joined(lengths, parts[0].blocks)
                # The magnitudes of a convolution lie along its second axis.
                shape = (-1,) if a.ndim == 2 else (1, -1, *(1,) * (a.ndim - 2))
                self.tensors[f"{ROOT}{name}.lora_magnitude_vector"] = whole.reshape(shape)
            if module_map.tied and bare == module_map.tied[1]:
                if is_dora:
                    problems.append(f"{parts[0].path}: PEFT's DoRA does not adapt a tied embedding")
                head = module_map.full(module_map.tied[0])
                self.number(head, len(a), scale)
                self.factors(head, b.T, a.T)

    def add_experts(self) -> None:
        """Adds the factors of experts; each expert is a module of PEFT's."""
        for path, modules in self.module_map.rows.items():
            pair = self.pairs.pop(path, None)
            if pair is None:
                continue
            if pair.method.slices or pair.leaves.keys() != {"a", "b"}:
                self.problems.append(f"{path}: PEFT's files of experts have LoRA without slices")
                continue
            a, b = pair.leaves["a"], pair.leaves["b"]
            for i, module in enumerate(modules):
                name = self.module_map.full(module)
                self.number(name, a.shape[-1], pair.scale)
                self.factors(name, a[i].T, b[i].T)

    def add_parameters(self, parameters: Parameters) -> None:
        """Adds the factors of parameters; PEFT nests those of one module, see `parameters`."""
        mine = [n for n, parts in parameters.items() if any(x.path in self.pairs for x in parts)]
        for module in dict.fromkeys(map(module_of, mine)):
            names = [name for name in mine if module_of(name) == module]
            full = self.module_map.full(module)
            if full in self.ranks:
                paths = ", ".join(each.path for name in names for each in parameters[name])
                self.problems.append(f"{paths}: PEFT adapts {full} or parameters in it, not both")
            for key, name in zip(nested(full, len(names)), names, strict=True):
                parts = [(own, self.pairs.pop(own.path, None)) for own in parameters[name]]
                wrong = [own for own in parts if not (module and _fits_whole(*own))]
                self.problems.extend(_misfit(*own) for own in wrong if own[1])
                if wrong:
                    continue
                scale = next(pair.scale for _, pair in parts if pair)
                a, b = fused_pair([(x.shape, pair and _scaled(pair, scale)) for x, pair in parts])
                self.factors(key, *their_pair(parts[0][0], a, b))
                own_name = f"{full}.{name.rpartition('.')[2]}"
                self.number(own_name, a.shape[-1], scale)
                self.parameters.append(own_name)


def _fits_whole(reference: ParameterReference, pair: _Pair | None) -> bool:
    """Whether factors, if any, are those of a whole `(in, out)` or `(experts, in, out)`."""
    if pair is None:
        return True
    a, b, shape = pair.leaves["a"], pair.leaves["b"], reference.shape
    fits = (*a.shape[:-1], b.shape[-1]) == shape and len(shape) in (2, 3)
    return fits and not pair.method.slices


def _misfit(reference: ParameterReference, pair: Any) -> str:
    a, b = pair.leaves["a"], pair.leaves["b"]
    return (
        f"{reference.path} of {list(reference.shape)} has factors {list(a.shape)} and "
        f"{list(b.shape)}; PEFT adapts whole parameters of modules, (in, out) or "
        "(experts, in, out)"
    )


def _scaled(pair: _Pair, scale: float) -> Factors:
    """A and B for another scale with the same change."""
    b = pair.leaves["b"]
    return {"a": pair.leaves["a"], "b": b if pair.scale == scale else b * (pair.scale / scale)}


def _fits(reference: ModuleReference, pair: _Pair) -> bool:
    """Whether factors fit one weight; those of stacked layers do not."""
    inputs, outputs = pair.leaves["a"].shape[:-1], pair.leaves["b"].shape[1:]
    sliced = pair.method.slices
    return inputs + outputs == reference.shape or (sliced and inputs == reference.shape[:-1])


def _fused(parts: Sequence[tuple[ModuleReference, _Pair | None]]) -> tuple[Array, Array, float]:
    """Returns A, B and the scale of one of PEFT's modules, which may fuse several of ours."""
    scale = next(pair.scale for _, pair in parts if pair)
    made = [x and their_factors(own, _scaled(x, scale), x.method.slices) for own, x in parts]
    if len(made) == 1 and made[0]:
        return *made[0], scale
    turned = [pair and {"a": pair[0].T, "b": pair[1].T} for pair in made]
    sizes = ((0, reference.width) for reference, _ in parts)
    a, b = fused_pair([*zip(sizes, turned, strict=True)], parts[0][0].blocks)
    return a.T, b.T.reshape(*b.T.shape, *(1,) * (a.ndim - 2)), scale
