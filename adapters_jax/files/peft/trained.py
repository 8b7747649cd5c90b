"""The base's own parameters that train beside a method: biases, heads, `modules_to_save`."""

import re
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import (
    Leaves,
    ModuleMap,
    as_in_base,
    in_order,
    our_leaves,
    their_leaves,
)
from adapters_jax.files.peft.config import ROOT, tied_problem

# Where PEFT keeps a module that trains; the second word is the name of the adapter.
IN_WRAPPER = re.compile(r"\.modules_to_save(\.default)?(?=\.|$)")
# The heads that PEFT saves whole with an adapter of a classifier's, whether they trained or not.
_CLASSIFIES, _HEADS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")


def read_trained(plain: Mapping[str, Array], module_map: ModuleMap, problems: list[str]) -> Leaves:
    """Returns the base's own parameters that the file holds, by path."""
    leaves: Leaves = {}
    for key, tensor in _without_tied(plain, module_map, problems).items():
        name, _, kind = key.rpartition(".")
        module = name.removesuffix(".base_layer")
        there = module_map.at(module)
        if not there:
            problems.append(f"{key}: names maps {module} to no module of the base")
        new = our_leaves(key, kind, tensor, there, module_map.inputs_first(module), problems)
        if not (key.endswith(".base_layer.weight") and as_in_base(new, module_map)):
            leaves |= {p: x.astype(module_map.base[p].dtype) for p, x in new.items()}
    return leaves


def _without_tied(plain: Mapping[str, Array], module_map: ModuleMap, problems: list[str]) -> Leaves:
    """The tensors without those of a tied output layer, which repeat the embedding's."""
    rest = dict(plain)
    for inner in ("", ".base_layer") if module_map.tied else ():
        pair = [f"{name}{inner}.weight" for name in module_map.tied or ()]
        keys = [next((k for k in plain if module_map.bare(k) == each), None) for each in pair]
        reference = module_map.at(pair[1].removesuffix(f"{inner}.weight"))[0]
        path = f"{reference.path}/{reference.weight}"
        found = [plain[key] for key in keys if key is not None]
        alike = len(found) == 2 and np.array_equal(found[0], found[1])
        if not alike and not all(as_in_base({path: x}, module_map) for x in found):
            head, embedding = ((keys[n] or pair[n]).removesuffix(f"{inner}.weight") for n in (0, 1))
            problems.append(tied_problem(embedding, head, module_map.held_twice))
        if keys[0] is not None:
            del rest[keys[0]]
    return rest


def _heads(trained: Mapping[str, Array], module_map: ModuleMap, task_type: str | None) -> set[str]:
    """The heads that PEFT saves whole, with all layers that they have.

    These are the ones that train, and those of the task. PEFT finds them by the ends of names, so
    DistilBERT's `pre_classifier` is saved with its `classifier`.
    """
    tasks = _HEADS if task_type in _CLASSIFIES else ()
    heads, found = set[str](), set[str]()
    for bare, parts in module_map.modules.items():
        head, *layers = bare.split(".")
        if head not in module_map.heads:
            continue
        heads.add(head)
        own = [leaf for part in parts for leaf in part.leaves if f"{part.path}/{leaf}" in trained]
        if head in tasks or set(own) - {"bias"} or (layers and own):
            found.add(head)
    return {head for head in heads if any(head.endswith(end) for end in found)}


def write_trained(
    trained: Leaves,
    adapted_modules: Container[str],
    module_map: ModuleMap,
    problems: list[str],
    task_type: str | None = None,
) -> tuple[Leaves, dict[str, Any]]:
    """Returns tensors and fields of the base's own parameters: biases alone, or whole modules."""
    tensors: Leaves = {}
    saved, biases, unknown = list[str](), set(), set(trained)
    heads = _heads(trained, module_map, task_type)
    for bare, parts in module_map.modules.items():
        paths = {f"{reference.path}/{name}" for reference in parts for name in reference.leaves}
        unknown -= paths
        mine, head = paths & trained.keys(), bare.split(".")[0]
        if not mine and head not in heads:
            continue
        adapted = any(reference.path in adapted_modules for reference in parts)
        alone = (
            head not in heads
            and all(path.endswith("/bias") for path in mine)
            and len(paths) > len(mine)
        )
        if adapted and not alone:
            problems.append(
                f"{bare} has factors and its weight trains as well, which PEFT does not support"
            )
            continue
        name = module_map.full(bare)
        biases |= {adapted} if alone else set()
        whole_head = head if head in heads else name
        saved += [] if alone or whole_head in saved else [whole_head]
        leaves, inner = ["bias"] if alone else parts[0].leaves, ".base_layer" if adapted else ""
        turned = module_map.inputs_first(bare)
        found = their_leaves(parts, leaves, trained, module_map.base, turned, problems)
        tensors |= {f"{ROOT}{name}{inner}.{kind}": x for kind, x in found.items()}
        if module_map.tied and bare == module_map.tied[1]:  # PEFT ties the weights of these two
            tied = module_map.full(module_map.tied[0])
            saved.append(tied)
            tensors[f"{ROOT}{tied}.weight"] = tensors[f"{ROOT}{name}.weight"]
    problems += [f"names has no module name for {path}; add it" for path in sorted(unknown)]
    bias = "none" if not biases else "all" if False in biases else "lora_only"
    fields: dict[str, Any] = {"bias": bias, "modules_to_save": sorted(saved, key=in_order) or None}
    if module_map.tied and module_map.full(module_map.tied[0]) in saved:
        fields["ensure_weight_tying"] = True
    return tensors, fields
