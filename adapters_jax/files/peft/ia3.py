"""(IA)^3 in PEFT's files: one vector for each module, which scales its outputs or its inputs.

PEFT's vector is `(out, 1)`, or `(1, in)` for a module that `feedforward_modules` names, and
`(1, n, 1, 1)` for a convolution. Where PEFT's module fuses several of ours along the outputs, each
of ours takes its part of a vector of outputs, and all of them share a vector of inputs.

Reference: https://huggingface.co/docs/peft/package_reference/ia3
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapters_jax.files.layouts import WHOLE, Array, ModuleReference
from adapters_jax.files.module_map import Added, ModuleMap, in_order, shortest
from adapters_jax.files.peft.config import ROOT, Config, is_target
from adapters_jax.methods import IA3, Method
from adapters_jax.recipe import Recipe


def scales_input(config: Config, module: str) -> bool:
    """Whether PEFT scales a module's input; it compares the end of the name, not whole words.

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
    module_map: ModuleMap,
    problems: list[str],
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one IA3 for all modules, and its leaves by path."""
    leaves: dict[str, Array] = {}
    inner: list[str] = []
    for module, found in added.items():
        there, inputs, vector = module_map.at(module), scales_input(config, module), found["scale"]
        if not there:
            problems.append(f"names maps {module} to no layer of the base")
        elif not is_target(config, module):
            problems.append(f"{module} has a vector but is not among the target modules")
        else:
            scales = [_our_scale(reference, vector, inputs) for reference in there]
            for reference, scale in zip(there, scales, strict=True):
                if scale is None:
                    axes = "inputs" if inputs else "outputs"
                    problems.append(
                        f"{module} has ia3_l {list(vector.shape)}, which does not fit the {axes} "
                        f"of {reference.path} {list(reference.shape)}"
                    )
                else:
                    leaves[reference.path] = scale.astype(np.float32)
                    inner += [reference.path] if inputs else []
    if not leaves:
        problems += [] if problems else ["the file has no ia3_l tensor"]
        return [], {}
    method = IA3(shortest(leaves, module_map.paths), shortest(inner, leaves) if inner else ())
    return [method], {f"{path}/ia3/scale": scale for path, scale in leaves.items()}


def _our_scale(reference: ModuleReference, vector: Array, inputs: bool) -> Array | None:
    """One module's scale in our layout; None if the vector does not fit its weight."""
    shape, window = reference.shape, vector.ndim > 2
    end = 0 if inputs or window else 1  # the axis of size 1 before or behind the numbers
    if reference.weight != "kernel" or vector.ndim < 2 or vector.size != max(vector.shape):
        return None
    if vector.shape[end] != 1 and vector.size > 1:
        return None
    if inputs:
        axes = [(shape[-2],)] if window else [shape[:n] for n in range(1, len(shape))]
        numbers: Array = vector.ravel()
    else:
        axes = [shape[n:] for n in range(len(shape) - 1, 0, -1)]
        part = (reference.part or WHOLE).of(vector.ravel())
        if part is None:
            return None
        numbers = part
    own = next((own for own in axes if math.prod(own) == numbers.size), None)
    return None if own is None else numbers.reshape(own)


def write(
    recipe: Recipe,
    added: Added,
    leaves: Mapping[str, Array],
    module_map: ModuleMap,
    problems: list[str],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Returns the fields, and the vector of every module."""
    tensors: dict[str, Array] = {}
    targets: dict[str, bool] = {}
    unknown = set(added)
    for bare, parts in module_map.modules.items():
        mine = [added.get(reference.path) for reference in parts]
        unknown -= {reference.path for reference in parts}
        if not any(mine):
            continue
        kinds = {_at(recipe, p.path) for p, each in zip(parts, mine, strict=True) if each}
        scales = [each["scale"] if each else None for each in mine]
        problem, vector = _their_vector(parts, scales, inputs=True in kinds)
        if problem or len(kinds) > 1 or vector is None:
            reason = problem or "it scales the inputs of some parts and the outputs of others"
            problems.append(f"{bare}: {reason}, which PEFT's IA3 does not support")
            continue
        name = module_map.full(bare)
        targets[name] = True in kinds
        tensors[f"{ROOT}{name}.ia3_l"] = vector
    problems += [f"names has no module name for {path}; add it" for path in sorted(unknown)]
    fields = {
        "peft_type": "IA3",
        "target_modules": sorted(targets, key=in_order),
        "feedforward_modules": sorted((n for n, inner in targets.items() if inner), key=in_order),
        "fan_in_fan_out": module_map.fan_in_fan_out,
        "init_ia3_weights": True,
    }
    wrong = [name for name, inner in targets.items() if scales_input(fields, name) != inner]
    problems += [
        f"{name} ends like a feed-forward module, so PEFT would scale its input" for name in wrong
    ]
    return fields, tensors


def _at(recipe: Recipe, path: str) -> bool:
    """Whether the recipe scales the input of a module."""
    method: Any = next(method for method in recipe.at(path) if method.slot == "ia3")
    return method.scales_input(path)


def _their_vector(
    parts: Sequence[ModuleReference], scales: Sequence[Array | None], inputs: bool
) -> tuple[str, Array | None]:
    """PEFT's vector of one module, or the problem; parts without a scale get ones."""
    present = [scale for scale in scales if scale is not None]
    if any(reference.weight != "kernel" for reference in parts):
        return "it is not a linear layer", None
    if inputs:
        first, shape = present[0], parts[0].shape
        alike = len(present) == len(parts) and all(np.array_equal(first, x) for x in present)
        if not alike:
            return "its parts scale their common input differently", None
        if first.shape == shape[-2:-1]:
            return "", first.reshape(1, -1, *(1,) * (len(shape) - 2))
        fits = first.shape == shape[: first.ndim]
        return ("", first.reshape(1, -1)) if fits else ("its scale does not fit its inputs", None)
    axes = present[0].ndim
    fits = all(
        p.shape[-axes:] == x.shape for p, x in zip(parts, scales, strict=True) if x is not None
    )
    if not fits:
        return "its scale does not fit its outputs", None
    rows = [
        np.ones(reference.shape[-axes:], np.float32) if x is None else x
        for reference, x in zip(parts, scales, strict=True)
    ]
    whole = np.concatenate([row.ravel() for row in rows])
    window = len(parts[0].shape) - axes - 1
    return "", whole.reshape(1, -1, *(1,) * window) if window else whole.reshape(-1, 1)
