"""LLaMA-Adapter in PEFT's files: ADAPTION_PROMPT, with a single gate in each layer.

Reference: https://huggingface.co/docs/peft/package_reference/llama_adapter
"""

from typing import Any

import numpy as np

from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.patterns import in_order, shortest
from adapters_jax.files.peft.config import ROOT, Config
from adapters_jax.methods import LlamaAdapter, Method
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

# PEFT adds the prompts' values of a GPT-2 behind its output projection, not before it.
_OTHER = "attn"
_UNLIKE = "PEFT's prompts of a GPT-2 are not projected, and LLaMA-Adapter here projects them"


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one LlamaAdapter with one gate for each layer, and its leaves by path."""
    leaves: dict[str, Array] = {}
    modules = []
    length, count = config.get("adapter_len"), config.get("adapter_layers")
    if any(_word(module) == _OTHER for module in added):
        problems.append(_UNLIKE)
    for module, found in added.items():
        ours = module_map.attention.get(module_map.bare(module))
        shapes = {name: list(x.shape) for name, x in found.items()}
        width = shapes.get("embedding", [0])[-1:]
        if ours is None:
            problems.append(f"names maps {module} to no attention module of the base")
        elif shapes != {"embedding": [1, length, *width], "gate": [1]}:
            problems.append(
                f"{module} has {shapes}, expected a prompt [1, {length}, d] and a gate [1]"
            )
        else:
            modules.append(ours)
            both = {"embedding": found["embedding"][0], "gate": found["gate"]}
            leaves |= {f"{ours}/prompt/{name}": x.astype(np.float32) for name, x in both.items()}
    if len(added) != count:
        problems.append(f"adapter_layers={count}, but the file has prompts of {len(added)} layers")
    if not modules:
        return [], leaves
    targets = shortest(modules, module_map.attention.values())
    return [LlamaAdapter(targets, length or 1, "layer", "identity")], leaves


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, prompts and gates; PEFT adapts the last layers, with one gate in each."""
    names = {ours: bare for bare, ours in module_map.attention.items()}
    here = {each.path: each for each in added}
    known = here.keys() & names.keys()
    if any(_word(names[path]) == _OTHER for path in known):
        problems.append(_UNLIKE)
    for path in sorted(here.keys() - known, key=in_order):
        problems.append(module_map.unnamed(path))
    last = sorted(names, key=in_order)[len(names) - len(known) :]
    unlike = sorted(known ^ set(last), key=in_order)
    if unlike:
        problems.append(f"PEFT adapts the last layers only; {', '.join(unlike)} differ")
    tensors, lengths = {}, set()
    for ours in sorted(known, key=in_order):
        method, own = here[ours].method, here[ours].leaves(leaves)
        prompt, gate = own["embedding"], own["gate"]
        if len(gate) != 1:
            problems.append(
                f'{ours} has {len(gate)} gates; PEFT has one in each layer: use gate="layer"'
            )
        lengths.add(len(prompt))
        root = f"{ROOT}{module_map.full(names[ours])}"
        tensors[f"{root}.adaption_prompt"] = prompt[None]
        opened = np.tanh(gate) if method.gate_activation == "tanh" else gate  # PEFT applies no tanh
        tensors[f"{root}.adaption_gate"] = opened
    if len(lengths) > 1:
        problems.append(f"PEFT expects prompts of one length; these have {sorted(lengths)}")
    words = {_word(names[ours]) for ours in known}
    fields = {
        "adapter_len": max(lengths, default=0),
        "adapter_layers": len(added),
        "target_modules": min(words, default=""),
    }
    return fields, tensors


def _word(module: str) -> str:
    return module.rpartition(".")[2]
