"""Converts our methods and leaves to AdapterHub's configuration and tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adapters_jax.files.adapterhub.blocks import Blocks, Point
from adapters_jax.files.adapterhub.config import (
    ACTIVATIONS,
    DEFAULTS,
    LOCATIONS,
    POST_NORM,
    PRE_NORM,
    tensor_names,
)
from adapters_jax.files.layouts import Array, rounded, their_factors
from adapters_jax.files.module_map import Added, Leaves
from adapters_jax.methods import Bottleneck
from adapters_jax.recipe import Recipe

# By layer and location: the settings, and for an attention which of its matrices have factors.
Settings = dict[Point, tuple[dict[str, Any], tuple[str, ...]]]
_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def write(
    recipe: Recipe, added: Added, blocks: Blocks, name: str, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the settings and the tensors by names without prefix, and adds the problems."""
    tensors: Leaves = {}
    configs = _configs(None, _bottlenecks(recipe, added, blocks, name, tensors, problems), blocks)
    configs += _configs("lora", _loras(recipe, added, blocks, name, tensors, problems), blocks)
    others = {type(m).__name__ for m in recipe.attached if m.name not in ("bottleneck", "lora")}
    if others or not recipe.attached:
        what = ", ".join(sorted(others)) or "nothing"
        problems.append(f"the recipe adds {what}; AdapterHub's files support Bottleneck and LoRA")
    if sum("architecture" in config for config in configs) > 1:
        problems.append(
            "AdapterHub supports one LoRA in an adapter, with one rank, alpha and dropout, on the "
            "same projections of each layer"
        )
    union = {"architecture": "union", "configs": configs}
    return configs[0] if len(configs) == 1 else union, tensors


def _bottlenecks(
    recipe: Recipe, added: Added, blocks: Blocks, name: str, tensors: Leaves, problems: list[str]
) -> Settings:
    """Returns the bottlenecks' settings by layer and location, and adds their tensors."""
    settings: Settings = {}
    roles = blocks.roles()
    for path, leaves in _of("bottleneck", recipe, added):
        method: Any = next(m for m in recipe.at(path) if m.name == "bottleneck")
        point, role = roles.get(path, ((0, ""), ""))
        fields = _fields(method, role, blocks)
        if isinstance(fields, str):
            problems.append(f"{path}: {fields}")
            continue
        if point in settings:
            problems.append(f"{path}: AdapterHub supports one bottleneck in each sublayer")
        width, m = leaves["down/kernel"].shape[-2:]
        sublayer = blocks.bottlenecks[point]
        if leaves["down/kernel"].ndim != 2 or width != sublayer.width:
            problems.append(f"{path}: its leaves do not fit one layer of this base")
            continue
        settings[point] = fields | {"reduction_factor": _factor(method, width, m)}, ()
        module = f"{sublayer.module}.adapters.{name}"
        names = tensor_names(method)
        tensors |= {f"{module}.{names[leaf]}": x.T for leaf, x in leaves.items()}
        if method.norm_before:  # AdapterHub stores the norm under two names
            for leaf, kind in (("scale", "weight"), ("bias", "bias")):
                tensors[f"{module}.adapter_down.0.{kind}"] = leaves[f"norm_before/{leaf}"]
    return settings


def _fields(method: Bottleneck, role: str, blocks: Blocks) -> dict[str, Any] | str:
    """A bottleneck's fields without its width, or why AdapterHub does not support it."""
    if method.dropout:
        return (
            f"dropout={method.dropout} acts between the projections, AdapterHub's after them; "
            "write the recipe with dropout=0.0, which changes no prediction"
        )
    if method.output is not None:
        return f"output={method.output!r}, AdapterHub adapts modules that return one array"
    if method.activation not in _NAMES:
        return f"activation={method.activation!r}, AdapterHub supports {', '.join(_NAMES)}"
    if role == "sublayer":  # sequential acts at its output, parallel at the sum
        parallel = method.placement == "parallel" and blocks.architecture.post_norm
        role = "output" if method.placement == "sequential" else "sum" if parallel else role
    fields = {
        "non_linearity": _NAMES[method.activation],
        "scaling": float(method.scale),
        "ln_before": method.norm_before,
        "ln_after": method.norm_after,
    }
    if (role, method.placement) == ("sum", "parallel"):
        return fields | {"is_parallel": True, "original_ln_before": False}
    for row in POST_NORM if blocks.architecture.post_norm else PRE_NORM:
        if row[:2] == (role, method.placement):
            return fields | dict(zip(row._fields[2:], row[2:], strict=True))
    norm = "norm's, with placement='norm'" if blocks.architecture.post_norm else "sum"
    return (
        f"AdapterHub supports no {method.placement} bottleneck here: target a sublayer's output, "
        f"its {norm}, or its sum with placement='parallel'"
    )


