"""LoRA and DoRA out of PEFT's files: factors, ranks and alphas of every module and parameter.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from adapters_jax.files.layouts import Array, ModuleReference, our_factors
from adapters_jax.files.module_map import ModuleMap, shortest
from adapters_jax.files.peft.config import (
    STARTS,
    TIED,
    Config,
    is_parameter,
    is_target,
    number_at,
    value,
)
from adapters_jax.files.peft.experts import gathered
from adapters_jax.files.peft.parameters import our_pair, parameters_by_key
from adapters_jax.methods import DoRA, LoRA, Method
from adapters_jax.targets import join

LEAVES = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
}


def read(
    config: Config,
    added: Mapping[str, Mapping[str, Array]],
    module_map: ModuleMap,
    problems: list[str],
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one LoRA or DoRA for all targets, with patterns where ranks or alphas differ."""
    leaves: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    added = _without_tied(config, added, module_map, problems)
    added, stacks = gathered(config, added, module_map, problems)
    for path, experts in stacks.items():
        module, _, own = path.rpartition("/")
        node = join(module, "lora", own)
        leaves |= {f"{node}/{k}": x.astype(np.float32) for k, x in experts.pair.items()}
        ranks[path], alphas[path] = experts.rank, experts.alpha
    parameters = parameters_by_key(config, added, module_map, problems)
    problems += _unmatched(config, added, parameters.values())
    for key, found in added.items():
        name = parameters.get(key, key)
        if name is None:
            continue
        numbers = _number_name(config, name)
        rank = number_at(config, "r", "rank_pattern", numbers)
        problem = _lacking(config, name, found)
        if problem is None and key in parameters:
            problem, made = _of_parameter(config, name, found, rank, module_map)
        elif problem is None:
            problem, made = _of_module(config, key, found, rank, module_map)
        if problem is not None:
            problems.append(problem)
            continue
        for path, (prefix, factors) in made.items():
            leaves |= {f"{prefix}/{k}": x.astype(np.float32) for k, x in factors.items()}
            ranks[path] = rank
            alphas[path] = number_at(config, "lora_alpha", "alpha_pattern", numbers)
    if not ranks:
        problems += [] if problems else ["the file has no LoRA factors"]
        return [], leaves
    among = [*module_map.paths, *module_map.base]
    method = (DoRA if config.get("use_dora") else LoRA)(
        shortest(ranks, among),
        rank=value(config, "r"),
        alpha=value(config, "lora_alpha"),
        dropout=value(config, "lora_dropout"),
        a_init=STARTS[value(config, "init_lora_weights")],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=_pattern(ranks, value(config, "r")),
        alpha_pattern=_pattern(alphas, value(config, "lora_alpha")),
    )
    return [method], leaves


def _without_tied(
    config: Config,
    added: Mapping[str, Mapping[str, Array]],
    module_map: ModuleMap,
    problems: list[str],
) -> dict[str, Mapping[str, Array]]:
    """The factors without those of a tied output layer, which repeat the embedding's."""
    if module_map.tied is None:
        return dict(added)
    bare = {module_map.bare(key): key for key in added}
    head, embedding = (bare.get(name) for name in module_map.tied)
    rest = {key: found for key, found in added.items() if key != head}
    alike = head and embedding and _alike(config, added, head, embedding)
    if (head or embedding) and not alike:
        names = (embedding or module_map.tied[1], head or module_map.tied[0])
        problems.append(TIED.format(*names))
        rest.pop(embedding or "", None)
    return rest


def _alike(
    config: Config, added: Mapping[str, Mapping[str, Array]], head: str, embedding: str
) -> bool:
    """Whether an output layer's factors are the embedding's the other way round, as PEFT ties."""
    one, other = added[head], added[embedding]
    numbers = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    scaled = all(number_at(config, *n, head) == number_at(config, *n, embedding) for n in numbers)
    pairs = one.keys() == other.keys() == {"a", "b"}
    return (
        scaled
        and pairs
        and np.array_equal(one["a"], other["b"].T)
        and np.array_equal(one["b"], other["a"].T)
    )


def _unmatched(
    config: Config, added: Iterable[str], parameters: Iterable[str | None]
) -> Iterator[str]:
    """A sentence for each target parameter whose factors the file does not have."""
    names = {*filter(None, parameters), *(f"{module}.weight" for module in added)}
    for target in config.get("target_parameters") or ():
        if not any(is_parameter({"target_parameters": [target]}, name) for name in names):
            yield (
                f"target_parameters={[target]}: names has no such parameter with factors in the "
                "file; add it, as 'layers.0.mlp.experts.down_proj'"
            )


