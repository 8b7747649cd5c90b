"""LoHa and LoKr in PEFT's files, whose tensors are those of LyCORIS.

PEFT's factors are of weights `(out, in)`, ours of `(in, out)`. Of a module that fuses several of
ours, each takes its outputs' part of LoHa's factors; a Kronecker product cannot be taken apart so.
The window of a convolution is flattened behind its inputs in LoHa's factors, or stands in a tensor
`t` (LyCORIS's "cp"); read, both become ours. A convolution's LoKr has its window in W2 alone, and
so is another one than ours.

Reference: https://huggingface.co/docs/peft/package_reference/loha
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array, ModuleReference, our_factors, rounded, their_factors
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.patterns import in_order, pattern_of
from adapters_jax.files.peft.checks import adapted, references
from adapters_jax.files.peft.config import ROOT, Config, number_at, value
from adapters_jax.files.settings import collecting
from adapters_jax.methods import METHODS, LoKr, Method
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe
from adapters_jax.weights.axes import Axes

Made = tuple[dict[str, Any], dict[str, Array]]  # fields of the method, and leaves by name


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one method for all targets, of LoKr one for each form, and the leaves by path."""
    kind, leaves = config["peft_type"].lower(), dict[str, Array]()
    groups: dict[Any, dict[str, tuple[int, float]]] = {}  # our paths with rank and alpha, by form
    factor = value(config, "decompose_factor")
    for module, found in added.items():
        numbers = number_at(config, "r", module), number_at(config, "alpha", module)
        with collecting(problems):
            for reference in references(config, module, module_map):
                tried = [factor] if kind == "lokr" else []
                form, own = ours(module, reference, found, numbers[0], tried)
                leaves |= {f"{reference.path}/{kind}/{name}": x for name, x in own.items()}
                groups.setdefault(tuple(form.items()), {})[reference.path] = numbers
    usual = value(config, "r"), value(config, "alpha")
    methods: list[Method] = []
    for form, paths in groups.items():
        ranks, alphas = ({path: each[i] for path, each in paths.items()} for i in (0, 1))
        patterns: dict[str, Any] = {
            "rank_pattern": pattern_of(ranks, usual[0]),
            "alpha_pattern": pattern_of(alphas, usual[1]),
        }
        method: Any = METHODS[kind]
        methods.append(method(module_map.targets(paths), *usual, **dict(form), **patterns))
    return methods, leaves


def ours(
    module: str,
    reference: ModuleReference,
    found: Mapping[str, Array],
    rank: int,
    factors: Iterable[int] = (),
) -> Made:
    """The method's form and the leaves of one of our modules.

    Args:
        module: the name of theirs.
        factors: for LoKr, the values that PEFT's `decompose_factor` may have.

    Raises:
        UserError: the tensors are not those of one module, or do not fit ours.
    """
    check_names(module, found)
    made = None
    if reference.weight == "kernel":
        fits = _our_loha if "hada_w1_a" in found else _our_lokr
        made = fits(reference, found, rank, factors)
    if made is None:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in found.items())
        raise UserError(
            f"{module} has {shapes}, which do not fit {reference.path} of {list(reference.shape)} "
            f"at rank {rank}" + "".join(f" and factor {each}" for each in [*factors][:2])
        )
    return made[0], {name: array.astype(np.float32) for name, array in made[1].items()}


_PAIRS = ("1", "2")
_SIDES = {side: ((f"lokr_{side}",), (f"lokr_{side}_a", f"lokr_{side}_b")) for side in ("w1", "w2")}


def check_names(module: str, found: Iterable[str]) -> None:
    """Raises UserError unless a module has the tensors of one LoHa or of one LoKr."""
    loha = {f"hada_w{i}_{x}" for i in _PAIRS for x in "ab"}
    forms = [loha, loha | {"hada_t1", "hada_t2"}]
    if any(name.startswith("lokr") for name in found):
        forms = [{*one, *two} for one in _SIDES["w1"] for two in _SIDES["w2"]]
    if {*found} not in forms:
        known = " or ".join(", ".join(sorted(form)) for form in forms)
        raise UserError(f"{module} has {', '.join(sorted(found))}, expected {known}")


