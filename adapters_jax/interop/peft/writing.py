"""Our methods and leaves as PEFT's tensors and configuration."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.interop.layouts import Array, their_leaf
from adapters_jax.interop.module_map import Added, ModuleMap, by_module, in_order, trained_value
from adapters_jax.interop.peft.config import ROOT
from adapters_jax.interop.peft.factors import Tensors, lora
from adapters_jax.methods import DoRA, LlamaAdapter, LoRA
from adapters_jax.recipe import Recipe


def write(
    recipe: Recipe, leaves: Mapping[str, Array], places: ModuleMap, prefix: str | None
) -> tuple[dict[str, Any], Tensors, list[str]]:
    """The configuration, the tensors, and every problem."""
    problems: list[str] = []
    added, trained = by_module(recipe, leaves, problems)
    kinds = {type(method) for method in recipe.attached}
    if kinds == {LlamaAdapter}:
        problems += [f"{path}: PEFT's prompts go with no other trained leaf" for path in trained]
        config, tensors = _prompts(recipe, added, places, prefix, problems)
        return config, tensors, problems
    if kinds not in ({LoRA}, {DoRA}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        problems.append(f"it adds {names}; PEFT has LoRA alone, DoRA alone or LlamaAdapter alone")
        return {}, {}, problems
    config, tensors = lora(recipe, added, places, prefix, problems)
    more, fields = _trained(trained, added, places, prefix, problems)
    return config | fields, tensors | more, problems


def _trained(
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
                f"{bare} has factors, and its weight trains as well, which PEFT has not"
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


def _prompts(
    recipe: Recipe, added: Added, places: ModuleMap, prefix: str | None, problems: list[str]
) -> tuple[dict[str, Any], Tensors]:
    """The fields, prompts and gates; PEFT adapts the last layers, with one gate for each."""
    names = {site: bare for bare, site in places.attention.items()}
    last = sorted(names, key=in_order)[-len(added) :]
    unlike = sorted(added.keys() ^ set(last), key=in_order)
    if unlike:
        problems.append(f"PEFT's prompts are in the last layers; {', '.join(unlike)} differ")
    tensors, lengths = {}, set()
    for site in sorted(added.keys() & names.keys(), key=in_order):
        method = next(m for m in recipe.at(site) if isinstance(m, LlamaAdapter))
        prompt, gate = added[site]["embedding"], added[site]["gate"]
        if len(gate) != 1:
            problems.append(f'{site} has {len(gate)} gates; PEFT has one a layer: gate="layer"')
        lengths.add(len(prompt))
        root = f"{ROOT}{places.full(names[site], prefix)}"
        tensors[f"{root}.adaption_prompt"] = prompt[None]
        opened = np.tanh(gate) if method.gate_activation == "tanh" else gate  # PEFT has no tanh
        tensors[f"{root}.adaption_gate"] = opened
    if len(lengths) != 1:
        problems.append(f"prompts are of one length in PEFT, here of {sorted(lengths)}")
    words = {names[site].rpartition(".")[2] for site in added if site in names}
    fields = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": max(lengths, default=0),
        "adapter_layers": len(added),
        "target_modules": min(words, default=""),
    }
    return fields, tensors
