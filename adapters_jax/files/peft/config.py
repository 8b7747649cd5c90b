"""PEFT's `adapter_config.json`: which fields we support, and which modules and ranks they select.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters_jax.files.directories import field_problems

Config = Mapping[str, Any]
ROOT = "base_model.model."
TIED = (
    "{} is one weight with {} in this base, but the file changes one of them alone, or both "
    "differently; train it in PEFT with ensure_weight_tying=True, or use a model with "
    "tie_word_embeddings=False"
)


@dataclass(frozen=True)
class Kind:
    """The facts about one `peft_type`.

    Attributes:
        module: the module beside this one that has its functions `read` and `write`.
        methods: the names of the methods that it stores; a file has one of them.
        leaves: our leaf's name for each of PEFT's tensor names.
        fields: the supported fields of the configuration.
        trains: the base's parameters that may train beside it: "nothing", "modules", or "biases"
            as well as modules.
    """

    module: str
    methods: tuple[str, ...]
    leaves: Mapping[str, str]
    fields: frozenset[str]
    trains: str


def _fields(*names: str) -> frozenset[str]:
    return frozenset(" ".join(names).split())


KINDS = {
    "LORA": Kind(
        "lora",
        ("lora", "dora"),
        {
            "lora_A": "a",
            "lora_B": "b",
            "lora_embedding_A": "a",
            "lora_embedding_B": "b",
            "lora_magnitude_vector": "magnitude",
        },
        _fields(
            "r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern",
            "target_modules exclude_modules layers_to_transform layers_pattern bias",
            "modules_to_save init_lora_weights fan_in_fan_out target_parameters",
            "ensure_weight_tying",
        ),
        trains="biases",
    ),
    "ADAPTION_PROMPT": Kind(
        "prompts",
        ("llama_adapter",),
        {"adaption_prompt": "embedding", "adaption_gate": "gate"},
        _fields("adapter_len adapter_layers target_modules"),
        trains="nothing",
    ),
    "IA3": Kind(
        "ia3",
        ("ia3",),
        {"ia3_l": "scale"},
        _fields(
            "target_modules exclude_modules feedforward_modules fan_in_fan_out modules_to_save",
            "init_ia3_weights",
        ),
        trains="modules",
    ),
}
# Bookkeeping, and fields that act only beside a field that is not supported.
IDLE = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size"),
}
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": True}

# PEFT's initialisations that do not change the base, with our `a_init` that is nearest to each.
STARTS = {True: "uniform", False: "uniform", "gaussian": "gaussian_rank"}
STARTS |= dict.fromkeys(("orthogonal", "eva"), "uniform")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": tuple(STARTS),
    "bias": ("none", "all", "lora_only"),
}
_ADVICE = (
    " (this initialisation changes the base; to convert it, call PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion)"
)
# What PEFT does not do on parameters.
NOT_ON_PARAMETERS = ("lora_dropout", "use_dora", "fan_in_fan_out")
_BOOL, _TEXTS, _WHOLE, _NUMBER = (bool,), (str, list), (int,), (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("r", "adapter_len", "adapter_layers"), _WHOLE),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), _NUMBER),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "init_ia3_weights"), _BOOL),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), _TEXTS),
    **dict.fromkeys(("feedforward_modules", "layers_pattern"), _TEXTS),
    "layers_to_transform": (int, list),
    "target_parameters": (list,),
    "ensure_weight_tying": _BOOL,
}


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
        >>> config_problems({"peft_type": "LORA", "r": 4, "lora_bias": True, "new_field": None})
        ['lora_bias=True is not supported']
        >>> config_problems({"peft_type": "VERA"})
        ["peft_type='VERA', expected LORA or ADAPTION_PROMPT or IA3"]
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        return [f"peft_type={kind!r}, expected {' or '.join(KINDS)}"]
    problems = field_problems(config, KINDS[kind].fields, IDLE, _expected)
    if config.get("target_parameters"):
        problems += [
            f"{field}={config[field]!r} with target_parameters is not supported"
            for field in NOT_ON_PARAMETERS
            if config.get(field)
        ]
    return problems


def _expected(field: str, found: Any) -> list[str]:
    """What is expected of a field instead of the value found; empty if that is valid."""
    if field in _CHOICES:
        allowed = _CHOICES[field]
        good = isinstance(found, bool | str) and found in allowed
        advice = _ADVICE if field == "init_lora_weights" else ""
        return [] if good else [f"expected one of {', '.join(map(repr, allowed))}{advice}"]
    types = _TYPES[field]
    if types in (_WHOLE, _NUMBER):
        good = isinstance(found, types) and not isinstance(found, bool) and found >= 0
        return [] if good else [f"expected a {'whole ' * (types == _WHOLE)}number"]
    if not isinstance(found, types):
        return [f"expected {' or '.join(each.__name__ for each in types)}"]
    if isinstance(found, dict) and not all(isinstance(n, int | float) for n in found.values()):
        return ["expected a number for each pattern"]
    return _broken(found) if isinstance(found, str | dict) else []


def _broken(patterns: Iterable[str]) -> list[str]:
    """The invalid regular expressions; `patterns` is one, or a mapping whose keys are several."""
    problems = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"but {pattern!r} is not a regular expression: {error}")
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