def _our_loha(
    reference: ModuleReference, found: Mapping[str, Array], rank: int, factors: Iterable[int]
) -> Made | None:
    """LoHa's factors; None if they do not fit."""
    made: dict[str, Array] = {}
    *window, inputs, _ = shape = reference.shape
    for i in _PAIRS:
        out: Any = found[f"hada_w{i}_a"]
        inner: Any = found[f"hada_w{i}_b"]
        if (core := found.get(f"hada_t{i}")) is not None:
            if core.ndim != 4 or {out.ndim, inner.ndim} != {2} or len(inner) != core.shape[1]:
                return None
            inner, out = np.einsum("ijkl,jp->ipkl", core, inner), out.T
            # A window of one axis has a second one of size 1 there, and a dense layer two.
            while inner.ndim > len(shape) and inner.shape[-1] == 1:
                inner = inner[..., 0]
        elif len(shape) == 4 and inner.ndim == 2:
            if inner.shape[1] != inputs * math.prod(window):
                return None
            inner = inner.reshape(len(inner), inputs, *window)
        if out.ndim != 2 or inner.ndim < 2 or len(inner) != rank:
            return None
        pair = our_factors(reference, inner, out.reshape(*out.shape, *(1,) * (inner.ndim - 2)))
        # Flat factors of several inputs' axes do not say whether the weight is a convolution's.
        if pair is None or (inner.ndim == 2 and pair["a"].ndim > 2):
            return None
        made |= {f"{name}{i}": array for name, array in pair.items()}
    return {}, made


def _our_lokr(
    reference: ModuleReference, found: Mapping[str, Array], rank: int, factors: Iterable[int]
) -> Made | None:
    """LoKr's factors, turned around since `(P Q)^T = Q^T P^T`; None if they do not fit."""
    own, shape = dict[str, Array](), _without_window(reference)
    found = {
        name: x.reshape(x.shape[:2]) if x.shape[2:] == (1, 1) else x for name, x in found.items()
    }
    for side in _SIDES:
        if f"lokr_{side}" in found:
            own[side] = found[f"lokr_{side}"].T
        else:
            own |= {f"{side}_a": found[f"lokr_{side}_b"].T, f"{side}_b": found[f"lokr_{side}_a"].T}
    shapes = {name: array.shape for name, array in own.items()}
    sides = [shapes.get(s) or (*shapes[f"{s}_a"][:1], *shapes[f"{s}_b"][1:]) for s in _SIDES]
    if [*map(math.prod, zip(*sides, strict=False))] != [shape[0], math.prod(shape[1:])]:
        return None  # whatever the factor is
    form: dict[str, Any] = {"full": "w2" in own, "both": "w1" not in own}
    for factor in factors if reference.part is None else ():
        form["factor"] = None if factor == -1 else factor
        method = LoKr("**", rank, **form)
        if method.shapes_at(shape[0], math.prod(shape[1:]), "") == shapes:
            return form, own
    return None