def _factor(method: Bottleneck, width: int, m: int) -> float:
    """A reduction factor from which AdapterHub computes the width `m` again."""
    if method.reduction_factor is not None:
        return method.reduction_factor
    # AdapterHub computes int(width // factor), which misses m for some quotients.
    exact = rounded(width / m)
    return exact if int(width // exact) == m else width / (m + 0.5)


def _loras(
    recipe: Recipe, added: Added, blocks: Blocks, name: str, tensors: Leaves, problems: list[str]
) -> Settings:
    """Returns LoRA's settings by layer and location, and adds its tensors."""
    settings: Settings = {}
    left = dict(_of("lora", recipe, added))
    for point, every in blocks.loras.items():
        made: dict[str, list[tuple[Array, Array]]] = {}
        fields: list[dict[str, Any]] = []
        adapted: dict[str, list[str]] = {}
        projections = blocks.projections(point)
        for matrix, module in ((m, name) for m, names in every.items() for name in names):
            reference = projections[module][matrix]
            leaves = left.pop(reference.path, None) if reference else None
            if reference is None or leaves is None:
                continue
            lora: Any = next(m for m in recipe.at(reference.path) if m.name == "lora")
            a, b = their_factors(reference, leaves, lora.slices)
            if (b.shape[0], *a.shape[1:]) != (reference.width, *reference.shape[:-1]):
                problems.append(f"{reference.path}: its factors do not fit its weight")
                continue
            if lora.a_init == "pissa":
                problems.append(
                    f"{reference.path}: a_init='pissa' changed the base's weights, but "
                    "AdapterHub adapts the original base"
                )
            alpha = rounded(lora.scale_at(reference.path) * len(a))
            fields.append({"r": len(a), "alpha": alpha, "dropout": lora.dropout})
            adapted.setdefault(matrix, []).append(module)
            made.setdefault(module, []).append((a, b))
        problems += [
            f"{', '.join(names)} alone: AdapterHub adapts {' and '.join(every[matrix])}"
            for matrix, names in adapted.items()
            if names != every[matrix]
        ]
        if any(each != fields[0] for each in fields):
            problems.append(
                f"layer {point[0]}: AdapterHub supports one rank, alpha and dropout for the "
                f"{', '.join(adapted)} of an attention"
            )
        if fields:
            settings[point] = fields[0], tuple(filter(None, adapted))
        for module, pairs in made.items():
            for i, factor in enumerate(("lora_A", "lora_B")):
                both = np.concatenate([pair[i] for pair in pairs])
                tensors[f"{module}.loras.{name}.{factor}"] = both
    problems += [f"{path}: AdapterHub supports no LoRA here" for path in sorted(left)]
    return settings


def _of(kind: str, recipe: Recipe, added: Added) -> Iterable[tuple[str, Leaves]]:
    """The modules that the method named `kind` adapts, each with that method's leaves."""
    for path, leaves in added.items():
        for method in recipe.at(path):
            if method.name == kind:
                yield path, {name: leaves[name] for name in method.leaf_names}


def _configs(kind: str | None, settings: Settings, blocks: Blocks) -> list[dict[str, Any]]:
    """Groups settings into few configurations, each of some locations in some layers."""
    groups: dict[str, tuple[dict[str, Any], list[str], tuple[str, ...], dict[int, Any]]] = {}
    together: dict[str, set[str]] = {}
    for (_, location), (fields, _) in settings.items():
        together.setdefault(_but_factor(fields), set()).add(location)
    for layer in blocks.layers:
        mine: dict[str, list[Any]] = {}
        for location in LOCATIONS[kind]:
            if (layer, location) in settings:
                fields, matrices = settings[layer, location]
                each = mine.setdefault(repr(sorted(fields.items())), [fields, [], ()])
                each[1].append(location)
                each[2] += matrices
        even = len(mine) > 1  # otherwise one configuration maps layers to factors
        for fields, locations, matrices in mine.values():
            factor = fields.get("reduction_factor")
            kept = repr(sorted(fields.items())) if even else _but_factor(fields)
            # A layer without some location, as an encoder's, has the others of its configuration.
            every = together[_but_factor(fields)]
            if set(locations) == every & blocks.locations(layer, kind):
                locations = [location for location in LOCATIONS[kind] if location in every]
            key = repr((kept, locations, matrices))
            group = groups.setdefault(key, (fields, locations, matrices, {}))
            group[3][layer] = factor
    return [_config(kind, *each, blocks) for each in groups.values()]


def _but_factor(fields: Mapping[str, Any]) -> str:
    """What tells settings from others that may differ in the reduction factor."""
    return repr(sorted((k, v) for k, v in fields.items() if k != "reduction_factor"))


def _config(
    kind: str | None,
    fields: Mapping[str, Any],
    locations: list[str],
    matrices: tuple[str, ...],
    factors: Mapping[int, Any],
    blocks: Blocks,
) -> dict[str, Any]:
    """One configuration, with all fields that have a default."""
    fields = {**DEFAULTS[kind], **fields, "architecture": kind}
    fields |= {location: location in locations for location in LOCATIONS[kind]}
    fields["leave_out"] = [n for n in blocks.layers if n not in factors]
    if kind is None:
        several = len(set(factors.values())) > 1
        by_layer = {str(layer): factor for layer, factor in factors.items()}
        fields["reduction_factor"] = by_layer if several else next(iter(factors.values()))
        fields.pop("architecture")
    elif "selfattn_lora" in locations:
        fields["attn_matrices"] = list(matrices)
    return fields
