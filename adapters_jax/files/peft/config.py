"""PEFT's `adapter_config.json`: which fields we support, and which modules and ranks they select.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters_jax.errors import shown
from adapters_jax.files.expressions import matches
from adapters_jax.files.settings import (
    Rule,
    is_number,
    of,
    one_of,
    patterns,
    plain_names,
    rule,
    value_problems,
    whole,
    wholes,
)

Config = Mapping[str, Any]
ROOT = "base_model.model."
_TIED = (
    "{0} is one weight with {1} in this base, but the file changes one of them alone, or both "
    "differently; {2}"
)
_TIE = (
    "train it in PEFT with ensure_weight_tying=True and {!r} among its modules, or use a model "
    "with tie_word_embeddings=False"
)

# Bookkeeping, how factors began, and fields that act only beside a field that is not supported.
IDLE = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# What changes the arithmetic of a method, and is not supported where a kind has no rule for it.
_CHANGES = (
    *("lora_bias", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    "megatron_config",
)
_MERGE = (
    "; merge it in PEFT: from peft import {0}; "
    "{0}.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW_BASE)"
)
_UNMERGED = {*("MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "CARTRIDGE", "POLY", "XLORA")}
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
DEFAULTS = {
    **{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": True},
    **{"alpha": 8, "decompose_factor": -1},  # of LoHa and LoKr
    **{"init_r": 12, "d_initial": 0.1, "vera_dropout": 0.0},
    **{"use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
}

# PEFT's initialisations that do not change the base, with our `a_init` that is nearest to each.
STARTS = {True: "uniform", False: "uniform", "gaussian": "gaussian_rank"}
STARTS |= dict.fromkeys(("orthogonal", "eva"), "uniform")
_ADVICE = (
    " (this initialisation changes the base; to convert it, call PEFT's save_pretrained with "
    "path_initial_model_for_weight_conversion)"
)
# What PEFT does not do on parameters.
NOT_ON_PARAMETERS = (
    *("lora_dropout", "use_dora", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens"),
)


@dataclass(frozen=True)
class Kind:
    """The facts about one `peft_type`.

    Attributes:
        module: the module beside this one with its functions `read` and `write`.
        methods: the names of the methods that it stores; a file has one of them. Empty if it stores
            only parameters of the base.
        rules: the supported fields of the configuration.
        trains: the base's parameters that may train beside it: "nothing", "modules", "biases" as
            well as modules, or "norms" and heads.
        leaves: our leaf's name for each of PEFT's tensor names.
        shared: our names of tensors that are of no module, by their keys.
        root: begins the keys of tensors of modules.
        writer: the module with `write`, where it is another one.
    """

    module: str
    methods: tuple[str, ...]
    rules: Mapping[str, Rule]
    trains: str
    leaves: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    root: str = ROOT
    writer: str = ""


def _is_masks(found: Any) -> bool:
    """Whether a value has a list of flags for each of its names."""
    return isinstance(found, dict) and all(
        isinstance(own, list) and all(isinstance(x, bool) for x in own) for own in found.values()
    )


_NUMBER = rule(lambda n: is_number(n) and n >= 0, "a number")
_NAMES = patterns(str, list)
_MODULES: dict[str, Rule] = {
    **dict.fromkeys(("target_modules", "exclude_modules"), _NAMES),
    "modules_to_save": plain_names(list),
}
_LINEAR: dict[str, Rule] = {**_MODULES, "fan_in_fan_out": of(bool)}
_LAYERS: dict[str, Rule] = {
    "layers_to_transform": of(int, list),
    "layers_pattern": plain_names(str, list),
}
_OF_LAYERS = _LINEAR | _LAYERS
_VIRTUAL: dict[str, Rule] = {  # of tokens that are before the text
    **dict.fromkeys(("num_virtual_tokens", "token_dim"), whole(1)),
    **dict.fromkeys(("num_attention_heads", "num_layers"), whole(1)),
    "num_transformer_submodules": one_of(1),
    "modules_to_save": plain_names(list),
}
_LOHA = [f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
_LOKR = [f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
_LYCORIS: dict[str, Rule] = {
    **_MODULES,
    **_LAYERS,
    "r": whole(),
    **dict.fromkeys(("alpha", "rank_dropout", "module_dropout"), _NUMBER),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), patterns(dict)),
    **dict.fromkeys(("use_effective_conv2d", "init_weights"), of(bool)),
}
KINDS = {
    "LORA": Kind(
        *("lora", ("lora", "dora", "activated_lora")),
        leaves={
            "lora_A": "a",
            "lora_B": "b",
            "lora_embedding_A": "a",
            "lora_embedding_B": "b",
            "lora_magnitude_vector": "magnitude",
        },
        rules={
            **_OF_LAYERS,
            "r": whole(),
            **dict.fromkeys(("lora_alpha", "lora_dropout"), _NUMBER),
            **dict.fromkeys(("use_rslora", "use_dora", "ensure_weight_tying"), of(bool)),
            **dict.fromkeys(("rank_pattern", "alpha_pattern"), patterns(dict)),
            "target_parameters": of(list),
            "trainable_token_indices": of(list, dict),
            "alora_invocation_tokens": wholes(range(1 << 12), 2**31),
            "lora_bias": of(bool),
            "eva_config": of(dict),
            "init_lora_weights": one_of(*STARTS, advice=_ADVICE),
            "bias": one_of("none", "all", "lora_only"),
        },
        trains="biases",
        writer="lora_writing",
    ),
    "ADALORA": Kind(
        *("adalora", ()),  # ours is written as LORA
        leaves={"lora_A": "a", "lora_E": "lambda", "lora_B": "b"},
        rules={
            **_OF_LAYERS,
            **dict.fromkeys(("init_r", "r", "target_r", "deltaT", "total_step"), whole()),
            **dict.fromkeys(("tinit", "tfinal"), whole(0)),
            **dict.fromkeys(("beta1", "beta2", "orth_reg_weight", "lora_dropout"), _NUMBER),
            "lora_alpha": rule(lambda n: is_number(n) and n > 0, "a number above 0"),
            "rank_pattern": rule(_is_masks, "lists of true and false"),
            **dict.fromkeys(("alpha_pattern", "loftq_config"), of(dict)),
            **dict.fromkeys(("use_rslora", "ensure_weight_tying"), of(bool)),
            "init_lora_weights": of(bool, str),
            **dict.fromkeys(("use_dora", "target_parameters"), rule(lambda x: not x, "none")),
            "bias": one_of("none", "all", "lora_only"),
        },
        trains="biases",
    ),
    "ADAPTION_PROMPT": Kind(
        *("prompts", ("llama_adapter",)),
        leaves={"adaption_prompt": "embedding", "adaption_gate": "gate"},
        rules={"adapter_len": whole(), "adapter_layers": whole(), "target_modules": _NAMES},
        trains="nothing",
    ),
    "IA3": Kind(
        *("ia3", ("ia3",)),
        leaves={"ia3_l": "scale"},
        rules={**_LINEAR, "feedforward_modules": _NAMES, "init_ia3_weights": of(bool)},
        trains="modules",
    ),
    "LOHA": Kind(
        *("lycoris", ("loha",)),
        leaves={name: name for name in _LOHA},
        rules=_LYCORIS,
        trains="modules",
    ),
    "LOKR": Kind(
        *("lycoris", ("lokr",)),
        leaves={name: name for name in _LOKR},
        rules={
            **_LYCORIS,
            "decompose_both": of(bool),
            "decompose_factor": rule(
                lambda n: n == -1 or (type(n) is int and n > 0), "-1 or a size"
            ),
            "init_weights": of(bool, str),
            "rank_dropout_scale": of(bool),
        },
        trains="modules",
    ),
    "VERA": Kind(
        *("vera", ("vera",)),
        leaves={"vera_lambda_d": "d", "vera_lambda_b": "b"},
        rules={
            **_OF_LAYERS,
            "r": whole(),
            "d_initial": rule(is_number, "a number"),
            "vera_dropout": _NUMBER,
            "bias": one_of("none"),
            **dict.fromkeys(("save_projection", "init_weights"), of(bool)),
            "projection_prng_key": of(int),
        },
        trains="modules",
        shared={"base_model.vera_A": "left", "base_model.vera_B": "right"},
    ),
    "OFT": Kind(
        *("oft", ("oft",)),
        leaves={"oft_R": "skew"},
        rules={
            **_OF_LAYERS,
            **dict.fromkeys(("r", "oft_block_size"), whole(0)),
            "num_cayley_neumann_terms": rule(
                lambda n: type(n) is int and 1 < n < 100, "2 to 99, since one turns nothing"
            ),
            **dict.fromkeys(("module_dropout", "eps"), _NUMBER),
            **dict.fromkeys(("block_share", "use_cayley_neumann", "init_weights"), of(bool)),
            "coft": one_of(False),
            "bias": one_of("none"),
        },
        trains="modules",
    ),
    "PROMPT_TUNING": Kind(
        *("prompt_tuning", ("prompt_tuning",)),
        rules={
            **_VIRTUAL,
            "num_transformer_submodules": one_of(1, 2),
            **dict.fromkeys(
                ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"), of(str)
            ),
            "tokenizer_kwargs": of(dict),
        },
        trains="modules",
        shared={"prompt_embeddings": "embedding"},
        root="base_model.",
    ),
    "PREFIX_TUNING": Kind(
        *("prefix", ("prefix",)),
        rules={
            **_VIRTUAL,
            "encoder_hidden_size": whole(1),
            "prefix_projection": of(bool),
            "init_weights": of(str),
        },
        trains="modules",
        shared={"prompt_embeddings": "pairs"},
        root="base_model.",
    ),
    "LN_TUNING": Kind(
        *("trained", ()),
        rules=_MODULES,
        trains="norms",
    ),
    "TRAINABLE_TOKENS": Kind(
        *("trained", ()),
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

    Returns:
        One sentence for each problem. A field that we do not know is none, see `unread_fields`.

    Example:
        >>> config_problems({"peft_type": "LORA", "r": "4", "use_qalora": True, "new_field": 1})
        ["r='4', expected a whole number", 'use_qalora=True is not supported']
        >>> config_problems({"peft_type": "XLORA"})
        ["peft_type='XLORA', expected LORA or ADALORA or ADAPTION_PROMPT or IA3 or ...
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        owner = f"AutoPeftModel{_CLASSES.get(str(config.get('task_type')), 'ForCausalLM')}"
        merge = "" if not isinstance(kind, str) or kind in _UNMERGED else _MERGE.format(owner)
        return [f"peft_type={shown(kind)}, expected {' or '.join(KINDS)}{merge}"]
    rules, given = KINDS[kind].rules, {k: found for k, found in config.items() if found is not None}
    problems = value_problems(given, rules) + [
        f"{field}={shown(given[field])} is not supported"
        for field in _CHANGES
        if field not in rules and given.get(field)
    ]
    if config.get("use_dora") and config.get("alora_invocation_tokens"):
        problems.append("use_dora=True with alora_invocation_tokens is not supported")
    if config.get("target_parameters"):
        problems += [
            f"{field}={config[field]!r} with target_parameters is not supported"
            for field in NOT_ON_PARAMETERS
            if config.get(field)
        ]
    return problems


def unread_fields(config: Config) -> list[str]:
    """The fields with a value that are of training, of other programs, or of another PEFT.

    Example:
        >>> unread_fields({"peft_type": "LORA", "r": 4, "unsloth": {"fast": True}, "new": None})
        ["unsloth={'fast': True}"]
    """
    known = {*IDLE, *_CHANGES, *KINDS[config["peft_type"]].rules}
    return [f"{k}={shown(found, 80)}" for k, found in config.items() if found and k not in known]


def tied_problem(embedding: str, head: str, held_twice: Collection[str]) -> str:
    """The problem of a change that is not that of both an embedding and its tied output layer."""
    # PEFT ties T5's further embeddings as well, which are one weight with these two.
    adapts = embedding.rpartition(".")[2] not in held_twice
    advice = _TIE.format(head.rpartition(".")[2]) if adapts else "adapt other modules"
    return _TIED.format(embedding, head, advice)


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
        if matches(pattern, module, r"(.*\.)?({})$"):
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
    if targets == "all-linear":
        return True  # PEFT chose the modules; the file's tensors show which
    if targets is None:
        return False
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
        return matches(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: Config, module: str) -> bool:
    """Whether a module is in one of the layers to transform, where these are given."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    words = [patterns] if isinstance(patterns, str) else patterns
    forms = [rf"(?:^|.*?\.){word}\.(\d+)\." for word in words or ()] or [r".*?\.[^.]*\.(\d+)\."]
    # PEFT takes the first number, which is the layer's, and not that of an expert in it.
    match = next(filter(None, (re.match(form, module) for form in forms)), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)
