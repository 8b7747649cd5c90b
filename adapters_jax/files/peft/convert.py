"""Converts an adapter of PEFT's to a recipe and leaves, and back."""

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from adapters_jax.errors import AdapterFileError
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import (
    ModuleMap,
    Names,
    as_in_file,
    as_in_model,
    by_module,
    find_modules,
    shortest,
)
from adapters_jax.files.peft.config import KINDS, ROOT, Kind, config_problems
from adapters_jax.files.peft.trained import read_trained, write_trained
from adapters_jax.methods import Method, Unfreeze
from adapters_jax.recipe import Recipe

CLASSIFIES = "SEQ_CLS"
_OTHER_TABLE = (
    "give the base that the adapter is of, and the names of its family, such as "
    "adapters_jax.finetune.models.FAMILIES['roberta'].classifier.names"
)
_LEAVES = {theirs: ours for kind in KINDS.values() for theirs, ours in kind.leaves.items()}
_KEY = re.compile(rf"(.+)\.({'|'.join(_LEAVES)})(?:\.weight)?")
_MASK = re.compile(r"(.*\.)?attn\.(masked_)?bias")  # a buffer of old GPT-2s, saved with bias="all"


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    names: Names,
    base: Any,
    caller: str = "from_peft",
) -> tuple[Recipe, dict[str, Any]]:
    """Converts the configuration and the tensors of an adapter of PEFT's; see `load_peft`.

    Error messages begin with `caller`.
    """
    module_map = find_modules(names, base)
    problems = config_problems(config)
    if not problems:
        try:
            kind = KINDS[config["peft_type"]]
            added, plain = split_tensors(tensors, kind, problems)
            methods: list[Method]
            methods, leaves = _code(kind.reader).read(config, added, module_map, problems)
            trained = read_trained(plain, module_map, problems)
            if trained:
                methods.append(Unfreeze(shortest(trained, module_map.base)))
            leaves |= trained
            problems += _held_twice(leaves, module_map)
            if config.get("task_type") == CLASSIFIES:
                problems += unpooled(leaves, module_map)
            if not problems:
                return as_in_model(methods, leaves, module_map)
        except (ValueError, re.error) as error:  # a method rejects a number, or layers differ
            problems = [str(error)]
    if module_map.table and any("names maps " in each for each in problems):
        problems.append(_OTHER_TABLE)
    raise AdapterFileError(f"{caller}: {'; '.join(problems)}")


def to_peft(
    recipe: Recipe | Method,
    leaves: Mapping[str, Array],
    names: Names,
    base: Any,
    prefix: str | None = None,
) -> tuple[dict[str, Any], dict[str, Array], list[str]]:
    """Converts an adapter; see `save_peft`.

    Returns:
        The configuration, the tensors, and a sentence for each thing that PEFT does not support.
    """
    problems: list[str] = []
    module_map = find_modules(names, base, prefix)
    recipe, leaves = as_in_file(recipe, leaves, module_map)
    added, trained = by_module(recipe, leaves, problems)
    held = _held_twice(leaves, module_map)
    found = {method.name for method in recipe.attached}
    kind = next((k for k in KINDS.values() if len(found) == 1 and found <= set(k.methods)), None)
    if kind is None:
        others = ", ".join(sorted({type(m).__name__ for m in recipe.attached})) or "nothing"
        problems.append(
            f"the recipe adds {others}; PEFT stores LoRA alone, DoRA alone, LlamaAdapter alone or "
            "IA3 alone"
        )
        return {}, {}, problems + held
    fields, tensors = _code(kind.writer).write(recipe, added, leaves, module_map, problems)
    if kind.trains == "nothing":
        problems += [
            f"{path}: PEFT's prompts do not support other trained leaves beside them"
            for path in trained
        ]
        return fields, tensors, problems + held
    adapted = {owner.module for path in leaves if (owner := recipe.owner(path))}
    more, trains = write_trained(trained, adapted, module_map, problems)
    if kind.trains == "modules" and trains.pop("bias") != "none":
        paths = ", ".join(path for path in trained if path.endswith("/bias"))
        problems.append(f"{paths}: PEFT's IA3 does not support trained biases beside it")
    if kind.trains == "modules" and trains.pop("ensure_weight_tying", False):
        problems.append("PEFT's IA3 does not support a trained embedding with a tied output layer")
    return fields | trains, tensors | more, problems + held


def _code(module: str) -> Any:
    """The module with the functions of a kind; a process imports only those that it needs."""
    return import_module(f"adapters_jax.files.peft.{module}")


def split_tensors(
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
        # PEFT saves the original of a `modules_to_save` beside the trained one.
        elif ".original_module." not in name and not _MASK.fullmatch(name):
            plain[name] = tensor
    return added, plain


def _held_twice(leaves: Iterable[str], module_map: ModuleMap) -> list[str]:
    """The problems of leaves at modules whose replacement by PEFT changes nothing."""
    theirs = module_map.table.held_twice if module_map.table else ()
    ours = {reference.path: name for name in theirs for reference in module_map.at(name)}
    return [
        f"{path}: PEFT's adapter of {name!r} has no effect, since the model calls that module "
        "under another name; adapt other modules"
        for path, name in ours.items()
        if any(leaf.startswith(f"{path}/") for leaf in leaves)
    ]


def unpooled(leaves: Iterable[str], module_map: ModuleMap) -> list[str]:
    """The problem of a head in a model without the pooler that transformers' classifier has."""
    table = module_map.table
    if table is None or not any(leaf.startswith("head/") for leaf in leaves):
        return []
    paths, places = [*module_map.base, *leaves], {path.split("/")[0] for path in module_map.base}
    return [
        f"the head: there is no {place}/pooler, which transformers' classifier reads; build ours "
        "with pooling='pooler', load its base with pooler=True, or, if the head reads every "
        "token, give task_type='TOKEN_CLS'"
        for place in sorted(places)
        if any(rule.ours.startswith(f"{place}/pooler/") for rule in table.rules)
        and not any(path.startswith(f"{place}/pooler/") for path in paths)
    ]