def _without_window(reference: ModuleReference) -> tuple[int, ...]:
    """The shape of a kernel; that of a convolution of one place without its window."""
    shape = reference.shape
    return shape[2:] if len(shape) == 4 and shape[:2] == (1, 1) else shape


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, and the factors of every module."""
    methods: list[Any] = list(recipe.attached)
    kind, tensors = methods[0].kind, dict[str, Array]()
    factor = _one_factor(methods, added, problems) if kind == "lokr" else None
    both = any(method.both for method in methods) if kind == "lokr" else False
    numbers: dict[str, dict[str, Any]] = {"r": {}, "alpha": {}}
    for bare, parts, mine in adapted(added, module_map, problems):
        (each, *_), (reference, *_) = mine, parts
        if each is None or len(parts) > 1 or not _is_held(kind, reference, each.point().axes):
            what = "linear layer" if kind == "lokr" else "linear layer or convolution"
            problems.append(f"{bare} is no {what} of one weight, which PEFT's {kind} needs")
            continue
        name, own, rank = module_map.full(bare), each.leaves(leaves), each.method.rank_at(each.path)
        if kind == "loha":
            theirs = _their_loha(reference, own)
        else:
            window = (1, 1) if len(reference.shape) == 4 else ()
            rank, theirs = _their_lokr(own, rank, both, window)
        numbers["r"][name] = rank
        numbers["alpha"][name] = rounded(each.method.scale_at(each.path) * rank)
        tensors |= {f"{ROOT}{name}.{key}": array for key, array in theirs.items()}
    usual = {field: next(iter(found.values()), 1) for field, found in numbers.items()}
    fields: dict[str, Any] = {
        "target_modules": sorted(numbers["r"], key=in_order),
        **usual,
        "rank_pattern": {name: n for name, n in numbers["r"].items() if n != usual["r"]},
        "alpha_pattern": {name: n for name, n in numbers["alpha"].items() if n != usual["alpha"]},
        "use_effective_conv2d": False,
        "init_weights": True,
    }
    if kind == "lokr":
        fields |= {"decompose_both": both, "decompose_factor": -1 if factor is None else factor}
    return fields, tensors


def _is_held(kind: str, reference: ModuleReference, axes: Axes) -> bool:
    """Whether a kernel is one that PEFT's file can hold factors of."""
    if len(reference.shape) == 4:
        return kind == "loha" or len(_without_window(reference)) == 2
    return reference.weight == "kernel" and len(axes.inputs) == 1


def _one_factor(methods: Sequence[Any], added: Placements, problems: list[str]) -> int | None:
    """The factor that gives all weights of LoKr the sizes that they have."""
    factors = {method.factor: None for method in methods}
    for factor in factors:
        alike = (replace(each.method, factor=factor).leaves(each.point()) for each in added)
        shapes = ({n: leaf.shape for n, leaf in leaves.items()} for leaves in alike)
        if all(found == dict(each.arrays) for found, each in zip(shapes, added, strict=True)):
            return factor
    problems.append(f"PEFT has one factor, and none of {[*factors]} fits all weights")
    return None


def _their_loha(reference: ModuleReference, own: Mapping[str, Array]) -> dict[str, Array]:
    """PEFT's tensors of one module."""
    made: dict[str, Array] = {}
    for i in _PAIRS:
        inner, out = their_factors(reference, {"a": own[f"a{i}"], "b": own[f"b{i}"]})
        made |= {f"hada_w{i}_a": out.reshape(len(out), -1)}
        made |= {f"hada_w{i}_b": inner.reshape(len(inner), -1)}
    return made


def _their_lokr(
    own: Mapping[str, Array], rank: int, both: bool, window: tuple[int, ...]
) -> tuple[int, dict[str, Array]]:
    """PEFT's rank and tensors of one module: it has factors where they are smaller, and no others.

    So whole ones, W1 if `both` is set, have a rank for which factors would be no smaller. The W2 of
    a convolution has a window of one place.
    """
    for side in own.keys() & ({*_SIDES} if both else {"w2"}):
        rank = max(rank, -(-max(own[side].shape) // 2))
    made: dict[str, Array] = {}
    for side in _SIDES:
        a, b = own.get(f"{side}_a"), own.get(f"{side}_b")
        whole: Any = own[side] if a is None or b is None else a @ b
        if a is None or b is None or rank >= max(whole.shape) / 2:
            more = window if side == "w2" else ()
            made[f"lokr_{side}"] = whole.T.reshape(*whole.T.shape, *more)
        else:
            zeros = (0, rank - len(b))
            made[f"lokr_{side}_a"] = np.pad(b, [zeros, (0, 0)]).T
            made[f"lokr_{side}_b"] = np.pad(a, [(0, 0), zeros]).T
    return rank, {name: np.ascontiguousarray(array) for name, array in made.items()}
