"""Settings as other libraries spell them, and how they are spelled here."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapters_jax.checks import shown
from adapters_jax.errors import UserError


def _same(value: Any) -> Any:
    return value


def _paths(value: Any) -> Any:
    """Patterns of paths for names of modules; a regular expression has no pattern.

    PEFT's "all-linear" leaves out embeddings and the output layer, which `**` takes as well.
    """
    if isinstance(value, str):
        return ("**", "!**/EMBEDDING", "!**/HEAD") if value == "all-linear" else ("**/NAME",)
    return tuple(f"**/{name}" for name in value) if isinstance(value, Iterable) else value


def _start(value: Any) -> Any:
    if value is True:
        return "uniform"
    return "gaussian_rank" if value == "gaussian" else value


def _placement(value: Any) -> str:
    return "parallel" if value else "sequential"


# Our name for a setting of PEFT, AdapterHub or qwix, and our value for theirs.
OURS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", _same),
    "lora_alpha": ("alpha", _same),
    "lora_dropout": ("dropout", _same),
    "use_rslora": ("rank_stabilized", _same),
    "init_lora_weights": ("a_init", _start),
    "target_modules": ("targets", _paths),
    "module_path": ("targets", _paths),
    "feedforward_modules": ("feed_forward", _paths),
    "adapter_len": ("prompt_length", _same),
    "num_virtual_tokens": ("length", _same),
    "prefix_length": ("length", _same),
    "non_linearity": ("activation", _same),
    "scaling": ("scale", _same),
    "is_parallel": ("placement", _placement),
}
# What stands in place of a setting that is none of a method here.
INSTEAD = {
    "use_dora": "aj.DoRA is a method of its own",
    "bias": "aj.lora(bias=...) trains biases",
    "modules_to_save": "aj.Unfreeze('NAME/**') beside it in a recipe trains a module",
    "layers_to_transform": "targets name the layers, 'layer_{10,11}/**'",
    "layers_pattern": "targets name the layers, 'layer_{10,11}/**'",
    "target_parameters": "targets may be paths of weights, '**/experts/up'",
    "task_type": "the base says its task",
}


def check_settings(method: str, fields: Iterable[str], given: Mapping[str, Any]) -> None:
    """Checks that no setting has the name that another library gives it.

    Args:
        method: the name of the method's class.
        fields: the names of its settings.
        given: the settings by the names that the caller wrote.

    Raises:
        UserError: some have, and the message has ours; other unknown names are Python's to report.

    Example:
        >>> check_settings("LoRA", ("targets", "rank"), {"r": 8, "target_modules": ["query"]})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: LoRA: write LoRA(rank=8, targets=('**/query',)) in place of
        r and target_modules, which are names of another library
    """
    fields = set(fields)
    unknown = [name for name in given if name not in fields]
    ours = [name for name in unknown if name in OURS and OURS[name][0] in fields]
    others = [name for name in unknown if name in INSTEAD]
    if not ours and not others:
        return
    written = {name: given[name] for name in given if name in fields}
    written |= {OURS[name][0]: OURS[name][1](given[name]) for name in ours}
    call = ", ".join(f"{name}={shown(value)}" for name, value in written.items())
    if "targets" not in written:  # given by position, or by the preset that was called
        call = f"..., {call}"
    problems = []
    if ours:
        problems.append(
            f"write {method}({call}) in place of {' and '.join(ours)}, "
            f"which {'are names' if len(ours) > 1 else 'is a name'} of another library"
        )
    problems += [f"{name} is no setting of it: {INSTEAD[name]}" for name in others]
    raise UserError(f"{method}: {'; '.join(problems)}")
