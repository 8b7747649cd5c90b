"""LoHa and LoKr in PEFT's files.

PEFT's factors are of weights `(out, in)`, ours of `(in, out)`. Of a module that fuses several of
ours, each takes its outputs' part of LoHa's factors; a Kronecker product cannot be taken apart so.
The window of a convolution is flattened behind its inputs in PEFT's factors, or stands in a tensor
`t`, as which LyCORIS's "cp" form has it; read, both become ours.

Reference: https://huggingface.co/docs/peft/package_reference/loha
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array, ModuleReference, our_factors, rounded, their_factors
from adapters_jax.files.module_map import Added, Leaves, ModuleMap, in_order, pattern_of, shortest
from adapters_jax.files.peft.config import ROOT, Config, is_target, number_at, value
from adapters_jax.methods import LoHa, LoKr, Method
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one method for all targets, of LoKr one for each form, and the leaves by path."""
    leaves: dict[str, Array] = {}
    groups: dict[Any, dict[str, str]] = {}  # our paths and their modules, by form
    for module, found in added.items():
        there = module_map.at(module)
        try:
            if not there:
                raise UserError(f"names maps {module} to no layer of the base")
            if not is_target(config, module):
                raise UserError(f"{module} has factors but is not among the target modules")
            for reference in there:
                form, own = _OURS[config["peft_type"]](config, module, reference, found)
                slot = config["peft_type"].lower()
                leaves |= {f"{reference.path}/{slot}/{n}": x for n, x in own.items()}
                groups.setdefault(form, {})[reference.path] = module
        except UserError as problem:
            problems.append(str(problem))
    if not groups and not problems:
        problems.append(f"the file has no factors of {config['peft_type']}")
    methods: list[Method] = []
    among, usual = [*module_map.paths, *module_map.base], (value(config, "r"), alpha(config))
    for form, modules in groups.items():
        ranks = {path: number_at(config, "r", name) for path, name in modules.items()}
        alphas = {path: number_at(config, "alpha", name) for path, name in modules.items()}
        patterns: dict[str, Any] = {
            "rank_pattern": pattern_of(ranks, usual[0]),
            "alpha_pattern": pattern_of(alphas, usual[1]),
        }
        kind: Any = LoHa if config["peft_type"] == "LOHA" else LoKr
        methods.append(kind(shortest(modules, among), *usual, **dict(form), **patterns))
    return methods, leaves


def alpha(config: Config) -> float:
    """The alpha of a configuration."""
    return value(config, "alpha")


def _checked(module: str, found: Leaves, *forms: set[str]) -> None:
    """Raises UserError unless a module has the tensors of one of several forms."""
    if found.keys() not in forms:
        names = " or ".join(", ".join(sorted(form)) for form in forms)
        raise UserError(f"{module} has {', '.join(sorted(found))}, expected {names}")


_PAIRS = ("1", "2")
_LOHA = {f"hada_w{i}_{x}" for i in _PAIRS for x in "ab"}


def _our_loha(
    config: Config, module: str, reference: ModuleReference, found: Leaves
) -> tuple[Any, dict[str, Array]]:
    """LoHa's factors of one of our modules."""
    windows = {f"hada_t{i}" for i in _PAIRS}
    _checked(module, found, _LOHA, _LOHA | windows)
    made: dict[str, Array] = {}
    rank = number_at(config, "r", module)
    for i in _PAIRS:
        out: Any = found[f"hada_w{i}_a"]
        inner: Any = found[f"hada_w{i}_b"]
        if f"hada_t{i}" in found:
            window = found[f"hada_t{i}"]
            if window.ndim != 4 or out.ndim != 2 or inner.shape[:1] != window.shape[1:2]:
                raise _misfit(module, found, reference)
            inner, out = np.einsum("ijkl,jp->ipkl", window, inner), out.T
        elif inner.ndim == 2 and len(reference.shape) == 4 and reference.weight == "kernel":
            *places, inputs, _ = reference.shape
            if inner.size != len(inner) * np.prod(reference.shape[:-1]):
                raise _misfit(module, found, reference)
            inner = inner.reshape(len(inner), inputs, *places)
        if out.ndim != 2 or inner.ndim < 2 or len(inner) != rank:
            raise _misfit(module, found, reference)
        pair = our_factors(reference, inner, out.reshape(*out.shape, *(1,) * (inner.ndim - 2)))
        if pair is None:
            raise _misfit(module, found, reference)
        made |= {f"{name}{i}": array.astype(np.float32) for name, array in pair.items()}
    return (), made


