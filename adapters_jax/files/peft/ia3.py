"""(IA)^3 in PEFT's files: one vector for each module, which scales its outputs or its inputs.

PEFT's vector is `(out, 1)`, or `(1, in)` for a module that `feedforward_modules` names, and
`(1, n, 1, 1)` for a convolution. Where PEFT's module fuses several of ours along the outputs, each
of ours takes its part of a vector of outputs, and all of them share a vector of inputs.

Reference: https://huggingface.co/docs/peft/package_reference/ia3
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.expressions import matches
from adapters_jax.files.layouts import WHOLE, Array, ModuleReference, joined
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.patterns import in_order, shortest
from adapters_jax.files.peft.checks import adapted, references
from adapters_jax.files.peft.config import ROOT, Config
from adapters_jax.files.settings import collecting
from adapters_jax.methods import IA3, Method
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe


def scales_input(config: Config, module: str) -> bool:
    """Whether PEFT scales a module's input; it compares the end of the name, not whole words.

    Example:
        >>> scales_input({"feedforward_modules": ["mlp.c_proj"]}, "h.0.mlp.c_proj")
        True
    """
    names = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return matches(names, module)
    return any(module.endswith(name) for name in names)


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one IA3 for all modules, and its leaves by path."""
    leaves: dict[str, Array] = {}
    inner: list[str] = []
    for module, found in added.items():
        inputs, vector = scales_input(config, module), found["scale"]
        with collecting(problems):
            for reference in references(config, module, module_map):
                scale = _our_scale(reference, vector, inputs)
                if scale is None:
                    axes = "inputs" if inputs else "outputs"
                    problems.append(
                        f"{module} has ia3_l {list(vector.shape)}, which does not fit the {axes} "
                        f"of {reference.path} {list(reference.shape)}"
                    )
                    continue
                leaves[reference.path] = scale.astype(np.float32)
                inner += [reference.path] if inputs else []
    if not leaves:
        return [], {}
    method = IA3(module_map.targets(leaves), shortest(inner, leaves) if inner else ())
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
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, and the vector of every module."""
    tensors: dict[str, Array] = {}
    targets: dict[str, bool] = {}
    for bare, parts, mine in adapted(added, module_map, problems):
        kinds = {each.method.scales_input(each.path) for each in mine if each}
        scales = [each.leaves(leaves)["scale"] if each else None for each in mine]
        try:
            vector = _their_vector(parts, scales, kinds)
        except UserError as reason:
            problems.append(f"{bare}: {reason}, which PEFT's IA3 does not support")
            continue
        name = module_map.full(bare)
        targets[name] = True in kinds
        tensors[f"{ROOT}{name}.ia3_l"] = vector
    fields = {
        "target_modules": sorted(targets, key=in_order),
        "feedforward_modules": sorted((n for n, inner in targets.items() if inner), key=in_order),
        "fan_in_fan_out": module_map.table.fan_in_fan_out,
        "init_ia3_weights": True,
    }
    wrong = [name for name, inner in targets.items() if scales_input(fields, name) != inner]
    problems += [
        f"{name} ends like a feed-forward module, so PEFT would scale its input" for name in wrong
    ]
    return fields, tensors


def _their_vector(
    parts: Sequence[ModuleReference], scales: Sequence[Array | None], kinds: Collection[bool]
) -> Array:
    """PEFT's vector of one module, of inputs or outputs by `kinds`; parts without a scale get ones.

    Raises:
        UserError: PEFT cannot hold these scales in one vector.
    """
    present = [scale for scale in scales if scale is not None]
    first, shape = present[0], parts[0].shape
    if any(reference.weight != "kernel" for reference in parts):
        raise UserError("it is not a linear layer")
    if len(kinds) > 1:
        raise UserError("it scales the inputs of some parts and the outputs of others")
    if True in kinds:
        if len(present) < len(parts) or not all(np.array_equal(first, x) for x in present):
            raise UserError("its parts scale their common input differently")
        if first.shape == shape[-2:-1]:
            return first.reshape(1, -1, *(1,) * (len(shape) - 2))
        if first.shape != shape[: first.ndim]:
            raise UserError("its scale does not fit its inputs")
        return first.reshape(1, -1)
    own = [reference.shape[-first.ndim :] for reference in parts]
    if any(x is not None and x.shape != each for x, each in zip(scales, own, strict=True)):
        raise UserError("its scale does not fit its outputs")
    both = zip(scales, own, strict=True)
    rows = [np.ones(each, np.float32) if x is None else x for x, each in both]
    whole = joined([row.ravel() for row in rows], parts[0].blocks)
    window = len(shape) - first.ndim - 1
    return whole.reshape(1, -1, *(1,) * window) if window else whole.reshape(-1, 1)
