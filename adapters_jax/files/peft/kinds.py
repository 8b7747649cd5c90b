"""The registry of the `peft_type`s that we support, and the code that all of them share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import ModuleMap, by_module, shortest
from adapters_jax.files.peft import ia3, lora, lora_writing, prompts
from adapters_jax.files.peft.config import ROOT, Config
from adapters_jax.files.peft.trained import Tensors, read_trained, write_trained
from adapters_jax.methods import Method, Unfreeze
from adapters_jax.recipe import Recipe


@dataclass(frozen=True)
class Kind:
    """One `peft_type`.

    Attributes:
        methods: the names of the methods that it stores; a file has one of them.
        leaves: our leaf's name for each of PEFT's tensor names.
        read: returns methods and leaves by path, given configuration, added tensors and module map.
        write: returns fields and tensors, given recipe, leaves by module and by path, module map
            and prefix.
        trains: the base's parameters that may train beside it: "nothing", "modules", or "biases"
            as well as modules.
    """

    methods: tuple[str, ...]
    leaves: Mapping[str, str]
    read: Callable[..., tuple[list[Method], dict[str, Array]]]
    write: Callable[..., tuple[dict[str, Any], Tensors]]
    trains: str


KINDS = {
    "LORA": Kind(("lora", "dora"), lora.LEAVES, lora.read, lora_writing.write, "biases"),
    "ADAPTION_PROMPT": Kind(
        ("llama_adapter",), prompts.LEAVES, prompts.read, prompts.write, "nothing"
    ),
    "IA3": Kind(("ia3",), ia3.LEAVES, ia3.read, ia3.write, "modules"),
}
_LEAVES = {theirs: ours for kind in KINDS.values() for theirs, ours in kind.leaves.items()}
_KEY = re.compile(rf"(.+)\.({'|'.join(_LEAVES)})(?:\.weight)?")
_MASK = re.compile(r"(.*\.)?attn\.(masked_)?bias")  # a buffer of old GPT-2s, saved with bias="all"


def read(
    config: Config, tensors: Mapping[str, Array], module_map: ModuleMap
) -> tuple[list[Method], dict[str, Array], list[str]]:
    """Returns the methods, their leaves by path, and a sentence for each problem."""
    problems: list[str] = []
    kind = KINDS[config["peft_type"]]
    added, plain = by_module_and_leaf(tensors, kind, problems)
    methods, leaves = kind.read(config, added, module_map, problems)
    trained = read_trained(plain, module_map, problems)
    if trained:
        methods.append(Unfreeze(shortest(trained, module_map.base)))
    return methods, leaves | trained, problems


def by_module_and_leaf(
    tensors: Mapping[str, Array], kind: Kind, problems: list[str]
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Splits tensors into the added ones, by module and our leaf's name, and the base's own."""
    added: dict[str, dict[str, Array]] = {}
    plain: dict[str, Array] = {}
    for key, tensor in tensors.items():
        if not key.startswith(ROOT):
            problems.append(f"{key} does not begin with {ROOT}")
            continue
        name = key.removeprefix(ROOT)
        match = _KEY.fullmatch(name)
        if match and match[2] in kind.leaves:
            added.setdefault(match[1], {})[_LEAVES[match[2]]] = tensor
        elif match:
            problems.append(f"{key} is a tensor of another peft_type")
        elif ".original_module." not in name and not _MASK.fullmatch(name):
            plain[name] = tensor
    return added, plain


def write(
    recipe: Recipe, leaves: Mapping[str, Array], module_map: ModuleMap, prefix: str | None
) -> tuple[dict[str, Any], Tensors, list[str]]:
    """Returns the configuration, the tensors, and a sentence for each problem."""
    problems: list[str] = []
    added, trained = by_module(recipe, leaves, problems)
    names = {method.name for method in recipe.attached}
    kind = next((k for k in KINDS.values() if len(names) == 1 and names <= set(k.methods)), None)
    if kind is None:
        others = ", ".join(sorted({type(m).__name__ for m in recipe.attached})) or "nothing"
        problems.append(
            f"the recipe adds {others}; PEFT stores LoRA alone, DoRA alone, LlamaAdapter alone or "
            "IA3 alone"
        )
        return {}, {}, problems
    fields, tensors = kind.write(recipe, added, leaves, module_map, prefix, problems)
    if kind.trains == "nothing":
        problems += [
            f"{path}: PEFT's prompts do not support other trained leaves beside them"
            for path in trained
        ]
        return fields, tensors, problems
    owners = [owner for path in leaves if (owner := recipe.owner(path))]
    adapted = {owner.module for owner in owners}
    more, trains = write_trained(trained, adapted, module_map, prefix, problems)
    if kind.trains == "modules" and trains.pop("bias") != "none":
        paths = ", ".join(path for path in trained if path.endswith("/bias"))
        problems.append(f"{paths}: PEFT's IA3 does not support trained biases beside it")
    if kind.trains == "modules" and trains.pop("ensure_weight_tying", False):
        problems.append("PEFT's IA3 does not support a trained embedding with a tied output layer")
    return fields | trains, tensors | more, problems
