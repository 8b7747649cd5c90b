"""Which inputs of a traced function its outputs depend on."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex


def reaching(jaxpr: jex.Jaxpr, outputs: Sequence[bool] | None = None) -> list[bool]:
    """For each input of a jaxpr, whether some output depends on it.

    Args:
        jaxpr: the jaxpr.
        outputs: which of the outputs count; by default all.

    Example:
        >>> import jax
        >>> traced = jax.make_jaxpr(lambda x, y: (x + 1.0, y * 2.0)[:1])(1.0, 2.0)
        >>> reaching(traced.jaxpr)
        [True, False]
    """
    wanted = [True] * len(jaxpr.outvars) if outputs is None else outputs
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_var(v)}
    for eqn in reversed(jaxpr.eqns):
        given = [v in live for v in eqn.outvars]
        if any(given) or eqn.effects:
            used = _inside(eqn, given)
            live |= {v for v, use in zip(eqn.invars, used, strict=True) if use and _is_var(v)}
    return [v in live for v in jaxpr.invars]


def _is_var(v: Any) -> bool:
    return not isinstance(v, jex.Literal)


def _inside(eqn: Any, outputs: Sequence[bool]) -> list[bool]:
    """Which operands of an operation its outputs depend on; all, unless it is a function's call."""
    inner = eqn.params.get("jaxpr")
    jaxpr = getattr(inner, "jaxpr", inner)
    is_call = eqn.primitive.name in ("jit", "pjit", "remat2", "checkpoint", "closed_call")
    if not is_call or len(jaxpr.invars) != len(eqn.invars):
        return [True] * len(eqn.invars)
    return reaching(jaxpr, outputs)
