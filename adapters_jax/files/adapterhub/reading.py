"""Converts AdapterHub's configuration and tensors to our methods and leaves."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.files.adapterhub.blocks import Blocks, Point
from adapters_jax.files.adapterhub.config import (
    ACTIVATIONS,
    Config,
    children,
    placement,
    tensor_names,
)
from adapters_jax.files.layouts import Array, our_factors
from adapters_jax.files.module_map import Added, Leaves, shortest
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
        modern = key  # the first versions had other names for adapters of tasks and of languages
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


def _points(config: Config, among: Mapping[Point, Any]) -> list[Point]:
    """The points that a configuration adapts."""
    return [(n, name) for n, name in among if n not in config["leave_out"] and config[name]]


def _bottlenecks(
    config: Config, found: Added, blocks: Blocks, leaves: Leaves, problems: list[str]
) -> list[Method]:
    """Returns one Bottleneck for each reduction factor, and adds its leaves."""
    sublayers = {point: blocks.bottlenecks[point] for point in _points(config, blocks.bottlenecks)}
    mine = {point: found.pop(f"{own.module}.adapters", {}) for point, own in sublayers.items()}
    if config["cross_adapter"] and not any(
        name == "cross_adapter" for _, name in blocks.bottlenecks
    ):
        problems.append("cross_adapter=True, but the base has no attention to an encoder")
    kind = placement(config, blocks.architecture.post_norm)
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
    for point, (module, paths, width) in sublayers.items():
        path, factor = paths.get(role), _factor(config, point[0])
        if factor is None:
            problems.append(f"reduction_factor has neither layer {point[0]} nor a default")
        elif path is None or not width:
            problems.append(
                f"names has no path for the {role} of {module}, or for the projection before it"
            )
        else:
            method = Bottleneck(path, reduction_factor=factor, **fields)
            new = _leaves(method, path, width, mine[point], module, problems)
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
    method: Bottleneck, path: str, width: int, got: Leaves, module: str, problems: list[str]
) -> Leaves:
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
    config: Config, found: Added, blocks: Blocks, leaves: Leaves, problems: list[str]
) -> list[Method]:
    """Returns one LoRA, and adds its leaves; a fused layer has stacked factors of each matrix."""
    rank, paths = config["r"], []
    for point in _points(config, blocks.loras):
        for module, every in blocks.projections(point).items():
            # Feed-forward modules have no matrices, and so the name "".
            own = [each for m, each in every.items() if not m or m in config["attn_matrices"]]
            if not own:
                continue
            got = found.pop(f"{module}.loras", {})
            if None in own or got.keys() != {"lora_A", "lora_B"}:
                what = "no path in names" if None in own else f"the tensors {sorted(got)}"
                problems.append(f"{module} has {what}, expected a path and lora_A, lora_B")
                continue
            a, b = got["lora_A"], got["lora_B"]
            for i, reference in enumerate(filter(None, own)):
                out = len(b) // len(own)
                rows, columns = a[i * rank : (i + 1) * rank], b[i * out : (i + 1) * out]
                fits = len(a) == rank * len(own) and a.ndim == b.ndim == 2
                factors = our_factors(reference, rows, columns) if fits else None
                if factors is None:
                    problems.append(
                        f"{module} has A {list(a.shape)} and B {list(b.shape)}, which do not fit "
                        f"{reference.path} of {list(reference.shape)} with r={rank}"
                    )
                    break
                paths.append(reference.path)
                new = {f"{reference.path}/lora/{k}": x for k, x in factors.items()}
                leaves |= {path: x.astype(np.float32) for path, x in new.items()}
    if not paths:
        return []
    targets = shortest(paths, blocks.paths)
    return [LoRA(targets, rank, config["alpha"], config["dropout"], a_init="uniform")]
