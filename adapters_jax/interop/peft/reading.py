"""PEFT's tensors and configuration as methods and leaves of ours."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.interop.layouts import Array, ModuleReference, our_factors, our_leaf
from adapters_jax.interop.module_map import ModuleMap, as_in_base, shortest
from adapters_jax.interop.peft.config import ROOT, STARTS, TIED, Config, means, number_at, value
from adapters_jax.methods import DoRA, LlamaAdapter, LoRA, Method, Unfreeze

_LEAVES = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "adaption_prompt": "embedding",
    "adaption_gate": "gate",
}
_KEY = re.compile(rf"(.+)\.({'|'.join(_LEAVES)})(?:\.weight)?")
_MASK = re.compile(r"(.*\.)?attn\.(masked_)?bias")  # a buffer of old GPT-2s, saved with bias="all"


def read(
    config: Config, tensors: Mapping[str, Array], places: ModuleMap
) -> tuple[list[Method], dict[str, Array], list[str]]:
    """The methods, their leaves by path, and every problem."""
    problems: list[str] = []
    added, plain = _sorted(tensors, problems)
    if config["peft_type"] == "LORA":
        methods, leaves = _lora(config, added, places, problems)
    else:
        methods, leaves = _prompts(config, added, places, problems)
    trained = _trained(plain, places, problems)
    if trained:
        methods.append(Unfreeze(shortest(trained, places.base)))
    return methods, leaves | trained, problems


def _sorted(
    tensors: Mapping[str, Array], problems: list[str]
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Added tensors by module and our leaf's name, and those that the base has as well."""
    added: dict[str, dict[str, Array]] = {}
    plain: dict[str, Array] = {}
    for key, tensor in tensors.items():
        if not key.startswith(ROOT):
            problems.append(f"{key} does not begin with {ROOT}")
            continue
        name = key.removeprefix(ROOT)
        match = _KEY.fullmatch(name)
        if match:
            added.setdefault(match[1], {})[_LEAVES[match[2]]] = tensor
        elif ".original_module." not in name and not _MASK.fullmatch(name):
            plain[name] = tensor
    return added, plain


def _lora(
    config: Config,
    added: Mapping[str, Mapping[str, Array]],
    places: ModuleMap,
    problems: list[str],
) -> tuple[list[Method], dict[str, Array]]:
    """One LoRA or DoRA for all modules, with patterns where ranks or alphas differ."""
    leaves: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, found in added.items():
        rank = number_at(config, "r", "rank_pattern", module)
        problem = _misfit(config, module, found, rank, places)
        for place in () if problem else places.at(module):
            factors = our_factors(place, found["a"], found["b"], found.get("magnitude"))
            if factors is None:
                problem = _unlike(module, found, place)
                break
            leaves |= {f"{place.path}/lora/{k}": x.astype(np.float32) for k, x in factors.items()}
            ranks[place.path] = rank
            alphas[place.path] = number_at(config, "lora_alpha", "alpha_pattern", module)
        problems += [problem] if problem else []
    if not ranks:
        problems += [] if problems else ["it has no LoRA factors"]
        return [], leaves
    method = (DoRA if config.get("use_dora") else LoRA)(
        shortest(ranks, places.paths),
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
    config: Config, module: str, found: Mapping[str, Array], rank: int, places: ModuleMap
) -> str | None:
    """Why the factors of a module cannot be used, before their shapes are compared."""
    wanted = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    there = places.at(module)
    if found.keys() != wanted:
        return f"{module} has the tensors of {', '.join(sorted(found))}, wanted {sorted(wanted)}"
    if not there:
        return f"{module} is no layer of the base that names knows"
    if found["a"].ndim < 2 or found["b"].ndim < 2:
        return _unlike(module, found, there[0])
    if not means(config, module):
        return f"{module} has factors and is not among the configuration's target modules"
    if len(found["a"]) != rank:
        return f"{module} has the rank {len(found['a'])}, the configuration says {rank}"
    if there[0].weight == "embedding" and "magnitude" in wanted:
        return f"{module}: DoRA on an embedding is not supported"
    if there[0].weight == "embedding" and places.tied:
        return TIED.format(module)
    return None


def _unlike(module: str, found: Mapping[str, Array], place: ModuleReference) -> str:
    """A sentence about shapes."""
    a, b = (list(found[name].shape) for name in ("a", "b"))
    return f"{module} has A {a} and B {b}, which do not fit {place.path} of {list(place.shape)}"


def _pattern(numbers: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """The numbers that are not the usual one, by pattern."""
    others = sorted({number for number in numbers.values() if number != usual})
    groups = {n: [path for path, number in numbers.items() if number == n] for n in others}
    return {pattern: n for n in others for pattern in shortest(groups[n], numbers)}


def _prompts(
    config: Config,
    added: Mapping[str, Mapping[str, Array]],
    places: ModuleMap,
    problems: list[str],
) -> tuple[list[Method], dict[str, Array]]:
    """One LlamaAdapter, with PEFT's single gate a layer."""
    leaves: dict[str, Array] = {}
    sites = []
    length, count = config.get("adapter_len"), config.get("adapter_layers")
    for module, found in added.items():
        site = places.attention.get(places.bare(module))
        shapes = {name: list(x.shape) for name, x in found.items()}
        width = shapes.get("embedding", [0])[-1:]
        if site is None:
            problems.append(f"{module} is no attention module of the base that names knows")
        elif shapes != {"embedding": [1, length, *width], "gate": [1]}:
            problems.append(
                f"{module} has {shapes}, wanted a prompt [1, {length}, d] and a gate [1]"
            )
        else:
            sites.append(site)
            both = {"embedding": found["embedding"][0], "gate": found["gate"]}
            leaves |= {f"{site}/prompt/{name}": x.astype(np.float32) for name, x in both.items()}
    if len(added) != count:
        problems.append(f"it has prompts of {len(added)} layers, and says adapter_layers={count}")
    if not sites:
        return [], leaves
    targets = shortest(sites, places.attention.values())
    return [LlamaAdapter(targets, length or 1, "layer", "identity")], leaves


def _trained(
    plain: Mapping[str, Array], places: ModuleMap, problems: list[str]
) -> dict[str, Array]:
    """The base's own parameters that were trained: biases, heads, modules to save."""
    leaves: dict[str, Array] = {}
    for key, tensor in plain.items():
        name, _, kind = key.rpartition(".")
        module = name.removesuffix(".base_layer").removesuffix(".modules_to_save")
        there = places.at(module)
        if not there:
            problems.append(f"{key}: {module} is no module of the base that names knows")
        new: dict[str, Array] = {}
        for place in there:
            leaf = "bias" if kind == "bias" else place.weight
            fits = leaf in place.leaves and kind in ("bias", "weight")
            array = our_leaf(place, leaf, tensor, places.fan_in_fan_out) if fits else None
            if array is None:
                problems.append(f"{key} is {list(tensor.shape)}, which does not fit {place.path}")
            else:
                new[f"{place.path}/{leaf}"] = array
        if not (key.endswith(".base_layer.weight") and as_in_base(new, places)):
            leaves |= {p: x.astype(places.base[p].dtype) for p, x in new.items()}
    return leaves
