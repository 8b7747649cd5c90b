"""LoRA and DoRA in PEFT's files: factors, ranks and alphas of every module.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapters_jax.interop.layouts import Array, ModuleReference, our_factors, rounded, their_factors
from adapters_jax.interop.module_map import Added, ModuleMap, in_order, shortest
from adapters_jax.interop.peft.config import ROOT, STARTS, TIED, Config, is_target, number_at, value
from adapters_jax.methods import DoRA, LoRA, Method
from adapters_jax.recipe import Recipe

Tensors = dict[str, Array]
LEAVES = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
}
_THEIR_STARTS = {"gaussian_rank": "gaussian"}


def read(
    config: Config,
    added: Mapping[str, Mapping[str, Array]],
    module_map: ModuleMap,
    problems: list[str],
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one LoRA or DoRA for all modules, with patterns where ranks or alphas differ."""
    leaves: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, found in added.items():
        rank = number_at(config, "r", "rank_pattern", module)
        problem = _misfit(config, module, found, rank, module_map)
        for reference in () if problem else module_map.at(module):
            factors = our_factors(reference, found["a"], found["b"], found.get("magnitude"))
            if factors is None:
                problem = _shape_problem(module, found, reference)
                break
            leaves |= {
                f"{reference.path}/lora/{k}": x.astype(np.float32) for k, x in factors.items()
            }
            ranks[reference.path] = rank
            alphas[reference.path] = number_at(config, "lora_alpha", "alpha_pattern", module)
        problems += [problem] if problem else []
    if not ranks:
        problems += [] if problems else ["the file has no LoRA factors"]
        return [], leaves
    method = (DoRA if config.get("use_dora") else LoRA)(
        shortest(ranks, module_map.paths),
        rank=value(config, "r"),
        alpha=value(config, "lora_alpha"),
        dropout=value(config, "lora_dropout"),
        a_init=STARTS[value(config, "init_lora_weights")],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=_pattern(ranks, value(config, "r")),
        alpha_pattern=_pattern(alphas, value(config, "lora_alpha")),
    )
    return [method], leaves


def _misfit(
    config: Config, module: str, found: Mapping[str, Array], rank: int, module_map: ModuleMap
) -> str | None:
    """The problem of a module's factors, if any, apart from their shapes."""
    expected = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    there = module_map.at(module)
    if found.keys() != expected:
        return (
            f"{module} has the tensors of {', '.join(sorted(found))}, expected {sorted(expected)}"
        )
    if not there:
        return f"names maps {module} to no layer of the base"
    if found["a"].ndim < 2 or found["b"].ndim < 2:
        return _shape_problem(module, found, there[0])
    if not is_target(config, module):
        return f"{module} has factors but is not among the target modules"
    if len(found["a"]) != rank:
        return f"{module} has rank {len(found['a'])}, expected {rank} by the configuration"
    if there[0].weight == "embedding" and "magnitude" in expected:
        return f"{module}: DoRA on an embedding is not supported"
    if there[0].weight == "embedding" and module_map.tied:
        return TIED.format(module)
    return None


def _shape_problem(module: str, found: Mapping[str, Array], reference: ModuleReference) -> str:
    """A sentence that names the shapes of factors and weight."""
    names = {"a": "A", "b": "B", "magnitude": "magnitude"}
    shapes = ", ".join(f"{names[name]} {list(x.shape)}" for name, x in found.items())
    path, shape = reference.path, list(reference.shape)
    return f"{module} has {shapes}, which do not fit {path} of {shape}"


def _pattern(numbers: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Patterns of modules for each number that differs from the usual one."""
    others = sorted({number for number in numbers.values() if number != usual})
    groups = {n: [path for path, number in numbers.items() if number == n] for n in others}
    return {pattern: n for n in others for pattern in shortest(groups[n], numbers)}


def write(
    recipe: Recipe, added: Added, module_map: ModuleMap, prefix: str | None, problems: list[str]
) -> tuple[dict[str, Any], Tensors]:
    """Returns the fields, and the factors of every module."""
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    methods: list[Any] = list(recipe.attached)
    if len({(m.dropout, m.rank_stabilized) for m in methods}) > 1:
        problems.append(
            "PEFT has one dropout and one rank_stabilized for all modules; these differ"
        )
    if any(m.a_init == "pissa" for m in methods):
        problems.append(
            "a_init='pissa' changed the base's weights, but PEFT adapts the original base"
        )
    unknown = set(added)
    for bare, parts in module_map.modules.items():
        mine = [added.get(reference.path) for reference in parts]
        unknown -= {reference.path for reference in parts}
        if not any(mine):
            continue
        name = module_map.full(bare, prefix)
        wrong = [
            p for p, each in zip(parts, mine, strict=True) if each and not _fits(recipe, p, each)
        ]
        problems += [f"{p.path}: its factors do not fit its weight {list(p.shape)}" for p in wrong]
        if parts[0].weight == "embedding" and module_map.tied:
            problems.append(TIED.format(parts[0].path))
            continue
        if wrong:
            continue
        a, b, scale = _factors(recipe, parts, mine)
        ranks[name] = len(a)
        alphas[name] = rounded(
            scale * (math.sqrt(len(a)) if methods[0].rank_stabilized else len(a))
        )
        tensors |= _named(name, parts[0], a, b)
        if methods[0].name == "dora":
            if not all(mine):
                problems.append(f"{bare}: PEFT's DoRA adapts all parts of a module or none")
                continue
            magnitudes = [each["magnitude"].ravel() for each in mine if each]
            tensors[f"{ROOT}{name}.lora_magnitude_vector"] = _magnitude(magnitudes, a)
    problems += [f"names has no module name for {path}; add it" for path in sorted(unknown)]
    return _fields(methods, ranks, alphas, module_map), tensors


def _fits(recipe: Recipe, reference: ModuleReference, leaves: Mapping[str, Array]) -> bool:
    """Whether factors fit one weight; those of stacked layers do not."""
    inputs, outputs = leaves["a"].shape[:-1], leaves["b"].shape[1:]
    sliced = _lora_at(recipe, reference.path).slices
    return inputs + outputs == reference.shape or (sliced and inputs == reference.shape[:-1])


def _factors(
    recipe: Recipe, parts: Sequence[ModuleReference], mine: Sequence[Mapping[str, Array] | None]
) -> tuple[Array, Array, float]:
    """Returns A, B and the scale of one of PEFT's modules, which may fuse several of ours.

    If all parts share one A, it is written once and their Bs are stacked. Otherwise each part gets
    its own rows of A, and B has zeros for the rows of the others.
    """
    made: list[tuple[Array, Array] | None] = []
    scales: list[float] = []
    for reference, leaves in zip(parts, mine, strict=True):
        if leaves is None:
            made.append(None)
            continue
        method = _lora_at(recipe, reference.path)
        scales.append(method.scale_at(reference.path))
        a, b = their_factors(reference, leaves, method.slices)
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
    methods: Sequence[Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    module_map: ModuleMap,
) -> dict[str, Any]:
    """Returns the configuration: the commonest rank and alpha, and patterns for the others."""
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
        "target_modules": sorted(ranks, key=in_order),
        "fan_in_fan_out": module_map.fan_in_fan_out,
        "init_lora_weights": _THEIR_STARTS.get(methods[0].a_init, True),
    }


def _lora_at(recipe: Recipe, path: str) -> Any:
    """The LoRA or DoRA that adapts one module."""
    return next(method for method in recipe.at(path) if method.slot == "lora")
