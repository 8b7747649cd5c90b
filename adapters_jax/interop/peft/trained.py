"""The base's own parameters that train beside a method: biases, heads, `modules_to_save`."""

from collections.abc import Mapping
from typing import Any

from adapters_jax.interop.layouts import Array, our_leaf, their_leaf
from adapters_jax.interop.module_map import Added, ModuleMap, as_in_base, in_order, trained_value
from adapters_jax.interop.peft.config import ROOT

Tensors = dict[str, Array]


def read_trained(
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


def write_trained(
    trained: Mapping[str, Array],
    added: Added,
    places: ModuleMap,
    prefix: str | None,
    problems: list[str],
) -> tuple[Tensors, dict[str, Any]]:
    """The base's own parameters: biases on their own, or modules as a whole."""
    tensors: Tensors = {}
    saved, biases, unknown = [], set(), set(trained)
    for bare, parts in places.modules.items():
        paths = {f"{place.path}/{name}" for place in parts for name in place.leaves}
        unknown -= paths
        mine = paths & trained.keys()
        if not mine:
            continue
        adapted = any(place.path in added for place in parts)
        alone = all(path.endswith("/bias") for path in mine) and len(paths) > len(mine)
        if adapted and not alone:
            problems.append(
                f"{bare} has factors, and its weight trains as well, which PEFT does not support"
            )
            continue
        name = places.full(bare, prefix)
        biases |= {adapted} if alone else set()
        saved += [] if alone else [name]
        for leaf in ["bias"] if alone else parts[0].leaves:
            arrays = [trained_value(f"{p.path}/{leaf}", trained, places, problems) for p in parts]
            kind = "bias" if leaf == "bias" else "weight"
            inner = ".base_layer" if adapted else ""
            whole = their_leaf(leaf, arrays, places.fan_in_fan_out)
            tensors[f"{ROOT}{name}{inner}.{kind}"] = whole
    problems += [f"{path} has no name in PEFT's files; add it to names" for path in sorted(unknown)]
    bias = "none" if not biases else "all" if False in biases else "lora_only"
    return tensors, {"bias": bias, "modules_to_save": sorted(saved, key=in_order) or None}
