"""AdapterHub's `adapter_config.json`: which fields we support, and which arithmetic they select.

Reference: https://docs.adapterhub.ml/methods.html
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from adapters_jax.files.settings import Rule, field_problems, is_number, of, one_of, rule, whole
from adapters_jax.methods import Bottleneck, Compacter

Config = Mapping[str, Any]
VERSION = "adapters.1.3.0"
SCALE = "scale"  # the composition of (IA)^3, whose vector is a B without A
LOCATIONS: dict[str | None, tuple[str, ...]] = {
    None: ("mh_adapter", "cross_adapter", "output_adapter"),
    "lora": ("selfattn_lora", "intermediate_lora", "output_lora"),
}

# AdapterHub's defaults; older files lack some fields.
DEFAULTS: dict[str | None, dict[str, Any]] = {
    None: {
        **dict.fromkeys(("original_ln_before", "ln_before", "ln_after", "is_parallel"), False),
        **dict.fromkeys(("mh_adapter", "cross_adapter", "output_adapter"), False),
        "adapter_residual_before_ln": False,
        "architecture": None,
        **{"original_ln_after": True, "residual_before_ln": True, "scaling": 1.0, "leave_out": []},
    },
    "lora": {
        "architecture": "lora",
        **{"selfattn_lora": True, "intermediate_lora": False, "output_lora": False},
        **{"r": 8, "alpha": 8, "dropout": 0.0, "attn_matrices": ["q", "v"], "leave_out": []},
        "composition_mode": "add",
    },
    "reft": {
        "architecture": "reft",
        **{"layers": "all", "tied_weights": False},
        **{"dropout": 0.05, "non_linearity": None, "output_reft": True},
    },
}
REQUIRED: dict[str | None, tuple[str, ...]] = {
    None: ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"),
    "lora": (),
    "reft": ("prefix_positions", "suffix_positions", "r", "orthogonality"),
}
# Our fields of Compacter by AdapterHub's, each with AdapterHub's default.
PHM: dict[str, tuple[str, Any]] = {
    "phm_dim": ("phm_dim", 4),
    "phm_rank": ("phm_rank", 1),
    "phm_bias": ("bias", True),
    "factorized_phm_W": ("full", True),  # the opposite of ours
    "factorized_phm_rule": ("factored_rule", False),
    "shared_W_phm": ("shared_weights", False),
    "shared_phm_rule": ("shared_rule", True),
    "learn_phm": ("train_rule", True),
}
# Initialisation, and fields that act only beside a field that is not supported.
IDLE = {
    *("architecture", "init_weights", "init_weights_seed", "inv_adapter_reduction_factor"),
    *("phm_c_init", "phm_init_range", "hypercomplex_nonlinearity"),
    *("attention_type", "new_attention_norm"),
}
ACTIVATIONS = {
    **{"relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu", "swish": "silu", "silu": "silu"},
    **{"tanh": "tanh", "sigmoid": "sigmoid", "leakyrelu": "leaky_relu", "linear": "identity"},
    **{"gelu_python": "gelu_exact", "gelu_fast": "gelu", "gelu_accurate": "gelu"},
    **{"gelu_pytorch_tanh": "gelu", "leaky_relu": "leaky_relu"},
}
THEIRS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}  # of ACTIVATIONS
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # of files without a version
_DROPOUT = (
    "0.0: AdapterHub applies it after the up-projection, we between the projections; set it to "
    "0.0 in the file, which changes no prediction"
)


def _is_numbers(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int for n in found)


_NUMBER = rule(is_number, "a number")
_ACTIVATION = rule(
    lambda found: isinstance(found, str) and found.lower() in ACTIVATIONS,
    f"one of {', '.join(ACTIVATIONS)}",
)
_OF_ALL: dict[str, Rule] = {
    "stochastic_depth": one_of(0.0),
    "composition_mode": one_of("add"),
    "dtype": one_of("float32"),
    "leave_out": rule(_is_numbers, "a list of layer numbers"),
}
RULES: dict[str | None, dict[str, Rule]] = {
    None: {
        **_OF_ALL,
        **{name: of(bool) for name, x in DEFAULTS[None].items() if type(x) is bool},
        **{name: of(bool) for name, (_, x) in PHM.items() if type(x) is bool},
        **dict.fromkeys(("phm_dim", "phm_rank"), whole(1)),
        "phm_layer": of(bool),
        "inv_adapter": one_of(None, "nice"),
        "scaling": _NUMBER,
        "dropout": rule(lambda found: found == 0.0, _DROPOUT),
        "reduction_factor": rule(
            lambda found: all(
                type(n) in (int, float) and n > 0
                for n in (found.values() if isinstance(found, Mapping) else [found])
            ),
            "a number above 0, or one for each layer",
        ),
        "non_linearity": _ACTIVATION,
    },
    "lora": {
        **_OF_ALL,
        **{name: of(bool) for name, x in DEFAULTS["lora"].items() if type(x) is bool},
        **dict.fromkeys(("alpha", "dropout"), _NUMBER),
        "r": whole(),
        "composition_mode": one_of("add", SCALE),
        "attn_matrices": rule(
            lambda found: isinstance(found, list) and {*map(str, found)} <= {*"qkv"},
            "a list of q, k and v",
        ),
    },
    "reft": {
        **dict.fromkeys(("tied_weights", "orthogonality"), of(bool)),
        "subtract_projection": one_of(True, advice=", as AdapterHub reads every file"),
        **dict.fromkeys(("prefix_positions", "suffix_positions"), whole()),
        **{"r": whole(1), "dropout": _NUMBER, "output_reft": one_of(True)},
        "dtype": one_of("float32"),
        "layers": rule(
            lambda found: found == "all" or _is_numbers(found), "'all', or a list of layer numbers"
        ),
        "non_linearity": _ACTIVATION,
    },
}


class Placement(NamedTuple):
    """The input of a sequential bottleneck, and the settings that select it.

    If h is a sublayer's output, x the residual and LN the norm after their sum, then the role
    "output" is h, "sum" is h + x and "norm" is LN(h + x). See `Bottleneck` for `placement`.
    """

    role: str
    placement: str
    original_ln_before: bool
    original_ln_after: bool
    residual_before_ln: bool


_OUTPUT = (
    Placement("output", "sequential", False, True, True),
    Placement("output", "sequential", False, True, False),
)
POST_NORM = (
    *_OUTPUT,
    Placement("norm", "norm", True, True, True),
    Placement("norm", "sequential", True, False, False),
)
# Here AdapterHub omits the norm, so both rows of "sum" are h + x + branch(h + x).
PRE_NORM = (
    *_OUTPUT,
    Placement("sum", "sequential", True, True, True),
    Placement("sum", "sequential", True, False, False),
)


def children(whole: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """The configurations of a file with defaults filled in, and their unsupported settings.

    Returns:
        The configurations, several if the file is a union; and one sentence for each problem. An
        unknown field is no problem if it is null, false or empty.

    Example:
        >>> whole = {"version": VERSION, "config": {"architecture": "lora", "r": 4, "new": None}}
        >>> (only,), problems = children(whole)
        >>> only["r"], only["attn_matrices"], problems
        (4, ['q', 'v'], [])
        >>> children({"config": {"architecture": "new"}})[1]
        ["architecture='new', expected lora, reft, union, or null for a bottleneck"]
    """
    config, problems, found = whole.get("config"), [], []
    if not isinstance(config, Mapping):
        return [], [f"config={config!r}, expected an object with the settings"]
    several = config.get("configs") if config.get("architecture") == "union" else [config]
    for each in several if isinstance(several, list) else [several]:
        kind = each.get("architecture") if isinstance(each, Mapping) else each
        if not isinstance(each, Mapping) or not (kind is None or kind in ("lora", "reft")):
            problems.append(
                f"architecture={kind!r}, expected lora, reft, union, or null for a bottleneck"
            )
            continue
        given = _modern(whole, each)
        problems += [f"{field} is missing" for field in REQUIRED[kind] if field not in given]
        problems += field_problems(given, RULES[kind], IDLE)
        found.append(DEFAULTS[kind] | {k: v for k, v in given.items() if v is not None})
        problems += _lora_problems(found[-1]) if kind == "lora" and not problems else []
    return found, problems


def _lora_problems(config: Config) -> list[str]:
    """What LoRA has and (IA)^3, a LoRA that scales, has not, and the other way round."""
    if config["composition_mode"] == SCALE:
        one = {"r": 1, "dropout": 0.0}
        return [
            f"{k}={config[k]!r} with composition_mode={SCALE!r}, expected {x}"
            for k, x in one.items()
            if config[k] != x
        ]
    matrices = config["attn_matrices"]
    return [] if "q" in matrices else [f"attn_matrices={matrices!r}, expected a list with q"]


def _modern(whole: Config, config: Config) -> dict[str, Any]:
    """Converts settings of older versions to those of today."""
    config = {"architecture": None, **config}
    version = whole.get("version")
    if version is None and isinstance(config.get("non_linearity"), str):
        config["non_linearity"] = _OLD_ACTIVATIONS.get(
            config["non_linearity"], config["non_linearity"]
        )
    if whole.get("type") == "text_task":  # these files name an invertible adapter but have none
        config = {k: v for k, v in config.items() if k not in ("inv_adapter", "invertible_adapter")}
    old = re.match(r"adapters\.(\d+)\.(\d+)", str(version))
    top = whole["config"].get("architecture") == "lora"
    if top and old and (int(old[1]), int(old[2])) < (1, 1) and "r" in config:
        config["alpha"] = config["r"]  # these versions did not scale
    return config


def placement(config: Config, post_norm: bool) -> tuple[str, str] | str:
    """The role and the placement of a bottleneck, or the problem of its settings.

    Example:
        >>> placement({**DEFAULTS[None], "original_ln_before": True}, post_norm=True)
        ('norm', 'norm')
    """
    if config["is_parallel"] and config["original_ln_after"]:
        return "sum", "parallel"  # its input is x
    if config["ln_after"] and config["adapter_residual_before_ln"] and not config["is_parallel"]:
        return "ln_after with adapter_residual_before_ln=True is not supported"
    settings = {name: config[name] for name in Placement._fields[2:]}
    for row in () if config["is_parallel"] else POST_NORM if post_norm else PRE_NORM:
        if row[2:] == tuple(settings.values()):
            return row[:2]
    together = ", ".join(f"{name}={found}" for name, found in settings.items())
    return f"{together}, is_parallel={config['is_parallel']} are not supported together"


def tensor_names(method: Bottleneck) -> dict[str, str]:
    """AdapterHub's names of a bottleneck's leaves; a norm before it is `adapter_down.0` as well."""
    first = "adapter_down.1" if method.norm_before else "adapter_down.0"
    if isinstance(method, Compacter):
        names = _phm_names(method, {"down": first, "up": "adapter_up"})
    else:
        names = {"down/kernel": f"{first}.weight", "down/bias": f"{first}.bias"}
        names |= {"up/kernel": "adapter_up.weight", "up/bias": "adapter_up.bias"}
    for norm in method.norms:
        names |= {f"{norm}/scale": f"adapter_{norm}.weight", f"{norm}/bias": f"adapter_{norm}.bias"}
    return names


def _phm_names(method: Compacter, modules: Mapping[str, str]) -> dict[str, str]:
    """The names of the projections' leaves; of those that modules share, in what all share."""
    names = {}
    for leaf in method.projections:
        side, _, part = leaf.partition("_")
        if side == "rule":
            names[leaf] = f"phm_{leaf}"
        elif leaf in method.shared_leaves:
            names[leaf] = f"W_{side}{part.removeprefix('weight')}"
        else:
            part = part.replace("weight", "W").replace("rule", "phm_rule")
            names[leaf] = f"{modules[side]}.{'b' if part == 'bias' else part}"
    return names
