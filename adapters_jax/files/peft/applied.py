"""What PEFT would apply of a file, by its matching rules, before the file is written.

The modules of the PyTorch model are those that the name table, or the caller's mapping, has for the
base. A pattern may match others there, such as another head or a module that holds several.

Reference: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from collections.abc import Iterable, Mapping

from adapters_jax.errors import first_few
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, ModuleMap
from adapters_jax.files.peft.config import Config, is_target, number_at
from adapters_jax.files.peft.parameters import parameters_by_key
from adapters_jax.files.peft.trained import NORM

# What decides how factors act, where no pattern does.
_ACTING = (
    *("peft_type", "use_rslora", "use_dora", "fan_in_fan_out", "feedforward_modules"),
    *("adapter_len", "adapter_layers", "alora_invocation_tokens", "num_virtual_tokens"),
    *("num_attention_heads", "num_transformer_submodules"),
    *("decompose_both", "decompose_factor", "coft", "use_effective_conv2d", "oft_block_size"),
    *("block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
)
_ACTIVATING = (*_ACTING, "task_type")

_BEFORE = ("PROMPT_TUNING", "PREFIX_TUNING")  # what is before the text
_NUMBERS = {"LORA": ("r", "lora_alpha"), **dict.fromkeys(("LOHA", "LOKR"), ("r", "alpha"))}


def differences(
    config: Config, written: Config, added: Added, plain: Mapping[str, Array], module_map: ModuleMap
) -> list[str]:
    """What PEFT would make of a file otherwise than it is meant; empty if nothing.

    Args:
        written: the one that the writer made, before the caller's own fields.
        added, plain: the file's tensors, as `split_tensors` returns them.
    """
    problems = [
        f"{field}={config.get(field)!r} is not the adapter's {written.get(field)!r}"
        for field in (_ACTIVATING if written.get("alora_invocation_tokens") else _ACTING)
        if config.get(field) != written.get(field)
    ]
    if config["peft_type"] in _BEFORE and not config.get("task_type"):
        problems.append("PEFT applies a prompt only with a task_type, such as 'CAUSAL_LM'; give it")
    if config["peft_type"] in ("ADAPTION_PROMPT", *_BEFORE):
        return problems
    if config["target_modules"] in (None, "all-linear"):
        return [*problems, "target_modules has to name modules or parts of names; leave it out"]
    parameters = parameters_by_key(config, added, module_map, problems)
    factors = {name for name in added if name not in parameters}
    if config["peft_type"] == "LN_TUNING":
        factors = {match[1] for key in plain if (match := NORM.fullmatch(key))}
    modules = _modules(module_map)
    targets = _targets(config, modules | factors)
    if ignored := sorted(factors - targets):
        problems.append(f"PEFT would not apply the factors of {first_few(ignored)}")
    if more := sorted(targets - factors):
        problems.append(f"PEFT would adapt {first_few(more)} as well, by target_modules")
    fields = _NUMBERS.get(config["peft_type"], ())
    for name in sorted(factors & targets):
        meant = {field: number_at(written, field, name) for field in fields}
        meant |= {"r": len(added[name]["a"])} if config["peft_type"] == "LORA" else {}
        problems += [
            f"PEFT would take {field}={given} for {name}, expected {meant[field]}"
            for field in meant
            if (given := number_at(config, field, name)) != meant[field]
        ]
    return problems + _unsaved(config.get("modules_to_save") or (), plain, modules)


def _targets(config: Config, modules: set[str]) -> set[str]:
    """The modules that PEFT adapts."""
    names = config["target_modules"]
    if not isinstance(names, str):  # most modules end like none, and a set is quicker than a list
        ends = {*names}
        modules = {name for name in modules if not ends.isdisjoint(_tails(name))}
    return {name for name in modules if is_target(config, name)}


def _tails(name: str) -> list[str]:
    """A name without its first words.

    Example:
        >>> _tails("layers.0.query")
        ['layers.0.query', '0.query', 'query']
    """
    words = name.split(".")
    return [".".join(words[n:]) for n in range(len(words))]


def _modules(module_map: ModuleMap) -> set[str]:
    """The names of the modules of theirs that have a weight."""
    rows = {} if module_map.table.stacks else module_map.rows
    experts = [name for names in rows.values() for name in names]
    tied = (module_map.tied or ())[:1]
    return {module_map.full(name) for name in (*module_map.modules, *experts, *tied)}


def _unsaved(saved: Iterable[str], plain: Mapping[str, Array], modules: set[str]) -> list[str]:
    """The problems of `modules_to_save`: PEFT expects tensors of all modules that it matches."""
    there = {name.rpartition(".")[0] for name in plain}
    problems = []
    for each in saved:
        # PEFT compares the ends of names, also within a word, and saves what is inside.
        inside = {name for name in modules | there if _ends(name, each)}
        if not inside or (lacking := sorted(inside - there)):
            said = first_few(lacking) if inside else each
            problems.append(f"PEFT expects the tensors of {said}, by modules_to_save={each!r}")
    return problems


def _ends(name: str, saved: str) -> bool:
    """Whether a module, or one that holds it, has a name that ends so."""
    words = name.split(".")
    return any(".".join(words[:n]).endswith(saved) for n in range(1, len(words) + 1))
