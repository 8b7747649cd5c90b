"""(IA)^3 in PEFT's files: one vector in each module, of its outputs or of its inputs.

Theirs is `(out, 1)`, or `(1, in)` for a module that `feedforward_modules` names; `(1, n, 1, 1)` for
a convolution. Where their module is several of ours, fused along the outputs, each has its part of
the vector; a vector of inputs is one for all.

Reference: https://huggingface.co/docs/peft/package_reference/ia3
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapters_jax.interop.layouts import Array, ModuleReference
from adapters_jax.interop.module_map import Added, ModuleMap, in_order, shortest
from adapters_jax.interop.peft.config import ROOT, Config, means
from adapters_jax.methods import IA3, Method
from adapters_jax.recipe import Recipe

LEAVES = {"ia3_l": "scale"}


def scales_input(config: Config, module: str) -> bool:
    """Whether PEFT scales what a module takes: by the end of its name, not by whole words.

    Example:
        >>> scales_input({"feedforward_modules": ["mlp.c_proj"]}, "h.0.mlp.c_proj")
        True
    """
    names = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


def read(
    config: Config,
    added: Mapping[str, Mapping[str, Array]],
    places: ModuleMap,
    problems: list[str],
) -> tuple[list[Method], dict[str, Array]]:
    """One IA3 for all modules."""
    leaves: dict[str, Array] = {}
    inner: list[str] = []
    for module, found in added.items():
        there, inputs, vector = places.at(module), scales_input(config, module), found["scale"]
        if not there:
            problems.append(f"{module} is no layer of the base that names knows")
        elif not means(config, module):
            problems.append(f"{module} has a vector and is not among the target modules")
        else:
            scales = [_our_scale(place, vector, inputs) for place in there]
            for place, scale in zip(there, scales, strict=True):
                if scale is None:
                    problems.append(
                        f"{module} has ia3_l {list(vector.shape)}, which does not fit the "
                        f"{'inputs' if inputs else 'outputs'} of {place.path} {list(place.shape)}"
                    )
                else:
                    leaves[place.path] = scale.astype(np.float32)
                    inner += [place.path] if inputs else []
    if not leaves:
        problems += [] if problems else ["it has no ia3_l"]
        return [], {}
    method = IA3(shortest(leaves, places.paths), shortest(inner, leaves) if inner else ())
    return [method], {f"{path}/ia3/scale": scale for path, scale in leaves.items()}


def _our_scale(place: ModuleReference, vector: Array, inputs: bool) -> Array | None:
    """Our leaf of one module; None where the vector does not fit its weight."""
    shape, window = place.shape, vector.ndim > 2
    index, count = place.part or (0, 1)
    end = 0 if inputs or window else 1  # the axis of 1 before the numbers, or behind them
    if place.weight != "kernel" or vector.ndim < 2 or vector.size != max(vector.shape):
        return None
    if vector.shape[end] != 1 and vector.size > 1:
        return None
    if inputs:
        axes = [(shape[-2],)] if window else [shape[:n] for n in range(1, len(shape))]
        numbers: Array = vector.ravel()
    else:
        axes = [shape[n:] for n in range(len(shape) - 1, 0, -1)]
        if vector.size % count:
            return None
        numbers = np.split(vector.ravel(), count)[index]
    own = next((own for own in axes if math.prod(own) == numbers.size), None)
    return None if own is None else numbers.reshape(own)


def write(
    recipe: Recipe, added: Added, places: ModuleMap, prefix: str | None, problems: list[str]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The fields, and the vector of every module."""
    tensors: dict[str, Array] = {}
    targets: dict[str, bool] = {}
    unknown = set(added)
    for bare, parts in places.modules.items():
        mine = [added.get(place.path) for place in parts]
        unknown -= {place.path for place in parts}
        if not any(mine):
            continue
        kinds = {_at(recipe, p.path) for p, each in zip(parts, mine, strict=True) if each}
        scales = [each["scale"] if each else None for each in mine]
        problem, vector = _their_vector(parts, scales, inputs=True in kinds)
        if problem or len(kinds) > 1 or vector is None:
            reason = problem or "inputs of some parts and outputs of others are scaled"
            problems.append(f"{bare}: {reason}, which PEFT's IA3 does not support")
            continue
        name = places.full(bare, prefix)
        targets[name] = True in kinds
        tensors[f"{ROOT}{name}.ia3_l"] = vector
    problems += [f"{path} has no name in PEFT's files; add it to names" for path in sorted(unknown)]
    fields = {
        "peft_type": "IA3",
        "target_modules": sorted(targets, key=in_order),
        "feedforward_modules": sorted((n for n, inner in targets.items() if inner), key=in_order),
        "fan_in_fan_out": places.fan_in_fan_out,
        "init_ia3_weights": True,
    }
    wrong = [name for name, inner in targets.items() if scales_input(fields, name) != inner]
    problems += [
        f"{name} ends like a feed-forward module, and PEFT would take it for one" for name in wrong
    ]
    return fields, tensors


def _at(recipe: Recipe, path: str) -> bool:
    """Whether the input of one of our modules is scaled."""
    method: Any = next(method for method in recipe.at(path) if method.slot == "ia3")
    return method.scales_input(path)


def _their_vector(
    parts: Sequence[ModuleReference], scales: Sequence[Array | None], inputs: bool
) -> tuple[str, Array | None]:
    """What is wrong, or their vector of one module. Parts that are not scaled have ones."""
    present = [scale for scale in scales if scale is not None]
    if any(place.weight != "kernel" for place in parts):
        return "it is no linear layer", None
    if inputs:
        first, shape = present[0], parts[0].shape
        alike = len(present) == len(parts) and all(np.array_equal(first, x) for x in present)
        if not alike:
            return "its parts scale their common input unlike", None
        if first.shape == shape[-2:-1]:
            return "", first.reshape(1, -1, *(1,) * (len(shape) - 2))
        fits = first.shape == shape[: first.ndim]
        return ("", first.reshape(1, -1)) if fits else ("its scale is not of its inputs", None)
    axes = present[0].ndim
    fits = all(
        p.shape[-axes:] == x.shape for p, x in zip(parts, scales, strict=True) if x is not None
    )
    if not fits:
        return "its scale is not of its outputs", None
    rows = [
        np.ones(place.shape[-axes:], np.float32) if x is None else x
        for place, x in zip(parts, scales, strict=True)
    ]
    whole = np.concatenate([row.ravel() for row in rows])
    window = len(parts[0].shape) - axes - 1
    return "", whole.reshape(1, -1, *(1,) * window) if window else whole.reshape(-1, 1)
