"""VeRA in PEFT's files: two scales for each module, and the factors that all of them share.

PEFT stores the factors beside the model, `(r, in)` and `(out, r)` of the largest module, where
`save_projection` is true; otherwise it draws them anew by torch's random numbers, which nobody else
has.

Reference: https://huggingface.co/docs/peft/package_reference/vera
"""

import math
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array, ModuleReference
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.patterns import in_order
from adapters_jax.files.peft.checks import adapted, references
from adapters_jax.files.peft.config import KINDS, ROOT, Config, value
from adapters_jax.files.settings import collecting
from adapters_jax.methods import Method, VeRA
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

SHARED = KINDS["VERA"].shared
_OWN = {"vera_lambda_d": "d", "vera_lambda_b": "b"}


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one VeRA for all modules, and its leaves by path."""
    shared = added.pop("")
    if shared.keys() != {*SHARED.values()}:
        problems.append(
            "the file lacks base_model.vera_A and vera_B, which PEFT would draw by torch's random "
            "numbers; save it again from PEFT with save_projection=True"
        )
        return [], {}
    rank = value(config, "r")
    left, right = (np.ascontiguousarray(shared[name].T) for name in ("left", "right"))
    if left.ndim != 2 or right.ndim != 2 or {left.shape[1], right.shape[0]} != {rank}:
        shapes = [list(shared[name].shape) for name in ("left", "right")]
        problems.append(f"vera_A and vera_B are {shapes[0]} and {shapes[1]}, expected rank {rank}")
        return [], {}
    own: dict[str, dict[str, Array]] = {}
    sizes: tuple[list[int], list[int]] = [], []  # the inputs and the outputs
    for module, found in added.items():
        with collecting(problems):
            (reference, *others) = references(config, module, module_map)
            if others or reference.weight != "kernel" or len(reference.shape) > 3:
                raise UserError(f"{module} is no linear layer of one weight, which VeRA needs here")
            if found.keys() != {*_OWN.values()}:
                raise UserError(f"{module} has {', '.join(sorted(found))}, expected d and b")
            d, b = found["d"], found["b"]
            outputs = _outputs(reference, b.size, len(left), right.shape[1])
            if d.shape != (rank,) or outputs is None:
                raise UserError(
                    f"{module} has scales of {list(d.shape)} and {list(b.shape)}, which do not fit "
                    f"{reference.path} of {list(reference.shape)} at rank {rank}"
                )
            own[reference.path] = {"d": d, "b": b.reshape(outputs)}
            sizes[0].append(math.prod(reference.shape) // b.size)
            sizes[1].append(b.size)
    if not own:
        return [], {}
    method = VeRA(
        module_map.targets(own),
        rank=rank,
        d_initial=value(config, "d_initial"),
        dropout=value(config, "vera_dropout"),
    )
    left, right = left[: max(sizes[0])], right[:, : max(sizes[1])]
    leaves = {f"{path}/vera/{n}": x for path, each in own.items() for n, x in each.items()}
    leaves |= {"vera/left": left, "vera/right": right}
    return [method], {path: x.astype(np.float32) for path, x in leaves.items()}


def _outputs(
    reference: ModuleReference, size: int, inputs: int, outputs: int
) -> tuple[int, ...] | None:
    """The sizes of the output axes of a weight that has `size` outputs; None where none fit."""
    shape = reference.shape
    for n in range(1, len(shape)):
        if np.prod(shape[n:]) == size <= outputs and np.prod(shape[:n]) <= inputs:
            return shape[n:]
    return None


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, the scales of every module and the shared factors."""
    tensors = dict[str, Array]()
    methods: list[Any] = list(recipe.attached)
    if len(methods) > 1:
        problems.append("it has several entries of VeRA, and PEFT has one pair of factors")
    method, names = methods[0], list[str]()
    for bare, parts, mine in adapted(added, module_map, problems):
        each, name = mine[0], module_map.full(bare)
        if each is None or len(parts) > 1 or parts[0].weight != "kernel":
            problems.append(f"{bare}: it is no linear layer of one weight, which VeRA needs")
            continue
        own = each.leaves(leaves)
        names.append(name)
        tensors |= {f"{ROOT}{name}.{key}": own[ours].ravel() for key, ours in _OWN.items()}
    for key, ours in SHARED.items():
        if (path := f"{method.slot}/{ours}") in leaves:
            tensors[key] = np.ascontiguousarray(leaves[path].T)
        else:
            problems.append(
                f"there is no {path}, which does not train; give aj.adapters_of(params, recipe), "
                "in NNX nnx.state(model, aj.nnx.ADAPTERS)"
            )
    fields = {
        "target_modules": sorted(names, key=in_order),
        "r": method.rank,
        "d_initial": method.d_initial,
        "vera_dropout": method.dropout,
        "save_projection": True,
        "projection_prng_key": 0,
        "fan_in_fan_out": module_map.table.fan_in_fan_out,
        "bias": "none",
        "init_weights": True,
    }
    return fields, tensors
