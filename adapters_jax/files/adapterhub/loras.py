"""LoRA and (IA)^3 in AdapterHub's files: one tensor of a layer that fuses query, key and value."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.files.adapterhub.blocks import Blocks, Point
from adapters_jax.files.adapterhub.config import SCALE, Config
from adapters_jax.files.layouts import Array, our_factors, rounded, their_factors
from adapters_jax.files.module_map import Added, Leaves
from adapters_jax.files.patterns import shortest
from adapters_jax.methods import IA3, LoRA, Method
from adapters_jax.methods.lora import CHANGING
from adapters_jax.placement import Placement

# By layer and location: the settings, and for an attention which of its matrices have factors.
Settings = dict[Point, tuple[dict[str, Any], tuple[str, ...]]]
Own = Mapping[str, Placement]  # of one method, by path
_IA3 = {"r": 1, "alpha": 1, "dropout": 0.0, "composition_mode": SCALE, "init_weights": "ia3"}


def points(config: Config, among: Mapping[Point, Any]) -> list[Point]:
    """The points that a configuration adapts."""
    return [(n, name) for n, name in among if n not in config["leave_out"] and config[name]]


def read(
    config: Config, found: Added, blocks: Blocks, leaves: Leaves, problems: list[str]
) -> list[Method]:
    """Returns one LoRA or IA3, and adds its leaves; a fused layer stacks those of each matrix."""
    rank, paths, scales = config["r"], [], config["composition_mode"] == SCALE
    expected = {"lora_B"} if scales else {"lora_A", "lora_B"}
    for point in points(config, blocks.loras):
        for module, every in blocks.projections(point).items():
            # Feed-forward modules have no matrices, and so the name "".
            own = [each for m, each in every.items() if not m or m in config["attn_matrices"]]
            if not own:
                continue
            got = found.pop(f"{module}.loras", {})
            if None in own or got.keys() != expected:
                what = "no path in names" if None in own else f"the tensors {sorted(got)}"
                names = ", ".join(sorted(expected))
                problems.append(f"{module} has {what}, expected a path and {names}")
                continue
            if scales and config["alpha"] != 1 and len(own) < len(every):
                problems.append(
                    f"{module}: alpha={config['alpha']} scales the matrices without a vector, too; "
                    "expected alpha=1, or all of attn_matrices"
                )
                continue
            a, b = got.get("lora_A", np.zeros((len(own), 0))), got["lora_B"]
            for i, reference in enumerate(filter(None, own)):
                out = len(b) // len(own)
                if scales and b.size == sum(each.width for each in own if each):
                    paths.append(reference.path)
                    scale = b.ravel()[i * out : (i + 1) * out] * config["alpha"]
                    leaves[f"{reference.path}/ia3/scale"] = scale.astype(np.float32)
                    continue
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
    if scales:
        return [IA3(targets)]
    return [LoRA(targets, rank, config["alpha"], config["dropout"], a_init="uniform")]


def write(own: Own, flat: Leaves, blocks: Blocks, tensors: Added, problems: list[str]) -> Settings:
    """Returns LoRA's settings by layer and location, and adds its tensors."""
    settings: Settings = {}
    left = dict(own)
    for point, every in blocks.loras.items():
        made: dict[str, list[tuple[Array, Array]]] = {}
        fields: list[dict[str, Any]] = []
        adapted: dict[str, list[str]] = {}
        projections = blocks.projections(point)
        for matrix, module in ((m, name) for m, names in every.items() for name in names):
            reference = projections[module][matrix]
            each = left.pop(reference.path, None) if reference else None
            if reference is None or each is None:
                continue
            lora = each.method
            if lora.kind == "ia3":
                scale = each.leaves(flat)["scale"]
                if lora.scales_input(reference.path) or scale.shape != (reference.width,):
                    problems.append(f"{reference.path}: AdapterHub's (IA)^3 scales outputs alone")
                    continue
                fields.append(dict(_IA3))
                a, b = scale[:0], scale[:, None]
            else:
                a, b = their_factors(reference, each.leaves(flat), lora.slices)
                if (b.shape[0], *a.shape[1:]) != (reference.width, *reference.shape[:-1]):
                    problems.append(f"{reference.path}: its factors do not fit its weight")
                    continue
                if lora.a_init in CHANGING:
                    problems.append(
                        f"{reference.path}: a_init={lora.a_init!r} changed the base's weights, but "
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
                if len(both):
                    tensors.setdefault(f"{module}.loras", {})[factor] = both
    problems += [f"{path}: AdapterHub supports no LoRA here" for path in sorted(left)]
    return settings
