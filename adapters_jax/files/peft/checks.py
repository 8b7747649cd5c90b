"""Which modules a file of PEFT names, and those that it and a model lack of each other."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapters_jax.errors import UserError, first_few
from adapters_jax.files.layouts import ModuleReference
from adapters_jax.files.module_map import ModuleMap
from adapters_jax.files.peft.config import KINDS, Config, is_target, unread_fields
from adapters_jax.placement import Placement, Placements

Parts = tuple[ModuleReference, ...]
# PEFT's modules for LoRA where the configuration names none; it knows each model's family.
_DEFAULT_TARGETS = (
    *({"q_proj", "v_proj"}, {"query", "value"}, {"q", "v"}, {"c_attn"}, {"query_key_value"}),
    *({"q_proj", "v_proj", "fc1", "fc2"}, {"query_proj", "value_proj"}, {"in_proj"}),
)


def with_targets(config: Config, modules: Iterable[str], problems: list[str]) -> Config:
    """The configuration with the modules that PEFT chooses where it names none."""
    kind, names = config["peft_type"], {module.rpartition(".")[2] for module in modules}
    if kind not in ("LORA", "IA3") or not names or config.get("target_parameters"):
        return config
    if config.get("target_modules") is not None:
        return config
    targets = next((each for each in _DEFAULT_TARGETS if names <= each), None)
    if kind == "IA3" or targets is None:
        more = "" if kind == "LORA" else " and feedforward_modules"
        problems.append(
            f"target_modules=null stands for modules that PEFT chooses by the base's family, and "
            f"it would not read all of {', '.join(sorted(names))}; write target_modules="
            f"{sorted(names)}{more} into adapter_config.json"
        )
        return config
    return {**config, "target_modules": sorted(targets)}


def references(config: Mapping[str, Any], module: str, module_map: ModuleMap) -> Parts:
    """Our modules of one of theirs that has tensors; raises UserError where PEFT adapts none."""
    there = module_map.at(module)
    if not there:
        raise UserError(f"names maps {module} to no layer of the base")
    if not is_target(config, module):
        raise UserError(f"{module} has tensors but is not among the target modules")
    return there


def adapted(
    added: Placements, module_map: ModuleMap, problems: list[str]
) -> Iterator[tuple[str, Parts, list[Placement | None]]]:
    """Their modules that are adapted, even in part: the name, our parts, and what each part has."""
    here = {each.path: each for each in added}
    for bare, parts in module_map.modules.items():
        mine = [here.pop(reference.path, None) for reference in parts]
        if any(mine):
            yield bare, parts, mine
    problems += [*map(module_map.unnamed, sorted(here))]


def twice_spelt(added: Iterable[str], plain: Iterable[str], module_map: ModuleMap) -> list[str]:
    """The problems of modules and tensors that a file has under two names, with prefix and without.

    The names are those of `split_tensors`.
    """
    first: dict[str, str] = {}
    return [
        f"{name} and {other} are the same in this base; remove one of them"
        for name in (*added, *plain)
        if (other := first.setdefault(module_map.bare(name), name)) != name
    ]


def unsaved(config: Mapping[str, Any], plain: Iterable[str], module_map: ModuleMap) -> list[str]:
    """The problems of tensors that the file lacks of modules that were to be saved whole."""
    saved = config.get("modules_to_save") or ()
    there = {module_map.bare(key) for key in plain}
    lacking = (
        (name, f"{module}.{'bias' if leaf == 'bias' else 'weight'}")
        for module, references in module_map.modules.items()
        for name in saved
        if f".{name}." in f".{module_map.full(module)}."
        for leaf in references[0].leaves
    )
    return [
        f"modules_to_save has {name!r}, but the file has no {key}"
        for name, key in lacking
        if key not in there
    ]


def doubts(config: Mapping[str, Any], added: Iterable[str], module_map: ModuleMap) -> list[str]:
    """What PEFT warns of as well: fields without effect, and modules that are not as it has them.

    The modules are those of `split_tensors`.
    """
    texts, named = [], {module_map.bare(key): key for key in added}
    if fields := unread_fields(config):
        texts.append(f"adapter_config.json: {first_few(fields, 8)} is ignored")
    if config.get("alora_invocation_tokens") and config.get("task_type") != "CAUSAL_LM":
        texts.append(
            f"task_type={config.get('task_type')!r} with alora_invocation_tokens: PEFT would apply "
            "nothing, as it looks for them for 'CAUSAL_LM' alone; here it acts from them on"
        )
    inner = [key for bare, key in named.items() if not module_map.table.is_of_head(bare)]
    prefix = inner[0].removesuffix(module_map.bare(inner[0])) if inner else ""
    is_causal = module_map.tied or "lm_head" in module_map.modules
    usual = module_map.table.prefixes
    if any(usual) and is_causal and inner and not prefix:
        texts.append(
            f"{inner[0]} has no prefix such as {usual[0]!r}, so the adapter is of a "
            "base without its output layer; this one has one, and PEFT would apply nothing to it"
        )
    if lacking := missing(config, named, module_map, prefix):
        texts.append(
            "the configuration names modules that the file has nothing of, and they stay as they "
            f"are: {first_few(lacking, 4)}"
        )
    return texts


def missing(
    config: Mapping[str, Any], named: Iterable[str], module_map: ModuleMap, prefix: str
) -> list[str]:
    """The modules, with this prefix, that PEFT would adapt and are not named in the file."""
    if KINDS[config["peft_type"]].trains == "nothing":  # prompts are in the last layers, by number
        return []
    known = {*named}
    last = {name.rpartition(".")[2] for name in known}
    chosen = config.get("target_modules") == "all-linear"
    modules = [
        name
        for name, (reference, *_) in module_map.modules.items()
        if reference.weight in ("kernel", "embedding")
    ] + [name for names in module_map.rows.values() for name in names]
    return [
        whole
        for name in modules
        if name not in known and (not chosen or name.rpartition(".")[2] in last)
        if is_target(config, whole := module_map.full(name, prefix))
    ]
