"""PEFT's `adapter_config.json`: which fields we support, and which modules and ranks they select.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapters_jax.files.settings import (
    Rule,
    field_problems,
    is_number,
    of,
    one_of,
    patterns,
    rule,
    whole,
)

Config = Mapping[str, Any]
ROOT = "base_model.model."
TIED = (
    "{} is one weight with {} in this base, but the file changes one of them alone, or both "
    "differently; train it in PEFT with ensure_weight_tying=True, or use a model with "
    "tie_word_embeddings=False"
)

# Bookkeeping, and fields that act only beside a field that is not supported.
IDLE = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size"),
}
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": True}

# PEFT's initialisations that do not change the base, with our `a_init` that is nearest to each.
STARTS = {True: "uniform", False: "uniform", "gaussian": "gaussian_rank"}
STARTS |= dict.fromkeys(("orthogonal", "eva"), "uniform")
_ADVICE = (
    " (this initialisation changes the base; to convert it, call PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion)"
)
# What PEFT does not do on parameters.
NOT_ON_PARAMETERS = ("lora_dropout", "use_dora", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True)
class Kind:
    """The facts about one `peft_type`.

    Attributes:
        reader, writer: the modules beside this one with its functions `read` and `write`.
        methods: the names of the methods that it stores, of which a file has one; empty if it has
            parameters of the base alone.
        leaves: our leaf's name for each of PEFT's tensor names.
        rules: the supported fields of the configuration.
        trains: the base's parameters that may train beside it: "nothing", "modules", "biases" as
            well as modules, or "norms" and heads.
    """

    reader: str
    writer: str
    methods: tuple[str, ...]
    leaves: Mapping[str, str]
    rules: Mapping[str, Rule]
    trains: str


_NUMBER = rule(lambda n: is_number(n) and n >= 0, "a number")
_NAMES = patterns(str, list)
_MODULES: dict[str, Rule] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), _NAMES),
    "fan_in_fan_out": of(bool),
}
KINDS = {
    "LORA": Kind(
        *("lora", "lora_writing", ("lora", "dora")),
        leaves={
            "lora_A": "a",
            "lora_B": "b",
            "lora_embedding_A": "a",
            "lora_embedding_B": "b",
            "lora_magnitude_vector": "magnitude",
        },
        rules={
            **_MODULES,
            "r": whole(),
            **dict.fromkeys(("lora_alpha", "lora_dropout"), _NUMBER),
            **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), of(bool)),
            **dict.fromkeys(("rank_pattern", "alpha_pattern"), patterns(dict)),
            "layers_to_transform": of(int, list),
            "layers_pattern": _NAMES,
            "target_parameters": of(list),
            "trainable_token_indices": of(list, dict),
            "lora_bias": of(bool),
            "eva_config": of(dict),
            "init_lora_weights": one_of(*STARTS, advice=_ADVICE),
            "bias": one_of("none", "all", "lora_only"),
        },
        trains="biases",
    ),
    "ADAPTION_PROMPT": Kind(
        *("prompts", "prompts", ("llama_adapter",)),
        leaves={"adaption_prompt": "embedding", "adaption_gate": "gate"},
        rules={"adapter_len": whole(), "adapter_layers": whole(), "target_modules": _NAMES},
        trains="nothing",
    ),
    "IA3": Kind(
        *("ia3", "ia3", ("ia3",)),
        leaves={"ia3_l": "scale"},
        rules={**_MODULES, "feedforward_modules": _NAMES, "init_ia3_weights": of(bool)},
        trains="modules",
    ),
    "LN_TUNING": Kind(
        *("trained", "trained", ()),
        leaves={},
        rules={n: x for n, x in _MODULES.items() if n != "fan_in_fan_out"},
        trains="norms",
    ),
    "TRAINABLE_TOKENS": Kind(
        *("trained", "trained", ()),
        leaves={},
        rules={"target_modules": _NAMES, "token_indices": of(list), "init_weights": of(bool)},
        trains="nothing",
    ),
}


def factor_keys(module: str, of_embedding: bool = False) -> tuple[str, str]:
    """The keys of a module's A and B: the weights of layers, or an embedding's own parameters.

    Example:
        >>> factor_keys("q")
        ('base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight')
    """
    start, end = (".lora_embedding_", "") if of_embedding else (".lora_", ".weight")
    return f"{ROOT}{module}{start}A{end}", f"{ROOT}{module}{start}B{end}"


def value(config: Config, field: str) -> Any:
    """A field's value, or PEFT's default where it is absent or null."""
    found = config.get(field)
    return DEFAULTS.get(field) if found is None else found


def config_problems(config: Config) -> list[str]:
    """The unsupported settings of a configuration, each as `field=value` with the reason.

    Args:
        config: the parsed file.

    Returns:
        One sentence for each problem. An unknown field is no problem if it is null, false or empty.

    Example:
        >>> config_problems({"peft_type": "LORA", "r": 4, "use_qalora": True, "new_field": None})
        ['use_qalora=True is not supported']
        >>> config_problems({"peft_type": "VERA"})
        ["peft_type='VERA', expected LORA or ADAPTION_PROMPT or IA3 or LN_TUNING or ...
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        return [f"peft_type={kind!r}, expected {' or '.join(KINDS)}"]
    problems = field_problems(config, KINDS[kind].rules, IDLE)
    if config.get("target_parameters"):
        problems += [
            f"{field}={config[field]!r} with target_parameters is not supported"
            for field in NOT_ON_PARAMETERS
            if config.get(field)
        ]
    return problems


def number_at(config: Config, field: str, module: str) -> Any:
    """The rank `r` or the `lora_alpha` of one module.

    The first pattern that matches it decides, or else the field itself.

    Example:
        >>> config = {"r": 8, "rank_pattern": {"q_proj": 4}}
        >>> number_at(config, "r", "layers.0.q_proj")
        4
    """
    patterns = "rank_pattern" if field == "r" else "alpha_pattern"
    # PEFT matches the end of a name, and takes the first pattern, not the longest.
    for pattern, found in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return found
    return value(config, field)


def is_target(config: Config, module: str) -> bool:
    """Whether PEFT adapts the module of this name.

    Example:
        >>> config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
        >>> is_target(config, "model.layers.0.q_proj"), is_target(config, "model.layers.1.q_proj")
        (False, True)
    """
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if excluded and _listed(excluded, module):
        return False
    if targets is None or targets == "all-linear":
        return True  # PEFT chose the modules; the file's tensors show which
    # PEFT asks for layers only where a name matches by its end.
    exact = not isinstance(targets, str) and module in targets
    return exact or (_listed(targets, module) and _in_layers(config, module))


def is_parameter(config: Config, name: str) -> bool:
    """Whether PEFT adapts the parameter of this name as such, and not with its module.

    Example:
        >>> is_parameter({"target_parameters": ["experts.up"]}, "layers.0.experts.up")
        True
    """
    return _listed(config.get("target_parameters") or [], name)


def _listed(names: str | list[str], module: str) -> bool:
    """Whether a name matches: a string is a regular expression, a list has names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: Config, module: str) -> bool:
    """Whether a module is in one of the layers to transform, where these are given."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    words = [patterns] if isinstance(patterns, str) else patterns
    forms = [rf".*\.{word}\.(\d+)\." for word in words or [r"[^.]*"]]
    match = next(filter(None, (re.match(form, module) for form in forms)), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)