def _our_lokr(
    config: Config, module: str, reference: ModuleReference, found: Leaves
) -> tuple[Any, dict[str, Array]]:
    """LoKr's factors of one of our modules, and the form that they have."""
    left, right = (
        ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}),
        (*({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}),),
    )
    _checked(module, found, *(one | other for one in left for other in right))
    factor = value(config, "decompose_factor")
    if reference.part or reference.weight != "kernel" or _is_window(reference):
        raise UserError(f"{module} is no linear layer of one weight, which LoKr needs here")
    form: dict[str, Any] = {"factor": None if factor == -1 else factor}
    form |= {"full": "lokr_w2" in found, "both": "lokr_w1" not in found}
    own = {
        **_turned(found, "w1", "lokr_w1"),
        **_turned(found, "w2", "lokr_w2"),
    }
    rank = number_at(config, "r", module)
    method = LoKr(reference.path, rank, alpha(config), **form)
    fitting = [
        method.shapes_at(
            math.prod(reference.shape[:n]), math.prod(reference.shape[n:]), reference.path
        )
        for n in range(1, len(reference.shape))
    ]
    if {name: array.shape for name, array in own.items()} not in fitting:
        raise _misfit(module, found, reference)
    return tuple(form.items()), {n: x.astype(np.float32) for n, x in own.items()}


def _turned(found: Leaves, ours: str, theirs: str) -> dict[str, Array]:
    """One side of a product, turned around: `(P Q)^T = Q^T P^T`."""
    if theirs in found:
        return {ours: found[theirs].T}
    return {f"{ours}_a": found[f"{theirs}_b"].T, f"{ours}_b": found[f"{theirs}_a"].T}


def _is_window(reference: ModuleReference) -> bool:
    """Whether a kernel is a convolution's; one with axes of heads has three."""
    return len(reference.shape) == 4


def _misfit(module: str, found: Leaves, reference: ModuleReference) -> UserError:
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in found.items())
    return UserError(
        f"{module} has {shapes}, which do not fit {reference.path} of {list(reference.shape)}, the "
        "rank and the factor of the configuration"
    )


_OURS = {"LOHA": _our_loha, "LOKR": _our_lokr}


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, and the factors of every module."""
    here = {each.path: each for each in added}
    methods: list[Any] = list(recipe.attached)
    kind, tensors = methods[0].kind, dict[str, Array]()
    forms = {(m.factor, m.both) for m in methods} if kind == "lokr" else set()
    if len(forms) > 1:
        problems.append("its methods have several values of factor and both, and PEFT has one each")
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for bare, parts in module_map.modules.items():
        mine = [here.pop(reference.path, None) for reference in parts]
        if not any(mine):
            continue
        (each, *_), (reference, *_) = mine, parts
        name = module_map.full(bare)
        if each is None or len(parts) > 1 or reference.weight != "kernel" or _is_window(reference):
            problems.append(f"{bare}: it is no linear layer of one weight, which this file needs")
            continue
        ranks[name] = each.method.rank_at(each.path)
        alphas[name] = rounded(each.method.scale_at(each.path) * ranks[name])
        own = each.leaves(leaves)
        try:
            theirs = _their_loha(reference, own) if kind == "loha" else _their_lokr(each, own)
        except UserError as problem:
            problems.append(str(problem))
            continue
        tensors |= {f"{ROOT}{name}.{key}": array for key, array in theirs.items()}
    problems += [f"names has no module name for {path}; add it" for path in sorted(here)]
    usual = max(ranks.values(), default=1), next(iter(alphas.values()), 1)
    fields: dict[str, Any] = {
        "peft_type": kind.upper(),
        "target_modules": sorted(ranks, key=in_order),
        "r": usual[0],
        "alpha": usual[1],
        "rank_pattern": {name: n for name, n in ranks.items() if n != usual[0]},
        "alpha_pattern": {name: n for name, n in alphas.items() if n != usual[1]},
        "use_effective_conv2d": False,
        "init_weights": True,
    }
    if kind == "lokr":
        (factor, both), *_ = forms
        fields |= {"decompose_both": both, "decompose_factor": -1 if factor is None else factor}
    return fields, tensors


def _their_loha(reference: ModuleReference, own: Mapping[str, Array]) -> dict[str, Array]:
    """PEFT's tensors of one module."""
    made: dict[str, Array] = {}
    for i in _PAIRS:
        inner, out = their_factors(reference, {"a": own[f"a{i}"], "b": own[f"b{i}"]})
        made |= {f"hada_w{i}_a": out, f"hada_w{i}_b": inner.reshape(len(inner), -1)}
    return made


def _their_lokr(each: Any, own: Mapping[str, Array]) -> dict[str, Array]:
    """PEFT's tensors of one module; it has no factors where they would be no smaller."""
    made: dict[str, Array] = {}
    rank = each.method.rank_at(each.path)
    for side in ("w1", "w2"):
        whole = own.get(side)
        n, o = (
            whole.shape if whole is not None else (len(own[f"{side}_a"]), own[f"{side}_b"].shape[1])
        )
        factored = rank < max(n, o) / 2 and (side == "w2" or each.method.both)
        if whole is None and not factored:
            whole = own[f"{side}_a"] @ own[f"{side}_b"]
        if whole is not None and factored:
            raise UserError(
                f"{each.path}: PEFT would make factors of rank {rank} for its {side}, and it is "
                f"whole here; raise the rank to {-(-max(n, o) // 2)}"
            )
        if whole is not None:
            made[f"lokr_{side}"] = np.ascontiguousarray(whole.T)
        else:
            made[f"lokr_{side}_a"] = np.ascontiguousarray(own[f"{side}_b"].T)
            made[f"lokr_{side}_b"] = np.ascontiguousarray(own[f"{side}_a"].T)
    return made
