"""Converts AdapterHub's configuration and tensors to our methods and leaves."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from adapters_jax.files.adapterhub.blocks import Blocks
from adapters_jax.files.adapterhub.config import (
    ACTIVATIONS,
    LOCATIONS,
    Config,
    children,
    placement,
    tensor_names,
)
from adapters_jax.files.layouts import Array, our_factors
from adapters_jax.files.module_map import Added, shortest
from adapters_jax.methods import Bottleneck, LoRA, Method
from adapters_jax.methods.base import AttachmentPoint

_LEGACY = [f"{a}_text_{b}_adapters" for a in ("attention", "layer") for b in ("task", "lang")]


def read(
    whole: Config, tensors: Mapping[str, Array], blocks: Blocks
) -> tuple[list[Method], dict[str, Array], list[str]]:
    """Returns the methods, their leaves by path, and a sentence for each problem."""
    configs, problems = children(whole)
    if problems:
        return [], {}, problems
    found = _sorted(tensors, str(whole["name"]), blocks, problems)
    methods: list[Method] = []
    leaves: dict[str, Array] = {}
    # AdapterHub applies LoRA before the bottleneck, so LoRA comes first in the recipe.
    for config in sorted(configs, key=lambda config: config["architecture"] is None):
        add = _bottlenecks if config["architecture"] is None else _loras
        methods += add(config, found, blocks, leaves, problems)
    problems += [
        f"{module} has tensors, but the configuration does not adapt it" for module in found
    ]
    return methods, leaves, problems


def _sorted(tensors: Mapping[str, Array], name: str, blocks: Blocks, problems: list[str]) -> Added:
    """The tensors by module, with `.adapters` or `.loras` after its name, and by their own name."""
    found: Added = {}
    for key, tensor in tensors.items():
        modern = key
        for legacy in _LEGACY:
            modern = modern.replace(legacy, "adapters")
        for kind in ("adapters", "loras"):
            module, mark, rest = modern.partition(f".{kind}.{name}.")
            if mark:
                found.setdefault(f"{blocks.module_map.bare(module)}.{kind}", {})[rest] = tensor
                break
        else:
            problems.append(f"{key} belongs to no bottleneck or LoRA of the adapter {name!r}")
    return found


def _locations(config: Config, blocks: Blocks) -> list[tuple[int, str]]:
    """The layers and locations that a configuration adapts."""
    kind = config["architecture"]
    return [
        (n, name)
        for n in blocks.layers
        if n not in config["leave_out"]
        for name in LOCATIONS[kind]
        if config[name] and name in blocks.locations(n, kind)
    ]


def _bottlenecks(
    config: Config, found: Added, blocks: Blocks, leaves: dict[str, Array], problems: list[str]
) -> list[Method]:
    """Returns one Bottleneck for each reduction factor, and adds its leaves."""
    modules = {point: blocks.bottleneck(*point) for point in _locations(config, blocks)}
    mine = {point: found.pop(f"{module}.adapters", {}) for point, module in modules.items()}
    kind = placement(config, blocks.architecture.post_norm)
    if config["cross_adapter"] and not any(
        "cross_adapter" in blocks.bottlenecks(n) for n in blocks.layers
    ):
        problems.append("cross_adapter=True, but the base has no attention to an encoder")
    if isinstance(kind, str):
        problems.append(kind)
        return []
    role, where = kind
    groups: dict[float, list[str]] = {}
    fields: dict[str, Any] = {
        "placement": where,
        "scale": config["scaling"],
        "activation": ACTIVATIONS[config["non_linearity"].lower()],
        "norm_before": config["ln_before"],
        "norm_after": config["ln_after"],
    }
    for (layer, location), got in mine.items():
        module, width = modules[layer, location], blocks.width(layer, location)
        path, factor = blocks.path(layer, location, role), _factor(config, layer)
        if factor is None:
            problems.append(f"reduction_factor has neither layer {layer} nor a default")
        elif path is None or not width:
            problems.append(
                f"names has no path for the {role} of {module}, or for the projection before it"
            )
        else:
            method = Bottleneck(path, reduction_factor=factor, **fields)
            new = _leaves(method, path, width, got, module, problems)
            leaves |= {f"{path}/adapter/{name}": x for name, x in new.items()}
            groups.setdefault(factor, []).append(path)
    return [
        Bottleneck(shortest(paths, blocks.paths), reduction_factor=factor, **fields)
        for factor, paths in groups.items()
    ]


def _factor(config: Config, layer: int) -> float | None:
    """The reduction factor of a layer."""
    factor = config["reduction_factor"]
    if isinstance(factor, Mapping):
        return factor.get(str(layer), factor.get("default"))
    return factor


def _leaves(
    method: Bottleneck,
    path: str,
    width: int,
    got: dict[str, Array],
    module: str,
    problems: list[str],
) -> dict[str, Array]:
    """Our leaves of one bottleneck; adds a problem if the tensors do not fit the settings."""
    # AdapterHub stores the norm before a bottleneck under two names.
    for kind in ("weight", "bias") if method.norm_before else ():
        twin = got.pop(f"adapter_down.0.{kind}", None)
        if twin is None:
            continue
        if not np.array_equal(got.setdefault(f"adapter_norm_before.{kind}", twin), twin):
            problems.append(f"{module}: adapter_down.0 and adapter_norm_before differ")
    names = tensor_names(method)
    expected = {
        names[leaf]: list(spec.shape[::-1])
        for leaf, spec in method.leaves(AttachmentPoint(path, width)).items()
    }
    shapes = {name: list(tensor.shape) for name, tensor in got.items()}
    if shapes != expected:
        problems.append(f"{module} has {shapes or 'no tensors'}, expected {expected}")
        return {}
    return {leaf: got[name].T.astype(np.float32) for leaf, name in names.items()}


def _loras(
    config: Config, found: Added, blocks: Blocks, leaves: dict[str, Array], problems: list[str]
) -> list[Method]:
    """Returns one LoRA, and adds its leaves; a fused layer has stacked factors of each matrix."""
    rank, paths = config["r"], []
    for layer, location in _locations(config, blocks):
        modules: dict[str, list[str]] = {}
        for matrix, names in blocks.loras(layer, location).items():
            for name in names if not matrix or matrix in config["attn_matrices"] else ():
                modules.setdefault(name, []).append(matrix)
        for module, matrices in modules.items():
            got = found.pop(f"{module}.loras", {})
            there = blocks.module_map.at(module)
            if there and there[0].part:
                there = tuple(replace(there["qkv".index(m)], part=None) for m in matrices)
            if not there or got.keys() != {"lora_A", "lora_B"}:
                what = f"the tensors {sorted(got)}" if there else "no path in names"
                problems.append(f"{module} has {what}, expected a path and lora_A, lora_B")
                continue
            a, b = got["lora_A"], got["lora_B"]
            for i, reference in enumerate(there):
                out = len(b) // len(there)
                rows, columns = a[i * rank : (i + 1) * rank], b[i * out : (i + 1) * out]
                fits = len(a) == rank * len(there) and a.ndim == b.ndim == 2
                factors = our_factors(reference, rows, columns) if fits else None
                if factors is None:
                    shapes = f"A {list(a.shape)} and B {list(b.shape)}"
                    problems.append(
                        f"{module} has {shapes}, which do not fit {reference.path} of "
                        f"{list(reference.shape)} with r={rank}"
                    )
                    break
                paths.append(reference.path)
                leaves |= {
                    f"{reference.path}/lora/{k}": x.astype(np.float32) for k, x in factors.items()
                }
    if not paths:
        return []
    targets = shortest(paths, blocks.paths)
    return [LoRA(targets, rank, config["alpha"], config["dropout"], a_init="uniform")]
