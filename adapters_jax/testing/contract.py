"""`check_method`: all checks of one method, in both APIs and all variants of the tiny models."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from adapters_jax.errors import TargetError
from adapters_jax.methods import METHODS, Method
from adapters_jax.recipe import Recipe
from adapters_jax.testing import checks
from adapters_jax.testing.linen_model import KINDS
from adapters_jax.testing.subjects import APIS, Case, ContractError

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "remat": {"remat": True},
    "scan": {"scan": True, "layers": 3},
    "bf16": {"half": True},
    "scan_remat": {"scan": True, "layers": 3, "remat": True},
}


_SCANNED = ("scan", "scan_remat")


def check_method(
    method: Method,
    *,
    start_tolerance: float = 0.0,
    kinds: Sequence[str] = KINDS,
    variants: Sequence[str] = ("plain", "scan_remat", "bf16"),
) -> list[str]:
    """Runs every check of the contract on a method, of this library or another package.

    A model has blocks `layer_0` (or, scanned, `layers`) of one kind: "attention" with the
    projections `query`, `key`, `value` and `out`; "conv"; "gated" with the projections `gate` and
    `value`, which returns `{"gate": gate, "out": (value, None)}`; "mix", an einsum; "mlp" with `up`
    and `output`. Each block also has a `norm`, and the model an `embed` that is its output layer
    too.

    Args:
        method: a method whose targets are among these modules, such as `"**/mlp/output"`.
        start_tolerance: how far the output before training may be from the base's; inf for a
            method that does not start as the base.
        kinds: kinds of layers to try; kinds that the targets do not match are skipped.
        variants: some of "plain", "remat", "scan", "bf16", "scan_remat"; by default, scanned layers
            are those with remat too, since most of the time goes into compiling.

    Returns:
        The kinds of layers that were checked.

    Raises:
        ContractError: a check fails; the message names the check, the method, the API, the kind of
            layer and the variant.

    Example:
        >>> import adapters_jax as aj
        >>> check_method(aj.LoRA("**/mlp/up", 2), variants=["plain"])
        ['mlp']
    """
    kind = getattr(type(method), "kind", type(method).__name__)
    if METHODS.get(kind) is not type(method):
        raise ContractError(
            f"registered: {type(method).__name__} is not; write @aj.register_method above its class"
        )
    done: list[str] = []
    reasons: list[str] = []
    for kind in kinds:
        case = Case(kind, Recipe(method), away=start_tolerance)
        try:
            build(case, "linen", "plain")
        except TargetError as error:
            reasons.append(f"{kind}: {error}")
            continue
        with _compiling_quickly():
            _check_kind(case, variants)
        done.append(kind)
    if not done:
        raise ContractError(f"fits: {method!r} attaches to no layer: {'; '.join(reasons)}")
    return done


def build(case: Case, api: str, variant: str, **options: Any) -> Any:
    """The tiny model of a case, in one API and variant."""
    return APIS[api](case, **{**VARIANTS[variant], **options})


@contextlib.contextmanager
def _compiling_quickly() -> Iterator[None]:
    """Compiles without most of XLA's optimisations, which nobody waits for in tiny programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _check_kind(case: Case, variants: Sequence[str]) -> None:
    """Every check on one kind of layer."""
    made: dict[tuple[str, str], Any] = {}
    for api in APIS:
        for variant in variants:
            subject = made[api, variant] = build(case, api, variant)
            check = functools.partial(_run, case, f"{api}, {variant}")
            check(checks.starts_as_the_base, subject, case.away)
            check(checks.counts, subject)
            check(checks.goes_through_files, subject)
            check(checks.merges, subject)
            check(checks.trains_its_leaves_alone, subject)
            if variant in ("plain", *_SCANNED):
                check(checks.counts_shapes, subject)
                check(checks.fills_a_bank, subject)
            if variant == "plain":
                check(checks.runs_under_vmap, subject)
    for variant in {"plain", *_SCANNED} & set(variants):
        pair = (made["linen", variant], made["nnx", variant])
        _run(case, f"both APIs, {variant}", checks.computes_the_same, *pair)
    unrolled = build(case, "linen", "plain", layers=3)
    scanned = next((made["linen", x] for x in _SCANNED if x in variants), None)
    scanned = scanned or build(case, "linen", "scan")
    _run(case, "linen", checks.stacks, unrolled, scanned)
    _run(case, "linen", checks.shards, unrolled)


def _run(case: Case, where: str, check: Callable[..., None], *args: Any) -> None:
    """Runs one check; its error names the check, the method, the kind of layer and the API."""
    try:
        check(*args)
    except (ContractError, ValueError, TypeError) as error:  # all types that the library raises
        what = f"{check.__name__}: {case.recipe.methods[0]!r} on {case.kind} ({where})"
        raise ContractError(f"{what}: {error}") from error