def _number_name(config: Config, name: str) -> str:
    """The name by which patterns give a rank and an alpha: a parameter's, or the module's."""
    return f"{name}.weight" if is_parameter(config, f"{name}.weight") else name


def _lacking(config: Config, name: str, found: Mapping[str, Array]) -> str | None:
    expected = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    if found.keys() == expected:
        return None
    return f"{name} has the tensors of {', '.join(sorted(found))}, expected {sorted(expected)}"


_Made = dict[str, tuple[str, dict[str, Array]]]  # by target: the node's path, and its leaves


def _of_parameter(
    config: Config, name: str, found: Mapping[str, Array], rank: int, module_map: ModuleMap
) -> tuple[str | None, _Made]:
    """The problem of a parameter's factors, or our leaves of them."""
    reference = module_map.parameters[module_map.bare(name)]
    pair = our_pair(reference, found, config.get("peft_version"))
    if len(reference.shape) not in (2, 3) or pair is None:
        return _misfit(name, found, reference.path, reference.shape), {}
    if pair["a"].shape[-1] != rank:
        return _wrong_rank(name, pair["a"].shape[-1], rank), {}
    module, _, own = reference.path.rpartition("/")
    return None, {reference.path: (join(module, "lora", own), pair)}


def _of_module(
    config: Config, module: str, found: Mapping[str, Array], rank: int, module_map: ModuleMap
) -> tuple[str | None, _Made]:
    """The problem of a module's factors, or our leaves of them, for each of its parts."""
    there = module_map.at(module)
    if not there:
        return f"names maps {module} to no layer of the base", {}
    a, b, magnitude = found["a"], found["b"], found.get("magnitude")
    if a.ndim < 2 or b.ndim < 2:
        return _shape_problem(module, found, there[0]), {}
    is_embedding = there[0].weight == "embedding"
    if is_parameter(config, f"{module}.weight"):
        # As a parameter, an embedding and GPT-2's kernels are (out, in) to PEFT.
        a, b = (b.T, a.T) if is_embedding or module_map.fan_in_fan_out else (a, b)
    elif not is_target(config, module):
        return f"{module} has factors but is not among the target modules", {}
    if len(a) != rank:
        return _wrong_rank(module, len(a), rank), {}
    if is_embedding and magnitude is not None:
        return f"{module}: DoRA on an embedding is not supported", {}
    made: _Made = {}
    for reference in there:
        factors = our_factors(reference, a, b, magnitude)
        if factors is None:
            return _shape_problem(module, found, reference), {}
        target, node = reference.path, join(reference.path, "lora")
        if _has_several(reference, module_map):
            target, node = join(target, reference.weight), join(node, reference.weight)
        made[target] = (node, factors)
    return None, made


def _has_several(reference: ModuleReference, module_map: ModuleMap) -> bool:
    """Whether a module of ours has several weights, which then are targets by their own path."""
    weights = [n for n, x in reference.leaves.items() if n != "bias" and len(x.shape) > 1]
    others = (own.path.rpartition("/")[0] for own in module_map.parameters.values())
    return len(weights) > 1 or reference.path in others


def _wrong_rank(name: str, rank: int, expected: int) -> str:
    return f"{name} has rank {rank}, expected {expected} by the configuration"


def _shape_problem(module: str, found: Mapping[str, Array], reference: ModuleReference) -> str:
    return _misfit(module, found, reference.path, reference.shape)


def _misfit(name: str, found: Mapping[str, Array], path: str, shape: tuple[int, ...]) -> str:
    """A sentence that names the shapes of factors and weight."""
    names = {"a": "A", "b": "B", "magnitude": "magnitude"}
    shapes = ", ".join(f"{names[own]} {list(x.shape)}" for own, x in found.items())
    return f"{name} has {shapes}, which do not fit {path} of {list(shape)}"


def _pattern(numbers: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Patterns of modules for each number that differs from the usual one."""
    others = sorted({number for number in numbers.values() if number != usual})
    groups = {n: [path for path, number in numbers.items() if number == n] for n in others}
    return {pattern: n for n in others for pattern in shortest(groups[n], numbers)}
